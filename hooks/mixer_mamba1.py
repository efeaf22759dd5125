"""Mamba-1's S6 mixer as transformers implements it (`MambaMixer`); Gu & Dao 2023, arXiv:2312.00752, algorithm 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambalens.hooks.scan import causal_conv, selective_attention, selective_scan
from mambalens.hooks.ssm import Projected, ScanInputs, SSMMixer


class Mamba1Mixer(SSMMixer):
    """A feature is a channel."""

    kind = "mamba1"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return type(module).__name__ == "MambaMixer"

    def project(self, hidden: Tensor) -> Projected:
        inner, gate = self.module.in_proj(hidden).chunk(2, -1)
        return Projected(gate, inner, None)

    def convolve(self, inner: Tensor, keep: list[Tensor] | None) -> Tensor:
        return causal_conv(inner, self.module.conv1d.weight[:, 0], self.module.conv1d.bias, keep)

    def scan_inputs(self, convolved: Tensor, projected: Projected) -> ScanInputs:
        mixer = self.module
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        dt, B, C = mixer.x_proj(convolved).split(sizes, -1)
        precise = torch.promote_types(convolved.dtype, torch.float32)
        # The bias is added in the scan's precision, as transformers does.
        dt = F.softplus(F.linear(dt, mixer.dt_proj.weight).to(precise) + mixer.dt_proj.bias.to(precise))
        A = -torch.exp(mixer.A_log.to(precise))
        x, B, C = convolved.to(precise)[..., None], B.to(precise)[:, :, None], C.to(precise)[:, :, None]
        return ScanInputs(x, dt, A, B, C)

    def scan(self, inputs: ScanInputs, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = selective_scan(x[..., 0], inputs.dt, inputs.A, inputs.B[:, :, 0], inputs.C[:, :, 0])
        return y[..., None], state

    def step(self, inputs: ScanInputs, x: Tensor, state: Tensor) -> Tensor:
        dt, B, C = inputs.dt[:, 0], inputs.B[:, 0], inputs.C[:, 0]  # [R, D], [R, 1, N]
        carried = (torch.exp(dt[..., None] * inputs.A) * state * C).sum(-1)  # [R, D]
        return (carried + (B * C).sum(-1) * dt * x[:, 0, :, 0])[:, None, :, None]

    def alpha(self, inputs: ScanInputs) -> Tensor:
        return selective_attention(inputs.dt, inputs.A, inputs.B[:, :, 0], inputs.C[:, :, 0])

    def finish(self, y: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        return self.module.out_proj((y[..., 0] * F.silu(gate)).to(dtype))
