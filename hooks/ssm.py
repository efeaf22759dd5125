"""State-space token mixers: what Mamba-1, Mamba-2 and their relatives say of their scan.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t + D x_t        (Gu & Dao 2023, eq. 2)

with x after a causal convolution and an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mambalens.hooks import fused, kernels, native, pointwise, scan, ssd_rows
from mambalens.hooks.groups import decay_norm
from mambalens.hooks.indices import having
from mambalens.hooks.knockout import Paths
from mambalens.hooks.mixer import weights_at_hand
from mambalens.hooks.recurrence import Index, State, States, side_by_side
from mambalens.hooks.recurrent import RecurrentMixer
from mambalens.hooks.token_mixing import Decay
from mambalens.hooks.values import kept_values


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
        self,
        values: Bool[Tensor, "*#batch time #feature"] | None,
        erasures: Bool[Tensor, " ..."] | None,
        instead: Float[Tensor, "*#batch time feature width"] | None = None,
    ) -> ScanInputs:
        """The same with these values; nothing is removed from a scan's state."""
        return self if values is None else self._replace(x=kept_values(self.x, values, instead))

    def with_values(self, x: Float[Tensor, "*batch time feature width"]) -> ScanInputs:
        """The same with other values."""
        return self._replace(x=x)

    def frozen(self, moving: Bool[Tensor, "batch time"]) -> ScanInputs:
        """The same with positions outside `moving` leaving the state: a step size of 0 neither decays nor writes."""
        return self._replace(dt=self.dt * moving[..., None])

    def by_row(self, rows: int) -> ScanInputs:
        """What belongs to rows, row by row."""
        x, dt, B, C = (side_by_side(t, rows) for t in (self.x, self.dt, self.B, self.C))
        return ScanInputs(x, dt, self.A, B, C)

    def of(self, index: Index) -> ScanInputs:
        """The inputs of these prompts or rows."""
        x, dt, B, C = (t[index] for t in (self.x, self.dt, self.B, self.C))
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


class S6Mixer(SSMMixer):
    """Base of the adapters for mixers with decays for every number of a channel's state: the scan of Mamba-1 (S6)."""

    kind = "mamba1"
    features_are = "channels"

    def scan(
        self, inputs: ScanInputs, end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        B, C = inputs.B[:, :, 0], inputs.C[:, :, 0]
        y, state = kernels.selective_scan(inputs.x[..., 0], inputs.dt, inputs.A, B, C)
        return y[..., None], state.mT

    def states(self, inputs: ScanInputs, sources: Bool[Tensor, "set batch time"]) -> States:
        found = scan.selective_states(inputs.x[..., 0], inputs.dt, inputs.A, inputs.B[:, :, 0], ~sources)
        return lambda written, erased: found[written]

    def scan_and_states(
        self, inputs: ScanInputs, sources: Bool[Tensor, "set batch time"]
    ) -> tuple[Float[Tensor, "batch time feature width"], States]:
        x, B, C = inputs.x[..., 0], inputs.B[:, :, 0], inputs.C[:, :, 0]
        both = scan.selective_scan_and_states(x, inputs.dt, inputs.A, B, C, ~sources)
        if both is None:
            return super().scan_and_states(inputs, sources)
        y, found = both
        return y[..., None], lambda written, erased: found[written]

    def resume_scan(
        self, inputs: ScanInputs, states: Sequence[State], number: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch row time feature width"]:
        dt, A, B, C = inputs.dt, inputs.A, inputs.B[..., 0, :], inputs.C[..., 0, :]
        x = inputs.x[..., 0]  # [B, R, L, D]
        if x.shape[2] == 1:
            y = scan.selective_step(x[:, :, 0], dt[:, :, 0], A, B[:, :, 0], C[:, :, 0], list(states), number)
            return y[:, :, None, :, None]
        y = torch.empty_like(x)
        for index, state in enumerate(states):
            rows = having(number, index, x.device)
            for i, start in enumerate(state):
                y[i, rows] = scan.selective_scan(x[i, rows], dt[i, rows], A, B[i, rows], C[i, rows], start[None])[0]
        return y[..., None]

    def expect(self, rows: int) -> None:
        if not (self.module.A_log.device.type == "cpu" and native.kernels()):
            fused.expect(rows * self.module.A_log.numel(), self.module.A_log.device)

    def alpha(self, inputs: ScanInputs, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        return scan.selective_attention(
            inputs.dt[:, :, features], inputs.A[features], inputs.B[:, :, 0], inputs.C[:, :, 0]
        )

    def edge_effects(
        self, inputs: ScanInputs, gradient: Float[Tensor, "batch time feature width"], features: Int[Tensor, " some"]
    ) -> Float[Tensor, "batch time time"]:
        x, dt, of = inputs.x[..., 0], inputs.dt, gradient[..., 0]
        A = inputs.A
        if len(features) < len(A):
            x, dt, A, of = x[..., features], dt[..., features], A[features], of[..., features]
        return scan.selective_effects(x, dt, A, inputs.B[:, :, 0], inputs.C[:, :, 0], of)

    def decay(self, inputs: ScanInputs) -> Decay:
        return Decay(inputs.dt, inputs.A, inputs.B[:, :, 0])

    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        return self.module.out_proj(pointwise.gated(y[..., 0], gate).to(dtype))


class SSDMixer(RecurrentMixer):
    """Base of the adapters for mixers with one decay a head: the scan of Mamba-2 (SSD), linear attention with decay."""

    def scan(
        self, inputs: ScanInputs, end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        y, state = kernels.ssd_scan(inputs.x, inputs.dt, inputs.A, inputs.B, inputs.C, end)
        return y, None if state is None else state.mT

    def states(self, inputs: ScanInputs, sources: Bool[Tensor, "set batch time"]) -> States:
        found = ssd_rows.ssd_states(inputs.x, inputs.dt, inputs.A, inputs.B, ~sources)
        return lambda written, erased: found[written]

    def resume_scan(
        self, inputs: ScanInputs, states: Sequence[State], number: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch row time feature width"]:
        return ssd_rows.ssd_resume(*inputs, states, number)

    def alpha(self, inputs: ScanInputs, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        group = features * inputs.B.shape[2] // inputs.dt.shape[2]
        dt, A = inputs.dt[:, :, features], inputs.A[features]
        return scan.ssd_attention(dt, A, inputs.B[:, :, group], inputs.C[:, :, group])

    def decay(self, inputs: ScanInputs) -> Decay:
        return Decay(inputs.dt, inputs.A[:, None], torch.ones_like(inputs.dt[..., :1]))
