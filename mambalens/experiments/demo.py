"""The demo behind `make demo`: four trained models, facts in near and far wordings, curves and a table."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mambalens.data import checkpoints
from mambalens.facts.files import load_facts
from mambalens.facts.sequence import Facts
from mambalens.features.selection import Selection
from mambalens.figures import flow
from mambalens.hooks.errors import MambalensError
from mambalens.lens import Lens
from mambalens.result import SweepResult
from mambalens.runs.data import dearest_rows

SOURCES = ("subject", "relation", "last", "first", "others")
WINDOW = 6
FACTS = 200
"""Facts drawn for each wording, among those the model knows."""
GROUPS = ("all", "context-dependent", "context-independent", "slow")
"""Groups of features by decay norm."""
GROUP_SOURCES = ("subject", "others")
NO_INTERVAL = "[no interval]"
"""Of a mean over one fact."""


def demo(out: Path, models: Sequence[str], n_facts: int = FACTS) -> SweepResult:
    """Sweep the models over the Atlas facts that each knows, and draw what was found.

    Writes a folder for each model (tables and figure) and one figure that compares the models.

    Raises:
        MambalensError: for fewer than one fact, or a model that knows none in one of the wordings.
    """
    _checked(n_facts)
    results = []
    for name in models:
        lens = Lens.load(name)
        atlas = load_facts("atlas")
        known = [_known(lens, atlas.where(wording=wording), n_facts) for wording in ("near", "far")]
        facts = Facts([fact for part in known for fact in part], [row for part in known for row in part.extra], "atlas")
        result = lens.sweep(facts, SOURCES, "last", WINDOW, ("all",), lens.hooks.paths.choices)
        result.save(out / name)
        flow(result, columns="wording").savefig(out / name / "flow.png", dpi=130)
        # A capital, so that models can be compared; of few facts none may be one.
        far = known[1]
        shown = next((fact for fact in far if fact.relation == "capital"), far[0])
        lens.heatmap(shown, WINDOW).savefig(out / name / "heatmap.png", dpi=130)
        results.append(result)
    together = SweepResult.concat(results)
    title = f"Knocking out source → last, window of {WINDOW} layers, scan or attention"
    main_path = together.where(path="main")
    flow(main_path, rows="wording", columns="model", title=title).savefig(out / "models.png", dpi=130)
    return together


def groups(out: Path, models: Sequence[str], n_facts: int = FACTS) -> SweepResult:
    """Knock out groups of features, over far wordings: do the slow ones alone carry what all do (Endy et al. 2025)?

    Beside the paper's groups goes the third of each layer's features that carries most between tokens, as measured on
    other facts than are swept.

    Raises:
        MambalensError: for fewer than one fact, or a model that knows fewer than two in far wordings.
    """
    _checked(n_facts)
    results = []
    for name in models:
        lens = Lens.load(name)
        known = _known(lens, load_facts("atlas").where(wording="far"), 2 * n_facts, least=2)
        measured = lens.features(known[1::2])
        third = Selection.by(measured, "exchange_share", top=1 / 3).named("top third by exchange share")
        result = lens.sweep(known[::2], GROUP_SOURCES, "last", WINDOW, (*GROUPS, third))
        result.save(out / "groups" / name)
        results.append(result)
    together = SweepResult.concat(results)
    title = f"Knocking out source → last in groups of features, window of {WINDOW} layers, far wordings"
    flow(together, rows="source", columns="model", title=title).savefig(out / "groups.png", dpi=130)
    return together


def group_findings(result: SweepResult) -> pd.DataFrame:
    """For every model, source and group of features: the window that costs most for all features, with intervals."""
    summary = result.summary("bootstrap")
    keys = ["model", "source"]
    of_all = summary[summary.features == "all"]
    worst = dearest_rows(of_all, keys)[[*keys, "window_start"]]
    rows = summary.merge(worst, on=[*keys, "window_start"])
    return rows[[*keys, "features"]].assign(change=_effect(rows)).sort_values(keys, kind="stable", ignore_index=True)


def findings(result: SweepResult) -> pd.DataFrame:
    """For every model, wording and path: the source and window that cost most, and the subject's, with intervals."""
    summary = result.summary("bootstrap", by=("wording",))
    keys = ["model", "wording", "path"]
    worst = dearest_rows(summary, keys).set_index(keys)
    subject = dearest_rows(summary[summary.source == "subject"], keys).set_index(keys).reindex(worst.index)
    cells = {"facts": worst.n, "costs most": worst.source + ", " + _effect(worst), "subject alone": _effect(subject)}
    return pd.DataFrame(cells).reset_index()


def _checked(n_facts: int) -> None:
    if n_facts < 1:
        raise MambalensError(f"A demo of {n_facts} facts for each wording shows nothing: give 1 or more.")


def _known(lens: Lens, facts: Facts, limit: int, least: int = 1) -> Facts:
    """Facts that the model knows, of those with one wording."""
    found = lens.known(facts, limit=limit)
    if len(found) < least:
        raise MambalensError(
            f"Of {len(facts)} facts {lens.name} answers {len(found)} right, and the demo takes {least} or more: leave "
            "this model out."
        )
    return found


def _effect(rows: pd.DataFrame) -> pd.Series:
    """'layers 1–6: -85.0 % [-91.7, -77.5]'."""
    last = rows.window_start + rows.window_size - 1
    interval = rows.low.map("[{:+z.1f}, ".format) + rows.high.map("{:+z.1f}]".format)
    change = rows["mean"].map("{:+z.1f} % ".format) + interval.where(rows.n > 1, NO_INTERVAL)
    return "layers " + rows.window_start.astype(str) + "–" + last.astype(str) + ": " + change


def main() -> None:
    """Command line; the project's own errors end in one sentence."""
    try:
        _run()
    except MambalensError as error:
        sys.exit(f"demo: {error}")


def _run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--facts", type=int, default=FACTS, help="facts for each wording, 1 or more")
    options = parser.parse_args()
    started = time.monotonic()
    result = demo(options.out, list(checkpoints()), options.facts)
    table = findings(result).to_string(index=False)
    print(
        "\nChange of the target's probability with 95 % intervals: the source and window that cost most, and the worst "
        f"window for the subject alone.\n\n{table}\n"
    )
    decaying = [name for name in checkpoints() if "mamba" in name]
    by_group = group_findings(groups(options.out, decaying, options.facts)).to_string(index=False)
    print(
        "\nThe same by groups of features, in the window that costs most when all are knocked out, far wordings.\n\n"
        f"{by_group}\n"
    )
    (options.out / "findings.txt").write_text(f"{table}\n\n{by_group}\n")
    print(f"{time.monotonic() - started:.0f} s. Tables and figures: {options.out.resolve()}")
    own = shlex.quote(str(Path(sys.executable).with_name("mambalens")))
    print(f"A knockout of your own, in a local page: {own} explore atlas-mamba1 atlas-gpt-neox")


if __name__ == "__main__":
    main()
