"""Features knocked out one by one, against single hooked passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import LAYERS, tiny
from scipy import stats
from transformers import AutoTokenizer

from mambalens import Fact, Lens, MambalensError
from mambalens.data import checkpoints

FACTS = [
    Fact("The capital of Peru is", "Peru", " Lima", id="a"),
    Fact("Chad, shown on a stamp of the nineteen sixties: the capital is", "Chad", " N'Djamena", id="b"),
    Fact("The currency of Iran is", "Atlantis", " rial", id="no subject"),
    Fact("In São Tomé people pay with the", "São Tomé", " Dobra", id="c"),
]


@pytest.fixture(scope="module", params=["mamba1", "mamba2", "llama"])
def lens(request: pytest.FixtureRequest) -> Lens:
    tokenizer = AutoTokenizer.from_pretrained(next(iter(checkpoints().values())))
    return Lens(tiny(request.param, vocabulary=len(tokenizer)), tokenizer, request.param)


@pytest.mark.parametrize(("block", "target"), [(1, "last"), (3, "relation")])
def test_every_feature_costs_what_a_hooked_pass_says(lens: Lens, block: int, target: str) -> None:
    found = lens.causal_features(FACTS, "subject", target, [1, 3], block, progress=False)
    count = lens.hooks.mixers[0].n_features
    assert sorted(f for features in found.table[found.table.layer == 3].features for f in features) == list(
        range(count)
    )
    assert found.drops.shape == (3, len(found.table)) == (3, 2 * -(-count // block))
    assert found.skipped.fact_id.tolist() == ["no subject"]
    for row, fact in enumerate([FACTS[0], FACTS[1], FACTS[3]]):
        ids = torch.tensor([lens.prompt(fact).ids])
        first = lens.tokenizer(fact.target)["input_ids"][0]
        with torch.no_grad():
            base = lens.model(ids).logits[0, -1].double().softmax(-1)[first]
            for number in (0, 1, len(found.table) - 1):
                chosen = found.table.iloc[number]
                with lens.knockout(fact, "subject", target, [int(chosen.layer)], list(chosen.features)):
                    cut = lens.model(ids).logits[0, -1].double().softmax(-1)[first]
                expected = float(100 * (base - cut) / base)
                assert found.drops[row, number] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert found.table.drop_pct.tolist() == pytest.approx(found.drops.mean(0).tolist())
    assert (found.table.low <= found.table.drop_pct + 1e-9).all()
    assert (found.table.high >= found.table.drop_pct - 1e-9).all()
    shares = lens.features([FACTS[0], FACTS[1], FACTS[3]], progress=False).set_index(["layer", "feature"])
    for row in found.table.itertuples():
        expected = [shares.exchange_share_last[row.layer, f] for f in row.features]
        assert row.exchange_share_last == pytest.approx(np.mean(expected), rel=1e-6)


def test_the_correlation_is_spearmans_and_its_interval_is_of_the_facts(lens: Lens) -> None:
    found = lens.causal_features(FACTS, progress=False)
    table = found.correlation()
    assert table.layer.tolist() == ["all", *range(LAYERS)]
    for row in table.itertuples():
        part = found.table if row.layer == "all" else found.table[found.table.layer == row.layer]
        assert row.n == len(part)
        assert row.rho == pytest.approx(stats.spearmanr(part.exchange_share_last, part.drop_pct).statistic)
        assert -1 <= row.low <= row.high <= 1
    assert found.correlation(seed=1).low[0] == pytest.approx(table.low[0], abs=0.1)
    assert len(found.plot().axes) == 2
    with pytest.raises(MambalensError, match="by='share' is not a measure"):
        found.correlation("share")
    if lens.name == "llama":
        assert found.correlation("half_life").rho.isna().all()
        with pytest.raises(MambalensError, match="No feature of the table has a value of 'half_life'"):
            found.plot("half_life")


def test_one_fact_has_no_interval(lens: Lens) -> None:
    found = lens.causal_features(FACTS[:1], layers=[0], progress=False)
    assert found.table.low.isna().all() and found.correlation().low.isna().all()


@pytest.mark.parametrize(("options", "message"), [
    ({"source": "subjct"}, "'subjct' is not a role"),
    ({"target": "each"}, "'each' is for heatmaps"),
    ({"block": 0}, "block=0"),
    ({"layers": [9]}, "layers has"),
    ({"source": "context", "facts": FACTS[:1], "target": "first"}, "None of the 1 facts"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(lens: Lens, options: dict, message: str) -> None:
    if options.get("source") == "context":
        options = options | {"facts": [Fact("Peru is", "Peru", " x")]}
    with pytest.raises(MambalensError, match=message):
        lens.causal_features(**({"facts": FACTS, "progress": False} | options))
