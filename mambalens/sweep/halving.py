"""Batches that do not fit the memory after all: their halves, and smaller batches from then on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from mambalens.facts.prompts import Batch
from mambalens.system.events import tell
from mambalens.system.memory import exhausted

Found = tuple[list[Any], list[Any]]
"""What a batch gives: two lists, which are joined where it is halved."""


class Halving:
    """Works on batches, or on their halves where the memory is full.

    Args:
        name: the model's name.
        batch_size: prompts a batch at most; None: any number.
        bar: the progress bar, put back where a batch has to start again.

    Attributes:
        batch_size: prompts a batch at most, after what was learned from batches that did not fit.
    """

    def __init__(self, name: str, batch_size: int | None, bar: Any) -> None:
        self.name, self.batch_size, self.bar = name, batch_size, bar
        self._warned = False

    def run(self, work: Callable[[Batch], Found], batch: Batch) -> Found:
        """What `work` gives for a batch.

        Raises:
            MemoryError, RuntimeError: what `work` raises, if a single prompt does not fit, or it is about other things.
        """
        before = self.bar.n
        try:
            return work(batch)
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error) or len(batch.prompts) == 1:
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = len(batch.prompts)
        if not self._warned:
            warnings.warn(
                f"A batch of {size} prompts does not fit the memory: going on with smaller ones.", stacklevel=2
            )
        self._warned = True
        tell("memory full", model=self.name, prompts=size)
        self.bar.update(before - self.bar.n)
        self.batch_size = half = (size + 1) // 2
        parts = [batch.part(range(half)), batch.part(range(half, size))]
        found = [self.run(work, part.trimmed()) for part in parts]
        return [row for rows, _ in found for row in rows], [skip for _, skips in found for skip in skips]
