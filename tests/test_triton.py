"""mamba-ssm's kernels against the scans in torch, without a GPU: Triton runs them in its interpreter, on the CPU.

`make triton` installs what this needs and runs it. What the interpreter cannot show: products in TF32, the code that is
compiled for a GPU, and the kernel of Mamba-1's scan, which is C++; in its place the package's own reference in torch runs,
so that what is handed to it is checked, and what comes back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import in_double, in_torch
from torch import Tensor
from verbs import VERBS, difference, lens_of

from mambalens.hooks import kernels, scan, ssd_rows

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="Triton interprets nothing here: run `make triton`"
    ),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("triton", "mamba_ssm")),
        reason="triton or mamba_ssm is not installed: run `make triton`",
    ),
]
BATCH, HEADS, GROUPS, WIDTH, STATE = 2, 4, 2, 8, 6
"""Of Mamba-2; no power of two where the kernels fill up to one."""
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
"""Of sums of up to 300 float32 numbers, added in another order."""
ROUNDED = 10.0
"""How many times what float32 and float64 differ by in torch, kernels may differ by."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels are taken for tensors of the CPU."""
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "1")  # one configuration of each kernel: to find the fastest takes a GPU
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=1)
    )
    if importlib.util.find_spec("selective_scan_cuda") is None:  # it is built with CUDA, and mamba_ssm imports it
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    from mamba_ssm.ops import selective_scan_interface as interface

    # Transformers calls it too, wherever mamba_ssm can be imported.
    monkeypatch.setattr(interface, "SelectiveScanFn", types.SimpleNamespace(apply=interface.selective_scan_ref))
    monkeypatch.setattr(kernels, "_on", lambda device: True)
    yield


def of_ssd(seed: int, time: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, dt, A, B, C of Mamba-2, whose heads decay at different rates."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    x, dt = draw(BATCH, time, HEADS, WIDTH), draw(BATCH, time, HEADS).exp() / 5
    return [x, dt, -draw(HEADS).exp(), draw(BATCH, time, GROUPS, STATE), draw(BATCH, time, GROUPS, STATE)]


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Mamba-2 position by position, in float64: y, and the last state [batch, head, state, width]."""
    x, dt, A, B, C = (t.double() for t in (x, dt, A, B, C))
    B, C = (t.repeat_interleave(HEADS // GROUPS, 2) for t in (B, C))
    h, outputs = torch.zeros(BATCH, HEADS, STATE, WIDTH, dtype=torch.float64), []
    for t in range(x.shape[1]):
        written = torch.einsum("bh,bhn,bhp->bhnp", dt[:, t], B[:, t], x[:, t])
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + written
        outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], h))
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("time", [1, 7, 64, 300])
def test_mamba2s_kernel_is_the_recurrence(time: int) -> None:
    """Shorter than one of its chunks, and longer; some positions neither decay nor write, as those that are replayed."""
    x, dt, A, B, C = of_ssd(time, time)
    dt[0, time // 2 :] = 0
    y, state = kernels.ssd_scan(x, dt, A, B, C)
    for found, ours, expected in zip(
        (y, state), scan.ssd_scan(x, dt, A, B, C), recurrence(x, dt, A, B, C), strict=True
    ):
        assert found is not None and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, **TOLERANCE)
        torch.testing.assert_close(found, ours, **TOLERANCE)


def test_mamba2s_kernel_goes_on_from_a_state() -> None:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, A, B, C = of_ssd(0, 40)
    first, later = ([t[:, at] for t in (x, dt, B, C)] for at in (slice(0, 23), slice(23, None)))
    _, state = kernels.ssd_scan(first[0], first[1], A, *first[2:])
    assert state is not None
    y, end = mamba_chunk_scan_combined(
        later[0], later[1], A, *later[2:], chunk_size=16, initial_states=state.mT.contiguous(), return_final_states=True
    )
    whole, last = recurrence(x, dt, A, B, C)
    torch.testing.assert_close(y.double(), whole[:, 23:], **TOLERANCE)
    torch.testing.assert_close(end.mT.double(), last, **TOLERANCE)
    ours, ours_end = scan.ssd_scan(later[0], later[1], A, *later[2:], start=state)
    torch.testing.assert_close(y, ours, **TOLERANCE)
    torch.testing.assert_close(end.mT, ours_end, **TOLERANCE)


def test_mamba2s_kernel_has_the_gradient_of_the_recurrence() -> None:
    """Flow attributes by it."""
    gradients = []
    for function, dtype in ((kernels.ssd_scan, torch.float32), (recurrence, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in of_ssd(3, 20)]
        gradients.append(torch.autograd.grad(function(*leaves)[0].sin().sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_step_of_mamba2_is_that_of_mamba_ssm() -> None:
    """Rows resume from a state that other inputs than their own have left."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    x, dt, A, B, C = of_ssd(1, 9)
    keep = torch.rand(3, BATCH, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    states = ssd_rows.ssd_states(x[:, :8], dt[:, :8], A, B[:, :8], keep)
    rows = torch.arange(3)
    x_r, dt_r, B_r, C_r = (t[:, None, 8:].expand(-1, 3, -1, *t.shape[2:]) for t in (x, dt, B, C))
    found = ssd_rows.ssd_resume(x_r, dt_r, A, B_r, C_r, states, rows)[:, :, 0]
    for row, state in enumerate(states):
        of_head = state.heads(HEADS).mT.contiguous()  # [batch, head, width, state]
        expected = selective_state_update(
            of_head, x[:, 8], dt[:, 8, :, None].expand(-1, -1, WIDTH), A[:, None, None].expand(-1, WIDTH, STATE), B[:, 8],
            C[:, 8], torch.zeros(HEADS, WIDTH), dt_bias=torch.zeros(HEADS, 1).expand(-1, WIDTH),
        )  # fmt: skip
        torch.testing.assert_close(found[:, row], expected, **TOLERANCE)
        kept = x * torch.cat([keep[row], torch.ones(BATCH, 1, dtype=torch.bool)], 1)[..., None, None]
        whole, end = recurrence(kept, dt, A, B, C)
        torch.testing.assert_close(expected.double(), whole[:, 8], **TOLERANCE)
        torch.testing.assert_close(of_head.mT.double(), end, **TOLERANCE)  # it was changed in place


def test_a_step_of_mamba1_is_that_of_mamba_ssm() -> None:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(BATCH, 9, 12, generator=generator), torch.rand(BATCH, 9, 12, generator=generator)
    A, B, C = -torch.rand(12, 5, generator=generator), *torch.randn(2, BATCH, 9, 5, generator=generator)
    keep = torch.rand(3, BATCH, 8, generator=generator) < 0.5
    states = scan.selective_states(x[:, :8], dt[:, :8], A, B[:, :8], keep)
    last = [t[:, 8:].expand(-1, 3, -1) for t in (x, dt, B, C)]
    found = scan.selective_step(last[0], last[1], A, last[2], last[3], states, torch.arange(3))
    for row, state in enumerate(states):
        # It does not take None for the skip and the bias, as it says it does.
        none = torch.zeros(12)
        expected = selective_state_update(
            state.mT.contiguous(), x[:, 8], dt[:, 8], A, B[:, 8], C[:, 8], none, dt_bias=none
        )
        torch.testing.assert_close(found[:, row], expected, **TOLERANCE)


def test_mamba1s_scan_is_handed_over_as_mamba_ssm_takes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(BATCH, 9, 12, generator=generator), torch.rand(BATCH, 9, 12, generator=generator)
    A, B, C = -torch.rand(12, 5, generator=generator), *torch.randn(2, BATCH, 9, 5, generator=generator)
    for theirs, ours in zip(kernels.selective_scan(x, dt, A, B, C), scan.selective_scan(x, dt, A, B, C), strict=True):
        torch.testing.assert_close(theirs, ours, **TOLERANCE)


def test_what_is_compared_on_the_cpu_takes_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make gpu` holds a GPU's numbers against it."""
    from mamba_ssm.ops import selective_scan_interface as interface

    def refuse(*args: Any) -> Tensor:
        raise RuntimeError("no tensor of a GPU")

    monkeypatch.setattr(interface, "SelectiveScanFn", types.SimpleNamespace(apply=refuse))
    lens = lens_of("mamba", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), pytest.raises(RuntimeError, match="no tensor of a GPU"):
        lens.model(ids, use_cache=False)
    with torch.no_grad(), in_torch(lens.model):
        found = lens.model(ids, use_cache=False).logits
    with torch.no_grad(), in_double(lens_of("mamba").model):
        expected = lens_of("mamba").model(ids, use_cache=False).logits
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("verb", ["sweep", "hooked sweep", "flow"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_verbs_give_the_same_numbers_by_the_kernels(name: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Knockouts on every path, states without sources, replay, attribution: by kernels and in torch. (Minutes.)"""
    monkeypatch.setattr(kernels, "CHUNK", 16)  # the interpreter goes through a chunk however short a prompt is
    used = []
    for scan_by in ("selective_scan", "ssd_scan"):
        original: Any = getattr(kernels, scan_by)

        def noted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            used.append(kernels._usable(args[0]))
            return original(*args, **kwargs)

        monkeypatch.setattr(kernels, scan_by, noted)
    lens, double = lens_of(name, dtype=torch.float32), lens_of(name)
    found = VERBS[verb](lens)
    assert used and all(used)
    assert lens.hooks.backend == "mamba-ssm"
    monkeypatch.setattr(kernels, "_on", lambda device: False)
    ours = VERBS[verb](lens)
    with in_double(double.model):
        noise = difference(ours, VERBS[verb](double))
    assert difference(found, ours) <= ROUNDED * max(noise, 1e-6)
