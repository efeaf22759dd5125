"""A result says how replays were held against the model, in a folder and without one."""

from __future__ import annotations

import functools
from pathlib import Path

import pandas as pd
import pytest

from mambalens import Flow, Lens, SweepResult, load_facts
from mambalens.runs.folder import CHECKS
from mambalens.sweep.checks import MULTIPLE

FACTS = load_facts("atlas").where(wording="near").sample(5)


@functools.cache
def lens_of(name: str) -> Lens:
    return Lens.load(name)


def looks_right(checks: pd.DataFrame, model: str) -> None:
    assert tuple(checks.columns) == CHECKS and (checks.model == model).all() and checks.passed.all()
    assert (checks.difference <= MULTIPLE * checks.noise).all() and (checks.noise > 0).all()
    assert checks.tokens.between(3, 30).all() and checks.passed.dtype == bool and checks.noise.dtype == float


def test_a_sweep_keeps_a_check_of_every_replay(tmp_path: Path) -> None:
    lens = lens_of("atlas-mamba1")
    result = lens.sweep(FACTS, "subject", window=12, progress=False, batch_size=2)
    looks_right(result.checks, lens.name)
    assert result.checks.prompts.tolist() == [2, 2, 1]
    kept = lens.sweep(FACTS, "subject", window=12, progress=False, batch_size=2, out=tmp_path / "run", block_size=2)
    looks_right(kept.checks, lens.name)
    assert sorted(kept.checks.prompts) == [1, 2, 2] and kept.where(path="main").checks.equals(kept.checks)
    again = SweepResult.load(kept.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(again.checks, kept.checks, check_exact=True)
    other = lens_of("atlas-gpt-neox").sweep(FACTS, "subject", window=12, progress=False)
    both = SweepResult.concat([kept, other])
    assert set(both.checks.model) == {lens.name, "atlas-gpt-neox"}
    assert set(both.where(model=lens.name).checks.model) == {lens.name}


def test_a_replay_that_misses_is_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = Lens.load("atlas-mamba1")
    of = type(lens.hooks.mixers[0])
    own = of.convolved
    monkeypatch.setattr(of, "convolved", lambda *given, **named: 1.1 * own(*given, **named))
    with pytest.warns(UserWarning, match="is not reproduced"):
        result = lens.sweep(FACTS[:1], "subject", window=12, progress=False)
    assert result.checks.passed.tolist() == [False] and (result.checks.difference > 3 * result.checks.noise).all()


def test_a_flow_keeps_its_checks_and_those_of_edges_certified_later(tmp_path: Path) -> None:
    lens = lens_of("atlas-mamba2")
    flow = lens.flow(FACTS[:2], certify=0, progress=False)
    assert not len(flow.checks) and tuple(flow.checks.columns) == CHECKS
    certified = flow.certify(4, 4, progress=False)
    looks_right(certified.checks, lens.name)
    more = certified.certify(6, 4, progress=False)
    assert len(more.checks) > len(certified.checks) > 0
    kept = lens.flow(FACTS[:2], certify=4, progress=False, out=tmp_path, block_size=1)
    looks_right(kept.checks, lens.name)
    assert Flow.load(tmp_path).checks.equals(kept.checks)
