"""Patching by replay equals plain PyTorch hooks and swapped caches, one prompt and one patch at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ARCHITECTURES, CONFIGS, architecture, in_double, tiny, token_ids
from patches import by_cache, by_hooks, changed_input, changed_output
from torch import Tensor

from mambalens.hooks import HookManager
from mambalens.hooks.sublayers import sublayers_of
from mambalens.interventions.walk import PatchReplay, Prompts, Scores, Spot

TIME, LAST = 8, (7, 4, 7, 5)
"""Two prompts, and two of other lengths that they are patched from."""


def model_of(name: str) -> Any:
    return tiny(name) if name in CONFIGS else architecture(name)


def whole(logits: Tensor, prompts: Tensor) -> Tensor:
    """Scores that are the logits themselves."""
    return logits


def replayed(
    hooks: HookManager, site: str, windows: list[list[int]], ids: Tensor, spots: list[Spot], memory: int = 2**30,
    last: tuple[int, ...] = LAST,
) -> Scores:  # fmt: skip
    return PatchReplay(hooks, site, windows, memory).scores(Prompts(ids, torch.tensor(last)), spots, whole)


def windows_of(hooks: HookManager) -> list[list[int]]:
    """Single layers, and windows that begin together, have gaps, and reach to the end."""
    last = hooks.n_layers - 1
    return [[1], [last], [0, last], list(range(1, last + 1))]


NAMES = [*CONFIGS, *(name for name in ARCHITECTURES if name not in CONFIGS)]


@pytest.mark.parametrize("name", NAMES)
def test_the_residual_stream_of_another_prompt_as_with_hooks(name: str) -> None:
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(4, TIME)
    windows = windows_of(hooks)
    spots = [
        *(Spot(0, 2, (p,), (p,)) for p in (0, 3, LAST[0])),
        *(Spot(1, 3, (p,), (p + 1,)) for p in (1, 3, LAST[1])),
        Spot(1, 2, (1, 2, 4), (6, 0, 7)),
        Spot(0, 1, (2, 5), (4, 2)),
    ]
    with torch.no_grad(), in_double(model):
        found = replayed(hooks, "residual", windows, ids, spots)
        for number, (prompt, other, positions, others) in enumerate(spots):
            for at, layers in enumerate(windows):
                modules = [hooks.layers[layer] for layer in layers]
                one, two = ids[prompt, : LAST[prompt] + 1], ids[other, : LAST[other] + 1]
                expected = by_hooks(model, changed_input, modules, one, two, positions, others)
                assert (found.patched[number, at] - expected).abs().max() < 1e-9
        for prompt, last in enumerate(LAST):
            assert (found.base[prompt] - model(ids[prompt : prompt + 1, : last + 1]).logits[0, -1]).abs().max() < 1e-9
        checked, again = found.uncut
        assert checked and (again - found.base[checked]).abs().max() < 1e-9


ADDS_THE_STREAM_ITSELF = "bloom"


@pytest.mark.parametrize("site", ["mixer", "mlp"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != ADDS_THE_STREAM_ITSELF])
def test_what_mixers_and_mlps_give_in_another_prompt_as_with_hooks(name: str, site: str) -> None:
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(4, TIME)
    sublayers = [[s for s in of_layer if s.part == site] for of_layer in sublayers_of(hooks.layers, hooks.mixers)]
    if not any(sublayers):
        pytest.skip(f"has no {site}")
    windows = windows_of(hooks)
    spots = [
        *(Spot(0, 2, (p,), (p,)) for p in (0, 4, LAST[0])),
        Spot(1, 3, (2,), (4,)),
        Spot(1, 2, (1, 2, 4), (6, 0, 7)),
    ]
    with torch.no_grad(), in_double(model):
        found = replayed(hooks, site, windows, ids, spots)
        for number, (prompt, other, positions, others) in enumerate(spots):
            for at, layers in enumerate(windows):
                modules = [sublayer.module for layer in layers for sublayer in sublayers[layer]]
                one, two = ids[prompt, : LAST[prompt] + 1], ids[other, : LAST[other] + 1]
                expected = by_hooks(model, changed_output, modules, one, two, positions, others)
                assert (found.patched[number, at] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_another_prompt_as_with_its_cache(name: str) -> None:
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(4, TIME)
    windows = windows_of(hooks)
    spots = [
        *(Spot(0, 2, (p,), (p,)) for p in (0, 2, 5, LAST[0])),
        *(Spot(1, 3, (p,), (p,)) for p in (1, 3)),
    ]
    with torch.no_grad(), in_double(model):
        found = replayed(hooks, "state", windows, ids, spots)
        for number, (prompt, other, (position,), _) in enumerate(spots):
            for at, layers in enumerate(windows):
                one, two = ids[prompt, : LAST[prompt] + 1], ids[other, : LAST[other] + 1]
                expected = by_cache(model, layers, one, two, position)
                assert (found.patched[number, at] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("site", ["residual", "mixer", "state"])
def test_a_prompt_patched_with_itself_is_as_it_was(name: str, site: str) -> None:
    hooks, ids = HookManager(model_of(name)), token_ids(4, TIME)
    spots = [Spot(i, i, (p,), (p,)) for i in range(4) for p in range(LAST[i] + 1)]
    found = replayed(hooks, site, windows_of(hooks), ids, spots)
    base = found.base[[spot.prompt for spot in spots]][:, None]
    assert (found.patched - base).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_everything_patched_before_the_first_layer_is_the_other_prompt(name: str) -> None:
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(2, TIME)
    everywhere = tuple(range(TIME))
    with torch.no_grad(), in_double(model):
        found = replayed(hooks, "residual", [[0]], ids, [Spot(0, 1, everywhere, everywhere)], last=(7, 7))
    if name in ("zamba", "zamba2"):  # whose later layers read the embeddings beside the residual stream
        return
    assert (found.patched[0, 0] - found.base[1]).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "mistral", "falcon_h1", "qwen3_next", "bloom"])
@pytest.mark.parametrize("memory", [2**14, 1])
def test_little_memory_changes_nothing(name: str, memory: int) -> None:
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(4, TIME)
    spots = [Spot(i, i + 2, (p,), (p,)) for i in range(2) for p in (0, 2, LAST[i])]
    for site in ("residual", "mixer", "state"):
        with in_double(model):
            found = replayed(hooks, site, windows_of(hooks), ids, spots, memory)
            expected = replayed(hooks, site, windows_of(hooks), ids, spots)
        assert (found.patched - expected.patched).abs().max() < 1e-9
        assert (found.base - expected.base).abs().max() < 1e-9
        assert found.uncut[0] and (found.uncut[1] - found.base[found.uncut[0]]).abs().max() < 1e-9
