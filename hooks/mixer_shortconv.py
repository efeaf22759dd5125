"""LFM2's gated short convolution as transformers implements it (`Lfm2ShortConv` and its relatives).

    y_t = C_t * (sum_k w[K-1-k] (B x)_{t-k} + bias)

B, C and x are projections of the input: the convolution is all that positions hand to each other. Liquid AI 2025,
LFM2 technical report, arXiv:2511.23404, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mambalens.hooks import scan
from mambalens.hooks.calls import conv_state
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut, kept_taps, on
from mambalens.hooks.mixer import Captured, weights_at_hand
from mambalens.hooks.recurrence import Index, Projected, State, States, side_by_side
from mambalens.hooks.recurrent import RecurrentMixer
from mambalens.hooks.token_mixing import TokenMixing


class Convolved(NamedTuple):
    """What the convolution gave, in float32 or better, in the place of a recurrence's inputs: no state follows."""

    x: Float[Tensor, "*batch time feature 1"]

    def cut(
        self,
        values: Bool[Tensor, " ..."] | None,
        erasures: Bool[Tensor, " ..."] | None,
        instead: Float[Tensor, " ..."] | None = None,
    ) -> Convolved:
        """Itself: what it reads of other positions is the convolution's."""
        return self

    def with_values(self, x: Float[Tensor, "*batch time feature 1"]) -> Convolved:
        """Other output of the convolution."""
        return Convolved(x)

    def frozen(self, moving: Bool[Tensor, "batch time"]) -> Convolved:
        """Itself."""
        return self

    def by_row(self, rows: int) -> Convolved:
        """What belongs to rows, row by row."""
        return Convolved(side_by_side(self.x, rows))

    def of(self, index: Index) -> Convolved:
        """What it gave of these prompts or rows."""
        return Convolved(self.x[index])

    def own_entry(self) -> Float[Tensor, "*batch time feature"]:
        """Every position reads itself."""
        return torch.ones_like(self.x[..., 0])


class ShortConvMixer(RecurrentMixer):
    """A feature is a channel, and its effective attention the taps of the convolution.

    The taps' path is the only one. There is no state, so a cut tap changes its target and nothing else.
    """

    kind = "shortconv"
    features_are = "channels"
    paths = Paths.CONV
    masks_convolved = False
    remembers = False
    state_numbers = 0
    tested = frozenset({"Lfm2ShortConv", "Lfm2MoeShortConv", "Lfm3ShortConv"})
    parts = ("in_proj", "conv", "out_proj", "conv_kernel_size", "layer_idx")

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        if not all(hasattr(module, part) for part in cls.parts):
            return False
        of_three = getattr(module.in_proj, "out_features", 0) == 3 * getattr(module.conv, "in_channels", 0)
        return isinstance(module.conv, nn.Conv1d) and of_three and not hasattr(module, "A_log")

    @property
    def n_features(self) -> int:
        return int(self.module.conv.weight.shape[0])

    @property
    def convolution(self) -> nn.Conv1d:
        return self.module.conv

    @property
    def activation(self) -> nn.Module:
        return nn.Identity()

    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        B, C, x = self.module.in_proj(hidden).chunk(3, -1)
        return Projected(C, B * x, None)

    @property
    def convolution_bias(self) -> None:
        """Nothing: no position hands the bias on, and `finish` adds it."""
        return None

    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], beside: Float[Tensor, "batch time other"] | None
    ) -> Convolved:
        return Convolved(convolved.to(torch.promote_types(convolved.dtype, torch.float32))[..., None])

    def scan(
        self, inputs: Convolved, end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        return inputs.x, None

    def states(self, inputs: Convolved, sources: Bool[Tensor, "set batch time"]) -> States:
        return lambda written, erased: None

    def resume_scan(
        self, inputs: Convolved, states: Sequence[State], number: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch row time feature width"]:
        return inputs.x

    def alpha(self, inputs: Convolved, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        batch, time = inputs.x.shape[:2]
        return torch.eye(time, dtype=inputs.x.dtype, device=inputs.x.device).expand(batch, len(features), -1, -1)

    def token_mixing(self, call: Captured, cuts: Sequence[Cut]) -> TokenMixing:
        hidden, padding = self.told(call.arguments(self.module))
        cuts = [cut.to(hidden.device) for cut in cuts]
        keep = kept_taps(on(Paths.CONV, cuts), self.kernel)
        with weights_at_hand(self.module):
            inputs, projected = self.inputs(hidden, padding, cuts)
            weight = self.module.conv.weight[:, 0].to(inputs.x.dtype)
        batch, time, count = inputs.x.shape[:3]
        own = weight[:, -1].expand(batch, time, count)
        own = own if keep is None else own * keep[0]

        def alpha_of(features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
            of_some = keep if keep is None or keep[0].shape[-1] == 1 else [taps[..., features] for taps in keep]
            return scan.conv_attention(weight[features], of_some, batch, time)

        values = projected.inner.to(inputs.x.dtype)[..., None]
        return TokenMixing(values, values.new_zeros(count), inputs.x, own, alpha_of, None)

    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        bias = self.module.conv.bias
        convolved = y[..., 0] if bias is None else y[..., 0] + bias
        return self.module.out_proj(gate * convolved.to(dtype))

    def cached_state(self, cache: Any) -> Float[Tensor, " batch *state"]:
        return conv_state(cache, self.module.layer_idx)
