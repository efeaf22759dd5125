"""The table of features, groups, and selections made from them."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LAYERS, SSM, tiny, token_ids
from shapes import WrongShape
from transformers import AutoTokenizer

from mambalens import Fact, Lens, MambalensError, Selection
from mambalens.data import checkpoints
from mambalens.features import operators
from mambalens.features.measures import MEASURED
from mambalens.hooks import HookManager, decay_norm, fused, group_mask

TOKENIZER = AutoTokenizer.from_pretrained(next(iter(checkpoints().values())))
FACTS = [
    Fact("The capital of Peru is", "Peru", " Lima", "capital", "a"),
    Fact("Chad, shown on a stamp of the nineteen sixties: the capital is", "Chad", " N'Djamena", "capital", "b"),
]
LENSES = {name: Lens(tiny(name, vocabulary=len(TOKENIZER)), TOKENIZER, name) for name in ("mamba1", "mamba2", "llama")}


@pytest.mark.parametrize("name", list(LENSES))
def test_the_table_of_features_is_what_single_prompts_give(name: str) -> None:
    lens = LENSES[name]
    table = lens.features(FACTS, batch_size=2, progress=False)
    pd.testing.assert_frame_equal(table, lens.features(FACTS, batch_size=1, progress=False))
    assert table.groupby("layer").size().tolist() == [lens.hooks.mixers[0].n_features] * LAYERS
    squares: dict[str, torch.Tensor] = {}
    logs = []
    for fact in FACTS:
        ids = torch.tensor([lens.prompt(fact).ids])
        mixing = lens.hooks.token_mixing(ids, 2)
        alpha = lens.hooks.effective_attention(ids, 2)
        own = torch.diagonal(alpha, dim1=-2, dim2=-1)
        parts = {
            "exchange": torch.einsum("bfts,bsfp->btfp", alpha - own.diag_embed(), mixing.values),
            "enrichment": torch.einsum("bft,btfp->btfp", own, mixing.values) + mixing.skip[:, None] * mixing.values,
            "whole": mixing.output,
        }
        for part, value in parts.items():
            for suffix, at in (("", slice(None)), ("_last", slice(-1, None))):
                squares[part + suffix] = squares.get(part + suffix, 0) + value[:, at].square().sum((0, 1, 3))
        logs.append(mixing.half_life(torch.tensor([ids.shape[1]]))[0].log())
    rows = table[table.layer == 2]
    for part in ("exchange", "enrichment"):
        for suffix in ("", "_last"):
            expected = (squares[part + suffix] / squares["whole" + suffix]).sqrt().tolist()
            assert rows[f"{part}_share{suffix}"].tolist() == pytest.approx(expected, rel=1e-5)
    if name == "llama":
        assert rows[["decay_norm", "half_life"]].isna().all().all()
        assert set(rows.group) == {""}
    else:
        assert rows.half_life.tolist() == pytest.approx(torch.cat(logs).mean(0).exp().tolist(), rel=1e-4)
        third = len(rows) // 3
        assert rows.group.value_counts().reindex(["slow", "fast"]).tolist() == [third, third]
        assert rows[rows.group == "slow"].decay_norm.min() >= rows[rows.group == "middle"].decay_norm.max()


def test_dtypes_and_shapes_in_signatures_hold_while_tests_run() -> None:
    assert decay_norm(torch.zeros(3, 2)).shape == decay_norm(torch.zeros(3)).shape == (3,)
    with pytest.raises(WrongShape, match="A_log"):
        decay_norm(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(WrongShape, match="alpha"):
        operators.sink_share(torch.zeros(3, 2))
    with pytest.raises(WrongShape, match="start"):
        fused.step_in_torch(torch.zeros(2, 3, 7), torch.zeros(5, 7), torch.zeros(2, 3, 5), torch.zeros(2, 7, 5))


def test_without_facts_the_table_says_what_the_weights_say() -> None:
    table = LENSES["mamba2"].features()
    assert not set(MEASURED) & set(table.columns)
    norms = torch.exp(-torch.exp(LENSES["mamba2"].hooks.mixers[3].module.A_log.detach().double()))
    assert table[table.layer == 3].decay_norm.tolist() == pytest.approx(norms.tolist())


def test_a_prompt_needs_no_subject_to_be_measured_on() -> None:
    lens = LENSES["mamba1"]
    free = [Fact(fact.prompt, "Narnia", fact.target) for fact in FACTS]
    pd.testing.assert_frame_equal(lens.features(free, progress=False), lens.features(FACTS, progress=False))
    with pytest.raises(MambalensError, match="None of the 1 facts can be used"):
        lens.features([Fact("", "", " x")], progress=False)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7, 8, 11])
@pytest.mark.parametrize("ties", [False, True])
def test_the_paper_presets_are_all_but_the_fastest_and_all_but_the_slowest_third(count: int, ties: bool) -> None:
    norm = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    if ties:
        norm = (norm * 2).round()
    order = sorted(range(count), key=lambda f: (-float(norm[f]), f))
    third = count // 3
    dependent = torch.ones(count, dtype=torch.bool)
    dependent[order[count - third :] if third else []] = False
    independent = torch.ones(count, dtype=torch.bool)
    independent[order[:third]] = False
    assert torch.equal(group_mask(norm, "context-dependent"), dependent)
    assert torch.equal(group_mask(norm, "context-independent"), independent)
    parts = [group_mask(norm, name) for name in ("slow", "middle", "fast")]
    assert torch.equal(sum(part.long() for part in parts), torch.ones(count, dtype=torch.long))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 1000))
def test_a_fraction_takes_the_slowest_or_fastest_features(count: int, fraction: float, seed: int) -> None:
    norm = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = math.floor(fraction * count + 1e-9)
    for group, largest in ((f"slow:{fraction}", True), (f"fast:{fraction}", False)):
        mask = group_mask(norm, group)
        assert set(mask.nonzero().flatten().tolist()) == set(norm.topk(chosen, largest=largest).indices.tolist())


@pytest.mark.parametrize(
    "wrong", ["slow:0", "slow:1.1", "fast:x", "middle:0.2", "all:0.5", "slow:", "slwo:0.1", "fast:nan"]
)
def test_a_group_that_does_not_exist_is_quoted(wrong: str) -> None:
    with (
        pytest.raises(MambalensError, match=f"features='{wrong}'"),
        HookManager(tiny("mamba1")).knockout([0], [1], features=wrong),
    ):
        pass


@pytest.mark.parametrize("name", SSM)
def test_the_three_groups_together_are_all(name: str) -> None:
    hooks, ids = HookManager(tiny(name)), token_ids(2, 8)
    with torch.no_grad():
        with hooks.knockout([1, 2], [-1], path="both"):
            everything = hooks.model(ids).logits
        with (
            hooks.knockout([1, 2], [-1], features="slow", path="both"),
            hooks.knockout([1, 2], [-1], features="middle", path="both"),
            hooks.knockout([1, 2], [-1], features="fast", path="both"),
        ):
            assert (hooks.model(ids).logits - everything).abs().max() < 1e-6


def test_a_selection_takes_the_top_and_the_bottom_of_a_measure(tmp_path: Path) -> None:
    table = pd.DataFrame({
        "layer": [0] * 4 + [1] * 3 + [2] * 2, "feature": [3, 2, 1, 0, 0, 1, 2, 0, 1],
        "half_life": [9.0, 5.0, 5.0, 1.0, 2.0, math.nan, 7.0, math.nan, math.nan],
    })  # fmt: skip
    top = Selection.by(table, "half_life", top=0.5)
    assert {layer: mask.nonzero().flatten().tolist() for layer, mask in top.items()} == {0: [1, 3], 1: [2]}
    bottom = Selection.by(table, "half_life", bottom=2 / 3)
    assert {layer: mask.nonzero().flatten().tolist() for layer, mask in bottom.items()} == {0: [0, 1], 1: [0, 2]}
    assert top.name == "top 0.5 by half_life"
    assert {k: v.tolist() for k, v in (~top).items()} == {k: (~v).tolist() for k, v in top.items()}
    assert all(bool(mask.all()) for mask in (top | ~top).values())
    assert not any(bool(mask.any()) for mask in (top & ~top).values())
    again = Selection.load(top.save(tmp_path / "slow half.csv"))
    assert again.name == "slow half"
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in top.items()}


@pytest.mark.parametrize(("options", "message"), [
    ({"column": "halflife", "top": 0.1}, "'halflife' is not a measure in the table: .*half_life"),
    ({"column": "layer", "top": 0.1}, "'layer' is not a measure"),
    ({"column": "half_life"}, "give one of them"),
    ({"column": "half_life", "top": 0.2, "bottom": 0.2}, "give one of them"),
    ({"column": "half_life", "top": 1.2}, "top=1.2"),
])  # fmt: skip
def test_a_selection_that_says_nothing_is_refused(options: dict, message: str) -> None:
    table = pd.DataFrame({"layer": [0, 0], "feature": [0, 1], "half_life": [1.0, 2.0]})
    with pytest.raises(MambalensError, match=message):
        Selection.by(table, **options)


@pytest.mark.parametrize(
    "text", ["", "layer,feature\n0,1\n", "layer,feature,selected\n0,x,1\n", "layer,feature,selected\n0,1,1\n"]
)
def test_a_file_that_is_no_selection_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(MambalensError, match="s.csv"):
        Selection.load(tmp_path / "s.csv")
    with pytest.raises(MambalensError, match="cannot be read"):
        Selection.load(tmp_path / "none.csv")


def test_the_same_selection_goes_to_a_knockout_and_a_sweep() -> None:
    lens = LENSES["mamba1"]
    chosen = Selection.by(lens.features(FACTS, progress=False), "exchange_share", top=0.25)
    result = lens.sweep(FACTS, "subject", window=2, features=("all", chosen, ~chosen), progress=False)
    assert set(result.table.features) == {"all", chosen.name, f"not {chosen.name}"}
    row = result.table[(result.table.features == chosen.name) & (result.table.window_start == 1)].iloc[0]
    fact = next(fact for fact in FACTS if fact.id == row.fact_id)
    ids = torch.tensor([lens.prompt(fact).ids])
    first = lens.tokenizer(fact.target)["input_ids"][0]
    with torch.no_grad(), lens.knockout(fact, "subject", "last", range(1, 3), chosen):
        assert float(lens.model(ids).logits[0, -1].softmax(-1)[first]) == pytest.approx(row.prob, rel=1e-4)
    with pytest.raises(MambalensError, match="twice"):
        lens.sweep(FACTS, "subject", window=2, features=(chosen, chosen), progress=False)
