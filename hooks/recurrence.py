"""What an adapter says of a state-space token mixer: its projections, convolution, scan and output.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        (Gu & Dao 2023, eq. 2)

with x after a causal convolution and an activation. `ssm.SSMMixer` makes knockouts, effective attention and replay of
it.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mambalens.hooks import scan
from mambalens.hooks.groups import decay_norm
from mambalens.hooks.mixer import Mixer, weights_at_hand
from mambalens.hooks.token_mixing import Decay


class Projected(NamedTuple):
    """What the input projection gives, before the convolution."""

    gate: Float[Tensor, "batch time inner"]
    inner: Float[Tensor, "batch time channel"]
    """Input of the convolution."""
    dt: Float[Tensor, "batch time feature"] | None
    """Raw step sizes where they do not go through the convolution (Mamba-2)."""


class ScanInputs(NamedTuple):
    """Inputs of the scan, in float32 or better."""

    x: Float[Tensor, "*batch time feature width"]
    dt: Float[Tensor, "*batch time feature"]
    """Step sizes after softplus."""
    A: Float[Tensor, " feature *state"]
    """[features, state] in Mamba-1, [features] in Mamba-2."""
    B: Float[Tensor, "*batch time group state"]
    """One group in Mamba-1."""
    C: Float[Tensor, "*batch time group state"]


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
    def project(self, hidden: Float[Tensor, "batch time hidden"]) -> Projected:
        """The input projection, which takes every position alone."""

    @abstractmethod
    def convolve(
        self,
        inner: Float[Tensor, "*batch time channel"],
        keep: list[Bool[Tensor, "*#batch #time feature"]] | None,
        past: Float[Tensor, "*#batch before channel"] | None = None,
    ) -> Float[Tensor, "*batch time wider"]:
        """The causal convolution without activation.

        Args:
            inner: input.
            keep: for every distance k, which taps stay, of every feature or of all; None for all.
            past: inputs before the first; zero by default.
        """

    @abstractmethod
    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], dt: Float[Tensor, "batch time feature"] | None
    ) -> ScanInputs:
        """Split what the convolution gave, after the activation, into the inputs of the scan.

        Args:
            convolved: that.
            dt: raw step sizes of the same positions, as `project` gives them.
        """

    @abstractmethod
    def scan(
        self, inputs: ScanInputs, x: Float[Tensor, "batch time feature width"], end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        """The scan of `x` without the skip, and with `end` the last state as caches do."""

    @abstractmethod
    def states(self, inputs: ScanInputs, keep: Bool[Tensor, "set batch time"]) -> list[Float[Tensor, " batch *state"]]:
        """States after the last position for several choices of inputs."""

    @abstractmethod
    def resume_scan(
        self,
        inputs: ScanInputs,
        x: Float[Tensor, "batch row time feature width"],
        states: list[Float[Tensor, " batch *state"]],
        number: Int[Tensor, " row"],
    ) -> Float[Tensor, "batch row time feature width"]:
        """The scan of rows that resume from their prompts' states.

        Args:
            inputs: as for `scan`, but of rows.
            x: input of the scan.
            states: from `states`.
            number: which of them each row resumes from.

        Returns:
            y without the skip.
        """

    @abstractmethod
    def alpha(self, inputs: ScanInputs, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        """Effective attention of the features with these numbers."""

    @abstractmethod
    def decay(self, inputs: ScanInputs) -> Decay:
        """How the features forget."""

    @abstractmethod
    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        """Gate, norm and output projection of the scan's output with its skip.

        Takes every position alone.
        """

    @property
    def n_features(self) -> int:
        return int(self.module.A_log.shape[0])

    def decay_norm(self) -> Float[Tensor, " feature"]:
        with weights_at_hand(self.module):
            return decay_norm(self.module.A_log)

    def skip(self, inputs: ScanInputs) -> Float[Tensor, "feature 1"]:
        """The skip D."""
        return self.module.D.to(inputs.x.dtype)[:, None]

    def with_skip(
        self, y: Float[Tensor, "*batch feature width"], inputs: ScanInputs, in_place: bool = False
    ) -> Float[Tensor, "*batch feature width"]:
        """The scan's output with the skip, see `scan.add_skip`."""
        return scan.add_skip(y, self.skip(inputs)[:, 0], inputs.x, in_place)

    @property
    def state_width(self) -> int:
        """Numbers of a feature's state for each number of `A_log`."""
        return 1
