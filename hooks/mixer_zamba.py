"""Zamba's Mamba-1 mixer as transformers implements it (`ZambaMambaMixer`): several heads, each a Mamba-1 of its own.

Glorioso et al. 2024, arXiv:2405.16712.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mambalens.hooks import pointwise
from mambalens.hooks.groups import decay_norm
from mambalens.hooks.mixer import weights_at_hand
from mambalens.hooks.recurrence import Projected, State, States
from mambalens.hooks.ssm import S6Mixer, ScanInputs
from mambalens.hooks.token_mixing import Decay


class ZambaMixer(S6Mixer):
    """A feature is a channel of any head: those of the first head, then those of the second, and so on.

    A head has B, C and step sizes of its own, made from its own channels.
    """

    tested = frozenset({"ZambaMambaMixer"})
    parts = ("in_proj", "conv1d", "act", "x_proj_weight", "dt_proj_weight", "dt_proj_bias", "out_proj", "D",
             "n_mamba_heads", "mamba_head_dim", "time_step_rank", "ssm_state_size", "conv_kernel_size")  # fmt: skip

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        A_log = getattr(module, "A_log", None)
        return isinstance(A_log, Tensor) and A_log.ndim == 3 and all(hasattr(module, p) for p in cls.parts)

    @property
    def n_features(self) -> int:
        heads, width, _ = self.module.A_log.shape
        return int(heads * width)

    def decay_norm(self) -> Float[Tensor, " feature"]:
        with weights_at_hand(self.module):
            return decay_norm(self.module.A_log.flatten(0, 1))

    def skip(self, inputs: ScanInputs) -> Float[Tensor, "feature 1"]:
        return self.module.D.flatten().to(inputs.x.dtype)[:, None]

    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        inner, gate = self.module.in_proj(hidden).unflatten(-1, (-1, 2)).unbind(-1)  # in turns
        return Projected(gate, inner, None)

    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], beside: Float[Tensor, "batch time other"] | None
    ) -> ScanInputs:
        mixer = self.module
        precise = torch.promote_types(convolved.dtype, torch.float32)
        x = rearrange(convolved, "batch time (head width) -> batch time head width", head=mixer.n_mamba_heads)
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        dt, B, C = torch.einsum("bthw,hnw->bthn", x, mixer.x_proj_weight).split(sizes, -1)
        dt = torch.einsum("bthr,hwr->bthw", dt, mixer.dt_proj_weight).to(precise)
        dt = pointwise.softplus(dt + mixer.dt_proj_bias.to(precise)).flatten(2)
        A = -torch.exp(mixer.A_log.to(precise)).flatten(0, 1)
        return ScanInputs(convolved.to(precise)[..., None], dt, A, B.to(precise), C.to(precise))

    def scan(
        self, inputs: ScanInputs, end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        y, states = zip(*(super(ZambaMixer, self).scan(head, end) for head in self._heads(inputs)), strict=True)
        return torch.cat(y, 2), torch.stack(states, 1)

    def states(self, inputs: ScanInputs, sources: Bool[Tensor, "set batch time"]) -> States:
        found = [super(ZambaMixer, self).states(head, sources) for head in self._heads(inputs)]
        return lambda written, erased: [of_head(written, erased) for of_head in found]

    def resume_scan(
        self, inputs: ScanInputs, states: Sequence[State], number: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch row time feature width"]:
        heads = self._heads(inputs)
        y = [
            super(ZambaMixer, self).resume_scan(head, [of[h] for of in states], number) for h, head in enumerate(heads)
        ]
        return torch.cat(y, 3)

    def alpha(self, inputs: ScanInputs, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        batch, time = inputs.x.shape[:2]
        width = self.module.mamba_head_dim
        alpha = inputs.x.new_empty(batch, len(features), time, time)
        for h, head in enumerate(self._heads(inputs)):
            here = features // width == h
            alpha[:, here] = super().alpha(head, features[here] - h * width)
        return alpha

    def edge_effects(
        self, inputs: ScanInputs, gradient: Float[Tensor, "batch time feature width"], features: Int[Tensor, " some"]
    ) -> Float[Tensor, "batch time time"]:
        width = self.module.mamba_head_dim
        found = gradient.new_zeros(*gradient.shape[:2], gradient.shape[1])
        for h, head in enumerate(self._heads(inputs)):
            of_head = features[features // width == h] - h * width
            found += super().edge_effects(head, gradient[:, :, h * width : (h + 1) * width], of_head)
        return found

    def decay(self, inputs: ScanInputs) -> Decay:
        return Decay(inputs.dt, inputs.A, inputs.B)

    def _heads(self, inputs: ScanInputs) -> list[ScanInputs]:
        """The inputs of every head's scan."""
        width = self.module.mamba_head_dim
        x, dt, A = (t.split(width, dim) for t, dim in ((inputs.x, -2), (inputs.dt, -1), (inputs.A, 0)))
        B, C = (t.split(1, -2) for t in (inputs.B, inputs.C))
        return [ScanInputs(*of_head) for of_head in zip(x, dt, A, B, C, strict=True)]
