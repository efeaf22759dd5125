"""What `mambalens patch` and `mambalens trace` do: a run's folder, with tables, means and a heatmap beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mambalens.hooks.errors import MambalensError
from mambalens.result import Patches, Traces
from mambalens.runs.folder import PATCH, TRACE, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLE, SUMMARY, SKIPPED, FIGURE = "table.parquet", "summary.csv", "skipped.csv", "heatmap.png"
SHOWN = 3
"""Facts left out that are printed."""


RESULTS: dict[str, type[Patches] | type[Traces]] = {PATCH: Patches, TRACE: Traces}
"""What folders of these kinds hold."""


def figure_of(folder: Path, kind: str, where: dict[str, list[str]], metric: str | None) -> tuple[str, Figure]:
    """The heatmap of what a folder holds, and its file's name.

    Args:
        folder: of patches or traces, or of several.
        kind: which.
        where: columns and the values that are kept.
        metric: a column; None: the usual one.
    """
    found: Any = RESULTS[kind].load(folder)
    return FIGURE, (found.where(**where) if where else found).plot(metric=metric)


def positions(texts: tuple[str, ...]) -> list[str | int]:
    """Roles and positions as the command line names them."""
    return [int(text) if text.removeprefix("-").isdigit() else text for text in texts]


def noise(text: str) -> float | str:
    """A number, or 'swap'.

    Raises:
        MambalensError: for other text.
    """
    try:
        return text if text == "swap" else float(text)
    except ValueError:
        raise MambalensError(f"--noise {text!r}: give a number (of standard deviations), or swap.") from None


def write(found: Patches | Traces, out: Path) -> list[str]:
    """Keep a result in a folder.

    Returns:
        Names of the files.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        found.table.to_parquet(out / TABLE, index=False)
        found.summary().to_csv(out / SUMMARY, index=False)
        found.skipped.to_csv(out / SKIPPED, index=False)
        found.plot().savefig(out / FIGURE, dpi=150)
    return [TABLE, SUMMARY, SKIPPED, FIGURE]


def told(found: Patches | Traces, out: Path) -> None:
    """Print the layer in which each piece matters most."""
    peak = found.peak().drop(columns=["model", "site"])
    click.echo(peak.to_string(index=False, float_format="{:.3f}".format))
    for _, skip in found.skipped.head(SHOWN).iterrows():
        click.echo(f"left out: {skip.fact_id}: {skip.reason}", err=True)
    if len(found.skipped) > SHOWN:
        click.echo(f"... and {len(found.skipped) - SHOWN} more in {SKIPPED}", err=True)
    click.echo(f"\n{len(found.table):,} rows, {', '.join((TABLE, SUMMARY, SKIPPED, FIGURE))} in {out}")
