"""Values in the place of others: every mixer equals its explicit form with these entries reading the other values."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import explicit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, CONFIGS, SSM, TRANSFORMERS, architecture, has_keys, in_double, tiny, token_ids
from replays import Replayed, replayed
from torch import Tensor

from mambalens.hooks import HookManager, Knockout, MambalensError
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut
from mambalens.hooks.values import Written

PATHS = (Paths.MAIN, Paths.CONV, Paths.ERASE)
MIXER_TOLERANCE = 1e-9
MODEL_TOLERANCE = 1e-5
RECURRENCES = (*SSM, *(name for name in ("qwen3_next", "kimi_linear", "olmo_hybrid", "lfm2", "minimax",
               "recurrent_gemma", "zamba") if name in ARCHITECTURES))  # fmt: skip


@cache
def hooked(name: str, attention: str = "eager") -> HookManager:
    return HookManager(tiny(name, attention=attention) if name in CONFIGS else architecture(name, attention=attention))


@pytest.fixture(autouse=True, scope="module")
def exactly() -> Iterator[None]:
    """Transformers computes in float64 here, also where its code rounds to float32."""
    with in_double(*(hooked(name).model for name in (*CONFIGS, *ARCHITECTURES))):
        yield


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max()) if a.numel() else 0.0


class Case(NamedTuple):
    """One mixer under random cuts, of which some put other values in."""

    hidden: Tensor
    padding: Tensor | None
    cuts: list[Cut]
    blocked: list[Tensor]
    """Entries that are cut on the paths 'main', 'conv', 'erase' [batch, target, source, feature]."""
    instead: explicit.Instead
    """Which of them read other values."""


def told(mixer: Any, hidden: Tensor) -> Tensor:
    """A mixer's input, and what else it hears of every position."""
    if mixer.kind != "rglru":
        return hidden
    begins = (torch.arange(hidden.shape[1]) == 0).expand(hidden.shape[:2])  # a document
    return torch.cat([hidden, begins[..., None].double()], -1)


@torch.no_grad()
def random_written(mixer: Any, hidden: Tensor, generator: torch.Generator) -> Written:
    """Values of nobody's, in the shapes of the mixer's own."""
    inputs, projected = mixer.inputs(told(mixer, hidden), None, ())
    return Written(
        torch.randn(inputs.x.shape, generator=generator, dtype=torch.float64) if Paths.MAIN in mixer.paths else None,
        torch.randn(projected.inner.shape, generator=generator, dtype=torch.float64)
        if Paths.CONV in mixer.paths
        else None,
    )


@st.composite
def cases(draw: st.DrawFn, mixer: Any) -> Case:
    batch, time = draw(st.integers(1, 2)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    hidden = torch.randn(batch, time, 24, dtype=torch.float64, generator=generator)
    padding = None
    if draw(st.booleans()):
        lengths = torch.randint(1, time + 1, (batch, 1), generator=generator)
        padding = (torch.arange(time) < lengths).long()
    cuts, entries = [], []
    for kind in draw(st.lists(st.sampled_from(["zero", "other"]), min_size=1, max_size=3)):
        features = torch.rand(mixer.n_features, generator=generator) < draw(st.sampled_from([0.5, 1.0]))
        features = draw(st.sampled_from([features, None]))
        named = draw(st.sampled_from([path for path in mixer.paths.choices if path != "erase"]))
        paths, instead = Paths.named(named) & mixer.paths, None
        if kind == "other":
            paths, instead = paths.replaceable(named), random_written(mixer, hidden, generator)
        edges = (torch.rand(batch, time, time, generator=generator) < draw(st.sampled_from([0.2, 0.6, 1.0]))).tril()
        cuts.append(replace(Cut.of_edges(edges, features, paths), instead=instead))
        everything = torch.ones(mixer.n_features, dtype=torch.bool) if features is None else features
        entries.append([(edges[..., None] & everything) & (path in paths) for path in PATHS])
    return Case(hidden, padding, cuts, *resolved(cuts, entries))


def resolved(cuts: list[Cut], entries: list[list[Tensor]]) -> tuple[list[Tensor], explicit.Instead]:
    """All that is blocked, and who puts what in its place: nobody where it is zeroed, else the last."""
    blocked = [torch.stack([of[path] for of in entries]).any(0) for path in range(3)]
    instead = []
    for number, cut in enumerate(cuts):
        if cut.instead is None:
            continue
        own = list(entries[number][:2])
        for other, of_other in enumerate(entries):
            if other > number or cuts[other].instead is None:
                own = [left & ~taken for left, taken in zip(own, of_other, strict=False)]
        instead.append((*own, *cut.instead[:2]))
    # A path that the mixer lacks has nothing to read.
    return blocked, [
        one if one[2] is not None else (one[0] & False, one[1], torch.zeros(()), one[3]) for one in instead
    ]


@pytest.mark.parametrize("name", RECURRENCES)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_recurrence_alone_equals_its_explicit_form_with_values_replaced(name: str, data: st.DataObject) -> None:
    mixer: Any = next(mixer for mixer in hooked(name).mixers if mixer.kind != "attention")
    case = data.draw(cases(mixer))
    if name in SSM:
        slow = explicit.MIXERS[name](mixer.module, case.hidden, case.padding, *case.blocked[:2], case.instead)
    else:
        twin = explicit.TWINS[type(mixer.module).__name__]
        slow = twin(mixer.module, case.hidden, case.padding, *case.blocked, instead=case.instead)[1]
    hidden = told(mixer, case.hidden)
    with torch.no_grad():
        inputs, projected = mixer.inputs(hidden, case.padding, case.cuts)
        y, _ = mixer.mix(inputs, case.cuts, base=True)
        fast = mixer.finish(mixer.with_skip(y, inputs), projected.gate, hidden.dtype)
    assert largest(fast, slow) < MIXER_TOLERANCE


@st.composite
def knockouts(draw: st.DrawFn, hooks: HookManager) -> dict[str, Any]:
    """Random tokens, source and target positions, layers, features and path, and values of another prompt."""
    batch, time, seed = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, time + 1, (batch, 1), generator=generator)
    lengths[0] = time
    sources, targets = torch.rand(2, batch, time, generator=generator) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    count = hooks.mixers[0].n_features
    features: Any = "all"
    if draw(st.booleans()) and len({mixer.n_features for mixer in hooks.mixers}) == 1:
        features = torch.rand(count, generator=generator) < 0.5
    other = token_ids(2, time + 2, seed + 1)
    prompts = torch.randint(0, 2, (batch, time), generator=generator)
    columns = torch.randint(0, time + 2, (batch, time), generator=generator)
    layers = draw(st.lists(st.integers(0, hooks.n_layers - 1), min_size=1, unique=True))
    return {"ids": token_ids(batch, time, seed), "padding": (torch.arange(time) < lengths).long(), "sources": sources,
            "targets": targets, "features": features, "layers": layers, "last": lengths[:, 0] - 1,
            "path": draw(st.sampled_from(["main", "both"])), "generator": generator,
            "values": hooks.values(other, keys=draw(st.booleans()) and has_keys(hooks)).at(prompts, columns)}  # fmt: skip


@pytest.mark.parametrize("name", list(CONFIGS))
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_model_equals_its_explicit_form_with_values_replaced(name: str, data: st.DataObject) -> None:
    hooks = hooked(name, "sdpa")
    case = data.draw(knockouts(hooks))
    count = hooks.mixers[0].n_features
    features = torch.ones(count, dtype=torch.bool) if isinstance(case["features"], str) else case["features"]
    entries = (case["targets"][:, :, None] & case["sources"][:, None]).tril()[..., None] & features
    none, other = torch.zeros_like(entries), case["values"].of
    main: dict[int, Any] = {}
    conv: dict[int, Any] = {}
    instead: dict[int, Any] = {}
    for layer in case["layers"]:
        mixer = hooks.mixer_of(layer)
        written = other[mixer]
        if name in SSM:
            main[layer], conv[layer] = entries, entries if case["path"] == "both" else none
            instead[layer] = [(entries, conv[layer], written.main, written.conv)]
        else:
            instead[layer] = [(entries, written.main, written.keys)]
    model, ids = hooks.model, case["ids"]
    with torch.no_grad():
        base = model(ids).logits
        chosen = (case["sources"], case["targets"], case["layers"], case["features"], case["path"])
        with hooks.knockout(*chosen, instead=case["values"]):
            fast = model(ids).logits
        with explicit.explicit_model(model, name, main, conv, instead):
            slow = model(ids).logits
        assert torch.equal(model(ids).logits, base)
    assert largest(fast, slow) < MODEL_TOLERANCE


@pytest.mark.parametrize("name", list(dict.fromkeys([*CONFIGS, *ARCHITECTURES])))
@settings(deadline=None, max_examples=4)
@given(data=st.data())
def test_replay_equals_the_hooks_with_values_replaced(name: str, data: st.DataObject) -> None:
    attention = data.draw(st.sampled_from(["eager", "sdpa"])) if name in TRANSFORMERS else "eager"
    hooks = hooked(name, attention)
    case = data.draw(knockouts(hooks))
    ids, last, padding = case["ids"], case["last"], case["padding"]
    sources = case["sources"] & padding.bool()
    targets = case["targets"] & padding.bool()
    if data.draw(st.booleans()):
        targets = torch.nn.functional.one_hot(last, ids.shape[1]).bool()
    several = torch.stack([sources, sources & (torch.arange(ids.shape[1]) % 2 == 0)])
    asked = [
        Replayed(number, case["layers"][: 1 + number], case["features"], path)
        for number in (0, 1)
        for path in ("main", "both")
        if any(Paths.named(path) & mixer.paths for mixer in hooks.mixers_of(case["layers"][: 1 + number]))
    ]
    memory = data.draw(st.sampled_from([2**30, 2**14, 1]))
    at = torch.arange(len(ids)), last
    with torch.no_grad():
        found = replayed(hooks, ids, last, several, targets, asked, memory, case["values"])
        assert largest(found[0], hooks.model(ids, attention_mask=padding).logits[at]) < MODEL_TOLERANCE
        for number, (source, layers, features, path, _) in enumerate(asked, 1):
            with hooks.knockout(several[source], targets, layers, features, path, instead=case["values"]):
                assert largest(found[number], hooks.model(ids, attention_mask=padding).logits[at]) < MODEL_TOLERANCE


@contextmanager
def read_by_weights(mixer: Any, entries: Tensor, values: Tensor) -> Iterator[None]:
    """While the block runs, the function of the module's file reads other values at some entries, by its weights."""
    home = vars(sys.modules[type(mixer.module).__module__])
    reads = home["eager_attention_forward"]

    def ours(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        read, weights = reads(module, q, k, v, *args, **kwargs)
        if module is mixer.module:
            change = (values.transpose(1, 2) - v).repeat_interleave(weights.shape[1] // v.shape[1], 1)
            read = read + ((weights * entries.permute(0, 3, 1, 2)) @ change).transpose(1, 2)
        return read, weights

    home["eager_attention_forward"] = ours
    try:
        yield
    finally:
        home["eager_attention_forward"] = reads


ATTENTIVE = [name for name in ARCHITECTURES if name not in ("mamba", "mamba2", "falcon_mamba")]


@pytest.mark.parametrize("name", ATTENTIVE)
def test_attention_of_every_architecture_keeps_its_weights_and_reads_other_values(name: str) -> None:
    hooks = hooked(name)
    mixer: Any = next(mixer for mixer in hooks.mixers if mixer.kind == "attention")
    ids, time = token_ids(2, 8), 8
    padding = (torch.arange(time) < torch.tensor([[8], [5]])).long()
    generator = torch.Generator().manual_seed(3)
    edges = (torch.rand(2, time, time, generator=generator) < 0.4).tril()
    features = torch.arange(mixer.n_features) % 2 == 0
    entries = edges[..., None] & features
    seen: list[Tensor] = []

    def see(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0])

    with torch.no_grad():
        values = hooks.values(token_ids(2, 8, seed=9))
        other = values.of[mixer].main
        handle = mixer.module.register_forward_hook(see)
        try:
            with hooks.knockout(edges=edges, layers=mixer.layer, features=features, mixers="attention", instead=values):
                hooks.model(ids, attention_mask=padding)
            if name.partition("-")[0] in ("gptj", "bloom", "falcon"):  # no function reads; there is no gate either
                projection = getattr(mixer.module, "out_proj", None) or mixer.module.dense
                mixing = hooks.token_mixing(ids, mixer.layer, padding, "attention")
                change = other.repeat_interleave(mixer.n_features // other.shape[2], 2) - mixing.values  # [B, T, H, P]
                alpha = mixing.attention(torch.arange(mixer.n_features)) * entries.permute(0, 3, 1, 2)
                more = torch.einsum("bhts,bshp->bthp", alpha, change).flatten(2) @ projection.weight.T
                seen.append(seen[-1] + more)
            else:
                with read_by_weights(mixer, entries, other):
                    hooks.model(ids, attention_mask=padding)
            hooks.model(ids, attention_mask=padding)
        finally:
            handle.remove()
    fast, slow, base = seen[0], seen[-2], seen[-1]
    inside = padding.bool()
    assert largest(fast[inside], slow[inside]) < MIXER_TOLERANCE
    assert largest(fast[inside], base[inside]) > 1e-3


@pytest.mark.parametrize("name", [*CONFIGS, *ATTENTIVE])
def test_own_values_change_nothing_and_zero_wins(name: str) -> None:
    hooks = hooked(name, "eager")
    ids = token_ids(2, 8)
    padding = (torch.arange(8) < torch.tensor([[8], [6]])).long()

    def logits() -> Tensor:
        return hooks.model(ids, attention_mask=padding).logits[padding.bool()]

    cut = ([1, 2], [3, 5], None, "all", "both")
    with torch.no_grad():
        own, other = hooks.values(ids, padding, keys=has_keys(hooks)), hooks.values(token_ids(2, 8, seed=4))
        base = logits()
        with hooks.knockout(*cut, instead=own):
            assert largest(logits(), base) < 2 * MODEL_TOLERANCE
        with hooks.knockout([1, 2], [3, 5], path="main"):
            zeroed = logits()
            with hooks.knockout([1, 2], [3, 5], path="main", instead=other):
                assert largest(logits(), zeroed) < 2 * MODEL_TOLERANCE
            assert torch.equal(logits(), zeroed)
        with hooks.knockout(*cut, instead=other):
            replaced = logits()
            with hooks.knockout(*cut, instead=own):  # the innermost says what stands there
                assert largest(logits(), base) < 2 * MODEL_TOLERANCE
        assert largest(replaced, base) > 1e-3
        assert torch.equal(logits(), base)


def test_values_are_what_the_modules_say_they_are() -> None:
    ids = token_ids(2, 6)
    mamba, llama = hooked("mamba1"), hooked("llama")
    seen: dict[str, Tensor] = {}
    block = mamba.model.backbone.layers[1].mixer
    handles = [
        block.in_proj.register_forward_hook(lambda m, a, out: seen.update(inner=out.chunk(2, -1)[0])),
        block.x_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0])),
        llama.model.model.layers[2].self_attn.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out)),
    ]
    try:
        of_mamba, of_llama = mamba.values(ids), llama.values(ids, layers=[2])
    finally:
        for handle in handles:
            handle.remove()
    written = of_mamba.of[mamba.mixers[1]]
    assert written.main is not None and written.conv is not None and written.keys is None
    assert largest(written.conv, seen["inner"]) == 0
    assert largest(written.main[..., 0], seen["x"]) < MODEL_TOLERANCE
    (attention,) = of_llama.of.values()
    assert attention.main is not None and largest(attention.main.flatten(2), seen["v"]) == 0
    assert of_mamba.shape == (2, 6)


def test_sums_of_values_leave_out_what_belongs_to_no_group() -> None:
    hooks = hooked("mamba1")
    values = hooks.values(token_ids(2, 4))
    group = torch.tensor([[0, 1, 1, -1], [1, 0, -1, -1]])
    sums = values.sums(group, 3).of[hooks.mixers[0]].main
    x = values.of[hooks.mixers[0]].main
    assert sums is not None and x is not None
    assert largest(sums[0, 0], x[0, 0] + x[1, 1]) < 1e-12
    assert largest(sums[0, 1], x[0, 1] + x[0, 2] + x[1, 0]) < 1e-12
    assert not sums[0, 2].any()


@pytest.mark.parametrize("name", ["mamba1", "llama", "gpt2"])
def test_generation_reads_other_values_in_the_prompt_alone(name: str) -> None:
    hooks = hooked(name)
    ids = token_ids(2, 6)
    values = hooks.values(token_ids(2, 6, seed=2))
    with torch.no_grad(), hooks.knockout([1, 2], [4, 5], path="both", instead=values):
        found = hooks.model.generate(ids, max_new_tokens=3, do_sample=False)
        first = hooks.model(ids).logits[:, -1].argmax(-1)
    assert torch.equal(found[:, 6], first)
    with (
        pytest.raises(MambalensError, match="a target is a generated token"),
        hooks.knockout([1], [7], instead=values),
    ):
        hooks.model.generate(ids, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("name", SSM)
@pytest.mark.parametrize("replaced", [False, True])
def test_cut_taps_of_the_prompt_hold_for_generated_targets_of_another_knockout(name: str, replaced: bool) -> None:
    hooks = hooked(name)
    ids, more, other = token_ids(2, 6), token_ids(2, 1, seed=8), token_ids(2, 7, seed=2)

    def found(columns: int, run: Any) -> Tensor:
        instead = hooks.values(other[:, :columns]) if replaced else None
        with (
            torch.no_grad(),
            hooks.knockout([1, 2], [3], path="both", instead=instead),
            hooks.knockout([1], [6]),
        ):
            return run()

    def step_by_step() -> Tensor:
        cache = hooks.model(ids, use_cache=True).cache_params
        return hooks.model(more, cache_params=cache, use_cache=True).logits[:, -1]

    stepwise = found(6, step_by_step)
    at_once = found(7, lambda: hooks.model(torch.cat([ids, more], 1), use_cache=False).logits[:, -1])
    assert largest(stepwise, at_once) < MODEL_TOLERANCE


def test_what_cannot_be_replaced_is_refused() -> None:
    hooks = hooked("mamba1")
    ids = token_ids(2, 6)
    values = hooks.values(ids)
    with pytest.raises(MambalensError, match="path='erase' has nothing that could stand in the place"):
        Knockout([1], [2], path="erase", instead=values)
    with hooks.knockout([1], [2], instead=values):
        with pytest.raises(MambalensError, match=r"values for 2 x 6 positions, but the input has shape \[2, 7\]"):
            hooks.model(token_ids(2, 7))
        with pytest.raises(MambalensError, match="Values are those of a pass without a knockout"):
            hooks.values(ids)
        with pytest.raises(MambalensError, match="Effective attention says how sources enter"):
            hooks.effective_attention(ids, 0)
    with (
        pytest.raises(MambalensError, match="layer 1 is cut, but instead has no values for it"),
        hooks.knockout([1], [2], instead=hooks.values(ids, layers=[0])),
    ):
        hooks.model(ids)
