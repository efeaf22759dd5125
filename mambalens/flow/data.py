"""What a flow found: edges with their effects, what was left out, and the folder they are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from mambalens.defaults import ABLATION, MEASURE
from mambalens.flow.table import BASE, EDGE, with_categories
from mambalens.hooks.errors import MambalensError
from mambalens.runs.config import RunConfig
from mambalens.runs.data import column_of, facts_together, with_unusable
from mambalens.runs.folder import FLOW, below_each_other, no_checks
from mambalens.runs.stored import Stored, folders_of, stored_in
from mambalens.runs.table import MEASURES


class FlowData:
    """Every edge of some prompts, and what cutting each does to the answer.

    Attributes:
        table: one row per fact and edge; columns in `flow.table.EDGES`.
        skipped: fact_id, source ('') and reason.
        facts: the facts that were asked for, with all their columns.
        prompts: one row per model and fact: the prompt's tokens, as texts, and the subject's positions.
        configs: what was run, one for each model.
        unfinished: blocks of facts that are still missing, of a run that is not at its end.
        checks: how replays were held against the model; columns in `runs.folder.CHECKS`.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        skipped: pd.DataFrame,
        facts: pd.DataFrame,
        prompts: pd.DataFrame,
        configs: list[RunConfig],
        unfinished: int = 0,
        checks: pd.DataFrame | None = None,
    ) -> None:
        self.table, self.skipped, self.facts, self.prompts = with_categories(table), skipped, facts, prompts
        self.configs, self.unfinished = configs, unfinished
        self.checks = no_checks() if checks is None else checks

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

    @cached_property
    def base(self) -> pd.DataFrame:
        """What is known of every fact without a cut; columns in `flow.table.BASE`."""
        groups = self.table.groupby(["fact_id", "model"], sort=False, observed=True)
        found = groups.agg(prob=("base_prob", "first"), measure=("base_measure", "first"), edges=("layer", "size"))
        return found.reset_index()[list(BASE)]

    @property
    def measure(self) -> str:
        """What the effects are of, in the words of axes; a function's name where it is none of `MEASURES`.

        Raises:
            MambalensError: if flows of several measures were put together.
        """
        names = sorted({config.measure or MEASURE for config in self.configs})
        if len(names) > 1:
            raise MambalensError(f"Flows of several measures ({', '.join(names)}) are not held against each other.")
        return MEASURES.get(names[0], names[0]) if names else MEASURES[MEASURE]

    @property
    def unit(self) -> str:
        """The unit of the effects: 'nats', or ''."""
        return "nats" if "nats" in self.measure else ""

    @property
    def ablation(self) -> str:
        """What stands in the place of the edges that were cut exactly, as tables call it: 'zero', 'mean+keys', ...

        Raises:
            MambalensError: if exact numbers of several ablations are in it.
        """
        return one_ablation([self])

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
        return table.iloc[order].groupby(["model", "fact_id"], sort=False).head(count)

    def by_piece(self) -> pd.DataFrame:
        """Effects added up by pieces of the prompt: for every fact, model, layer, path and pair of pieces.

        Returns:
            model, fact_id, layer, mixer, path, features, source_piece, target_piece, effect; pieces as ordered
            categories.
        """
        keys = ["model", "fact_id", "layer", "mixer", "path", "features", "source_piece", "target_piece"]
        table = self.table.assign(effect=self.effect)
        return table.groupby(keys, sort=False, observed=True).effect.sum().reset_index()

    def tokens(self, fact_id: str, model: str | None = None) -> list[str]:
        """The tokens of a fact's prompt.

        Raises:
            MambalensError: if the flow has no such fact.
        """
        found = self.prompts[self.prompts.fact_id == fact_id]
        found = found if model is None else found[found.model == model]
        if not len(found):
            raise MambalensError(
                f"The flow has no fact {fact_id!r}: it has {', '.join(map(repr, self.base.fact_id[:5]))}, ..."
            )
        return [str(token) for token in found.tokens.iloc[0]]

    def where(self, **values: Any) -> Self:
        """The part whose columns have these values, of the table or of the facts; a list means any of them.

        Raises:
            MambalensError: for a column that neither the table nor the facts have, or if nothing is left.
        """
        table = self.table
        for column, value in values.items():
            wanted = {str(v) for v in (value if isinstance(value, list | tuple | set) else [value])}
            table = table[column_of(column, table, self.facts).astype(str).isin(wanted)]
        if not len(table):
            raise MambalensError(f"No edge of the flow has {', '.join(f'{k}={v!r}' for k, v in values.items())}.")
        return self._with(table.reset_index(drop=True))

    def save(self, folder: str | Path) -> Path:
        """Write tables as parquet and what was run as JSON, in the format of a run's folder.

        Returns:
            The folder.

        Raises:
            MambalensError: if it cannot be written, or holds a run of its own.
        """
        stored = Stored([self.table], self.skipped, self.facts, self.prompts, self.configs, self.checks)
        return stored.save(folder, FLOW)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a flow's folder, also while it is still being filled, or what `save` wrote.

        A folder with such folders in it gives them all as one.
        """
        found = folders_of(folder, FLOW)
        if found != [Path(folder)]:
            return cls.concat([cls.load(path) for path in found])
        stored = stored_in(found[0], FLOW)
        table = pd.concat([with_categories(table) for table in stored.tables], ignore_index=True)
        skipped = with_unusable(stored.skipped, stored.configs)
        return cls(table, skipped, stored.facts, stored.prompts, stored.configs, stored.unfinished, stored.checks)

    @classmethod
    def concat(cls, flows: Sequence[FlowData]) -> Self:
        """Several flows as one, for comparing models.

        Raises:
            MambalensError: if there is none, if two have the same edges, whose effects would be added up twice, if
                different facts have the same id, or if their edges were cut with different ablations.
        """
        if not flows:
            raise MambalensError("There is no flow to put together.")
        ablation = one_ablation(flows)

        def together(name: str, keys: list[str]) -> pd.DataFrame:
            parts = pd.concat([getattr(flow, name) for flow in flows], ignore_index=True)
            return parts.drop_duplicates(keys, ignore_index=True)

        facts = facts_together([flow.facts for flow in flows])
        table = pd.concat([flow.table for flow in flows], ignore_index=True)
        twice = table[table.duplicated(["model", "fact_id", "features", *EDGE])]
        if len(twice):
            first = twice.iloc[0]
            raise MambalensError(
                f"Several of the flows have the same edges (fact {first.fact_id!r}, model {first.model!r}, features "
                f"{first.features!r}): put together flows of different facts, models or features."
            )
        configs = [replace(config, ablation=ablation) for flow in flows for config in flow.configs]
        skipped, prompts = together("skipped", ["fact_id", "reason"]), together("prompts", ["model", "fact_id"])
        unfinished, checks = sum(flow.unfinished for flow in flows), below_each_other([flow.checks for flow in flows])
        return cls(table, skipped, facts, prompts, configs, unfinished, checks)

    def _with(self, table: pd.DataFrame) -> Self:
        """The same with other rows."""
        left = set(table.model)
        configs = [config for config in self.configs if config.model in left]
        checks = self.checks[self.checks.model.isin(left)].reset_index(drop=True)
        return type(self)(table, self.skipped, self.facts, self.prompts, configs, self.unfinished, checks)


def one_ablation(flows: Sequence[FlowData]) -> str:
    """The ablation of which the exact numbers of some flows are; 'zero' where they have none.

    Raises:
        MambalensError: if there are several, whose numbers would stand in one column.
    """
    cut = [flow for flow in flows if flow.table.exact.notna().any()]
    names = list(dict.fromkeys(config.ablation for flow in cut for config in flow.configs))
    if len(names) > 1:
        raise MambalensError(
            f"Edges were cut with different ablations ({', '.join(names)}), whose exact effects are not put together: "
            "certify them all alike."
        )
    return names[0] if names else ABLATION
