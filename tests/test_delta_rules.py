"""Delta rules equal their explicit form, whatever is cut: a state from the start for every target, matrix by matrix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import explicit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, architecture, in_double, set_weights, token_ids
from replays import Replayed, replayed
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from mambalens import Lens, load_facts
from mambalens.hooks import HookManager, Knockout, MambalensError, delta
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut
from mambalens.hooks.mixer import Captured
from mambalens.hooks.resume import Base

DELTA_RULES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "bailing_hybrid")
PATHS = ("main", "conv", "erase", "both")
TOLERANCE = 1e-9


@pytest.fixture(autouse=True, scope="module")
def exactly() -> Iterator[None]:
    """Transformers computes in float64 here, also where its code rounds to float32."""
    with in_double(*(hooked(name).model for name in (*DELTA_RULES, *ALONE))):
        yield


ALONE = ("qwen4_exp_text", "glm5_next")
"""Whose attention layers are refused: their delta rules are tried in models that have nothing else."""


def only_delta_rules(name: str, types: tuple[str, ...] = ("linear_attention",) * 2, **options: Any) -> Any:
    """A tiny model of an architecture in `ALONE`."""
    shared = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": len(types), "num_attention_heads": 4,
              "num_key_value_heads": 4, "intermediate_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
              "layer_types": list(types), "num_experts_per_tok": 1, "moe_intermediate_size": 16}  # fmt: skip
    if name == "qwen4_exp_text":
        own = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
               "linear_value_head_dim": 5, "head_dim": 6, "num_experts": 2, "shared_expert_intermediate_size": 16,
               "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [], "indexer_n_heads": 2, "indexer_kv_heads": 1,
               "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2}  # fmt: skip
        config = AutoConfig.for_model(name, **shared | own | options)
        return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    text = AutoConfig.for_model("glm5_next_text", **shared, linear_num_heads=3, linear_head_dim=6, n_routed_experts=2,
                                mlp_layer_types=["dense"] * len(types))  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 24}
    config = AutoConfig.for_model(name, text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config).eval()


@cache
def hooked(name: str) -> HookManager:
    if name not in ALONE:
        return HookManager(architecture(name))
    torch.manual_seed(0)
    model = only_delta_rules(name)
    set_weights(model)
    return HookManager(model.double())


@pytest.mark.parametrize(("name", "attention"), [("qwen4_exp_text", "Qwen4ExpTextAttention"),
                                                  ("glm5_next", "Glm5NextTextAttention")])  # fmt: skip
def test_attention_that_chooses_among_its_sources_is_refused_by_name(name: str, attention: str) -> None:
    model = only_delta_rules(name, ("linear_attention", "full_attention"))
    with pytest.raises(MambalensError, match=rf"layer 1 \(.*{attention}.*has no token mixer that mambalens knows"):
        HookManager(model)


def test_a_convolution_of_embeddings_beside_a_delta_rule_is_refused_by_name() -> None:
    model = only_delta_rules(
        "qwen4_exp_text", ple_layer_ids=[2], ple_embed_dim=8, heads_per_ngram=2, ngram_vocab_size_base=50
    )
    set_weights(model)
    with pytest.raises(MambalensError, match=r"Qwen4ExpForCausalLM leaks: .* layer 1 "):
        HookManager(model)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


class Case(NamedTuple):
    """One mixer of a model under random cuts."""

    mixer: Any
    hidden: Tensor
    padding: Tensor | None
    cuts: list[Cut]
    blocked: list[Tensor]
    """Entries cut on each of the three paths [batch, target, source, feature]."""

    def twin(self) -> tuple[Tensor, Tensor]:
        return explicit.TWINS[type(self.mixer.module).__name__](
            self.mixer.module, self.hidden, self.padding, *self.blocked
        )


@st.composite
def cases(draw: st.DrawFn, name: str, longest: int = 7) -> Case:
    """Random edges or sources x targets, one or two knockouts, features, paths and padding."""
    mixer = hooked(name).mixers[0]
    batch, time = draw(st.integers(1, 2)), draw(st.integers(1, longest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    hidden = torch.randn(batch, time, 24, dtype=torch.float64, generator=generator)
    padding, side = None, draw(st.sampled_from(["none", "left", "right"]))
    if side != "none":
        lengths, columns = torch.randint(1, time + 1, (batch, 1), generator=generator), torch.arange(time)
        padding = (columns >= time - lengths if side == "left" else columns < lengths).long()
    none = torch.zeros(batch, time, time, mixer.n_features, dtype=torch.bool)
    blocked, cuts = [none, none, none], []
    for _ in range(draw(st.integers(1, 2))):
        density = draw(st.sampled_from([0.2, 0.5, 1.0]))
        features = torch.rand(mixer.n_features, generator=generator) < draw(st.sampled_from([0.5, 1.0]))
        paths = Paths.named(draw(st.sampled_from(PATHS)))
        if draw(st.booleans()):
            edges = torch.rand(batch, time, time, generator=generator) < density
            cuts.append(Cut.of_edges(edges, features, paths))
        else:
            sources, targets = torch.rand(2, batch, time, generator=generator) < density
            edges = targets[:, :, None] & sources[:, None]
            cuts.append(Cut.of(sources, targets, features, paths))
        blocked = [
            entries | edges.tril()[..., None] & features if path in paths else entries
            for entries, path in zip(blocked, (Paths.MAIN, Paths.CONV, Paths.ERASE), strict=True)
        ]
    return Case(mixer, hidden, padding, cuts, blocked)


@pytest.mark.parametrize("name", (*DELTA_RULES, *ALONE))
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_delta_rule_alone_equals_its_explicit_form(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    real = torch.ones(case.hidden.shape[:2]).bool() if case.padding is None else case.padding.bool()
    with torch.no_grad():
        inputs, _ = case.mixer.inputs(case.hidden, case.padding, case.cuts)
        read, _ = case.mixer.mix(inputs, case.cuts, base=True)
        output, _ = case.mixer.knocked_out(case.hidden, case.padding, case.cuts)
        slow, slow_output = case.twin()
    assert largest(read.flatten(2)[real], slow[real]) < TOLERANCE
    changed = real & torch.stack([blocked.any(-1).any(-1) for blocked in case.blocked]).any(0)
    assert largest(output[changed], slow_output[changed]) < TOLERANCE


@pytest.mark.parametrize("name", (*DELTA_RULES, *ALONE))
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_effective_attention_times_values_is_what_is_read(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    call = Captured((), {"hidden_states": case.hidden, "attention_mask": case.padding}, None, None)
    with torch.no_grad():
        mixing = case.mixer.token_mixing(call, case.cuts)
        alpha = mixing.alpha
        read = torch.einsum("bfts,bsfp->btfp", alpha, mixing.values)
    assert largest(read, mixing.output) < TOLERANCE
    assert largest(alpha.diagonal(dim1=2, dim2=3).transpose(1, 2), mixing.diagonal) < TOLERANCE
    assert largest(mixing.exchange + mixing.enrichment, mixing.output) < TOLERANCE
    assert largest(alpha.triu(1), torch.zeros_like(alpha)) == 0.0
    real = torch.ones(case.hidden.shape[:2]).bool() if case.padding is None else case.padding.bool()
    assert largest(read.flatten(2)[real], case.twin()[0][real]) < TOLERANCE


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("time", [1, 15, 16, 17, 63, 64, 65, 150])
def test_chunks_equal_a_plain_loop(channels: int, time: int) -> None:
    """Scan, writes, states and effective attention of long inputs, with decays from none to everything."""
    generator = torch.Generator().manual_seed(time)
    made = [torch.randn(2, time, 4, 5, generator=generator).double()]
    made += [
        torch.nn.functional.normalize(torch.randn(2, time, 2, 6, generator=generator).double(), dim=-1) for _ in "kq"
    ]
    made += [torch.rand(2, time, 4, generator=generator).double() * 2 for _ in ("write", "erase")]
    made += [-(torch.randn(2, time, 4, channels, generator=generator).double().exp() ** 2)]
    inputs, start = delta.DeltaInputs(*made), torch.randn(2, 4, 6, 5, generator=generator).double()

    def loop(values: Tensor, erase: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        k, q = (t.repeat_interleave(2, 2) for t in (inputs.k, inputs.q))
        for t in range(time):
            state = torch.exp(inputs.log_decay[:, t])[..., None] * state  # [B, H, K, V]
            read = (k[:, t, :, :, None] * state).sum(2)
            added = inputs.write[:, t, :, None] * values[:, t] - erase[:, t, :, None] * read
            state = state + k[:, t, :, :, None] * added[:, :, None]
            outputs.append((q[:, t, :, :, None] * state).sum(2))
        return torch.stack(outputs, 1), state

    for begin in (None, start, start[:1]):
        y, end = delta.delta_scan(inputs, begin)
        wanted, last = loop(
            inputs.x, inputs.erase, torch.zeros_like(start) if begin is None else begin.expand_as(start)
        )
        assert largest(y, wanted) < TOLERANCE
        assert largest(end, last) < TOLERANCE
    alpha = delta.delta_attention(inputs)
    read = torch.einsum("bfts,bsfp->btfp", alpha, inputs.x)
    assert largest(read, loop(inputs.x, inputs.erase, torch.zeros_like(start))[0]) < TOLERANCE
    sources = torch.rand(3, 2, time, generator=generator) < 0.4
    sources[0] = False
    states = delta.delta_states(inputs, delta.in_chunks(inputs), sources)
    for written in range(3):
        for erased in range(3):
            values, erase = inputs.x * ~sources[written][..., None, None], inputs.erase * ~sources[erased][..., None]
            _, last = loop(values, erase, torch.zeros_like(start))
            assert largest(states(written, erased).state, last) < TOLERANCE


def test_leaving_out_the_removal_of_keys_misses_the_output() -> None:
    """What decayed products of keys and queries alone would say, beside the exact form."""
    mixer = hooked("qwen3_next").mixers[0]
    hidden = torch.randn(1, 30, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inputs, _ = mixer.inputs(hidden, None, ())
        read, _ = mixer.mix(inputs, (), base=True)
        heuristic = delta.delta_attention(inputs._replace(erase=torch.zeros_like(inputs.erase)))
    missed = torch.einsum("bfts,bsfp->btfp", heuristic, inputs.x) - read
    assert missed.abs().max() > 0.1 * read.abs().max()


def test_the_page_of_concepts_says_what_the_heuristic_misses() -> None:
    """Of what heads read in atlas-deltanet, layer by layer, in far prompts."""
    lens = Lens.load("atlas-deltanet")
    facts = lens.known(load_facts("atlas").where(wording="far"), limit=20, progress=False)
    missed: dict[int, float] = defaultdict(float)
    size: dict[int, float] = defaultdict(float)

    def compare(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        mixer = by_module[module]
        inputs, _ = mixer.inputs(kwargs["hidden_states"], None, ())
        heuristic = delta.delta_attention(inputs._replace(erase=torch.zeros_like(inputs.erase)))
        read = mixer.scan(inputs)[0]
        missed[mixer.layer] += float((torch.einsum("bfts,bsfp->btfp", heuristic, inputs.x) - read).square().sum())
        size[mixer.layer] += float(read.square().sum())

    by_module = {mixer.module: mixer for mixer in lens.hooks.mixers if mixer.kind == "deltanet"}
    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in by_module]
    with torch.no_grad():
        for fact in facts:
            lens.model(torch.tensor([lens.prompt(fact).ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    shares = [100 * (missed[layer] / size[layer]) ** 0.5 for layer in size]
    page = (Path(__file__).parent.parent / "docs/pages/concepts.md").read_text()
    assert f"by {min(shares):.0f} % of its\nsize in the best layer and by {max(shares):.0f} % in the worst" in page


def test_a_gate_with_a_lower_bound_has_no_decay_norm() -> None:
    assert hooked("kimi_linear").mixers[0].decay_norm().shape == (3,)
    for name in ("bailing_hybrid", "glm5_next"):
        mixer = hooked(name).mixers[0]
        bounded = mixer.module.forget_gate(torch.randn(1, 50, 24).double() * 100).min()
        assert mixer.decays == (bounded < -5.5)  # what the gate lets go down to
        if not mixer.decays:
            with pytest.raises(MambalensError, match="whose features have no decay"):
                mixer.decay_norm()


@pytest.mark.parametrize("name", DELTA_RULES)
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_replay_of_any_cut_equals_the_hooks(name: str, data: st.DataObject) -> None:
    """Prompts of different lengths, targets that are not the last, features and every path."""
    hooks = hooked(name)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    batch, time = 3, data.draw(st.integers(2, 9))
    ids = token_ids(batch, time, data.draw(st.integers(0, 100)))
    last = torch.randint(0, time, (batch,), generator=generator)
    last[0] = time - 1
    columns = torch.arange(time)
    sources = torch.rand(2, batch, time, generator=generator) < 0.5
    targets = columns == last[:, None]
    if data.draw(st.booleans()):
        targets = targets | (torch.rand(batch, time, generator=generator) < 0.3)
    asked = []
    for _ in range(5):
        kind = data.draw(st.sampled_from([None, *hooks.kinds]))
        count = {mixer.n_features for mixer in hooks.mixers_of(None, kind)}
        features: Any = "all"
        if len(count) == 1 and data.draw(st.booleans()):
            features = torch.rand(count.pop(), generator=generator) < 0.5
        path = data.draw(st.sampled_from(PATHS if kind != "attention" else ("main", "both")))
        layers = [0, 1, 2][data.draw(st.integers(0, 2)) :]
        if not any(Paths.named(path) & mixer.paths for mixer in hooks.mixers_of(layers, kind)):
            path = "both"
        asked.append(Replayed(data.draw(st.integers(0, 1)), layers, features, path, kind))
    memory = data.draw(st.sampled_from([2**30, 2**14, 1]))
    answers = replayed(hooks, ids, last, sources, targets, asked, memory)
    real = columns <= last[:, None]
    at = torch.arange(batch), last
    with torch.no_grad():
        assert largest(answers[0], hooks.model(ids).logits[at]) < TOLERANCE
        for number, one in enumerate(asked, 1):
            knockout = Knockout(sources[one.source], targets & real, one.layers, one.features, one.path, one.mixers)
            with hooks.apply(knockout):
                assert largest(answers[number], hooks.model(ids).logits[at]) < TOLERANCE


@pytest.mark.parametrize("name", DELTA_RULES)
@torch.no_grad()
def test_generation_under_a_knockout_of_every_path_is_what_repeated_passes_give(name: str) -> None:
    model = architecture(name)
    hooks = HookManager(model)
    ids = torch.randint(3, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(4))
    for path, targets in product(PATHS, ([4, 5], [4, 7])):  # in the prompt, and among what is generated
        with hooks.knockout([1, 2], targets, path=path):
            generated = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        grown = ids
        for _ in range(3):
            with hooks.knockout([1, 2], [target for target in targets if target < grown.shape[1]], path=path):
                grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(generated, grown)


def test_what_both_cuts_is_all_that_a_source_does() -> None:
    """With every other position cut on all paths, a position reads as if it stood alone."""
    for name in DELTA_RULES:
        mixer = hooked(name).mixers[0]
        hidden = torch.randn(1, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        edges = ~torch.eye(7, dtype=torch.bool)[None]
        with torch.no_grad():
            cuts = [Cut.of_edges(edges, None, Paths.BOTH)]
            inputs, _ = mixer.inputs(hidden, None, cuts)
            read, _ = mixer.mix(inputs, cuts, base=True)
            for t in range(7):
                alone, _ = mixer.inputs(hidden[:, t : t + 1], None, ())
                assert largest(read[:, t], mixer.scan(alone)[0][:, 0]) < TOLERANCE


def test_half_life_and_decay_norm_are_of_the_decay_alone() -> None:
    """An impulse in a head without erasing halves when they say; heads of larger norm forget later at equal steps."""
    mixer = hooked("olmo_hybrid").mixers[0]
    hidden = torch.randn(1, 12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    call = Captured((), {"hidden_states": hidden}, None, None)
    with torch.no_grad():
        half = mixer.token_mixing(call, ()).half_life(torch.tensor([12]))  # [B, T, H]
        inputs, _ = mixer.inputs(hidden, None, ())
    for head in range(mixer.n_features):
        left, reached = inputs.log_decay[0, :, head, 0], 0.0
        for token in range(1, 12):  # from position 0 on
            before, reached = reached, reached + float(left[token])
            if reached <= -torch.log(torch.tensor(2.0)):
                part = (-float(torch.log(torch.tensor(2.0))) - before) / float(left[token])
                assert abs(float(half[0, 0, head]) - (token - 1 + part)) < 1e-4
                break
    norm = mixer.decay_norm()
    assert torch.equal(norm.argsort(), (-mixer.module.A_log.detach().double()).argsort())
    assert largest(norm, torch.exp(-torch.exp(mixer.module.A_log.detach().double()))) < 1e-12


def test_every_delta_rule_is_in_the_table() -> None:
    assert set(DELTA_RULES) <= set(ARCHITECTURES)
    base = Base(torch.tensor([1]), torch.ones(1, 1, 1).bool(), torch.zeros(1, 1, 2).bool())
    for name in DELTA_RULES:
        for mixer in hooked(name).mixers:
            if mixer.kind != "attention":
                assert mixer.paths == Paths.BOTH
                assert mixer.familiar
                assert mixer.kept_numbers(base.reach, 3) > mixer.kept_numbers(base.reach, 2) > 0
