"""Mamba-1's S6 mixer as transformers implements it (`MambaMixer` and its relatives).

Gu & Dao 2023, arXiv:2312.00752, algorithm 2; with norms on dt, B and C in Jamba (Lieber et al. 2024, arXiv:2403.19887,
section 6.4) and FalconMamba (Zuo et al. 2024, arXiv:2410.05355, section 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mambalens.hooks import pointwise
from mambalens.hooks.recurrence import Projected
from mambalens.hooks.ssm import S6Mixer, ScanInputs


class Mamba1Mixer(S6Mixer):
    """A feature is a channel."""

    tested = frozenset({"MambaMixer", "FalconMambaMixer", "JambaMambaMixer"})
    parts = ("in_proj", "conv1d", "act", "x_proj", "dt_proj", "out_proj", "D", "time_step_rank", "ssm_state_size",
             "conv_kernel_size")  # fmt: skip

    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        inner, gate = self.module.in_proj(hidden).chunk(2, -1)
        return Projected(gate, inner, None)

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
            dt = mixer.dt_proj(dt)
        else:  # the bias is added in the scan's precision, as transformers does
            dt = F.linear(dt, mixer.dt_proj.weight).to(precise) + mixer.dt_proj.bias.to(precise)
        dt = pointwise.softplus(dt)
        A = -torch.exp(mixer.A_log.to(precise))
        x, B, C = convolved.to(precise)[..., None], B.to(precise)[:, :, None], C.to(precise)[:, :, None]
        return ScanInputs(x, dt, A, B, C)
