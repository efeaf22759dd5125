"""Mamba-1's step in one pass over memory, by torch.compile, where sweeps are long enough to pay for compiling.

What is compiled is written as a compiler fuses it, `step_in_torch` as PyTorch's own kernels are fast. Compiling is
tried once a process at most; where it fails, or a call does not fit what was compiled, the caller goes on without.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

PAYS_FROM = 10**11
"""Exponentials to come from which compiling pays: it takes about 10 s, and saves about 0.3 ns of each on two cores."""

log = logging.getLogger(__name__)
_expected = 0
_compiled: Callable[..., Tensor] | None = None
_tried = False


def step_in_torch(
    dt: Float[Tensor, "batch rows feature"],
    rate: Float[Tensor, "state feature"],
    C: Float[Tensor, "batch rows state"],
    start: Float[Tensor, "batch state feature"],
    scratch: Float[Tensor, "batch rows state feature"] | None = None,
) -> Float[Tensor, "batch rows feature"]:
    """`C . (exp2(dt rate) start)`: what a position reads of the state before it.

    Args:
        dt, C: of every row.
        rate: A in powers of two.
        start: the state before the position.
        scratch: memory to work in.
    """
    product = torch.mul(dt[..., None, :], rate, out=scratch)
    # A product of matrices reads what is written once; elementwise, it would be written and read once more.
    return (C[..., None, :] @ product.exp2_().mul_(start[:, None]))[..., 0, :]


def _step_in_one(
    dt: Float[Tensor, "batch rows feature"],
    rate: Float[Tensor, "state feature"],
    C: Float[Tensor, "batch rows state"],
    start: Float[Tensor, "batch state feature"],
) -> Float[Tensor, "batch rows feature"]:
    """`step_in_torch`, elementwise."""
    return (torch.exp2(dt[..., None, :] * rate) * start[:, None] * C[..., None]).sum(-2)


def step(
    dt: Float[Tensor, "batch rows feature"],
    rate: Float[Tensor, "state feature"],
    C: Float[Tensor, "batch rows state"],
    start: Float[Tensor, "batch state feature"],
) -> Float[Tensor, "batch rows feature"] | None:
    """`step_in_torch` by a compiled function; None where it is not, or does not fit these tensors."""
    global _compiled
    if _compiled is None or not _fits(dt, rate, C, start):
        return None
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            return _compiled(dt.contiguous(), rate, C.contiguous(), start.contiguous())
    except Exception as error:  # whatever a compiler may raise: the same lines run without it
        _give_up(error)
        return None


def expect(exponentials: int, device: torch.device) -> None:
    """Announce work on a device; compiles for it when what was announced in this process is worth it."""
    global _expected
    _expected += exponentials
    if _expected >= PAYS_FROM and not _tried:
        compile_step(device)


def compile_step(device: torch.device) -> bool:
    """Compile now; returns whether it worked."""
    global _compiled, _tried
    if _tried:
        return _compiled is not None
    _tried = True
    # Sizes that differ, and none of them 1: the compiler treats equal sizes as one, and ones as constants.
    sizes = {"batch": 2, "rows": 3, "state": 5, "features": 7}

    def example(*names: str) -> Float[Tensor, " ..."]:
        return torch.rand([sizes[name] for name in names], device=device)

    arguments = (
        example("batch", "rows", "features"), example("state", "features"), example("batch", "rows", "state"),
        example("batch", "state", "features"),
    )  # fmt: skip
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Unwrapped: what checks shapes while the tests run does not compile.
            function = torch.compile(inspect.unwrap(_step_in_one), dynamic=True, fullgraph=True)
            torch.testing.assert_close(function(*arguments), step_in_torch(*arguments))
        _compiled = function
    except Exception as error:  # no compiler, a broken one, a read-only cache folder: all the same here
        _give_up(error)
    return _compiled is not None


def compiled() -> bool:
    """Whether steps run compiled."""
    return _compiled is not None


def _fits(*tensors: Float[Tensor, " ..."]) -> bool:
    return not torch.is_grad_enabled() and all(t.dtype == torch.float32 and 1 not in t.shape for t in tensors)


def _give_up(error: Exception) -> None:
    global _compiled
    _compiled = None
    log.info("Mamba-1's step runs without torch.compile: %s", error)
