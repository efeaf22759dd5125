"""The logit lens is the model's own head on every layer's residual stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, architecture, in_double
from test_contributions import FACTS, TOKENIZER, lens_on

from mambalens import Lens, MambalensError
from mambalens.interventions.lens_data import LOGIT_COLUMNS


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_layer_is_the_models_own_prediction(name: str) -> None:
    lens = lens_on(name)
    with in_double(lens.model):
        found = lens.logits_by_layer(FACTS)
        for fact in FACTS:
            prompt = lens.prompt(fact)
            with torch.no_grad():
                probs = lens.model(torch.tensor([prompt.ids]), use_cache=False).logits[0].double().softmax(-1)
            rows = found.table[(found.table.fact_id == fact.id) & (found.table.layer == lens.n_layers)]
            assert rows.position.tolist() == list(range(len(prompt.ids)))
            assert rows.token.tolist() == prompt.tokens
            own = probs[:, prompt.target_id]
            np.testing.assert_allclose(rows.prob, own, rtol=1e-9)
            np.testing.assert_allclose(rows.log_odds, (own / (1 - own)).log(), atol=1e-7)
            assert rows["rank"].tolist() == ((probs > own[:, None]).sum(1) + 1).tolist()
            top = probs.topk(5)
            np.testing.assert_allclose(np.stack(rows.top_probs), top.values, rtol=1e-9)
            texts = [[TOKENIZER.decode([i]) for i in row] for row in top.indices.tolist()]
            assert rows.top_tokens.tolist() == texts
            assert rows.top_token.tolist() == [row[0] for row in texts]


@pytest.mark.parametrize("name", ["mamba", "gpt2", "gemma2", "lfm2"])
def test_an_earlier_layer_is_the_same_model_cut_off_behind_it(name: str) -> None:
    """The rest of the layers taken out of the model, one by one."""
    lens = lens_on(name)
    found = lens.logits_by_layer(FACTS[0]).table
    ids = torch.tensor([lens.prompt(FACTS[0]).ids])
    for count in range(lens.n_layers):
        model: Any = architecture(name, vocabulary=len(TOKENIZER))
        layers = Lens(model, TOKENIZER).hooks.layers
        for layer in layers[count:]:
            _passing_on(layer)
        with torch.no_grad():
            probs = model(ids, use_cache=False).logits[0].double().softmax(-1)
        rows = found[found.layer == count]
        np.testing.assert_allclose(rows.prob, probs[:, lens.prompt(FACTS[0]).target_id], rtol=1e-5)


def _passing_on(layer: torch.nn.Module) -> None:
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    layer.forward = forward  # type: ignore[method-assign]


def test_means_over_facts_are_by_layer_and_piece() -> None:
    lens = lens_on("mamba2")
    found = lens.logits_by_layer(FACTS, k=2)
    table = found.table
    assert tuple(table.columns) == tuple(LOGIT_COLUMNS)
    assert all(len(tokens) == 2 for tokens in table.top_tokens)
    summary = found.summary("rank", "sem")
    here = table[(table.layer == 2) & (table.piece == "context")]
    row = summary[(summary.layer == 2) & (summary.piece == "context")].iloc[0]
    assert (row.n, row["mean"]) == (2, pytest.approx(here.groupby("fact_id")["rank"].mean().mean()))
    assert len(found.at_last()) == 3 * (lens.n_layers + 1)
    for wrong, said in (("probs", "did you mean 'prob'"), ("loss", "'loss' is not a metric")):
        with pytest.raises(MambalensError, match=said):
            found.summary(wrong)
    with pytest.raises(MambalensError, match="k=0: give how many tokens"):
        lens.logits_by_layer(FACTS, k=0)


def test_inside_a_knockout_it_is_the_cut_model() -> None:
    lens = lens_on("llama")
    with lens.knockout(FACTS[0], "subject", "last"):
        found = lens.logits_by_layer(FACTS[0]).at_last()
        with torch.no_grad():
            probs = lens.model(torch.tensor([lens.prompt(FACTS[0]).ids])).logits[0, -1].softmax(-1)
    whole = lens.logits_by_layer(FACTS[0]).at_last()
    assert found.prob.iloc[-1] == pytest.approx(float(probs[lens.prompt(FACTS[0]).target_id]), rel=1e-9)
    assert found.prob.iloc[-1] != pytest.approx(whole.prob.iloc[-1], rel=1e-3)
