"""Edges of flows cut with something in their sources' place: replay equals hooked passes, and circuits keep what they say."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

from mambalens import Lens, load_facts
from mambalens.hooks.knockout import Paths
from mambalens.sweep.ablation import Asked, values_for

FACTS = load_facts("atlas").where(relation="capital", wording="near").sample(4)


@pytest.fixture(scope="module", params=["atlas-mamba1", "atlas-gpt-neox"])
def lens(request: pytest.FixtureRequest) -> Lens:
    return Lens.load(request.param)


def log_odds(logits: torch.Tensor, token: int) -> float:
    log_probs = logits.double().log_softmax(-1)
    return float(log_probs[token] - torch.log1p(-log_probs[token].exp()))


@pytest.mark.parametrize("asked", [{"ablation": "mean", "over": FACTS}, {"ablation": "resample", "other": FACTS[3]}])
def test_certified_edges_equal_hooked_passes(lens: Lens, asked: dict[str, Any]) -> None:
    flow = lens.flow(FACTS[:2], points=1, progress=False)
    zero = flow.certify(3, 3, progress=False)
    put_in = zero.certify(3, 3, progress=False, **asked)
    assert put_in.configs[0].ablation == asked["ablation"] and zero.configs[0].ablation == "zero"
    both = zero.table.exact.notna() & put_in.table.exact.notna()
    assert both.sum() == zero.table.exact.notna().sum() > 5
    assert not np.allclose(zero.table.exact[both], put_in.table.exact[both], atol=1e-4)
    for fact in FACTS[:2]:
        prompt = lens.prompt(fact)
        ids = torch.tensor([prompt.ids])
        values = values_for(lens, prompt, Asked.of(asked["ablation"], asked.get("over"), asked.get("other")))
        with torch.no_grad():
            base = log_odds(lens.model(ids).logits[0, -1], prompt.target_id)
            for row in put_in.table[both & (put_in.table.fact_id == fact.id)].itertuples():
                cut = lens.hooks.knockout([row.source], [row.target], [row.layer], path=str(row.path), instead=values)
                with cut:
                    now = log_odds(lens.model(ids).logits[0, -1], prompt.target_id)
                assert abs(now - base - row.exact) < 2e-3 + 1e-3 * abs(row.exact)


def test_circuits_keep_what_they_say_with_other_values_put_in(lens: Lens) -> None:
    flow = lens.flow(FACTS[:1], points=1, progress=False)
    circuit = flow.circuit(0.8, progress=False, ablation="resample", other=FACTS[3])
    if not len(circuit):
        return
    prompt = lens.prompt(FACTS[0])
    ids, time = torch.tensor([prompt.ids]), len(prompt.ids)
    values = values_for(lens, prompt, Asked.of("resample", None, FACTS[3]))
    with torch.no_grad(), ExitStack() as stack:
        base = lens.model(ids).logits[0, -1].softmax(-1)[prompt.target_id]
        for mixer in lens.hooks.mixers:
            for path in mixer.paths & (Paths.MAIN | Paths.CONV):
                mask = torch.ones(time, time, dtype=torch.bool).tril(-1)
                own = circuit[(circuit.layer == mixer.layer) & (circuit.path == path.names[0])]
                mask[own.target.to_numpy(), own.source.to_numpy()] = False
                stack.enter_context(
                    lens.hooks.knockout(layers=[mixer.layer], path=path.names[0], edges=mask, instead=values)
                )
        kept = lens.model(ids).logits[0, -1].softmax(-1)[prompt.target_id] / base
    assert abs(float(kept) - circuit.kept.iloc[0]) < 1e-3
    assert circuit.kept.iloc[0] >= 0.8


def test_facts_without_a_partner_are_left_out_with_a_warning(lens: Lens) -> None:
    flow = lens.flow(FACTS[:2], points=1, progress=False)
    with pytest.warns(UserWarning, match="1 facts are left out .*nothing to put in: it is in none of the pairs"):
        put_in = flow.certify(2, 0, progress=False, ablation="resample", other=FACTS.pairs(same=None)[:1])
    assert put_in.table[put_in.table.exact.notna()].fact_id.nunique() == 1
