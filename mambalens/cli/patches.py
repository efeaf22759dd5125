"""What `mambalens patch` and `mambalens trace` do: tables, means and a heatmap in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mambalens.hooks.errors import MambalensError
from mambalens.runs.folder import writing

if TYPE_CHECKING:
    from mambalens.result import Patches, Traces

TABLE, SUMMARY, SKIPPED, FIGURE = "table.parquet", "summary.csv", "skipped.csv", "heatmap.png"
SHOWN = 3
"""Facts left out that are printed."""


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
