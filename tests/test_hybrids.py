"""Models that mix mixers, through the lens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from models import architecture
from transformers import AutoTokenizer

from mambalens import Fact, Lens, MambalensError, Selection
from mambalens.data import checkpoints
from mambalens.facts.files import as_facts
from mambalens.figures.style import main_path
from mambalens.sweep.plan import Plan
from mambalens.sweep.run import run

TOKENIZER = AutoTokenizer.from_pretrained(next(iter(checkpoints().values())))
FACTS = [
    Fact("The capital of Peru is", "Peru", " Lima", "capital", "a"),
    Fact("Chad, shown on a stamp of the nineteen sixties: the capital is", "Chad", " N'Djamena", "capital", "b"),
]


@pytest.fixture(scope="module", params=["jamba", "falcon_h1", "nemotron_h"])
def lens(request: pytest.FixtureRequest) -> Lens:
    model = architecture(request.param, vocabulary=len(TOKENIZER))
    return Lens(model, TOKENIZER, request.param)


def test_a_description_has_a_row_for_every_mixer(lens: Lens) -> None:
    table = lens.describe()
    assert sorted(table.layer.unique()) == list(range(lens.n_layers))
    expected = {
        "jamba": ["mamba1", "attention", "mamba1"],
        "falcon_h1": ["mamba2", "attention"] * 3,
        "nemotron_h": ["mamba2", "", "attention", "", "mamba2"],
    }[lens.name]
    assert table.mixer.tolist() == expected
    assert (table.mixer_parameters <= table.layer_parameters).all()
    assert table[table.mixer == "attention"].features.unique().tolist() == [4]
    of_layers = table.drop_duplicates("layer").layer_parameters.sum()
    assert of_layers < sum(parameter.numel() for parameter in lens.model.parameters())


@pytest.mark.parametrize("mixers", [None, "attention", "state space"])
def test_a_sweep_of_one_kind_is_what_hooked_passes_give(lens: Lens, mixers: str | None) -> None:
    kind = next(k for k in lens.hooks.kinds if k != "attention") if mixers == "state space" else mixers
    plan = Plan(
        ("subject", "relation"), "last", 2, ("all",), ("main", "both") if kind != "attention" else ("main",), kind
    )
    tables = [run(lens, as_facts(FACTS), plan, progress=False, replay=replay).table for replay in (True, False)]
    assert len(tables[0]) == 2 * 2 * (lens.n_layers - 1) * len(plan.paths)
    assert np.allclose(tables[0].prob, tables[1].prob, rtol=1e-4)
    row = tables[0].iloc[3]
    fact = next(fact for fact in FACTS if fact.id == row.fact_id)
    layers = range(row.window_start, row.window_start + 2)
    first = TOKENIZER(fact.target)["input_ids"][0]
    with torch.no_grad(), lens.knockout(fact, row.source, "last", layers, path=row.path, mixers=kind):
        probability = lens.model(torch.tensor([lens.prompt(fact).ids])).logits[0, -1].softmax(-1)[first]
    assert float(probability) == pytest.approx(row.prob, rel=1e-4)


def test_features_and_diagnostics_tell_the_kinds_apart(lens: Lens) -> None:
    table = lens.features(FACTS, progress=False)
    assert table.groupby(["layer", "kind"]).size().to_dict() == {
        (mixer.layer, mixer.kind): mixer.n_features for mixer in lens.hooks.mixers
    }
    assert table[table.kind == "attention"].half_life.isna().all()
    assert table[table.kind != "attention"].half_life.notna().all()
    state = table[table.kind != "attention"]
    chosen = Selection.by(state, "half_life", top=0.5)
    assert sorted(chosen) == sorted(state.layer.unique())
    if lens.name == "falcon_h1":
        with pytest.raises(MambalensError, match="two mixers"):
            Selection.by(table, "exchange_share", top=0.5)
    kind, whole = state.kind.iloc[0], lens.predict(FACTS[0])
    with lens.knockout(FACTS[0], layers=list(chosen), features=chosen, mixers=kind):
        cut = lens.predict(FACTS[0])
    assert not np.allclose(cut.prob, whole.prob, rtol=1e-3)
    with lens.knockout(FACTS[0], layers=list(chosen), features={layer: [] for layer in chosen}, mixers=kind):
        pd.testing.assert_frame_equal(lens.predict(FACTS[0]), whole, check_exact=True)
    diagnosed = lens.diagnose(FACTS, progress=False)
    assert set(zip(diagnosed.layer, diagnosed.kind, strict=True)) == set(zip(table.layer, table.kind, strict=True))


def test_single_features_of_both_kinds_are_knocked_out(lens: Lens) -> None:
    found = lens.causal_features(FACTS, progress=False)
    pd.testing.assert_series_equal(
        found.table.groupby(["layer", "kind"]).n_features.sum(),
        lens.features().groupby(["layer", "kind"]).size(), check_names=False,
    )  # fmt: skip
    row = found.table[found.table.kind == "attention"].iloc[0]
    ids = torch.tensor([lens.prompt(FACTS[1]).ids])
    first = TOKENIZER(FACTS[1].target)["input_ids"][0]
    with torch.no_grad():
        base = float(lens.model(ids).logits[0, -1].softmax(-1)[first])
        with lens.knockout(FACTS[1], layers=[int(row.layer)], features=list(row.features), mixers="attention"):
            cut = float(lens.model(ids).logits[0, -1].softmax(-1)[first])
    assert found.drops[1, row.name] == pytest.approx(100 * (base - cut) / base, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "main"),
    [
        ("lfm2", "shortconv", "attention"),
        ("minimax", "lightning", "scan or attention"),
        ("recurrent_gemma", "rglru", "scan or attention"),
        ("zamba", "mamba1", "scan or attention"),
    ],
)
def test_a_lens_takes_models_with_other_recurrences(name: str, kind: str, main: str) -> None:
    lens = Lens(architecture(name, vocabulary=len(TOKENIZER)), TOKENIZER, name)
    of_kind = lens.hooks.mixers_of(kind)
    paths = ("both",) if kind == "shortconv" else ("main", "both")
    plan = Plan(("subject", "relation"), "last", 2, ("all",), paths, kind)
    tables = [run(lens, as_facts(FACTS), plan, progress=False, replay=replay).table for replay in (True, False)]
    assert np.allclose(tables[0].prob, tables[1].prob, rtol=1e-4)
    assert tables[0].change_pct.abs().max() > 0.1
    assert main_path(lens.sweep(FACTS, window=2, progress=False)) == main
    lens.heatmap(FACTS[0], 2)
    row = f"<td>{kind}</td><td>{len(of_kind)}</td><td>{of_kind[0].n_features} "
    assert row + ("heads" if kind == "lightning" else "channels") in lens._repr_html_()
    table = lens.features(FACTS, progress=False)
    assert (table[table.kind == kind].decay_norm.notna() == of_kind[0].decays).all()
    assert (table[table.kind == kind].half_life.notna() == of_kind[0].decays).all()
    diagnosed = lens.diagnose(FACTS, progress=False)
    assert set(zip(diagnosed.layer, diagnosed.kind, strict=True)) == set(zip(table.layer, table.kind, strict=True))
    path = "conv" if kind == "shortconv" else "main"
    causal = lens.causal_features(FACTS, path=path, progress=False).table
    expected = {(mixer.layer, mixer.kind) for mixer in lens.hooks.mixers if kind != "shortconv" or mixer in of_kind}
    assert set(zip(causal.layer, causal.kind, strict=True)) == expected
