"""The leak test: with every edge into a target cut, no other position's information reaches it.

Parity says that an adapter's arithmetic is the module's. It does not say that the adapter's paths are all the ways by
which a layer carries information between positions: a convolution beside the mixer, a token shift in an MLP or a router
that reads the sequence would pass a knockout by. This is tested on the running model: two passes with the same tokens
at the targets and others everywhere else, under a knockout of every edge into the targets, in every layer. What a layer
gives at the targets has to be the same in both. In the second pass the targets are handed from layer to layer as they
were in the first, so that every layer is tested by itself and rounding does not add up with depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from mambalens.hooks.adapters import SUPPORTED
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Paths
from mambalens.hooks.mixer import Mixer

TIME = 23
"""Positions of the test: more than a convolution's kernel has, and no width or number of heads of any model, so that
the positions of a tensor are known by their number."""
TARGETS = (11, 22)
WITNESS = 21
"""A position that nothing is cut from, whose mixers show what is left when all is well."""
AT_TARGETS, AT_WITNESS = slice(0, len(TARGETS)), slice(len(TARGETS), None)
"""Where they are in what is kept of a call."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
"""How much the numbers at a target may move, root mean square, relative to themselves, and half as much as the largest
may. They are computed from equal numbers: only kernels that take as many positions along as the other tokens decide,
such as those of experts, round differently."""
HALF_TOLERANCE = 1e-2
"""The same in half precision."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A module's call, as far as it is about the targets and the witness."""

    given: list[Shaped[Tensor, "position ..."]]
    """What it was given there: every tensor that has positions."""
    whole: list[Tensor]
    """Tensors without positions that it was given."""
    output: list[Shaped[Tensor, "position ..."]]
    """What it gave there."""


_Calls = dict[tuple[nn.Module, int], _Call]
"""Calls by module and by how many calls of it went before, in the order in which they ended."""


def refuse_leaks(
    model: Any,
    layers: Sequence[nn.Module],
    mixers: Sequence[Mixer],
    knockout: Callable[..., AbstractContextManager[Any]],
) -> None:
    """Raise where a target reads other positions although every edge into it is cut; three forward passes.

    The model is left as it was.

    Args:
        model: a causal LM in eval mode: what dropout changes would look like a leak.
        layers: its layers, in order.
        mixers: their token mixers.
        knockout: `HookManager.knockout` of the model.

    Raises:
        MambalensError: naming the model's class, the first layer that leaks, and the module in it that mixes positions,
            where one does; or a mixer that loses the target's own entry too; or a
            layer that cannot be tested.
    """
    _LeakTest(model, layers, mixers, knockout)()


class _LeakTest:
    def __init__(
        self,
        model: Any,
        layers: Sequence[nn.Module],
        mixers: Sequence[Mixer],
        knockout: Callable[..., AbstractContextManager[Any]],
    ) -> None:
        self.model, self.layers, self.mixers, self.knockout = model, list(layers), mixers, knockout
        self.name = type(model).__name__
        self.edges = torch.zeros(TIME, TIME, dtype=torch.bool)
        for target in TARGETS:
            self.edges[target, :target] = True

    @torch.no_grad()
    def __call__(self) -> None:
        ids, elsewhere, everywhere = _inputs(self.model)
        watched = [*self.layers, *(mixer.module for mixer in self.mixers)]
        first, logits = self._run(ids, watched)
        self._expect_positions(first, logits)
        second, other = self._run(elsewhere, watched, first)
        for key, call in second.items():
            if key[0] in self.layers:
                self._compare(self.layers.index(key[0]), first.get(key), call, ids, elsewhere)
        if not _same(logits, other):
            raise self._error(f"behind the last layer, {self._layer(len(self.layers) - 1)}")
        third, _ = self._run(everywhere, watched)
        self._own_entries(first, third)

    def _run(
        self, ids: Int[Tensor, "1 time"], watched: Sequence[nn.Module], forced: _Calls | None = None
    ) -> tuple[_Calls, list[Shaped[Tensor, "position ..."]]]:
        """One pass under the knockout.

        Args:
            ids: tokens.
            watched: modules whose calls are kept.
            forced: calls of an earlier pass, whose layers' outputs at the targets take the place of this pass's.

        Returns:
            The calls, and the logits at the targets and the witness.
        """
        layers = self.layers if forced is not None else ()
        with self.knockout(edges=self.edges, path="both"), _watching(watched, layers, forced or {}) as calls:
            output = self.model(input_ids=ids, use_cache=False)
        return calls, _at_positions([output.logits if hasattr(output, "logits") else output[0]])

    def _expect_positions(self, first: _Calls, logits: list[Shaped[Tensor, "position ..."]]) -> None:
        """Raise where nothing could be compared, which would look as if nothing leaked."""
        for (module, _), call in first.items():
            if module not in self.layers:
                continue
            layer = self._layer(self.layers.index(module))
            if not call.output:
                raise MambalensError(
                    f"{self.name}: {layer} gives nothing with an entry for each of {TIME} tokens, so that it cannot be "
                    f"tested for leaks. Supported: {SUPPORTED}."
                )
            if not call.output[0][AT_TARGETS].isfinite().all():
                raise MambalensError(
                    f"{self.name}: {layer} gives numbers that are not finite for random tokens in "
                    f"{call.output[0].dtype}, so that it cannot be tested for leaks: load the model in torch.float32."
                )
        if not logits or not any(module in self.layers for module, _ in first):
            raise MambalensError(
                f"{self.name} runs none of its layers, or gives no logits for each of {TIME} tokens, so that it cannot "
                f"be tested for leaks. Supported: {SUPPORTED}."
            )

    def _compare(
        self,
        number: int,
        before: _Call | None,
        now: _Call,
        ids: Int[Tensor, "1 time"],
        elsewhere: Int[Tensor, "1 time"],
    ) -> None:
        """Raise if a layer was given other, or gave other, at the targets than in the first pass."""
        if before is None:
            raise self._error(f"in what decides whether {self._layer(number)} runs")
        if not _same(before.given, now.given):
            raise self._error(f"before {self._layer(number)}, in what it is given")
        if not _same(before.output, now.output):
            raise self._error(self._place(number, ids, elsewhere))

    def _place(self, number: int, ids: Int[Tensor, "1 time"], elsewhere: Int[Tensor, "1 time"]) -> str:
        """Where in a layer positions are mixed: the first module given the same at the targets that gives other."""
        layer = self.layers[number]
        mixers = {mixer.module: mixer for mixer in self.mixers if mixer.layer == number}
        # What runs inside a mixer that has more than one path mixes positions by rights: there the adapter cuts.
        hidden = {part for mixer in mixers.values() if mixer.paths != Paths.MAIN for part in mixer.module.modules()}
        names = {part: name for name, part in layer.named_modules() if name and (part in mixers or part not in hidden)}
        first, _ = self._run(ids, [*self.layers, *names])
        second, _ = self._run(elsewhere, [*self.layers, *names], first)
        for key, call in second.items():
            part, before = key[0], first.get(key)
            if part not in names or before is None or not (before.given and before.output):
                continue
            alike = _same(before.given, call.given) and _same(before.whole, call.whole)
            if alike and not _same(before.output, call.output):
                what = f"{names[part]} ({type(part).__name__})"
                if part in mixers:
                    return (
                        f"in {self._layer(number)}, in {what}: the {mixers[part].kind} adapter does not cut all of it"
                    )
                return f"in {self._layer(number)}, in {what}, which no path of a knockout cuts"
        return f"in {self._layer(number)}, in the layer's own code, which no path of a knockout cuts"

    def _own_entries(self, first: _Calls, third: _Calls) -> None:
        """Raise if a mixer gives the same at a target whatever the target's token, and not so where nothing is cut."""
        for mixer in self.mixers:
            pairs = [(first[key].output[:1], third[key].output[:1]) for key in first.keys() & third.keys()
                     if key[0] is mixer.module]  # fmt: skip
            for before, after in pairs:
                if _same(before, after) and not _same(before, after, AT_WITNESS):
                    raise MambalensError(
                        f"{self.name}: in {self._layer(mixer.layer)} a target does not read itself once every edge "
                        f"from other positions is cut: the {mixer.kind} adapter cuts too much of "
                        f"{type(mixer.module).__name__}. Supported: {SUPPORTED}."
                    )

    def _layer(self, number: int) -> str:
        return f"layer {number} ({type(self.layers[number]).__name__})"

    def _error(self, place: str) -> MambalensError:
        return MambalensError(
            f"{self.name} leaks: a target reads other positions although every edge from them is cut in every layer. "
            f"Positions are mixed {place}. Supported: {SUPPORTED}."
        )


@contextmanager
def _watching(watched: Sequence[nn.Module], forced_layers: Sequence[nn.Module], forced: _Calls) -> Iterator[_Calls]:
    """Keep the calls of modules while the block runs; some are made to give at the targets what they gave before."""
    calls: _Calls = {}
    numbers: Counter[nn.Module] = Counter()
    given: dict[nn.Module, tuple[list[Tensor], list[Tensor]]] = {}

    # What is given is kept before the module runs: some add to their input in place.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = list(_tensors((args, kwargs)))
        given[module] = _at_positions(tensors), [tensor.clone() for tensor in tensors if _axis(tensor) is None]

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        key = (module, numbers[module])
        numbers[module] += 1
        calls[key] = _Call(*given.pop(module), _at_positions(_tensors(output)))
        if module not in forced_layers or key not in forced:
            return None
        return _with_targets(output, forced[key].output)

    with ExitStack() as stack:
        for module in dict.fromkeys(watched):
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield calls


def _inputs(model: Any) -> tuple[Int[Tensor, "1 time"], Int[Tensor, "1 time"], Int[Tensor, "1 time"]]:
    """Random tokens; others but at the targets; others everywhere. None is of a kind that models ask for."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    special = {
        token
        for config in (model.config, model.config.get_text_config())
        for name, token in vars(config).items()
        if name.endswith("_token_id") and isinstance(token, int)
    }
    tokens = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(0)
    device = model.get_input_embeddings().weight.device
    ids = torch.randint(0, len(tokens), (1, TIME), generator=generator)
    everywhere = (ids + torch.randint(1, len(tokens), (1, TIME), generator=generator)) % len(tokens)
    elsewhere = everywhere.clone()
    elsewhere[:, TARGETS] = ids[:, TARGETS]
    return tokens[ids].to(device), tokens[elsewhere].to(device), tokens[everywhere].to(device)


def _tensors(value: Any) -> Iterator[Shaped[Tensor, " ..."]]:
    """The tensors of a call's arguments or outputs, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _axis(tensor: Shaped[Tensor, " ..."]) -> int | None:
    """The first axis that positions can be; targets come before sources."""
    return next((axis for axis, size in enumerate(tensor.shape) if size == TIME), None)


def _at_positions(tensors: Any) -> list[Shaped[Tensor, "position ..."]]:
    """What tensors hold at the targets and the witness, those that have positions."""
    found = []
    for tensor in tensors:
        axis = _axis(tensor)
        if axis is not None:
            at = torch.tensor([*TARGETS, WITNESS], device=tensor.device)
            found.append(tensor.index_select(axis, at).movedim(axis, 0))
    return found


def _with_targets(output: Any, rows: list[Shaped[Tensor, "position ..."]]) -> Any:
    """A layer's output, whose first tensor has these rows at the targets."""
    hidden = next(_tensors(output), None)
    if hidden is None or not rows or not (output is hidden or (isinstance(output, tuple) and output[0] is hidden)):
        return None
    axis = _axis(hidden)
    if axis is None:
        return None
    hidden = hidden.clone()
    hidden.movedim(axis, 0)[list(TARGETS)] = rows[0][AT_TARGETS]
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _same(
    one: Sequence[Shaped[Tensor, "position ..."]],
    other: Sequence[Shaped[Tensor, "position ..."]],
    positions: slice = AT_TARGETS,
) -> bool:
    """Whether tensors are equal up to rounding, at the targets or at other positions of what was kept."""
    if len(one) != len(other):
        return False
    return all(_close(a[positions], b[positions]) for a, b in zip(one, other, strict=True))


def _close(one: Shaped[Tensor, " ..."], other: Shaped[Tensor, " ..."]) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = TOLERANCE.get(one.dtype, HALF_TOLERANCE)
    precise = torch.promote_types(one.dtype, torch.float32)
    for a, b in zip(one.to(precise), other.to(precise), strict=True):
        # Numbers that are not finite have to be the same.
        moved = (b - a).masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
        if not (moved.norm() <= tolerance * a.norm() and _largest(moved) <= 2 * tolerance * _largest(a)):
            return False
    return True


def _largest(tensor: Shaped[Tensor, " ..."]) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
