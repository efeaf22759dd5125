"""A table of millions of rows: `python tests/benchmarks/long_table.py --rows 20000000 DIR` (no model beyond a small one).

A sweep of 20,000 facts by 8 sources, 56 windows and 2 paths has 18 million rows. One like it is made in DIR: a bundled
checkpoint is swept really, and its rows stand again and again, with numbers a little different, for the facts and
windows of the long one, in parts as a run's folder has them. Then what a person does with it, each in a process of its
own: seconds of the processor (all threads, Python's start and the imports included) and the highest memory.

load: `SweepResult.load`, with every part's digest.
summary, plot, report: the same, and then what the name says (report with the facts' details that it has by default).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

PATHS, WINDOW, LAYERS = ("main", "both"), 9, 64
SOURCES = (
    "subject", "subject_first", "subject_last", "relation", "relation_minus_last", "context", "first", "others",
)  # fmt: skip
WINDOWS = LAYERS - WINDOW + 1
REAL = 64
"""Facts that are swept really."""
WORK = ("load", "summary", "plot", "report")


def make(folder: Path, rows: int) -> None:
    """Write the long sweep's folder."""
    from mambalens import Facts, Lens, load_facts
    from mambalens.defaults import BLOCK
    from mambalens.runs.folder import Part, RunFolder, no_checks

    near = load_facts("atlas").where(wording="near")
    facts = Facts([fact for fact in near if not fact.prompt.startswith(fact.subject)]).sample(REAL)  # no role is empty
    lens = Lens.load("atlas-mamba1")
    real = lens.sweep(facts, SOURCES, window=6, paths=PATHS, progress=False)
    ids = [
        fact_id for fact_id in real.facts.fact_id if (real.table.fact_id == fact_id).sum() == len(real.table) // REAL
    ]
    per_fact = len(SOURCES) * WINDOWS * len(PATHS)
    count = -(-rows // per_fact)
    print(f"{count:,} facts of {len(ids)} real ones, {count * per_fact:,} rows")
    table = real.table.set_index("fact_id")
    starts = sorted(real.table.window_start.unique())
    stretched = {fact_id: _stretched(table.loc[fact_id], starts) for fact_id in ids}
    kept = real.facts.set_index("fact_id").loc[ids]
    drawn = [ids[number % len(ids)] for number in range(count)]
    names = [f"{number}" for number in range(count)]
    many = kept.loc[drawn].reset_index(drop=True)
    many.insert(0, "fact_id", names)
    tokens = real.prompts.set_index("fact_id").loc[drawn].reset_index(drop=True)
    prompts = tokens.assign(fact_id=names)[list(real.prompts.columns)]
    blocks = [range(begin, min(begin + BLOCK, count)) for begin in range(0, count, BLOCK)]
    config = dataclasses.replace(real.configs[0], n_layers=LAYERS, window=WINDOW, n_facts=count)
    about = {"configs": [config.to_json()], "blocks": len(blocks)}
    run = RunFolder(folder, {"rows": rows}, about, many, prompts)
    draw = np.random.default_rng(0)
    for number, block in enumerate(blocks):
        if run.finished(number):
            continue
        part = pd.concat([stretched[drawn[fact]] for fact in block], ignore_index=True)
        part.insert(0, "fact_id", np.repeat([names[fact] for fact in block], per_fact))
        near = 1 + 0.05 * draw.standard_normal(len(part))
        part["prob"] = (part.prob * near).clip(0, 1)
        part["change_pct"] = 100 * (part.prob - part.base_prob) / part.base_prob
        part["kl"] *= near**2
        nothing = pd.DataFrame(columns=["fact_id", "source", "reason"])
        run.write(number, Part(part[list(real.table.columns)], nothing, no_checks()))


def _stretched(rows: pd.DataFrame, starts: list[int]) -> pd.DataFrame:
    """A real fact's rows for the windows of a deep model: each stands for several that lie beside each other."""
    per_start = dict(tuple(rows.groupby("window_start", sort=False)))
    found = [
        per_start[starts[window * len(starts) // WINDOWS]].assign(window_start=window, window_size=WINDOW)
        for window in range(WINDOWS)
    ]
    return pd.concat(found, ignore_index=True)


def work(what: str, folder: Path) -> dict[str, Any]:
    """Do one thing in this process, and say what it took."""
    from mambalens import SweepResult

    result = SweepResult.load(folder)
    if what == "summary":
        assert len(result.summary()) == len(SOURCES) * WINDOWS * len(PATHS)
    elif what == "plot":
        result.plot().savefig(folder / "flow.png", dpi=130)
    elif what == "report":
        print(f"{result.report(folder / 'report.html').stat().st_size / 1e6:.0f} MB of page", file=sys.stderr)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"work": what, "cpu_s": used.ru_utime + used.ru_stime, "peak_gb": highest_bytes() / 1e9}


def highest_bytes() -> float:
    """The highest memory that this process has had since its program began (Linux; NaN elsewhere).

    `ru_maxrss` counts what the process that started it held at that moment too.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * float(found.split()[1])


def main() -> None:
    """Make the folder where it is not there, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--work", action="append", choices=WORK, help="by default all")
    parser.add_argument("--only", choices=WORK, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(work(options.only, options.folder)))
        return
    make(options.folder, options.rows)
    found = []
    for what in options.work or WORK:
        began = time.perf_counter()
        command = [sys.executable, __file__, "--only", what, str(options.folder)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(said.splitlines()[-1]) | {"wall_s": time.perf_counter() - began})
        print(json.dumps(found[-1]), flush=True)
    print("\n" + pd.DataFrame(found).to_string(index=False, float_format="{:.1f}".format))


if __name__ == "__main__":
    main()
