"""Linear recurrences without a loop over positions: against the loop, in float64, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pretend_device
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambalens.hooks import delta, gated, linear_scan, scan

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
TOLERANCE = 1e-12


@pytest.fixture
def by_pairs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, nothing loops over positions."""

    def from_now_on() -> None:
        for module in (linear_scan, scan):
            monkeypatch.setattr(module, "LOOPS", set())

    return from_now_on


def loop(decay: Tensor, write: Tensor, start: Tensor | None) -> Tensor:
    """Position by position, out of place."""
    h, states = torch.zeros_like(write[:, 0]) if start is None else start, []
    for t in range(write.shape[1]):
        h = decay[:, t] * h + write[:, t]
        states.append(h)
    return torch.stack(states, 1)


@settings(deadline=None, max_examples=60)
@given(time=st.integers(1, 70), shared=st.booleans(), begins=st.booleans(), seed=st.integers(0, 999))
def test_pairs_are_the_loop(time: int, shared: bool, begins: bool, seed: int) -> None:
    """Decays that differ, or are shared by some numbers of a state; some of them 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.rand(2, time, 3, 1 if shared else 4, generator=generator, **DOUBLE)
    decay = torch.where(torch.rand(decay.shape, generator=generator) < 0.1, decay.round(), decay)
    write = torch.randn(2, time, 3, 4, generator=generator, **DOUBLE)
    start = torch.randn(2, 3, 4, generator=generator, **DOUBLE) if begins else None
    leaves = [leaf.requires_grad_() for leaf in (decay, write, start) if leaf is not None]
    expected = loop(decay, write, start)
    weights = torch.randn(expected.shape, generator=generator, **DOUBLE)
    slow = torch.autograd.grad((weights * expected).sum(), leaves, allow_unused=True)
    with pytest.MonkeyPatch.context() as patch:
        for loops in ({"cpu"}, set()):
            patch.setattr(linear_scan, "LOOPS", loops)
            found = linear_scan.linear_scan(decay, write, start)
            assert (found - expected).abs().max() < TOLERANCE
            fast = torch.autograd.grad((weights * found).sum(), leaves, allow_unused=True)
            for one, other in zip(fast, slow, strict=True):
                assert one is None or other is None or (one - other).abs().max() < TOLERANCE
            with torch.no_grad():
                assert torch.equal(linear_scan.linear_scan(decay, write, start), found)
                states = write.clone()
                assert linear_scan.linear_scan(decay.clone(), states, start, in_place=True) is states
                assert (states - expected).abs().max() < TOLERANCE


def of_mamba1(time: int) -> list[Tensor]:
    """x, dt, A, B, C."""
    generator = torch.Generator().manual_seed(time)
    shapes = [(3, time, 6), (3, time, 6), (6, 5), (3, time, 5), (3, time, 5)]
    x, dt, A, B, C = (torch.randn(shape, generator=generator, **DOUBLE) for shape in shapes)
    return [x, dt.exp() / 3, -A.exp(), B, C]


@pytest.mark.parametrize("tile", [40, 2**21])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 7, 33])
def test_the_scan_of_mamba1_is_the_same_by_pairs(
    time: int, tile: int, by_pairs: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scan.TILE, "cpu", tile)
    given, start = of_mamba1(time), torch.randn(3, 5, 6, **DOUBLE)

    def all_of() -> list[Tensor]:
        leaves = [leaf.clone().requires_grad_() for leaf in given]
        y, state = scan.selective_scan(*leaves, start)
        gradients = torch.autograd.grad(y.sin().sum() + state.cos().sum(), leaves)
        with torch.no_grad():
            return [y, state, *gradients, *scan.selective_scan(*given, start), *scan.selective_scan(*given, start[:1])]

    slow = all_of()
    by_pairs()
    for fast, expected in zip(all_of(), slow, strict=True):
        assert (fast - expected).abs().max() < TOLERANCE * (1 + expected.abs().max())


@pytest.mark.parametrize("tile", [2 * 9 * 9 * 30, 9 * 9 * 30, 2**21])
def test_effects_of_all_pairs_at_once_are_those_step_by_step(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dt, A, B, C = of_mamba1(9)
    gradient = torch.randn(x.shape, **DOUBLE)
    monkeypatch.setitem(scan.TILE, "cpu", 1)
    slow = scan.selective_effects(x, dt, A, B, C, gradient)
    explicit = torch.einsum("btf,bfts,bsf->bts", gradient, scan.selective_attention(dt, A, B, C), x)
    monkeypatch.setitem(scan.TILE, "cpu", tile)
    fast = scan.selective_effects(x, dt, A, B, C, gradient)
    assert (fast - slow).abs().max() < TOLERANCE * (1 + slow.abs().max())
    assert (fast - explicit.tril(-1)).abs().max() < TOLERANCE * (1 + slow.abs().max())


def of_mamba2(time: int) -> list[Tensor]:
    """x, dt, A, B, C; four heads in two groups."""
    generator = torch.Generator().manual_seed(time)
    shapes = [(2, time, 4, 3), (2, time, 4), (4,), (2, time, 2, 5), (2, time, 2, 5)]
    x, dt, A, B, C = (torch.randn(shape, generator=generator, **DOUBLE) for shape in shapes)
    return [x, dt.exp() / 3, -A.exp(), B, C]


def slow_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mamba-2 position by position."""
    B, C = (t.repeat_interleave(2, 2) for t in (B, C))
    decay = torch.exp(dt * A)[..., None, None]
    states = loop(decay, torch.einsum("bth,bthn,bthp->bthnp", dt, B, x), start)
    return torch.einsum("bthn,bthnp->bthp", C, states), states[:, -1]


@pytest.mark.parametrize("tile", [1, 2 * 4 * 4 * 50 * 50, 2**21])
@pytest.mark.parametrize("time", [1, 5, 64, 65, 150])
def test_chunks_of_mamba2_are_the_recurrence(
    time: int, tile: int, by_pairs: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk, some at a time, and all together; filled up where they do not come out even."""
    monkeypatch.setitem(scan.TILE, "cpu", tile)
    given = of_mamba2(time)
    for pairs in (False, True):
        if pairs:
            by_pairs()
        for start in (None, torch.randn(2, 4, 5, 3, **DOUBLE), torch.randn(1, 4, 5, 3, **DOUBLE)):
            leaves = [leaf.clone().requires_grad_() for leaf in given]
            expected = slow_ssd(*leaves, None if start is None else start.expand(2, -1, -1, -1))
            slow = torch.autograd.grad(expected[0].sin().sum() + expected[1].cos().sum(), leaves)
            found = scan.ssd_scan(*leaves, start)
            assert found[1] is not None
            fast = torch.autograd.grad(found[0].sin().sum() + found[1].cos().sum(), leaves)
            with torch.no_grad():
                again = [*scan.ssd_scan(*given, start), scan.ssd_scan(*given, start, end=False)[0]]
            pairs_of = zip((*found, *fast, *again), (*expected, *slow, *expected, expected[0]), strict=True)
            for one, other in pairs_of:
                assert one is not None and one.shape == other.shape
                assert (one - other).abs().max() < TOLERANCE * (1 + other.abs().max())


@pytest.mark.parametrize("time", [1, 2, 5, 33])
def test_rglru_is_the_same_by_pairs(time: int, by_pairs: Callable[[], None]) -> None:
    generator = torch.Generator().manual_seed(time)
    x = torch.randn(2, 3, time, 6, generator=generator, **DOUBLE)
    a = torch.rand(x.shape, generator=generator, **DOUBLE)
    a[:, :, time // 2] = 0  # a document begins
    start = torch.randn(2, 3, 6, generator=generator, **DOUBLE)

    def all_of() -> list[Tensor]:
        return [*gated.gated_scan(x, a, start), *gated.gated_scan(x[0], a[0]), gated.gated_attention(a[0])]

    slow = all_of()
    explicit = torch.zeros(3, 6, time, time, **DOUBLE)
    for t in range(time):
        for s in range(t + 1):
            explicit[:, :, t, s] = a[0, :, s + 1 : t + 1].prod(1)
    assert (slow[-1] - explicit).abs().max() < TOLERANCE
    by_pairs()
    for fast, expected in zip(all_of(), slow, strict=True):
        assert fast.shape == expected.shape and (fast - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("tile", [1, 2 * 4 * 4 * 50 * 50, 2**21])
@pytest.mark.parametrize("time", [1, 16, 17, 64, 65, 150])
@pytest.mark.parametrize("channels", [1, 6])
def test_chunks_of_a_delta_rule_are_the_recurrence(
    channels: int, time: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk, some at a time, and all together; filled up where they do not come out even."""
    monkeypatch.setitem(scan.TILE, "cpu", tile)
    generator = torch.Generator().manual_seed(time)
    shapes = [(2, time, 4, 5), (2, time, 2, 6), (2, time, 2, 6), (2, time, 4), (2, time, 4), (2, time, 4, channels)]
    v, k, q, write, erase, g = (torch.randn(shape, generator=generator, **DOUBLE) for shape in shapes)
    inputs = delta.DeltaInputs(v, k / k.norm(dim=-1, keepdim=True), q, write.sigmoid(), erase.sigmoid(), -g.exp() / 3)
    S, outputs = torch.randn(2, 4, 6, 5, generator=generator, **DOUBLE), []
    start = S
    for t in range(time):
        k_t, q_t = (x[:, t].repeat_interleave(2, 1) for x in (inputs.k, inputs.q))
        S = inputs.log_decay[:, t, :, :, None].exp() * S
        removed = inputs.erase[:, t, :, None] * torch.einsum("bhk,bhkp->bhp", k_t, S)
        S = S + torch.einsum("bhk,bhp->bhkp", k_t, inputs.write[:, t, :, None] * v[:, t] - removed)
        outputs.append(torch.einsum("bhk,bhkp->bhp", q_t, S))
    y, state = delta.delta_scan(inputs, start)
    assert state is not None
    assert (y - torch.stack(outputs, 1)).abs().max() < 1e-10 and (state - S).abs().max() < 1e-10
    writes = delta.delta_writes(inputs)
    assert writes.shape == (2, 4, 6, time)
    left = torch.einsum("bhkt,bthp->bhkp", writes, v)
    assert (left - delta.delta_scan(inputs)[1]).abs().max() < 1e-10


@pytest.mark.parametrize("some", [2, 3, 50])
def test_channels_of_a_delta_rule_are_the_same_together(some: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    k, q = torch.randn(2, 2, 3, 9, 50, generator=generator, **DOUBLE)
    running = -torch.rand(2, 3, 9, 50, generator=generator, **DOUBLE).cumsum(2)
    monkeypatch.setitem(delta.CHANNELS, "cpu", 1)
    slow = delta._decayed_products(k, q, running)
    monkeypatch.setitem(delta.CHANNELS, "cpu", some * 2 * 3 * 9 * 9)
    monkeypatch.setattr(delta, "FEW", 2)
    for one, other in zip(delta._decayed_products(k, q, running), slow, strict=True):
        assert (one - other).abs().max() < TOLERANCE


SCANS: dict[str, Callable[[int], Any]] = {
    "mamba": lambda time: scan.selective_scan(*(t.to(pretend_device.NAME) for t in of_mamba1(time))),
    "mamba2": lambda time: scan.ssd_scan(*(t.to(pretend_device.NAME) for t in of_mamba2(time))),
    "recurrent_gemma": lambda time: gated.gated_scan(*(torch.rand(2, 2, time, 6).to(pretend_device.NAME).unbind())),
}


@pytest.mark.parametrize("name", SCANS)
def test_a_scan_on_a_device_does_not_loop_over_positions(name: str) -> None:
    """A few steps more for a prompt eight times as long."""
    counts = []
    for time in (128, 1024):
        with torch.no_grad(), pretend_device.counted() as traffic:
            SCANS[name](time)
        counts.append(sum(traffic.launches.values()))
    assert counts[1] - counts[0] <= 12, counts
