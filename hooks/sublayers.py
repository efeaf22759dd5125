"""The sublayers of a model's layers: its token mixers, and what works on every position alone (MLPs, experts).

A layer adds to the residual stream what its sublayers give. Each is a module whose output can be read, and replaced by
something else, in the shape [batch, time, hidden], whatever the module itself gives: a tensor, or a tuple that starts
with it; the rows of all prompts one below the other (OPT); or the residual stream with its own part added already
(BLOOM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mambalens.hooks.calls import RESIDUAL, bound
from mambalens.hooks.mixer import Mixer, replace_forward

MIXER, MLP = "mixer", "mlp"

Change = Callable[[Float[Tensor, "batch time hidden"]], Float[Tensor, "batch time hidden"] | None]
"""Sees what a sublayer gives; what it returns, if anything, takes its place."""


@dataclass(frozen=True, eq=False)
class Sublayer:
    """A module of a layer whose output goes into the residual stream.

    Attributes:
        module: the architecture's module.
        layer: number of its layer.
        block: the layer.
        part: 'mixer' or 'mlp' (a mixture of experts is one too).
        mixer: the token mixer, if it is one.
    """

    module: nn.Module
    layer: int
    block: nn.Module
    part: str
    mixer: Mixer | None = None

    @contextmanager
    def changing(self, change: Change) -> Iterator[None]:
        """While the block runs, `change` sees what the module gives, and may put something else in its place.

        Changes of the same module in nested blocks see what those outside have left. Leaving the block restores the
        model bit for bit.
        """
        shape: list[tuple[int, ...]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = bound(module, args, kwargs)
            hidden = next(value for value in given.values() if isinstance(value, Tensor))
            shape[:] = [hidden.shape[:2]]

        def behind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            residual = bound(module, args, kwargs).get(RESIDUAL)
            value = change(own_part(output, residual, shape[0]))
            return None if value is None else _in_form(value, residual, output)

        handles = [
            self.block.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(behind, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def giving(self, value: Float[Tensor, "batch time hidden"], returned: Any) -> Iterator[None]:
        """While the block runs, the module does not run, and gives `value`.

        Args:
            value: what it gives.
            returned: what it returned in a run of the same batch, whose form the result has.
        """

        def give(*args: Any, **kwargs: Any) -> Any:
            return _in_form(value, bound(self.module, args, kwargs).get(RESIDUAL), returned)

        restore = replace_forward(self.module, lambda original: give)
        try:
            yield
        finally:
            restore()


def own_part(returned: Any, residual: Tensor | None, rows: Sequence[int]) -> Float[Tensor, "batch time hidden"]:
    """What a module gives by itself.

    Args:
        returned: what it returned.
        residual: the residual stream, where the module adds to it itself.
        rows: prompts and positions.
    """
    found = returned[0] if isinstance(returned, tuple) else returned
    own = found.reshape(*rows, found.shape[-1])
    return own if residual is None else own - residual


def _in_form(value: Float[Tensor, "batch time hidden"], residual: Tensor | None, returned: Any) -> Any:
    """What a module returns that gives `value`, in the form of what it returned."""
    found = returned[0] if isinstance(returned, tuple) else returned
    whole = (value if residual is None else value + residual).to(found.dtype).reshape(found.shape)
    return (whole, *returned[1:]) if isinstance(returned, tuple) else whole


def sublayers_of(layers: Sequence[nn.Module], mixers: Sequence[Mixer]) -> list[list[Sublayer]]:
    """The sublayers of every layer, mixers first; a layer may have several of either, or none.

    A block inside a layer counts with it (Zamba), though what it gives reaches the residual stream through another of
    the layer's sublayers only.

    Args:
        layers: a model's layers, in order (`HookManager.layers`).
        mixers: its token mixers (`HookManager.mixers`).
    """
    found = []
    for number, layer in enumerate(layers):
        of_layer = [mixer for mixer in mixers if mixer.layer == number]
        mixing = [Sublayer(mixer.module, number, layer, MIXER, mixer) for mixer in of_layer]
        others = _others(layer, {mixer.module for mixer in of_layer})
        found.append(mixing + [Sublayer(module, number, layer, MLP) for module in others])
    return found


def _others(module: nn.Module, mixers: set[nn.Module]) -> list[nn.Module]:
    """The outermost modules with weights that are neither a mixer, nor hold one, nor are a norm."""
    found: list[nn.Module] = []
    bare: list[nn.Module] = []
    for child in module.children():
        if child in mixers:
            continue
        if any(part in mixers for part in child.modules()):
            found += _others(child, mixers)
        elif any(weight.ndim >= 2 for weight in child.parameters()):
            (found if any(True for _ in child.children()) else bare).append(child)
    # A layer may hold the weights of an MLP itself (OPT): the last of them gives its output. One alone is no MLP; it
    # projects what a block inside the layer gives (Zamba).
    return found + bare[-1:] if len(bare) > 1 else found
