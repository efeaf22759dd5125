"""The cell of every row of a heatmap of means that says most: framed, and at the right with its 95 % interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    import pandas as pd

LEAST = 0.02
"""Share of the largest change from which on one is framed."""


class Framed(NamedTuple):
    """One cell."""

    row: int
    column: int
    said: str
    """Its mean and interval."""


def changing(summary: pd.DataFrame, grid: pd.DataFrame) -> list[Framed]:
    """Of every row with a change to speak of, whose interval leaves zero: where it is largest.

    Args:
        summary: mean, low and high of every cell, told apart by the names of the grid's index and columns.
        grid: the means.
    """
    known = summary[(summary.low > 0) | (summary.high < 0)]
    return _of_rows(known[known["mean"].abs() >= LEAST * summary["mean"].abs().max()], grid, -known["mean"].abs())


def best(summary: pd.DataFrame, grid: pd.DataFrame, smallest: bool = False) -> list[Framed]:
    """Of every row the largest mean, or the smallest.

    Args:
        summary, grid: as in `changing`.
        smallest: whether small is good, as of ranks.
    """
    return _of_rows(summary, grid, summary["mean"] if smallest else -summary["mean"])


def frame(axis: Axes, framed: list[Framed]) -> None:
    """Draw frames, and what they hold at the right."""
    for row, column, _ in framed:
        axis.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=1.0))
    if framed:
        beside = axis.secondary_yaxis("right")
        beside.set_yticks([one.row for one in framed], [one.said for one in framed], fontsize=8)
        beside.tick_params(length=0)
        beside.spines[:].set_visible(False)


def _of_rows(summary: pd.DataFrame, grid: pd.DataFrame, order: pd.Series) -> list[Framed]:
    found = []
    for row, name in enumerate(grid.index):
        of_row = summary[summary[grid.index.name] == name]
        if len(of_row):
            cell = of_row.loc[order[of_row.index].idxmin()]
            said = f"{cell['mean']:z.2f} [{cell.low:z.2f}, {cell.high:z.2f}]".replace("-", "−")
            found.append(Framed(row, list(grid.columns).index(cell[grid.columns.name]), said))
    return found
