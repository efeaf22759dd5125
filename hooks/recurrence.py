"""What an adapter says of a state-space token mixer: its projections, convolution, scan and output.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        (Gu & Dao 2023, eq. 2)

with x after a causal convolution and an activation. `ssm.SSMMixer` makes knockouts, effective attention and replay of
it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mambalens.hooks import scan
from mambalens.hooks.groups import decay_norm
from mambalens.hooks.mixer import Mixer, weights_at_hand
from mambalens.hooks.token_mixing import Decay


class Projected(NamedTuple):
    """What the input projection gives, before the convolution."""

    gate: Tensor
    """[batch, T, channels]."""
    inner: Tensor
    """Input of the convolution [batch, T, conv channels]."""
    dt: Tensor | None
    """Raw step sizes where they do not go through the convolution (Mamba-2) [batch, T, heads]."""


class ScanInputs(NamedTuple):
    """Inputs of the scan, in float32 or better."""

    x: Tensor
    """[batch, T, features, width]."""
    dt: Tensor
    """Step sizes after softplus [batch, T, features]."""
    A: Tensor
    """[features, state] in Mamba-1, [features] in Mamba-2."""
    B: Tensor
    """[batch, T, groups, state]; one group in Mamba-1."""
    C: Tensor
    """As B."""


class Recurrence(Mixer):
    """The arithmetic of a mixer with a causal convolution and a scan."""

    has_conv = True
    decays = True
    tested: ClassVar[frozenset[str]]
    """Classes of modules whose arithmetic the tests compare with the adapter's."""
    parts: ClassVar[tuple[str, ...]]
    """Attributes that a module of this kind has."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        A_log = getattr(module, "A_log", None)
        dimensions = 2 if cls.kind == "mamba1" else 1
        return isinstance(A_log, Tensor) and A_log.ndim == dimensions and all(hasattr(module, p) for p in cls.parts)

    @property
    def familiar(self) -> bool:
        return type(self.module).__name__ in self.tested

    @abstractmethod
    def project(self, hidden: Tensor) -> Projected:
        """The input projection of `hidden` [batch, T, width], which takes every position alone."""

    @abstractmethod
    def convolve(self, inner: Tensor, keep: list[Tensor] | None, past: Tensor | None = None) -> Tensor:
        """The causal convolution without activation of `inner` [..., T, channels].

        Args:
            inner: input.
            keep: for every distance k, which taps stay [..., T, features or 1]; None for all.
            past: inputs before the first [..., kernel - 1, channels]; zero by default.
        """

    @abstractmethod
    def scan_inputs(self, convolved: Tensor, dt: Tensor | None) -> ScanInputs:
        """Split what the convolution gave, after the activation [batch, T, channels], into the inputs of the scan.

        Args:
            convolved: that.
            dt: raw step sizes of the same positions, as `project` gives them.
        """

    @abstractmethod
    def scan(self, inputs: ScanInputs, x: Tensor, end: bool = False) -> tuple[Tensor, Tensor | None]:
        """The scan of `x` [batch, T, features, width] without the skip, and with `end` the last state as caches do."""

    @abstractmethod
    def states(self, inputs: ScanInputs, keep: Tensor) -> list[Tensor]:
        """States [batch, ...] after the last position for several choices of inputs `keep` [sets, batch, T]."""

    @abstractmethod
    def resume_scan(self, inputs: ScanInputs, x: Tensor, states: list[Tensor], number: Tensor) -> Tensor:
        """The scan of rows that resume from their prompts' states.

        Args:
            inputs: as for `scan`, but [batch, rows, length, ...].
            x: [batch, rows, length, features, width].
            states: from `states`.
            number: which of them each row resumes from [rows].

        Returns:
            y without the skip, as x.
        """

    @abstractmethod
    def alpha(self, inputs: ScanInputs, features: Tensor) -> Tensor:
        """Effective attention [batch, n, T, T] of the features with these numbers [n]."""

    @abstractmethod
    def decay(self, inputs: ScanInputs) -> Decay:
        """How the features forget."""

    @abstractmethod
    def finish(self, y: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """Gate, norm and output projection of the scan's output with its skip [batch, T, features, width].

        Takes every position alone.
        """

    @property
    def n_features(self) -> int:
        return int(self.module.A_log.shape[0])

    def decay_norm(self) -> Tensor:
        with weights_at_hand(self.module):
            return decay_norm(self.module.A_log)

    def skip(self, inputs: ScanInputs) -> Tensor:
        """The skip D [features, 1]."""
        return self.module.D.to(inputs.x.dtype)[:, None]

    def with_skip(self, y: Tensor, inputs: ScanInputs, in_place: bool = False) -> Tensor:
        """The scan's output with the skip, see `scan.add_skip`."""
        return scan.add_skip(y, self.skip(inputs)[:, 0], inputs.x, in_place)

    @property
    def state_width(self) -> int:
        """Numbers of a feature's state for each number of `A_log`."""
        return 1
