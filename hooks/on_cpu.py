"""What a CPU does faster in another way: products of fewer tokens, in rows that lie well, one operation for eight.

Nothing of it changes more than the last digits of what anybody reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from mambalens.hooks import pointwise
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
            return pointwise.gelu(x)

        return gelu

    with ExitStack() as stack:
        for module in {part for layer in layers for part in layer.modules() if type(part) is NewGELUActivation}:
            stack.callback(replace_forward(module, at_once))
        yield


class Room:
    """Memory for logits on a CPU that is written anew for every batch.

    As much anew from the system each time takes an eighth of the time of the product that fills it.
    """

    def __init__(self) -> None:
        self._numbers = torch.empty(0)

    def of(self, rows: int, width: int) -> Float[Tensor, "row width"]:
        """Rows that hold anything, in the memory of those that were given before."""
        if self._numbers.numel() < rows * width:
            self._numbers = torch.empty(0)  # not both at once
            self._numbers = torch.empty(rows * width)
        return self._numbers[: rows * width].view(rows, width)


@contextmanager
def roomy_head(model: Any, room: Room | None = None) -> Iterator[None]:
    """While the block runs, the head writes the logits of many rows where a matrix product writes fast.

    Rows of GPT-2's 50,257 logits, one below the other, begin anywhere in a processor's vectors: they are spaced.

    Args:
        model: the model.
        room: where to write them, over what was there; memory of their own by default.
    """

    def spaced(forward: Forward) -> Forward:
        def project(x: Float[Tensor, "*row hidden"]) -> Float[Tensor, "*row vocabulary"]:
            weight, rows = head.weight, x[..., 0].numel()
            fits = x.dtype == weight.dtype == torch.float32 and weight.device.type == "cpu"
            if not fits or torch.is_grad_enabled() or rows < FEW:
                return forward(x)
            width = -(-len(weight) // ALIGNED) * ALIGNED
            out = (x.new_empty(rows, width) if room is None else room.of(rows, width))[:, : len(weight)]
            return torch.mm(x.reshape(rows, -1), weight.T, out=out).unflatten(0, x.shape[:-1])

        return project

    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or (room is None and head.out_features % ALIGNED == 0):
        yield
        return
    restore = replace_forward(head, spaced)
    try:
        yield
    finally:
        restore()
