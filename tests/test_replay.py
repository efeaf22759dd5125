"""Replay equals the eager hooks: random models, sources, targets, windows, features and paths, mixed lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGS, LAYERS, SSM, TRANSFORMERS, tiny, token_ids
from replays import Replayed, replayed

from mambalens.hooks import GROUPS, HookManager

MODELS = {
    (name, kind): tiny(name, attention=kind)
    for name in CONFIGS
    for kind in ("sdpa", "eager")
    if name in TRANSFORMERS or kind == "sdpa"
}


def eager(model: Any, hooks: HookManager, ids: torch.Tensor, last: torch.Tensor, arguments: tuple[Any, ...]) -> Any:
    """Logits behind the last tokens by one hooked forward pass."""
    with hooks.knockout(*arguments):
        return model(ids).logits[torch.arange(len(ids)), last]


@pytest.mark.parametrize(("name", "attention"), list(MODELS))
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_replay_equals_the_eager_hooks(name: str, attention: str, data: st.DataObject) -> None:
    model = MODELS[name, attention]
    hooks = HookManager(model)
    batch, time = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    ids, last = token_ids(batch, time, seed), torch.randint(0, time, (batch,), generator=generator)
    last[0] = time - 1
    inside = torch.arange(time) <= last[:, None]

    def positions(densities: list[float], sets: int) -> torch.Tensor:
        density = data.draw(st.sampled_from(densities))
        return (torch.rand(sets, batch, time, generator=generator) < density) & inside

    sources = positions([0.2, 0.6, 1.0], 2)
    targets = torch.nn.functional.one_hot(last, time).bool()
    if data.draw(st.booleans()):  # anywhere: also left of the last position, and not the last at all
        targets = positions([0.2, 0.6, 1.0], 1)[0]
    knockouts, arguments = [], [([], [])]
    for _ in range(data.draw(st.integers(1, 4))):
        layers = data.draw(st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS, unique=True))
        source = data.draw(st.integers(0, 1))
        path = data.draw(st.sampled_from(["main", "conv", "both"] if name in SSM else ["main", "both"]))
        group = data.draw(st.sampled_from(["mask", *(GROUPS if name in SSM else ["all"])]))
        features = torch.rand(hooks.mixers[0].n_features, generator=generator) < 0.5 if group == "mask" else group
        knockouts.append(Replayed(source, layers, features, path))
        arguments.append((sources[source], targets, layers, features, path))
    memory = data.draw(st.sampled_from([2**30, 2**14, 1]))  # down to one knockout and one source set at a time
    with torch.no_grad():
        found = replayed(hooks, ids, last, sources, targets, knockouts, memory)
        base = model(ids).logits
        for number, given in enumerate(arguments):
            assert (found[number] - eager(model, hooks, ids, last, given)).abs().max() < 1e-5
        assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("targets", [None, [3, 5, 6]])
def test_replay_in_float32(name: str, targets: list[int] | None) -> None:
    model = tiny(name, torch.float32)
    hooks = HookManager(model)
    ids, last = token_ids(2, 8), torch.tensor([7, 5])
    sources = torch.zeros(1, 2, 8, dtype=torch.bool)
    sources[:, :, 1:4] = True
    target_mask = torch.nn.functional.one_hot(last, 8).bool()
    if targets is not None:
        target_mask = torch.zeros(2, 8, dtype=torch.bool)
        target_mask[:, targets] = True
        target_mask[1, 6] = False
    windows = [[start, start + 1] for start in range(LAYERS - 1)]
    knockouts = [Replayed(0, layers, path="both") for layers in windows]
    with torch.no_grad():
        for number, logits in replayed(hooks, ids, last, sources, target_mask, knockouts).items():
            layers = windows[number - 1] if number else []
            expected = eager(model, hooks, ids, last, (sources[0], target_mask, layers, "all", "both"))
            assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_rows_see_no_column_behind_their_prompt(name: str) -> None:
    """The tokens that fill a batch up change nothing."""
    hooks = HookManager(MODELS[name, "sdpa"])
    ids, last = token_ids(3, 9), torch.tensor([8, 2, 5])
    sources = torch.zeros(1, 3, 9, dtype=torch.bool)
    sources[:, :, 1] = True
    targets = torch.zeros(3, 9, dtype=torch.bool)
    targets[:, 1:3] = True
    other = torch.where(torch.arange(9) <= last[:, None], ids, token_ids(3, 9, seed=5))
    knockouts = [Replayed(0, [0, 1], path="both")]
    one, two = (replayed(hooks, tokens, last, sources, targets, knockouts) for tokens in (ids, other))
    for number in one:
        assert (one[number] - two[number]).abs().max() < 1e-12
