"""Keys put in with the values: sweeps and certified edges equal explicit attention, and what has no keys is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import explicit
import numpy as np
import pytest
import torch
from models import architecture, in_double, tiny
from test_contributions import TOKENIZER

from mambalens import Fact, Lens, MambalensError, SweepResult, load_facts
from mambalens.facts.pairs import aligned
from mambalens.facts.pieces import piece_of
from mambalens.facts.sequence import Facts
from mambalens.hooks import Values
from mambalens.result import Flow

# Prompts of unequal lengths, so that batches are padded and positions are aligned by pieces.
FACTS = Facts([
    Fact("The capital of Peru is", "Peru", "Lima", id="peru"),
    Fact("In the south, the capital of New Zealand is now", "New Zealand", "Wellington", id="zealand"),
    Fact("So Ghana has the capital", "Ghana", "Accra", id="ghana"),
])  # fmt: skip
OTHER = Fact("Well then, the capital of Sri Lanka is", "Sri Lanka", "Colombo", id="other")
ASKED: dict[str, dict[str, Any]] = {"mean": {"over": FACTS}, "resample": {"other": OTHER}}


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def lens(request: pytest.FixtureRequest) -> Iterator[Lens]:
    model = tiny(request.param, attention="eager", vocabulary=len(TOKENIZER))
    lens = Lens(model, TOKENIZER)
    with in_double(model):
        yield lens


def by_hand(lens: Lens, ablation: str, fact: Fact) -> Values:
    """Keys and values for one prompt: of the other prompt, or means over all facts, position by position."""
    prompt = lens.prompt(fact)
    asked = [lens.prompt(one) for one in (FACTS if ablation == "mean" else [OTHER])]
    runs = [lens.hooks.values(torch.tensor([one.ids]), keys=True) for one in asked]
    if ablation == "resample":
        return runs[0].each(lambda part: part[:, aligned(prompt, asked[0])])
    of = {}
    for mixer in lens.hooks.mixers:
        parts: list[Any] = [None, None, None]
        for number in (0, 2):
            columns = []
            for piece in piece_of(prompt):
                same = [run.of[mixer][number][0, i] for run, one in zip(runs, asked, strict=True)
                        for i, found in enumerate(piece_of(one)) if found == piece]  # fmt: skip
                columns.append(torch.stack(same).mean(0))
            parts[number] = torch.stack(columns)[None]
        of[mixer] = type(runs[0].of[mixer])(*parts)
    return Values(of)


def probs(lens: Lens, fact: Fact, entries: dict[int, torch.Tensor], values: Values) -> torch.Tensor:
    """Explicit attention in which entries [T, S] read other keys and values."""
    count, instead = lens.hooks.mixers[0].n_features, {}
    for layer, mask in entries.items():
        written = values.of[lens.hooks.mixer_of(layer)]
        instead[layer] = [(mask[None, :, :, None].expand(1, -1, -1, count), written.main, written.keys)]
    ids = torch.tensor([lens.prompt(fact).ids])
    name = {"GPTNeoXForCausalLM": "gpt_neox"}.get(type(lens.model).__name__, "llama")
    with torch.no_grad(), explicit.explicit_model(lens.model, name, {}, {}, instead):
        return lens.model(ids, use_cache=False).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_a_sweep_with_keys_equals_explicit_attention(lens: Lens, ablation: str) -> None:
    asked = ASKED[ablation] | {"ablation": ablation}
    result = lens.sweep(FACTS, ("subject", "relation"), window=2, progress=False, keys=True, **asked)
    without = lens.sweep(FACTS, ("subject", "relation"), window=2, progress=False, **asked)
    assert set(result.table.ablation) == {f"{ablation}+keys"} == {result.configs[0].ablation}
    assert len(result.table) == len(without.table) > 6
    assert not np.allclose(result.table.prob, without.table.prob, rtol=1e-3)
    for fact in FACTS:
        values, prompt = by_hand(lens, ablation, fact), lens.prompt(fact)
        time = len(prompt.ids)
        for row in result.table[result.table.fact_id == fact.id].itertuples():
            mask = torch.zeros(time, time, dtype=torch.bool)
            mask[-1, prompt.positions(row.source)] = True
            layers = range(row.window_start, row.window_start + row.window_size)
            slow = probs(lens, fact, dict.fromkeys(layers, mask), values)[prompt.target_id]
            assert abs(float(slow) - row.prob) < 1e-9 + 1e-7 * float(slow)
        with lens.knockout(fact, "subject", layers=[0, 1], keys=True, **asked):
            known = lens.predict(fact, 500).set_index("token_id").prob
        mask = torch.zeros(time, time, dtype=torch.bool)
        mask[-1, prompt.positions("subject")] = True
        slow = probs(lens, fact, dict.fromkeys([0, 1], mask), values)
        np.testing.assert_allclose(known, slow[torch.tensor(known.index)], rtol=1e-6)


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_certified_edges_and_circuits_with_keys_equal_explicit_attention(lens: Lens, ablation: str) -> None:
    asked = ASKED[ablation] | {"ablation": ablation, "keys": True}
    flow = lens.flow(FACTS, points=1, progress=False)
    found = flow.certify(4, 4, progress=False, **asked)
    circuits = flow.circuit(0.95, progress=False, **asked)
    assert found.ablation == f"{ablation}+keys" == found.configs[0].ablation
    assert not len(circuits) or set(circuits.ablation) == {f"{ablation}+keys"}
    for fact in FACTS:
        values, prompt = by_hand(lens, ablation, fact), lens.prompt(fact)
        time = len(prompt.ids)
        rows = found.table[(found.table.fact_id == fact.id) & found.table.exact.notna()]
        assert len(rows) >= 4
        for row in rows.itertuples():
            mask = torch.zeros(time, time, dtype=torch.bool)
            mask[row.target, row.source] = True
            prob = probs(lens, fact, {row.layer: mask}, values)[prompt.target_id]
            assert abs(float((prob / (1 - prob)).log()) - row.base_measure - row.exact) < 1e-5
        own = circuits[circuits.fact_id == fact.id]
        if len(own):
            cut = {layer: torch.ones(time, time, dtype=torch.bool).tril(-1) for layer in range(lens.n_layers)}
            for row in own.itertuples():
                cut[row.layer][row.target, row.source] = False
            kept = probs(lens, fact, cut, values)[prompt.target_id] / rows.base_prob.iloc[0]
            assert abs(float(kept) - own.kept.iloc[0]) < 1e-5


def test_a_hybrid_puts_keys_into_its_attention_and_leaves_its_recurrences_theirs() -> None:
    model = architecture("jamba", vocabulary=len(TOKENIZER))
    lens = Lens(model, TOKENIZER)
    recurrent = next(mixer.layer for mixer in lens.hooks.mixers if mixer.kind != "attention")
    attentive = next(mixer.layer for mixer in lens.hooks.mixers if mixer.kind == "attention")
    asked = {"ablation": "resample", "other": OTHER, "progress": False}
    windows = [[recurrent], [attentive]]
    with in_double(model):
        tables = [lens.sweep(FACTS, "relation", window=windows, keys=keys, **asked).table for keys in (False, True)]
    values, both = (table.groupby("window_start").prob.apply(list) for table in tables)
    np.testing.assert_allclose(values[recurrent], both[recurrent], rtol=1e-9)
    assert not np.allclose(values[attentive], both[attentive], rtol=1e-9)
    with pytest.raises(MambalensError, match=r"keys=True .* what is cut is mamba1: recurrences keep"):
        lens.sweep(FACTS, "relation", window=[[recurrent]], keys=True, **asked)
    with (
        pytest.raises(MambalensError, match="what is cut is mamba1"),
        lens.knockout(FACTS[0], layers=[recurrent], ablation="resample", other=OTHER, keys=True),
    ):
        pass


def test_keys_where_there_are_none_are_refused() -> None:
    lens = Lens.load("atlas-mamba2")
    facts = load_facts("atlas").where(relation="capital", wording="near").sample(3)
    said = r"keys=True puts in keys of attention, but what is cut is mamba2: recurrences keep their own k and B"
    with pytest.raises(MambalensError, match=said):
        lens.sweep(facts, window=2, ablation="mean", keys=True, progress=False)
    with pytest.raises(MambalensError, match=said):
        lens.heatmap(facts[0], 2, ablation="mean", over=facts, keys=True)
    flow = lens.flow(facts[:1], points=1, progress=False)
    for verb in (flow.certify, flow.circuit):
        with pytest.raises(MambalensError, match=said):
            verb(progress=False, ablation="mean", over=facts, keys=True)
    with pytest.raises(MambalensError, match=said):
        lens.hooks.values(torch.tensor([[1, 2, 3]]), keys=True)
    for ask in (lens.sweep, lens.heatmap):
        with pytest.raises(MambalensError, match="keys=True puts in keys of attention, but ablation='zero' puts in no"):
            ask(facts[0], window=2, keys=True)


def test_results_with_and_without_keys_are_kept_apart(tmp_path: Path) -> None:
    lens = Lens.load("atlas-gpt-neox")
    facts = load_facts("atlas").where(relation="capital", wording="near").sample(4)
    asked = {"window": [[2, 3]], "ablation": "mean", "progress": False}
    values = lens.sweep(facts, "subject", out=tmp_path / "values", **asked)
    both = lens.sweep(facts, "subject", out=tmp_path / "keys", keys=True, **asked)
    assert json.loads((tmp_path / "keys" / "sweep.json").read_text())["definition"]["keys"] is True
    for folder, keys in (("values", True), ("keys", False)):
        with pytest.raises(MambalensError, match="holds another run .*keys: "):
            lens.sweep(facts, "subject", out=tmp_path / folder, keys=keys, **asked)
    together = SweepResult.concat([values, both])
    assert together.summary().groupby("ablation").size().to_dict() == {"mean": 1, "mean+keys": 1}
    assert SweepResult.load(tmp_path / "keys").configs[0].ablation == "mean+keys"
    assert "mean+keys ablation" in {axis.get_title().split(" · ")[0] for axis in together.plot().axes}
    assert "of keys too" in both.plot()._suptitle.get_text()
    figure = lens.heatmap(facts[0], 6, ablation="resample", other=facts[1], keys=True)
    assert "another prompt's keys and values put in" in figure.axes[0].get_title()


def test_flows_of_several_ablations_are_not_put_together() -> None:
    lens = Lens.load("atlas-gpt-neox")
    facts = load_facts("atlas").where(relation="capital", wording="near").sample(3)
    one, two, three = (lens.flow([fact], points=1, progress=False) for fact in facts)
    with_keys = one.certify(2, 0, progress=False, ablation="mean", over=facts, keys=True)
    with pytest.raises(MambalensError, match=r"different ablations \(mean\+keys, mean\)"):
        Flow.concat([with_keys, two.certify(2, 0, progress=False, ablation="mean", over=facts)])
    together = Flow.concat([three, with_keys])
    assert together.ablation == "mean+keys" and {config.ablation for config in together.configs} == {"mean+keys"}
    assert Flow.concat([two, three]).ablation == "zero"
