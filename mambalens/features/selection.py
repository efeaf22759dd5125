"""Selections: features chosen by what was measured of them, layer by layer, to be knocked out together."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mambalens.hooks.errors import MambalensError, choose
from mambalens.hooks.groups import count_of

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("layer", "feature", "selected")


class Selection(Mapping[int, Tensor]):
    """Which features of each layer, under one name. Goes wherever features do: `knockout`, `sweep`, `--features`.

    A dict of boolean masks [features] by layer. `~a`, `a | b` and `a & b` give the rest, the union and what is in both.

    Args:
        masks: boolean mask by layer.
        name: what tables and figures call it.
    """

    def __init__(self, masks: Mapping[int, Tensor], name: str) -> None:
        self.masks = {int(layer): torch.as_tensor(mask, dtype=torch.bool) for layer, mask in masks.items()}
        self.name = name

    def __getitem__(self, layer: int) -> Bool[Tensor, " feature"]:
        return self.masks[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.masks)

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        chosen, count = (sum(int(f(mask)) for mask in self.masks.values()) for f in (Tensor.sum, len))
        return f"<Selection {self.name!r}: {chosen} of {count} features in {len(self)} layers>"

    def __invert__(self) -> Selection:
        return Selection({layer: ~mask for layer, mask in self.masks.items()}, f"not {self.name}")

    def __or__(self, other: Selection) -> Selection:
        return self._with(other, torch.logical_or, "or")

    def __and__(self, other: Selection) -> Selection:
        return self._with(other, torch.logical_and, "and")

    def _with(self, other: Selection, how: Callable[..., Bool[Tensor, " feature"]], word: str) -> Selection:
        if {k: len(v) for k, v in self.items()} != {k: len(v) for k, v in other.items()}:
            raise MambalensError(f"{self!r} and {other!r} do not speak of the same layers and features.")
        return Selection({k: how(v, other[k]) for k, v in self.items()}, f"{self.name} {word} {other.name}")

    def named(self, name: str) -> Selection:
        """The same under another name."""
        return Selection(self.masks, name)

    @classmethod
    def by(cls, table: pd.DataFrame, column: str, top: float | None = None, bottom: float | None = None) -> Selection:
        """The fraction of every layer's features that has most (`top`) or least (`bottom`) of something measured.

        The count is rounded down, as the paper's thirds are; ties go by index. Layers without the measure (attention
        has no half-life) are left out.

        Args:
            table: of one model, from `lens.features`.
            column: a column of numbers: 'decay_norm', 'half_life', 'exchange_share', ...
            top, bottom: one of them, a fraction above 0 and up to 1.
        """
        numbers = [str(name) for name in table.select_dtypes("number") if name not in ("layer", "feature")]
        if column not in numbers:
            raise MambalensError(f"{column!r} is not a measure in the table: {choose(column, numbers)}.")
        fraction = top if bottom is None else bottom
        if (top is None) == (bottom is None) or fraction is None or not 0 < fraction <= 1:
            raise MambalensError(f"top={top!r}, bottom={bottom!r}: give one of them, a number above 0 and up to 1.")
        if "model" in table and table.model.nunique() > 1:
            raise MambalensError(f"The table speaks of {', '.join(table.model.unique())}: keep one model.")
        if "kind" in table and (table.groupby("layer").kind.nunique() > 1).any():
            kinds = ", ".join(sorted(table.kind.unique()))
            raise MambalensError(
                f"Layers of the table have two mixers ({kinds}): keep one kind, table[table.kind == ...]."
            )
        masks = {}
        for layer in sorted(int(number) for number in table.layer.unique()):
            rows = table[table.layer == layer].sort_values("feature")
            values = rows[column].to_numpy(float)
            if np.isnan(values).all():
                continue
            order = np.argsort(-values if bottom is None else values, kind="stable")  # NaN comes last
            masks[layer] = torch.zeros(len(values), dtype=torch.bool)
            masks[layer][order[: count_of(fraction, len(values))].copy()] = True
        if not masks:
            raise MambalensError(f"No layer of the table has values of {column!r}.")
        return cls(masks, f"{'top' if bottom is None else 'bottom'} {fraction:.3g} by {column}")

    def save(self, path: str | Path) -> Path:
        """Write a .csv with a row for each feature: layer, feature, selected (0 or 1)."""
        path = Path(path)
        try:
            with path.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                for layer, mask in self.items():
                    writer.writerows((layer, feature, int(chosen)) for feature, chosen in enumerate(mask.tolist()))
        except OSError as error:
            raise MambalensError(f"The selection could not be written to {str(path)!r} ({error.strerror}).") from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Read what `save` wrote; its name is the file's."""
        path = Path(path)
        flags: dict[int, dict[int, bool]] = {}
        try:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    layer, feature, selected = (int(row[column]) for column in COLUMNS)
                    flags.setdefault(layer, {})[feature] = bool(selected)
        except OSError as error:
            raise MambalensError(f"The selection {str(path)!r} cannot be read ({error.strerror}).") from error
        except (KeyError, TypeError, ValueError) as error:
            raise MambalensError(
                f"{str(path)!r} is not a selection: its columns are whole numbers named {', '.join(COLUMNS)}."
            ) from error
        for layer, of_layer in flags.items():
            if sorted(of_layer) != list(range(len(of_layer))):
                raise MambalensError(f"{str(path)!r} does not list every feature of layer {layer} from 0 on.")
        if not flags:
            raise MambalensError(f"{str(path)!r} lists no feature.")
        masks = {k: torch.tensor([flags[k][f] for f in range(len(flags[k]))]) for k in sorted(flags)}
        return cls(masks, path.stem)
