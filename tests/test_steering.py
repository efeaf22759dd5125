"""Steering equals plain forward hooks written by hand, on every kind of mixer, in generation, beside knockouts, in replays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from models import ARCHITECTURES, VOCABULARY, architecture, in_double
from replays import Replayed, replayed
from torch import Tensor, nn

from mambalens import Fact, Lens, MambalensError, load_facts
from mambalens.cli.app import app
from mambalens.experiments.steering import BETWEEN, between
from mambalens.facts.pairs import Pair, Pairs
from mambalens.hooks import HookManager
from mambalens.measures import log_odds
from mambalens.runs.table import COLUMNS
from mambalens.steering import OTHERS, STEERED
from mambalens.sweep.plan import Plan
from mambalens.sweep.run import run

TOLERANCE = 1e-9
TIME = 7
GENERATED = ("jamba", "zamba", "zamba2", "mamba2", "bamba", "falcon_h1", "qwen3_next", "kimi_linear", "minimax",
             "recurrent_gemma", "lfm2", "gpt2", "bloom", "gptj", "mistral", "gpt_oss")  # fmt: skip
"""An architecture with each kind of mixer, and with each way of handing on hidden states and positions."""


FORGETFUL = ("minimax", "recurrent_gemma")
"""Whose own masks of generated tokens forget padding."""


@cache
def hooked(model_type: str) -> tuple[Any, HookManager]:
    """Made once for all tests, which leave the model as it is."""
    model = architecture(model_type)
    return model, HookManager(model)


@pytest.fixture(autouse=True)
def exactly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Transformers computes in float64 here, also where its code rounds to float32."""
    named = getattr(request.node, "callspec", None)
    model_type = named.params.get("model_type") if named is not None else None
    with in_double(hooked(model_type)[0]) if model_type else nullcontext():
        yield


def layers_of(model: Any) -> nn.ModuleList:
    """The first list of modules in a model is its layers."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


@contextmanager
def by_hand(model: Any, added: dict[int, Tensor], first: int = 0) -> Iterator[None]:
    """Add to what layers give: for every layer a tensor [batch, T, hidden]; `first` is the first column of the pass."""
    handles = []
    for layer, vectors in added.items():

        def hook(module: nn.Module, args: Any, output: Any, vectors: Tensor = vectors) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for row in range(hidden.shape[0]):
                for column in range(hidden.shape[1]):
                    hidden[row, column] += vectors[row, first + column]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(layers_of(model)[layer].register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at(positions: Sequence[int], vector: Tensor, batch: int = 2, time: int = TIME) -> Tensor:
    """A vector [hidden], or one for each prompt [batch, hidden], at positions [batch, T, hidden]."""
    found = torch.zeros(batch, time, vector.shape[-1], dtype=torch.float64)
    for row in range(batch):
        for position in positions:
            found[row, position] = vector if vector.ndim == 1 else vector[row]
    return found


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def token_ids(batch: int = 2, time: int = TIME) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(5))


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
@torch.no_grad()
def test_a_vector_added_equals_hooks_written_by_hand(model_type: str) -> None:
    model, hooks = hooked(model_type)
    ids, end = token_ids(), hooks.n_layers - 1
    real = torch.ones_like(ids).bool()
    real[1, 4:] = False  # padded on the right
    base = model(ids, attention_mask=real.long()).logits
    one, two, three = vectors(), vectors(2, seed=1), vectors(2, seed=2)
    mask = torch.rand(2, TIME, generator=torch.Generator().manual_seed(1)) < 0.5
    cases = [
        ({"vector": one, "layers": 0}, {0: at(range(TIME), one)}),
        ({"vector": one, "layers": [end], "positions": [1, -2], "scale": -2.5}, {end: at([1, TIME - 2], -2.5 * one)}),
        ({"vector": two, "layers": [1], "positions": 2}, {1: at([2], two)}),  # one for each prompt
        ({"vector": two[:, None], "layers": [0, end], "positions": [0, 3]}, {0: at([0, 3], two[0]), end: at([0, 3], two[1])}),
        ({"vector": torch.stack([two, three]), "layers": [end, 0], "positions": [2]}, {end: at([2], two), 0: at([2], three)}),
        ({"vector": one, "layers": 1, "positions": mask}, {1: mask[..., None] * at(range(TIME), one)}),
        ({"vector": one, "layers": 1, "positions": [[0, 1], [3]]},
         {1: torch.stack([at([0, 1], one)[0], at([3], one)[1]])}),
        ({"vector": one, "layers": None, "positions": [3]}, {layer: at([3], one) for layer in range(hooks.n_layers)}),
    ]  # fmt: skip
    for asked, added in cases:
        with hooks.add(**asked):
            fast = model(ids, attention_mask=real.long()).logits
        with by_hand(model, added):
            slow = model(ids, attention_mask=real.long()).logits
        assert largest(fast[real], slow[real]) < TOLERANCE
        assert largest(fast[real], base[real]) > 1e-3
    assert torch.equal(model(ids, attention_mask=real.long()).logits[real], base[real])


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
@torch.no_grad()
def test_blocks_nest_with_each_other_and_with_knockouts(model_type: str) -> None:
    model, hooks = hooked(model_type)
    ids, one, two, end = token_ids(), vectors(), vectors(seed=1), hooks.n_layers - 1
    added = {0: at([1, 2], one) + at(range(TIME), two), end: at([5], one)}
    with by_hand(model, added), hooks.knockout([1, 2], [4, 6], path="both"):
        expected = model(ids).logits
    outer, inner = (hooks.add(one, 0, [1, 2]), hooks.knockout([1, 2], [4, 6], path="both")), hooks.add(two, 0)
    with outer[0], outer[1], inner, hooks.add(one, end, 5):
        assert largest(model(ids).logits, expected) < TOLERANCE
    with hooks.knockout([1, 2], [4, 6], path="both"):
        cut = model(ids).logits
        with hooks.add(two, 0), hooks.add(one, 0, [1, 2]), hooks.add(one, end, -2):
            assert largest(model(ids).logits, expected) < TOLERANCE
        assert torch.equal(model(ids).logits, cut)
        with hooks.add(one, 0), hooks.add(one, 0, scale=-1.0):
            assert largest(model(ids).logits, cut) < TOLERANCE


@pytest.mark.parametrize("model_type", GENERATED)
@pytest.mark.parametrize("positions", [None, [1, -1], [5, 7, 8]], ids=str)
@pytest.mark.parametrize("cut", [False, True])
@torch.no_grad()
def test_generation_is_what_repeated_passes_on_every_prefix_give(
    model_type: str, positions: list[int] | None, cut: bool
) -> None:
    model, hooks = hooked(model_type)
    prompt, new = token_ids(2, 6), 4
    vector, knocked_out = 0.5 * vectors(2), ([1, 2], [4, 5])
    with hooks.knockout(*knocked_out, path="both") if cut else nullcontext(), hooks.add(vector, 1, positions):
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    columns = range(6 + new) if positions is None else [p % 6 if p < 0 else p for p in positions]
    ids = prompt
    for step in range(new):
        time = ids.shape[1]
        added = {1: at([column for column in columns if column < time], vector, 2, time)}
        with by_hand(model, added), hooks.knockout(*knocked_out, path="both") if cut else nullcontext():
            logits = model(ids, use_cache=False).logits[:, -1]
        assert largest(found.logits[step], logits) < 1e-5
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)


@pytest.mark.parametrize("model_type", [name for name in GENERATED if name not in FORGETFUL])
@torch.no_grad()
def test_generation_from_left_padded_prompts_equals_hooks_that_count_columns(model_type: str) -> None:
    model, hooks = hooked(model_type)
    prompt, vector = token_ids(2, 6), 0.5 * vectors()
    padding = torch.ones_like(prompt)
    padding[1, :2] = 0
    options = {"attention_mask": padding, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
               "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    with hooks.add(vector, 1, [3, 5, 8]):
        found = model.generate(prompt, **options)
    column = 0

    def count(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal column
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for place in range(hidden.shape[1]):
            if column in (3, 5, 8):
                hidden[:, place] += vector
            column += 1
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layers_of(model)[1].register_forward_hook(count)
    try:
        expected = model.generate(prompt, **options)
    finally:
        handle.remove()
    assert column == 9
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert largest(one, other) < TOLERANCE


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
@torch.no_grad()
def test_replay_of_a_steered_model_equals_hooked_passes(model_type: str) -> None:
    model, hooks = hooked(model_type)
    ids, last = token_ids(3), torch.tensor([6, 4, 6])
    real = torch.arange(TIME) <= last[:, None]
    ids[~real] = 0
    generator = torch.Generator().manual_seed(0)
    sources, targets = torch.rand(2, 3, TIME, generator=generator) < 0.5
    asked = [Replayed(0, [layer], path="both") for layer in range(hooks.n_layers) if hooks.mixers_of(layer)]
    one, two = vectors(), vectors(3, seed=1)
    mask = torch.rand(3, TIME, generator=generator) < 0.5
    for added in ((one, 0, None), (one, [0, hooks.n_layers - 1], [2, 6]), (two, 1, mask)):
        with hooks.add(*added), hooks.add(one, 1, [3], 0.5):
            found = replayed(hooks, ids, last, sources[None], targets & real, asked)
            expected = {0: model(ids).logits}
            for number, one_cut in enumerate(asked, 1):
                with hooks.knockout(sources, targets & real, one_cut.layers, path=one_cut.path):
                    expected[number] = model(ids).logits
        assert set(found) == set(expected)
        for number, logits in found.items():
            assert largest(logits, expected[number][torch.arange(3), last]) < TOLERANCE


@pytest.mark.parametrize("model_type", ["jamba", "gpt2", "bamba"])
@torch.no_grad()
def test_the_model_is_restored_bit_for_bit(model_type: str) -> None:
    model, hooks = hooked(model_type)
    ids, one = token_ids(), vectors()

    def fingerprint() -> list[Any]:
        return [
            (path, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
            for path, m in model.named_modules()
        ]

    base, before = model(ids).logits, fingerprint()
    with hooks.add(one, 1), hooks.knockout([0], [-1]), hooks.add(one, None, [2]):
        model(ids)
    with (
        pytest.raises(RuntimeError, match="inside"),
        hooks.add(one, 1),
        hooks.knockout([0], [-1]),
        hooks.add(one, 0, 1),
    ):
        model(ids)
        raise RuntimeError("inside")
    with pytest.raises(MambalensError), hooks.add(one, 1), hooks.add(one, 0, [99]):
        model(ids)
    assert fingerprint() == before and not hooks.inside
    assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"vector": torch.zeros(23), "layers": 0}, r"vector has 23 numbers \(shape \[23\]\).*residual stream has 24"),
        ({"vector": [0.0] * 24, "layers": 0}, "vector is list: give a tensor"),
        ({"vector": torch.zeros(24, dtype=torch.long), "layers": 0}, r"vector is torch.int64 \[24\]"),
        ({"vector": torch.full((24,), torch.inf), "layers": 0}, "not finite"),
        ({"vector": torch.zeros(24), "layers": 3}, r"layers has \[3\], but the model has 3 layers"),
        ({"vector": torch.zeros(24), "layers": [1, 1]}, r"layers=\[1, 1\] names a layer twice"),
        ({"vector": torch.zeros(24), "layers": "mamba3"}, "layers='mamba3' is not a kind"),
        ({"vector": torch.zeros(3, 2, 24), "layers": [0, 1]}, r"\[layers, batch, hidden\], but there are 2 layers"),
        ({"vector": torch.zeros(24), "layers": 0, "positions": 7}, "Position 7 is out of range: .* 7 tokens"),
        ({"vector": torch.zeros(24), "layers": 0, "positions": [-8]}, "positions has position -8, but the input has 7"),
        ({"vector": torch.zeros(24), "layers": 0, "positions": [[1], [2], [3]]}, "positions for 3 rows, but the input has 2"),
        ({"vector": torch.zeros(24), "layers": 0, "positions": torch.ones(3).bool()}, r"boolean mask of shape \[3\]"),
        ({"vector": torch.zeros(24), "layers": 0, "positions": "last"}, "are not positions"),
        ({"vector": torch.zeros(5, 24), "layers": [0, 1]}, r"shape \[5, 24\], but the input has 2 prompts.* 2 layers"),
        ({"vector": torch.zeros(2, 24), "layers": [0, 1]}, r"as many layers as prompts: give \[layers, 1, hidden\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_refused_in_a_sentence(asked: dict, message: str) -> None:
    model, hooks = hooked("jamba")
    base = model(token_ids()).logits
    with pytest.raises(MambalensError, match=message) as error, hooks.add(**asked):
        model(token_ids())
    assert str(error.value).endswith(".")
    assert torch.equal(model(token_ids()).logits, base)


@torch.no_grad()
def test_a_cache_from_outside_and_a_layer_alone_are_refused() -> None:
    model, hooks = hooked("gpt2")
    cache = model(token_ids(), use_cache=True).past_key_values
    with pytest.raises(MambalensError, match="filled before the block began"), hooks.add(vectors(), 0):
        model(token_ids()[:, :1], past_key_values=cache)
    with pytest.raises(MambalensError, match="called on its own"), hooks.add(vectors(), 0):
        hooks.layers[0](torch.zeros(1, 2, 24, dtype=torch.float64))


def test_gradients_reach_the_vector() -> None:
    model, hooks = hooked("jamba")
    vector = vectors().requires_grad_()
    with hooks.add(vector, 0, [3]):
        model(token_ids()).logits[0, 2].sum().backward()
        assert vector.grad is not None and not vector.grad.any()  # no earlier position reads it
        model(token_ids()).logits[0, 3].sum().backward()
    assert bool(vector.grad.any())


FACTS = load_facts("atlas").where(wording="near")
OPTIONS = {"sources": ("subject", "context"), "window": 6, "progress": False}


@pytest.fixture(scope="module", params=["atlas-mamba1", "atlas-gpt-neox"])
def lens(request: pytest.FixtureRequest) -> Lens:
    return Lens.load(request.param, dtype="float64")


@pytest.fixture(scope="module")
def facts() -> Any:
    few = FACTS.sample(5)
    assert len({len(fact.prompt) for fact in few}) > 1
    return few


def probability(lens: Lens, fact: Fact, added: dict[int, Tensor], row: Any) -> tuple[float, float]:
    """Of the target, before and under a row's knockout, in a model that is steered by hand."""
    prompt = lens.prompt(fact)
    ids = torch.tensor([prompt.ids])
    layers = range(row.window_start, row.window_start + row.window_size)
    with torch.no_grad(), by_hand(lens.model, added):
        base = lens.model(ids).logits[0, -1].softmax(-1)[prompt.target_id]
        with lens.knockout(fact, row.source, row.target, layers):
            return float(base), float(lens.model(ids).logits[0, -1].softmax(-1)[prompt.target_id])


@pytest.mark.parametrize("positions", [None, [1, 2], -2], ids=str)
def test_a_sweep_of_a_steered_model_is_what_hooked_passes_give(lens: Lens, facts: Any, positions: Any) -> None:
    width = lens.model.config.hidden_size
    vector = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = Plan(**{key: value for key, value in OPTIONS.items() if key != "progress"})
    with in_double(lens.model), lens.hooks.add(vector, [2, 5], positions):
        tables = [run(lens, facts, plan, progress=False, replay=replay).table for replay in (True, False)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-7, atol=1e-8)
    given = [positions] if isinstance(positions, int) else positions
    for row in random.Random(0).sample(list(tables[0].itertuples()), 12):
        fact = next(fact for fact in facts if fact.id == row.fact_id)
        time = len(lens.prompt(fact).ids)
        where = range(time) if given is None else [p % time for p in given]
        base, prob = probability(lens, fact, dict.fromkeys([2, 5], at(where, vector, 1, time)), row)
        assert row.base_prob == pytest.approx(base, rel=1e-4, abs=1e-7)
        assert row.prob == pytest.approx(prob, rel=1e-4, abs=1e-7)
    plain = run(lens, facts, plan, progress=False).table
    assert not plain.prob.equals(tables[0].prob)


def test_a_sweep_inside_a_knockout_is_what_hooked_passes_give(lens: Lens, facts: Any) -> None:
    """By replay; positions from the end are every prompt's own."""
    with lens.hooks.knockout([0, 1], [-1], layers=[0, 1, 2], path="main"):
        swept = lens.sweep(facts, **OPTIONS)
    table = swept.table
    assert len(swept.checks) and bool(swept.checks.passed.all())
    assert tuple(table.columns) == COLUMNS
    for row in random.Random(0).sample(list(table.itertuples()), 12):
        fact = next(fact for fact in facts if fact.id == row.fact_id)
        with lens.hooks.knockout([0, 1], [len(lens.prompt(fact).ids) - 1], layers=[0, 1, 2]):
            base, prob = probability(lens, fact, {}, row)
        assert row.base_prob == pytest.approx(base, rel=1e-4, abs=1e-7)
        assert row.prob == pytest.approx(prob, rel=1e-4, abs=1e-7)


def test_a_folder_tells_sweeps_inside_blocks_apart(facts: Any, tmp_path: Path) -> None:
    lens = Lens.load("atlas-gpt-neox")
    vector = torch.ones(lens.model.config.hidden_size)
    with lens.hooks.add(vector, 3):
        first = lens.sweep(facts, out=tmp_path, **OPTIONS).table
        assert lens.sweep(facts, out=tmp_path, **OPTIONS).table.equals(first)
    others = (
        lens.hooks.add(vector, 3, scale=2.0),
        lens.hooks.add(vector, 4),
        lens.hooks.knockout([0], [1]),
        nullcontext(),
    )
    for other in others:
        with other, pytest.raises(MambalensError, match="running blocks"):
            lens.sweep(facts, out=tmp_path, **OPTIONS)


@torch.no_grad()
def test_a_direction_is_the_difference_of_means_taken_prompt_by_prompt(lens: Lens) -> None:
    positive, negative = (
        list(FACTS.where(relation="capital").sample(6)),
        list(FACTS.where(relation="language").sample(4)),
    )

    def mean(facts: Sequence[Fact], layer: int, role: str) -> Tensor:
        found = []
        for fact in facts:
            prompt, seen = lens.prompt(fact), []
            handle = layers_of(lens.model)[layer].register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            lens.model(torch.tensor([prompt.ids]))
            handle.remove()
            hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            found.append(hidden[0, prompt.positions(role)].mean(0))
        return torch.stack(found).mean(0)

    for role in ("last", "subject", "all"):
        both = lens.direction(positive, negative, [7, 2], role, batch_size=3)
        for layer, found in zip((7, 2), both, strict=True):
            expected = mean(positive, layer, role) - mean(negative, layer, role)
            assert largest(found, expected) < 1e-5
            assert largest(lens.direction(positive, negative, layer, role), expected) < 1e-5
    texts = [[fact.prompt for fact in side] for side in (positive, negative)]
    assert torch.equal(lens.direction(*texts, 4), lens.direction(positive, negative, 4))
    with pytest.raises(MambalensError, match="role 'subject_last' is empty in the prompt"):
        lens.direction(*texts, 4, "subject_last")
    with pytest.raises(MambalensError, match="There is no prompt"):
        lens.direction([], negative, 4)
    with pytest.raises(MambalensError, match=r"layers has \[99\]"):
        lens.direction(positive, negative, 99)


@torch.no_grad()
def test_steered_facts_are_what_single_hooked_passes_answer(lens: Lens, facts: Any) -> None:
    vector = torch.randn(lens.model.config.hidden_size, generator=torch.Generator().manual_seed(3)).double()
    pairs = Pairs([Pair(fact, other) for fact, other in itertools.pairwise(facts)])
    table = lens.steered(pairs, vector, 4, "subject_last", 2.0, batch_size=3, progress=False)
    assert tuple(table.columns) == (*STEERED, *OTHERS, "skipped") and (table.skipped == "").all()
    for row, (fact, other) in zip(table.itertuples(), pairs, strict=True):
        prompt = lens.prompt(fact)
        ids, time = torch.tensor([prompt.ids]), len(prompt.ids)
        token = lens.prompt(Fact(fact.prompt, fact.subject, other.continuation)).target_id
        base = lens.model(ids).logits[0, -1].softmax(-1)
        with by_hand(lens.model, {4: at(prompt.positions("subject_last"), 2 * vector, 1, time)}):
            now = lens.model(ids).logits[0, -1].softmax(-1)
        with lens.steer(fact, vector, 4, "subject_last", 2.0):
            assert lens.predict(fact).token_id[0] == int(now.argmax())
        assert (row.fact_id, row.target, row.other_target) == (fact.id, fact.target, other.target)
        numbers = (row.base_prob, row.prob, row.base_other_prob, row.other_prob, row.kl)
        expected = (
            base[prompt.target_id],
            now[prompt.target_id],
            base[token],
            now[token],
            (base * (base / now).log()).sum(),
        )
        assert numbers == pytest.approx([float(value) for value in expected], rel=1e-4, abs=1e-6)
        tops = int(base.argmax()), int(now.argmax())
        assert (row.base_top_token, row.top_token) == tuple(lens.tokenizer.decode([top]) for top in tops)
        assert row.changed == (tops[0] != tops[1]) and row.base_hit == (tops[0] == prompt.target_id)
        assert (row.hit, row.base_other_hit, row.other_hit) == (
            tops[1] == prompt.target_id,
            tops[0] == token,
            tops[1] == token,
        )
    everywhere = lens.steered(facts, vector, 4, None, progress=False)
    assert tuple(everywhere.columns) == (*STEERED, "skipped")


def test_facts_that_cannot_be_steered_are_listed_with_the_reason(lens: Lens, facts: Any) -> None:
    vector = torch.zeros(lens.model.config.hidden_size)
    odd = Fact("The capital of Peru is", "Chile", "Lima", id="odd")
    first = Fact("Peru has as its capital", "Peru", "Lima", id="first")
    table = lens.steered([*facts, odd, first], vector, 4, "context", progress=False).set_index("fact_id")
    assert "'Chile' is not in the prompt" in table.skipped["odd"]
    assert "The role 'context' is empty" in table.skipped["first"]
    with pytest.raises(MambalensError, match="None of the 1 facts can be used"):
        lens.steered([odd], vector, 4, "subject", progress=False)
    for role, message in (("subjects", "'subjects' is not a role"), ("each", "positions='each'")):
        with pytest.raises(MambalensError, match=message), lens.steer(first, vector, 4, role):
            pass


def test_the_experiment_steers_only_subjects_that_gave_nothing_to_the_direction(lens: Lens) -> None:
    positive, negative = (FACTS.where(relation=name)[:14] for name in ("capital", "language"))
    both = {fact.subject for fact in positive} & {fact.subject for fact in negative}
    table = between(lens, positive, negative, [3, 6], "last", 1.5, seed=1)
    assert tuple(table.columns) == BETWEEN and table.layer.to_list() == [3, 6]
    capital = {fact.subject: fact for fact in positive}
    subjects = [fact.subject for fact in negative if fact.subject in both]
    random.Random(1).shuffle(subjects)
    half = len(subjects) // 2
    assert table.facts.to_list() == [len(subjects) - half] * 2
    for row in table.itertuples():
        sides = ([fact for fact in side if fact.subject in subjects[:half]] for side in (positive, negative))
        direction, answered = 1.5 * lens.direction(*sides, row.layer), []
        for fact in negative:
            if fact.subject in subjects[half:]:
                prompt = lens.prompt(fact)
                other = lens.prompt(Fact(fact.prompt, fact.subject, capital[fact.subject].continuation)).target_id
                added = {row.layer: at([len(prompt.ids) - 1], direction, 1, len(prompt.ids))}
                with torch.no_grad(), by_hand(lens.model, added):
                    top = int(lens.model(torch.tensor([prompt.ids])).logits[0, -1].argmax())
                answered.append((top == prompt.target_id, top == other))
        hit, other_hit = (sum(values) / len(answered) for values in zip(*answered, strict=True))
        assert (row.hit, row.other_hit) == pytest.approx((hit, other_hit))
        assert row.low <= row.other_hit <= row.high and row.base_other_hit == 0
    with pytest.raises(MambalensError, match="Subjects with facts on both sides: 1. It takes 4"):
        between(lens, positive, FACTS.where(relation="language", subject=subjects[0]))


def test_the_command_line_steers(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [
        "steer", "atlas-gpt-neox", "--where", "wording=near", "--from", "relation=language", "--to", "relation=capital",
        "--layer", "3", "--out", str(tmp_path / "found.csv"),
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "found.csv")
    assert tuple(table.columns) == BETWEEN and len(table) == 1
    assert f"{100 * table.other_hit[0]:.1f}" in result.output
    wrong = CliRunner().invoke(
        app, ["steer", "atlas-gpt-neox", "--from", "relation=language", "--to", "relation=capitals"]
    )
    assert isinstance(wrong.exception, MambalensError) and "capitals" in str(wrong.exception)


def test_a_flow_of_a_steered_model_is_cut_in_the_steered_model_alone(lens: Lens, facts: Any) -> None:
    vector = torch.randn(lens.model.config.hidden_size, generator=torch.Generator().manual_seed(3)).double()
    few, hooks = facts[:2], lens.hooks
    with in_double(lens.model):
        with hooks.add(vector, 4, [1, 2]):
            flow = lens.flow(few, certify=6, progress=False)
            more = flow.certify(top=9, sample=0, progress=False)
        with pytest.raises(MambalensError, match="inside other blocks"):
            flow.certify(top=9, sample=0, progress=False)
        with hooks.add(vector, 4, [1, 2], 2.0), pytest.raises(MambalensError, match="inside other blocks"):
            flow.certify(top=9, sample=0, progress=False)
        cut = more.table[more.table.exact.notna()]
        assert len(cut) == 18 and flow.table.exact.notna().sum() == 12
        for row in cut.itertuples():
            fact = next(fact for fact in few if fact.id == row.fact_id)
            prompt = lens.prompt(fact)
            ids, target, time = torch.tensor([prompt.ids]), torch.tensor([prompt.target_id]), len(prompt.ids)
            with torch.no_grad(), by_hand(lens.model, {4: at([1, 2], vector, 1, time)}):
                base = log_odds(lens.model(ids).logits[:, -1], target)
                with hooks.knockout([row.source], [row.target], row.layer, path=row.path):
                    now = log_odds(lens.model(ids).logits[:, -1], target)
            assert row.base_measure == pytest.approx(float(base), abs=1e-6)
            assert row.exact == pytest.approx(float(now - base), abs=1e-6)
