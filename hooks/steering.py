"""Steering: a vector added to the residual stream behind some layers while a block runs.

    h^l_t <- h^l_t + scale * v        behind the chosen layers l, at the chosen positions t

Behind a layer is where its output is: the residual stream with what the layer's mixer and MLP have added to it, as the
next layer reads it. The layer's own residual stream is not touched, and so is nothing left of the first position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Positions, position_mask, told_by_prompt
from mambalens.hooks.mixer import Pass

SHAPES = "[hidden], [layers, hidden], [batch, hidden] or [layers, batch, hidden]"


@dataclass(frozen=True, eq=False)
class Addition:
    """A vector that is added behind some layers (Turner et al. 2023, arXiv:2308.10248)."""

    vector: Float[Tensor, "*rows hidden"]
    """What is added: one vector, one for each layer, one for each prompt, or both."""
    layers: Sequence[int] | int | str | None
    """Layer numbers, or a kind of mixer ('attention': the layers that have one). None: every layer."""
    positions: Positions | None = None
    """Where; None: at every position, generated ones too."""
    scale: float = 1.0
    """How many times it is added."""


class Steering:
    """An addition whose `with` block is running.

    Attributes:
        addition: what is added.
        layers: numbers of the layers.
        reached: columns that the longest input so far had.
        wanted: columns that its farthest position needs.
    """

    def __init__(self, addition: Addition, layers: Sequence[int], width: int) -> None:
        """Look an addition up in a model.

        Args:
            addition: what is added.
            layers: numbers of its layers.
            width: of the residual stream.

        Raises:
            MambalensError: for a vector of another width, or one that does not fit the layers.
        """
        vector = addition.vector
        if not isinstance(vector, Tensor) or not vector.is_floating_point() or not 1 <= vector.ndim <= 3:
            what = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
            raise MambalensError(f"vector is {what}: give a tensor of floating-point numbers, {SHAPES}.")
        if vector.shape[-1] != width:
            raise MambalensError(
                f"vector has {vector.shape[-1]} numbers (shape {list(vector.shape)}), but the model's residual stream "
                f"has {width}."
            )
        if not bool(vector.isfinite().all()):
            raise MambalensError("vector has numbers that are not finite, which would leave nothing of the model.")
        if len(set(layers)) < len(layers):
            raise MambalensError(f"layers={addition.layers!r} names a layer twice: use scale to add more.")
        if vector.ndim == 3 and vector.shape[0] not in (1, len(layers)):
            raise MambalensError(
                f"vector has shape {list(vector.shape)}, [layers, batch, hidden], but there are {len(layers)} layers."
            )
        self.addition, self.layers = addition, list(layers)
        self.reached = self.wanted = 0
        self._at: Bool[Tensor, "batch time 1"] | None = None  # of the running pass; None: every position
        self._in_pass = self._paused = False

    @property
    def by_prompt(self) -> bool:
        """Whether it says something of its own of every prompt of a batch."""
        vector = self.addition.vector
        rows = vector.shape[-2] if vector.ndim > 1 else 1
        of_prompts = rows > 1 and (vector.ndim == 3 or rows != len(self.layers))
        return of_prompts or told_by_prompt(self.addition.positions)

    def begin(self, batch: int, running: Pass) -> list[int]:
        """Hear of a pass; positions that it does not reach come back.

        Raises:
            MambalensError: for positions or a vector of another number of prompts.
        """
        for number in range(len(self.layers)):
            rows = len(self._vector(number, batch))
            if rows not in (1, batch):
                raise MambalensError(
                    f"vector has shape {list(self.addition.vector.shape)}, but the input has {batch} prompts, and "
                    f"there are {len(self.layers)} layers: give {SHAPES}."
                )
        later: list[int] = []
        self._at, self._in_pass = None, True
        if self.addition.positions is not None:
            mask, later, _ = position_mask(self.addition.positions, "positions", batch, running.prompt, running.length)
            self._at = mask[:, running.past :, None]
        return later

    def end(self) -> None:
        """Forget the pass."""
        self._at, self._in_pass = None, False

    def behind(self, layer: int) -> Callable[..., Any]:
        """A forward hook for one of its layers."""
        number = self.layers.index(layer)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._paused:
                return None
            if isinstance(output, tuple):
                return (self.added(number, output[0]), *output[1:])
            return self.added(number, output)

        return hook

    @contextmanager
    def rows(self, at_rows: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the block runs, layers take rows of a replay in the place of the pass's positions.

        Args:
            at_rows: picks what belongs to positions [batch, T, ...] for the rows [batch, cuts x length, ...].
        """
        at = self._at
        self._at = None if at is None else at_rows(at)
        try:
            yield
        finally:
            self._at = at

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While the block runs, nothing is added."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _vector(self, number: int, batch: int) -> Float[Tensor, "rows hidden"]:
        """What is added behind the layer of this number, for every prompt or for all of them."""
        vector, layers = self.addition.vector, len(self.layers)
        if vector.ndim == 3:
            return vector[number if len(vector) > 1 else 0]
        if vector.ndim == 1 or len(vector) == 1:
            return vector.reshape(1, -1)
        if len(vector) == layers == batch and layers > 1:
            raise MambalensError(
                f"vector has shape {list(vector.shape)}, and there are as many layers as prompts: give "
                "[layers, 1, hidden] or [1, batch, hidden]."
            )
        return vector[number][None] if len(vector) == layers else vector

    def added(self, number: int, hidden: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time hidden"]:
        """The residual stream behind the layer of this number, with the vector.

        Equation: Steering
            h^l_t <- h^l_t + scale * v    for l in the layers, t in the positions

            Source: Turner et al. 2023, arXiv:2308.10248, algorithm 1

            h^l is the residual stream behind layer l.
        """
        if not self._in_pass:
            raise MambalensError("A layer was called on its own while a vector is added: call the model.")
        vector = self._vector(number, len(hidden))[:, None]  # [1 or B, 1, W]
        moved = hidden + (self.addition.scale * vector).to(hidden)
        return moved if self._at is None else torch.where(self._at.to(hidden.device), moved, hidden)


def plain(value: Any) -> Any:
    """Anything that a block was told, as JSON: what tells a run inside one block from a run inside another."""
    if isinstance(value, Tensor):
        return [list(value.shape), str(value.dtype), value.detach().double().flatten().tolist()]
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, Sequence | range) and not isinstance(value, str):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def counts_back(positions: Any) -> bool:
    """Whether some of the positions count from the end."""
    if isinstance(positions, Tensor):
        return positions.dtype != torch.bool and bool((positions < 0).any())
    if isinstance(positions, Sequence | range) and not isinstance(positions, str):
        return any(map(counts_back, positions))
    return isinstance(positions, int) and positions < 0
