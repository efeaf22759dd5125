"""MiniMax's lightning attention as transformers implements it: linear attention with a fixed decay for each head.

    S_t = exp(-slope) S_{t-1} + k_t v_t^T        y_t = S_t^T q_t

MiniMax 2025, arXiv:2501.08313, section 2.2; Qin et al. 2024, arXiv:2401.04658, eq. 2, for the decay. It is the scan of
Mamba-2 with steps of 1, A = -slope, B = k, C = q and x = v, and a k and q for every head. No convolution, no skip.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Paths
from mambalens.hooks.mixer import weights_at_hand
from mambalens.hooks.recurrence import Projected
from mambalens.hooks.recurrent import History
from mambalens.hooks.ssm import ScanInputs, SSDMixer


class LightningMixer(SSDMixer):
    """A feature is a head. Its decay norm is what it keeps from one position to the next."""

    kind = "lightning"
    paths = Paths.MAIN
    decays = True
    masks_input = False
    alone = False
    tested = frozenset({"MiniMaxLightningAttention"})
    parts = ("slope_rate", "qkv_proj", "act_fn", "output_gate", "norm", "out_proj", "num_attention_heads", "head_dim")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return all(hasattr(module, part) for part in cls.parts)

    @property
    def n_features(self) -> int:
        return int(self.module.num_attention_heads)

    @property
    def convolution(self) -> None:
        return None

    @property
    def state_numbers(self) -> int:
        return int(self.n_features * self.module.head_dim**2)

    def decay_norm(self) -> Float[Tensor, " feature"]:
        """What a head keeps from one position to the next.

        Equation: Groups
            norm[f] = exp(-slope[f])

            Source: this package, from Qin et al. 2024, arXiv:2401.04658, eq. 2

            Of one head of lightning attention, whose decay is fixed; all numbers of its state share it.
        """
        with weights_at_hand(self.module):
            return torch.exp(-self.module.slope_rate.flatten().double())

    @property
    def activation(self) -> nn.Module:
        return self.module.act_fn

    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        return Projected(self.module.output_gate(hidden), self.module.qkv_proj(hidden), None)

    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], beside: Float[Tensor, "batch time other"] | None
    ) -> ScanInputs:
        precise = torch.promote_types(convolved.dtype, torch.float32)
        qkv = rearrange(convolved, "batch time (head width) -> batch time head width", head=self.n_features)
        q, k, v = qkv.to(precise).chunk(3, -1)
        slope = self.module.slope_rate.flatten().to(precise)
        return ScanInputs(v, v.new_ones(v.shape[:3]), -slope, k, q)

    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        return self.module.out_proj(torch.sigmoid(gate) * self.module.norm(y.flatten(2).to(dtype)))

    def _check(self, history: History | None, cache: Any, hidden: Float[Tensor, "batch new given"], past: int) -> None:
        super()._check(history, cache, hidden, past)
        assert history is not None
        if self.layer == 0 and history.padding is not None:
            raise MambalensError(
                f"layer {self.layer}: {type(self.module).__name__} comes first in this model, and transformers then "
                "masks generated tokens wrongly after padded prompts, so targets among them cannot be computed: "
                "generate from one prompt at a time, or from prompts of the same length."
            )

    def cached_state(self, cache: Any) -> Float[Tensor, " batch *state"]:
        return cache.get_linear_cache(self.module.layer_idx)

    def cache_state(self, cache: Any, state: Float[Tensor, " batch *state"]) -> None:
        cache.set_linear_cache(self.module.layer_idx, state.mT)  # keys x values
