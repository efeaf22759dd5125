"""Which code scans: mamba-ssm's CUDA kernels where they are installed and the tensors are there, `scan` elsewhere.

A knockout is one more scan over masked inputs, so the official kernels can do it. `tests/test_kernels.py` compares them
with `scan` where there is a GPU, `tests/test_triton.py` in Triton's interpreter where there is none.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.hooks import fused, native, scan

CHUNK = 256
"""Positions of a chunk of Mamba-2's kernel; a power of two."""


@cache
def installed() -> bool:
    """Whether mamba-ssm's kernels can be imported."""
    if not torch.cuda.is_available() or find_spec("mamba_ssm") is None:
        return False
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # noqa: F401
    except Exception:  # built for another torch or another GPU: it may raise anything
        return False
    return True


def backend(device: torch.device) -> str:
    """What scans on a device: 'mamba-ssm', or 'torch'.

    '+numba' where Mamba-1's scan, activations and short convolutions run compiled on a CPU (in float32, without
    gradients), '+compile' where Mamba-1's steps do.
    """
    if device.type == "cpu" and native.kernels():
        return "torch+numba"
    return ("mamba-ssm" if _on(device) else "torch") + ("+compile" if fused.compiled() else "")


def selective_scan(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch state feature"]]:
    """`scan.selective_scan` by mamba-ssm's `selective_scan_fn` where it can."""
    if not _usable(x):
        return scan.selective_scan(x, dt, A, B, C)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y, state = selective_scan_fn(*(t.mT.contiguous() for t in (x, dt)), A, *(t.mT.contiguous() for t in (B, C)),
                                 return_last_state=True)  # fmt: skip
    return y.mT, state.mT


def ssd_scan(
    x: Float[Tensor, "batch time feature width"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    C: Float[Tensor, "batch time group state"],
    end: bool = True,
) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, "batch feature state width"] | None]:
    """`scan.ssd_scan` by mamba-ssm's `mamba_chunk_scan_combined` where it can."""
    if not _usable(x):
        return scan.ssd_scan(x, dt, A, B, C, end=end)
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, state = mamba_chunk_scan_combined(
        *(t.contiguous() for t in (x, dt, A, B, C)), chunk_size=CHUNK, return_final_states=True
    )
    return y, state.mT


def _on(device: torch.device) -> bool:
    return device.type == "cuda" and installed()


def _usable(x: Float[Tensor, " ..."]) -> bool:
    # The kernels have no float64.
    return _on(x.device) and x.dtype == torch.float32
