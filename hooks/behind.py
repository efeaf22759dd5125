"""A model's own code behind its layers: final norm, head, soft-capping, scaling of logits, whatever it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambalens.hooks.mixer import replace_forward
from mambalens.hooks.on_cpu import Room, roomy_head

Beside = Sequence[tuple[Any, ...] | None]
"""What each layer returns beside its hidden states; None where it returns these alone."""


def beside_of(output: Any) -> tuple[Any, ...] | None:
    """What a layer returned beside its hidden states."""
    return output[1:] if isinstance(output, tuple) else None


def hidden_of(output: Any) -> Float[Tensor, "batch time hidden"]:
    """The hidden states that a layer returned."""
    return output[0] if isinstance(output, tuple) else output


def logits_behind(
    model: Any,
    layers: Sequence[nn.Module],
    beside: Beside,
    hidden: Float[Tensor, "row 1 hidden"],
    room: Room | None = None,
) -> Float[Tensor, "row vocabulary"]:
    """What the model's own code behind its layers makes of rows, in float32 or better.

    Args:
        model: the model.
        layers: its layers.
        beside: what each of them returns beside its hidden states.
        hidden: residual streams, each of one position.
        room: where the head may write, see `on_cpu.roomy_head`.
    """

    def hand_on(more: tuple[Any, ...] | None) -> Callable[[Any], Any]:
        result = hidden if more is None else (hidden, *more)
        return lambda original: lambda *_, **__: result

    with ExitStack() as stack:
        for layer, more in zip(layers, beside, strict=True):
            stack.callback(replace_forward(layer, hand_on(more)))
        stack.enter_context(roomy_head(model, room))
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, 0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
