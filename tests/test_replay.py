"""Replay equals the eager hooks: random models, positions, windows, features and paths, mixed lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, LAYERS, SSM, TRANSFORMERS, tiny, token_ids

from mambalens.hooks import GROUPS, HookManager
from mambalens.replay import LastKnockout, Replay

MODELS = {
    (name, kind): tiny(name, attention=kind)
    for name in CONFIGS
    for kind in ("sdpa", "eager")
    if name in TRANSFORMERS or kind == "sdpa"
}


@pytest.mark.parametrize(("name", "attention"), list(MODELS))
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_replay_equals_the_eager_hooks(name: str, attention: str, data: st.DataObject) -> None:
    model = MODELS[name, attention]
    hooks = HookManager(model)
    batch, time = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    ids, last = token_ids(batch, time, seed), torch.randint(0, time, (batch,), generator=generator)
    last[0] = time - 1
    density = data.draw(st.sampled_from([0.2, 0.6, 1.0]))
    inside = torch.arange(time) <= last[:, None]
    sources = (torch.rand(2, batch, time, generator=generator) < density) & inside
    targets = torch.nn.functional.one_hot(last, time).bool()
    cuts, arguments = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        layers = data.draw(st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS, unique=True))
        source = data.draw(st.integers(0, 1))
        path = data.draw(st.sampled_from(["main", "conv", "both"] if name in SSM else ["main", "both"]))
        group = data.draw(st.sampled_from(["mask", *(GROUPS if name in SSM else ["all"])]))
        features = torch.rand(hooks.mixers[0].n_features, generator=generator) < 0.5 if group == "mask" else group
        masks = hooks.feature_masks(features, layers)
        cuts.append(LastKnockout(layers, source + 1, path != "conv", path != "main", masks))
        arguments.append((sources[source], targets, layers, features, path))
    with torch.no_grad():
        replayed = list(Replay(hooks, ids, last, sources).logits(cuts))
        base = model(ids).logits
        for number, given in enumerate(arguments):
            with hooks.knockout(*given):
                eager = model(ids).logits[torch.arange(batch), last]
            assert (replayed[number] - eager).abs().max() < 1e-5
        assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_replay_in_float32(name: str) -> None:
    model = tiny(name, torch.float32)
    hooks = HookManager(model)
    ids, last = token_ids(2, 8), torch.tensor([7, 5])
    sources = torch.zeros(1, 2, 8, dtype=torch.bool)
    sources[:, :, 1:4] = True
    cuts = [LastKnockout([start, start + 1], 1, True, True, {}) for start in range(LAYERS - 1)]
    with torch.no_grad():
        for number, logits in enumerate(Replay(hooks, ids, last, sources).logits(cuts)):
            with hooks.knockout(
                sources[0], torch.nn.functional.one_hot(last, 8).bool(), cuts[number].layers, path="both"
            ):
                eager = model(ids).logits[torch.arange(2), last]
            assert (logits - eager).abs().max() < 1e-4 * eager.abs().max()
