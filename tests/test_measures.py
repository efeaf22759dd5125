"""Measures of answers, in plain arithmetic; sweeps that have one."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from mambalens import Lens, MambalensError, SweepResult, load_facts
from mambalens.measures import logit_difference, measure_of
from mambalens.runs.table import COLUMNS, MEASURED, MEASURES, METRICS
from mambalens.sweep.plan import Plan
from mambalens.sweep.run import run

FACTS = load_facts("atlas").where(wording="near").sample(5)
OPTIONS = {"sources": ("subject", "context"), "window": 6, "progress": False}


@pytest.fixture(scope="module")
def lens() -> Lens:
    return Lens.load("atlas-mamba1")


def ahead_of_the_second(logits: Tensor, targets: Tensor) -> Tensor:
    """How far the target is ahead of the best other token."""
    at = targets[:, None]
    return (logits.gather(1, at) - logits.scatter(1, at, -torch.inf).amax(1, keepdim=True))[:, 0]


def test_measures_are_what_their_names_say() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    targets, others = torch.tensor([0, 3, 8, 2]), torch.tensor([1, 3, 0, 7])
    for row, (target, other) in enumerate(zip(targets.tolist(), others.tolist(), strict=True)):
        z = logits[row].tolist()
        p = math.exp(z[target]) / sum(map(math.exp, z))
        expected = {"prob": p, "log_prob": math.log(p), "log_odds": math.log(p / (1 - p)), "logit": z[target]}
        assert set(expected) == set(MEASURES)
        for name, value in expected.items():
            assert float(measure_of(name)(logits, targets)[row]) == pytest.approx(value, abs=1e-12)
        assert float(logit_difference(logits, targets, others)[row]) == pytest.approx(z[target] - z[other], abs=1e-12)


@pytest.mark.parametrize("measure", ["log_odds", ahead_of_the_second])
def test_a_sweep_with_a_measure_has_two_more_columns_of_hooked_passes(lens: Lens, measure: str) -> None:
    result = lens.sweep(FACTS, measure=measure, **OPTIONS)
    assert tuple(result.table.columns) == (*COLUMNS, *MEASURED)
    plain = lens.sweep(FACTS, **OPTIONS)
    assert tuple(plain.table.columns) == COLUMNS
    pd.testing.assert_frame_equal(result.table[list(COLUMNS)], plain.table, check_exact=True)
    for row in result.table.itertuples():
        fact = next(fact for fact in FACTS if fact.id == row.fact_id)
        prompt = lens.prompt(fact)
        ids, target = torch.tensor([prompt.ids]), torch.tensor([prompt.target_id])
        layers = range(row.window_start, row.window_start + row.window_size)
        with torch.no_grad():
            base = lens.model(ids).logits[:, -1]
            with lens.knockout(fact, row.source, row.target, layers, row.features, row.path):
                cut = lens.model(ids).logits[:, -1]
        assert row.base_measure == pytest.approx(float(measure_of(measure)(base, target)), rel=1e-4, abs=1e-4)
        assert row.measure == pytest.approx(float(measure_of(measure)(cut, target)), rel=1e-4, abs=1e-4)


def test_replay_and_hooked_passes_measure_the_same(lens: Lens) -> None:
    plan = Plan(("subject", "each"), "last", 6, measure="logit")
    one, other = (run(lens, FACTS, plan, progress=False, replay=replay).table for replay in (True, False))
    pd.testing.assert_frame_equal(one[list(MEASURED)], other[list(MEASURED)], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("measure", "called"), [("log_odds", "Log-odds of the target (nats)"), (ahead_of_the_second, "ahead_of_the_second")])  # fmt: skip
def test_a_folder_keeps_the_measure_and_what_it_is_called(
    lens: Lens, tmp_path: Path, measure: str, called: str
) -> None:
    kept = lens.sweep(FACTS, measure=measure, out=tmp_path / "run", **OPTIONS)
    loaded = SweepResult.load(tmp_path / "run")
    pd.testing.assert_frame_equal(loaded.table, kept.table, check_exact=True)
    assert loaded.metrics["measure"] == called and loaded.plot("measure").get_supylabel() == called
    summary = loaded.summary(metric="measure")
    first = loaded.table.groupby(["source", "window_start"], sort=False).measure.mean().to_list()
    assert summary["mean"].to_list() == pytest.approx(first)
    assert called in loaded.report(tmp_path / "page.html").read_text()
    saved = SweepResult.load(kept.save(tmp_path / "saved"))
    assert saved.metrics == loaded.metrics
    with pytest.raises(MambalensError, match="measure"):
        lens.sweep(FACTS, measure="prob", out=tmp_path / "run", **OPTIONS)
    with pytest.raises(MambalensError, match="measure"):
        lens.sweep(FACTS, out=tmp_path / "run", **OPTIONS)


def test_without_a_measure_or_with_several_there_is_none_to_draw(lens: Lens) -> None:
    plain, one, other = (lens.sweep(FACTS, measure=name, **OPTIONS) for name in (None, "prob", "logit"))
    both = SweepResult.concat([one, other])
    for result in (plain, both, SweepResult.concat([plain, one])):
        assert result.metrics == METRICS
        with pytest.raises(MambalensError, match="metric='measure' is not a column"):
            result.summary(metric="measure")
    assert SweepResult.concat([one, one]).metrics["measure"] == MEASURES["prob"]


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ("log_odd", "measure='log_odd' is not a measure: did you mean 'log_odds'"),
        ("logit_difference", "measure='logit_difference' is of pairs of answers"),
        (
            lambda logits, targets: logits,
            r"'<lambda>' gives a tensor of shape \[5, \d+\].*give a tensor of shape \[5\]",
        ),
        (lambda logits, targets: 1.0, "'<lambda>' gives float"),
    ],
)
def test_what_is_no_measure_is_refused(lens: Lens, measure: str, message: str) -> None:
    with pytest.raises(MambalensError, match=message):
        lens.sweep(FACTS, measure=measure, **OPTIONS)


def test_a_lambda_is_not_kept_in_a_folder(lens: Lens, tmp_path: Path) -> None:
    with pytest.raises(MambalensError, match="A lambda has no name"):
        lens.sweep(FACTS, measure=lambda logits, targets: logits[:, 0], out=tmp_path, **OPTIONS)
