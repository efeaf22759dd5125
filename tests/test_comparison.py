"""Several models side by side, on the facts that all of them know."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mambalens import Lens, MambalensError, SweepResult, compare, known_to_all, load_facts
from mambalens.data import checkpoints

MODELS = ["atlas-mamba2", "atlas-gpt-neox"]
FACTS = load_facts("atlas").where(relation=["country", "language"]).sample(150)


def test_the_facts_that_all_models_know_are_those_that_each_knows() -> None:
    known = [{fact.id for fact in Lens.load(name).known(FACTS, progress=False)} for name in MODELS]
    found = [fact.id for fact in known_to_all(MODELS, FACTS, progress=False)]
    assert found == [fact.id for fact in FACTS if fact.id in known[0] & known[1]]


def test_compare_sweeps_every_model_over_the_same_facts(tmp_path: Path) -> None:
    few = FACTS[:12]
    result = compare(MODELS, few, sources="subject", window=6, progress=False, out=tmp_path)
    assert result.models == MODELS
    of_each = [set(part.fact_id) for _, part in result.table.groupby("model")]
    assert of_each[0] == of_each[1] == {fact.id for fact in known_to_all(MODELS, few, progress=False)}
    lens = Lens.load(MODELS[1])
    alone = lens.sweep(known_to_all(MODELS, few, progress=False), "subject", window=6, progress=False).table
    assert result.table[result.table.model == MODELS[1]].prob.tolist() == alone.prob.tolist()
    order = ["model", "fact_id", "window_start"]
    kept, found = (each.table.sort_values(order, ignore_index=True) for each in (SweepResult.load(tmp_path), result))
    pd.testing.assert_frame_equal(kept, found, check_exact=True)
    assert len(result.plot(columns="model", x="depth").axes) == 2
    own = compare([lens, MODELS[0]], few, common=False, sources="subject", window=6, progress=False)
    assert own.models == [MODELS[1], MODELS[0]]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(MambalensError, match="Two of the models are called 'atlas-mamba2'"):
        compare([MODELS[0], str(checkpoints()[MODELS[0]])], FACTS)
    wrong = [fact for fact in FACTS if fact.target.strip() != "Peru"][:3]
    wrong = [type(fact)(fact.prompt, fact.subject, " Peru", id=fact.id) for fact in wrong]
    with pytest.raises(MambalensError, match="is answered right by all of"):
        compare(MODELS, wrong, progress=False)
