"""Norms whose scale is held fixed: what a model's code computes is then linear in what goes through its norms.

A norm divides its input by a scale that it takes from the same input. With the scale a constant, what is left, times
its weight, is linear, so that the parts of the input each have their share of the output, and the shares add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SCALES = frozenset({
    torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt, torch.std, Tensor.std, torch.norm, Tensor.norm,
    torch.linalg.norm, torch.linalg.vector_norm,
})  # fmt: skip
"""What norms make their scales with."""
_POWERS = frozenset({torch.pow, Tensor.pow, Tensor.__pow__})


class FixedScales(TorchFunctionMode):
    """While the block runs, scales that norms compute are constants to autograd, whatever code a norm has.

    Equation: Contributions
        norm(x) = w (x - mean(x)) / sigma + b    sigma = sigma(x) of the run, a constant

        Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, 'Handling layer normalization'

        RMSNorm is the same without mean and b.

    Args:
        scales: take these in the place of the scales that are computed, in their order: those of an earlier run of the
            same code on other rows. They broadcast.

    Attributes:
        scales: those of this run.
    """

    def __init__(self, scales: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.scales: list[Tensor] = []
        self._given: Iterator[Tensor] | None = None if scales is None else iter(scales)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return self._layer_norm(*args, **kwargs)
        if func is F.rms_norm:
            return self._rms_norm(*args, **kwargs)
        if func is F.normalize:
            return self._normalize(*args, **kwargs)
        root = func in _POWERS and len(args) > 1 and isinstance(args[1], float) and abs(args[1]) == 0.5
        if func in _SCALES or root:
            return self._scale(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _scale(self, computed: Callable[[], Tensor]) -> Tensor:
        scale = computed().detach() if self._given is None else next(self._given)
        self.scales.append(scale)
        return scale

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        dims = tuple(range(-len(normalized_shape), 0))
        centred = input - input.mean(dims, keepdim=True)
        normed = centred * self._scale(lambda: torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps))
        normed = normed if weight is None else normed * weight
        return normed if bias is None else normed + bias

    def _rms_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        dims = tuple(range(-len(normalized_shape), 0))
        least = torch.finfo(input.dtype).eps if eps is None else eps
        normed = input * self._scale(lambda: torch.rsqrt(input.square().mean(dims, keepdim=True) + least))
        return normed if weight is None else normed * weight

    def _normalize(self, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor:
        return input / self._scale(lambda: input.norm(p, dim, keepdim=True).clamp_min(eps))
