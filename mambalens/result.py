"""What a sweep found, with its faces: curves, heatmaps, a page, and how it shows itself in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mambalens.defaults import DETAILS
from mambalens.features.causal import CausalData
from mambalens.flow.verbs import FlowVerbs
from mambalens.hooks.errors import MambalensError
from mambalens.html.render import render
from mambalens.interventions.contribution_data import ContributionData
from mambalens.interventions.data import PatchData, TraceData
from mambalens.interventions.lens_data import LogitLensData
from mambalens.runs.data import SweepData
from mambalens.runs.table import GROUP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_WINDOWS = 12
"""Windows that a result lists in a notebook."""


class SweepResult(SweepData):
    """A finished sweep, or several put together; its tables are those of `runs.data.SweepData`."""

    @classmethod
    def of(cls, data: SweepData) -> Self:
        """The same with faces."""
        return cls(data.rows, data.skipped, data.facts, data.configs, data.unfinished, data.prompts, data.checks)

    def _repr_html_(self) -> str:
        """What was swept, and the dearest window of every source."""
        roles = self.roles()
        worst, groups = roles.dearest(), self.groups()
        rows = worst.head(SHOWN_WINDOWS).to_dict("records")
        varying = [name for name in ("model", "target", "features", "path", "ablation", "window_size")
                   if groups[name].nunique() > 1]  # fmt: skip
        return render(
            "result.html", result=self, rows=rows, varying=varying, left=len(worst) - len(rows),
            n_facts=len(self.rows.first(["fact_id"])), tokens=len(roles.rows) < len(self.rows),
        )  # fmt: skip

    def plot(
        self,
        metric: str = "change_pct",
        x: str = "layer",
        rows: str | None = None,
        columns: str | None = None,
        **options: Any,
    ) -> Figure:
        """Information-flow curves; see `figures.flow`."""
        from mambalens.figures import flow

        return flow(self, metric, x, rows, columns, **options)

    def heatmap(self, fact_id: str, metric: str = "change_pct", **where: Any) -> Figure:
        """Every token of a fact's prompt as the source, by window; the sweep needs `each` among its sources.

        Args:
            fact_id: the fact.
            metric: a column of `METRICS`, or 'measure' where the sweep has one.
            where: which part, where the sweep has several: `model=`, `features=`, `path=`, `ablation=`,
                `window_size=`.

        Raises:
            MambalensError: if the sweep has no such fact, no single tokens as sources, or several grids of them.
        """
        from mambalens.figures import heatmap

        part = self.where(fact_id=fact_id, **where)
        part = part._with(part.table[part.table.position >= 0], part.configs)
        if not len(part.table):
            raise MambalensError(
                f"The sweep has no single tokens of the fact {fact_id!r} as sources: sweep it with sources='each'."
            )
        several = [name for name in GROUP if name not in ("source", "window_start") and part.table[name].nunique() > 1]
        if several:
            raise MambalensError(
                f"One heatmap cannot show several values of {', '.join(several)}: keep one, for example "
                f"{several[0]}={part.table[several[0]].iloc[0]!r}."
            )
        prompts = part.prompts
        found = prompts[(prompts.model == part.table.model[0]) & (prompts.fact_id == fact_id)]
        if not len(found):
            raise MambalensError(f"The sweep was kept without the tokens of {fact_id!r}: run it again in its folder.")
        facts = part.facts[part.facts.fact_id == fact_id].reset_index(drop=True)
        one = SweepData(part.table, part.skipped, facts, part.configs)
        return heatmap(one, list(found.tokens.iloc[0]), [int(p) for p in found.subject.iloc[0]], metric)

    def report(self, path: str | Path, title: str | None = None, details: int = DETAILS) -> Path:
        """Write one HTML page to look at the sweep with: curves, switches, facts and their heatmaps.

        The page needs no network. Heatmaps of single prompts are there where the sweep has `each` among its sources.

        Args:
            path: the .html file.
            title: a heading; by default the models.
            details: facts of each model whose own numbers go into the page; curves are means over all.

        Returns:
            The file.

        Raises:
            MambalensError: if it cannot be written, or sweeps that were put together contradict each other.
        """
        from mambalens.report.page import write_report

        return write_report(self, path, title, details)


class CausalFeatures(CausalData):
    """What knocking out single features, or blocks of them, costs; see `features.causal.CausalData`."""

    @classmethod
    def of(cls, data: CausalData) -> Self:
        """The same with a face."""
        return cls(data.table, data.drops, data.skipped, data.source, data.target)

    def plot(self, by: str = "exchange_share_last") -> Figure:
        """A scatter plot of cost by measure, see `figures.causal_scatter`."""
        from mambalens.figures import causal_scatter

        return causal_scatter(self, by)


class Contributions(ContributionData):
    """What every part of a model adds to answers; its tables are those of `interventions.contribution_data`."""

    def plot(self, fact_id: str | None = None, **options: Any) -> Figure:
        """Parts by layer, and mixers by source: of one fact, or means over several; see `figures.contributions`."""
        from mambalens.figures import contributions

        return contributions(self, fact_id, **options)


class LogitLens(LogitLensData):
    """What a model would answer behind every layer; its tables are those of `interventions.lens_data`."""

    def plot(self, fact_id: str | None = None, metric: str = "log_odds", **options: Any) -> Figure:
        """A heatmap of layers and positions of one fact, or of pieces for several; see `figures.logit_lens`."""
        from mambalens.figures import logit_lens

        return logit_lens(self, fact_id, metric, **options)


class Flow(FlowVerbs):
    """Every edge of some prompts, and questions about them; its tables are those of `flow.data.FlowData`."""

    def plot(self, fact_id: str | None = None, **options: Any) -> Figure:
        """The flow of one prompt as a graph; see `figures.flow_graph.graph`."""
        from mambalens.figures import graph

        return graph(self, fact_id or str(self.base.fact_id[0]), **options)

    def plot_pieces(self, **options: Any) -> Figure:
        """The flow over all facts, by pieces and layers; see `figures.flow_pieces.flow_by_piece`."""
        from mambalens.figures import flow_by_piece

        return flow_by_piece(self, **options)

    def report(self, path: str | Path, title: str | None = None, **options: Any) -> Path:
        """Write one HTML page to look at the flow with; see `report.flow_page.write_flow_report`."""
        from mambalens.report.flow_page import write_flow_report

        return write_flow_report(self, path, title, **options)


class Patches(PatchData):
    """What activations of other prompts do to answers; see `interventions.data.PatchData`."""

    def plot(self, fact_id: str | None = None, metric: str | None = None, **options: Any) -> Figure:
        """One fact token by token, or the mean over facts by pieces; see `figures.interventions.cells`."""
        from mambalens.figures import cells

        return cells(self, fact_id, metric, **options)


class Traces(TraceData):
    """What restored activations bring back; see `interventions.data.TraceData`."""

    def plot(self, fact_id: str | None = None, metric: str | None = None, **options: Any) -> Figure:
        """One fact token by token, or the mean over facts by pieces; see `figures.interventions.cells`."""
        from mambalens.figures import cells

        return cells(self, fact_id, metric, **options)
