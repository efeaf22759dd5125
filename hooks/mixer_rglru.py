"""RecurrentGemma's recurrent block as transformers implements it: a causal convolution and an RG-LRU.

    r_t = sigmoid(W_a u_t + b_a)    i_t = sigmoid(W_x u_t + b_x)    a_t = exp(-8 softplus(Lambda) r_t)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)

with u behind the convolution (De et al. 2024, arXiv:2402.19427, eq. 1 to 4). Where a document begins, at position 0,
the state is empty and the input is not normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from mambalens.hooks import gated
from mambalens.hooks.gated import GatedInputs
from mambalens.hooks.knockout import Paths
from mambalens.hooks.mixer import weights_at_hand
from mambalens.hooks.recurrence import Projected, State, States
from mambalens.hooks.recurrent import RecurrentMixer
from mambalens.hooks.token_mixing import Decay

SHARPNESS = 8.0
"""The constant c of eq. 3."""


class RGLRUMixer(RecurrentMixer):
    """A feature is a channel; its values are what positions offer: the gated input, normalised.

    The module heeds no padding. It keeps its state in attributes of its own, whatever cache a pass has.
    """

    kind = "rglru"
    features_are = "channels"
    paths = Paths.MAIN | Paths.CONV
    decays = True
    masks_input = False
    masks_convolved = False
    alone = False
    tested = frozenset({"RecurrentGemmaRecurrentBlock"})
    parts = ("linear_x", "linear_y", "linear_out", "conv_1d", "conv1d_width", "rg_lru", "act_fn")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return all(hasattr(module, part) for part in cls.parts) and hasattr(module.rg_lru, "recurrent_param")

    @property
    def n_features(self) -> int:
        return int(self.module.rg_lru.recurrent_param.shape[0])

    @property
    def state_numbers(self) -> int:
        return self.n_features

    @property
    def convolution(self) -> nn.Conv1d:
        return self.module.conv_1d

    def decay_norm(self) -> Float[Tensor, " feature"]:
        """What a channel keeps from one position to the next where its recurrence gate is open.

        Equation: Groups
            norm[f] = exp(-8 softplus(Lambda[f]))

            Source: this package, from De et al. 2024, arXiv:2402.19427, eq. 3, at a recurrence gate r of 1

            Of one channel of RG-LRU. The data gates the decay; this is the fastest that it may be.
        """
        with weights_at_hand(self.module):
            return torch.exp(-SHARPNESS * F.softplus(self.module.rg_lru.recurrent_param.detach().double()))

    def told(
        self, given: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "batch time given"], Shaped[Tensor, "batch time"] | None]:
        """The input and, behind it, 1 where a document begins; no padding, since the module heeds none."""
        hidden, position = given["input_states"], given["position_ids"]
        anew = (position == 0).expand(hidden.shape[:2])
        return torch.cat([hidden, anew[..., None].to(hidden)], -1), None

    @property
    def activation(self) -> nn.Module:
        return nn.Identity()

    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        hidden, anew = hidden[..., :-1], hidden[..., -1:]
        return Projected(self.module.act_fn(self.module.linear_y(hidden)), self.module.linear_x(hidden), anew)

    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], beside: Float[Tensor, "batch time other"] | None
    ) -> GatedInputs:
        lru = self.module.rg_lru
        assert beside is not None
        anew = beside.bool()
        i = self._gate(convolved, lru.input_gate_weight, lru.input_gate_bias)
        r = self._gate(convolved, lru.recurrent_gate_weight, lru.recurrent_gate_bias)
        log_decay = -SHARPNESS * r * F.softplus(lru.recurrent_param)
        scale = torch.where(anew, 1.0, torch.sqrt(1 - torch.exp(2 * log_decay)))
        precise = torch.promote_types(convolved.dtype, torch.float32)
        x = convolved * i * scale.to(convolved.dtype)
        return GatedInputs(x.to(precise)[..., None], log_decay.to(precise), anew)

    def _gate(
        self,
        convolved: Float[Tensor, "batch time channel"],
        weight: Float[Tensor, "block width width"],
        bias: Float[Tensor, "block width"],
    ) -> Float[Tensor, "batch time channel"]:
        """A gate of every channel from the channels of its block."""
        blocks = convolved.unflatten(-1, bias.shape)
        return torch.sigmoid(torch.einsum("btnw,nwv->btnv", blocks, weight) + bias).flatten(-2)

    def scan(
        self, inputs: GatedInputs, end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        y, state = gated.gated_scan(inputs.x[..., 0], inputs.a)
        return y[..., None], state

    def states(self, inputs: GatedInputs, sources: Bool[Tensor, "set batch time"]) -> States:
        found = gated.gated_states(inputs.x[..., 0], inputs.a, ~sources)
        return lambda written, erased: found[written]

    def resume_scan(
        self, inputs: GatedInputs, states: Sequence[State], number: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch row time feature width"]:
        start = torch.stack(list(states), 1)[:, number.to(inputs.x.device, non_blocking=True)]  # [B, R, F]
        return gated.gated_scan(inputs.x[..., 0], inputs.a, start)[0][..., None]

    def alpha(self, inputs: GatedInputs, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        return gated.gated_attention(inputs.a[:, :, features])

    def decay(self, inputs: GatedInputs) -> Decay:
        steps = -inputs.log_decay  # of a rate of 1
        return Decay(steps, -torch.ones_like(steps[0, 0])[:, None], torch.ones_like(steps[..., :1]))

    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        return self.module.linear_out(y[..., 0].to(dtype) * gate)

    def cached_state(self, cache: Any) -> Float[Tensor, " batch *state"]:
        return self.module.rg_lru.recurrent_states

    def cache_state(self, cache: Any, state: Float[Tensor, " batch *state"]) -> None:
        self.module.rg_lru.recurrent_states = state.to(self.module.rg_lru.recurrent_states.dtype)
