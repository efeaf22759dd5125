"""The work of a flow: every edge of a block of facts, attributed, and some of them cut."""

from __future__ import annotations

import functools
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.defaults import ABLATION, MEASURE, METHODS, POINTS, TOP
from mambalens.facts.pieces import PIECES, piece_of
from mambalens.facts.prompts import Batch, Prompt, Skip, none_usable, read_facts
from mambalens.facts.sequence import Facts
from mambalens.flow.attribution import Asked, attribute
from mambalens.flow.exact import Edge, ExactCuts
from mambalens.flow.table import CHOSEN, CHOSEN_FEATURES, EDGES
from mambalens.hooks import HookManager, Mixer
from mambalens.hooks.errors import MambalensError, choose
from mambalens.hooks.knockout import Cutting, Features, Paths
from mambalens.measures import Measure, measure_of, name_of
from mambalens.model import LoadedModel
from mambalens.sweep.ablation import Ablation, ablation_of
from mambalens.sweep.ablation import Asked as AskedAblation
from mambalens.sweep.halving import Halving
from mambalens.sweep.prediction import target_probability
from mambalens.sweep.replay import prompts_at_once
from mambalens.system.memory import budget, widest

if TYPE_CHECKING:
    import pandas as pd

    from mambalens.runs.folder import Part

SHARES = 4
"""A pass with a graph has this part of the memory."""
TOKENS = 32
"""Tokens of a pass with a graph on a CPU. More of them take more memory and no less time, since what the graph keeps
no longer fits the caches: 16 prompts of 15 tokens, all at once and two at a time, took 25 and 21 s of CPU time, and 2.7
and 0.4 GB, on the shape of mamba-130m."""


class Flowing(NamedTuple):
    """What a flow is asked for."""

    paths: tuple[str, ...] = ("both",)
    features: Features = "all"
    measure: str | Measure = MEASURE
    points: int = POINTS
    strongest: int = TOP
    top: int = 0
    """Edges of a fact that are cut, the strongest as attributed."""
    sample: int = 0
    """Edges of a fact that are cut beside them, drawn among all."""
    every: bool = False
    """Cut every edge."""
    seed: int = 0
    ablation: AskedAblation = AskedAblation()
    """What stands in the place of edges that are cut."""

    @classmethod
    def asked(
        cls,
        paths: Sequence[str] = ("both",),
        features: Features = "all",
        measure: str | Measure = MEASURE,
        points: int = POINTS,
        method: str = METHODS[0],
        certify: int = 0,
        sample: int = 0,
        seed: int = 0,
        ablation: AskedAblation = AskedAblation(),  # noqa: B008
    ) -> Flowing:
        """What is asked for, in the words of `Lens.flow`.

        Raises:
            MambalensError: for an unknown measure or method, numbers that are too small, and an ablation where nothing
                is cut.
        """
        if method not in METHODS:
            raise MambalensError(f"method={method!r} is not a method: {choose(method, METHODS)}.")
        for name, number, least in (("points", points, 1), ("certify", certify, 0), ("sample", sample, 0)):
            if number < least:
                raise MambalensError(f"{name}={number}: give {least} or more.")
        measure_of(measure)
        every = method == "exact"
        if ablation.name != ABLATION and not (certify or sample or every):
            raise MambalensError(
                f"ablation={ablation.name!r} is of edges that are cut, and none is: give certify=..., sample=... or "
                "method='exact', or certify the flow later."
            )
        return cls(
            tuple(paths), features, measure, points, top=certify, sample=sample, every=every, seed=seed,
            ablation=ablation,
        )  # fmt: skip

    @property
    def attributed(self) -> Flowing:
        """The same without a cut."""
        return self._replace(top=0, sample=0, every=False, ablation=AskedAblation())

    def check(self, hooks: HookManager) -> None:
        """See that a model has what is asked for.

        Raises:
            MambalensError: for an unknown path or group.
        """
        for path in self.paths:
            hooks.resolve(None, self.features, path)  # type: ignore[arg-type]

    @property
    def features_name(self) -> str:
        """What tables call the features."""
        return self.features if isinstance(self.features, str) else CHOSEN_FEATURES

    @property
    def measure_name(self) -> str:
        """What tables call the measure."""
        return name_of(self.measure)


class Listed(NamedTuple):
    """The edges of a prompt, one after another."""

    where: Int[np.ndarray, " edge"]
    """Number of the mixer and path."""
    source: Int[np.ndarray, " edge"]
    target: Int[np.ndarray, " edge"]


class Attributed(NamedTuple):
    """A prompt's edges, and its prediction."""

    listed: Listed
    effects: Float[np.ndarray, " edge"]
    measure: float
    prob: float


class FlowWork:
    """Everything a flow needs to compute a block, looked up and checked once."""

    def __init__(
        self,
        lens: LoadedModel,
        facts: Facts,
        flowing: Flowing,
        batch_size: int | None,
        memory: int | str | None,
        bar: Any,
    ) -> None:
        self.lens, self.flowing, self.bar = lens, flowing, bar
        self.measure = measure_of(flowing.measure)
        self.memory = budget(memory, lens.device)
        self.halving = Halving(lens.name, batch_size, bar)
        cutting = lens.hooks.resolve(None, flowing.features, "both")
        paths = functools.reduce(Paths.__or__, (lens.hooks.resolve(path=path).paths for path in flowing.paths))  # type: ignore[arg-type]
        self.features: Mapping[Mixer, Bool[Tensor, " feature"] | None] = cutting.features
        self.asked = Asked(self.features, paths, self.measure, flowing.points, flowing.strongest)
        self.where = [(mixer, path) for mixer in self.features for path in mixer.paths & paths]
        self.exact = ExactCuts(lens, self.memory, dict(self.features))
        prompts, self.unusable = read_facts(facts, lens.tokenizer, subject=False)
        if not prompts:
            raise none_usable(facts, self.unusable)
        self.prompts = {prompt.fact.id: prompt for prompt in prompts}
        self.ablation: Ablation | None = None
        if flowing.ablation.name != ABLATION:
            self.unusable += self._putting_in(flowing.ablation, facts)

    def put_in(self, asked: AskedAblation, facts: Facts) -> None:
        """Cut edges with something in the sources' place from here on.

        Facts that there is nothing for are left out, with a warning that has the reason.

        Args:
            asked: what.
            facts: the facts in question.
        """
        without = self._putting_in(asked, facts)
        if without:
            reasons = "; ".join(f"{skip.fact_id}: {skip.reason}" for skip in without[:3])
            warnings.warn(f"{len(without)} facts are left out ({reasons}).", stacklevel=4)

    def _putting_in(self, asked: AskedAblation, facts: Facts) -> list[Skip]:
        """Put something in from here on; the facts that there is nothing for, which are left out."""
        asked.check([Cutting({mixer: None}, path) for mixer, path in self.where])
        self.ablation, without = ablation_of(self.lens, asked, facts, list(self.prompts.values()))
        self.exact.ablation = self.ablation
        left_out = {skip.fact_id for skip in without}
        self.prompts = {name: prompt for name, prompt in self.prompts.items() if str(name) not in left_out}
        return without

    def edges(self, time: int) -> Listed:
        """The edges of a prompt of so many positions."""
        target, source = np.tril_indices(time, -1)
        where, sources, targets = [], [], []
        for number, (mixer, path) in enumerate(self.where):
            reach = mixer.reach(path)
            near = slice(None) if reach is None else target - source <= reach
            where.append(np.full(len(target[near]), number))
            sources.append(source[near])
            targets.append(target[near])
        return Listed(*(np.concatenate(part) for part in (where, sources, targets)))

    def edge(self, listed: Listed, number: int) -> Edge:
        """One of them."""
        mixer, path = self.where[listed.where[number]]
        return Edge(mixer, path, int(listed.source[number]), int(listed.target[number]))

    def size(self, facts: Facts) -> int:
        """How far the progress bar goes for some facts: prompts attributed, and edges cut."""
        return sum(self._steps(self.prompts[fact.id]) for fact in facts if fact.id in self.prompts)

    def cuts(self, facts: Facts) -> int:
        """How many edges are cut for some facts."""
        return self.size(facts) - sum(fact.id in self.prompts for fact in facts)

    def _steps(self, prompt: Prompt) -> int:
        count = len(self.edges(len(prompt.ids)).where)
        flowing = self.flowing
        return 1 + (count if flowing.every else min(count, flowing.top + flowing.sample))

    def block(self, facts: Facts) -> Part:
        """The table's rows for some facts, and what is left out of them."""
        import pandas as pd

        from mambalens.runs.folder import Part

        order = {fact.id: i for i, fact in enumerate(facts)}
        prompts = [self.prompts[fact.id] for fact in facts if fact.id in self.prompts]
        skipped = [skip for skip in self.unusable if skip.fact_id in order]
        found: dict[str | None, Attributed] = {}
        for batch in self.lens.batches(prompts, self.halving.batch_size, self._prompts_at_once):
            of_batch, _ = self.halving.run(self._attributed, batch)
            found |= {prompt.fact.id: of_prompt for prompt, of_prompt in of_batch}
        tables: list[pd.DataFrame] = []
        cuts = max((self._steps(prompt) - 1 for prompt in prompts), default=0)
        for batch in self.batches(prompts, cuts):
            of_tables, _ = self.halving.run(lambda batch: self._cut_and_told(batch, found), batch)
            tables += of_tables
        tables.sort(key=lambda table: order[table.fact_id.iloc[0]])
        table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(EDGES))
        return Part(table, pd.DataFrame(skipped, columns=list(Skip._fields)), self.exact.checks.told())

    def _prompts_at_once(self, time: int) -> int:
        """How many prompts of a length a pass with its graph may take."""
        lens = self.lens
        # About twelve tensors as wide as the layer's widest are kept of each; one layer's scan or heads beside them.
        of_graph = 12 * lens.n_layers * time * widest(lens.hooks.layers)
        of_one = max(
            time * mixer.n_features * time + 4 * mixer.kept_numbers(time, 1) * time for mixer in lens.hooks.mixers
        )
        fit = self.memory // SHARES // (4 * (of_graph + of_one))
        return max(1, min(fit, TOKENS // time) if lens.device.type == "cpu" else fit)

    def _attributed(self, batch: Batch) -> tuple[list[tuple[Prompt, Attributed]], list[Any]]:
        """What every prompt's edges are told by gradients."""
        found = attribute(self.lens, batch, self.asked)
        targets = batch.targets.to(found.logits.device)
        measure, prob = self.measure(found.logits, targets), target_probability(found.logits, targets)
        effects = torch.stack([found.effects[where].cpu() for where in self.where], 1).numpy()  # [B, where, T, S]
        told = []
        for i, prompt in enumerate(batch.prompts):
            listed = self.edges(len(prompt.ids))
            of_edges = effects[i][listed.where, listed.target, listed.source].astype(np.float64)
            told.append((prompt, Attributed(listed, of_edges, float(measure[i]), float(prob[i]))))
        self.bar.update(len(told))
        return told, []

    def _cut_and_told(
        self, batch: Batch, found: Mapping[str | None, Attributed]
    ) -> tuple[list[pd.DataFrame], list[Any]]:
        """The rows of every prompt, with those of its edges cut that are asked for."""
        of_prompts = [found[prompt.fact.id] for prompt in batch.prompts]
        chosen = [self._chosen(prompt, of.effects) for prompt, of in zip(batch.prompts, of_prompts, strict=True)]
        listed, base = [of.listed for of in of_prompts], [of.measure for of in of_prompts]
        cut = self.cut(batch, listed, [numbers for numbers, _ in chosen], base)
        tables = []
        for i, (prompt, of) in enumerate(zip(batch.prompts, of_prompts, strict=True)):
            exact, why = np.full(len(of.effects), np.nan), np.zeros(len(of.effects), np.int8)
            numbers, reasons = chosen[i]
            exact[numbers], why[numbers] = cut[i], reasons
            tables.append(self._table(prompt, of.listed, of.effects, exact, why, of.measure, of.prob))
        return tables, []

    def _chosen(
        self, prompt: Prompt, attributed: Float[np.ndarray, " edge"]
    ) -> tuple[Int[np.ndarray, " some"], Int[np.ndarray, " some"]]:
        """Which edges are cut, and why."""
        flowing = self.flowing
        if flowing.every:
            return np.arange(len(attributed)), np.full(len(attributed), CHOSEN.index("all"))
        return choose_edges(attributed, flowing.top, flowing.sample, str(prompt.fact.id), flowing.seed)

    def batches(self, prompts: Sequence[Prompt], cuts: int) -> Iterator[Batch]:
        """Prompts in batches that have room for so many cuts of each."""
        hooks = self.lens.hooks
        size = self.halving.batch_size
        return self.lens.batches(prompts, size, lambda time: prompts_at_once(hooks, time, cuts, self.memory))

    def cut(
        self,
        batch: Batch,
        listed: Sequence[Listed],
        numbers: Sequence[Int[np.ndarray, " _"]],
        base: Sequence[float],
    ) -> list[Float[np.ndarray, " _"]]:
        """What cutting some edges, each alone, changes of the measure, prompt by prompt.

        Args:
            batch: prompts.
            listed: their edges.
            numbers: of the edges to cut.
            base: the measure without a cut.
        """
        if not any(map(len, numbers)):
            return [np.zeros(0) for _ in numbers]
        cuts = [[[self.edge(of, int(n))] for n in some] for of, some in zip(listed, numbers, strict=True)]
        found = self.exact.scores(batch, cuts, self.measure, self.bar.update)
        return [value.double().cpu().numpy() - before for value, before in zip(found, base, strict=True)]

    def _table(
        self,
        prompt: Prompt,
        listed: Listed,
        attributed: Float[np.ndarray, " edge"],
        exact: Float[np.ndarray, " edge"],
        chosen: Int[np.ndarray, " edge"],
        measure: float,
        prob: float,
    ) -> pd.DataFrame:
        import pandas as pd

        pieces = list(PIECES)
        of = np.array([pieces.index(piece) for piece in piece_of(prompt)])
        layers = np.array([mixer.layer for mixer, _ in self.where])
        kinds = self.lens.hooks.kinds
        of_kind = np.array([kinds.index(mixer.kind) for mixer, _ in self.where])
        names = [str(path.name).lower() for path in (Paths.MAIN, Paths.CONV, Paths.ERASE)]
        of_path = np.array([names.index(str(path.name).lower()) for _, path in self.where])

        def category(codes: Any, values: Sequence[str]) -> Any:
            return pd.Categorical.from_codes(
                np.broadcast_to(codes, listed.where.shape).tolist(), pd.Index(list(values))
            )

        columns = {
            "fact_id": str(prompt.fact.id), "model": self.lens.name, "layer": layers[listed.where],
            "mixer": category(of_kind[listed.where], kinds), "path": category(of_path[listed.where], names),
            "source": listed.source, "target": listed.target,
            "source_piece": category(of[listed.source], pieces), "target_piece": category(of[listed.target], pieces),
            "features": category(0, [self.flowing.features_name]), "attributed": attributed, "exact": exact,
            "chosen": category(chosen, CHOSEN), "base_measure": measure, "base_prob": prob,
        }  # fmt: skip
        return pd.DataFrame(columns)[list(EDGES)]


def choose_edges(
    attributed: Float[np.ndarray, " edge"], top: int, sample: int, fact_id: str, seed: int
) -> tuple[Int[np.ndarray, " some"], Int[np.ndarray, " some"]]:
    """The strongest edges, and a random sample of all: a fact's is the same whatever else is asked.

    Returns:
        Numbers of the edges, and for each the number of the reason in `CHOSEN`. One that is both counts as strong.
    """
    strongest = np.argsort(-np.abs(attributed), kind="stable")[:top]
    draw = np.random.default_rng([seed, zlib.crc32(fact_id.encode())])
    drawn = draw.choice(len(attributed), min(sample, len(attributed)), replace=False)
    drawn = drawn[~np.isin(drawn, strongest)]
    numbers = np.concatenate([strongest, drawn])
    return numbers, np.concatenate([np.full(len(strongest), 1), np.full(len(drawn), 2)])


def batches_of_one(lens: LoadedModel, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Batch]]:
    """Prompts one by one, as batches."""
    for prompt in prompts:
        yield prompt, next(lens.batches([prompt]))
