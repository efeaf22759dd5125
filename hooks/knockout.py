"""What a knockout cuts: sources, targets, layers, features and path, and which columns of a forward pass they are."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mambalens.hooks.errors import MambalensError, choose

Path = Literal["main", "conv", "both"]
PATHS: tuple[str, ...] = get_args(Path)

Positions = int | Sequence[int] | Sequence[Sequence[int]] | Tensor
"""Columns of `input_ids`: one int, a list for all rows, a list for each row, or a boolean mask `[T]` or `[batch, T]`.
Negative positions count from the end of the prompt."""

Features = str | int | Sequence[int] | Sequence[Any] | Mapping[int, Any] | Tensor
"""A group's name, a feature's number, a boolean mask or index list over a layer's features, or one of these for each
layer (a dict by layer, such as a `Selection`; a list over the model's layers or over the knockout's)."""


@dataclass(frozen=True)
class Knockout:
    """`alpha[t, s, f] = 0` for targets t, sources s and features f, in every one of some layers (Geva et al. 2023)."""

    sources: Positions
    """Positions whose information is blocked."""
    targets: Positions
    """Positions that are not to receive it."""
    layers: Sequence[int] | int | str | None = None
    """Layer numbers, or a kind of mixer ('attention': those mixers, in every layer). None: every layer."""
    features: Features = "all"
    """Which of a mixer's features are cut."""
    path: Path = "main"
    """The scan or attention ('main'), the causal convolution before the scan ('conv'), or 'both'."""
    mixers: str | None = None
    """Only mixers of this kind ('attention', 'mamba1', 'mamba2'), in models that have several; None: all."""

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise MambalensError(f"path={self.path!r} is not a path between positions: {choose(self.path, PATHS)}.")


def position_mask(
    positions: Positions, name: str, batch: int, prompt: int, length: int
) -> tuple[Tensor, list[int], bool]:
    """Turn positions into a boolean mask over the first `length` columns.

    Args:
        positions: as the user gave them.
        name: what they are called in an error ('sources', 'targets').
        batch, prompt: rows, and columns of the prompt that negative positions count from.
        length: columns to cover; past `prompt` only while generating.

    Returns:
        A mask [batch, length]; positions past `length` (they may be generated later); whether any position, reached or
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


@dataclass(frozen=True)
class Cut:
    """One knockout in one layer of one forward pass, as masks.

    `sources` and `targets` [batch, past + T] cover all columns so far, also those that a cache holds; `features` [F] is
    None for every feature.
    """

    sources: Tensor
    targets: Tensor
    features: Tensor | None
    main: bool
    conv: bool

    def to(self, device: torch.device) -> Cut:
        """The same cut on a device."""
        features = None if self.features is None else self.features.to(device)
        return Cut(self.sources.to(device), self.targets.to(device), features, self.main, self.conv)
