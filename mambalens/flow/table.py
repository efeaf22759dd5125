"""Columns of a flow's tables, and what figures call them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mambalens.facts.pieces import PIECES

if TYPE_CHECKING:
    import pandas as pd

EDGE = ("layer", "mixer", "path", "source", "target")
"""What tells the edges of a prompt apart: layer, kind of mixer, path ('main', 'conv', 'erase'), positions."""
EDGES = (
    "fact_id", "model", *EDGE, "source_piece", "target_piece", "features", "attributed", "exact", "chosen",
    "base_measure", "base_prob",
)  # fmt: skip
"""Columns of a flow's edges, one row for every edge s -> t, s < t, of every fact.

`attributed` is how much the measure changes when this edge alone is cut, as far as gradients tell, and `exact` how much
it really does (NaN where it was not cut), both in the measure's unit (nats for log-odds): below zero where the edge
helps the answer. `features` says which of the mixer's features the edge stands for, `source_piece` and `target_piece`
what the positions are (see `facts.pieces`), `chosen` why it was cut: 'top' for the strongest as attributed, 'sample'
for those drawn among all, 'all' where every edge was cut, '' for none. `base_measure` and `base_prob` are the measure
and the target's probability without a cut."""
BASE = ("fact_id", "model", "prob", "measure", "edges")
"""Columns of what is known of every fact without a cut: the target's probability, the measure, and how many edges the
prompt has."""
EDGE_FEATURES = ("model", "fact_id", *EDGE, "feature", "effect")
"""Columns of what edges carry by single features: the number of a channel or head, and its part of the edge's effect,
in the measure's unit."""
CHOSEN = ("", "top", "sample", "all")
"""Why an edge was cut."""
CHOSEN_FEATURES = "chosen features"
"""What tables call features that are no named group."""
CATEGORIES = ("mixer", "path", "source_piece", "target_piece", "features", "chosen")
"""Columns with few values, which are kept as categories."""


def with_categories(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose columns of few values are categories, whatever parts it was put together from."""
    import pandas as pd

    orders: dict[str, list[str]] = {"source_piece": list(PIECES), "target_piece": list(PIECES), "chosen": list(CHOSEN)}
    return table.assign(**{
        name: pd.Categorical(table[name].astype(str), orders.get(name)) for name in CATEGORIES if name in table
    })  # fmt: skip


def levels(edges: pd.DataFrame) -> pd.DataFrame:
    """The same edges with `begin` and `end`: l is the residual stream before layer l.

    What the convolution hands over is read by the scan behind it in the same layer: where a mixer has both, the
    convolution's edges end, and the others begin, at l + 1/2.
    """
    conv = (edges.path == "conv").to_numpy()
    share = edges.assign(conv=conv).groupby(["layer", "mixer"], observed=True).conv.transform("mean").to_numpy()
    both, layer = (share > 0) & (share < 1), edges.layer.to_numpy()
    return edges.assign(
        begin=layer + np.where(both & ~conv, 0.5, 0.0),
        end=layer + np.where(both & conv, 0.5, 1.0),
    )
