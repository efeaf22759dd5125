"""Gated DeltaNet as transformers implements it (Qwen3-Next, Qwen3.5, OLMo hybrid and their relatives).

Yang et al. 2024, arXiv:2412.06464, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambalens.hooks.delta import DeltaInputs
from mambalens.hooks.delta_mixer import DeltaMixer
from mambalens.hooks.groups import decay_norm
from mambalens.hooks.mixer import weights_at_hand
from mambalens.hooks.recurrence import Projected
from mambalens.hooks.token_mixing import Decay


class GatedDeltaNetMixer(DeltaMixer):
    """One decay a head.

    Decay norm and half-life are of the decay alone: how long a head remembers what no later position erases.
    """

    kind = "deltanet"
    tested = frozenset({
        "Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet", "OlmoHybridGatedDeltaNet",
    })  # fmt: skip
    parts = ("A_log", "dt_bias", "conv1d", "conv_kernel_size", "activation", "num_k_heads", "num_v_heads", "head_k_dim",
             "head_v_dim")  # fmt: skip
    projections = ("in_proj_qkvz", "in_proj_qkv", "q_proj")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return all(hasattr(module, part) for part in cls.parts) and any(hasattr(module, p) for p in cls.projections)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        mixer = self.module
        return int(mixer.num_k_heads), int(mixer.num_v_heads), int(mixer.head_k_dim), int(mixer.head_v_dim)

    def decay_norm(self) -> Float[Tensor, " feature"]:
        with weights_at_hand(self.module):
            return decay_norm(self.module.A_log)

    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        mixer = self.module
        if hasattr(mixer, "in_proj_qkvz"):  # Qwen3-Next
            q, k, v, gate, b, a = mixer.fix_query_key_value_ordering(
                mixer.in_proj_qkvz(hidden), mixer.in_proj_ba(hidden)
            )
            inner = torch.cat([t.flatten(2) for t in (q, k, v)], -1)
        elif hasattr(mixer, "in_proj_qkv"):  # Qwen3.5
            inner, gate = mixer.in_proj_qkv(hidden), mixer.in_proj_z(hidden)
            b, a = mixer.in_proj_b(hidden), mixer.in_proj_a(hidden)
        else:  # OLMo hybrid
            inner = torch.cat([mixer.q_proj(hidden), mixer.k_proj(hidden), mixer.v_proj(hidden)], -1)
            gate, b, a = mixer.g_proj(hidden), mixer.b_proj(hidden), mixer.a_proj(hidden)
        return Projected(gate.flatten(2), inner, torch.cat([b, a], -1))

    def strengths(
        self, beside: Float[Tensor, "batch time other"]
    ) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch time feature channel"]]:
        b, a = beside.chunk(2, -1)
        mixer, dtype = self.module, beside.dtype
        beta = torch.sigmoid(b) * (2.0 if getattr(mixer, "allow_neg_eigval", False) else 1.0)
        log_decay = -torch.exp(mixer.A_log.to(dtype)) * F.softplus(a + mixer.dt_bias.to(dtype))
        return beta, log_decay[..., None]

    def decay(self, inputs: DeltaInputs) -> Decay:
        steps = -inputs.log_decay[..., 0]  # of a rate of 1
        return Decay(steps, -torch.ones_like(steps[0, 0])[:, None], torch.ones_like(steps[..., :1]))
