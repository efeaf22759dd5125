"""What verbs print, and the tables and figures that they write beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pandas as pd

from mambalens.hooks.errors import MambalensError, choose
from mambalens.runs.folder import atomically, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mambalens.cli.programs import Estimate
    from mambalens.result import CausalFeatures, Contributions, Flow, LogitLens, SweepResult


def estimates(found: Iterable[Estimate]) -> None:
    """Print what a dry run found."""
    total = 0.0
    click.echo(f"{'model':24}{'facts':>8}{'knockouts':>12}{'time':>12}{'memory':>12}")
    for one in found:
        total += one.seconds
        memory = f"{one.peak_bytes / 1e6:,.0f} MB"
        click.echo(f"{one.model:24}{one.facts:8,}{one.knockouts:12,}{_duration(one.seconds):>12}{memory:>12}")
    click.echo(f"\nIn all about {_duration(total)} in one process; memory beside the model. Nothing was written.")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def figure_file(path: Path) -> Path:
    """A file that a figure can be written to; asked for before long work starts.

    Raises:
        MambalensError: for an ending that no figure has, or a folder that there is not.
    """
    from matplotlib.figure import Figure

    kinds, kind = Figure().canvas.get_supported_filetypes(), path.suffix.removeprefix(".") or "png"
    if kind not in kinds:
        raise MambalensError(f"No figure can be written as {path.name!r}: {choose(kind, kinds)}.")
    if not path.parent.is_dir():
        raise MambalensError(f"The figure {str(path)!r} cannot be written: there is no folder {str(path.parent)!r}.")
    return path


def draw(figure: Figure, path: Path) -> Path:
    """Write a figure, whole or not at all."""
    kind = path.suffix.removeprefix(".") or "png"
    with writing(path):
        atomically(path, lambda file: figure.savefig(file, dpi=130, format=kind))
    return path


def swept(result: SweepResult, out: Path) -> None:
    """What a sweep found, in short, and as a figure."""
    flow = out / "flow.png"
    try:
        draw(result.plot(), flow)
    except MambalensError as error:
        click.echo(f"No figure: {error} Then: mambalens plot {out}", err=True)
    worst = result.roles().dearest()
    if len(worst):
        click.echo("The window that costs most, change of the target's probability in % with 95 % intervals:\n")
        click.echo(worst.to_string(index=False, float_format="{:.1f}".format))
    skipped(result)
    figure = " and flow.png" if flow.exists() else ""
    click.echo(f"\n{len(result.rows)} rows{figure} in {out}; a page of them: mambalens report {out}")


def steered(table: pd.DataFrame, negative: str, positive: str) -> None:
    """Shares of facts by layer, in %."""
    shares = ["base_hit", "hit", "changed", "base_other_hit", "other_hit", "low", "high"]
    shown = table.drop(columns="model").assign(**{name: 100 * table[name] for name in shares})
    click.echo(
        f"{table.model.iloc[0]}: {table.facts.iloc[0]} facts with {negative}, steered to {positive}. Shares in %: "
        "right (hit), answered otherwise than without (changed), answered as the other facts are (other_hit, with its "
        "95 % interval).\n"
    )
    click.echo(shown.to_string(index=False, float_format="{:.1f}".format))


def skipped(result: SweepResult | Flow | Contributions | LogitLens) -> None:
    """What was left out, counted by reason."""
    if len(result.skipped):
        reasons = result.skipped.reason.str.replace(r"(?<=is not in).*", " the prompt", regex=True)
        click.echo(f"\nSkipped (listed in result.skipped):\n{reasons.value_counts().to_string(header=False)}")


@contextmanager
def interruptible(out: Path) -> Iterator[None]:
    """While the `with` runs, Ctrl-C ends with a sentence that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nStopped. What was finished is in {out}; the same command goes on from there.", err=True)
        raise


def evaluated(table: pd.DataFrame) -> None:
    """The part of the facts that each model knows, by relation, and the facts that were skipped."""
    from mambalens.evaluation import accuracy_of_models

    click.echo(accuracy_of_models(table).to_string(float_format="{:.1%}".format))
    missing = table[table.skipped != ""].drop_duplicates("fact_id")
    for row in missing.head(5).itertuples():
        click.echo(f"skipped {row.fact_id}: {row.skipped}", err=True)
    if len(missing) > 5:
        click.echo(f"... {len(missing)} facts skipped in all", err=True)


def check_selection(select: str, top: float) -> None:
    """Whether features can be picked so, before they are measured.

    Raises:
        MambalensError: for something that is not measured, or a part that there is not.
    """
    from mambalens.features.measures import MEASURED

    numbers = ("decay_norm", *MEASURED)
    if select not in numbers:
        raise MambalensError(f"--select {select!r} is not measured of features: {choose(select, numbers)}.")
    if not 0 < top <= 1:
        raise MambalensError(f"--top {top:g}: give the part of a layer's features, more than 0 and at most 1.")


def measured(table: pd.DataFrame, out: Path, select: str | None, top: float) -> list[str]:
    """Write what was measured of features, with its figures and a selection.

    Returns:
        The files' names.
    """
    from mambalens import figures
    from mambalens.features.selection import Selection

    table.to_csv(out / "features.csv", index=False)
    written = ["features.csv"]
    decays = [("decay_norm", "decay_norm.png"), ("half_life", "half_life.png")]
    for measure, file in decays if table.decay_norm.notna().any() else []:
        figures.decay_spectrum(table, measure).savefig(out / file, dpi=130)
        written.append(file)
    figures.shares_by_layer(table).savefig(out / "exchange_share.png", dpi=130)
    written.append("exchange_share.png")
    if select is not None:
        Selection.by(table, select, top=top).save(out / f"{select}.csv")
        written.append(f"{select}.csv")
    return written


def medians(table: pd.DataFrame, title: str) -> None:
    """What features of a layer's groups have in the middle."""
    columns = ["half_life", "exchange_share", "enrichment_share", "exchange_share_last", "enrichment_share_last"]
    by_group = table.groupby(["layer", "group"], sort=False)[columns].median()
    click.echo(f"{title}:\n")
    click.echo(by_group.to_string(float_format="{:.3g}".format, na_rep=""))


def causal(found: CausalFeatures, out: Path, pair: str) -> list[str]:
    """Write and print what knocking out every feature alone found.

    Returns:
        The files' names.
    """
    shown = found.table.assign(features=[" ".join(map(str, numbers)) for numbers in found.table.features])
    shown.to_csv(out / "causal.csv", index=False)
    written = ["causal.csv"]
    try:
        found.plot().savefig(out / "causal.png", dpi=130)
        written.append("causal.png")
    except MambalensError as error:
        click.echo(f"No figure: {error}", err=True)
    dearest = shown.sort_values("drop_pct", ascending=False).head(10)
    dearest = dearest[["layer", "features", "exchange_share_last", "drop_pct", "low", "high"]]
    click.echo(f"\n{pair} knocked out, drop of the target's probability in % with 95 % intervals:\n")
    click.echo(dearest.to_string(index=False, float_format="{:.3g}".format))
    rho = found.correlation().iloc[0]
    click.echo(f"\nRank correlation with the exchange share: {rho.rho:.2f} [{rho.low:.2f}, {rho.high:.2f}]")
    return written


def counted(table: pd.DataFrame, name: str) -> None:
    """How many prompts there are of each relation."""
    click.echo(f"{len(table)} prompts of {name}; columns: {', '.join(table.columns)}\n")
    keys = ["relation", *(["wording"] if "wording" in table.columns else [])]
    counts = table.fillna({"relation": "(none)"}).groupby(keys, sort=False).size().rename("prompts")
    click.echo(counts.to_string() + "\n")
