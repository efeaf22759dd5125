"""State-space token mixers: what Mamba-1, Mamba-2 and their relatives say of their scan.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        (Gu & Dao 2023, eq. 2)

with x after a causal convolution and an activation.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mambalens.hooks import scan
from mambalens.hooks.groups import decay_norm
from mambalens.hooks.knockout import Paths
from mambalens.hooks.mixer import weights_at_hand
from mambalens.hooks.recurrence import side_by_side
from mambalens.hooks.recurrent import RecurrentMixer


class ScanInputs(NamedTuple):
    """Inputs of a scan, in float32 or better; see `recurrence.Inputs`."""

    x: Float[Tensor, "*batch time feature width"]
    dt: Float[Tensor, "*batch time feature"]
    """Step sizes after softplus."""
    A: Float[Tensor, " feature *state"]
    """[features, state] in Mamba-1, [features] in Mamba-2."""
    B: Float[Tensor, "*batch time group state"]
    """One group in Mamba-1."""
    C: Float[Tensor, "*batch time group state"]

    def cut(
        self, values: Bool[Tensor, "*#batch time #feature"] | None, erasures: Bool[Tensor, " ..."] | None
    ) -> ScanInputs:
        """The same with these values; nothing is removed from a scan's state."""
        return self if values is None else self._replace(x=self.x * values[..., None])

    def frozen(self, moving: Bool[Tensor, "batch time"]) -> ScanInputs:
        """The same with positions outside `moving` leaving the state: a step size of 0 neither decays nor writes."""
        return self._replace(dt=self.dt * moving[..., None])

    def by_row(self, rows: int) -> ScanInputs:
        """What belongs to rows, row by row."""
        x, dt, B, C = (side_by_side(t, rows) for t in (self.x, self.dt, self.B, self.C))
        return ScanInputs(x, dt, self.A, B, C)

    def own_entry(self) -> Float[Tensor, "*batch time feature"]:
        """alpha[t, t], see `scan.own_entry`."""
        return scan.own_entry(self.B, self.C, self.dt)


class SSMMixer(RecurrentMixer):
    """Base of the adapters for mixers with a causal convolution and a scan whose rates are the parameter `A_log`."""

    paths = Paths.MAIN | Paths.CONV
    decays = True
    parts: ClassVar[tuple[str, ...]]
    """Attributes that a module of this kind has."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        A_log = getattr(module, "A_log", None)
        dimensions = 2 if cls.kind == "mamba1" else 1
        return isinstance(A_log, Tensor) and A_log.ndim == dimensions and all(hasattr(module, p) for p in cls.parts)

    @property
    def n_features(self) -> int:
        return int(self.module.A_log.shape[0])

    @property
    def state_numbers(self) -> int:
        return int(self.module.A_log.numel())

    def decay_norm(self) -> Float[Tensor, " feature"]:
        with weights_at_hand(self.module):
            return decay_norm(self.module.A_log)

    def skip(self, inputs: ScanInputs) -> Float[Tensor, "feature 1"]:
        return self.module.D.to(inputs.x.dtype)[:, None]

    def with_skip(
        self, y: Float[Tensor, "*batch feature width"], inputs: ScanInputs, in_place: bool = False
    ) -> Float[Tensor, "*batch feature width"]:
        """The scan's output with the skip, see `scan.add_skip`."""
        return scan.add_skip(y, self.skip(inputs)[:, 0], inputs.x, in_place)
