"""What a knockout cuts: as the user says it (`Knockout`), looked up in a model (`Cutting`), and as columns of a pass.

A knockout is `alpha[t, s, f] = 0` for its edges s -> t, in its features f, on its paths. Sources x targets is the short
way to say edges. What is cut of one mixer in one forward pass is a `masks.Cut`.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from mambalens.hooks.errors import MambalensError, choose
from mambalens.hooks.values import Values

Path = Literal["main", "conv", "erase", "both"]
PATHS: tuple[str, ...] = get_args(Path)


class Paths(enum.Flag):
    """Ways from position to position inside a token mixer, together."""

    NONE = 0
    MAIN = enum.auto()
    """The scan or attention."""
    CONV = enum.auto()
    """The taps of the causal convolution before the scan."""
    ERASE = enum.auto()
    """What a delta rule's position removes of the state that it finds."""
    BOTH = MAIN | CONV | ERASE
    """Everything that a source does to what its targets read; the name is older than the third way."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each of them."""
        return tuple(str(path.name).lower() for path in self)

    @property
    def choices(self) -> tuple[str, ...]:
        """What a path may be called where these are the ways: each of them, and 'both' where they are several."""
        return (*self.names, "both") if len(self) > 1 else self.names

    @classmethod
    def named(cls, path: str) -> Paths:
        """The ways that a path's name stands for.

        Raises:
            MambalensError: if there is no such path.
        """
        if path not in PATHS:
            raise MambalensError(f"path={path!r} is not a path between positions: {choose(path, PATHS)}.")
        return cls[path.upper()]

    def replaceable(self, path: str) -> Paths:
        """Those of the ways on which something may stand in the place of what a source hands on.

        What a source erases stays, as keys do: only what it writes is replaced.

        Args:
            path: what the user calls them.

        Raises:
            MambalensError: if there is none.
        """
        left = self & ~Paths.ERASE
        if not left:
            raise MambalensError(
                f"path={path!r} has nothing that could stand in the place of what is cut: what a source erases is no "
                "value. Cut it to zero, or replace what the source writes: path='main', 'conv' or 'both'."
            )
        return left


Positions = int | Sequence[int] | Sequence[Sequence[int]] | Tensor
"""Columns of `input_ids`: one int, a list for all rows, a list for each row, or a boolean mask `[T]` or `[batch, T]`.
Negative positions count from the end of the prompt."""

Features = str | int | Sequence[int] | Sequence[Any] | Mapping[int, Any] | Tensor
"""A group's name, a feature's number, a boolean mask or index list over a layer's features, or one of these for each
layer (a dict by layer, such as a `Selection`; a list over the model's layers or over the knockout's)."""


@dataclass(frozen=True, eq=False)
class Knockout:
    """`alpha[t, s, f] = 0` for targets t, sources s and features f, in every one of some layers (Geva et al. 2023)."""

    sources: Positions | None = None
    """Positions whose information is blocked."""
    targets: Positions | None = None
    """Positions that are not to receive it."""
    layers: Sequence[int] | int | str | None = None
    """Layer numbers, or a kind of mixer ('attention': those mixers, in every layer). None: every layer."""
    features: Features = "all"
    """Which of a mixer's features are cut."""
    path: Path = "main"
    """What a source writes ('main': the scan, or attention), hands on by the convolution before the scan ('conv') or
    removes from a delta rule's state ('erase'); 'both' is all that the mixer has."""
    mixers: str | None = None
    """Only mixers of this kind ('attention', 'mamba1', 'deltanet'), in models that have several; None: all."""
    edges: Bool[Tensor, "*batch time time"] | None = None
    """Instead of sources and targets: which edges are cut, a boolean mask [T, T] or [batch, T, T], targets in rows and
    sources in columns. What lies above the diagonal says nothing: no position reads a later one."""
    instead: Values | None = None
    """What stands in the place of what sources hand on, column by column; None: nothing (zero)."""

    def __post_init__(self) -> None:
        paths = Paths.named(self.path)
        if self.instead is not None:
            paths.replaceable(self.path)
        if (self.edges is None) == (self.sources is None and self.targets is None):
            raise MambalensError("Give a knockout sources and targets, or edges.")
        if self.edges is None and (self.sources is None or self.targets is None):
            missing = "sources" if self.sources is None else "targets"
            raise MambalensError(f"A knockout of sources and targets needs both: {missing} is missing.")
        edges = self.edges
        if edges is None:
            return
        if not isinstance(edges, Tensor) or edges.dtype != torch.bool:
            what = f"{edges.dtype} numbers" if isinstance(edges, Tensor) else type(edges).__name__
            raise MambalensError(f"edges are {what}: give a boolean mask [T, T] or [batch, T, T].")
        if edges.ndim not in (2, 3) or edges.shape[-1] != edges.shape[-2]:
            raise MambalensError(f"edges is a mask of shape {list(edges.shape)}: give [T, T] or [batch, T, T].")


@dataclass(frozen=True, eq=False)
class Cutting:
    """A knockout looked up in a model, whatever its positions: which mixers, which of their features, which paths."""

    features: Mapping[Any, Bool[Tensor, " feature"] | None]
    """Mask of every mixer that is cut; None for every feature."""
    paths: Paths

    def replacing(self) -> Cutting:
        """The same where something stands in the place of what is cut, see `Paths.replaceable`."""
        return Cutting(self.features, self.paths & ~Paths.ERASE)

    @property
    def start(self) -> int:
        """The first layer that it changes; 0 where it cuts nothing."""
        return min((mixer.layer for mixer in self.features), default=0)


def refuse_keys(cuttings: Iterable[Cutting]) -> None:
    """Refuse to put keys in with values where nothing that is cut has keys of its own.

    A key of softmax attention says how much of its value is read, and no more. The k of a delta rule says what its
    position erases too, which no ablation replaces; and the B of a state space belongs to many features at once, of
    which some may be cut and others not. So recurrences keep theirs.

    Args:
        cuttings: what is cut.

    Raises:
        MambalensError: if nothing of it is read by keys.
    """
    found = [mixer for cutting in cuttings for mixer in cutting.features if cutting.paths & mixer.paths]
    if not any(mixer.has_keys for mixer in found):
        kinds = " and ".join(sorted({mixer.kind for mixer in found})) or "nothing"
        raise MambalensError(
            f"keys=True puts in keys of attention, but what is cut is {kinds}: recurrences keep their own k and B. "
            "Leave keys out."
        )


def edge_mask(
    edges: Bool[Tensor, "*batch time time"], batch: int, prompt: int, length: int
) -> tuple[Bool[Tensor, "batch length length"], list[int], bool]:
    """Edges over the first `length` columns.

    Returns:
        A mask; targets past `length` (they may be generated later); whether any target lies
        past the prompt.
    """
    given = edges.cpu().expand(batch, -1, -1) if edges.ndim == 2 else edges.cpu()
    if given.shape[0] != batch or given.shape[1] < prompt:
        raise MambalensError(
            f"edges is a mask of shape {list(edges.shape)}, but the input has shape [{batch}, {prompt}]: give "
            f"[{prompt}, {prompt}] or [{batch}, {prompt}, {prompt}]."
        )
    given = given.tril()
    columns = min(given.shape[1], length)
    mask = torch.zeros(batch, length, length, dtype=torch.bool)
    mask[:, :columns, :columns] = given[:, :columns, :columns]
    targets = given.any(2).any(0)  # [T]
    beyond = [int(p) for p in targets[length:].nonzero().flatten() + length]
    return mask, beyond, bool(targets[prompt:].any())


def position_mask(
    positions: Positions, name: str, batch: int, prompt: int, length: int
) -> tuple[Bool[Tensor, "batch length"], list[int], bool]:
    """Turn positions into a boolean mask over the first `length` columns.

    Args:
        positions: as the user gave them.
        name: what they are called in an error ('sources', 'targets').
        batch, prompt: rows, and columns of the prompt that negative positions count from.
        length: columns to cover; past `prompt` only while generating.

    Returns:
        A mask; positions past `length` (they may be generated later); whether any position, reached or
        not, lies past the prompt.
    """
    mask = torch.zeros(batch, length, dtype=torch.bool)
    tensor = positions if isinstance(positions, Tensor) else None
    if tensor is not None and tensor.dtype == torch.bool:
        given = tensor.cpu()
        if given.ndim == 1:
            given = given.expand(batch, -1)
        if given.ndim != 2 or given.shape[0] != batch or given.shape[1] < prompt:
            raise MambalensError(
                f"{name} is a boolean mask of shape {list(tensor.shape)}, but the input has shape [{batch}, {prompt}]: "
                "give a mask [T] or [batch, T]."
            )
        columns = min(given.shape[1], length)
        mask[:, :columns] = given[:, :columns]
        beyond = [int(p) for p in given[:, length:].any(0).nonzero().flatten() + length]
        return mask, beyond, bool(given[:, prompt:].any())
    rows = _rows(positions, name, batch)
    beyond = []
    for row, columns_of_row in enumerate(rows):
        for position in columns_of_row:
            column = position + prompt if position < 0 else position
            if column < 0:
                raise MambalensError(
                    f"{name} has position {position}, but the input has {prompt} tokens: use {-prompt} to {prompt - 1}."
                )
            if column < length:
                mask[row, column] = True
            else:
                beyond.append(column)
    return mask, beyond, any(column >= prompt for columns in rows for column in columns)


def _rows(positions: Positions, name: str, batch: int) -> list[list[int]]:
    """Positions as one list of ints for every row."""
    values: Any = positions.tolist() if isinstance(positions, Tensor) else positions
    if isinstance(values, int):
        values = [values]
    try:
        listed = [list(v) if isinstance(v, Sequence | range | Tensor) else v for v in values]
        if any(isinstance(v, list) for v in listed):
            rows = [[_as_int(p) for p in v] for v in listed]
            if len(rows) != batch:
                raise MambalensError(
                    f"{name} has positions for {len(rows)} rows, but the input has {batch}: give one list for each, "
                    "or one list for all."
                )
            return rows
        return [[_as_int(p) for p in listed]] * batch
    except TypeError:
        raise MambalensError(
            f"{name}={positions!r} are not positions: give ints, a list of ints for each row, or a boolean mask "
            "[batch, T]."
        ) from None


def _as_int(value: Any) -> int:
    """An int, but no bool and no float: `True` is not position 1."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)
