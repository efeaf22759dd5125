"""What `mambalens logits` and `mambalens contributions` do: one prompt or many facts read layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mambalens.cli import asked
from mambalens.cli.output import skipped
from mambalens.cli.programs import Say, known_or_all
from mambalens.defaults import MEASURE
from mambalens.facts.fact import Fact
from mambalens.facts.sequence import Facts
from mambalens.figures.style import signed
from mambalens.hooks.errors import MambalensError
from mambalens.lens import Lens
from mambalens.result import Contributions, LogitLens
from mambalens.runs.folder import CONTRIBUTION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10
"""Parts or layers on the screen."""


def chosen(prompt: str | None, subject: str, target: str | None, facts: str, where: Sequence[str]) -> Facts:
    """The one prompt, or the facts that the model is asked.

    Raises:
        MambalensError: for a prompt without a target.
    """
    if prompt is None:
        return asked.facts(facts, where)
    if target is None:
        raise MambalensError("A prompt has a target: give --target too.")
    fact = Fact(prompt, subject, target)
    return Facts([Fact(prompt, subject, target, id=prompt + fact.continuation)])


def known(
    lens: Lens, facts: Facts, single: bool, limit: int, all_facts: bool, batch_size: int | None, say: Say, doing: str
) -> Facts:
    """The one prompt, or the facts that the model knows."""
    return facts if single else known_or_all(lens, facts, limit, all_facts, batch_size, say, True, doing)


def figure_of(folder: Path, kind: str, where: dict[str, list[str]], metric: str | None) -> tuple[str, Figure]:
    """The figure of the contributions or the logit lens that a folder holds, and its file's name.

    Args:
        folder: the folder.
        kind: which.
        where: columns of contributions, and the values that are kept.
        metric: of a logit lens; None: the usual one.

    Raises:
        MambalensError: for a metric of contributions, or conditions on a logit lens.
    """
    if kind == CONTRIBUTION:
        if metric is not None:
            raise MambalensError(f"{str(folder)!r} holds contributions, which have no --metric {metric}: leave it out.")
        found = Contributions.load(folder)
        return "contributions.png", (found.where(**where) if where else found).plot()
    if where:
        raise MambalensError(f"{str(folder)!r} holds logits, which --where does not choose from: leave it out.")
    return "logits.png", LogitLens.load(folder).plot(metric=metric or MEASURE)


def told_contributions(found: Contributions, out: Path) -> list[str]:
    """Write tables and the figure, and print what adds most.

    Returns:
        Names of the files.
    """
    single = len(found.scores) == 1
    found.table.to_csv(out / "contributions.csv", index=False)
    found.summary().to_csv(out / "summary.csv", index=False)
    found.plot().savefig(out / "contributions.png", dpi=130)
    parts = found.summary(by=("part",)).set_index("part")["mean"]
    listed = ", ".join(f"{part} {signed(value)}" for part, value in parts.items())
    (model,) = found.n_layers
    of = f"{found.scores.target.iloc[0].strip()!r}" if single else f"{len(found.scores)} facts, means"
    click.echo(f"{model}, {of}: {found.axis} {signed(float(found.scores.score.mean()))} = {listed}\n")
    if single:
        parted = found.table[found.table.part != "bias"]
        keys = ["layer", "part", "kind", "path", "source", "token"]
        rows = parted.groupby(keys, sort=False).contribution.sum().rename("adds").reset_index()
    else:
        rows = found.summary()
        rows = rows[rows.part != "bias"].rename(columns={"mean": "adds"}).drop(columns="model")
    rows = rows.iloc[(-rows.adds.abs()).argsort(kind="stable")].head(SHOWN)
    click.echo(rows.to_string(index=False, float_format=signed))
    skipped(found)
    return ["contributions.csv", "summary.csv", "contributions.png"]


def told_logits(found: LogitLens, metric: str, out: Path) -> list[str]:
    """Write tables and the figure, and print the answer at the last position, layer by layer.

    Returns:
        Names of the files.
    """
    found.plot(metric=metric).savefig(out / "logits.png", dpi=130)
    found.table.to_csv(out / "logits.csv", index=False)
    found.summary(metric).to_csv(out / "summary.csv", index=False)
    ((model, _),) = found.n_layers.items()
    if len(found.answers) == 1:
        (answer,) = found.answers.values()
        click.echo(f"{model}: {answer.strip()!r} at the last token, by how many layers are behind it\n")
        rows = found.at_last()[["layer", "prob", "log_odds", "rank", "top_token"]]
    else:
        click.echo(f"{model}, {len(found.answers)} facts: {metric} of the answer at the last token, means\n")
        rows = found.summary(metric)
        rows = rows[rows.piece == "last"][["layer", "n", "mean", "low", "high"]]
    click.echo(rows.to_string(index=False, float_format="{:.3g}".format))
    skipped(found)
    return ["logits.csv", "summary.csv", "logits.png"]
