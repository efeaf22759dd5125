"""Patches and traces with a measure, and in folders: saved, loaded, gone on with, told apart."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import in_double
from patches import by_hooks, changed_stream
from test_interventions import FACTS, LONG, ONE, PAIRS, TWO, lens_of

from mambalens import Fact
from mambalens.facts.pairs import Pair, Pairs
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.patching import Patching, patch
from mambalens.interventions.table import PATCH_MEASURED, PATCHES, TRACE_MEASURED, TRACES
from mambalens.result import Patches, Traces
from mambalens.runs.folder import CHECKS, PARTS

MANY = Pairs([Pair(ONE, TWO), Pair(TWO, ONE), Pair(LONG, TWO), Pair(ONE, LONG)])


def ahead_of_the_second(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - logits.topk(2).values[:, 1]


def same(one: pd.DataFrame, two: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("replay", [True, False])
def test_patches_have_the_measure_of_plain_hooked_passes(replay: bool) -> None:
    lens = lens_of("mamba1")
    asked = Patching.asked("residual", 1, "each", ahead_of_the_second)
    with torch.no_grad(), in_double(lens.model):
        found = Patches.of(patch(lens, PAIRS, asked, progress=False, replay=replay))
        assert tuple(found.table.columns) == (*PATCHES, *PATCH_MEASURED)
        for _, row in found.table.iloc[::3].iterrows():
            one, two = (ONE, TWO) if row.fact_id == "peru" else (TWO, ONE)
            ids, other = (torch.tensor(lens.prompt(fact).ids) for fact in (one, two))
            target = torch.tensor([lens.prompt(one).target_id])
            at = [row.position]
            put = functools.partial(changed_stream, lens.hooks.layers)
            after = by_hooks(lens.model, put, [row.window_start], ids, other, at, at)
            before = lens.model(ids[None], use_cache=False).logits[0, -1]
            assert row.measure == pytest.approx(float(ahead_of_the_second(after[None], target)), abs=1e-8)
            assert row.base_measure == pytest.approx(float(ahead_of_the_second(before[None], target)), abs=1e-8)
    assert found.metrics["measure"] == "ahead_of_the_second"
    assert found.summary("measure").n.max() == 2 and found.plot(metric="measure").axes


def test_traces_have_the_measure_of_all_three_runs() -> None:
    lens = lens_of("mamba2")
    found = lens.trace(FACTS, samples=2, progress=False, measure="log_odds")
    assert tuple(found.table.columns) == (*TRACES, *TRACE_MEASURED)
    for run in ("clean_", "corrupted_", ""):
        assert (found.table[f"{run}measure"] - found.table[f"{run}log_odds"]).abs().max() < 1e-12
    assert found.metrics["measure"] == "Log-odds of the target (nats)"
    plain = lens.trace(FACTS, samples=2, progress=False)
    same(found.table[list(TRACES)], plain.table)
    assert "measure" not in plain.metrics


def test_an_unknown_measure_is_refused_before_any_work(tmp_path: Path) -> None:
    lens = lens_of("mamba1")
    for ask in (lambda: lens.patch(PAIRS, measure="odds"), lambda: lens.trace(FACTS, measure="odds")):
        with pytest.raises(MambalensError, match="measure='odds' is not a measure"):
            ask()
    with pytest.raises(MambalensError, match="A lambda has no name"):
        lens.patch(PAIRS, measure=lambda logits, targets: logits[:, 0], out=tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


def patched(out: Path | None, **changed: Any) -> Patches:
    options: dict[str, Any] = {"window": 2, "positions": ("each", "subject"), "progress": False, "block_size": 2}
    return lens_of("mamba1").patch(changed.pop("pairs", MANY), out=out, **(options | changed))


def traced(out: Path | None, **changed: Any) -> Traces:
    options: dict[str, Any] = {"samples": 2, "progress": False, "block_size": 2, "seed": 1}
    return lens_of("mamba1").trace(changed.pop("facts", FACTS), out=out, **(options | changed))


@pytest.mark.parametrize("find", [patched, traced])
def test_a_folder_has_what_is_found_without_one(find: Any, tmp_path: Path) -> None:
    whole, kept = find(None, measure="logit"), find(tmp_path, measure="logit")
    same(kept.table, whole.table)
    assert len(list((tmp_path / PARTS).iterdir())) == 2
    pd.testing.assert_frame_equal(kept.skipped, whole.skipped, check_dtype=False)
    assert kept.configs == whole.configs and kept.metrics == whole.metrics and kept.n_layers == {"mamba1": 4}
    for found in (whole, kept):
        assert tuple(found.checks.columns) == CHECKS and len(found.checks) and found.checks.passed.all()
    again = type(kept).load(kept.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(again.table, kept.table, check_exact=True)
    pd.testing.assert_frame_equal(again.checks, kept.checks, check_exact=True)
    assert again.tokens("peru") == whole.tokens("peru") and again.plot("peru").axes
    assert kept.where(relation="capital", fact_id="peru").table.fact_id.unique().tolist() == ["peru"]


@pytest.mark.parametrize("find", [patched, traced])
def test_finished_blocks_are_not_computed_again_and_missing_ones_are(find: Any, tmp_path: Path) -> None:
    whole = find(tmp_path)
    first, second = sorted((tmp_path / PARTS).iterdir())
    before = first.stat().st_mtime_ns
    second.unlink()
    part = type(whole).load(tmp_path)
    assert part.unfinished == 1 and 0 < len(part.table) < len(whole.table) and "1 block" in repr(part)
    again = find(tmp_path)
    assert first.stat().st_mtime_ns == before and not again.unfinished
    same(again.table, whole.table)


@pytest.mark.parametrize(
    ("find", "changed", "named"),
    [
        (patched, {"site": "mixer"}, "site"),
        (patched, {"window": 1}, "window"),
        (patched, {"positions": "each"}, "positions"),
        (patched, {"measure": "logit"}, "measure"),
        (patched, {"pairs": Pairs([*MANY[:3], Pair(LONG, ONE)])}, "facts digest"),
        (patched, {"block_size": 3}, "block_size"),
        (traced, {"noise": 2.0}, "noise"),
        (traced, {"restore": "mixer"}, "restore"),
        (traced, {"samples": 3}, "samples"),
        (traced, {"seed": 2}, "seed"),
        (traced, {"positions": "subject"}, "positions"),
        (traced, {"facts": Facts([ONE, TWO])}, "facts digest"),
    ],
)
def test_other_numbers_in_the_same_folder_are_refused(
    find: Any, changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    find(tmp_path)
    with pytest.raises(MambalensError, match=f"holds another run .*{named}"):
        find(tmp_path, **changed)


def test_inside_a_knockout_it_is_another_run(tmp_path: Path) -> None:
    lens = lens_of("mamba1")
    patched(tmp_path)
    with (
        lens.knockout(ONE, "subject"),
        pytest.warns(UserWarning, match="while a knockout"),
        pytest.raises(MambalensError, match="running blocks"),
    ):
        patched(tmp_path)


def test_kinds_are_kept_apart(tmp_path: Path) -> None:
    found = patched(tmp_path)
    assert json.loads((tmp_path / "patch.json").read_text())["definition"]["site"] == "residual"
    with pytest.raises(MambalensError, match=r"holds a patch \(patch.json\)"):
        traced(tmp_path)
    with pytest.raises(MambalensError, match="holds a run: a result is not written over it"):
        found.save(tmp_path)
    with pytest.raises(MambalensError, match="holds no trace"):
        Traces.load(tmp_path)


def test_results_are_put_together_and_loaded_from_folders_in_a_folder(tmp_path: Path) -> None:
    one, two = patched(tmp_path / "one"), patched(tmp_path / "two", site="mixer")
    both = Patches.load(tmp_path)
    assert len(both.table) == len(one.table) + len(two.table) and both.plot(site="mixer").axes
    assert len(both.facts) == len(MANY) and len(both.prompts) == 3 and len(both.checks) == len(one.checks) * 2


def test_facts_without_an_id_have_their_number() -> None:
    fact = Fact(ONE.prompt, ONE.subject, ONE.target)
    found = lens_of("mamba1").patch([Pair(TWO, ONE), Pair(fact, TWO)], progress=False)
    assert found.table.fact_id.unique().tolist() == ["chile", "1"] and found.facts.fact_id.tolist() == ["chile", "1"]
