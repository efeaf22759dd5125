"""Scans: against the plain recurrence, compiled, differentiated, and by the official kernels where there is a GPU."""

from __future__ import annotations

import importlib.util
import math
import shutil
from types import ModuleType

import pytest
import torch

from mambalens.hooks import fused, kernels, native, scan


def random(seed: int, batch: int, time: int, features: int, state: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, dt, A, B, C of Mamba-1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, time, features), (batch, time, features), (features, state), (batch, time, state)]
    x, dt, A, B, C = (torch.randn(s, generator=generator, dtype=dtype) for s in [*shapes, shapes[-1]])
    return [x, dt.exp() / 3, -A.exp(), B, C]


def recurrence(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """Position by position, out of place."""
    h, outputs = torch.zeros(len(x), *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("tile", [1, 40, 2**21])
def test_tiles_do_not_matter(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scan.TILE, "cpu", tile)
    x, dt, A, B, C = random(0, 3, 11, 4, 5, torch.float64)
    keep = torch.rand(3, 3, 11) < 0.5
    with torch.no_grad():
        y, state = scan.selective_scan(x, dt, A, B, C)
        assert torch.allclose(y, recurrence(x, dt, A, B, C), atol=1e-12)
        for kept, got in zip(keep, scan.selective_states(x, dt, A, B, keep), strict=True):
            assert torch.allclose(got, scan.selective_scan(x * kept[..., None], dt, A, B, C)[1], atol=1e-12)
        first, middle = scan.selective_scan(x[:, :6], dt[:, :6], A, B[:, :6], C[:, :6])
        later, end = scan.selective_scan(x[:, 6:], dt[:, 6:], A, B[:, 6:], C[:, 6:], middle)
        assert torch.allclose(torch.cat([first, later], 1), y, atol=1e-12)
        assert torch.allclose(end, state, atol=1e-12)


def test_the_scan_has_the_gradient_of_the_recurrence() -> None:
    """Training differentiates it."""
    gradients = []
    for function in (lambda *t: scan.selective_scan(*t)[0], recurrence):
        leaves = [t.requires_grad_() for t in random(1, 2, 7, 3, 4, torch.float64)]
        gradients.append(torch.autograd.grad(function(*leaves).sin().sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`fused` as a new process has it, in its place while the test runs: others go on without a compiled step."""
    spec = importlib.util.find_spec(fused.__name__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for user in (scan, kernels):
        monkeypatch.setattr(user, "fused", module)
    return module


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_the_compiled_step_is_the_same_for_any_size(fresh: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)
    cpu = torch.device("cpu")
    with torch.no_grad():
        steps = []
        for seed, (rows, batch, state, features) in enumerate([(3, 2, 4, 8), (5, 5, 5, 5), (40, 3, 16, 96)]):
            x, dt, A, B, C = random(seed, batch, rows, features, state, torch.float32)
            states = [torch.randn(batch, state, features) for _ in range(2)]
            steps.append((x, dt, A, B, C, states, torch.arange(rows) % 2))
        slow = [scan.selective_step(*step) for step in steps]
        assert kernels.backend(cpu) == "torch"
        assert fresh.compile_step(cpu)
        assert kernels.backend(cpu) == "torch+compile"
        for (x, dt, A, B, C, states, number), expected in zip(steps, slow, strict=True):
            rate = (A * math.log2(math.e)).T.contiguous()
            read = fresh.step(dt, rate, C, states[0])
            assert read is not None, "this size was compiled again, or refused"
            plain = torch.einsum("brfs,bsf,brs->brf", torch.exp(dt[..., None] * A), states[0], C)
            torch.testing.assert_close(read, plain, rtol=1e-5, atol=1e-5)
            fast = scan.selective_step(x, dt, A, B, C, states, number)
            torch.testing.assert_close(fast, expected, rtol=1e-5, atol=1e-5)
    assert fresh.compiled() and not fused.compiled()


@pytest.mark.skipif(not kernels.installed(), reason="no CUDA GPU with mamba-ssm")
def test_the_official_kernels_agree() -> None:
    cuda = [t.cuda() for t in random(0, 2, 300, 64, 16, torch.float32)]
    for ours, theirs in zip(scan.selective_scan(*cuda), kernels.selective_scan(*cuda), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
    x, dt = torch.randn(2, 300, 4, 64).cuda(), torch.rand(2, 300, 4).cuda()
    A, B, C = -torch.rand(4).cuda(), torch.randn(2, 300, 2, 64).cuda(), torch.randn(2, 300, 2, 64).cuda()
    for ours, theirs in zip(scan.ssd_scan(x, dt, A, B, C), kernels.ssd_scan(x, dt, A, B, C), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-2, atol=1e-2)
