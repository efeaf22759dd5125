"""Mamba-1's S6 mixer as transformers implements it (`MambaMixer` and its relatives).

Gu & Dao 2023, arXiv:2312.00752, algorithm 2; with norms on dt, B and C in Jamba (Lieber et al. 2024, arXiv:2403.19887,
section 6.4) and FalconMamba (Zuo et al. 2024, arXiv:2410.05355, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks import fused, kernels, scan
from mambalens.hooks.recurrence import Projected, State, States
from mambalens.hooks.ssm import ScanInputs, SSMMixer
from mambalens.hooks.token_mixing import Decay


class Mamba1Mixer(SSMMixer):
    """A feature is a channel."""

    kind = "mamba1"
    features_are = "channels"

    tested = frozenset({"MambaMixer", "FalconMambaMixer", "JambaMambaMixer"})
    parts = ("in_proj", "conv1d", "act", "x_proj", "dt_proj", "out_proj", "D", "time_step_rank", "ssm_state_size",
             "conv_kernel_size")  # fmt: skip

    def project(self, hidden: Float[Tensor, "batch time hidden"]) -> Projected:
        inner, gate = self.module.in_proj(hidden).chunk(2, -1)
        return Projected(gate, inner, None)

    def convolve(
        self,
        inner: Float[Tensor, "*batch time channel"],
        keep: list[Bool[Tensor, "*#batch #time feature"]] | None,
        past: Float[Tensor, "*#batch before channel"] | None = None,
    ) -> Float[Tensor, "*batch time wider"]:
        return scan.causal_conv(inner, self.module.conv1d.weight[:, 0], self.module.conv1d.bias, keep, past)

    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], beside: Float[Tensor, "batch time other"] | None
    ) -> ScanInputs:
        mixer = self.module
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        dt, B, C = mixer.x_proj(convolved).split(sizes, -1)
        if hasattr(mixer, "dt_layernorm"):  # FalconMamba and Jamba
            dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
        precise = torch.promote_types(convolved.dtype, torch.float32)
        if convolved.dtype == precise:
            dt = F.softplus(mixer.dt_proj(dt))
        else:  # the bias is added in the scan's precision, as transformers does
            dt = F.softplus(F.linear(dt, mixer.dt_proj.weight).to(precise) + mixer.dt_proj.bias.to(precise))
        A = -torch.exp(mixer.A_log.to(precise))
        x, B, C = convolved.to(precise)[..., None], B.to(precise)[:, :, None], C.to(precise)[:, :, None]
        return ScanInputs(x, dt, A, B, C)

    def scan(
        self, inputs: ScanInputs, end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        B, C = inputs.B[:, :, 0], inputs.C[:, :, 0]
        y, state = kernels.selective_scan(inputs.x[..., 0], inputs.dt, inputs.A, B, C)
        return y[..., None], state.mT

    def states(self, inputs: ScanInputs, sources: Bool[Tensor, "set batch time"]) -> States:
        found = scan.selective_states(inputs.x[..., 0], inputs.dt, inputs.A, inputs.B[:, :, 0], ~sources)
        return lambda written, erased: found[written]

    def resume_scan(
        self, inputs: ScanInputs, states: Sequence[State], number: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch row time feature width"]:
        dt, A, B, C = inputs.dt, inputs.A, inputs.B[..., 0, :], inputs.C[..., 0, :]
        x = inputs.x[..., 0]  # [B, R, L, D]
        if x.shape[2] == 1:
            y = scan.selective_step(x[:, :, 0], dt[:, :, 0], A, B[:, :, 0], C[:, :, 0], list(states), number)
            return y[:, :, None, :, None]
        y = torch.empty_like(x)
        for index in number.unique().tolist():
            rows = (number == index).nonzero().flatten()
            for i, start in enumerate(states[index]):
                y[i, rows] = scan.selective_scan(x[i, rows], dt[i, rows], A, B[i, rows], C[i, rows], start[None])[0]
        return y[..., None]

    def expect(self, rows: int) -> None:
        fused.expect(rows * self.module.A_log.numel(), self.module.A_log.device)

    def alpha(self, inputs: ScanInputs, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        return scan.selective_attention(
            inputs.dt[:, :, features], inputs.A[features], inputs.B[:, :, 0], inputs.C[:, :, 0]
        )

    def decay(self, inputs: ScanInputs) -> Decay:
        return Decay(inputs.dt, inputs.A, inputs.B[:, :, 0])

    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        return self.module.out_proj((y[..., 0] * F.silu(gate)).to(dtype))
