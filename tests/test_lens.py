"""The lens, the sweep and its result, on a tiny random model with the Atlas tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import tiny
from scipy import stats
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mambalens import Fact, Lens, MambalensError, SweepResult, load_facts
from mambalens.data import checkpoints
from mambalens.facts.files import as_facts
from mambalens.figures import flow, heatmap
from mambalens.figures.curves import APART
from mambalens.runs.intervals import mean_intervals
from mambalens.sweep.block import COLUMNS
from mambalens.sweep.plan import Plan
from mambalens.sweep.prediction import Prediction, kl_divergence
from mambalens.sweep.run import run

FOLDER = next(iter(checkpoints().values()))
FACTS = [
    Fact("The capital of Peru is", "Peru", " Lima", "capital", "a"),
    Fact("Chad, shown on a stamp of the nineteen sixties: the capital is", "Chad", " N'Djamena", "capital", "b"),
    Fact("In São Tomé people pay with the", "São Tomé", " Dobra", "currency", "c"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module", params=["mamba1", "mamba2", "gpt_neox", "llama"])
def lens(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Lens:
    model = tiny(request.param, vocabulary=len(tokenizer))
    return Lens(model, tokenizer, request.param)


def test_a_sweep_is_what_single_hooked_passes_give(lens: Lens) -> None:
    paths = ("main", "conv", "both") if lens.name.startswith("mamba") else ("main",)
    result = lens.sweep(FACTS, ("subject", "relation", "context"), window=2, paths=paths, batch_size=2, progress=False)
    assert tuple(result.table.columns) == COLUMNS
    assert len(result.table) == (3 + 3 + 2) * 3 * len(paths)  # 'b' has no context
    assert result.skipped.values.tolist() == [["b", "context", "the role 'context' is empty"]]
    for row in result.table.itertuples():
        fact = next(fact for fact in FACTS if fact.id == row.fact_id)
        ids = torch.tensor([lens.prompt(fact).ids])
        first = lens.tokenizer(fact.target)["input_ids"][0]
        layers = range(row.window_start, row.window_start + row.window_size)
        with torch.no_grad():
            base = lens.model(ids).logits[0, -1].double().softmax(-1)
            with lens.knockout(fact, row.source, row.target, layers, row.features, row.path):
                cut = lens.model(ids).logits[0, -1].double().softmax(-1)
        assert row.base_prob == pytest.approx(float(base[first]), rel=1e-4)
        assert row.prob == pytest.approx(float(cut[first]), rel=1e-4)
        assert row.change_pct == pytest.approx(100 * (row.prob - row.base_prob) / row.base_prob)
        assert row.kl == pytest.approx(float((base * (base / cut).log()).sum()), abs=1e-5)
        assert row.rank == int((cut > cut[first]).sum()) + 1
        assert row.hit == (int(cut.argmax()) == first)
        assert row.top_token == lens.tokenizer.decode([int(cut.argmax())])


def test_the_same_sweep_twice_gives_the_same_table_and_batches_do_not_matter(lens: Lens) -> None:
    tables = [lens.sweep(FACTS, window=3, batch_size=size, progress=False).table for size in (2, 2, 1, None)]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    for other in tables[2:]:
        same_to_rounding(tables[0], other)


def same_to_rounding(one: pd.DataFrame, other: pd.DataFrame) -> None:
    one, other = one.copy(), other.copy()
    percent = one.pop("change_pct"), other.pop("change_pct")
    for column in ("base_rank", "rank"):  # in the middle of 2,000 tokens some are equal to rounding
        assert (one.pop(column) - other.pop(column)).abs().max() <= 1
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-6)
    assert np.allclose(*percent, rtol=1e-4, atol=100 * 1e-5)  # a change of 0 % is a probability equal to rounding


@pytest.mark.parametrize("target", ["last", "relation", "subject_last"])
def test_replay_finds_what_one_pass_for_every_knockout_finds(lens: Lens, target: str) -> None:
    paths = ("main", "conv", "both") if lens.name.startswith("mamba") else ("main",)
    groups = ([0, 2], "slow" if lens.name.startswith("mamba") else "all")
    sources = ("context", "each") if target == "last" else ("subject", "context", "others")
    plan = Plan(sources, target, 2, groups, paths)
    tables = [run(lens, as_facts(FACTS), plan, progress=False, replay=replay).table for replay in (True, False)]
    same_to_rounding(*tables)


@pytest.mark.parametrize("memory", [2**20, "2MB"])
def test_a_sweep_in_little_memory_gives_the_same(lens: Lens, memory: int | str) -> None:
    plan = Plan(("subject", "each"), "relation", 2)
    tables = [run(lens, as_facts(FACTS), plan, progress=False, memory=size).table for size in (None, memory)]
    same_to_rounding(*tables)


@pytest.mark.parametrize("memory", ["many", "12", 0, -5, "4 parsecs"])
def test_a_memory_that_is_no_size_is_refused(lens: Lens, memory: int | str) -> None:
    with pytest.raises(MambalensError, match=f"memory={memory!r} is "):
        lens.sweep(FACTS, window=2, memory=memory, progress=False)


@contextmanager
def minding_replay(lens: Lens, second: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While the block runs, the model's second layer does something else where it is called again within one pass.

    The model's own passes call it once, so they are what they were.
    """
    calls = itertools.count()

    def begin(*_: object) -> None:
        nonlocal calls
        calls = itertools.count()

    def behind(module: object, arguments: object, output: Any) -> Any:
        if next(calls) == 0:
            return None
        if isinstance(output, tuple):
            return second(output[0]), *output[1:]
        return second(output)

    handles = [
        lens.model.get_input_embeddings().register_forward_hook(begin),
        lens.hooks.layers[1].register_forward_hook(behind),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_a_model_that_replay_misses_is_swept_by_single_passes(lens: Lens) -> None:
    with (
        minding_replay(lens, lambda hidden: hidden.flip(-1)),
        pytest.warns(UserWarning, match=r"not reproduced by replaying it: .* misses by \d\.\de[-+]\d\d nats") as seen,
    ):
        slow = lens.sweep(FACTS, window=2, batch_size=1, progress=False).table
    assert len(seen) == 1  # said once, not for every batch
    same_to_rounding(slow, lens.sweep(FACTS, window=2, progress=False).table)


def test_a_model_that_breaks_replay_is_swept_by_single_passes(lens: Lens) -> None:
    def broken(hidden: torch.Tensor) -> torch.Tensor:
        raise TypeError("forward() got an unexpected keyword argument 'alibi'")

    with (
        minding_replay(lens, broken),
        pytest.warns(
            UserWarning, match=r"cannot be replayed \(TypeError: forward\(\) got .*'alibi'\)\. Every knockout for which"
        ) as seen,
    ):
        slow = lens.sweep(FACTS, window=2, batch_size=1, progress=False).table
    assert len(seen) == 1
    same_to_rounding(slow, lens.sweep(FACTS, window=2, progress=False).table)


def test_a_sweep_inside_a_knockout_keeps_it(lens: Lens) -> None:
    plan = Plan(("subject",), "last", 2)
    with lens.hooks.knockout([0], [-1], path="both" if lens.name.startswith("mamba") else "main"):
        inside, slow = (run(lens, as_facts(FACTS[:1]), plan, progress=False, replay=r).table for r in (True, False))
    pd.testing.assert_frame_equal(
        inside, slow, check_exact=False, rtol=1e-4, atol=1e-6
    )  # float32, by replay and by hooks
    assert not np.allclose(
        inside.prob, lens.sweep(FACTS[:1], "subject", window=2, progress=False).table.prob, rtol=1e-3
    )


def test_evaluate_predict_and_known_agree(lens: Lens) -> None:
    table = lens.evaluate(FACTS, progress=False)
    assert table.fact_id.tolist() == ["a", "b", "c"]
    for fact, row in zip(FACTS, table.itertuples(), strict=True):
        top = lens.predict(fact, k=3)
        assert row.top_token == top.token[0]
        assert row.top_prob == pytest.approx(top.prob[0], rel=1e-4)
        assert top.prob.is_monotonic_decreasing
    top = table.top_token[0]
    mine = [Fact(FACTS[0].prompt, "Peru", top, id="right"), FACTS[1]]
    answered = lens.evaluate(mine, progress=False)
    assert [fact.id for fact in lens.known(mine, progress=False)] == answered[answered.correct].fact_id.tolist()


def test_facts_that_cannot_be_used_are_listed_with_the_reason(lens: Lens) -> None:
    facts = [*FACTS[:1], Fact("The capital of Peru is", "Chile", " Lima", id="x"), Fact("Peru", "Peru", "", id="y")]
    result = lens.sweep(facts, "subject", window=2, progress=False)
    assert set(result.table.fact_id) == {"a"}
    assert result.skipped.fact_id.tolist() == ["x", "y"]
    assert "the subject 'Chile' is not in the prompt" in result.skipped.reason[0]
    assert "cannot be encoded" in result.skipped.reason[1]
    evaluated = lens.evaluate(facts, progress=False)
    assert (evaluated.skipped != "").tolist() == [False, True, True]
    with pytest.raises(MambalensError, match="None of the 1 facts can be used .*Chile"):
        lens.sweep(facts[1:2], window=2, progress=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"window": 5}, "window=5, but the model has 4 layers"),
        ({"window": 0}, "window=0"),
        ({"window": [[1, 9]]}, r"layers has \[9\]"),
        ({"window": [[1, 2], [1, 3]]}, "same first layer and the same size"),
        ({"sources": ("subjct",)}, "'subjct' is not a role: did you mean 'subject'"),
        ({"target": "each"}, "'each' is for sources"),
        ({"features": ("slwo",)}, "slwo"),
        ({"paths": ("cnov",)}, "did you mean 'conv'"),
        ({"sources": ()}, "sources is empty"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
    ids=str,
)
def test_bad_plans_get_a_sentence(lens: Lens, arguments: dict, sentence: str) -> None:
    with pytest.raises(MambalensError, match=sentence):
        lens.sweep(FACTS, **({"window": 2, "progress": False} | arguments))


def test_a_knockout_of_an_absent_subject_or_role_is_refused(lens: Lens) -> None:
    with (
        pytest.raises(MambalensError, match="'Chile' is not in the prompt"),
        lens.knockout(Fact("Peru is", "Chile", " x")),
    ):
        pass
    with (
        pytest.raises(MambalensError, match="'context' is empty"),
        lens.knockout(Fact("Peru is", "Peru", " x"), "context"),
    ):
        pass


def test_targets_left_of_the_last_and_lists_of_windows(lens: Lens) -> None:
    result = lens.sweep(FACTS, "first", "subject_last", [[0, 2], [1, 3], [2]], progress=False)
    assert sorted(set(zip(result.table.window_start, result.table.window_size, strict=True))) == [
        (0, 2),
        (1, 2),
        (2, 1),
    ]
    assert result.configs[0]["window"] == [[0, 2], [1, 3], [2]]


def test_a_result_is_saved_loaded_and_put_together(lens: Lens, tmp_path: Path) -> None:
    result = lens.sweep(FACTS, window=2, out=tmp_path / "runs" / "x", progress=False)
    loaded = SweepResult.load(tmp_path / "runs" / "x")
    pd.testing.assert_frame_equal(loaded.table, result.table, check_exact=True)
    pd.testing.assert_frame_equal(loaded.skipped, result.skipped, check_dtype=False)
    assert loaded.configs == result.configs
    assert not list((tmp_path / "runs" / "x").glob(".*"))
    assert len(SweepResult.load(tmp_path / "runs").table) == len(result.table)
    with pytest.raises(MambalensError, match="does not exist"):
        SweepResult.load(tmp_path / "nowhere")
    with pytest.raises(MambalensError, match="holds no sweep"):
        (tmp_path / "empty").mkdir()
        SweepResult.load(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(MambalensError, match="could not be written"):
        result.save(tmp_path / "file" / "below")


def test_summary_means_and_intervals(lens: Lens) -> None:
    result = lens.sweep(FACTS, ("subject", "last"), window=2, progress=False)
    for interval in ("bootstrap", "t", "sem"):
        summary = result.summary(interval)
        row = summary.iloc[0]
        values = result.table[
            (result.table.source == row.source) & (result.table.window_start == row.window_start)
        ].change_pct
        assert row.n == 3
        assert row["mean"] == pytest.approx(values.mean())
        assert row.low <= row["mean"] <= row.high
    pd.testing.assert_frame_equal(result.summary(), result.summary(), check_exact=True)
    assert set(result.summary(by=("relation",)).relation) == {"capital", "currency"}
    with pytest.raises(MambalensError, match="did you mean 'bootstrap'"):
        result.summary("bootstrp")
    with pytest.raises(MambalensError, match="no column of the facts"):
        result.summary(by=("wordin",))
    part = result.where(source="last", relation="capital")
    assert set(part.table.fact_id) == {"a", "b"}
    assert set(part.table.source) == {"last"}
    with pytest.raises(MambalensError, match="No row of the sweep has source='nobody'"):
        result.where(source="nobody")


def test_a_figure_never_draws_two_values_into_one_line(lens: Lens) -> None:
    sizes = [list(range(start, start + size)) for size in (1, 2) for start in range(3)]
    result = lens.sweep(FACTS, "subject", window=sizes, features=("all", [0, 1]), progress=False)
    figure = flow(result)  # lines: features; rows: window sizes
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "selection 1"]
    for axis in figure.axes:
        for line in axis.get_lines():
            assert len(set(line.get_xdata())) == len(line.get_xdata())
    two = SweepResult.concat([result, lens.sweep(FACTS, ("subject", "last"), "subject_last", 2, progress=False)])
    with pytest.raises(MambalensError, match="cannot show sources by .* --where"):
        flow(two)


def test_groups_of_features_are_lines_where_panels_have_one_source_each(lens: Lens) -> None:
    result = lens.sweep(FACTS, ("subject", "last"), window=2, features=("all", [0, 1]), progress=False)
    figure = flow(result, rows="source")
    assert len(figure.axes) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all", "selection 1"]
    assert flow(result, rows="features").legends[0].get_texts()[0].get_text() == "subject"


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, (300, 40))
    for interval, level in (("bootstrap", 0.95), ("t", 0.95), ("sem", 0.68)):
        found = mean_intervals(list(draws), interval)
        assert np.mean([low <= 3.0 <= high for _, low, high in found]) == pytest.approx(level, abs=0.06)


def test_the_bootstrap_is_scipys_group_by_group() -> None:
    rng = np.random.default_rng(3)
    groups = [rng.normal(size=n) for n in (5, 40, 5, 1, 40, 0)] + [np.ones(7)]
    for group, (mean, low, high) in zip(groups, mean_intervals(groups, "bootstrap", seed=4), strict=True):
        if len(group) < 2:
            assert np.isnan([low, high]).all()
            continue
        theirs = stats.bootstrap(
            (group,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(4), batch=100
        ).confidence_interval
        expected = (1.0, 1.0) if np.ptp(group) == 0 else (theirs.low, theirs.high)
        assert (low, high) == pytest.approx(expected, abs=1e-12) and mean == pytest.approx(group.mean())


def test_predictions_are_those_of_plain_sorting_and_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 70_000, generator=generator) * 3
    logits[0, 7] = logits[0].max()  # a tie at the top
    targets = torch.tensor([7, 5, int(logits[2].argmax()), int(logits[3].argmin()), 1, 69_999])
    found = Prediction.of(logits, targets)
    for row, target in enumerate(targets.tolist()):
        values = logits[row].double()
        assert int(found.rank[row]) == 1 + int((found.log_probs[row] > found.log_probs[row, target]).sum())
        assert float(found.prob[row]) == pytest.approx(float(values.softmax(-1)[target]), rel=1e-4)
        assert logits[row, found.top[row]] == logits[row].max()
    assert found.rank[[0, 2, 3]].tolist() == [1, 1, 70_000]
    other = (logits + 0.1 * torch.randn(6, 70_000, generator=generator)).double().log_softmax(-1)
    base = logits.double().log_softmax(-1)
    expected = torch.nn.functional.kl_div(other, base, log_target=True, reduction="none").sum(-1)
    for probs in (None, base.exp()):
        torch.testing.assert_close(kl_divergence(base, other, probs), expected, rtol=1e-9, atol=0)


def test_kl_of_known_distributions() -> None:
    base, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl_divergence(base, other).item() == pytest.approx(expected)
    assert kl_divergence(base, base).item() == 0


def test_figures_say_what_they_show(lens: Lens) -> None:
    result = lens.sweep(FACTS, ("subject", "last"), window=2, progress=False)
    figure = flow(result, rows="relation", x="depth")
    assert len(figure.axes) == 2
    assert "capital" in figure.axes[0].get_title()
    assert "2 facts" in figure.axes[0].get_title()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["subject", "last"]
    line, other = figure.axes[0].get_lines()[1:]
    shown = result.summary(by=("relation",)).query("relation == 'capital' and source == 'subject'")
    assert line.get_ydata() == pytest.approx(shown["mean"].to_numpy())
    depths = 100 * shown.window_start.to_numpy() / lens.n_layers
    assert (line.get_xdata() + other.get_xdata()) / 2 == pytest.approx(depths)  # set apart, so that none hides another
    assert other.get_xdata() - line.get_xdata() == pytest.approx(APART * 100 / lens.n_layers)
    drawn = lens.heatmap(FACTS[0], window=3)
    tokens = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert "".join(tokens).replace("·", " ") == FACTS[0].prompt
    assert drawn.axes[0].get_images()[0].get_array().shape == (len(tokens), 2)
    with pytest.raises(MambalensError, match="sources='each'"):
        heatmap(result, tokens)
    with pytest.raises(MambalensError, match="'depht' is not an axis"):
        flow(result, x="depht")


def test_a_heatmap_row_is_a_knockout_of_that_position(lens: Lens) -> None:
    fact = FACTS[0]
    ids = torch.tensor([lens.prompt(fact).ids])
    first = lens.tokenizer(fact.target)["input_ids"][0]
    table = lens.sweep([fact], "each", window=3, progress=False).table
    assert table.source.nunique() == ids.shape[1]
    for row in table.itertuples():
        position = int(row.source.removeprefix("each:"))
        layers = range(row.window_start, row.window_start + 3)
        with torch.no_grad(), lens.hooks.knockout([position], [-1], layers):
            expected = lens.model(ids).logits[0, -1].double().softmax(-1)[first]
        assert row.prob == pytest.approx(float(expected), rel=1e-4)


def test_models_that_cannot_be_found_get_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MambalensError, match="no folder and no hub id.*did you mean 'atlas-mamba"):
        Lens.load("atlas-mamba")
    with pytest.raises(MambalensError, match=r"has no config\.json"):
        Lens.load(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MambalensError, match="HF_HUB_OFFLINE is set.* local folder"):
        Lens.load("nobody/nothing")


def test_a_local_folder_is_loaded_with_options() -> None:
    lens = Lens.load(str(FOLDER), dtype=torch.bfloat16, device_map="cpu")
    assert lens.model.dtype == torch.bfloat16
    assert lens.name == FOLDER.name
    fact = load_facts("atlas")[0]
    whole = lens.predict(fact)
    with lens.knockout(fact):
        cut = lens.predict(fact)
    assert len(cut) == len(whole) == 5
    assert cut.prob.tolist() != whole.prob.tolist()


def test_the_whole_target_has_the_log_probability_of_its_tokens_one_after_the_other(lens: Lens) -> None:
    table = lens.evaluate(FACTS, progress=False, batch_size=2, whole_target=True).set_index("fact_id")
    for fact in FACTS:
        ids = lens.prompt(fact).ids
        total, target = 0.0, lens.tokenizer(fact.target)["input_ids"]
        for token in target:
            with torch.no_grad():
                total += float(lens.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
            ids = [*ids, token]
        assert table.target_tokens[fact.id] == len(target)
        assert table.target_log_prob[fact.id] == pytest.approx(total, rel=1e-5)
    assert table.target_tokens.max() > 1
    assert "target_log_prob" not in lens.evaluate(FACTS, progress=False)


def test_accuracy_is_by_relation_and_for_all(lens: Lens) -> None:
    facts = [*FACTS, Fact("Nothing is", "Peru", " x", "capital", "unusable")]
    table = lens.accuracy(facts, progress=False).set_index("relation")
    assert table.facts.to_dict() == {"capital": 2, "currency": 1, "all": 3}
    assert table.skipped.to_dict() == {"capital": 1, "currency": 0, "all": 1}
    single = lens.evaluate(FACTS, progress=False)
    assert table.accuracy["all"] == pytest.approx(single.correct.mean())
    assert table.target_prob["all"] == pytest.approx(single.target_prob.mean())


def test_short_subjects_are_counted_in_this_models_tokens(lens: Lens) -> None:
    lengths = {fact.id: len(lens.prompt(fact).positions("subject")) for fact in FACTS}
    for most in (1, 2, 9):
        found = {fact.id for fact in lens.with_short_subjects(FACTS, most)}
        assert found == {name for name, length in lengths.items() if length <= most}


def test_a_sweep_of_roles_and_single_tokens_draws_both(lens: Lens, tmp_path: Path) -> None:
    result = lens.sweep(FACTS, ("subject", "each"), window=(2), features=("all", [0]), progress=False)
    result.save(tmp_path)
    kept = SweepResult.load(tmp_path)
    prompt = lens.prompt(FACTS[1])
    (row,) = kept.prompts[kept.prompts.fact_id == prompt.fact.id].itertuples()
    assert list(row.tokens) == prompt.tokens and list(row.subject) == prompt.positions("subject")
    assert set(kept.roles().table.source) == {"subject"}
    assert [text.get_text() for text in flow(kept).legends[0].get_texts()] == ["all", "selection 1"]
    drawn = kept.heatmap(str(prompt.fact.id), features="all").axes[0]
    alone = lens.sweep([FACTS[1]], "each", window=2, progress=False).table
    expected = alone.pivot(index="source", columns="window_start", values="change_pct")
    order = [f"each:{i}" for i in range(len(prompt.tokens))]
    np.testing.assert_allclose(drawn.images[0].get_array(), expected.loc[order].to_numpy(), atol=1e-3)
    with pytest.raises(MambalensError, match="several values of features: keep one"):
        kept.heatmap(str(prompt.fact.id))
    with pytest.raises(MambalensError, match="sweep it with sources='each'"):
        kept.roles().heatmap(str(prompt.fact.id), features="all")
    with pytest.raises(MambalensError, match="single tokens as sources only"):
        flow(lens.sweep([FACTS[1]], "each", window=2, progress=False))


def test_known_facts_say_what_they_were_chosen_from(lens: Lens) -> None:
    known = lens.known(FACTS, progress=False)
    assert known.answered == ((lens.name, len(as_facts(FACTS)), len(known), ()),)
    assert known[:0].answered == known.answered


def test_facts_that_cannot_be_asked_stay_listed_when_known_ones_are_chosen(tmp_path: Path) -> None:
    lens = Lens.load("atlas-mamba2")
    misspelled = Fact("The capital of Egypt is", "Egipt", "Cairo", id="odd")
    right = lens.known(load_facts("atlas").where(relation="capital", wording="near")[:20], progress=False)[0]
    for limit in (None, 5):
        known = lens.known([right, misspelled], progress=False, limit=limit)
        assert [fact.id for fact in known] == [right.id]
        assert known.answered[0][:3] == ("atlas-mamba2", 1, 1)
        in_memory = lens.sweep(known, "subject", window=2, progress=False)
        kept = lens.sweep(known, "subject", window=2, progress=False, out=tmp_path / str(limit))
        in_memory.save(tmp_path / f"saved-{limit}")
        for result in (in_memory, kept, SweepResult.load(tmp_path / f"saved-{limit}")):
            (row,) = result.skipped.to_dict("records")
            assert row["fact_id"] == "odd" and "'Egipt' is not in the prompt" in row["reason"]
