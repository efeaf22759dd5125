"""Mamba-2's SSD mixer as transformers implements it (`Mamba2Mixer` and the copies of it that hybrid models have).

Dao & Gu 2024, arXiv:2405.21060, section 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambalens.hooks import pointwise
from mambalens.hooks.linear_scan import LOOPS
from mambalens.hooks.recurrence import Projected
from mambalens.hooks.ssm import ScanInputs, SSDMixer, SSMMixer


class Mamba2Mixer(SSDMixer, SSMMixer):
    """A feature is a head.

    The heads of a group share B and C, which go through the convolution too. Where taps are cut for some heads only,
    each of those heads writes and reads with the cut B and C, its neighbours with the whole ones.
    """

    kind = "mamba2"

    tested = frozenset({
        "Mamba2Mixer", "BambaMixer", "Zamba2MambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer",
        "NemotronHMamba2Mixer",
    })  # fmt: skip
    parts = ("in_proj", "conv1d", "act", "dt_bias", "norm", "out_proj", "D", "num_heads", "head_dim", "n_groups",
             "ssm_state_size", "conv_kernel_size", "conv_dim", "intermediate_size", "time_step_limit")  # fmt: skip

    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        mixer = self.module
        scale, by_lane = getattr(mixer, "ssm_in_multiplier", 1.0), getattr(mixer, "mup_vector", None)  # Falcon-H1's
        projected = mixer.in_proj(hidden if scale == 1.0 else hidden * scale)
        projected = projected if by_lane is None else projected * by_lane
        gate, inner, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
        return Projected(gate, inner, dt)

    def channels_by_feature(self, device: torch.device) -> tuple[Int[Tensor, " wider"], Int[Tensor, " wider"]]:
        """B and C once for each head: [x | B of head 1, B of head 2, ... | C of head 1, ...]."""
        mixer = self.module
        inner, state, groups = mixer.intermediate_size, mixer.ssm_state_size, mixer.n_groups
        heads, x = torch.arange(mixer.num_heads, device=device), torch.arange(inner, device=device)
        group_of_head = heads // (mixer.num_heads // groups)
        b = (inner + group_of_head[:, None] * state + torch.arange(state, device=device)).flatten()
        of_state = repeat(heads, "head -> (head state)", state=state)
        head = torch.cat([repeat(heads, "head -> (head width)", width=mixer.head_dim), of_state, of_state])
        return torch.cat([x, b, b + groups * state]), head

    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], beside: Float[Tensor, "batch time other"] | None
    ) -> ScanInputs:
        mixer = self.module
        x, B, C = convolved.tensor_split(
            [mixer.intermediate_size, (mixer.intermediate_size + convolved.shape[2]) // 2], -1
        )
        precise = torch.promote_types(convolved.dtype, torch.float32)
        assert beside is not None
        dt = pointwise.softplus(beside.to(precise) + mixer.dt_bias.to(precise)).clamp(*mixer.time_step_limit)
        by_group = "batch time (group state) -> batch time group state"
        B, C = (rearrange(t, by_group, state=mixer.ssm_state_size).to(precise) for t in (B, C))
        x = rearrange(x, "batch time (head width) -> batch time head width", head=mixer.num_heads).to(precise)
        return ScanInputs(x, dt, -torch.exp(mixer.A_log.to(precise)), B, C)

    @contextmanager
    def short(self, time: int) -> Iterator[None]:
        mixer, device = self.module, self.module.A_log.device
        chunk = getattr(mixer, "chunk_size", 0)
        if not 0 < time < chunk or device.type not in LOOPS:  # kernels want chunks of their own sizes
            yield
            return
        mixer.chunk_size = time
        try:
            yield
        finally:
            mixer.chunk_size = chunk

    @property
    def state_numbers(self) -> int:
        return int(self.module.num_heads * self.module.head_dim * self.module.ssm_state_size)

    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        flat, norm = y.flatten(2), self.module.norm
        gated = pointwise.gated(flat, gate) if isinstance(norm, nn.Identity) else norm(flat, gate)
        return self.module.out_proj(gated.to(dtype))
