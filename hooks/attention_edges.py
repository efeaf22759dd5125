"""Every edge of softmax attention, see `edges`."""

from __future__ import annotations

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks.edges import Arrivals, Places, Weakened
from mambalens.hooks.knockout import Paths

SINK = 1e-2
"""Where no parameter is called a sink, a row of weights that lacks more than this to 1 leaves the rest to one all the
same; less is rounding, in half precision too."""


class AttentionArrivals(Arrivals):
    """What arrives over the edges of an attention layer: what its heads read, before the output projection.

    Without s the other weights grow, so that they add up to 1 again.

    Equation: Every edge
        y^-s_t - y_t = A[t, s] (y_t - v_s) / (1 - A[t, s])

        Source: this package, from the knockout of Geva et al. 2023, arXiv:2304.14767, section 4

        Of one head of attention. 1 - A[t, s] is added up from the other weights, so that it keeps its digits where s
        has nearly all; 0 where s is all that t reads, as in a knockout.

    Attributes:
        arrived: what the heads read, some edges cut in part, in the model's precision.
        sink: whether rows leave what they lack to 1 to a sink, however little.
    """

    def __init__(
        self,
        weights: Float[Tensor, "batch head time key"],
        values: Float[Tensor, "batch group key width"],
        read: Float[Tensor, "batch time head width"],
        weakened: Weakened | None,
        features: Bool[Tensor, " head"] | None,
        sink: bool = False,
    ) -> None:
        self.features = None if features is None else features.to(weights.device)
        self.sink = sink
        self.weights = weights
        shared = weights.shape[1] // values.shape[1]  # by so many heads
        self.values = repeat(values, "batch group key width -> batch (group head) key width", head=shared)
        node = read.to(torch.promote_types(read.dtype, torch.float32))
        self.nodes = {Paths.MAIN: node}
        places = None if weakened is None else weakened.places.get(Paths.MAIN)
        if places is not None and weakened is not None:
            change = self.changes(Paths.MAIN, places) * weakened.share
            node = self.nodes[Paths.MAIN] = node.index_put(places.at, change, accumulate=True)
        self.arrived = node.to(read.dtype)

    def forget_graph(self) -> None:
        self.weights, self.values, self.arrived = (t.detach() for t in (self.weights, self.values, self.arrived))
        self.nodes = {path: node.detach() for path, node in self.nodes.items()}

    def changes(self, path: Paths, places: Places) -> Float[Tensor, "edge head width"]:
        precise = self.nodes[path].dtype
        rows = self.weights[places.prompt, :, places.target].to(precise)  # [E, H, T]
        of_source = torch.zeros_like(rows, dtype=torch.bool)
        of_source[torch.arange(len(rows), device=rows.device), :, places.source] = True
        others = rows.masked_fill(of_source, 0.0)
        to_sink = self._left_to_sink(rows)
        left = others.sum(-1, keepdim=True) + to_sink
        values = self.values[places.prompt].to(precise)  # [E, H, T, P]
        without = (others[:, :, None] @ values)[:, :, 0] / torch.where(left > 0, left, 1.0)
        # Not what the model read: rounded weights do not add up to 1, and every source would seem to matter by that.
        whole = (rows[:, :, None] @ values)[:, :, 0] / (rows.sum(-1, keepdim=True) + to_sink)
        change = without - whole
        return change if self.features is None else change * self.features[:, None]

    def effects(
        self, path: Paths, gradient: Float[Tensor, "batch time head width"]
    ) -> Float[Tensor, "batch time source"]:
        handed = (gradient.transpose(1, 2) @ self.values.to(gradient.dtype).mT).double()  # [B, H, T, S]
        weights = self.weights.double()
        entries = weights * handed
        to_sink = self._left_to_sink(weights)
        largest = weights.argmax(-1, keepdim=True)
        left = _of_others(weights, largest) + to_sink
        without = _of_others(entries, largest) / torch.where(left > 0, left, 1.0)
        whole = entries.sum(-1, keepdim=True) / (weights.sum(-1, keepdim=True) + to_sink)  # see `changes`
        effect = torch.where(weights > 0, torch.where(left > 0, without, 0.0) - whole, 0.0)
        effect = effect.sum(1) if self.features is None else effect[:, self.features].sum(1)
        return effect.tril_(-1).to(gradient.dtype)

    def _left_to_sink(self, weights: Float[Tensor, "*rows time"]) -> Float[Tensor, "*rows 1"]:
        """What rows of weights leave to a sink."""
        lacks = 1.0 - weights.sum(-1, keepdim=True)
        return torch.where(lacks > (0.0 if self.sink else SINK), lacks, 0.0)


def _of_others(entries: Float[Tensor, "*rows time"], largest: Int[Tensor, "*rows 1"]) -> Float[Tensor, "*rows time"]:
    """Sums of rows without each entry; without the largest added up: a difference loses what the others have."""
    added_up = entries.scatter(-1, largest, 0.0).sum(-1, keepdim=True)
    return (entries.sum(-1, keepdim=True) - entries).scatter_(-1, largest, added_up)
