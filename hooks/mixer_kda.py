"""Kimi Delta Attention as transformers implements it (Kimi Linear, Ling hybrid and their relatives).

Kimi Team 2025, arXiv:2510.26692, section 3.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mambalens.hooks.delta_mixer import DeltaMixer
from mambalens.hooks.groups import decay_norm
from mambalens.hooks.mixer import weights_at_hand
from mambalens.hooks.recurrence import Projected


class KimiDeltaMixer(DeltaMixer):
    """A decay for every channel of a head's keys.

    The decay norm is of the head's rate, which its channels share. Where the gate has a lower bound (Ling hybrid), the
    rate says how steep the gate is and not how fast the head forgets: there is no decay norm then. A half-life would be
    of each channel alone, and is not computed.
    """

    kind = "kda"
    tested = frozenset({"KimiLinearDeltaAttention", "BailingHybridDeltaAttention", "Glm5NextTextLinearAttention"})
    parts = ("forget_gate", "b_proj", "q_proj", "k_proj", "v_proj", "conv1d", "conv_kernel_size", "activation",
             "num_heads", "head_dim", "o_norm", "o_proj")  # fmt: skip

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return all(hasattr(module, part) for part in cls.parts)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        heads, width = int(self.module.num_heads), int(self.module.head_dim)
        return heads, heads, width, width

    def __init__(self, module: nn.Module, layer: int) -> None:
        super().__init__(module, layer)
        gate = self.module.forget_gate
        bounded = getattr(gate, "safe_gate", False) or getattr(gate, "safe_gate_lower_bound", None) is not None
        self.decays = not bounded

    def decay_norm(self) -> Float[Tensor, " feature"]:
        if not self.decays:
            return super().decay_norm()
        with weights_at_hand(self.module):
            return decay_norm(self.module.forget_gate.A_log.flatten())

    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        mixer = self.module
        inner = torch.cat([mixer.q_proj(hidden), mixer.k_proj(hidden), mixer.v_proj(hidden)], -1)
        gate = mixer.g_proj(hidden) if hasattr(mixer, "g_proj") else mixer.g_b_proj(mixer.g_a_proj(hidden))
        # The module's own code makes the decays, with or without a lower bound.
        log_decay = mixer.forget_gate(hidden).flatten(2)
        return Projected(gate, inner, torch.cat([mixer.b_proj(hidden), log_decay], -1))

    def strengths(
        self, beside: Float[Tensor, "batch time other"]
    ) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch time feature channel"]]:
        heads = self.n_features
        strength, log_decay = beside.split([heads, beside.shape[-1] - heads], -1)
        return torch.sigmoid(strength), rearrange(log_decay, "batch time (head key) -> batch time head key", head=heads)
