"""Contributions inside knockouts and where vectors are added: of the model as it is then, and they add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models import ARCHITECTURES, in_double
from test_contributions import FACTS, added_up, lens_on, scores_of

from mambalens import Lens, MambalensError
from mambalens.hooks.knockout import Paths

SOURCES = [-2, -4]
"""Positions that are cut, from the last back: in reach of short convolutions."""


def last_of(lens: Lens) -> list[int]:
    return [len(lens.prompt(fact).ids) - 1 for fact in FACTS]


def scores_of_batch(lens: Lens) -> list[float]:
    """The log-odds by one pass of all prompts, padded on the right."""
    prompts = [lens.prompt(fact) for fact in FACTS]
    ids = torch.zeros(len(prompts), max(last_of(lens)) + 1, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt.ids)] = torch.tensor(prompt.ids)
    with torch.no_grad():
        logits = lens.model(ids, use_cache=False).logits.double()
    found = []
    for row, prompt in zip(logits, prompts, strict=True):
        z, token = row[len(prompt.ids) - 1], prompt.target_id
        found.append(float(z[token] - torch.cat([z[:token], z[token + 1 :]]).logsumexp(0)))
    return found


def mixers_at(found: Any, back: list[int], path: str) -> Any:
    """What mixers bring of positions that are so far from the last."""
    table = found.table
    time = table.fact_id.map(found.prompts.set_index("fact_id").tokens.map(len))
    return table[(table.part == "mixer") & (table.source - time).isin(back) & (table.path == path)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_contributions_inside_a_knockout_add_up_and_cut_edges_add_nothing(name: str) -> None:
    lens = lens_on(name)
    with in_double(lens.model):
        base = scores_of(lens)
        with lens.hooks.knockout(SOURCES, [-1], path="both"):
            found = lens.contributions(FACTS)
            scores = scores_of(lens)
    np.testing.assert_allclose(found.scores.score, scores, atol=1e-8)
    np.testing.assert_allclose(added_up(found), scores, atol=1e-8)
    assert np.abs(np.array(scores) - base).max() > 1e-4
    for path in ("main", "conv"):
        np.testing.assert_allclose(mixers_at(found, SOURCES, path).contribution, 0.0, atol=1e-15)
        rest = mixers_at(found, [-1, -3], path).contribution
        assert not len(rest) or rest.abs().max() > 1e-6


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gpt2", "llama", "qwen3_next", "jamba", "lfm2", "minimax"])
def test_other_values_have_the_shares_of_the_sources_that_they_stand_for(name: str) -> None:
    """A source's own values put in change nothing; the other prompt's have what an explicit pass gains by them."""
    lens = lens_on(name)
    fact = FACTS[1]
    ids = torch.tensor([lens.prompt(fact).ids])
    generator = torch.Generator().manual_seed(5)
    other = torch.randint(0, 400, ids.shape, generator=generator)
    with in_double(lens.model):
        plain = lens.contributions(fact).table
        with lens.hooks.knockout(SOURCES, [-1], path="both", instead=lens.hooks.values(ids, keys=_attends(lens))):
            own = lens.contributions(fact).table
        np.testing.assert_allclose(own.contribution, plain.contribution, atol=1e-8)
        values = lens.hooks.values(other, keys=_attends(lens))
        with lens.hooks.knockout(SOURCES, [-1], path="both", instead=values):
            found = lens.contributions(fact)
            with torch.no_grad():
                z = lens.model(ids, use_cache=False).logits[0, -1]
        token = lens.prompt(fact).target_id
        score = float(z[token] - torch.cat([z[:token], z[token + 1 :]]).logsumexp(0))
    np.testing.assert_allclose(added_up(found), [score], atol=1e-8)
    path = "conv" if {str(p) for p in found.table.path} <= {"", "conv", "skip", "bias"} else "main"
    assert mixers_at(found, SOURCES, path).contribution.abs().max() > 1e-6


def _attends(lens: Lens) -> bool:
    return "attention" in lens.hooks.kinds


@pytest.mark.parametrize("name", ["mamba", "gpt2", "qwen3_next", "lfm2"])
def test_edges_of_unequal_prompts_and_some_features_are_cut_prompt_by_prompt(name: str) -> None:
    """Two nested knockouts, by edges, with zeros and with other values, in prompts that are padded."""
    lens = lens_on(name)
    mixer = lens.hooks.mixers[-1]
    where: dict[str, Any] = {"layers": [mixer.layer], "mixers": mixer.kind}
    path = "conv" if Paths.MAIN not in mixer.paths else "main"
    features = [0, 2]
    last = sorted(last_of(lens))
    edges = torch.zeros(max(last) + 1, max(last) + 1, dtype=torch.bool)
    for number, target in enumerate(last):
        edges[target, [target - 1 - number, target - 2]] = True
    with in_double(lens.model), lens.hooks.knockout(edges=edges, features=features, path=path, **where):
        found = lens.contributions(FACTS, features=True)
        scores = scores_of_batch(lens)
    np.testing.assert_allclose(added_up(found), scores, atol=1e-8)
    table = found.table[(found.table.layer == mixer.layer) & (found.table.path == path)]
    for fact, target in zip(FACTS, last_of(lens), strict=True):
        rows = table[(table.fact_id == fact.id) & (table.kind == mixer.kind)]
        cut = edges[target].nonzero().flatten().tolist()
        here = rows.source.isin(cut) & rows.feature.isin(features)
        assert here.any() and (rows.contribution[here] == 0).all()
        assert (rows.contribution[rows.source.isin(cut) & ~rows.feature.isin(features)] != 0).any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_added_behind_layers_is_a_part_of_its_own(name: str) -> None:
    lens = lens_on(name)
    width = lens.model.get_input_embeddings().weight.shape[1]
    vector = 0.3 * torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with in_double(lens.model):
        base = scores_of(lens)
        with lens.hooks.add(vector, [0, 1]), lens.hooks.add(vector, [1], positions=[0], scale=-2.0):
            found = lens.contributions(FACTS)
            scores = scores_of(lens)
    np.testing.assert_allclose(found.scores.score, scores, atol=1e-8)
    np.testing.assert_allclose(added_up(found), scores, atol=1e-8)
    assert np.abs(np.array(scores) - base).max() > 1e-4
    added = found.table[found.table.part == "added"]
    assert added.groupby("fact_id").layer.apply(list).tolist() == [[0, 1]] * 3
    # The same vector along the same direction: behind both layers as much, but for what else is added at position 0.
    wide = added.pivot(index="fact_id", columns="layer", values="contribution")
    np.testing.assert_allclose(wide[0], wide[1], atol=1e-9)
    assert wide.abs().to_numpy().min() > 0


def test_the_added_part_is_the_vector_along_the_answers_direction() -> None:
    """At the last layer of a linear readout: a logit difference gains what the head makes of the vector."""
    lens = lens_on("gpt2")
    model: Any = lens.model
    vector = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fact = FACTS[0]
    prompt = lens.prompt(fact)
    streams: list[torch.Tensor] = []
    with in_double(model), lens.hooks.add(vector, [lens.n_layers - 1], positions=[-1], scale=0.5):
        found = lens.contributions(fact, "logit_difference").table
        handle = model.transformer.ln_f.register_forward_pre_hook(lambda module, args: streams.append(args[0][0, -1]))
        with torch.no_grad():
            model(torch.tensor([prompt.ids]))
        handle.remove()
    norm, head = model.transformer.ln_f, model.lm_head.weight
    scaled = (0.5 * (vector - vector.mean())) / torch.sqrt(streams[-1].var(correction=0) + norm.eps) * norm.weight
    logits = (scaled @ head.T).detach()
    expected = float(logits[prompt.target_id] - logits.mean())
    np.testing.assert_allclose(found.contribution[found.part == "added"], [expected], atol=1e-9)


def test_knockouts_steering_and_refusals_together() -> None:
    lens = lens_on("gpt_neox")
    vector = torch.ones(24, dtype=torch.float64)
    with in_double(lens.model), lens.hooks.add(vector, [1]), lens.knockout(FACTS[0], "subject"):
        found = lens.contributions(FACTS[0])
        z = lens.model(torch.tensor([lens.prompt(FACTS[0]).ids])).logits[0, -1].double()
    token = lens.prompt(FACTS[0]).target_id
    score = float(z[token] - torch.cat([z[:token], z[token + 1 :]]).logsumexp(0))
    np.testing.assert_allclose(added_up(found), [score], atol=1e-8)
    assert "added\u00a0vectors" in found.plot().get_suptitle()
    own_code = lens_on("gptj")
    with (
        pytest.raises(MambalensError, match="reads by code of its own, in which other values cannot be told"),
        own_code.knockout(FACTS[0], "subject", ablation="resample", other=FACTS[2]),
    ):
        own_code.contributions(FACTS[0])
