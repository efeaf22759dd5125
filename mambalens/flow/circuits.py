"""Circuits: a few edges with which a model still gives its answer, every other edge cut.

Edges are taken by their effect, those that help the answer most first, until the answer is kept; then those that it can
do without are taken out again. Every step is a pass of the model with all other edges cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from mambalens.facts.prompts import Batch
from mambalens.flow.exact import without_edges
from mambalens.flow.work import FlowWork, Listed
from mambalens.hooks import Mixer
from mambalens.hooks.knockout import Paths
from mambalens.hooks.recurrence import Recurrence
from mambalens.hooks.token_mixing import TokenMixing
from mambalens.sweep.prediction import target_probability

AT_ONCE = 2048
"""Tokens of a pass with circuits side by side."""
SHARES = (0.0, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Shares of the edges at which faithfulness is measured."""
BLOCKS = 24
"""A circuit is thinned out by this many blocks of edges of like effect at first; smaller ones when no block can go."""
REMOVED = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9)
"""Shares of a circuit's blocks that are taken out at a time, those that cost least first."""


class Circuit(NamedTuple):
    """A circuit of one prompt."""

    edges: Int[np.ndarray, " edge"]
    """Numbers of its edges."""
    kept: float
    """Share of the answer's probability that is left."""
    costs: Float[np.ndarray, " edge"]
    """What taking each edge alone out of it loses, as a share of the answer's probability."""


class Ablated:
    """One prompt whose edges are cut, all but some.

    Args:
        work: the model.
        batch: the prompt.
        listed: its edges.
        prob: probability of the answer without a cut.
    """

    def __init__(self, work: FlowWork, batch: Batch, listed: Listed, prob: float) -> None:
        self.work, self.batch, self.listed, self.prob = work, batch, listed, prob
        self.instead = None if work.ablation is None else work.ablation.values(batch)

    def kept(self, circuits: Sequence[Int[np.ndarray, " _"]]) -> Float[np.ndarray, " circuit"]:
        """Share of the answer's probability that each of some circuits keeps.

        Equation: Circuits
            faithfulness(C) = p(all edges s < t cut that are not in C) / p

            Source: this package, as the faithfulness of Wang et al. 2022, arXiv:2211.00593, section 4

            p is the target's probability. In the place of what is cut stands nothing, or what the ablation puts in.
        """
        time = self.batch.ids.shape[1]
        size = max(1, AT_ONCE // time)
        parts = [self._some(circuits[begin : begin + size]) for begin in range(0, len(circuits), size)]
        return np.concatenate(parts) if parts else np.zeros(0)

    @torch.no_grad()
    def _some(self, circuits: Sequence[Int[np.ndarray, " _"]]) -> Float[np.ndarray, " circuit"]:
        lens, listed, time = self.work.lens, self.listed, self.batch.ids.shape[1]
        cut = np.tri(time, k=-1, dtype=bool)
        masks = np.broadcast_to(cut, (len(self.work.where), len(circuits), time, time)).copy()
        for row, edges in enumerate(circuits):
            masks[listed.where[edges], row, listed.target[edges], listed.source[edges]] = False
        batch = Batch(
            self.batch.prompts * len(circuits), self.batch.ids.expand(len(circuits), -1),
            self.batch.last.expand(len(circuits)), self.batch.targets.expand(len(circuits)),
        )  # fmt: skip
        by_where = dict(zip(self.work.where, torch.from_numpy(masks), strict=True))
        with without_edges(lens, by_where, self.work.features, self.instead):
            logits = lens.last_logits(batch)
        return (target_probability(logits, batch.targets) / self.prob).cpu().numpy()


def circuit_of(ablated: Ablated, effect: Float[np.ndarray, " edge"], keep: float) -> Circuit:
    """A few edges that keep a share of the answer, found greedily.

    Args:
        ablated: the prompt.
        effect: of every edge.
        keep: share of the answer's probability.
    """
    order = np.argsort(effect, kind="stable")
    sizes = sorted({round(share * len(order)) for share in SHARES})
    kept = ablated.kept([order[:n] for n in sizes])
    # All edges keep all of the answer, but for rounding, where so much is asked for.
    enough = next((n for n, share in zip(sizes, kept, strict=True) if share >= keep), len(order))
    inside, blocks = order[:enough], BLOCKS
    while len(inside):
        parts = np.array_split(np.arange(len(inside)), min(blocks, len(inside)))
        left = ablated.kept([np.delete(inside, part) for part in parts])
        spared = [parts[number] for number in np.argsort(-left, kind="stable")]  # those that cost least first
        counts = sorted({max(1, round(share * len(parts))) for share in REMOVED})
        out = [np.concatenate(spared[:count]) for count in counts]
        kept = ablated.kept([np.delete(inside, some) for some in out])
        fine = [some for some, share in zip(out, kept, strict=True) if share >= keep]
        if fine:
            inside = np.delete(inside, fine[-1])
        elif len(parts) < len(inside):
            blocks *= 2
        else:
            now = float(ablated.kept([inside])[0])
            return Circuit(inside, now, now - left)
    return Circuit(inside, float(ablated.kept([inside])[0]), np.zeros(0))


def faithfulness(
    ablated: Ablated, orders: dict[str, Int[np.ndarray, " edge"]], shares: Sequence[float] = SHARES
) -> dict[str, Float[np.ndarray, " share"]]:
    """Share of the answer that is kept with the first edges of several orders.

    Args:
        ablated: the prompt.
        orders: numbers of the edges, by the order's name.
        shares: how many of the edges, as shares of all.
    """
    count = len(ablated.listed.where)
    kept = ablated.kept([order[: round(share * count)] for order in orders.values() for share in shares])
    return dict(zip(orders, kept.reshape(len(orders), len(shares)), strict=True))


def attention_of(work: FlowWork, batch: Batch, listed: Listed) -> Float[np.ndarray, " edge"]:
    """How much a look at effective attention alone would make of each edge: the mean of its absolute values.

    An edge of a convolution has the mean of its taps' absolute values; one that erases, the entry of its layer.
    """
    found: dict[Mixer, Float[np.ndarray, "time time"]] = {}

    def see(mixer: Mixer, mixing: TokenMixing) -> None:
        found[mixer] = mixing.attention(torch.arange(mixing.n_features), "mean_abs")[0].cpu().numpy()

    work.lens.hooks.watch(batch.ids.to(work.lens.device), see)
    weights = np.zeros(len(listed.where))
    for number, (mixer, path) in enumerate(work.where):
        here = listed.where == number
        source, target = listed.source[here], listed.target[here]
        if path is Paths.CONV and isinstance(mixer, Recurrence) and mixer.convolution is not None:
            taps = mixer.convolution.weight[:, 0].abs().mean(0).detach().cpu().numpy()
            weights[here] = taps[len(taps) - 1 - (target - source)]
        else:
            weights[here] = found[mixer][target, source]
    return weights
