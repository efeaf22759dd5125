"""Inside a running knockout edges are attributed in the model as it is there: what runs around stays cut."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import in_double
from test_replay_inside import OTHERS, Draw, around, hooked, inside
from verbs import KINDS

from mambalens.hooks import HookManager
from mambalens.hooks.edges import Places, Weakened, effects_of, node_of

LIMIT = 1e-9


@functools.cache
def only_recurrent(model_type: str) -> bool:
    return all(mixer.kind != "attention" for mixer in hooked(model_type).mixers)


def attributions_miss(hooks: HookManager, draw: Draw, replaced: bool) -> float:
    """How far attributed changes and effects are from hooked passes, and from each other, at most."""
    batch, time, seed = draw(st.integers(1, 2)), draw(st.integers(2, 7)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 61, (batch, time), generator=generator)
    blocks = around(hooks, batch, time, generator, draw, replaced)
    mixer = draw(st.sampled_from(hooks.mixers))
    path = draw(st.sampled_from(list(mixer.paths)))
    target = int(torch.randint(1, time, (1,), generator=generator))
    reach = mixer.reach(path)
    source = int(torch.randint(0 if reach is None else max(0, target - reach), target, (1,), generator=generator))
    features: Any = None
    if draw(st.booleans()):
        features = torch.rand(mixer.n_features, generator=generator) < 0.6
    prompts = torch.arange(batch)
    places = Places(prompts, torch.full_like(prompts, target), torch.full_like(prompts, source))
    edges = torch.zeros(time, time, dtype=torch.bool)
    edges[target, source] = True
    with inside(blocks):
        cuts = hooks.cuts_around(torch.full((batch,), time - 1), time).get(mixer, ())
        with torch.no_grad():
            own = hooks.model(ids).logits
            with mixer.attributing(None, features, cuts) as found:
                apart = [hooks.model(ids).logits - own]
            with mixer.attributing(Weakened({path: places}, 1.0), features, cuts):
                weakened = hooks.model(ids).logits
            with hooks.knockout(
                edges=edges, layers=[mixer.layer], mixers=mixer.kind, path=path.names[0],
                features="all" if features is None else features,
            ):  # fmt: skip
                apart.append(weakened - hooks.model(ids).logits)
    arrivals = found[-1]
    node = arrivals.nodes[node_of(path)]
    gradient = torch.randn(node.shape, generator=generator, dtype=node.dtype)
    at = Places(*(part.flatten() for part in _every_edge(batch, time, reach)))
    one = arrivals.effects(path, gradient)[at.prompt, at.target, at.source]
    other = effects_of(arrivals, path, at, gradient[at.at])
    apart.append(one - other)
    return max(float(one.detach().abs().max()) for one in apart)


def _every_edge(batch: int, time: int, reach: int | None) -> tuple[torch.Tensor, ...]:
    there = torch.ones(batch, time, time, dtype=torch.bool).tril(-1)
    there = there if reach is None else there.triu(-reach)
    prompt, target, source = there.nonzero(as_tuple=True)
    return prompt, target, source


@pytest.mark.parametrize("model_type", list(KINDS))
@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_attribution_equals_hooked_cuts_in_every_kind_of_mixer(model_type: str, data: st.DataObject) -> None:
    hooks = hooked(model_type)
    with in_double(hooks.model):
        assert attributions_miss(hooks, data.draw, only_recurrent(model_type)) < LIMIT


@pytest.mark.parametrize("model_type", OTHERS)
@settings(deadline=None, max_examples=3)
@given(data=st.data())
def test_attribution_equals_hooked_cuts_in_every_other_architecture(model_type: str, data: st.DataObject) -> None:
    hooks = hooked(model_type)
    with in_double(hooks.model):
        assert attributions_miss(hooks, data.draw, only_recurrent(model_type)) < LIMIT
