"""Patching by replay equals plain PyTorch hooks and swapped caches, one prompt and one patch at a time."""

from __future__ import annotations

import functools
import itertools
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, CONFIGS, architecture, in_double, tiny, token_ids
from patches import by_cache, by_hooks, by_twins, changed_output, changed_stream, seen_by_hooks
from torch import Tensor

from mambalens.hooks import HookManager
from mambalens.hooks.sublayers import sublayers_of
from mambalens.interventions.groups import Prompts, Spot, begins_of
from mambalens.interventions.walk import PatchReplay, Scores

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


def windows_of(hooks: HookManager, site: str = "") -> list[list[int]]:
    """Single layers, and windows that begin together, have gaps, and reach to the end."""
    last = hooks.n_layers - 1
    behind = [[0], [last + 1], [0, last + 1], [last, last + 1]] if site == "residual" else []
    return [[1], [last], [0, last], list(range(1, last + 1)), *behind]


NAMES = [*CONFIGS, *(name for name in ARCHITECTURES if name not in CONFIGS)]


@pytest.mark.parametrize("name", NAMES)
def test_the_residual_stream_of_another_prompt_as_with_hooks(name: str) -> None:
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(4, TIME)
    ids[2, 3:] = ids[0, 3:]  # as prompts in the same words have them
    windows = windows_of(hooks, "residual")
    spots = [
        *(Spot(0, 2, (p,), (p,)) for p in (0, 3, LAST[0])),
        *(Spot(1, 3, (p,), (p + 1,)) for p in (1, 3, LAST[1])),
        Spot(1, 2, (1, 2, 4), (6, 0, 7)),
        Spot(0, 1, (2, 5), (4, 2)),
    ]
    with torch.no_grad(), in_double(model):
        found = replayed(hooks, "residual", windows, ids, spots)
        put = functools.partial(changed_stream, hooks.layers)
        for number, (prompt, other, positions, others) in enumerate(spots):
            one, two = ids[prompt, : LAST[prompt] + 1], ids[other, : LAST[other] + 1]
            seen = seen_by_hooks(model, put, itertools.chain(*windows), two)
            for at, layers in enumerate(windows):
                expected = by_hooks(model, put, layers, one, seen, positions, others)
                assert (found.patched[number, at] - expected).abs().max() < 1e-9
        for prompt, last in enumerate(LAST):
            assert (found.base[prompt] - model(ids[prompt : prompt + 1, : last + 1]).logits[0, -1]).abs().max() < 1e-9
        checked, again = found.uncut
        assert checked and (again - found.base[checked]).abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_last_position_behind_the_last_layer_is_the_other_answer(name: str) -> None:
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(4, TIME)
    spots = [Spot(i, i + 2, (p,), (LAST[i + 2] if p == LAST[i] else p,)) for i in range(2) for p in range(LAST[i] + 1)]
    with torch.no_grad(), in_double(model):
        found = replayed(hooks, "residual", [[hooks.n_layers]], ids, spots)
    for spot, patched in zip(spots, found.patched[:, 0], strict=True):
        if spot.positions == (LAST[spot.prompt],):
            assert (patched - found.base[spot.other]).abs().max() < 1e-9
        else:
            assert torch.equal(patched, found.base[spot.prompt])


def test_rows_begin_where_something_changes() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 6, 3, 0]])
    one, two = {0, 1, 4}, {0}  # windows of layers, in a model of four: 4 is behind the last

    def begin(spot: Spot, site: str = "residual", noise: Tensor | None = None) -> list[Any]:
        return list(begins_of(Prompts(ids, torch.tensor([3, 2]), noise), [spot], [one, two, {4}], site, 4))

    assert begin(Spot(0, 1, (0,), (0,))) == [(4, (0, 0, None))]
    assert begin(Spot(0, 1, (1,), (1,))) == [(3, (1, None, None))]  # the same token: nothing before layer 0
    assert begin(Spot(0, 1, (1,), (1,)), noise=torch.eye(2)[:, None, :].repeat(1, 4, 1)) == [(3, (0, 0, None))]
    assert begin(Spot(0, 1, (1,), (0,))) == [(3, (0, 0, None))]
    assert begin(Spot(0, 1, (1, 3), (1, 2))) == [(3, (0, 0, 4))]  # behind the last layer the last position is read
    assert begin(Spot(0, 1, (1,), (1,)), "value") == [(3, (0, 0, 4))]
    assert begin(Spot(0, 1, (3,), (3,)), "state") == []
    assert begin(Spot(1, 1, (2,), (2,))) == [(1, (1, None, 4))]


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
        of_windows = [[sublayer.module for layer in layers for sublayer in sublayers[layer]] for layers in windows]
        for number, (prompt, other, positions, others) in enumerate(spots):
            one, two = ids[prompt, : LAST[prompt] + 1], ids[other, : LAST[other] + 1]
            seen = seen_by_hooks(model, changed_output, itertools.chain(*of_windows), two)
            for at, modules in enumerate(of_windows):
                expected = by_hooks(model, changed_output, modules, one, seen, positions, others)
                assert (found.patched[number, at] - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_the_value_of_another_prompt_as_with_a_knockout_that_puts_it_in(name: str) -> None:
    """And as in plain PyTorch: explicit forms of recurrences, what attention's projection of values gives."""
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(4, TIME)
    windows = [layers for layers in windows_of(hooks) if hooks.mixers_of(layers)]
    spots = [
        *(Spot(0, 2, (p,), (p,)) for p in (0, 4, LAST[0])),
        Spot(1, 3, (2,), (4,)),
        Spot(1, 2, (1, 2, 4), (6, 0, 7)),
    ]
    with torch.no_grad(), in_double(model):
        found = replayed(hooks, "value", windows, ids, spots)
        for number, (prompt, other, positions, others) in enumerate(spots):
            one, two = ids[prompt, : LAST[prompt] + 1], ids[other, : LAST[other] + 1]
            given = hooks.values(two[None])
            for at, layers in enumerate(windows):
                patched = found.patched[number, at]
                assert (patched - by_knockout(hooks, layers, one, positions, given, others)).abs().max() < 1e-9
                of_mixers = [
                    next(part for part in given.of[mixer] if part is not None)[0, list(others)]
                    for mixer in hooks.mixers_of(layers)
                ]
                expected = by_twins(hooks, layers, one, positions, of_mixers)
                assert expected is None or (patched - expected).abs().max() < 1e-9
        checked, again = found.uncut
        assert checked and (again - found.base[checked]).abs().max() < 1e-9


def by_knockout(hooks: HookManager, layers: Any, ids: Tensor, positions: Any, values: Any, others: Any) -> Tensor:
    """Logits behind a prompt whose later positions are cut from some and read others' values there."""
    columns = torch.arange(len(ids)).clamp_max(values.shape[1] - 1)[None].clone()
    columns[0, list(positions)] = torch.tensor(others)
    instead = values.at(torch.zeros_like(columns), columns)
    with ExitStack() as stack:
        for kind in {mixer.kind for mixer in hooks.mixers_of(layers)}:
            path = "conv" if kind == "shortconv" else "main"
            every = list(range(len(ids)))
            stack.enter_context(hooks.knockout(list(positions), every, layers, "all", path, kind, instead=instead))
        return hooks.model(ids[None], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("name", ["llama", "mamba2"])
def test_where_the_prompt_weighs_nothing_the_values_are_the_whole_answer(name: str) -> None:
    """With weights that do not depend on the prompt, values of every position in every layer carry all there is."""
    model = model_of(name)
    for module in model.modules():
        if name == "llama" and hasattr(module, "q_proj"):
            module.q_proj.weight.data.zero_()
        if name == "mamba2" and hasattr(module, "A_log"):
            module.in_proj.weight.data[2 * module.intermediate_size :].zero_()  # of B, C and dt
            module.D.data.zero_()  # which carries what the convolution has read past the scan
    hooks, ids = HookManager(model), token_ids(2, TIME)
    ids[1, -1] = ids[0, -1]
    every, layers = tuple(range(TIME)), list(range(hooks.n_layers))
    with torch.no_grad(), in_double(model):
        found = replayed(hooks, "value", [layers, layers[1:]], ids, [Spot(0, 1, every, every)], last=(7, 7))
        assert (found.patched[0, 0] - found.base[1]).abs().max() < 1e-9
        assert (found.patched[0, 1] - found.base[1]).abs().max() > 1e-3


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
@pytest.mark.parametrize("site", ["residual", "mixer", "value", "state"])
def test_a_prompt_patched_with_itself_is_as_it_was(name: str, site: str) -> None:
    hooks, ids = HookManager(model_of(name)), token_ids(4, TIME)
    spots = [Spot(i, i, (p,), (p,)) for i in range(4) for p in (0, LAST[i] // 2, LAST[i])]
    windows = [layers for layers in windows_of(hooks, site) if site != "value" or hooks.mixers_of(layers)]
    found = replayed(hooks, site, windows, ids, spots)
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
def test_little_memory_changes_nothing(name: str) -> None:
    """Down to a row at a time."""
    model = model_of(name)
    hooks, ids = HookManager(model), token_ids(4, TIME)
    spots = [Spot(i, i + 2, (p,), (p,)) for i in range(2) for p in (0, 2, LAST[i])]
    for site in ("residual", "mixer", "value", "state"):
        windows = windows_of(hooks, site)[1::2]  # one layer, several, and behind the last
        with in_double(model):
            expected = replayed(hooks, site, windows, ids, spots)
            for memory in (2**14, 1):
                found = replayed(hooks, site, windows, ids, spots, memory)
                assert (found.patched - expected.patched).abs().max() < 1e-9
                assert (found.base - expected.base).abs().max() < 1e-9
                assert found.uncut[0] and (found.uncut[1] - found.base[found.uncut[0]]).abs().max() < 1e-9
