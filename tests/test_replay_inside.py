"""Replay inside knockouts and steering that run around it equals the eager hooks, nested in the same way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ARCHITECTURES, CONFIGS, VOCABULARY, architecture, has_keys, in_double, tiny, token_ids
from replays import Replayed, replayed
from torch import Tensor
from verbs import KINDS

from mambalens import Lens, load_facts
from mambalens.hooks import HookManager
from mambalens.hooks.knockout import Knockout, Paths
from mambalens.interventions.hooked import HOOKED, hooked_scores
from mambalens.interventions.sites import layers_with, windows_with
from mambalens.interventions.walk import PatchReplay, Prompts, Spot

TOLERANCE = 1e-5
"""Through models whose norms and scans round to float32 whatever their dtype."""
IN_DOUBLE = 1e-9
MODELS = list(CONFIGS)
"""With the attention that transformers chooses; its plain form is tried in `ARCHITECTURES`, exactly."""
OTHERS = [name for name in ARCHITECTURES if name not in KINDS]
"""What blocks do to each other depends on the mixers; these have the mixers of `KINDS`, called in other ways."""
Draw = Callable[[Any], Any]


@functools.cache
def configured(name: str) -> HookManager:
    return HookManager(tiny(name, attention="sdpa"))


@functools.cache
def hooked(model_type: str) -> HookManager:
    return HookManager(architecture(model_type))


def features_of(hooks: HookManager, mixers: list[Any], generator: torch.Generator, draw: Draw) -> Any:
    """A random mask where all mixers have as many features, or a group."""
    counts = {mixer.n_features for mixer in mixers}
    if len(counts) == 1 and draw(st.booleans()):
        return torch.rand(counts.pop(), generator=generator) < draw(st.sampled_from([0.3, 0.7]))
    return "all"


def layers_and_path(hooks: HookManager, draw: Draw) -> tuple[list[int], str, list[Any]]:
    layers = draw(st.lists(st.integers(0, hooks.n_layers - 1), min_size=1, max_size=hooks.n_layers, unique=True))
    mixers = hooks.mixers_of(layers)
    paths = [path for path in ("main", "conv", "erase", "both") if any(Paths.named(path) & m.paths for m in mixers)]
    return layers, draw(st.sampled_from(paths or ["both"])), mixers


def around(
    hooks: HookManager, batch: int, time: int, generator: torch.Generator, draw: Draw, replaced: bool
) -> list[Callable[[], Any]]:
    """Random blocks that say the same of all prompts, the outermost first."""
    found: list[Callable[[], Any]] = []

    def some(density: float) -> list[int]:
        at = (torch.rand(time, generator=generator) < density).nonzero().flatten().tolist()
        return at or [int(torch.randint(0, time, (1,), generator=generator))]

    for _ in range(draw(st.integers(1, 2))):
        layers, path, mixers = layers_and_path(hooks, draw)
        if not mixers:
            continue
        features = features_of(hooks, mixers, generator, draw)
        instead = None
        if replaced and path != "erase" and draw(st.booleans()):
            other = torch.randint(1, VOCABULARY, (1, time), generator=generator)
            instead = hooks.values(other, keys=draw(st.booleans()) and has_keys(hooks))
        if draw(st.booleans()):
            edges = torch.rand(time, time, generator=generator) < draw(st.sampled_from([0.1, 0.6]))
            given: dict[str, Any] = {"edges": edges}
        else:
            sources, targets = some(draw(st.sampled_from([0.2, 0.7]))), some(draw(st.sampled_from([0.2, 0.7])))
            given = {"sources": sources, "targets": [-1] if draw(st.booleans()) else targets}
        one = Knockout(layers=layers, features=features, path=path, instead=instead, **given)  # type: ignore[arg-type]
        found.append(functools.partial(hooks.apply, one))
    if draw(st.booleans()):
        width = hooks.model.get_input_embeddings().weight.shape[1]
        vector = torch.randn(width, generator=generator, dtype=torch.float64)
        layers = draw(st.lists(st.integers(0, hooks.n_layers - 1), min_size=1, max_size=2, unique=True))
        positions = None if draw(st.booleans()) else some(0.4)
        found.insert(draw(st.integers(0, len(found))), functools.partial(hooks.add, vector, layers, positions, 0.5))
    return found


@contextmanager
def inside(blocks: list[Callable[[], Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block())
        yield


def drawn_prompts(draw: Draw) -> tuple[Tensor, Tensor, torch.Generator]:
    batch, time, seed = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    last = torch.randint(0, time, (batch,), generator=generator)
    last[0] = time - 1
    return token_ids(batch, time, seed), last, generator


def misses(hooks: HookManager, draw: Draw) -> float:
    """How far replays inside random blocks are from hooked passes inside them, at most."""
    ids, last, generator = drawn_prompts(draw)
    batch, time = ids.shape
    reach = torch.arange(time) <= last[:, None]

    def positions(densities: list[float], sets: int) -> Tensor:
        return (torch.rand(sets, batch, time, generator=generator) < draw(st.sampled_from(densities))) & reach

    blocks = around(hooks, batch, time, generator, draw, replaced=True)
    sources = positions([0.2, 0.6, 1.0], 2)
    targets = torch.nn.functional.one_hot(last, time).bool()
    if draw(st.booleans()):
        targets = positions([0.3, 1.0], 1)[0]
    instead = None
    if draw(st.booleans()):
        ids = torch.randint(1, VOCABULARY, (batch, time), generator=generator)
        other = hooks.values(ids, keys=draw(st.booleans()) and has_keys(hooks))
        instead = other
    knockouts, arguments = [], []
    for _ in range(draw(st.integers(1, 3))):
        layers, path, mixers = layers_and_path(hooks, draw)
        if not mixers or (instead is not None and path == "erase"):
            continue
        source, features = draw(st.integers(0, 1)), features_of(hooks, mixers, generator, draw)
        knockouts.append(Replayed(source, layers, features, path))  # type: ignore[arg-type]
        arguments.append((sources[source], targets, layers, features, path))
    memory = draw(st.sampled_from([2**30, 1]))
    rows = torch.arange(batch)
    with torch.no_grad(), inside(blocks):
        found = replayed(hooks, ids, last, sources, targets, knockouts, memory, instead)
        expected = [hooks.model(ids).logits[rows, last]]
        for given in arguments:
            with hooks.knockout(*given, instead=instead):
                expected.append(hooks.model(ids).logits[rows, last])
    return max(float((found[number] - logits).abs().max()) for number, logits in enumerate(expected))


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_replay_equals_the_eager_hooks(name: str, data: st.DataObject) -> None:
    assert misses(configured(name), data.draw) < TOLERANCE


@pytest.mark.parametrize("model_type", list(KINDS))
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_replay_equals_the_eager_hooks_in_every_kind_of_mixer(model_type: str, data: st.DataObject) -> None:
    hooks = hooked(model_type)
    with in_double(hooks.model):
        assert misses(hooks, data.draw) < IN_DOUBLE


@pytest.mark.parametrize("model_type", OTHERS)
@settings(deadline=None, max_examples=2)
@given(data=st.data())
def test_replay_equals_the_eager_hooks_in_every_other_architecture(model_type: str, data: st.DataObject) -> None:
    hooks = hooked(model_type)
    with in_double(hooks.model):
        assert misses(hooks, data.draw) < IN_DOUBLE


def patches_miss(hooks: HookManager, draw: Draw) -> float:
    """How far patches by replay inside random blocks are from hooked patches inside them, at most."""
    ids, last, generator = drawn_prompts(draw)
    batch, time = ids.shape
    blocks = around(hooks, batch, time, generator, draw, replaced=True)
    site = draw(st.sampled_from([site for site in HOOKED if site != "value" and layers_with(site, hooks)]))
    windows = windows_with(site, draw(st.integers(1, 2)), hooks)
    spots = []
    for _ in range(draw(st.integers(1, 3))):
        one = int(torch.randint(0, batch, (1,), generator=generator))
        other = (one + 1) % batch  # a prompt that gives is itself left alone
        at = int(torch.randint(0, int(last[one]) + 1, (1,), generator=generator))
        there = int(torch.randint(0, int(last[other]) + 1, (1,), generator=generator))
        spots.append(Spot(one, other, (at,), (there if batch > 1 else at,)))
    width = hooks.model.get_input_embeddings().weight.shape[1]
    noise = None
    if draw(st.booleans()):
        noise = torch.randn(batch, time, width, generator=generator, dtype=torch.float64)
    prompts = Prompts(ids, last, noise)

    def score(logits: Tensor, of: Tensor) -> Tensor:
        return logits

    with inside(blocks):
        found = PatchReplay(hooks, site, windows, draw(st.sampled_from([2**30, 1]))).scores(prompts, spots, score)
        expected = hooked_scores(hooks, site, windows, prompts, spots, score)
    uncut, again = found.uncut
    apart = [found.base - expected.base, found.patched - expected.patched]
    apart += [again - found.base[uncut]] if uncut else []
    return max(float(one.abs().max()) for one in apart)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_patches_equal_hooked_patches(name: str, data: st.DataObject) -> None:
    assert patches_miss(configured(name), data.draw) < TOLERANCE


@pytest.mark.parametrize("model_type", list(KINDS))
@settings(deadline=None, max_examples=5)
@given(data=st.data())
def test_patches_equal_hooked_patches_in_every_kind_of_mixer(model_type: str, data: st.DataObject) -> None:
    hooks = hooked(model_type)
    with in_double(hooks.model):
        assert patches_miss(hooks, data.draw) < IN_DOUBLE


@pytest.mark.parametrize("model_type", OTHERS)
@settings(deadline=None, max_examples=2)
@given(data=st.data())
def test_patches_equal_hooked_patches_in_every_other_architecture(model_type: str, data: st.DataObject) -> None:
    hooks = hooked(model_type)
    with in_double(hooks.model):
        assert patches_miss(hooks, data.draw) < IN_DOUBLE


def test_what_is_told_prompt_by_prompt_goes_by_hooks_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = Lens.load("atlas-mamba1")
    facts = load_facts("atlas")[:2]
    width = lens.model.config.hidden_size
    mask = torch.zeros(2, max(len(lens.prompt(fact).ids) for fact in facts), dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = True
    told: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("mambalens.sweep.checks.tell", lambda event, **more: told.append((event, more)))
    for block in (
        lens.hooks.knockout(mask, [4], layers=[2]),
        lens.hooks.knockout([[1], [2]], [4], layers=[2]),
        lens.hooks.add(torch.randn(2, width), [2]),
    ):
        told.clear()
        with block, pytest.warns(UserWarning, match="told prompt by prompt"):
            swept = lens.sweep(facts, "subject", window=[[3, 4]], progress=False)
        assert len(swept.table) == 2 and not len(swept.checks)
        assert told[0][0] == "no replay"


def test_a_sweep_inside_a_knockout_is_checked_against_the_cut_model() -> None:
    lens = Lens.load("atlas-mamba1")
    fact = load_facts("atlas")[0]
    prompt = lens.prompt(fact)
    last = len(prompt.ids) - 1

    def probability() -> float:
        with torch.no_grad():
            return float(lens.model(torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)[prompt.target_id])

    plain = probability()
    with lens.hooks.knockout(range(last), [last], path="both"):
        found = lens.sweep([fact], "each", window=6, progress=False)
        cut = probability()
    assert len(found.checks) == 1
    assert bool(found.checks.passed.all())
    assert abs(cut - plain) > 0.5
    assert found.table.base_prob.to_numpy() == pytest.approx(cut, rel=1e-4, abs=1e-8)
