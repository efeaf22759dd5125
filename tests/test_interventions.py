"""Patches and traces as users ask for them: tables, means, refusals, and what happens where replay is no help."""

from __future__ import annotations

import functools
import re
from typing import Any

import pandas as pd
import pytest
import torch
from models import architecture, in_double, tiny
from patches import by_hooks, changed_input
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mambalens import Fact, Lens
from mambalens.facts.pairs import Pair, Pairs
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.answers import Patcher
from mambalens.interventions.patching import Patching, patch
from mambalens.interventions.table import PATCHES, TRACES
from mambalens.interventions.tracing import Tracing, embedding_deviation, trace

ONE = Fact("The capital of Peru is", "Peru", "Lima", "capital", "peru")
TWO = Fact("The capital of Chile is", "Chile", "Santiago", "capital", "chile")
LONG = Fact("The old capital of the land Peru was", "Peru", "Cusco", "capital", "long")


@functools.cache
def lens_of(name: str) -> Lens:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["The", "capital", "of", "Peru", "Chile", "is", "Lima", "Santiago", "old", "the", "land", "was", "Cusco"]
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: i for i, word in enumerate(words, 1)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Lens(tiny(name), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"), name)


PAIRS = Pairs([Pair(ONE, TWO), Pair(TWO, ONE)])
NAMES = ["mamba1", "mamba2", "gpt2"]


def logits(lens: Lens, fact: Fact) -> Tensor:
    return lens.model(torch.tensor([lens.prompt(fact).ids]), use_cache=False).logits[0, -1]


def moved(lens: Lens, fact: Fact, other: Fact, after: Tensor) -> float:
    """By the definition: how far the difference of the two answers' logits has gone."""
    own, theirs = lens.prompt(fact).target_id, lens.prompt(other).target_id
    base, there, now = (float(z[own] - z[theirs]) for z in (logits(lens, fact), logits(lens, other), after))
    return (base - now) / (base - there)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_table_say_what_plain_hooks_do(name: str) -> None:
    lens = lens_of(name)
    pairs = Pairs([Pair(ONE, TWO), Pair(LONG, TWO)])
    with torch.no_grad(), in_double(lens.model):
        found = lens.patch(pairs, window=2, progress=False)
        table = found.table
        assert list(table.columns) == list(PATCHES) and len(found.skipped) == 0
        assert len(table) == (5 + 8) * 3  # positions x windows
        for _, row in table[table.window_start == 1].iterrows():
            fact = {"peru": ONE, "long": LONG}[row.fact_id]
            ids, other = (torch.tensor(lens.prompt(one).ids) for one in (fact, TWO))
            # By hand: what stands for the words of the long prompt in 'The capital of Chile is'.
            there = row.position if fact is ONE else [0, 0, 0, 0, 1, 2, 3, 4][row.position]
            modules = [lens.hooks.layers[1], lens.hooks.layers[2]]
            after = by_hooks(lens.model, changed_input, modules, ids, other, [row.position], [there])
            own, theirs = lens.prompt(fact).target_id, lens.prompt(TWO).target_id
            probability = after.softmax(-1)
            assert row.prob == pytest.approx(float(probability[own]), abs=1e-9)
            assert row.other_prob == pytest.approx(float(probability[theirs]), abs=1e-9)
            odds = float(probability[own].log() - (1 - probability[own]).log())
            assert row.log_odds == pytest.approx(odds, abs=1e-8)
            assert row.logit_difference == pytest.approx(float(after[own] - after[theirs]), abs=1e-9)
            assert row.moved == pytest.approx(moved(lens, fact, TWO, after), abs=1e-8)
            assert row.base_prob == pytest.approx(float(logits(lens, fact).softmax(-1)[own]), abs=1e-9)
    pieces = table[(table.fact_id == "peru") & (table.window_start == 0)].piece.tolist()
    assert pieces == ["context", "context", "context", "subject_last", "last"]


def test_what_is_the_same_left_of_a_position_is_left_as_it_is() -> None:
    found = lens_of("mamba1").patch(PAIRS, progress=False).table
    assert (found[found.piece == "context"].moved == 0).all() and (found[found.piece == "last"].moved != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_behind_the_last_layer_the_last_position_is_all_there_is(name: str) -> None:
    lens = lens_of(name)
    with in_double(lens.model):
        patched = lens.patch(Pairs([Pair(ONE, TWO), Pair(LONG, TWO)]), progress=False)
        traced = lens.trace(FACTS, samples=2, progress=False)
    assert patched.table.window_start.unique().tolist() == [0, 1, 2, 3, 4]
    behind = patched.table[patched.table.window_start == lens.n_layers]
    last = behind.piece == "last"
    assert behind[last].moved.to_numpy() == pytest.approx(1.0, abs=1e-9) and (behind[~last].moved == 0).all()
    behind = traced.table[traced.table.window_start == lens.n_layers]
    last = behind.piece == "last"
    assert behind[last].prob.to_numpy() == pytest.approx(behind[last].clean_prob.to_numpy(), abs=1e-9)
    assert (behind[~last].effect == 0).all()
    (axis, _) = patched.plot().axes
    assert axis.get_xlabel() == "Layer (4: behind the last)"
    assert axis.patches and "layer 4 aside" in axis.get_title().replace("\n", " ")


def test_red_is_less_of_the_own_answer_in_every_figure() -> None:
    lens = lens_of(NAMES[0])
    patched = lens.patch(Pairs([Pair(ONE, TWO)]), progress=False)
    traced = lens.trace([ONE], samples=1, progress=False)
    for figure, more in ((patched.plot(), False), (patched.plot(metric="prob"), True), (traced.plot(), True)):
        red, _, blue, _ = figure.axes[0].images[0].cmap(1.0)
        assert (blue > red) == more


@pytest.mark.parametrize("name", [*NAMES, "llama"])
def test_values_are_those_of_a_knockout_that_resamples_them(name: str) -> None:
    """A patched value is what every position from there on reads in the place of the own one."""
    lens = lens_of(name)
    pairs = Pairs([Pair(ONE, TWO), Pair(LONG, TWO)])
    with torch.no_grad(), in_double(lens.model):
        found = lens.patch(pairs, "value", 2, ("subject", "last"), progress=False).table
        for fact, other in pairs:
            for role, start in (("subject", 0), ("subject", 2), ("last", 1)):
                layers, target = [start, start + 1], lens.prompt(fact).target_id
                with lens.knockout(fact, role, "all", layers, ablation="resample", other=other):
                    knocked_out = logits(lens, fact).detach()
                row = found[(found.fact_id == fact.id) & (found.role == role) & (found.window_start == start)].iloc[0]
                assert row.prob == pytest.approx(float(knocked_out.softmax(-1)[target]), abs=1e-9)
                assert row.moved == pytest.approx(moved(lens, fact, other, knocked_out), abs=1e-8)
        traced = lens.trace(Facts([ONE, TWO]), "swap", "value", 2, progress=False).table
        swapped = lens.patch(Pairs([Pair(TWO, ONE), Pair(ONE, TWO)]), "value", 2, progress=False).table
        assert traced.prob.to_numpy() == pytest.approx(swapped.other_prob.to_numpy(), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_value_is_the_clean_run_s(name: str) -> None:
    """By hand: the noise that the lens has drawn, and the values of the clean run in the place of the corrupted ones."""
    lens = lens_of(name)
    noises: list[Tensor] = []
    scores = Patcher.scores

    def watch(self: Patcher, prompts: Any, *given: Any) -> Any:
        noises.append(prompts.noise)
        return scores(self, prompts, *given)

    prompt = lens.prompt(ONE)
    ids, time = torch.tensor([prompt.ids]), len(prompt.ids)
    with pytest.MonkeyPatch.context() as patching, torch.no_grad(), in_double(lens.model):
        patching.setattr(Patcher, "scores", watch)
        table = lens.trace(Facts([ONE]), restore="value", window=2, samples=1, progress=False).table
        clean = lens.hooks.values(ids)
        (noise,) = noises
        handle = lens.model.get_input_embeddings().register_forward_hook(lambda m, a, out: out + noise[1])
        try:
            for _, row in table.iterrows():
                layers = [row.window_start, row.window_start + 1]
                with lens.hooks.knockout([row.position], list(range(time)), layers, instead=clean):
                    restored = lens.model(ids, use_cache=False).logits[0, -1].softmax(-1)[prompt.target_id]
                assert row.prob == pytest.approx(float(restored), abs=1e-9)
        finally:
            handle.remove()
    assert table.effect.abs().max() > 1e-4


def test_a_layer_without_a_token_mixer_has_no_values() -> None:
    lens = Lens(architecture("nemotron_h"), lens_of("mamba1").tokenizer, "nemotron")
    found = lens.patch(PAIRS, "value", progress=False).table
    assert found.window_start.unique().tolist() == [0, 2, 4]
    said = "site='value': none of the layers [1] has a token mixer"
    with pytest.raises(MambalensError, match=re.escape(said)):
        lens.patch(PAIRS, "value", [[1]], progress=False)


def test_values_are_not_put_in_while_a_knockout_runs() -> None:
    lens = lens_of("mamba1")
    with (
        lens.knockout(ONE, "subject"),
        pytest.raises(MambalensError, match="leave its block, or knock out with ablation='resample'"),
    ):
        lens.patch([PAIRS[0]], "value", progress=False)


@pytest.mark.parametrize("name", NAMES)
def test_state_and_the_positions_from_there_on_are_the_other_prompt_exactly(name: str) -> None:
    """Two patches that together are everything: the subject's state in all layers, and the same words behind it."""
    lens = lens_of(name)
    layers = [list(range(lens.n_layers))]
    with in_double(lens.model):
        found = lens.patch(PAIRS, site="state", window=layers, positions="subject_last", progress=False)
        # Behind the subject both prompts have the same words, so that their embeddings are the other's too.
        assert found.table.moved.to_numpy() == pytest.approx(1.0, abs=1e-9)
        whole = lens.patch(PAIRS, window=[[0]], positions="all", progress=False)
        assert whole.table.moved.to_numpy() == pytest.approx(1.0, abs=1e-9)


def test_means_are_over_facts_and_within_a_fact_over_positions_of_a_piece() -> None:
    found = lens_of("mamba1").patch(PAIRS, progress=False)
    summary = found.summary(interval="t")
    for _, row in summary.iterrows():
        part = found.table[(found.table.piece == row.piece) & (found.table.window_start == row.window_start)]
        by_fact = part.groupby("fact_id").moved.mean()
        assert row.n == 2 and row["mean"] == pytest.approx(by_fact.mean())
        assert row.low <= row["mean"] <= row.high
    assert summary.piece.unique().tolist() == ["context", "subject_last", "last"]
    peak = found.peak()
    inside = summary[summary.window_start < 4]  # behind the last layer the last position is the answer itself
    assert len(peak) == 3 and peak["mean"].max() == inside["mean"].max()
    behind = found.where(window_start=4)
    assert behind.peak()["mean"].max() == pytest.approx(1.0, abs=1e-4) and behind.plot().axes
    assert found.plot("peru").axes and found.plot().axes and found.plot(metric="other_prob").axes


def test_several_positions_and_roles_each_on_their_own() -> None:
    lens = lens_of("mamba1")
    found = lens.patch(PAIRS, positions=["subject", "relation", -1, 3], window=4, progress=False).table
    assert found.groupby("fact_id").size().tolist() == [4, 4]
    assert found[found.fact_id == "peru"][["position", "role", "piece"]].to_numpy().tolist() == [
        [-1, "subject", "subject"], [-1, "relation", "relation"], [4, "each", "last"], [3, "each", "subject_last"],
    ]  # fmt: skip
    empty = lens.patch([Pair(Fact("Peru is", "Peru", "Lima"), Fact("Chile is", "Chile", "Santiago"))],
                       positions=["context", "last"], progress=False)  # fmt: skip
    assert len(empty.skipped) == 1 and "'context' is empty" in empty.skipped.reason[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"site": "residul"}, "'residul' is not a site"),
        ({"site": "mlp"}, "no layer of the model has an MLP"),
        ({"window": 5}, "window=5, but the model has 4 layers"),
        ({"window": [[1, 7]]}, "layers 0 to 3 (4: the residual stream behind the last)"),
        ({"window": [[1, 4]], "site": "value"}, "window has the layer 4, but the model has the layers 0 to 3."),
        ({"window": []}, "none at all"),
        ({"positions": 5}, "positions has 5, but the prompt 'The capital of Peru is' has 5 tokens"),
        ({"positions": "subjekt"}, "'subjekt' is not a role"),
        ({"positions": []}, "positions is empty"),
    ],
)
def test_refusals_are_sentences(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MambalensError, match=re.escape(said)):
        lens_of("mamba1").patch(PAIRS, progress=False, **options)


def test_a_state_is_not_put_between_prompts_of_other_lengths() -> None:
    lens = lens_of("mamba1")
    found = lens.patch([*PAIRS, Pair(LONG, TWO)], site="state", progress=False)
    assert found.table.fact_id.nunique() == 2 and "has 8 tokens" in found.skipped.reason[0]
    with pytest.raises(MambalensError, match="None of the 1 pairs can be used"):
        lens.patch([Pair(LONG, TWO)], site="state", progress=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("site", ["residual", "mixer", "value"])
def test_hooked_passes_give_the_same_as_replay(name: str, site: str) -> None:
    lens = lens_of(name)
    pairs = Pairs([Pair(ONE, TWO), Pair(TWO, LONG), Pair(LONG, ONE)])
    asked = Patching.asked(site, 2, ("each", "subject"))
    one, two = (patch(lens, pairs, asked, progress=False, replay=how) for how in (True, False))
    pd.testing.assert_frame_equal(one.table, two.table, rtol=0, atol=1e-4)


def test_a_model_that_replay_misses_is_hooked_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = Lens(tiny("mamba1"), lens_of("mamba1").tokenizer, "odd")
    expected = lens.patch(PAIRS, progress=False).table
    of = type(lens.hooks.mixers[0])
    own = of.convolved
    monkeypatch.setattr(of, "convolved", lambda *given, **named: 1.1 * own(*given, **named))
    with pytest.warns(UserWarning, match="is not reproduced by replaying it"):
        found = lens.patch(PAIRS, progress=False).table
    pd.testing.assert_frame_equal(found, expected, rtol=0, atol=1e-4)
    with (
        pytest.warns(UserWarning, match="is not reproduced"),
        pytest.raises(MambalensError, match="'state' is patched by replay alone"),
    ):
        lens.patch(PAIRS, site="state", progress=False)


FACTS = Facts([ONE, TWO, LONG])


@pytest.mark.parametrize("name", NAMES)
def test_traces_say_what_plain_hooks_do(name: str) -> None:
    """The corrupted run and every restored one by hand, with the noise that the lens has drawn."""
    lens = lens_of(name)
    model, embedding = lens.model, lens.model.get_input_embeddings()
    noises: list[Tensor] = []
    scores = Patcher.scores

    def watch(self: Patcher, prompts: Any, *given: Any) -> Any:
        noises.append(prompts.noise)
        return scores(self, prompts, *given)

    with pytest.MonkeyPatch.context() as patching, torch.no_grad(), in_double(model):
        patching.setattr(Patcher, "scores", watch)
        found = lens.trace(FACTS, samples=2, batch_size=1, progress=False)
        assert list(found.table.columns) == list(TRACES) and len(found.table) == (5 + 5 + 8) * 5 * 2
        numbers = torch.cat([embedding.weight[[lens.prompt(fact).ids[3 if fact is not LONG else 6]]] for fact in FACTS])
        assert embedding_deviation(lens, [lens.prompt(fact) for fact in FACTS]) == pytest.approx(float(numbers.std()))
        for fact, noise in zip((LONG, ONE, TWO), noises, strict=True):
            prompt = lens.prompt(fact)
            ids, subject = torch.tensor(prompt.ids), prompt.positions("subject")
            touched = noise.abs().sum((0, 2)) > 0
            assert touched.nonzero().flatten().tolist() == subject and not noise[0].any()
            for sample in (0, 1):

                def corrupt(module: Any, args: Any, output: Tensor, noise: Tensor = noise[1 + sample]) -> Tensor:
                    return output + noise

                handle = embedding.register_forward_hook(corrupt)
                broken = model(ids[None], use_cache=False).logits[0, -1].softmax(-1)[prompt.target_id]
                handle.remove()
                part = found.table[(found.table.fact_id == fact.id) & (found.table["sample"] == sample)]
                assert part.corrupted_prob.to_numpy() == pytest.approx(float(broken), abs=1e-9)
                clean = logits(lens, fact).softmax(-1)[prompt.target_id]
                assert part.clean_prob.to_numpy() == pytest.approx(float(clean), abs=1e-9)
                for _, row in part[part.window_start < lens.n_layers].iloc[::5].iterrows():
                    layer = lens.hooks.layers[row.window_start]
                    given: list[Tensor] = []

                    def keep(module: Any, args: Any, kwargs: Any, given: list[Tensor] = given) -> None:
                        given.append((args[0] if args else kwargs["hidden_states"]).clone())

                    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
                    model(ids[None], use_cache=False)
                    handle.remove()

                    def put(
                        module: Any, args: Any, kwargs: Any, at: int = row.position, given: list[Tensor] = given
                    ) -> Any:
                        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
                        hidden[:, at] = given[0][:, at]
                        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

                    handles = [
                        embedding.register_forward_hook(corrupt), layer.register_forward_pre_hook(put, with_kwargs=True),
                    ]  # fmt: skip
                    restored = model(ids[None], use_cache=False).logits[0, -1].softmax(-1)[prompt.target_id]
                    for handle in handles:
                        handle.remove()
                    assert row.prob == pytest.approx(float(restored), abs=1e-9)
                    assert row.effect == pytest.approx(float(restored - broken), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("restore", ["residual", "mixer", "value", "state"])
def test_a_fact_has_the_same_noise_whatever_else_is_asked(name: str, restore: str) -> None:
    lens = lens_of(name)
    whole = lens.trace(FACTS, restore=restore, samples=3, window=2, progress=False).table
    again = lens.trace(FACTS, restore=restore, samples=3, window=2, batch_size=2, progress=False).table
    pd.testing.assert_frame_equal(whole, again, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_everything_restored_is_the_clean_run(name: str) -> None:
    lens = lens_of(name)
    for noise in (3.0, "swap"):
        with in_double(lens.model):
            found = lens.trace(Facts([ONE, TWO]), noise, samples=2, window=[[0]], positions="all", progress=False).table
            subject = lens.trace(
                Facts([ONE, TWO]), noise, "state", [[0, 1, 2, 3]], "subject_last", samples=2, progress=False
            ).table
        for table in (found, subject):
            assert (table.prob - table.clean_prob).abs().max() < 1e-9
            assert (table.corrupted_prob - table.clean_prob).abs().min() > 1e-6


def test_traces_of_swapped_subjects_are_patches_the_other_way_round() -> None:
    lens = lens_of("mamba1")
    traced = lens.trace(Facts([ONE, TWO]), "swap", "mixer", 2, progress=False)
    patched = lens.patch(Pairs([Pair(TWO, ONE), Pair(ONE, TWO)]), "mixer", 2, progress=False).table
    assert traced.table.corruption.unique().tolist() == ["swap"] and traced.table["sample"].unique().tolist() == [0]
    assert traced.table.prob.to_numpy() == pytest.approx(patched.other_prob.to_numpy(), abs=1e-6)
    assert traced.table.corrupted_prob.to_numpy() == pytest.approx(patched.base_other_prob.to_numpy(), abs=1e-6)


def test_means_of_traces_and_how_far_samples_differ() -> None:
    found = lens_of("mamba1").trace(FACTS, samples=4, progress=False)
    spread = found.spread()
    row = spread[(spread.piece == "subject_last") & (spread.window_start == 0)].iloc[0]
    part = found.table[(found.table.piece == "subject_last") & (found.table.window_start == 0)]
    by_sample = part.groupby("sample").effect.mean()
    assert (
        row.samples == 4 and row.sd == pytest.approx(by_sample.std()) and row["mean"] == pytest.approx(by_sample.mean())
    )
    totals = found.totals()
    assert totals.samples.tolist() == [4, 4, 4]
    assert totals.total_effect.to_numpy() == pytest.approx((totals.clean_prob - totals.corrupted_prob).to_numpy())
    assert found.summary().n.max() == 3 and found.plot().axes and found.plot("peru").axes


def test_the_hooked_form_of_a_trace_is_the_replayed_one() -> None:
    lens = lens_of("mamba2")
    asked = Tracing.asked(2.0, "residual", None, "each", 2, 0)
    one, two = (trace(lens, FACTS, asked, progress=False, replay=how) for how in (True, False))
    pd.testing.assert_frame_equal(one.table, two.table, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"noise": "swop"}, "noise='swop': give a number above 0"),
        ({"noise": -1.0}, "noise=-1.0: give a number above 0"),
        ({"samples": 0}, "samples=0: give 1 or more"),
        ({"restore": "mlp"}, "no layer of the model has an MLP"),
    ],
)
def test_traces_refuse_in_sentences(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MambalensError, match=said):
        lens_of("mamba1").trace(FACTS, progress=False, **options)


def test_windows_of_traces_have_the_size_that_is_usual() -> None:
    lens = lens_of("mamba1")
    for restore, size in (("residual", 1), ("state", 1), ("mixer", 4), ("value", 4)):
        assert lens.trace(FACTS, restore=restore, samples=1, progress=False).table.window_size.unique().tolist() == [
            size
        ]
