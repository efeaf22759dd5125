"""Mamba-1's scan as numba compiles it: against plain loops in float64, by itself and in a replay."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambalens.hooks import kernels, native, scan

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no numba")
CLOSE = {"rtol": 3e-6, "atol": 3e-6}
"""Of sums of a few dozen numbers near 1 in float32."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def of_scan(seed: int, batch: int, time: int, features: int, state: int) -> list[Tensor]:
    """x, dt, A, B, C in float32; decays from nearly none to nearly all, which differ between channels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, time, features)] * 2 + [(features, state), (batch, time, state), (batch, time, state)]
    x, dt, A, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x, dt.exp() / 3, -(2 * A).exp(), B / state**0.5, C / state**0.5]


def in_loops(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence, number by number, in float64; `start` and the state behind it are [batch, state, feature]."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    batch, length, features = x.shape
    y, states = torch.zeros_like(x), torch.zeros(batch, A.shape[1], features, dtype=x.dtype)
    for p in range(batch):
        for d in range(features):
            for n in range(A.shape[1]):
                h = 0.0 if start is None else float(start[p % len(start), n, d])
                for t in range(length):
                    h = math.exp(dt[p, t, d] * A[d, n]) * h + float(dt[p, t, d] * B[p, t, n] * x[p, t, d])
                    y[p, t, d] += C[p, t, n] * h
                states[p, n, d] = h
    return y, states


@given(
    seed=st.integers(0, 2**20), batch=st.integers(1, 3), length=st.integers(1, 5), features=st.integers(1, 19),
    state=st.integers(1, 5), begins=st.sampled_from(["nothing", "one", "each"]), threads=st.sampled_from([1, 2]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_scan_is_that_of_plain_loops(
    seed: int, batch: int, length: int, features: int, state: int, begins: str, threads: int
) -> None:
    given = of_scan(seed, batch, length, features, state)
    starts = {"nothing": None, "one": torch.randn(1, state, features), "each": torch.randn(batch, state, features)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, end = scan.selective_scan(*given, starts[begins])
    finally:
        torch.set_num_threads(before)
    expected, state_behind = in_loops(*given, starts[begins])
    torch.testing.assert_close(y.double(), expected, **CLOSE)
    torch.testing.assert_close(end.double(), state_behind, **CLOSE)


@given(
    seed=st.integers(0, 2**20), batch=st.integers(1, 3), length=st.integers(1, 6), features=st.integers(1, 19),
    state=st.integers(1, 5), sets=st.integers(1, 4), rows=st.integers(1, 6),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_rows_resume_from_states_without_their_sources(
    seed: int, batch: int, length: int, features: int, state: int, sets: int, rows: int
) -> None:
    x, dt, A, B, C = of_scan(seed, batch, length + rows, features, state)
    keep = torch.rand(sets, batch, length) < 0.6
    of_prompt = [t[:, :length] for t in (x, dt, B)]
    states = scan.selective_states(*of_prompt[:2], A, of_prompt[2], keep)
    keep[0] = True
    both = scan.selective_scan_and_states(*of_prompt[:2], A, of_prompt[2], C[:, :length], keep)
    assert both is not None
    torch.testing.assert_close(both[0], scan.selective_scan(*of_prompt[:2], A, of_prompt[2], C[:, :length])[0], **CLOSE)
    for index in range(1, sets):
        assert torch.equal(both[1][index], states[index])
    states = both[1]
    number = torch.randint(sets, (rows,))
    own = [t[:, length:] for t in (x, dt, B, C)]  # as many rows as positions are left: each is one that comes next
    read = scan.selective_step(*own[:2], A, *own[2:], states, number)
    for row, index in enumerate(number.tolist()):
        kept = torch.cat([x[:, :length] * keep[index][..., None], own[0][:, row, None]], 1)
        dt_of, B_of, C_of = (torch.cat([t[:, :length], t[:, length + row, None]], 1) for t in (dt, B, C))
        y, _ = in_loops(kept, dt_of, A, B_of, C_of)
        torch.testing.assert_close(read[:, row].double(), y[:, -1], **CLOSE)
    for index, found in enumerate(states):
        _, expected = in_loops(of_prompt[0] * keep[index][..., None], of_prompt[1], A, of_prompt[2], C[:, :length])
        torch.testing.assert_close(found.double(), expected, **CLOSE)


def test_powers_of_two_are_exact_to_the_last_place() -> None:
    """Over everything that a decay can be: y of one channel whose state stays 1 is the decay itself."""
    exponents = -torch.cat([torch.linspace(0, 3, 20001), torch.logspace(-8, 2, 20001), torch.arange(126.0)])
    rate, ones = torch.ones(1, len(exponents)), torch.ones(1, 1, 1)
    nothing = torch.zeros(1, 1, len(exponents))
    y = native.step(nothing, exponents[None, None], rate, ones, ones, [rate[None]], torch.tensor([0]))
    exact = torch.exp2(exponents.double())
    assert ((y[0, 0].double() - exact) / exact).abs().max() < 2**-23
    far = native.step(nothing[..., :1], torch.full((1, 1, 1), -1e9), rate[:, :1], ones, ones, [ones], torch.tensor([0]))
    assert 0 <= float(far) < 1e-37


def test_what_is_no_number_stays_none() -> None:
    x, dt, A, B, C = of_scan(0, 2, 4, 3, 2)
    for broken in (x, dt, B):
        kept = broken.clone()
        broken[0, 1] = math.nan
        y, state = scan.selective_scan(x, dt, A, B, C)
        assert (
            y[0, 1:].isnan().all() and state[0].isnan().all() and not y[0, 0].isnan().any() and not y[1].isnan().any()
        )
        broken.copy_(kept)


def test_other_precisions_gradients_and_machines_go_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = of_scan(1, 2, 5, 4, 3)
    assert native.fits(*given) and not native.fits(*(t.double() for t in given))
    with torch.enable_grad():
        assert not native.fits(*given)
    compiled = scan.selective_scan(*given)
    assert kernels.backend(torch.device("cpu")) == "torch+numba"
    monkeypatch.setattr(native, "kernels", lambda: None)
    assert not native.fits(*given) and kernels.backend(torch.device("cpu")) == "torch"
    for one, other in zip(compiled, scan.selective_scan(*given), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_padding_changes_no_state_and_reads_it() -> None:
    x, dt, A, B, C = of_scan(5, 2, 6, 4, 3)
    dt[0, 4:], dt[1, 2:5] = 0, 0
    keep = torch.rand(3, 2, 6) < 0.6
    keep[0] = True
    both = scan.selective_scan_and_states(x, dt, A, B, C, keep)
    assert both is not None
    torch.testing.assert_close(both[0].double(), in_loops(x, dt, A, B, C)[0], **CLOSE)
    for index, found in enumerate(both[1]):
        torch.testing.assert_close(found.double(), in_loops(x * keep[index][..., None], dt, A, B, C)[1], **CLOSE)
    assert scan.selective_scan_and_states(x, dt, A, B, C, keep & False) is None


def test_inputs_that_do_not_lie_in_one_piece() -> None:
    x, dt, A, B, C = of_scan(2, 3, 6, 4, 3)
    pieces = [t.mT.contiguous().mT for t in (x, dt)] + [A] + [torch.cat([t, t], -1)[..., ::2] for t in (B, C)]
    together = [x, dt, A, *(t.contiguous() for t in pieces[3:])]
    for one, other in zip(scan.selective_scan(*pieces), scan.selective_scan(*together), strict=True):
        assert torch.equal(one, other)
    nothing = [t[:0] if t is not pieces[2] else t for t in pieces]
    assert [len(t) for t in scan.selective_scan(*nothing)] == [0, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_a_fork_scans_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a cluster's job are forks; threads that their parent has are gone in them."""
    given = of_scan(3, 4, 6, 8, 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = scan.selective_scan(*given)[0]
    child = os.fork()
    if not child:  # which never comes back to the tests
        try:
            torch.set_num_threads(1)  # PyTorch's own threads do not survive a fork
            rate = (given[2] * math.log2(math.e)).T.contiguous()
            same = torch.equal(native.scan(*given[:2], rate, *given[3:])[0], expected)
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("the fork waits for threads that it does not have")
    assert status == 0 and torch.equal(scan.selective_scan(*given)[0], expected)
