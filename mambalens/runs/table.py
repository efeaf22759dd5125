"""Columns of a sweep's table, and what figures call them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mambalens.defaults import ABLATION

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "fact_id", "model", "source", "position", "target", "features", "path", "ablation", "window_start",
    "window_size",
    "base_prob", "prob", "change_pct", "base_rank", "rank", "hit", "top_token", "kl",
)  # fmt: skip
"""Columns of a sweep's table. `ablation` is what stood in the source's place ('mean+keys': keys of attention with the
values), `position` the source's where it is a single token, else -1 (`ROLE`). Probabilities and ranks (1 is the top)
are those of the target's first token, `change_pct` is 100 (prob - base_prob) / base_prob, `hit`
whether that token is still the top one, `top_token` what is on top, `kl` KL(base || knocked out) in nats. Where the
model gives NaN, numbers are NaN, ranks 0 and `hit` is False."""

MEASURED = ("base_measure", "measure")
"""Columns that a sweep with a measure has behind the others: it without the knockout, and under it."""
MEASURES = {
    "log_odds": "Log-odds of the target (nats)",
    "log_prob": "Log-probability of the target (nats)",
    "logit": "Logit of the target",
    "prob": "Probability of the target",
}
"""Measures that flows and sweeps can have, and what axes call them."""

SINGLE = "each:"
"""What the source of a single token begins with; its position follows."""
ROLE = -1
"""Position of a source that is a role."""

GROUP = ["model", "source", "target", "features", "path", "ablation", "window_size", "window_start"]
"""Columns that a mean over facts keeps apart."""

METRICS = {
    "change_pct": "Change of the target's probability (%)",
    "prob": "Probability of the target",
    "hit": "Target still on top (share of facts)",
    "rank": "Rank of the target",
    "kl": "KL from the base (nats)",
}
"""Columns that can be summarized and drawn, and what axes call them."""


def single(position: int) -> str:
    """What the table calls a single token as the source."""
    return f"{SINGLE}{position}"


def with_all_columns(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the columns that folders of older releases lack.

    Of the position only the source's name tells there, and nothing stood in the place of what was cut.
    """
    for at, name in enumerate(columns_of(table.columns)):
        if name not in table:
            table.insert(at, name, missing_column(name, table))
    return table


def columns_of(stored: Iterable[str]) -> list[str]:
    """Names of the columns of a table with these, and with those that folders of older releases lack."""
    names = list(stored)
    if "position" not in names:
        names.insert(COLUMNS.index("position"), "position")
    if "ablation" not in names:
        names.insert(names.index("path") + 1, "ablation")
    return names


def missing_column(name: str, table: pd.DataFrame) -> Any:
    """What a column is that a table lacks, of its sources."""
    if name == "ablation":
        return ABLATION
    names = table.source.astype(str)
    return names.where(names.str.startswith(SINGLE), f"{SINGLE}{ROLE}").str.removeprefix(SINGLE).astype(int)
