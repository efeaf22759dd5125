"""Rows of Mamba-2 that resume from a state: over positions, from the state added up, and by the plain recurrence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mambalens.hooks import scan, ssd_rows

TOLERANCE = 1e-11


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One prompt, position by position: x [T, H, P], dt [T, H], B and C [T, H, N]."""
    h, outputs = x.new_zeros(x.shape[1], B.shape[2], x.shape[2]), []
    for x_t, dt_t, B_t, C_t in zip(x, dt, B, C, strict=True):
        h = torch.exp(dt_t * A)[:, None, None] * h + dt_t[:, None, None] * B_t[:, :, None] * x_t[:, None, :]
        outputs.append(torch.einsum("hn,hnp->hp", C_t, h))
    return torch.stack(outputs)


@pytest.mark.parametrize("tile", [2**5, 2**21])
@pytest.mark.parametrize("added_up", [False, True])
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)),
    groups=st.sampled_from([(1, 1), (1, 2), (2, 2), (2, 4), (1, 4), (2, 1), (4, 1), (4, 2), (4, 4)]),
    parts=st.integers(1, 2),
)
def test_rows_resume_as_the_recurrence_goes_on(
    seed: int, sizes: tuple[int, int, int, int, int], groups: tuple[int, int], parts: int, added_up: bool, tile: int
) -> None:
    """With as many B and C as heads on either side, with other values in the place of some, in tiles."""
    batch, past, time, rows, sets = sizes
    heads, size, width = 4, 3, 2
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A = -random(heads).exp()
    x, dt, B = (
        random(parts, batch, past, heads, width),
        random(batch, past, heads).exp(),
        random(batch, past, groups[0], size),
    )
    keep = torch.rand(parts, sets, batch, past, generator=generator) < 0.6
    row_x, row_dt = random(batch, rows, time, heads, width), random(batch, rows, time, heads).exp()
    row_B, row_C = random(2, batch, rows, time, groups[1], size)
    number = torch.randint(0, sets, (rows,), generator=generator)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ssd_rows, "adding_up_pays", lambda *_: added_up)
        patched.setitem(scan.TILE, "cpu", tile)
        of_parts = [
            ssd_rows.ssd_states(*of, A, B, kept) for of, kept in zip(((x_p, dt) for x_p in x), keep, strict=True)
        ]
        states = of_parts[0] if parts == 1 else [one + other for one, other in zip(*of_parts, strict=True)]
        found = ssd_rows.ssd_resume(row_x, row_dt, A, row_B, row_C, states, number)
    by_head, row_by_head = heads // groups[0], heads // groups[1]
    for b in range(batch):
        for row, of in enumerate(number.tolist()):
            values = (x[:, b] * keep[:, of, b, :, None, None]).sum(0)
            keys = B[b].repeat_interleave(by_head, 1)
            own = [t[b, row].repeat_interleave(row_by_head, 1) for t in (row_B, row_C)]
            whole = recurrence(
                torch.cat([values, row_x[b, row]]), torch.cat([dt[b], row_dt[b, row]]), A, torch.cat([keys, own[0]]),
                torch.cat([torch.zeros_like(keys), own[1]]),
            )  # fmt: skip
            assert (found[b, row] - whole[past:]).abs().max() < TOLERANCE * (1 + whole.abs().max())


def test_a_state_is_added_up_for_many_rows_alone() -> None:
    """Mamba-2 130M: 128 x 1,536 numbers."""
    assert not ssd_rows.adding_up_pays(rows=65, time=17, states=5, size=128, lanes=1536)
    assert not ssd_rows.adding_up_pays(rows=2000, time=15, states=5, size=128, lanes=1536)
    assert ssd_rows.adding_up_pays(rows=2000, time=1000, states=5, size=128, lanes=1536)
