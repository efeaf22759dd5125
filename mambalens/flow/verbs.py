"""A flow with its verbs: certify it, find routes and circuits."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mambalens import defaults
from mambalens.facts.roles import check_role
from mambalens.facts.sequence import Facts
from mambalens.flow.data import FlowData
from mambalens.flow.table import CHOSEN_FEATURES, EDGE
from mambalens.hooks.errors import MambalensError
from mambalens.runs.intervals import mean_intervals
from mambalens.runs.table import MEASURES
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd

    from mambalens.evaluation import FactLike
    from mambalens.facts.fact import Fact
    from mambalens.facts.pairs import Pairs
    from mambalens.facts.prompts import Batch, Prompt
    from mambalens.flow.work import Flowing, FlowWork
    from mambalens.model import LoadedModel
    from mambalens.sweep.ablation import Asked


class FlowVerbs(FlowData):
    """A flow that can be asked more of; its tables are those of `flow.data.FlowData`.

    A flow that `Lens.flow` gives knows its model. One that is loaded is told it: `Flow.load(folder).of(lens, facts)`.
    """

    _lens: LoadedModel | None = None
    _asked: Facts | None = None
    _flowing: Flowing | None = None
    _memory: int | str | None = None
    _inside: tuple[Any, ...] | list[Any] = ()
    """What the blocks were told that ran when the model was handed over."""

    def of(
        self, lens: LoadedModel, facts: Facts, flowing: Flowing | None = None, memory: int | str | None = None
    ) -> Self:
        """The same with its model at hand."""
        from mambalens.flow.work import Flowing

        if self.models != [lens.name]:
            raise MambalensError(f"The flow is of {', '.join(self.models)}, and not of {lens.name}.")
        config = self.configs[0]
        self._lens, self._asked, self._memory, self._inside = lens, facts, memory, lens.hooks.inside
        if flowing is None and (config.features[0] == CHOSEN_FEATURES or config.measure not in MEASURES):
            raise MambalensError(
                f"The flow is of {config.features[0]!r} and of the measure {config.measure!r}, which its folder only "
                "names: ask for it again with lens.flow."
            )
        self._flowing = flowing or Flowing(config.paths, config.features[0], config.measure, config.points)
        return self

    @classmethod
    def with_verbs(cls, data: FlowData) -> Self:
        """A flow's tables with verbs."""
        return cls(data.table, data.skipped, data.facts, data.prompts, data.configs, data.unfinished, data.checks)

    def _with(self, table: pd.DataFrame) -> Self:
        new = super()._with(table)
        new._lens, new._asked, new._flowing, new._memory = self._lens, self._asked, self._flowing, self._memory
        new._inside = self._inside
        return new

    @property
    def knows_model(self) -> bool:
        """Whether the model is at hand."""
        return self._lens is not None

    def _work(self, bar: Any = None, ablation: Asked | None = None) -> FlowWork:
        """The model's work on the facts that are left."""
        from mambalens.flow.work import FlowWork

        if self._lens is None or self._asked is None or self._flowing is None:
            raise MambalensError("This flow was loaded without its model: give it one with flow.of(lens, facts).")
        left = set(self.table.fact_id.astype(str))
        facts = Facts([fact for fact in self._asked if str(fact.id) in left])
        if list(self._inside) != self._lens.hooks.inside:
            raise MambalensError(
                "The flow is of the model inside other blocks of hooks.knockout or hooks.add than run now: ask it "
                "inside the same ones, or ask for another with lens.flow."
            )
        work = FlowWork(self._lens, facts, self._flowing, None, self._memory, bar or tqdm(disable=True))
        if ablation is not None:
            work.put_in(ablation, facts)
        return work

    def certify(
        self,
        top: int = defaults.TOP,
        sample: int = defaults.TOP,
        seed: int = 0,
        progress: bool = True,
        ablation: str = defaults.ABLATION,
        other: Pairs | Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> Self:
        """Cut the strongest edges of every fact, and a random sample of all, each alone, exactly, by replay.

        Args:
            top: edges of a fact, the strongest as attributed.
            sample: edges of a fact that are drawn among all, for what is not among the strongest.
            seed: of the sample.
            progress: show a progress bar.
            ablation, other, over, keys: what stands in the sources' place, as in `Lens.sweep`. What sources erase is
                cut to nothing all the same. Attributions stay those of edges that are cut to nothing.

        Returns:
            The same flow with exact numbers where edges were cut, all of one ablation: those of another are left out.
            `agreement()` and `certificate()` hold them against the attributed ones.
        """
        from mambalens.flow.certificate import certify, uncertified
        from mambalens.runs.folder import below_each_other
        from mambalens.sweep.ablation import Asked

        asked = Asked.of(ablation, over, other, keys)
        flow = self
        if ablation != defaults.ABLATION or self.configs[0].ablation != ablation:
            flow = self._with(uncertified(self.table))
            flow.configs = [replace(self.configs[0], ablation=asked.label)]
        counts = self.table.groupby("fact_id", sort=False).size()
        with tqdm(
            desc="certify", unit="edge", total=int(counts.clip(upper=top + sample).sum()), disable=not progress
        ) as bar:
            work = self._work(bar, asked)
            certified = flow._with(certify(flow, work, top, sample, seed, bar))
        certified.checks = below_each_other([certified.checks, work.exact.checks.told()])
        return certified

    def agreement(self) -> pd.DataFrame:
        """How attributions agree with exact cuts, one row a fact; see `flow.agreement.agreement`."""
        from mambalens.flow.agreement import agreement

        return agreement(self)

    def certificate(self) -> pd.DataFrame:
        """Medians and means of `agreement` with 95 % intervals; see `flow.agreement.summary`."""
        from mambalens.flow.agreement import summary

        return summary(self.agreement())

    def edge_features(self, count: int = 20, k: int = 5, progress: bool = True) -> pd.DataFrame:
        """By which of the mixer's features the strongest edges have their effect; see `flow.edge_features`.

        Args:
            count: edges of a fact, the strongest.
            k: features of an edge, the strongest.
            progress: show a progress bar.

        Returns:
            One row per fact, edge and feature, the strongest feature of an edge first: model, fact_id, layer, mixer,
            path, source, target, feature (number of the channel or head), effect (the feature's part of what cutting
            the edge changes, by the gradient of the model as it is, in the measure's unit: nats for log-odds). The
            parts of all features of an edge add up to what a flow with `points=1` attributes to it.

        Raises:
            MambalensError: for no edges or no features, or if the flow was loaded without its model.
        """
        from mambalens.flow.edge_features import edge_features

        for name, number in (("count", count), ("k", k)):
            if number < 1:
                raise MambalensError(f"{name}={number}: ask for 1 or more.")
        work = self._work()
        with tqdm(desc="edge features", unit="prompt", total=len(work.prompts), disable=not progress) as bar:
            return edge_features(work, self.strongest(count), k, bar)

    def routes(
        self,
        source: str = "subject",
        k: int = 5,
        progress: bool = True,
        ablation: str = defaults.ABLATION,
        other: Pairs | Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> pd.DataFrame:
        """The strongest chains of positions from a role to the last token, every one scored by exact cuts.

        Args:
            source: role at which routes begin (see `roles.ROLES`).
            k: routes of a fact.
            progress: show a progress bar.
            ablation, other, over, keys: what stands in the place of the edges that are cut, as in `certify`.

        Returns:
            One row per fact and route: model, fact_id, rank, relays (positions between source and last token, those
            that relay side by side in one list), relay_tokens, pieces (what the relays are), carried_pct (share of the
            answer's probability that only this chain carries, see `flow.routes.Route.carried`), hop_pct (what cutting
            each hop alone loses), joint_pct (all hops together), ways (path and layers of the edges that have most of
            each hop), edges (those edges: layer, path, source, target), ablation. Facts in which the role is empty have
            none.
        """
        import pandas as pd

        from mambalens.flow.routes import Losses, carriers, routes_of, table_of
        from mambalens.sweep.ablation import Asked

        asked = Asked.of(ablation, over, other, keys)
        tables = []
        for work, prompt, batch, start in self._starts(source, "routes", progress, asked):
            rows = self.table[self.table.fact_id == str(prompt.fact.id)]
            prob = float(rows.base_prob.iloc[0])
            found = routes_of(work, prompt, batch, start, k, prob)
            loss = Losses(work, batch, work.edges(len(prompt.ids)), prob)
            named = [[carriers(loss, hop, rows) for hop in route.hops] for route in found]
            tables.append(table_of(prompt, work.lens.name, found, named, asked.label))
        return pd.concat(tables, ignore_index=True)

    def routes_by_piece(
        self,
        source: str = "subject",
        routes: pd.DataFrame | None = None,
        progress: bool = True,
        ablation: str = defaults.ABLATION,
        other: Pairs | Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> pd.DataFrame:
        """What routes carry over all facts, told by pieces of the prompt; see `flow.routes.by_pieces`.

        Every piece is tried as the relay, and every chain of pieces that a fact's own routes have; all of them in every
        fact, by exact cuts.

        Args:
            source: role at which routes begin.
            routes: from `routes` of the same source and ablation; without, they are looked for.
            progress: show a progress bar.
            ablation, other, over, keys: what stands in the place of the edges that are cut, as in `certify`.

        Raises:
            MambalensError: if the routes are of another ablation.
        """
        from mambalens.flow.routes import by_pieces, losses_by_piece, pieces_asked
        from mambalens.sweep.ablation import Asked

        asked = Asked.of(ablation, over, other, keys)
        if routes is None:
            routes = self.routes(source, 5, progress, ablation, other, over, keys)
        others = sorted(set(routes.get("ablation", [])) - {asked.label})
        if others:
            raise MambalensError(f"The routes are of ablation {others[0]!r}, and not of {asked.label!r}: give its own.")
        chains = pieces_asked(routes)
        found = []
        for work, prompt, batch, start in self._starts(source, "routes by piece", progress, asked):
            prob = float(self.base.prob[self.base.fact_id == str(prompt.fact.id)].iloc[0])
            found.append(losses_by_piece(work, prompt, batch, start, chains, prob))
        return by_pieces(self.models[0], chains, found, asked.label)

    def _starts(
        self, source: str, doing: str, progress: bool, ablation: Asked
    ) -> Iterator[tuple[FlowWork, Prompt, Batch, list[int]]]:
        """Every prompt that has a role before its last token, with the role's positions.

        Raises:
            MambalensError: if none has.
        """
        from mambalens.flow.work import batches_of_one

        check_role(source)
        work, some = self._work(ablation=ablation), False
        prompts = list(work.prompts.values())
        for prompt, batch in tqdm(batches_of_one(work.lens, prompts), doing, len(prompts), disable=not progress):
            last = len(prompt.ids) - 1
            start = [position for position in prompt.positions(source) if position != last]
            if start:
                some = True
                yield work, prompt, batch, start
        if not some:
            raise MambalensError(f"The role {source!r} is empty in every prompt: no route begins there.")

    def circuit(
        self,
        keep: float = 0.9,
        progress: bool = True,
        ablation: str = defaults.ABLATION,
        other: Pairs | Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> pd.DataFrame:
        """A few edges of every fact that keep a share of the answer with all other edges cut, found greedily.

        None of them can be taken out alone; that no fewer would do is not shown.

        Args:
            keep: share of the answer's probability.
            progress: show a progress bar.
            ablation, other, over, keys: what stands in the place of the edges that are cut, as in `certify`.

        Returns:
            One row per fact and edge of its circuit: model, fact_id, layer, mixer, path, source, target, their pieces,
            effect, cost (what taking this edge out of the circuit loses of the answer), kept (share of the answer that
            the circuit keeps), edges (its size), of (edges of the prompt) and ablation. A fact whose answer is kept
            with every edge cut has no row.
        """
        import pandas as pd

        from mambalens.flow.certificate import listed_of
        from mambalens.flow.circuits import Ablated, circuit_of
        from mambalens.flow.work import batches_of_one
        from mambalens.sweep.ablation import Asked

        if not 0 < keep <= 1:
            raise MambalensError(f"keep={keep}: give a share of the answer, more than 0 and at most 1.")
        asked = Asked.of(ablation, over, other, keys)
        work = self._work(ablation=asked)
        of_fact = dict(list(self.table.assign(effect=self.effect).groupby("fact_id", sort=False)))
        tables = []
        columns = ["model", "fact_id", *EDGE, "source_piece", "target_piece", "effect"]
        prompts = list(work.prompts.values())
        for prompt, batch in tqdm(batches_of_one(work.lens, prompts), "circuits", len(prompts), disable=not progress):
            rows = of_fact[str(prompt.fact.id)]
            ablated = Ablated(work, batch, listed_of(work, rows), float(rows.base_prob.iloc[0]))
            found = circuit_of(ablated, rows.effect.to_numpy(float), keep)
            about: dict[str, Any] = {
                "cost": found.costs, "kept": found.kept, "edges": len(found.edges), "of": len(rows),
                "ablation": asked.label,
            }  # fmt: skip
            tables.append(rows.iloc[found.edges][columns].assign(**about))
        return pd.concat(tables, ignore_index=True)

    def stability(self, circuits: pd.DataFrame, splits: int = 100, seed: int = 0) -> pd.DataFrame:
        """How circuits of random halves of the facts agree, against chance; see `flow.stability.stability`.

        Args:
            circuits: from `circuit`.
            splits: how often the facts are halved.
            seed: of the halves, and of the edges that are drawn for chance.
        """
        from mambalens.flow.stability import stability

        return stability(self, circuits, splits, seed)

    def faithfulness(
        self,
        seed: int = 0,
        progress: bool = True,
        ablation: str = defaults.ABLATION,
        other: Pairs | Fact | None = None,
        over: FactLike | None = None,
        keys: bool = False,
    ) -> pd.DataFrame:
        """What circuits of growing size keep of the answer: by effect, by attention alone, and at random.

        Args:
            seed: of the random edges.
            progress: show a progress bar.
            ablation, other, over, keys: what stands in the place of the edges that are cut, as in `certify`.

        Returns:
            model, order ('effect': the edges that help most first; 'attention': the largest entries of effective
            attention first; 'random'), share_edges, edges (mean), facts, kept (mean share of the answer's probability),
            low, high (95 % bootstrap interval over facts), ablation.
        """
        import pandas as pd

        from mambalens.flow.certificate import listed_of
        from mambalens.flow.circuits import SHARES, Ablated, attention_of, faithfulness
        from mambalens.flow.work import batches_of_one
        from mambalens.sweep.ablation import Asked

        asked = Asked.of(ablation, over, other, keys)
        work = self._work(ablation=asked)
        of_fact = dict(list(self.table.assign(effect=self.effect).groupby("fact_id", sort=False)))
        found: dict[str, list[Any]] = {}
        counts = []
        prompts = list(work.prompts.values())
        for prompt, batch in tqdm(
            batches_of_one(work.lens, prompts), "faithfulness", len(prompts), disable=not progress
        ):
            rows = of_fact[str(prompt.fact.id)]
            listed = listed_of(work, rows)
            draw = np.random.default_rng([seed, zlib.crc32(str(prompt.fact.id).encode())])
            orders = {
                "effect": np.argsort(rows.effect.to_numpy(float), kind="stable"),
                "attention": np.argsort(-attention_of(work, batch, listed), kind="stable"),
                "random": draw.permutation(len(rows)),
            }
            ablated = Ablated(work, batch, listed, float(rows.base_prob.iloc[0]))
            for order, kept in faithfulness(ablated, orders).items():
                found.setdefault(order, []).append(kept)
            counts.append(len(rows))
        table = []
        for order, of_facts in found.items():
            columns = np.stack(of_facts).T  # [share, fact]
            for share, values, (mean, low, high) in zip(
                SHARES, columns, mean_intervals(list(columns), "bootstrap"), strict=True
            ):
                edges = float(np.mean([round(share * count) for count in counts]))
                table.append((work.lens.name, order, share, edges, len(values), mean, low, high, asked.label))
        names = ["model", "order", "share_edges", "edges", "facts", "kept", "low", "high", "ablation"]
        return pd.DataFrame(table, columns=names)
