"""A loaded model with its tokenizer and hooks: what every question stands on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.facts.fact import Fact
from mambalens.facts.prompts import Batch, Prompt, batches, read_fact
from mambalens.hooks import HookManager
from mambalens.hooks.errors import MambalensError
from mambalens.loading.origin import Origin

BATCH_TOKENS = 4096
"""Tokens (padding included) of a batch where the user names no batch size."""


class LoadedModel:
    """A model, its tokenizer and its hooks.

    Args:
        model: any loaded Hugging Face causal LM with Mamba-1, Mamba-2 or attention layers.
        tokenizer: its fast tokenizer.
        name: what results call the model; its own name by default.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        hooks: its hook manager.
        name: what results call the model.
        origin: how it was loaded; None where the model was given as an object.
    """

    origin: Origin | None = None

    def __init__(self, model: Any, tokenizer: Any, name: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.hooks = HookManager(model)
        self.name = name or getattr(model.config, "name_or_path", "") or type(model).__name__

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.hooks.n_layers

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self.model.get_input_embeddings().weight.device

    def prompt(self, fact: Fact) -> Prompt:
        """A fact as the model reads it: token ids, tokens, roles."""
        return read_fact(fact, self.tokenizer)

    def batches(
        self,
        prompts: Sequence[Prompt],
        batch_size: int | None = None,
        most: Callable[[int], int | None] | None = None,
    ) -> Iterator[Batch]:
        """Right-padded batches of prompts.

        Args:
            prompts: what to batch.
            batch_size: prompts a batch; by default as many as fill `BATCH_TOKENS`.
            most: how many prompts of a length may share a batch at most; None: any number.
        """
        if batch_size is not None and batch_size < 1:
            raise MambalensError(f"batch_size={batch_size}: give 1 or more.")

        def size(length: int) -> int:
            limit = most(length) if most is not None else None
            wanted = batch_size or max(1, BATCH_TOKENS // length)
            return wanted if limit is None else min(wanted, limit)

        padding = self.tokenizer.pad_token_id
        # Positions that count from the end are the prompts' own where nothing fills them up.
        lengths = sorted({len(prompt.ids) for prompt in prompts}, reverse=True) if self.hooks.counts_back else [None]
        for length in lengths:
            alike = [prompt for prompt in prompts if length in (None, len(prompt.ids))]
            yield from batches(alike, size, 0 if padding is None else padding)

    @torch.no_grad()
    def last_logits(self, batch: Batch) -> Float[Tensor, "batch vocabulary"]:
        """Logits behind every prompt's last token, in float32 or better."""
        return self.differentiable_logits(batch)

    def differentiable_logits(self, batch: Batch) -> Float[Tensor, "batch vocabulary"]:
        """`last_logits` with a graph, where something of the pass wants a gradient."""
        rows = torch.arange(len(batch.last))

        def keep_last(module: Any, args: tuple[Any, ...]) -> Any:
            hidden = args[0]  # [B, T, width]
            at = torch.stack([rows, batch.last]).to(hidden.device, non_blocking=True)
            return (hidden[at[0], at[1]][:, None], *args[1:])

        # The head runs on one position a row; whatever the model does behind its head stays the model's code.
        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep_last)
        try:
            with self.hooks.short(batch.ids.shape[1]):
                logits = self.model(input_ids=batch.ids.to(self.device, non_blocking=True), use_cache=False).logits
        finally:
            handle.remove()
        return logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
