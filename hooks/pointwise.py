"""Functions of every number alone, and a short convolution with one behind it: what a mixer does beside its products.

PyTorch's operations, or in float32 on a CPU those that numba compiles (`numba_kernels`), where it is installed; the
two differ in the last digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mambalens.hooks import native, team
from mambalens.hooks.scan import causal_conv

WORTH = 2**16
"""Numbers that are worth a thread."""


def softplus(x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """log(1 + e^x)."""
    return _each(native.the_kernels().softplus, x) if _fits(x) else F.softplus(x)


def gelu(x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """GELU with tanh (Hendrycks & Gimpel 2016, arXiv:1606.08415): x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    return _each(native.the_kernels().gelu, x) if _fits(x) else F.gelu(x, approximate="tanh")


def gated(x: Float[Tensor, "*batch"], gate: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """What a gate lets through (Shazeer 2020, arXiv:2002.05202): x silu(gate) = x gate sigmoid(gate)."""
    if not _fits(x, gate):
        return x * F.silu(gate)
    of_x, (flat, stride), made = _rows(x), _apart(gate), x.new_empty(x.shape)
    y, run = _rows(made), native.the_kernels().gated
    team.parts(len(y), lambda begin, end: run(of_x[begin:end], flat[begin * stride :], stride, y[begin:end]), _worth(y))
    return made


def silu_conv(
    inner: Float[Tensor, "*batch time channel"],
    weight: Float[Tensor, "channel kernel"],
    bias: Float[Tensor, " channel"] | None,
    past: Float[Tensor, "*#batch before channel"] | None = None,
) -> Float[Tensor, "*batch time channel"]:
    """`scan.causal_conv` with all its taps, and SiLU behind it.

    Args:
        inner: input.
        weight: taps, the nearest last.
        bias: added to every output.
        past: inputs before the first, `kernel - 1` of them; zero by default. Of a batch [prompts, rows] it is that of
            the prompts, [prompts, 1], say.
    """
    tensors = [t for t in (inner, weight, bias, past) if t is not None]
    shared = None if past is None else _sharing(inner.shape[:-2], past.shape[:-2])
    if not _fits(*tensors) or (past is not None and shared is None):
        return F.silu(causal_conv(inner, weight, bias, past=past))
    made = inner.new_empty(inner.shape)
    y, (flat, stride) = made.view(-1, *inner.shape[-2:]).numpy(), _apart(inner)
    before = (
        weight.new_zeros(1, weight.shape[1] - 1, len(weight)) if past is None else past.reshape(-1, *past.shape[-2:])
    )
    offset = weight.new_zeros(len(weight)) if bias is None else bias
    taps, of_bias, of_past = (t.detach().contiguous().numpy() for t in (weight.T, offset, before))
    run = native.the_kernels().silu_conv
    team.parts(
        len(y),
        lambda begin, end: run(flat, stride, taps, of_bias, of_past, shared or len(y), begin, end, y),
        _worth(y),
    )
    return made


def _fits(*tensors: Float[Tensor, " ..."]) -> bool:
    return all(t.ndim and t.numel() for t in tensors) and native.fits(*tensors)


def _each(run: Callable[..., None], x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """A kernel's function of every number."""
    of_x, made = _rows(x), x.new_empty(x.shape)
    y = _rows(made)
    team.parts(len(y), lambda begin, end: run(of_x[begin:end], y[begin:end]), _worth(y))
    return made


def _rows(x: Float[Tensor, "*batch"]) -> Float[np.ndarray, "row width"]:
    return x.detach().contiguous().view(-1, x.shape[-1]).numpy()


def _worth(y: Float[np.ndarray, " ..."]) -> int:
    """How many parts are worth a thread."""
    return max(1, WORTH // y[0].size)


def _apart(x: Float[Tensor, "*batch"]) -> tuple[Float[np.ndarray, " number"], int]:
    """The memory from a tensor's first number to its last, and how far apart rows begin in it."""
    rows = x.detach().reshape(-1, x.shape[-1])  # the same memory, if rows are equally far apart
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    stride = rows.stride(0)
    return rows.as_strided(((len(rows) - 1) * stride + rows.shape[1],), (1,)).numpy(), stride


def _sharing(batch: Sequence[int], of_past: Sequence[int]) -> int | None:
    """How many sequences side by side have one past; None where those that share one do not lie side by side."""
    own = len(of_past)
    while own and of_past[own - 1] == 1:
        own -= 1
    return math.prod(batch[own:]) if tuple(of_past[:own]) == tuple(batch[:own]) else None
