"""Attribution of every edge, against gates that the slow, obvious twins compute, against knockouts, and by itself."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import explicit
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, VOCABULARY, architecture, in_double
from torch import Tensor

from mambalens.facts.prompts import Batch
from mambalens.flow.attribution import Asked, Attributed, attribute, look
from mambalens.flow.edge_features import by_feature
from mambalens.hooks import Mixer, recurrence, scan
from mambalens.hooks.attention_edges import AttentionArrivals
from mambalens.hooks.attention_reading import EAGER
from mambalens.hooks.calls import bound
from mambalens.hooks.edges import Places, Weakened, effects_of, node_of
from mambalens.hooks.knockout import Paths
from mambalens.hooks.recurrent_edges import RecurrentArrivals
from mambalens.measures import log_odds
from mambalens.model import LoadedModel

EXACT = 1e-9
SLOPE = 1e-6
"""Of finite differences, relative to the largest effect."""
STEP = 1e-5
LENGTHS = (7, 4)
"""Of a batch's prompts; some windows and chunks are shorter, and so are all convolutions."""
SAMPLE = 5
"""Edges of a mixer and path whose gates are moved."""
KINDS = {
    "mamba1": "jamba", "zamba": "zamba", "mamba2": "falcon_h1", "deltanet": "qwen3_next", "kda": "kimi_linear",
    "lightning": "minimax", "rglru": "recurrent_gemma", "shortconv": "lfm2",
}  # fmt: skip
"""An architecture with each kind of recurrence."""
TWO_MODELS = ("falcon-alibi", "gemma2")
"""Whose eager and sdpa code differ by themselves in some release."""
LINEAR_BEHIND = {"rglru", "shortconv"}
"""Kinds without an activation behind the convolution."""


@cache
def lens_of(model_type: str, attention: str = "eager") -> LoadedModel:
    """Made once for all tests, which leave the model as it is."""
    return LoadedModel(architecture(model_type, attention=attention), None)


def exactly() -> Any:
    """Transformers computes in float64 in the block, also where its code rounds to float32."""
    return in_double(*(lens_of(model_type).model for model_type in ARCHITECTURES))


def batch_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, vocabulary: int = VOCABULARY, most: int = 0) -> Batch:
    """Random prompts, padded on the right, up to a length or the longest one's."""
    generator = torch.Generator().manual_seed(seed)
    low = min(3, vocabulary - 2)
    ids = torch.randint(low, vocabulary, (len(lengths), max(*lengths, most)), generator=generator)
    last = torch.tensor(lengths) - 1
    ids[torch.arange(ids.shape[1]) > last[:, None]] = 0
    targets = torch.randint(low, vocabulary, (len(lengths),), generator=generator)
    return Batch([Any] * len(lengths), ids, last, targets)  # nobody looks at the prompts but to count them


def asked_of(lens: LoadedModel, points: int = 1, strongest: int = 40, **others: Any) -> Asked:
    return Asked(dict.fromkeys(lens.hooks.mixers), Paths.BOTH, log_odds, points, strongest, **others)


def ways(lens: LoadedModel) -> list[tuple[Mixer, Paths]]:
    return [(mixer, path) for mixer in lens.hooks.mixers for path in mixer.paths]


def all_edges(batch: Batch) -> Places:
    """Every s -> t, s < t, of the prompts."""
    prompt, target, source = torch.ones(*batch.ids.shape, batch.ids.shape[1]).tril(-1).nonzero(as_tuple=True)
    there = target <= batch.last[prompt]
    return Places(prompt[there], target[there], source[there])


def some_edges(batch: Batch, mixer: Mixer, path: Paths, count: int = SAMPLE, seed: int = 0) -> Places:
    """A few of them, on the convolution's path most of them within its reach."""
    edges = all_edges(batch)
    order = torch.randperm(len(edges.source), generator=torch.Generator().manual_seed(seed + 10 * mixer.layer))
    if path is Paths.CONV:
        far = (edges.target - edges.source)[order] >= mixer.kernel
        order = torch.cat([order[~far][: count - 1], order[far][:1]])
    return Places(*(t[order[:count]] for t in edges))


def mask_of(edges: Places, time: int, features: Tensor) -> Tensor:
    """What a row of each edge blocks [edge, target, source, feature]."""
    mask = torch.zeros(len(edges.source), time, time, len(features), dtype=torch.bool)
    mask[torch.arange(len(edges.source)), edges.target, edges.source] = features
    return mask


def in_rows(edges: Places) -> Places:
    """The edges in a batch with a row for each."""
    return edges._replace(prompt=torch.arange(len(edges.source)))


def every(mixer: Mixer) -> Tensor:
    return torch.ones(mixer.n_features, dtype=torch.bool)


def largest(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def read_by_twin(mixer: Any, given: dict[str, Any], main: Tensor, conv: Tensor, erase: Tensor) -> Tensor:
    """What positions read with these entries blocked, with the skip [batch, T, feature, width]."""
    hidden = next(given[name] for name in ("hidden_states", "input_states") if name in given)
    padding = given.get("attention_mask")
    twin = explicit.TWINS.get(type(mixer.module).__name__)
    if twin is not None:
        y = twin(mixer.module, hidden, padding, main, conv, erase)[0]
    else:
        y = explicit.SCANS[mixer.kind](mixer.module, hidden, padding, main, conv)
    return y.unflatten(2, (mixer.n_features, -1))


def activated_by_twin(mixer: Any, inner: Tensor, blocked: Tensor) -> Tensor:
    """What the convolution gives with these taps blocked [batch, T, S, feature or 1], behind its activation.

    Where taps of single features are blocked that share channels, every feature has its own.
    """
    conv = mixer.convolution
    weight, bias = conv.weight[:, 0], None if mixer.kind == "shortconv" else conv.bias
    shared = mixer.channels_by_feature(inner.device) if blocked.shape[-1] > 1 else None
    if shared is not None:
        channels, of = shared
        inner, weight, bias, blocked = (
            inner[..., channels],
            weight[channels],
            bias if bias is None else bias[channels],
            blocked[..., of],
        )
    convolved = explicit.convolution(inner, weight, bias, blocked.expand(-1, -1, -1, inner.shape[-1]))
    return convolved if mixer.kind in LINEAR_BEHIND else F.silu(convolved)


@contextmanager
def gated(
    mixer: Any, path: Paths, edges: Places, time: int, share: Tensor, features: Tensor | None = None
) -> Iterator[None]:
    """While the block runs, a share of one edge of every row is cut: in between what the twins give with and without.

    Of all features, or of those of each row [row, feature].
    """
    cut = mask_of(edges, time, every(mixer))
    if features is not None:
        cut = cut & features[:, None, None]
    none = torch.zeros_like(cut)

    def between(whole: Tensor, without: Tensor) -> Tensor:
        return whole + share.view(-1, *[1] * (whole.ndim - 1)) * (without - whole)

    def recurrent(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = bound(module, args, kwargs)
        given = {name: value for name, value in given.items() if name != "attention_mask"}  # nothing is padded here
        hidden, _ = mixer.told(given)
        projected = mixer.project(hidden)
        if path is Paths.CONV:
            some = slice(1) if features is None else slice(None)
            activated = [activated_by_twin(mixer, projected.inner, blocked[..., some]) for blocked in (none, cut)]
            inputs = mixer.scan_inputs(between(*activated), projected.beside)
            y = mixer.with_skip(mixer.scan(inputs)[0], inputs)
        else:
            blocked = {Paths.MAIN: (cut, none, none), Paths.ERASE: (none, none, cut)}[path]
            y = between(read_by_twin(mixer, given, none, none, none), read_by_twin(mixer, given, *blocked))
        ours = mixer.finish(y, projected.gate, hidden.dtype)
        return (ours, *output[1:]) if isinstance(output, tuple) else ours

    def attention(*args: Any, **kwargs: Any) -> Any:
        softmax = F.softmax

        def ours(scores: Tensor, *rest: Any, **options: Any) -> Tensor:
            entries = cut.permute(0, 3, 1, 2)
            entries = F.pad(entries, (0, scores.shape[-1] - entries.shape[-1]))  # a sink is another column
            return between(softmax(scores, *rest, **options),
                           softmax(scores.masked_fill(entries, -torch.inf), *rest, **options))  # fmt: skip

        F.softmax = ours
        try:
            return forward(*args, **kwargs)
        finally:
            F.softmax = softmax

    forward = mixer.module.forward
    if mixer.kind == "attention":
        mixer.module.forward = attention
        try:
            yield
        finally:
            del mixer.module.forward
    else:
        handle = mixer.module.register_forward_hook(recurrent, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def slope(
    lens: LoadedModel,
    batch: Batch,
    mixer: Mixer,
    path: Paths,
    edges: Places,
    at: float = 0.0,
    features: Tensor | None = None,
) -> Tensor:
    """Finite differences of the measure by the gate of each edge, to the fourth order; of some features of each."""
    moved = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    rows = Places(*(t.repeat_interleave(4) for t in edges))
    share = at + STEP * moved.repeat(len(edges.source))
    repeated = batch.part(rows.prompt.tolist())
    of_rows = None if features is None else features.repeat_interleave(4, 0)
    with torch.no_grad(), gated(mixer, path, rows, batch.ids.shape[1], share, of_rows):
        measured = log_odds(lens.last_logits(repeated), repeated.targets).view(-1, 4)
    return measured @ torch.tensor([1.0, -8.0, 8.0, -1.0], dtype=torch.float64) / (12 * STEP)


def strongest_effect(found: Attributed) -> float:
    return max(float(effect.abs().max()) for effect in found.effects.values())


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_an_effect_is_the_slope_of_the_edges_gate(model_type: str) -> None:
    """Of gates that the explicit form computes; prompts of unequal lengths."""
    lens, batch = lens_of(model_type), batch_of()
    with exactly():
        found = attribute(lens, batch, asked_of(lens))
        size = strongest_effect(found)
        assert size > 1e-3
        for mixer, path in ways(lens):
            edges = some_edges(batch, mixer, path)
            slopes = slope(lens, batch, mixer, path, edges)
            assert largest(found.effects[mixer, path][edges], slopes) < SLOPE * size, (mixer, path)
            assert mixer.layer == lens.n_layers - 1 or slopes.abs().max() > 0


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
@torch.no_grad()
def test_an_edge_that_is_weakened_by_all_is_cut(model_type: str) -> None:
    """Every edge, one in a row: the explicit form's answers, and those of the knockout."""
    lens, batch = lens_of(model_type), batch_of()
    edges, time = all_edges(batch), batch.ids.shape[1]
    rows, repeated = in_rows(edges), batch.part(edges.prompt.tolist())
    with exactly():
        for mixer, path in ways(lens):
            with mixer.attributing(Weakened({path: rows}, 1.0)):
                ours = lens.last_logits(repeated)
            blocked = mask_of(edges, time, every(mixer))
            entries = [{(mixer.layer, mixer.kind): blocked} if path is on else {}
                       for on in (Paths.MAIN, Paths.CONV, Paths.ERASE)]  # fmt: skip
            with explicit.blocked_everywhere(lens.model, *entries):
                slow = lens.last_logits(repeated)
            assert largest(ours, slow) < EXACT, (mixer, path)
            named: Any = str(path.name).lower()
            with lens.hooks.knockout(edges=blocked[..., 0], layers=[mixer.layer], path=named, mixers=mixer.kind):
                assert largest(ours, lens.last_logits(repeated)) < EXACT, (mixer, path)


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_effects_are_those_of_every_edge_alone(model_type: str) -> None:
    """For any gradient, all features and some."""
    lens, batch = lens_of(model_type), batch_of()
    generator = torch.Generator().manual_seed(3)
    time = batch.ids.shape[1]
    prompt, target, source = torch.ones(len(batch.ids), time, time).tril(-1).nonzero(as_tuple=True)
    places = Places(prompt, target, source)
    with exactly():
        for some in (False, True):
            masks = {m: torch.rand(m.n_features, generator=generator) < 0.5 if some else None
                     for m in lens.hooks.mixers}  # fmt: skip
            looked = look(lens, batch, replace(asked_of(lens), features=masks), None)
            for mixer, path in ways(lens):
                arrivals = looked.arrivals[mixer]
                node = arrivals.nodes[node_of(path)]
                gradient = torch.randn(node.shape, dtype=node.dtype, generator=generator)
                effects = arrivals.effects(path, gradient)
                alone = torch.zeros_like(effects)
                alone[places] = effects_of(arrivals, path, places, gradient[places.at])
                assert largest(effects, alone) < EXACT * effects.abs().max().clamp_min(1), (mixer, path)


@pytest.mark.parametrize("name", list(KINDS))
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_changes_of_a_recurrence_alone_equal_the_explicit_form(name: str, data: st.DataObject) -> None:
    """What arrives with and without every edge, some features, prompts padded on either side."""
    lens = lens_of(KINDS[name])
    mixer: Any = next(m for m in lens.hooks.mixers if m.kind == name or (name == "zamba" and m.kind == "mamba1"))
    batch, time = data.draw(st.integers(1, 2)), data.draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    hidden = torch.randn(batch, time, 24, dtype=torch.float64, generator=generator)
    padding, side = None, data.draw(st.sampled_from(["none", "left", "right"]))
    if side != "none" and name != "rglru":  # which heeds no padding
        lengths, columns = torch.randint(1, time + 1, (batch, 1), generator=generator), torch.arange(time)
        padding = (columns >= time - lengths if side == "left" else columns < lengths).long()
    density = data.draw(st.sampled_from([None, 0.0, 0.5]))
    features = None if density is None else torch.rand(mixer.n_features, generator=generator) < density
    given: dict[str, Any] = {"hidden_states": hidden, "attention_mask": padding}
    if name == "rglru":
        given = {"input_states": hidden, "position_ids": torch.arange(time)[None]}
    prompt, target, source = torch.ones(batch, time, time).tril(-1).nonzero(as_tuple=True)
    edges = Places(prompt, target, source)
    with exactly(), torch.no_grad():
        told, shown = mixer.told(given)
        arrivals = RecurrentArrivals(mixer, told, shown, None, features)
        rows = {key: value[prompt] if key != "position_ids" and value is not None else value
                for key, value in given.items()}  # fmt: skip
        cut = mask_of(edges, time, every(mixer) if features is None else features)
        none = torch.zeros_like(cut)
        at = torch.arange(len(source)), target
        for path in mixer.paths:
            changes = arrivals.changes(path, edges)
            if path is not Paths.CONV:
                blocked = (cut, none, none) if path is Paths.MAIN else (none, none, cut)
                slow = (read_by_twin(mixer, rows, *blocked) - read_by_twin(mixer, rows, none, none, none))[at]
            else:
                told_rows, shown = mixer.told(rows)
                inner = mixer.project(told_rows if shown is None else told_rows * shown[..., None]).inner
                whole, without = (
                    activated_by_twin(mixer, inner, m)
                    for m in (none[..., :1], mask_of(edges, time, torch.ones(1).bool()))
                )
                slow = (without - whole)[at]
                if features is not None:
                    shared = mixer.channels_by_feature(slow.device)
                    channels, of = shared if shared is not None else [torch.arange(slow.shape[-1])] * 2
                    slow = slow[:, channels] * features[of]
            assert largest(changes, slow.view_as(changes)) < EXACT
            gradient = torch.randn(arrivals.nodes[node_of(path)].shape, dtype=torch.float64, generator=generator)
            effects = torch.zeros(batch, time, time, dtype=torch.float64)
            effects[edges] = (slow.view_as(changes) * gradient[edges.at]).flatten(1).sum(1)
            assert largest(arrivals.effects(path, gradient), effects) < EXACT


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_changes_of_attention_alone_equal_the_explicit_form(data: st.DataObject) -> None:
    """Weights that are even or nearly all one source's, sliding windows, sinks, both precisions."""
    batch, heads, shared, width = 2, 4, data.draw(st.sampled_from([1, 2, 4])), 3
    time, dtype = data.draw(st.integers(1, 7)), data.draw(st.sampled_from([torch.float64, torch.float32]))
    # So far as weights are numbers: in float32 all but the largest would be zero.
    scale = data.draw(st.sampled_from([1.0, 8.0, 30.0 if dtype is torch.float64 else 10.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    scores = scale * torch.randn(batch, heads, time, time, dtype=torch.float64, generator=generator)
    allowed = torch.ones(time, time, dtype=torch.bool).tril().triu(-data.draw(st.sampled_from([2, time])))
    scores = scores.masked_fill(~allowed, -torch.inf)
    sinks = data.draw(st.booleans())
    sink = torch.full((heads, 1, 1), 0.5 if sinks else -torch.inf, dtype=torch.float64)
    whole = torch.cat([scores, sink.expand(batch, -1, time, 1)], -1)
    weights = whole.softmax(-1)[..., :-1].to(dtype)
    values = torch.randn(batch, heads // shared, time, width, dtype=torch.float64, generator=generator).to(dtype)
    by_head = values.repeat_interleave(shared, 1)
    features = torch.rand(heads, generator=generator) < 0.5 if data.draw(st.booleans()) else None
    arrivals = AttentionArrivals(weights, values, (weights @ by_head).transpose(1, 2), None, features, sinks)
    gradient = torch.randn(batch, time, heads, width, dtype=torch.float64, generator=generator).to(dtype)
    prompt, target, source = torch.ones(batch, time, time).tril(-1).nonzero(as_tuple=True)
    edges = Places(prompt, target, source)
    entry = mask_of(edges, time + 1, torch.ones(1).bool())[:, :-1].permute(0, 3, 1, 2)
    without = whole[prompt].masked_fill(entry, -torch.inf).softmax(-1)[..., :-1]
    slow = without @ by_head.double()[prompt] - (weights @ by_head).double()[prompt]
    slow = slow[torch.arange(len(source)), :, target]
    slow = slow if features is None else slow * features[:, None]
    tolerance = EXACT if dtype is torch.float64 else 1e-5
    if sinks:  # what is left to them is a difference to 1, as exact as that may be
        left = 1 - weights.double().masked_fill(~torch.ones(time, time).tril(-1).bool(), 0.0).amax()
        tolerance = max(tolerance, 20 * torch.finfo(dtype).eps / float(left.clamp_min(1e-300)))
    assert largest(arrivals.changes(Paths.MAIN, edges), slow) < tolerance
    effects = torch.zeros(batch, time, time, dtype=torch.float64)
    effects[edges] = (slow * gradient.double()[edges.at]).flatten(1).sum(1)
    assert largest(arrivals.effects(Paths.MAIN, gradient), effects) < 10 * tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounded_weights_make_no_source_matter(dtype: torch.dtype) -> None:
    """What a source of hardly any weight does stays small where the rounded weights do not add up to 1."""
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(2, 4, 12, 12, dtype=torch.float64, generator=generator)
    weights = scores.masked_fill(~torch.ones(12, 12).tril().bool(), -torch.inf).softmax(-1).to(dtype)
    values = torch.randn(2, 4, 12, 5, dtype=torch.float64, generator=generator).to(dtype) + 3
    gradient = torch.ones(2, 12, 4, 5)
    rounded = AttentionArrivals(weights, values, (weights @ values).transpose(1, 2), None, None)
    w, v = weights.double(), values.double()
    w = w / w.sum(-1, keepdim=True)
    prompt, target, source = torch.ones(2, 12, 12).tril(-1).nonzero(as_tuple=True)
    edges = Places(prompt, target, source)
    own = w[prompt, :, target, source][..., None]
    slow = own * ((w @ v)[prompt, :, target] - v[prompt, :, source]) / (1 - own).clamp_min(1e-12)
    wanted = slow.flatten(1).sum(1)
    tolerance = 1e-5 + 1e-3 * slow.abs().flatten(1).sum(1)
    assert ((rounded.changes(Paths.MAIN, edges).double().flatten(1).sum(1) - wanted).abs() < 1e-4 + tolerance).all()
    assert ((rounded.effects(Paths.MAIN, gradient)[edges].double() - wanted).abs() < 1e-4 + tolerance).all()
    assert (own.amax(1)[:, 0] < 1e-3).any()


def second_cut(lens: LoadedModel) -> tuple[Mixer, Paths]:
    """A mixer and path to weaken an edge of, as high as something is left above it to be seen by."""
    return [(mixer, path) for mixer, path in ways(lens) if path is not Paths.CONV or mixer.paths is Paths.CONV][-1]


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_gradients_where_edges_are_weakened_are_those_of_the_weakened_model(model_type: str) -> None:
    """Slopes of the first mixer's gates while an edge of a later one is cut by half, in every prompt."""
    lens, batch = lens_of(model_type), batch_of()
    time = batch.ids.shape[1]
    with exactly():
        (mixer, path), (later, way) = ways(lens)[0], second_cut(lens)
        held = Places(torch.arange(2), batch.last, torch.tensor([1, 3]))
        first = look(lens, batch, asked_of(lens), None)
        second = look(lens, batch, asked_of(lens), {(later, way): held})
        edges = some_edges(batch, mixer, path)
        effects = effects_of(first.arrivals[mixer], path, edges, second.gradients[mixer, node_of(path)][edges.at])
        rows = edges.prompt.repeat_interleave(4)
        half = torch.full((len(rows),), 0.5, dtype=torch.float64)
        with gated(later, way, Places(rows, held.target[rows], held.source[rows]), time, half):
            slopes = slope(lens, batch, mixer, path, edges)
        without = slope(lens, batch, mixer, path, edges)
    assert largest(effects, slopes) < SLOPE * slopes.abs().max()
    assert largest(without, slopes) > SLOPE * slopes.abs().max()  # the later edge matters


@pytest.mark.parametrize("model_type", [*KINDS.values(), "llama", "gptj", "gpt_oss", "deepseek_v3"])
def test_the_strongest_edges_are_looked_at_along_their_own_cut(model_type: str) -> None:
    """One edge in a group: a quarter of the slope at no cut, three quarters of that at half a cut, and nothing else."""
    lens, batch = lens_of(model_type), batch_of()
    with exactly():
        first = attribute(lens, batch, asked_of(lens)).effects
        second = attribute(lens, batch, asked_of(lens, points=4, strongest=3)).effects
        together = torch.stack([first[way] for way in ways(lens)], 1).flatten(1)  # [B, ways x T x T]
        strongest = together.abs().topk(3, 1).indices
        changed = torch.stack([second[way] != first[way] for way in ways(lens)], 1).flatten(1)
        allowed = torch.zeros_like(changed).scatter(1, strongest, True)
        assert changed.any() and not (changed & ~allowed).any()
        time = batch.ids.shape[1]
        for prompt, row in enumerate(strongest.tolist()):
            for index in row:
                mixer, path = ways(lens)[index // time**2]
                edge = Places(*(torch.tensor([n]) for n in (prompt, index // time % time, index % time)))
                wanted = 0.25 * slope(lens, batch, mixer, path, edge) + 0.75 * slope(
                    lens, batch, mixer, path, edge, 0.5
                )
                assert largest(second[mixer, path][edge], wanted) < SLOPE * together.abs().max()


@pytest.mark.parametrize("points", [1, 4])
@pytest.mark.parametrize("model_type", [*KINDS.values(), "gpt2", "mistral", "gptj", "gpt_oss"])
def test_a_prompts_effects_are_the_same_in_any_batch(model_type: str, points: int) -> None:
    """Also of a prompt of one token, which has no edge; and twice the same."""
    lens, lengths = lens_of(model_type), (8, 1, 5, 2)
    batch = batch_of(lengths)
    with exactly():
        asked = asked_of(lens, points, 7)
        together = attribute(lens, batch, asked)
        again = attribute(lens, batch, asked)
        for way, effects in together.effects.items():
            assert effects.shape == (4, 8, 8) and torch.equal(effects, again.effects[way])
            assert not effects.triu().any() and not effects[1].any()
        for row, length in enumerate(lengths):
            alone = attribute(lens, batch.part([row]).trimmed(), asked)
            assert largest(alone.logits, together.logits[row : row + 1]) < EXACT
            for way, effects in together.effects.items():
                assert largest(alone.effects[way][0], effects[row, :length, :length]) < 1e-7
                assert not effects[row, length:].any() and not effects[row, :, length:].any()


class Ungated(torch.nn.Module):
    """In the place of a gated norm: the gate alone, which is linear in what was read."""

    weight = torch.ones(1)

    def forward(self, read: Tensor, gate: Tensor) -> Tensor:
        return read * F.silu(gate)


def linear_model(kind: str) -> LoadedModel:
    """One layer without norms behind its mixer, without an MLP, and two tokens: log-odds are linear in what arrives."""
    one: dict[str, Any] = {"num_hidden_layers": 1}
    model_type, options = {
        "mamba1": ("mamba", one),
        "mamba2": ("mamba2", one),
        "attention": ("llama", one),
        "sink": ("gpt_oss", one | {"layer_types": ["full_attention"]}),
        "twice": ("gptj", {"n_layer": 1}),
        "deltanet": ("qwen3_next", one | {"layer_types": ["linear_attention"]}),
        "kda": ("kimi_linear", one | {"layer_types": ["linear_attention"], "mlp_layer_types": ["dense"]}),
        "lightning": ("minimax", one | {"layer_types": ["linear_attention"]}),
        "rglru": ("recurrent_gemma", one | {"block_types": ["recurrent"]}),
        "shortconv": ("lfm2", one | {"layer_types": ["conv"]}),
    }[kind]
    model = architecture(model_type, vocabulary=3, **options)
    trunk = model.base_model
    (layer,) = trunk.layers if hasattr(trunk, "layers") else trunk.h
    for name in ("norm", "norm_f", "ln_f", "final_norm", "embedding_norm"):
        if hasattr(trunk, name):
            setattr(trunk, name, torch.nn.Identity())
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".mlp.", ".mlp_block.", "feed_forward", "experts", "block_sparse_moe")):
            parameter.data.zero_()
    if kind == "lightning":
        layer.post_attention_layernorm = torch.nn.Identity()
        layer.self_attn.norm = torch.nn.Identity()
    for module in model.modules():
        if kind in ("mamba2", "deltanet", "kda"):
            for name in ("norm", "o_norm"):
                if hasattr(module, "conv1d") and hasattr(module, name):
                    setattr(module, name, Ungated())
    return LoadedModel(model, None)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2", "attention", "sink", "twice", "deltanet", "kda", "lightning",
                                  "rglru", "shortconv"])  # fmt: skip
@pytest.mark.parametrize("points", [1, 4])
def test_where_a_model_is_linear_in_its_edges_effects_are_exact(kind: str, points: int) -> None:
    lens = linear_model(kind)
    (mixer,) = lens.hooks.mixers
    batch = batch_of((8, 5), vocabulary=3)
    edges, time = all_edges(batch), batch.ids.shape[1]
    repeated = batch.part(edges.prompt.tolist())

    def measure(logits: Tensor, targets: Tensor) -> Tensor:  # log-odds of one of two tokens
        if kind == "rglru":  # whose model caps its logits softly
            cap = lens.model.config.logits_soft_cap
            logits = cap * torch.atanh(logits / cap)
        return log_odds(logits[:, 1:], targets - 1)

    with exactly(), in_double(lens.model):
        found = attribute(lens, batch, replace(asked_of(lens, points), measure=measure))
        paths = [path for path in mixer.paths if path is not Paths.CONV or kind == "shortconv"]
        for path in paths:
            blocked, named = mask_of(edges, time, torch.ones(1).bool())[..., 0], str(path.name).lower()
            whole = measure(lens.last_logits(batch), batch.targets)[edges.prompt]
            with lens.hooks.knockout(edges=blocked, path=named):
                exact = measure(lens.last_logits(repeated), repeated.targets) - whole
            assert largest(found.effects[mixer, path][edges], exact) < EXACT
            assert exact.abs().max() > 1e-4


@pytest.mark.parametrize("model_type", [*KINDS.values(), "gptj", "gpt_oss"])
def test_effects_of_some_features_and_of_the_rest_add_up(model_type: str) -> None:
    """Each is the slope of the features' own gate, which at its end is the knockout of these features."""
    lens, batch = lens_of(model_type), batch_of()
    generator = torch.Generator().manual_seed(5)
    some = {mixer: torch.rand(mixer.n_features, generator=generator) < 0.5 for mixer in lens.hooks.mixers}
    with exactly():
        whole, ours, rest, none = (
            attribute(lens, batch, replace(asked_of(lens), features=features)).effects
            for features in (dict.fromkeys(some), some, {m: ~mask for m, mask in some.items()},
                             {m: torch.zeros_like(mask) for m, mask in some.items()})
        )  # fmt: skip
        for mixer, path in ways(lens):
            assert not none[mixer, path].any()
            added, size = ours[mixer, path] + rest[mixer, path], whole[mixer, path].abs().max().clamp_min(1)
            assert largest(added, whole[mixer, path]) < EXACT * size
            edges = some_edges(batch, mixer, path)
            repeated, rows = batch.part(edges.prompt.tolist()), in_rows(edges)
            measured = []
            for share in (-2, -1, 1, 2):
                cut = Weakened({path: rows}, share * STEP)
                with torch.no_grad(), mixer.attributing(cut, some[mixer]):
                    measured.append(log_odds(lens.last_logits(repeated), repeated.targets))
            slopes = (measured[0] - 8 * measured[1] + 8 * measured[2] - measured[3]) / (12 * STEP)
            assert largest(ours[mixer, path][edges], slopes) < SLOPE * size
            with torch.no_grad():
                with mixer.attributing(Weakened({path: rows}, 1.0), some[mixer]):
                    wholly = lens.last_logits(repeated)
                blocked = mask_of(edges, batch.ids.shape[1], torch.ones(1).bool())[..., 0]
                with lens.hooks.knockout(edges=blocked, layers=[mixer.layer], mixers=mixer.kind,
                                         path=str(path.name).lower(), features=some[mixer]):  # fmt: skip
                    assert largest(wholly, lens.last_logits(repeated)) < EXACT


@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_the_features_of_an_edge_add_up_to_it_and_each_is_the_slope_of_its_own_gate(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all features, of gates that the explicit form computes; an edge at a time or together; also of some features."""
    lens, batch = lens_of(model_type), batch_of()
    asked = asked_of(lens)
    with exactly():
        whole = attribute(lens, batch, asked).effects
        edges = {(mixer, path): some_edges(batch, mixer, path) for mixer, path in ways(lens)}
        found = by_feature(lens, batch, asked, edges)
        size = max(float(effects.abs().max()) for effects in whole.values())
        for (mixer, path), parts in found.items():
            assert parts.shape == (SAMPLE, mixer.n_features)
            assert largest(parts.sum(1), whole[mixer, path][edges[mixer, path]]) < EXACT * size
            # The strongest feature of every edge and its last one, whatever that carries.
            strongest, last = parts.abs().argmax(1), torch.full((SAMPLE,), mixer.n_features - 1)
            one = F.one_hot(torch.cat([strongest, last]), mixer.n_features).bool()
            twice = Places(*(t.repeat(2) for t in edges[mixer, path]))
            slopes = slope(lens, batch, mixer, path, twice, features=one)
            assert largest(parts.repeat(2, 1)[one], slopes) < SLOPE * size, (mixer, path)
        assert max(float(parts.abs().max()) for parts in found.values()) > 1e-4
        monkeypatch.setattr("mambalens.flow.edge_features.AT_ONCE", 1)
        generator = torch.Generator().manual_seed(4)
        some = {mixer: torch.rand(mixer.n_features, generator=generator) < 0.5 for mixer in asked.features}
        for where, parts in by_feature(lens, batch, replace(asked, features=some), edges).items():
            assert largest(parts, found[where] * some[where[0]]) < EXACT * size


def state(model: Any) -> list[Any]:
    """All of a model that a pass could leave changed."""
    found: list[Any] = [(name, p.requires_grad, p.grad, p.sum().item()) for name, p in model.named_parameters()]
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        hooks = [len(value) for name, value in sorted(vars(module).items()) if name.endswith("_hooks")]
        home = vars(sys.modules[type(module).__module__])
        found.append((path, sorted(vars(module)), module.training, hooks, getattr(config, "_attn_implementation", None),
                      home.get(EAGER)))  # fmt: skip
    return found


class Broken(Exception):
    pass


@pytest.mark.parametrize("model_type", [*KINDS.values(), "mamba", "gpt2", "gptj", "bloom", "gpt_oss", "llama"])
def test_the_model_is_left_as_it_was(model_type: str) -> None:
    """Also where the pass breaks off in a mixer, at the head or in the measure, or runs without gradients."""
    attention = "sdpa" if model_type in ("llama", "jamba", "gpt2") else "eager"
    lens = LoadedModel(architecture(model_type, attention=attention), None)
    lens.model.lm_head.requires_grad_(False)
    next(lens.model.parameters()).requires_grad_(False)
    modules = list(lens.model.modules())
    modules[-1].training = modules[len(modules) // 2].training = True
    before, batch, asked = state(lens.model), batch_of(), asked_of(lens, 4, 5)
    logits = lens.last_logits(batch)
    found = attribute(lens, batch, asked)
    assert largest(found.logits, logits) < 1e-5  # here transformers rounds to float32 in places
    assert state(lens.model) == before
    with torch.no_grad():
        for way, effects in attribute(lens, batch, asked).effects.items():
            assert torch.equal(effects, found.effects[way]) and not effects.requires_grad

    def breaks(*args: Any, **kwargs: Any) -> Any:
        raise Broken

    for where in (lens.hooks.mixers[-1].module, lens.model.get_output_embeddings()):
        handle = where.register_forward_hook(breaks)
        with pytest.raises(Broken):
            attribute(lens, batch, asked)
        handle.remove()
        assert state(lens.model) == before
    with pytest.raises(Broken):
        attribute(lens, batch, replace(asked, measure=breaks))
    assert state(lens.model) == before
    assert torch.equal(lens.last_logits(batch), logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_where_nothing_is_weakened_the_answers_are_the_models_own(model_type: str, attention: str) -> None:
    if attention == "sdpa" and (model_type in TWO_MODELS or not lens_of(model_type).model._supports_sdpa):
        pytest.skip("one implementation, or two that differ by themselves")
    lens, batch = lens_of(model_type, attention), batch_of()
    with exactly():
        looked = look(lens, batch, asked_of(lens), None)
        assert largest(looked.logits, lens.last_logits(batch)) < EXACT
        empty = {way: Places(*[torch.zeros(0, dtype=torch.long)] * 3) for way in ways(lens)[:0]}
        assert largest(look(lens, batch, asked_of(lens), empty).logits, looked.logits) == 0
    for arrivals in looked.arrivals.values():
        held = [t for t in vars(arrivals).values() if isinstance(t, Tensor)]
        held += [*arrivals.nodes.values(), *getattr(arrivals, "inputs", ())]
        assert held and not any(t.requires_grad for t in held)  # the pass's graph is gone


@pytest.mark.parametrize(("dtype", "like"), [(torch.bfloat16, 0.95), (torch.float16, 0.999)])
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", *KINDS.values(), "gptj", "gpt_oss"])
def test_half_precision_models_get_effects_in_float32(model_type: str, dtype: torch.dtype, like: float) -> None:
    """And much the same ones, in most prompts: in some, another expert is chosen."""
    lens, batch = LoadedModel(architecture(model_type, dtype), None), batch_of((7, 4, 7, 6, 5))
    precise = LoadedModel(architecture(model_type, torch.float64), None)
    precise.model.load_state_dict(lens.model.state_dict())  # the rounded weights
    found, wanted = (attribute(one, batch, asked_of(one)) for one in (lens, precise))
    again = attribute(lens, batch, asked_of(lens, 4, 6))
    assert found.logits.dtype == torch.float32
    for effects in (*found.effects.values(), *again.effects.values()):
        assert effects.dtype == torch.float32 and effects.isfinite().all()
    ours, theirs = (torch.stack(list(one.effects.values()), 1).flatten(1).double() for one in (found, wanted))
    assert F.cosine_similarity(ours, theirs, 1).median() > like


@pytest.mark.parametrize("model_type", ["falcon_h1", "qwen3_next", "llama"])
def test_some_mixers_and_paths_are_attributed_as_among_all(model_type: str) -> None:
    lens, batch = lens_of(model_type), batch_of()
    some = (lens.hooks.mixers[1:], lens.hooks.mixers[-1:])
    ways_of = (Paths.MAIN, Paths.CONV, Paths.ERASE | Paths.CONV)
    with exactly():
        whole = attribute(lens, batch, asked_of(lens)).effects
        for mixers, paths, points in itertools.product(some, ways_of, (1, 3)):
            asked = Asked(dict.fromkeys(mixers), paths, log_odds, points, 0 if points > 1 else 40)
            effects = attribute(lens, batch, asked).effects
            assert set(effects) == {way for way in whole if way[0] in mixers and way[1] in paths}
            for way in effects:
                assert largest(effects[way], whole[way]) < EXACT


@pytest.mark.parametrize("name", list(KINDS))
def test_prompts_longer_than_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans in several chunks, effective attention made for one feature at a time."""
    lens, batch = lens_of(KINDS[name]), batch_of((70, 33))
    mixer = next(m for m in lens.hooks.mixers if m.kind == name or (name == "zamba" and m.kind == "mamba1"))
    with exactly():
        looked = look(lens, batch, asked_of(lens), None)
        arrivals = looked.arrivals[mixer]
        for path in mixer.paths:
            edges = some_edges(batch, mixer, path, 8)
            gradient = looked.gradients[mixer, node_of(path)]
            whole = arrivals.effects(path, gradient)
            monkeypatch.setattr(recurrence, "AT_ONCE", 1)
            monkeypatch.setitem(scan.TILE, "cpu", 1)
            effects = arrivals.effects(path, gradient)
            monkeypatch.undo()
            assert largest(effects, whole) < EXACT
            assert largest(effects[edges], effects_of(arrivals, path, edges, gradient[edges.at])) < EXACT
            repeated, cut = batch.part(edges.prompt.tolist()), mask_of(edges, 70, torch.ones(1).bool())[..., 0]
            named: Any = str(path.name).lower()
            with torch.no_grad():
                with lens.hooks.knockout(edges=cut, layers=[mixer.layer], path=named, mixers=mixer.kind):
                    wanted = lens.last_logits(repeated)
                with mixer.attributing(Weakened({path: in_rows(edges)}, 1.0)):
                    assert largest(lens.last_logits(repeated), wanted) < EXACT
