"""The arithmetic of gated linear recurrences, as pure functions: tensors in, tensors out.

Letters are those of De et al. 2024 (arXiv:2402.19427, eq. 3 and 4). Per channel, with a decay a_t that the data gates:

    h_t = a_t h_{t-1} + x_t        y_t = h_t
    alpha[t, s] = prod_{k=s+1..t} a_k                y_t = sum_{s<=t} alpha[t, s] x_s

x is what a position offers: its gated input, normalised by sqrt(1 - a_t^2). A position may begin anew: it keeps nothing
of what came before, a_t = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mambalens.hooks.linear_scan import linear_scan
from mambalens.hooks.recurrence import Index, side_by_side
from mambalens.hooks.values import kept_values


class GatedInputs(NamedTuple):
    """Inputs of a gated linear recurrence, in float32 or better; see `recurrence.Inputs`."""

    x: Float[Tensor, "*batch time feature 1"]
    log_decay: Float[Tensor, "*batch time feature"]
    """log a, as the gate makes it."""
    anew: Bool[Tensor, "*batch time 1"]
    """Which positions begin anew."""

    @property
    def a(self) -> Float[Tensor, "*batch time feature"]:
        """What stays of the state at every position."""
        return torch.exp(self.log_decay) * ~self.anew

    def cut(
        self,
        values: Bool[Tensor, "*#batch time #feature"] | None,
        erasures: Bool[Tensor, " ..."] | None,
        instead: Float[Tensor, "*#batch time feature width"] | None = None,
    ) -> GatedInputs:
        """The same with these values; nothing is removed from the state."""
        return self if values is None else self._replace(x=kept_values(self.x, values, instead))

    def with_values(self, x: Float[Tensor, "*batch time feature width"]) -> GatedInputs:
        """The same with other values."""
        return self._replace(x=x)

    def frozen(self, moving: Bool[Tensor, "batch time"]) -> GatedInputs:
        """The same with positions outside `moving` leaving the state as they find it."""
        moves = moving[..., None]
        return GatedInputs(self.x * moves[..., None], self.log_decay * moves, self.anew & moves)

    def by_row(self, rows: int) -> GatedInputs:
        """What belongs to rows, row by row."""
        return GatedInputs(*(side_by_side(t, rows) for t in self))

    def of(self, index: Index) -> GatedInputs:
        """The inputs of these prompts or rows."""
        return GatedInputs(*(t[index] for t in self))

    def own_entry(self) -> Float[Tensor, "*batch time feature"]:
        """alpha[t, t] = 1."""
        return torch.ones_like(self.log_decay)


def gated_scan(
    x: Float[Tensor, "*batch time feature"],
    a: Float[Tensor, "*batch time feature"],
    start: Float[Tensor, "*batch feature"] | None = None,
) -> tuple[Float[Tensor, "*batch time feature"], Float[Tensor, "*batch feature"]]:
    """A gated linear recurrence.

    Equation: Recurrence
        h_t = a_t h_{t-1} + x_t
        y_t = h_t

        Source: De et al. 2024, arXiv:2402.19427, eq. 4, with x_t for sqrt(1 - a_t^2) (i_t x_t)

        Of one channel of RG-LRU; a_t = 0 where a document begins.

    Args:
        x, a: as in the recurrence above.
        start: state before the first position; zero by default.

    Returns:
        y, and the state after the last position.
    """
    h = None if start is None else start.reshape(-1, start.shape[-1])
    y = linear_scan(a.flatten(0, -3), x.flatten(0, -3), h).view(x.shape)
    return y, y[..., -1, :]


def gated_states(
    x: Float[Tensor, "batch time feature"],
    a: Float[Tensor, "batch time feature"],
    keep: Bool[Tensor, "sets batch time"],
) -> Float[Tensor, "sets batch feature"]:
    """States after the last position from the inputs that are kept, for several choices of these at once.

    Equation: Knockout
        h^-S_t = sum_{s<=t, s not in S} prod_{k=s+1..t} a_k x_s

        Source: this package, from De et al. 2024, arXiv:2402.19427, eq. 4, as Endy et al. 2025, arXiv:2505.24244, eq. 5

        Of one channel of RG-LRU.
    """
    later = F.pad(a[:, 1:], (0, 0, 0, 1), value=1.0).flip(1).cumprod(1).flip(1)  # prod of a over s+1.. at s
    return torch.einsum("nbt,btf->nbf", keep.to(x.dtype), later * x)


def gated_attention(a: Float[Tensor, "batch time some"]) -> Float[Tensor, "batch some time time"]:
    """Effective attention alpha[t, s]: O(features T^2) memory.

    Equation: Effective attention
        alpha[t, s] = prod_{k=s+1..t} a_k    for s <= t, else 0

        Source: this package, from De et al. 2024, arXiv:2402.19427, eq. 4

        Of one channel of RG-LRU; x_s, which it acts on, is gated and normalised.
    """
    own = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)[None, :, None]
    return linear_scan(a[..., None], own.expand(*a.shape, -1)).transpose(1, 2)
