"""Activations, gates and the short convolution, compiled or not, against float64 and plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import architecture, tiny
from torch import Tensor

from mambalens.hooks import HookManager, native, pointwise
from mambalens.sweep.replay import UNCUT, Replay, Row

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="no numba")
WIDE = torch.cat([torch.linspace(-30, 30, 200_001), torch.linspace(-86, 86, 1001), torch.logspace(-9, 1, 1001)])
"""Where none of the functions leaves the normal numbers."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def gelu_of(x: Tensor) -> Tensor:
    """In the sigmoid's form, which loses nothing where tanh is near -1."""
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def gate_of(x: Tensor) -> Tensor:
    return pointwise.gated(torch.ones_like(x), x)


@pytest.mark.parametrize(
    ("function", "exact"), [(pointwise.softplus, F.softplus), (gate_of, F.silu), (pointwise.gelu, gelu_of)]
)
def test_every_number_is_right_to_two_last_places(
    function: Callable[[Tensor], Tensor], exact: Callable[[Tensor], Tensor]
) -> None:
    """Of its own and of what one last place of its argument makes of it."""
    given = WIDE.double().requires_grad_()
    with torch.enable_grad():
        expected = exact(given)
        expected.sum().backward()
    assert given.grad is not None
    bound = 2 * 2**-23 * (expected.abs() + (given * given.grad).abs()) + 1e-36
    assert ((function(WIDE).double() - expected).abs() < bound).all()


@pytest.mark.parametrize("function", [pointwise.softplus, gate_of, pointwise.gelu])
def test_what_is_far_out_and_what_is_no_number(function: Callable[[Tensor], Tensor]) -> None:
    far = function(torch.tensor([200.0, 1e6, -200.0, -1e6, math.inf, math.nan, -math.nan, 1.0]))
    assert far[:2].tolist() == [200.0, 1e6] and far[2:4].abs().max() < 1e-30
    assert far[4] == math.inf and far[5:7].isnan().all() and not far[7].isnan()


def arranged(shape: tuple[int, ...], how: str) -> Tensor:
    """Random numbers that lie in one piece, beside others, in turns with others, or the last side outermost."""
    *rows, width = shape
    return {
        "whole": lambda: torch.randn(shape),
        "beside": lambda: torch.randn(*rows, 2 * width + 3)[..., width + 3 :],
        "turns": lambda: torch.randn(*rows, width, 2)[..., 1],
        "outermost": lambda: torch.randn(width, *rows).movedim(0, -1),
    }[how]()


@pytest.mark.parametrize(
    ("shape", "how", "threads"),
    [
        *itertools.product([(2, 3, 5), (7,), (4, 1)], ["whole", "beside", "turns", "outermost"], [1, 2]),
        ((0, 3), "whole", 1),
        ((3, 0), "beside", 1),
        ((), "whole", 1),
    ],
)
def test_numbers_may_lie_anywhere(shape: tuple[int, ...], how: str, threads: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(pointwise, "WORTH", 1)
    x, gate = (arranged(shape, how) if shape else torch.randn(()) for _ in range(2))
    for found, expected in [
        (pointwise.softplus(x), F.softplus(x)),
        (pointwise.gelu(x), F.gelu(x, approximate="tanh")),
        (pointwise.gated(x, gate), x * F.silu(gate)),
    ]:
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


def test_numbers_with_gradients_and_another_default_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = [pointwise.softplus(x), pointwise.gelu(x), pointwise.gated(x, x), pointwise.silu_conv(x, weight, None)]
    finally:
        torch.set_default_dtype(before)
    monkeypatch.setattr(native, "kernels", lambda: None)
    slow = [pointwise.softplus(x), pointwise.gelu(x), pointwise.gated(x, x), pointwise.silu_conv(x, weight, None)]
    torch.testing.assert_close(found, slow, rtol=2e-6, atol=2e-6)


def in_loops(inner: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None) -> Tensor:
    """The convolution and SiLU behind it, number by number, in float64."""
    *batch, time, channels = inner.shape
    kernel = weight.shape[1]
    out = torch.empty(inner.shape, dtype=torch.float64)
    before = torch.zeros(*batch, kernel - 1, channels) if past is None else past.expand(*batch, -1, -1)
    seen = torch.cat([before, inner], -2).double()
    for at in itertools.product(*map(range, batch)):
        for t, c in itertools.product(range(time), range(channels)):
            total = 0.0 if bias is None else float(bias[c])
            for k in range(kernel):
                total += float(weight[c, k].double() * seen[at][t + k, c])
            out[at][t, c] = total / (1 + math.exp(-total))
    return out


@given(
    batch=st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple), length=st.integers(1, 6),
    channels=st.integers(1, 9), kernel=st.integers(1, 4), biased=st.booleans(), threads=st.sampled_from([1, 2]),
    before=st.sampled_from(["nothing", "own", "the prompt's", "one", "the row's"]), how=st.sampled_from(["whole", "beside"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_convolution_is_that_of_plain_loops(
    batch: tuple[int, ...], length: int, channels: int, kernel: int, biased: bool, threads: int, before: str, how: str
) -> None:
    inner, weight = arranged((*batch, length, channels), how), torch.randn(channels, kernel)
    bias = torch.randn(channels) if biased else None
    ones = (1,) * len(batch)
    shared = {"own": batch, "the prompt's": (*batch[:-1], 1), "one": ones, "the row's": (*ones[:-1], batch[-1])}
    past = torch.randn(*shared[before], kernel - 1, channels) if before in shared else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(pointwise, "WORTH", 1)
        found = pointwise.silu_conv(inner, weight, bias, past)
        patch.setattr(native, "kernels", lambda: None)
        by_pytorch = pointwise.silu_conv(inner, weight, bias, past)
    expected = in_loops(inner, weight, bias, past)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(by_pytorch.double(), expected, rtol=3e-6, atol=3e-6)


def test_which_sequences_share_their_past() -> None:
    sharing = pointwise._sharing
    assert sharing((4, 5), (4, 1)) == 5 and sharing((4, 5), (4, 5)) == 1 and sharing((4, 5), (1, 1)) == 20
    assert sharing((4, 5), (1, 5)) is None, "every fifth sequence has the same"
    assert sharing((4, 1), (4, 1)) == 1 and sharing((6,), (6,)) == 1 and sharing((), ()) == 1


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "qwen3_next", "gpt2"])
def test_a_replay_by_either(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that it is by them: each is called in the architectures that have it."""
    model = architecture(name, torch.float32) if name == "qwen3_next" else tiny(name, torch.float32)
    hooks = HookManager(model)
    ids, last = torch.randint(2, model.config.vocab_size, (3, 9)), torch.tensor([8, 6, 7])
    sources = torch.rand(2, 3, 9) < 0.4
    cuts = [UNCUT, *(Row(hooks.resolve([0, 1]), ((number, 0),)) for number in (1, 2))]

    def logits() -> Tensor:
        return torch.stack([found for _, found in sorted(Replay(hooks, ids, last, sources).logits(cuts))])

    called = set()
    monkeypatch.setattr(native, "the_kernels", recorder(native.the_kernels(), called.add))
    compiled = logits()
    expected = {
        "mamba1": {"scan_and_states", "step", "softplus", "gated", "silu_conv"},
        "mamba2": {"softplus", "silu_conv"},
        "qwen3_next": {"silu_conv"},
        "gpt2": {"gelu"},
    }
    assert called == expected[name]
    monkeypatch.setattr(native, "kernels", lambda: None)
    slow = logits()
    assert not torch.equal(compiled, slow)
    torch.testing.assert_close(compiled, slow, rtol=1e-4, atol=1e-5)
    assert (slow[0] - slow[1]).abs().max() > 1e-3, "nothing was cut"


def recorder(kernels: Any, tell: Callable[[str], Any]) -> Callable[[], Any]:
    class Recorded:
        def __getattr__(self, name: str) -> Any:
            tell(name)
            return getattr(kernels, name)

    return Recorded


def test_what_hangs_on_an_activation_still_runs() -> None:
    hooks = HookManager(tiny("mamba1", torch.float32))
    mixer, inner = hooks.mixers[0], torch.randn(2, 5, 48)
    plain = mixer.convolved(inner, None)
    handle = mixer.module.act.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(mixer.convolved(inner, None), 2 * plain)
    handle.remove()
    assert torch.equal(mixer.convolved(inner, None), plain)
