"""What a logit lens has seen: the answer at every layer and position, and means over facts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, ClassVar, Self

from mambalens.facts.pieces import PIECES
from mambalens.hooks.errors import MambalensError, choose
from mambalens.interventions.kept_data import ReadingData
from mambalens.runs.folder import LOGIT, below_each_other
from mambalens.runs.intervals import INTERVALS, mean_intervals
from mambalens.runs.stored import Stored

if TYPE_CHECKING:
    import pandas as pd

LOGIT_COLUMNS: dict[str, str] = {
    "model": "the model's name",
    "fact_id": "the fact",
    "layer": "how many layers the residual stream has behind it; 0: the embeddings, the model's depth: its own answer",
    "position": "position in the prompt",
    "token": "its token",
    "piece": "the piece of the prompt that it is in",
    "prob": "probability of the answer's first token",
    "log_odds": "its log-odds, in nats",
    "rank": "its rank, 1 for the top",
    "top_token": "the most probable token",
    "top_tokens": "the most probable tokens, a list",
    "top_probs": "their probabilities",
}
"""Columns of a logit lens's table, and what each is."""
LISTS = ("top_tokens", "top_probs")
"""Columns of lists, which a folder has as JSON."""
METRICS = {
    "log_odds": "Log-odds of the answer (nats)",
    "prob": "Probability of the answer",
    "rank": "Rank of the answer",
}
"""What can be summarised and drawn, and what axes call it."""


def with_texts(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose lists are JSON."""
    return table.assign(**{name: [json.dumps(listed) for listed in table[name]] for name in LISTS})


def checked_metric(metric: str) -> str:
    """A metric of the answer, or an error that says which there are."""
    if metric not in METRICS:
        raise MambalensError(f"metric={metric!r} is not a metric: {choose(metric, METRICS)}.")
    return metric


class LogitLensData(ReadingData):
    """What the model would answer behind every layer, at every position.

    Attributes:
        table: one row per fact, layer and position; columns in `LOGIT_COLUMNS`.
        skipped: fact_id, source ('') and reason.
        facts: the facts that were asked for, with all their columns.
        prompts: one row per fact: the prompt's tokens, as texts, and the subject's positions.
        config: what was run.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
    """

    kind: ClassVar[str] = LOGIT

    @classmethod
    def of(cls, data: LogitLensData) -> Self:
        """The same with the faces of this class."""
        return cls(data.table, data.skipped, data.facts, data.prompts, data.config, data.unfinished)

    @classmethod
    def from_stored(cls, stored: Stored) -> Self:
        """The logit lens that a folder holds, or that would be in one."""
        rows = below_each_other(list(stored.tables))
        table = rows.assign(**{name: [json.loads(text) for text in rows[name]] for name in LISTS})
        return cls(table, stored.skipped, stored.facts, stored.prompts, stored.configs[0], stored.unfinished)

    def _rows(self) -> pd.DataFrame:
        return with_texts(self.table)

    @property
    def answers(self) -> dict[str, str]:
        """The answers, by fact."""
        read = set(self.table.fact_id)
        pairs = zip(self.facts.fact_id, self.facts.target, strict=True)
        return {fact_id: answer for fact_id, answer in pairs if fact_id in read}

    def __repr__(self) -> str:
        names = ", ".join(self.n_layers)
        return f"<LogitLens: {names}; {len(self.answers)} facts, {len(self.table)} rows{self._left()}>"

    def at_last(self) -> pd.DataFrame:
        """The rows of every prompt's last position, where the answer is read."""
        keys = ["model", "fact_id"]
        last = self.table.groupby(keys, sort=False).position.transform("max")
        return self.table[self.table.position == last].reset_index(drop=True)

    def summary(self, metric: str = "log_odds", interval: str = "bootstrap", seed: int = 0) -> pd.DataFrame:
        """Means over facts by layer and piece of the prompt, with 95 % intervals of the mean.

        A piece of several positions counts with the mean over them, and a fact without it not at all.

        Args:
            metric: 'log_odds', 'prob' or 'rank'.
            interval: 'bootstrap' (percentiles of resampled facts), 't', or 'sem' (one standard error to either side).
            seed: of the bootstrap.

        Returns:
            model, layer, piece, n (facts), mean, low, high.

        Raises:
            MambalensError: for a metric or interval that there is not.
        """
        import pandas as pd

        checked_metric(metric)
        if interval not in INTERVALS:
            raise MambalensError(f"interval={interval!r} is not an interval: {choose(interval, INTERVALS)}.")
        keys = ["model", "layer", "piece"]
        of_facts = self.table.groupby([*keys, "fact_id"], sort=False)[metric].mean().reset_index()
        groups = [(key, part[metric].to_numpy(float)) for key, part in of_facts.groupby(keys, sort=False)]
        means = mean_intervals([values for _, values in groups], interval, seed)
        rows = [(*key, len(values), *three) for (key, values), three in zip(groups, means, strict=True)]
        found = pd.DataFrame(rows, columns=[*keys, "n", "mean", "low", "high"])
        order = {name: number for number, name in enumerate(PIECES)}
        return found.sort_values(keys, ignore_index=True, key=lambda c: c.map(order) if c.name == "piece" else c)
