"""What each layer adds to the residual stream at one position, parted into what its sublayers give.

A layer adds its output minus its input: added up over the layers this is the whole residual stream, whatever their
architecture. A layer gives a linear map of what its sublayers give, also where a norm stands behind them, as long as
that norm's scale is held fixed (see `fixed_scales`); what is left over is what the layer does to the stream itself:
nothing, in most models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambalens.hooks.behind import hidden_of
from mambalens.hooks.calls import RESIDUAL, bound
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.fixed_scales import FixedScales
from mambalens.hooks.manager import PARITY_TOLERANCE, HookManager
from mambalens.hooks.mixer import Captured
from mambalens.hooks.sublayers import Sublayer, own_part, sublayers_of
from mambalens.hooks.summands import Summands


class Gave(NamedTuple):
    """What a sublayer did in a run."""

    call: Captured
    own: Float[Tensor, "batch time hidden"]
    """What it gave by itself."""


class SublayerPart(NamedTuple):
    """What a sublayer adds along a direction, for every prompt of a batch."""

    sublayer: Sublayer
    total: Float[Tensor, " batch"]
    summands: Summands | None
    """Of a mixer."""


class LayerParts(NamedTuple):
    """What a layer adds along a direction."""

    sublayers: list[SublayerPart]
    rest: Float[Tensor, " batch"]
    """What the layer does to the residual stream itself, biases of norms behind its sublayers included."""
    added: Float[Tensor, " batch"] | None = None
    """What `HookManager.add` adds behind the layer; None where it adds nothing."""


class Parts(NamedTuple):
    """The residual stream behind the layers along a direction."""

    embedding: Float[Tensor, " batch"]
    """What enters the first layer."""
    layers: list[LayerParts]


@torch.no_grad()
def parts_of(
    hooks: HookManager,
    ids: Int[Tensor, "batch time"],
    at: Int[Tensor, " batch"],
    direction: Float[Tensor, "batch hidden"],
) -> Parts:
    """Part the residual stream behind the layers at one position of every prompt.

    Inside knockouts the parts are those of the cut model, and of what is added behind layers (`HookManager.add`) each
    layer's share is a part of its own.

    Args:
        hooks: the model's hooks.
        ids: tokens, padded on the right.
        at: the positions.
        direction: in the residual stream, for every prompt, in float64.

    Raises:
        MambalensError: where a layer or mixer is not linear in what is added up, even with its norms' scales fixed.
    """
    embedding: list[Tensor] = []
    found: list[LayerParts] = []

    def watched(of_layer: Sequence[Sublayer]) -> Callable[..., None]:
        """A hook behind a layer, with others behind its sublayers."""
        gave: dict[Sublayer, Gave] = {}

        def keeping(sublayer: Sublayer) -> Callable[..., None]:
            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                own = own_part(output, bound(module, args, kwargs).get(RESIDUAL), ids.shape)
                gave[sublayer] = Gave(Captured(args, kwargs, output, None), own.clone())  # layers may add in place

            return keep

        for sublayer in of_layer:
            if sublayer.mixer is not None:
                stack.enter_context(sublayer.mixer.probing())
            handle = sublayer.module.register_forward_hook(keeping(sublayer), with_kwargs=True)
            stack.callback(handle.remove)

        def behind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = Captured(args, kwargs, output, None)
            if not found:
                embedding.append(_along(_entering(module, call), at, direction))
            found.append(_part(hooks, len(found), call, dict(gave), at, direction))

        return behind

    with ExitStack() as stack:
        for layer, of_layer in zip(hooks.layers, sublayers_of(hooks.layers, hooks.mixers), strict=True):
            stack.callback(layer.register_forward_hook(watched(of_layer), with_kwargs=True).remove)
        hooks.trunk(input_ids=ids, use_cache=False)
    return Parts(embedding[0], found)


def _part(
    hooks: HookManager,
    number: int,
    call: Captured,
    gave: dict[Sublayer, Gave],
    at: Int[Tensor, " batch"],
    direction: Float[Tensor, "batch hidden"],
) -> LayerParts:
    """Part what one layer adds.

    Args:
        hooks: the model's hooks.
        number: of the layer.
        call: its call, behind it what is added there.
        gave: what its sublayers gave in it.
        at: the positions.
        direction: in the residual stream.
    """
    layer = hooks.layers[number]
    entered = _along(_entering(layer, call), at, direction)
    whole = _along(hidden_of(call.output), at, direction) - entered
    vectors = hooks.added_behind(number, hidden_of(call.output))
    added = None if vectors is None else _along(vectors, at, direction)
    if added is not None:
        whole = whole - added

    def run(values: dict[Sublayer, Tensor]) -> Float[Tensor, " batch"]:
        """What the layer gives where its sublayers give these values, along the direction."""
        with ExitStack() as stack:
            for sublayer, value in values.items():
                stack.enter_context(sublayer.giving(value.clone(), gave[sublayer].call.output))
            again = hidden_of(layer.forward(*call.args, **call.kwargs))
        return _along(again, at, direction)

    gradients: tuple[Tensor | None, ...] = ()
    with torch.enable_grad(), FixedScales() as fixed:
        values = {sublayer: of.own.detach().requires_grad_() for sublayer, of in gave.items()}
        along = run(values).sum()
        if values:
            gradients = torch.autograd.grad(along, list(values.values()), allow_unused=True)
    with FixedScales(fixed.scales):
        left = run({sublayer: torch.zeros_like(of.own) for sublayer, of in gave.items()}) - entered

    parts, rest = [], whole
    for (sublayer, of), gradient in zip(gave.items(), gradients, strict=True):
        # A block inside the layer may reach the residual stream through another of its sublayers only (Zamba).
        pulled = torch.zeros_like(of.own) if gradient is None else gradient
        towards = _at(pulled, at).to(direction.dtype)
        total = _along(of.own, at, towards).to(whole.device)  # layers may lie on several devices
        rest = rest - total
        summands = None
        if sublayer.mixer is not None:
            found = sublayer.mixer.summands(of.call, at.to(towards.device), towards, hooks.cuts_of(sublayer.mixer))
            summands = found.to(whole.device)
            _refuse_unequal(total, summands.total, summands.sources.abs().sum((1, 2)), of.own.dtype, sublayer)
            # Exactly what is left: the same up to rounding.
            summands = summands._replace(constant=total - (summands.total - summands.constant))
        parts.append(SublayerPart(sublayer, total, summands))
    size = torch.stack([part.total.abs() for part in parts] or [whole.abs()]).sum(0) + whole.abs() + entered.abs()
    _refuse_unequal(rest, left, size, hidden_of(call.output).dtype, layer)
    return LayerParts(parts, rest, added)


def _refuse_unequal(
    wanted: Float[Tensor, " batch"],
    found: Float[Tensor, " batch"],
    size: Float[Tensor, " batch"],
    dtype: torch.dtype,
    of: Sublayer | nn.Module,
) -> None:
    """Refuse what is not linear in its parts.

    Args:
        wanted, found: what has to be the same.
        size: of what is added up.
        dtype: of the model.
        of: what is parted.
    """
    off = ((wanted - found).abs() / (size + wanted.abs()).clamp_min(1e-30)).max()
    if float(off) > PARITY_TOLERANCE.get(dtype, 5e-2):
        where = f"layer {of.layer}: {type(of.module).__name__}" if isinstance(of, Sublayer) else type(of).__name__
        raise MambalensError(
            f"{where} cannot be parted into contributions: its output differs from the sum of its parts by "
            f"{float(off):.1e} (relative), so it is not linear in them even with the scales of its norms held fixed."
        )


def _entering(layer: nn.Module, call: Captured) -> Float[Tensor, "batch time hidden"]:
    """The residual stream that enters a layer: its first argument behind itself."""
    given = call.arguments(layer)
    return given[list(given)[1]]


def _at(values: Float[Tensor, "batch time hidden"], at: Int[Tensor, " batch"]) -> Float[Tensor, "batch hidden"]:
    """One position of every prompt."""
    at = at.to(values.device)
    return values[torch.arange(len(at), device=at.device), at]


def _along(
    values: Float[Tensor, "batch time hidden"], at: Int[Tensor, " batch"], direction: Float[Tensor, "batch hidden"]
) -> Float[Tensor, " batch"]:
    """One position of every prompt along a direction, in the direction's precision."""
    return torch.linalg.vecdot(_at(values, at).to(direction), direction)
