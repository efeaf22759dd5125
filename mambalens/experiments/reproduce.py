"""The experiments of Endy et al. (ACL 2025), by the names of their figures, for any list of models.

What the paper reports is put into words here; beside it goes what was measured.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from mambalens.defaults import FEATURES, SOURCES, TARGET, WINDOW
from mambalens.experiments.comparison import known_to_all
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError, choose
from mambalens.lens import Lens
from mambalens.result import SweepResult
from mambalens.runs.data import dearest_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW_SIZES = (1, 3, 5, 9, 12, 15)
ATLAS = ("atlas-mamba1", "atlas-mamba2", "atlas-gpt-neox")
HEATMAPS = 3
"""Facts that heatmaps are drawn of."""

Load = Callable[[str], Lens]
Say = Callable[[str], None]


class Finding(NamedTuple):
    """One of the paper's findings, and what to measure beside it."""

    paper: str
    measure: Callable[[SweepResult], Iterable[str]]
    """Gives a line for each model."""


@dataclass(frozen=True)
class Experiment:
    """What a figure of the paper varies."""

    shows: str
    paper: str
    """The models it was run on."""
    models: tuple[str, ...]
    """What it is run on where nobody names models."""
    findings: tuple[Finding, ...]
    sources: tuple[str, ...] = SOURCES
    windows: tuple[int, ...] = (WINDOW,)
    features: tuple[str, ...] = FEATURES
    known: tuple[str, ...] = ("all",)
    """Whose answers choose the facts: 'all' models', or each model's 'own'."""


class Reproduction(NamedTuple):
    """What came out."""

    results: dict[str, SweepResult]
    """One for every choice of facts in `Experiment.known`."""
    findings: pd.DataFrame
    """finding, paper, measured."""
    figures: list[Path]


def reproduce(
    name: str,
    models: Sequence[str],
    facts: Facts,
    out: str | Path,
    limit: int | None = None,
    window: int | None = None,
    load: Load = Lens.load,
    say: Say = print,
    progress: bool = True,
) -> Reproduction:
    """Run one of the paper's experiments.

    Args:
        name: a key of `EXPERIMENTS`.
        models: what to run it on; the experiment's own models if empty.
        facts: facts to choose from: only those that the models answer right are swept.
        out: folder for runs, figures and findings.txt. Started again, it goes on where it stopped.
        limit: at most so many facts, drawn at random with seed 0.
        window: a window of this size instead of the paper's.
        load: gives a model's lens.
        say: hears what happens.
        progress: show progress bars.

    Raises:
        MambalensError: for an unknown experiment, a limit below 1, or if no fact is left.
    """
    if limit is not None and limit < 1:
        raise MambalensError(f"limit={limit} leaves no fact: give 1 or more, or None for all that the models know.")
    if name not in EXPERIMENTS:
        raise MambalensError(f"{name!r} is no experiment of the paper: {choose(name, EXPERIMENTS)}.")
    experiment, out = EXPERIMENTS[name], Path(out)
    names = list(models) or list(experiment.models)
    windows = (window,) if window is not None else experiment.windows
    results, figures = {}, []
    for known in experiment.known:
        folder = out / f"known-to-{known}" if len(experiment.known) > 1 else out
        chosen = _known_to_all(names, facts, limit, load, say, progress) if known == "all" else facts
        parts = []
        for model in names:
            lens = load(model)
            mine = chosen if known == "all" else lens.known(chosen, limit=limit, progress=progress)
            if not len(mine):
                raise MambalensError(f"{lens.name} answers none of the {len(chosen)} facts right.")
            mine = mine[:HEATMAPS] if experiment.sources == ("each",) else mine
            for size in windows:
                if size > lens.n_layers:
                    say(f"{lens.name} has {lens.n_layers} layers: no window of {size}.")
                    continue
                run = folder / lens.name if len(windows) == 1 else folder / lens.name / f"window-{size}"
                parts.append(lens.sweep(mine, experiment.sources, TARGET, size, experiment.features, out=run,
                                        progress=progress))  # fmt: skip
        if not parts:
            raise MambalensError(f"No model has as many layers as a window of {min(windows)}.")
        results[known] = SweepResult.concat(parts)
        figures += list(_draw(name, results[known], folder))
    together = next(iter(results.values()))
    rows = [(i, finding.paper, line) for i, finding in enumerate(experiment.findings, 1)
            for line in finding.measure(together)]  # fmt: skip
    if len(results) > 1:
        own = [f"own facts: {line}" for line in experiment.findings[0].measure(results["own"])]
        rows += [(1, experiment.findings[0].paper, line) for line in own]
    findings = pd.DataFrame(rows, columns=["finding", "paper", "measured"])
    (out / "findings.txt").write_text(words(name, findings), encoding="utf-8")
    return Reproduction(results, findings, figures)


def words(name: str, findings: pd.DataFrame, width: int = 100) -> str:
    """The findings as text: what the paper reports, and below it what was measured."""
    experiment = EXPERIMENTS[name]
    lines = [f"{name}: {experiment.shows}", f"In the paper: {experiment.paper}", ""]
    for paper, rows in findings.groupby("paper", sort=False):
        lines += textwrap.wrap(f"The paper: {paper}", width)
        for line in rows.measured:
            lines += textwrap.wrap(line, width, initial_indent="  measured  ", subsequent_indent=" " * 14)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _known_to_all(names: Sequence[str], facts: Facts, limit: int | None, load: Load, say: Say, progress: bool) -> Facts:
    chosen = known_to_all((load(name) for name in names), facts, progress=progress)
    if not len(chosen):
        raise MambalensError(f"No fact of the {len(facts)} is answered right by all of {', '.join(names)}.")
    say(f"{len(chosen)} of {len(facts)} facts are known to {'all models' if len(names) > 1 else names[0]}")
    return chosen.sample(limit) if limit else chosen


def _draw(name: str, result: SweepResult, folder: Path) -> Iterator[Path]:
    for part, figure in _figures(name, result):
        figure.savefig(folder / f"{part}.png", dpi=130)
        yield folder / f"{part}.png"


def _figures(name: str, result: SweepResult) -> Iterator[tuple[str, Figure]]:
    """The experiment's figures by name."""
    if name == "heatmaps":
        drawn = result.table[["model", "fact_id", "window_size"]].drop_duplicates()
        for model, fact_id, size in drawn.itertuples(index=False, name=None):
            figure = result.heatmap(fact_id, model=model, window_size=size)
            yield re.sub(r"[^\w.-]+", "-", f"{model}-{fact_id}-window-{size}"), figure
        return
    for model in result.models if result.table.window_size.nunique() > 1 else [""]:
        part = result.where(model=model) if model else result
        rows, columns = ("window_size", "model") if model else ("path", "model")
        yield f"{name}-{model}" if model else name, part.plot(x="depth", rows=rows, columns=columns)


# What was measured beside each finding.


class _Point(NamedTuple):
    """A row of `SweepResult.summary`."""

    model: str
    source: str
    features: str
    window_start: int
    window_size: int
    n: int
    mean: float
    low: float
    high: float

    @property
    def change(self) -> str:
        """Its mean with the interval, which one fact does not have."""
        interval = f"[{self.low:+z.1f}, {self.high:+z.1f}]" if self.n > 1 else "[no interval]"
        return f"{self.mean:+z.1f} % {interval}"

    @property
    def layers(self) -> str:
        """The window's first and last layer."""
        return f"{self.window_start}–{self.window_start + self.window_size - 1}"


def _points(summary: pd.DataFrame) -> dict[str, list[_Point]]:
    """The rows of a summary, model by model."""
    found: dict[str, list[_Point]] = {}
    for values in summary[list(_Point._fields)].itertuples(index=False, name=None):
        point = _Point(*values)
        found.setdefault(point.model, []).append(point)
    return found


def _subject(result: SweepResult) -> Iterator[str]:
    """Of every model: the window without which the subject costs most."""
    for model, points in _points(result.where(source="subject", features="all").dearest()).items():
        for point in points:
            begin, end = (
                100 * layer / result.n_layers[model]
                for layer in (point.window_start, point.window_start + point.window_size)
            )
            where = f"layers {point.layers}, depth {begin:.0f} to {end:.0f} %"
            yield f"{model}: {point.change} in {where} ({point.n} facts)"


def _others(result: SweepResult) -> Iterator[str]:
    for model, points in _points(result.dearest()).items():
        shown = [f"{p.source} {p.change} in {p.layers}" for p in points if p.source != "subject"]
        yield f"{model}: {'; '.join(shown)}"


def _final(result: SweepResult) -> Iterator[str]:
    """Of relation and last: the lowest mean, and what the last window makes of it."""
    kinds = {config.model: ", ".join(config.kinds) for config in result.configs}
    summary = result.where(features="all").summary()
    dearest = _points(dearest_rows(summary, ["model", "source"]))
    for model, points in _points(summary).items():
        shown = []
        for source in ("relation", "last"):
            (lowest,) = (point for point in dearest[model] if point.source == source)
            final = max((point for point in points if point.source == source), key=lambda p: p.window_start)
            shown.append(f"{source} {lowest.change} in {lowest.layers}, {final.change} in the final {final.layers}")
        yield f"{model} ({kinds[model]}): {'; '.join(shown)}"


def _groups(result: SweepResult) -> Iterator[str]:
    """Of every model: each group's change in the window that costs most when all features are knocked out."""
    dearest = _points(result.where(features="all").dearest())
    for model, points in _points(result.summary()).items():
        (worst,) = dearest[model]
        shown = [f"{p.features} {p.change}" for p in points if p.window_start == worst.window_start]
        yield f"{model}, layers {worst.layers}: {'; '.join(shown)}"


def _sizes(result: SweepResult) -> Iterator[str]:
    for model, points in _points(result.where(source="subject").dearest()).items():
        shown = [f"{p.window_size} layer{'s' * (p.window_size > 1)} {p.change}" for p in points]
        yield f"{model}: {'; '.join(shown)}"


def _tokens(result: SweepResult) -> Iterator[str]:
    """Of every fact and window size: the token that costs most."""
    lowest = dearest_rows(result.table, ["model", "fact_id", "window_size"], "change_pct")
    prompts = {(row["model"], row["fact_id"]): row for row in result.prompts.to_dict("records")}
    lines: dict[tuple[str, str], list[str]] = {}
    for row in lowest.to_dict("records"):
        key = (row["model"], row["fact_id"])
        position = row["position"]
        role = "subject" if position in set(prompts[key]["subject"]) else "not subject"
        token = str(prompts[key]["tokens"][position]).strip()
        lines.setdefault(key, []).append(f"window {row['window_size']}: {token!r} ({role}) {row['change_pct']:+z.0f} %")
    for (model, fact_id), shown in lines.items():
        yield f"{model}, {fact_id}: {'; '.join(shown)}"


_SUBJECT = Finding(
    "knocking out subject → last lowers the target's probability in every model, at similar relative depths, in middle "
    "to late layers.",
    _subject,
)
_OTHERS = Finding("other sources have weaker effects, which vary more between architectures.", _others)
_FINAL = Finding(
    "in Mamba-1 alone, knocking out relation → last or last → last in the final layers first lowers the probability "
    "and then raises it strongly.",
    _final,
)
_GROUPS = Finding(
    "the context-dependent features alone cost nearly what all cost; the context-independent ones matter little.",
    _groups,
)
_SIZES = Finding("larger windows strengthen the effects and keep their shape.", _sizes)
_TOKENS = Finding("every position as the source, prompt by prompt (no single number).", _tokens)

EXPERIMENTS: dict[str, Experiment] = {
    "figure1": Experiment(
        "four sources → last, models side by side", "Mamba-1 2.8B, Mamba-2 2.7B, GPT-2 1.5B, Falcon-Mamba 7B",
        ATLAS, (_SUBJECT, _OTHERS, _FINAL),
    ),
    "figure3": Experiment(
        "four sources → last, by model size", "Mamba-1 130M, 1.4B, 2.8B", ("atlas-mamba1",),
        (_SUBJECT, _OTHERS, _FINAL),
    ),
    "figure4": Experiment(
        "four sources → last, by model size", "Mamba-2 130M, 1.3B, 2.7B", ("atlas-mamba2",),
        (_SUBJECT, _OTHERS, _FINAL),
    ),
    "figure5": Experiment(
        "four sources → last, by model size", "GPT-2 355M, 774M, 1.5B (and Llama 3.2, Mistral, Llama 3 8B)",
        ("atlas-gpt-neox",), (_SUBJECT, _OTHERS, _FINAL),
    ),
    "figure6": Experiment(
        "groups of features, subject → last", "Mamba-1 2.8B and 7B, Mamba-2 2.7B, Falcon-Mamba 7B",
        ("atlas-mamba1", "atlas-mamba2"), (_GROUPS,), ("subject",),
        features=("all", "context-dependent", "context-independent"),
    ),
    "figure8": Experiment("window sizes", "Mamba-1", ("atlas-mamba1",), (_SIZES,), windows=WINDOW_SIZES),
    "figure9": Experiment("window sizes", "Mamba-2", ("atlas-mamba2",), (_SIZES,), windows=WINDOW_SIZES),
    "figure10": Experiment("window sizes", "GPT-2", ("atlas-gpt-neox",), (_SIZES,), windows=WINDOW_SIZES),
    "figure14": Experiment(
        "facts that all models know, or each model's own", "Mamba-1 2.8B, Mamba-2 2.7B, GPT-2 1.5B, Falcon-Mamba 7B",
        ATLAS, (_SUBJECT, _OTHERS), known=("all", "own"),
    ),
    "heatmaps": Experiment(
        "every token of a prompt → last", "most models, windows of 1, 5, 9 and 15 layers", ATLAS, (_TOKENS,), ("each",),
        windows=(1, 5, 9, 15),
    ),
}  # fmt: skip
"""The paper's experiments. Windows cover 9 layers where nothing else is said."""
