"""Edges are the general form of a knockout: any set of them equals the explicit form with just these entries zeroed."""

from __future__ import annotations

from typing import Any

import explicit
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, LAYERS, SSM, TRANSFORMERS, tiny, token_ids
from torch import Tensor

from mambalens.hooks import HookManager, Knockout, MambalensError
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut, distinct_rows
from mambalens.sweep.replay import UNCUT, Replay, Row, edge_sets

MODELS = {name: tiny(name) for name in CONFIGS}
MODEL_TOLERANCE = 1e-5  # DESIGN: several norms and scans of transformers round to float32
MIXER_TOLERANCE = 1e-9


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


@st.composite
def cases(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Random edges, of few different rows or of many, with some above the diagonal; layers, features, path."""
    batch, time, seed = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    density = draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    edges = torch.rand(batch, time, time, generator=generator) < density
    if draw(st.booleans()):  # many targets share a row
        kinds = torch.randint(0, 2, (batch, time), generator=generator)
        edges = edges[torch.arange(batch)[:, None], kinds.clamp_max(time - 1)]
    count = HookManager(MODELS[name]).mixers[0].n_features
    features = torch.rand(count, generator=generator) < 0.5 if draw(st.booleans()) else torch.ones(count).bool()
    layers = draw(st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS, unique=True))
    path = draw(st.sampled_from(["main", "conv", "both"] if name in SSM else ["main", "both"]))
    last = torch.randint(0, time, (batch,), generator=generator)
    last[0] = time - 1
    return {"ids": token_ids(batch, time, seed), "edges": edges, "features": features, "layers": layers, "path": path,
            "last": last, "generator": generator}  # fmt: skip


@pytest.mark.parametrize("name", SSM)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_edges_of_a_state_space_mixer_alone_equal_its_explicit_form(name: str, data: st.DataObject) -> None:
    """By one scan for every different row, and by effective attention: the two ways, one against the other."""
    case = data.draw(cases(name))
    mixer: Any = HookManager(MODELS[name]).mixers[1]
    batch, time = case["ids"].shape
    hidden = torch.randn(batch, time, 24, dtype=torch.float64, generator=case["generator"])
    sources, targets = torch.rand(2, batch, time, generator=case["generator"]) < 0.3
    paths = Paths.named(case["path"])
    cuts = [Cut.of_edges(case["edges"], case["features"], paths)]
    entries = case["edges"][..., None] & case["features"]
    if data.draw(st.booleans()):  # beside another knockout
        cuts.append(Cut.of(sources, targets, None, paths))
        entries = entries | (targets[:, :, None] & sources[:, None])[..., None]
    none = torch.zeros_like(entries)
    main, conv = (entries if path in paths else none for path in (Paths.MAIN, Paths.CONV))
    slow = explicit.SCANS[name](mixer.module, hidden, None, main, conv)
    with torch.no_grad():
        inputs, _ = mixer.inputs(hidden, None, cuts)
        for by_entries in (True, False, None):
            y, _ = mixer.mix(inputs, cuts, base=True, explicit=by_entries)
            assert largest((y + mixer.skip(inputs) * inputs.x).flatten(2), slow) < MIXER_TOLERANCE


@pytest.mark.parametrize("name", TRANSFORMERS)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_edges_of_one_attention_layer_equal_minus_infinity_scores(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    model = MODELS[name]
    hooks = HookManager(model)
    seen: list[Tensor] = []
    handle = hooks.mixers[0].module.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    try:
        with torch.no_grad():
            with hooks.knockout(edges=case["edges"], layers=[0], features=case["features"]):
                model(case["ids"])
            with explicit.explicit_model(model, name, {0: case["edges"][..., None] & case["features"]}, {}):
                model(case["ids"])
    finally:
        handle.remove()
    assert largest(seen[0], seen[1]) < MIXER_TOLERANCE


@pytest.mark.parametrize("name", list(CONFIGS))
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_edges_in_a_model_and_replayed_equal_the_explicit_form(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    model, ids, last = MODELS[name], case["ids"], case["last"]
    hooks = HookManager(model)
    entries = dict.fromkeys(case["layers"], case["edges"][..., None] & case["features"])
    chosen = (case["layers"], case["features"], case["path"])
    with torch.no_grad():
        base = model(ids).logits
        with hooks.apply(Knockout(None, None, *chosen, edges=case["edges"])):
            fast = model(ids).logits
        main = entries if case["path"] != "conv" else {}
        with explicit.explicit_model(model, name, main, entries if case["path"] != "main" else {}):
            slow = model(ids).logits
        assert largest(fast, slow) < MODEL_TOLERANCE
        assert torch.equal(model(ids).logits, base)
        other = torch.zeros_like(case["edges"])
        other[:, -1, 0] = True
        sources, targets, pairs = edge_sets([case["edges"], other])
        cutting = hooks.resolve(*chosen)
        memory = data.draw(st.sampled_from([2**30, 2**14, 1]))
        rows = [UNCUT, *(Row(cutting, of_mask) for of_mask in pairs)]
        replayed = dict(Replay(hooks, ids, last, sources, targets, memory).logits(rows))
        at = torch.arange(len(ids)), last
        assert largest(replayed[0], base[at]) < MODEL_TOLERANCE
        assert largest(replayed[1], fast[at]) < MODEL_TOLERANCE
        with hooks.apply(Knockout(None, None, *chosen, edges=other)):
            assert largest(replayed[2], model(ids).logits[at]) < MODEL_TOLERANCE


@pytest.mark.parametrize("name", list(CONFIGS))
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_sources_x_targets_say_the_same_as_their_edges(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name))
    hooks, ids = HookManager(MODELS[name]), case["ids"]
    sources, targets = torch.rand(2, *ids.shape, generator=case["generator"]) < 0.4
    mixer, edges = hooks.mixers[0], targets[:, :, None] & sources[:, None]
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = mixer.module.register_forward_hook(keep)
    try:
        with torch.no_grad():
            with hooks.knockout(sources, targets, [0], case["features"], case["path"]):
                hooks.model(ids)
            with hooks.knockout(None, None, [0], case["features"], case["path"], edges=edges):
                hooks.model(ids)
    finally:
        handle.remove()
    assert largest(seen[0], seen[1]) < (1e-6 if name == "mamba2" else MIXER_TOLERANCE)  # its norm rounds to float32


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "llama"])
def test_effective_attention_is_zero_on_the_edges_and_nowhere_else(name: str) -> None:
    hooks, ids = HookManager(MODELS[name]), token_ids(2, 7)
    edges = (torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.4).tril()
    whole = hooks.effective_attention(ids, 1)
    with hooks.knockout(edges=edges, layers=[1]):
        cut = hooks.effective_attention(ids, 1)
    assert (cut[edges[:, None].expand_as(cut)] == 0).all()
    stays = (~edges).tril()[:, None].expand_as(cut)
    if name == "llama":  # where a row has something left, the other weights grow
        assert (cut[stays] >= whole[stays] - 1e-12).all()
    else:
        assert torch.equal(cut[stays], whole[stays])


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "llama"])
@pytest.mark.parametrize("path", ["main", "both"])
def test_generation_under_edges_is_what_repeated_passes_give(name: str, path: str) -> None:
    model, ids = MODELS[name], token_ids(2, 6)
    edges = torch.zeros(9, 9, dtype=torch.bool)
    edges[3, [0, 1]] = edges[5, 2] = edges[7, [1, 6]] = True  # the last row is generated
    hooks, grown = HookManager(model), ids
    with torch.no_grad(), hooks.knockout(edges=edges, path=path):
        out = model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(ids))
    for length in (6, 7, 8):
        with torch.no_grad(), hooks.knockout(edges=edges[:length, :length], path=path):
            grown = torch.cat([grown, model(grown).logits[:, -1:].argmax(-1)], 1)
    assert out.tolist() == grown.tolist()


def test_what_lies_above_the_diagonal_says_nothing() -> None:
    edges = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    for name in ("mamba1", "llama"):
        model, ids, hooks = MODELS[name], token_ids(2, 6), HookManager(MODELS[name])
        found = []
        for mask in (edges, edges.tril(), edges.triu(1)):
            with torch.no_grad(), hooks.knockout(edges=mask, path="both"):
                found.append(model(ids).logits)
        with torch.no_grad():
            assert torch.equal(found[0], found[1]) and torch.equal(found[2], model(ids).logits)


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 4), time=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_distinct_rows_give_the_edges_back(batch: int, time: int, seed: int) -> None:
    edges = torch.rand(batch, time, time, generator=torch.Generator().manual_seed(seed)) < 0.3
    code, rows = distinct_rows(edges)
    assert not rows[0].any()
    for b in range(batch):
        assert torch.equal(rows[code[b], b], edges[b])
        different = {tuple(row) for row in edges[b].tolist()} - {(False,) * time}
        assert set(code[b].tolist()) - {0} == set(range(1, len(different) + 1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "sources and targets, or edges"),
        ({"sources": [0], "targets": [1], "edges": torch.ones(4, 4).bool()}, "sources and targets, or edges"),
        ({"sources": [0]}, "targets is missing"),
        ({"edges": torch.ones(4, 4)}, "edges are torch.float32 numbers"),
        ({"edges": torch.ones(4, 5).bool()}, r"edges is a mask of shape \[4, 5\]"),
        ({"edges": torch.ones(3, 3).bool()}, r"edges is a mask of shape \[3, 3\], but the input has shape \[2, 4\]"),
        (
            {"edges": torch.ones(3, 4, 4).bool()},
            r"edges is a mask of shape \[3, 4, 4\], but the input has shape \[2, 4\]",
        ),
    ],
)
def test_edges_that_cannot_be_are_refused(arguments: dict[str, Any], said: str) -> None:
    hooks = HookManager(MODELS["llama"])
    with pytest.raises(MambalensError, match=said), hooks.knockout(**arguments):
        hooks.model(token_ids(2, 4))


def test_a_target_past_the_input_is_refused() -> None:
    hooks = HookManager(MODELS["llama"])
    edges = torch.zeros(7, 7, dtype=torch.bool)
    edges[6, 0] = True
    with pytest.raises(MambalensError, match="Position 6 is out of range"), hooks.knockout(edges=edges):
        hooks.model(token_ids(2, 4), use_cache=False)
