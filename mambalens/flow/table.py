"""Columns of a flow's tables, and what figures call them."""

from __future__ import annotations

EDGE = ("layer", "mixer", "path", "source", "target")
"""What tells the edges of a prompt apart: layer, kind of mixer, path ('main', 'conv', 'erase'), positions."""
EDGES = ("fact_id", "model", *EDGE, "source_piece", "target_piece", "features", "attributed", "exact")
"""Columns of a flow's edges, one row for every edge s -> t, s < t, of every fact.

`attributed` is how much the measure changes when this edge alone is cut, as far as gradients tell, and `exact` how much
it really does (NaN where it was not cut), both in the measure's unit (nats for log-odds): below zero where the edge
helps the answer. `features` says which of the mixer's features the edge stands for, `source_piece` and `target_piece`
what the positions are (see `facts.pieces`)."""
BASE = ("fact_id", "model", "target_token", "prob", "measure", "edges")
"""Columns of what is known of every fact without a cut: the target's first token, its probability, the measure, and how
many edges the prompt has."""
MEASURES = {
    "log_odds": "Log-odds of the target (nats)",
    "log_prob": "Log-probability of the target (nats)",
    "logit": "Logit of the target",
}
"""Measures that a flow can be of, and what axes call them."""
