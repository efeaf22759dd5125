"""Columns of a sweep's table, and what figures call them."""

from __future__ import annotations

COLUMNS = (
    "fact_id", "model", "source", "target", "features", "path", "window_start", "window_size",
    "base_prob", "prob", "change_pct", "base_rank", "rank", "hit", "top_token", "kl",
)  # fmt: skip
"""Columns of a sweep's table. Probabilities and ranks (1 is the top) are those of the target's first token,
`change_pct` is 100 (prob - base_prob) / base_prob, `hit` whether that token is still the top one, `top_token` what is
on top, `kl` KL(base || knocked out) in nats. Where the model gives NaN, numbers are NaN, ranks 0 and `hit` is False."""

GROUP = ["model", "source", "target", "features", "path", "window_size", "window_start"]
"""Columns that a mean over facts keeps apart."""

METRICS = {
    "change_pct": "Change of the target's probability (%)",
    "prob": "Probability of the target",
    "hit": "Target still on top (share of facts)",
    "rank": "Rank of the target",
    "kl": "KL from the base (nats)",
}
"""Columns that can be summarized and drawn, and what axes call them."""
