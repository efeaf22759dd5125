"""What contributions were found: a table whose rows add up to each answer's score, and sums over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mambalens.facts.pieces import PIECES
from mambalens.hooks.errors import MambalensError, choose
from mambalens.interventions.kept_data import ReadingData
from mambalens.runs.config import RunConfig
from mambalens.runs.folder import CONTRIBUTION, below_each_other
from mambalens.runs.intervals import INTERVALS, mean_intervals
from mambalens.runs.stored import Stored
from mambalens.runs.table import MEASURES

if TYPE_CHECKING:
    import pandas as pd

COLUMNS: dict[str, str] = {
    "model": "the model's name",
    "fact_id": "the fact",
    "layer": "number of the layer; -1: before the first, and behind the last one more than that",
    "part": "what adds: embedding, mixer, mlp (experts too), rest (what a layer does to the residual stream itself), "
    "added (a vector that is added behind the layer) or bias (what is said where the residual stream is empty)",
    "kind": "kind of the mixer; '' elsewhere",
    "path": "of a mixer: main (scan or attention), conv (a short convolution), skip (the position itself, past the "
    "scan) or bias; '' elsewhere",
    "source": "position that it comes from; -1 where it comes from none",
    "token": "that position's token, or ''",
    "piece": "the piece of the prompt that the position is in, or ''",
    "feature": "channel or head; -1 where features are not told apart",
    "contribution": "in units of the score",
}
"""Columns of a table of contributions, and what each is."""
PARTS = ("embedding", "mixer", "mlp", "rest", "added", "bias")
BY = ("layer", "part", "kind", "path", "piece")
"""What a summary tells apart by default."""


class ContributionData(ReadingData):
    """Contributions of every part of a model to the scores of answers.

    Attributes:
        table: one row per fact and addition; columns in `COLUMNS`. The rows of a fact add up to its score.
        scores: model, fact_id, target and score, one row a fact.
        skipped: fact_id, source ('') and reason.
        facts: the facts that were asked for, with all their columns.
        prompts: one row per fact: the prompt's tokens, as texts, and the subject's positions.
        config: what was run.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
    """

    kind: ClassVar[str] = CONTRIBUTION

    def __init__(
        self,
        table: pd.DataFrame,
        scores: pd.DataFrame,
        skipped: pd.DataFrame,
        facts: pd.DataFrame,
        prompts: pd.DataFrame,
        config: RunConfig,
        unfinished: int = 0,
    ) -> None:
        super().__init__(table, skipped, facts, prompts, config, unfinished)
        self.scores = scores

    @classmethod
    def of(cls, data: ContributionData) -> Self:
        """The same with the faces of this class."""
        return cls(data.table, data.scores, data.skipped, data.facts, data.prompts, data.config, data.unfinished)

    @classmethod
    def from_stored(cls, stored: Stored) -> Self:
        """The contributions that a folder holds, or that would be in one: every row has its fact's score."""
        rows = below_each_other(list(stored.tables))
        scores = rows[["model", "fact_id", "score"]].drop_duplicates("fact_id", ignore_index=True)
        targets = dict(zip(stored.facts.fact_id, stored.facts.target, strict=True))
        scores.insert(2, "target", scores.fact_id.map(targets))
        table, config = rows[list(COLUMNS)], stored.configs[0]
        return cls(table, scores, stored.skipped, stored.facts, stored.prompts, config, stored.unfinished)

    def _rows(self) -> pd.DataFrame:
        scores = dict(zip(self.scores.fact_id, self.scores.score, strict=True))
        return self.table.assign(score=self.table.fact_id.map(scores))

    @property
    def measure(self) -> str:
        """Name of the score."""
        return self.config.measure

    def __repr__(self) -> str:
        names = ", ".join(self.n_layers)
        return (
            f"<Contributions: {names}; {len(self.scores)} facts, {len(self.table)} rows, {self.measure}{self._left()}>"
        )

    @property
    def axis(self) -> str:
        """What the score is, in the words of axes."""
        names = MEASURES | {"logit_difference": "Logit difference (nats)"}
        return names.get(self.measure, self.measure)

    def by_layer(self) -> pd.DataFrame:
        """Contributions of every fact added up by layer and part.

        Returns:
            model, fact_id, layer, part, contribution.
        """
        return self._sums(["layer", "part"])

    def by_source(self) -> pd.DataFrame:
        """What mixers bring of every position, and what the last token's own embedding says, added up over features.

        Returns:
            model, fact_id, layer, part, kind, path, source, token, piece, contribution.
        """
        found = self._sums(["layer", "part", "kind", "path", "source", "token", "piece"])
        return found[found.source >= 0].reset_index(drop=True)

    def summary(self, by: Sequence[str] = BY, interval: str = "bootstrap", seed: int = 0) -> pd.DataFrame:
        """Means over facts, with 95 % intervals of the mean.

        A mean is over the facts that have such a part at all: of a piece, those whose prompt has it.

        Args:
            by: columns that are told apart: some of 'layer', 'part', 'kind', 'path', 'piece', 'feature'. What is not
                named is added up.
            interval: 'bootstrap' (percentiles of resampled facts), 't', or 'sem' (one standard error to either side).
            seed: of the bootstrap.

        Returns:
            model, the columns that were named, n (facts), mean, low, high.

        Raises:
            MambalensError: for a column or interval that there is not.
        """
        import pandas as pd

        allowed = (*BY, "feature")
        wrong = [name for name in by if name not in allowed]
        if wrong:
            raise MambalensError(
                f"by has {wrong[0]!r}, which a summary does not tell apart: {choose(wrong[0], allowed)}."
            )
        if interval not in INTERVALS:
            raise MambalensError(f"interval={interval!r} is not an interval: {choose(interval, INTERVALS)}.")
        sums = self._sums(list(by))
        groups = [(key, part.contribution.to_numpy(float)) for key, part in sums.groupby(["model", *by], sort=False)]
        means = mean_intervals([values for _, values in groups], interval, seed)
        rows = [(*key, len(values), *three) for (key, values), three in zip(groups, means, strict=True)]
        found = pd.DataFrame(rows, columns=["model", *by, "n", "mean", "low", "high"])
        order = {name: number for number, name in enumerate(["", *PIECES])}
        return found.sort_values(
            ["model", *by], kind="stable", ignore_index=True, key=lambda c: c.map(order) if c.name == "piece" else c
        )

    def tokens(self, fact_id: str) -> list[str]:
        """The tokens of a fact's prompt.

        Raises:
            MambalensError: if there is no such fact.
        """
        found = self.prompts[self.prompts.fact_id == fact_id]
        if not len(found):
            known = ", ".join(map(repr, self.prompts.fact_id[:5]))
            raise MambalensError(f"There are no contributions to the fact {fact_id!r}, but of {known}.")
        return [str(token) for token in found.tokens.iloc[0]]

    def where(self, **values: Any) -> Self:
        """The facts, parts or positions whose columns have these values; a list means any of them.

        Raises:
            MambalensError: for a column that the table does not have, or if nothing is left.
        """
        table = self.table
        for column, value in values.items():
            if column not in table:
                raise MambalensError(f"{column!r} is no column: {choose(column, COLUMNS)}.")
            wanted = value if isinstance(value, list | tuple | set) else [value]
            table = table[table[column].isin(list(wanted))]
        if not len(table):
            raise MambalensError(f"No contribution has {', '.join(f'{k}={v!r}' for k, v in values.items())}.")
        scores = self.scores[self.scores.fact_id.isin(table.fact_id.unique())].reset_index(drop=True)
        table = table.reset_index(drop=True)
        return type(self)(table, scores, self.skipped, self.facts, self.prompts, self.config, self.unfinished)

    def _sums(self, by: list[str]) -> pd.DataFrame:
        keys = ["model", "fact_id", *by]
        return self.table.groupby(keys, sort=False, observed=True).contribution.sum().reset_index()
