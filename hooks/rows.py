"""Rows of a replay: single tokens that resume from a base pass, each under its own knockout or none.

The contract between the replay engine and the mixers (see `Mixer.remember` and `Mixer.resuming`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Base:
    """What a base pass of right-padded prompts has in common for all layers."""

    last: Tensor
    """Last position of every prompt [batch]: the position that rows replay."""
    sources: Tensor
    """Source sets [sets, batch, T]; set 0 is empty."""

    @property
    def before_last(self) -> Tensor:
        """Positions left of the last [batch, T]."""
        return torch.arange(self.sources.shape[2], device=self.last.device) < self.last[:, None]


@dataclass(frozen=True)
class Rows:
    """Rows in one layer."""

    prompt: Tensor
    """Row of the base batch that each row continues [rows]."""
    source: Tensor
    """Source set that is cut in this layer, 0 for none [rows]."""
    main: Tensor
    """Whether the scan or attention is cut [rows]."""
    conv: Tensor
    """Whether the convolution's taps are cut [rows]."""
    features: Tensor | None
    """Which features are cut [rows, features]; None for all."""

    def __len__(self) -> int:
        return len(self.prompt)

    def part(self, rows: slice) -> Rows:
        """Some of the rows."""
        features = None if self.features is None else self.features[rows]
        return Rows(self.prompt[rows], self.source[rows], self.main[rows], self.conv[rows], features)
