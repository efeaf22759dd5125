"""Diagnostics give the known value on constructed operators, whichever mixer realises them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LAYERS, tiny
from torch import Tensor
from transformers import AutoTokenizer

from mambalens import Fact, Lens, MambalensError
from mambalens.data import checkpoints
from mambalens.features.diagnose import repeated_tokens
from mambalens.features.operators import (
    PositionDependence,
    by_lag,
    effective_rank,
    in_bins,
    induction_score,
    interaction_rank,
    mean_distance,
    recency_profile,
    sink_share,
)
from mambalens.figures import attention_map, diagnostics
from mambalens.hooks import HookManager, TokenMixing

T = 12
UNIFORM = torch.ones(T, T, dtype=torch.float64).tril() / torch.arange(1, T + 1)[:, None]
IDENTITY = torch.eye(T, dtype=torch.float64)
SINK = torch.zeros(T, T, dtype=torch.float64)
SINK[:, 0] = 1
PREVIOUS = torch.eye(T, dtype=torch.float64).roll(1, 0)
PREVIOUS[0] = IDENTITY[0]
RATE = 0.6
DECAY = (RATE ** (torch.arange(T)[:, None] - torch.arange(T)).double()).tril()


def dependence(*prompts: Tensor) -> Tensor:
    found = PositionDependence(len(prompts[0]), max(alpha.shape[-1] for alpha in prompts))
    for alpha in prompts:
        found.add(alpha)
    return found.value()


@pytest.mark.parametrize(("alpha", "share"), [
    (UNIFORM, sum(1 / (t + 1) for t in range(1, T)) / (T - 1)),
    (IDENTITY, 0.0),
    (SINK, 1.0),
    (-3 * SINK, 1.0),  # sign and scale are no matter of shares
    (PREVIOUS, 1 / (T - 1)),
    (DECAY, sum(RATE**t * (1 - RATE) / (1 - RATE ** (t + 1)) for t in range(1, T)) / (T - 1)),
])  # fmt: skip
def test_sink_share(alpha: Tensor, share: float) -> None:
    assert float(sink_share(alpha)) == pytest.approx(share, abs=1e-12)


def test_a_silent_target_counts_for_nothing() -> None:
    alpha = SINK.clone()
    alpha[5:] = 0
    assert float(sink_share(alpha)) == pytest.approx(1.0)
    assert bool(sink_share(torch.zeros(T, T)).isnan()) and bool(sink_share(torch.ones(1, 1)).isnan())


@pytest.mark.parametrize(("alpha", "rank"), [
    (IDENTITY, float(T)),
    (5 * IDENTITY, float(T)),
    (SINK, 1.0),
    # Two rows read the first token: singular values sqrt(2), 1 (T-2 times) and 0.
    (PREVIOUS, math.exp(-(p := 2**0.5 / (2**0.5 + T - 2)) * math.log(p) - (T - 2) * (q := 1 / (2**0.5 + T - 2)) * math.log(q))),
])  # fmt: skip
def test_effective_rank(alpha: Tensor, rank: float) -> None:
    assert float(effective_rank(alpha)) == pytest.approx(rank, rel=1e-9)


@pytest.mark.parametrize("alpha", [UNIFORM, DECAY])
def test_effective_rank_is_the_entropy_of_numpys_singular_values(alpha: Tensor) -> None:
    values = np.sqrt(np.linalg.eigvalsh(alpha.numpy().T @ alpha.numpy()))
    share = values / values.sum()
    assert float(effective_rank(alpha)) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-9)


@pytest.mark.parametrize(("features", "rank"), [
    ([IDENTITY, 2 * IDENTITY, -IDENTITY], 1),
    ([IDENTITY, PREVIOUS], 2),
    ([DECAY, DECAY, IDENTITY], 2),
    ([(r ** (torch.arange(T)[:, None] - torch.arange(T)).double()).tril() for r in (0.1, 0.4, 0.7, 0.95)], 4),
    ([torch.zeros(T, T, dtype=torch.float64)] * 2, 0),
    ([0 * IDENTITY, 1e-9 * DECAY, IDENTITY], 2),  # a quiet feature counts as much as a loud one
])  # fmt: skip
def test_interaction_rank(features: list[Tensor], rank: int) -> None:
    assert interaction_rank(by_lag(torch.stack(features))) == rank


def test_position_dependence() -> None:
    known = torch.stack([IDENTITY, PREVIOUS.roll(0), DECAY])
    known[1] = torch.diag(torch.ones(T - 1, dtype=torch.float64), -1)  # the previous-token head without a first row
    assert dependence(known, known, known[:, :7, :7]).tolist() == pytest.approx([1.0, 1.0, 1.0])
    # The same at every distance within a prompt, another height in each of two prompts: position explains nothing.
    flat = torch.ones(1, T, T, dtype=torch.float64).tril()
    assert float(dependence(flat, 3 * flat)) == pytest.approx(0.0, abs=1e-12)
    assert bool(dependence(flat, flat).isnan())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_position_dependence_is_the_r_squared_of_a_regression_on_distance(seed: int, prompts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (prompts,), generator=generator).tolist()
    alphas = [torch.randn(2, n, n, generator=generator, dtype=torch.float64).tril() for n in lengths]
    for feature in range(2):
        entries = [(t - s, float(a[feature, t, s])) for a in alphas for t in range(a.shape[1]) for s in range(t + 1)]
        frame = pd.DataFrame(entries, columns=["lag", "alpha"])
        rest = frame.alpha - frame.groupby("lag").alpha.transform("mean")
        expected = 1 - (rest**2).sum() / ((frame.alpha - frame.alpha.mean()) ** 2).sum()
        assert float(dependence(*alphas)[feature]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("alpha", "distance"), [
    (UNIFORM, (T - 1) / 4), (IDENTITY, 0.0), (SINK, (T - 1) / 2), (PREVIOUS, (T - 1) / T),
    (DECAY, sum(sum(k * RATE**k for k in range(t + 1)) / sum(RATE**k for k in range(t + 1)) for t in range(T)) / T),
])  # fmt: skip
def test_recency(alpha: Tensor, distance: float) -> None:
    profile = recency_profile(alpha)
    assert float(profile.sum()) == pytest.approx(1.0)
    assert float(mean_distance(alpha)) == pytest.approx(distance, abs=1e-9)
    bins = in_bins(profile)
    assert sum(float(share) for share in bins.values()) == pytest.approx(1.0)
    assert list(bins) == ["0", "1", "2-3", "4-7", "8-15", "16+"]
    if alpha is PREVIOUS:
        assert float(bins["1"]) == pytest.approx((T - 1) / T)


def test_induction_score() -> None:
    induction = torch.zeros(T, T, dtype=torch.float64)
    for t in range(T):
        induction[t, t - (T // 2 - 1) if t >= T // 2 else t] = 1
    assert float(induction_score(induction)) == 1.0
    assert float(induction_score(IDENTITY)) == 0.0
    assert float(induction_score(UNIFORM)) == pytest.approx(sum(1 / (t + 1) for t in range(T // 2, T)) / (T // 2))
    with pytest.raises(MambalensError, match="11 positions"):
        induction_score(torch.eye(11))


def test_repeated_tokens_stand_there_twice_and_are_not_special() -> None:
    tokenizer = AutoTokenizer.from_pretrained(next(iter(checkpoints().values())))
    ids = repeated_tokens(tokenizer, 3)
    half = ids.shape[1] // 2
    assert torch.equal(ids[:, :half], ids[:, half:])
    assert not set(ids.flatten().tolist()) & set(tokenizer.all_special_ids)
    assert all(len(set(row.tolist())) == half for row in ids)
    assert torch.equal(ids, repeated_tokens(tokenizer, 3)) and not torch.equal(ids, repeated_tokens(tokenizer, 4))


# The same operator made by each kind of mixer.


def realised(name: str, decay: float) -> TokenMixing:
    """Layer 0 of a tiny model made to mix as `alpha[t, s] = decay ** (t - s)`, whatever the tokens; 0 is the identity."""
    model = tiny(name)
    hooks = HookManager(model)
    mixer: Any = hooks.mixers[0].module
    ids = torch.arange(1, T + 1)[None]
    with torch.no_grad():
        if name == "llama":  # masks that only let a target read itself make the identity
            mask = torch.full((1, 1, T, T), torch.finfo(torch.float64).min, dtype=torch.float64)
            mask[0, 0].fill_diagonal_(0.0)
            found: list[TokenMixing] = []
            hooks.watch(ids, lambda mixer, mixing: found.append(mixing), 0, mask)
            return found[0]
        mixer.A_log.fill_(math.log(-math.log(decay)) if decay else 10.0)
        step = math.log(math.e - 1)  # softplus(step) = 1
        if name == "mamba1":
            mixer.dt_proj.weight.zero_()
            mixer.dt_proj.bias.fill_(step)
            rank, state = mixer.time_step_rank, mixer.ssm_state_size

            def x_proj(x: Tensor) -> Tensor:  # dt, then B and C whose product is 1
                out = x.new_zeros(*x.shape[:-1], rank + 2 * state)
                out[..., rank], out[..., rank + state] = 0.5, 2.0
                return out

            mixer.x_proj.forward = x_proj
        else:
            mixer.dt_bias.fill_(step)
            mixer.in_proj.weight[-mixer.num_heads :] = 0  # the step sizes say nothing of the tokens
            mixer.act.forward = lambda convolved: constant_b_and_c(convolved, mixer)
        return hooks.token_mixing(ids, 0)


def constant_b_and_c(convolved: Tensor, mixer: Any) -> Tensor:
    """Mamba-2's B and C replaced by ones in their first state and zeros elsewhere."""
    state = torch.zeros(2, mixer.n_groups, mixer.ssm_state_size, dtype=convolved.dtype)
    state[:, :, 0] = 1.0
    rest = state.flatten().expand(*convolved.shape[:-1], -1)
    return torch.cat([convolved[..., : mixer.intermediate_size], rest], -1)


def diagnoses(mixing: TokenMixing) -> dict[str, float]:
    alpha = mixing.alpha[0]
    found = {name: float(f(alpha).nanmean()) for name, f in
             (("sink", sink_share), ("rank", effective_rank), ("distance", mean_distance), ("induction", induction_score))}  # fmt: skip
    lags = by_lag(alpha)
    return found | {"interaction": interaction_rank(lags), "position": float(dependence(alpha).nanmean())}


@pytest.mark.parametrize(("decay", "names", "alpha"), [
    (RATE, ("mamba1", "mamba2"), DECAY),
    (0.0, ("mamba1", "mamba2", "llama"), IDENTITY),
])  # fmt: skip
def test_the_same_operator_has_the_same_diagnostics_in_every_mixer(
    decay: float, names: tuple[str, ...], alpha: Tensor
) -> None:
    expected = {
        "sink": float(sink_share(alpha)), "rank": float(effective_rank(alpha)), "distance": float(mean_distance(alpha)),
        "induction": float(induction_score(alpha)), "interaction": 1, "position": 1.0,
    }  # fmt: skip
    for name in names:
        mixing = realised(name, decay)
        assert (mixing.alpha - alpha).abs().max() < 1e-12, name
        assert diagnoses(mixing) == pytest.approx(expected, abs=1e-9), name


# Whole models.


@pytest.fixture(scope="module", params=["mamba1", "mamba2", "gpt_neox"])
def lens(request: pytest.FixtureRequest) -> Lens:
    tokenizer = AutoTokenizer.from_pretrained(next(iter(checkpoints().values())))
    return Lens(tiny(request.param, vocabulary=len(tokenizer)), tokenizer, request.param)


FACTS = [
    Fact("The capital of Peru is", "Peru", " Lima"),
    Fact("The capital of Chad is", "Chad", " N'Djamena"),
    Fact("Chad, shown on a stamp of the nineteen sixties: the capital is", "Chad", " N'Djamena"),
]


def test_the_table_of_diagnostics_is_what_single_prompts_give(lens: Lens, monkeypatch: pytest.MonkeyPatch) -> None:
    table = lens.diagnose(FACTS, progress=False)
    monkeypatch.setattr("mambalens.hooks.token_mixing.CHUNK", 1)  # one feature at a time
    pd.testing.assert_frame_equal(table, lens.diagnose(FACTS, batch_size=1, progress=False))
    groups = ["all"] if lens.name == "gpt_neox" else ["all", "slow", "middle", "fast"]
    assert list(table.group.unique()) == groups
    assert len(table) == LAYERS * len(groups) * (6 + 6)
    alphas = [
        lens.hooks.effective_attention(torch.tensor([lens.prompt(fact).ids]), 2, features=groups[-1])[0]
        for fact in FACTS
    ]
    rows = table[(table.layer == 2) & (table.group == groups[-1])].set_index(["diagnostic", "lag"]).value
    for name, measure in (
        ("sink_share", sink_share),
        ("effective_rank", effective_rank),
        ("mean_distance", mean_distance),
    ):
        expected = torch.stack([measure(alpha) for alpha in alphas]).mean()
        assert rows[name, ""] == pytest.approx(float(expected), rel=1e-6)
    assert rows["position_dependence", ""] == pytest.approx(float(dependence(*alphas).mean()), rel=1e-6)
    recency = torch.stack([in_bins(recency_profile(alpha))["2-3"] for alpha in alphas]).mean()
    assert rows["recency", "2-3"] == pytest.approx(float(recency), rel=1e-6)
    repeated = lens.hooks.effective_attention(repeated_tokens(lens.tokenizer, 0), 2, features=groups[-1])
    assert rows["induction_score", ""] == pytest.approx(float(induction_score(repeated).mean()), rel=1e-6)


def test_maps_and_diagnostics_are_drawn(lens: Lens) -> None:
    figure = diagnostics(lens.diagnose(FACTS, progress=False))
    assert len(figure.findobj(lambda artist: getattr(artist, "get_title", lambda: "")() == "Induction score")) >= 1
    figure = lens.attention_map(FACTS[0], 1)
    shown = figure.axes[0].get_images()[0].get_array()
    expected = lens.hooks.effective_attention(torch.tensor([lens.prompt(FACTS[0]).ids]), 1, reduce="mean_abs")[0]
    assert np.allclose(np.tril(np.ma.filled(shown, 0.0)), expected.float(), atol=1e-6)
    title = lens.attention_map(FACTS[0], 1, features=2, reduce=None).axes[0].get_title()
    assert title.replace("\n", " ").endswith("feature 2, as it is")
    with pytest.raises(MambalensError, match="reduce=None draws one feature"):
        lens.attention_map(FACTS[0], 1, reduce=None)
    with pytest.raises(MambalensError, match="group='slwo'"):
        diagnostics(lens.diagnose(FACTS[:1], progress=False), "slwo")
    assert attention_map(np.eye(2), ["a", "b"], "t").axes
