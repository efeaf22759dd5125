"""What a CPU does faster in another way: products of fewer tokens, in rows that lie well, one operation for eight.

Nothing of it changes more than the last digits of what anybody reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from mambalens.hooks.mixer import replace_forward

PROJECTIONS = (nn.Linear, Conv1D)
"""What works on every token alone, and is most of the work."""
ALIGNED = 16
"""Numbers to whose multiple rows of a product are spaced: else MKL takes 1.4 times as long in float32."""
FEW = 64
"""Rows of a product that are too few for it to matter."""

Forward = Callable[[Tensor], Tensor]


@contextmanager
def tokens_alone(
    layers: Iterable[nn.Module],
    tokens: tuple[Int[Tensor, " token"], Int[Tensor, " token"]],
    shape: tuple[int, ...],
    now: Callable[[], bool],
) -> Iterator[None]:
    """While the block runs, the layers' projections take some tokens alone; others, which nobody reads, get 0.

    Args:
        layers: a model's layers.
        tokens: prompt and column of each.
        shape: prompts and columns of the pass; what has another shape goes through whole.
        now: whether it is this pass that runs.
    """

    def of_tokens(forward: Forward) -> Forward:
        def project(x: Float[Tensor, "*row given"]) -> Float[Tensor, "*row made"]:
            if x.shape[:-1] != shape or x.device.type != "cpu" or not now():
                return forward(x)
            made = forward(x[tokens])
            out = made.new_zeros(*shape, made.shape[-1])
            out[tokens] = made
            return out

        return project

    with ExitStack() as stack:
        if 0 < len(tokens[0]) < math.prod(shape):
            for module in {part for layer in layers for part in layer.modules() if type(part) in PROJECTIONS}:
                stack.callback(replace_forward(module, of_tokens))
        yield


@contextmanager
def one_gelu(layers: Iterable[nn.Module]) -> Iterator[None]:
    """While the block runs, GPT-2's activation, which transformers writes as eight operations, is one in float32.

    Args:
        layers: a model's layers.
    """

    def at_once(forward: Forward) -> Forward:
        def gelu(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
            if x.dtype != torch.float32 or x.device.type != "cpu":
                return forward(x)
            return F.gelu(x, approximate="tanh")

        return gelu

    with ExitStack() as stack:
        for module in {part for layer in layers for part in layer.modules() if type(part) is NewGELUActivation}:
            stack.callback(replace_forward(module, at_once))
        yield


@contextmanager
def aligned_head(model: Any) -> Iterator[None]:
    """While the block runs, the head writes the logits of many rows where a matrix product writes fast.

    Rows of GPT-2's 50,257 logits, one below the other, begin anywhere in a processor's vectors.
    """

    def spaced(forward: Forward) -> Forward:
        def project(x: Float[Tensor, "*row hidden"]) -> Float[Tensor, "*row vocabulary"]:
            weight, rows = head.weight, x[..., 0].numel()
            fits = x.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu"
            if not fits or torch.is_grad_enabled() or rows < FEW:
                return forward(x)
            room = x.new_empty(rows, -(-len(weight) // ALIGNED) * ALIGNED)[:, : len(weight)]
            return torch.mm(x.reshape(rows, -1), weight.T, out=room).unflatten(0, x.shape[:-1])

        return project

    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.out_features % ALIGNED == 0:
        yield
        return
    restore = replace_forward(head, spaced)
    try:
        yield
    finally:
        restore()
