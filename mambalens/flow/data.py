"""What a flow found: edges with their effects, what is known of the facts, and what is reckoned from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mambalens.facts.pieces import PIECES

if TYPE_CHECKING:
    import pandas as pd

    from mambalens.runs.config import RunConfig


class FlowData:
    """Every edge of some prompts, and what cutting each does to the answer.

    Attributes:
        table: one row per fact and edge; columns in `flow.table.EDGES`.
        base: one row per fact and model; columns in `flow.table.BASE`.
        skipped: fact_id, source ('') and reason.
        facts: the facts that were asked for, with all their columns.
        prompts: one row per model and fact: the prompt's tokens, as texts, and the subject's positions.
        configs: what was run, one for each model.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        base: pd.DataFrame,
        skipped: pd.DataFrame,
        facts: pd.DataFrame,
        prompts: pd.DataFrame,
        configs: list[RunConfig],
        unfinished: int = 0,
    ) -> None:
        self.table, self.base, self.skipped, self.facts, self.prompts = table, base, skipped, facts, prompts
        self.configs, self.unfinished = configs, unfinished

    def __repr__(self) -> str:
        exact = int(self.table.exact.notna().sum())
        return (
            f"<Flow: {', '.join(self.models)}; {self.base.fact_id.nunique()} facts, {len(self.table)} edges, "
            f"{exact} of them cut>"
        )

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(dict.fromkeys(config.model for config in self.configs))

    @property
    def effect(self) -> pd.Series:
        """What cutting each edge changes: the exact number where there is one, else the attributed one."""
        return self.table.exact.fillna(self.table.attributed)

    def strongest(self, count: int = 20, fact_id: str | None = None) -> pd.DataFrame:
        """The edges whose cut changes the answer most, of every fact or of one, with their `effect`.

        Args:
            count: edges of a fact.
            fact_id: the fact; None: every one.
        """
        table = self.table.assign(effect=self.effect)
        table = table if fact_id is None else table[table.fact_id == fact_id]
        order = np.argsort(-table.effect.abs().to_numpy(), kind="stable")
        return table.iloc[order].groupby(["model", "fact_id", "features"], sort=False).head(count)

    def by_piece(self) -> pd.DataFrame:
        """Effects added up by pieces of the prompt: for every fact, model, layer, path and pair of pieces.

        Returns:
            model, fact_id, layer, mixer, path, features, source_piece, target_piece, effect; pieces as ordered
            categories.
        """
        import pandas as pd

        keys = ["model", "fact_id", "layer", "mixer", "path", "features", "source_piece", "target_piece"]
        table = self.table.assign(effect=self.effect).groupby(keys, sort=False).effect.sum().reset_index()
        for name in ("source_piece", "target_piece"):
            table[name] = pd.Categorical(table[name], list(PIECES), ordered=True)
        return table

    def _with(self, table: pd.DataFrame) -> Self:
        """The same with other rows."""
        return type(self)(table, self.base, self.skipped, self.facts, self.prompts, self.configs, self.unfinished)


WAYS = {"main": "in", "conv": "by the convolution of", "erase": "by the erasing of"}


def edge_name(edge: Any, tokens: Sequence[str]) -> str:
    """An edge in words: `"'muda' -> ',' by the convolution of layer 5"`.

    Args:
        edge: a row of the table, as `itertuples` gives it.
        tokens: the prompt's tokens.
    """
    return f"{tokens[edge.source]!r} -> {tokens[edge.target]!r} {WAYS[edge.path]} layer {edge.layer}"
