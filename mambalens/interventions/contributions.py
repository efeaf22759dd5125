"""An answer's score split into what every part of the model adds to it: exact contributions, which add up.

What is behind the layers reads one residual stream, to which the embedding and every layer's sublayers have added. A
contribution is what one of these additions has along the direction that makes the answer (see `ray.ray`): its direct
effect, with what later layers do with it left to their own contributions. Mixers are split further, by source position
and path (see `hooks.summands`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.defaults import CELL_BLOCK
from mambalens.facts.pieces import piece_of
from mambalens.facts.prompts import Batch, Prompt, read_fact
from mambalens.facts.sequence import Facts
from mambalens.hooks.behind import beside_of, hidden_of, logits_behind
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.layer_parts import Parts, parts_of
from mambalens.hooks.summands import Summands
from mambalens.interventions.contribution_data import COLUMNS, ContributionData
from mambalens.interventions.ray import Ray, Score, ray
from mambalens.interventions.reading import ReadingWork
from mambalens.interventions.run import check_kept, configuration, found_or_kept
from mambalens.measures import PAIRED, Measure, logit, measure_of, name_of
from mambalens.model import LoadedModel
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd

NOWHERE = -1
"""Source of what comes from no position, and feature of what is not split by features."""

ROUNDING = 1e-5
"""Relative size up to which what a layer does to the residual stream itself is rounding."""


class Asked(NamedTuple):
    """What contributions are asked for."""

    measure: str | Measure
    against: tuple[str, ...]
    """Other answers, one for all facts or one for each; none: the mean of all tokens."""
    features: bool
    """Whether mixers are split by feature too."""

    @classmethod
    def of(cls, measure: str | Measure, against: str | Sequence[str] | None, features: bool, facts: Facts) -> Asked:
        """What was said, checked.

        Raises:
            MambalensError: for a measure that there is not, or other answers that fit neither it nor the facts.
        """
        others = () if against is None else (against,) if isinstance(against, str) else tuple(against)
        if measure != PAIRED:
            measure_of(measure, (PAIRED,))
        if others and measure not in ("log_odds", PAIRED):
            raise MambalensError(
                f"against={against!r} asks for the {PAIRED!r} of two answers, and measure={name_of(measure)!r} is of "
                "one: leave out either."
            )
        if len(others) > 1 and len(others) != len(facts):
            raise MambalensError(
                f"against has {len(others)} answers for {len(facts)} facts: give one, or one for each."
            )
        return cls(PAIRED if others else measure, others, features)

    def score(self, target: int, other: int | None) -> Score:
        """The score of an answer, and of another one to hold it against."""

        def scored(logits: Float[Tensor, "row vocabulary"]) -> Float[Tensor, " row"]:
            targets = torch.full((len(logits),), target, device=logits.device)
            if self.measure != PAIRED:
                return measure_of(self.measure)(logits, targets)
            against = logits.mean(-1) if other is None else logits[:, other]
            return logit(logits, targets) - against

        return scored


def contributions(
    lens: LoadedModel,
    facts: Facts,
    measure: str | Measure = "log_odds",
    against: str | Sequence[str] | None = None,
    features: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
    out: str | Path | None = None,
    block_size: int = CELL_BLOCK,
) -> ContributionData:
    """See `Lens.contributions`."""
    asked = Asked.of(measure, against, features, facts)
    check_kept(out, asked.measure)
    with tqdm(desc=f"contributions {lens.name}", unit="fact", disable=not progress) as bar:
        work = ContributionWork(lens, facts, asked, batch_size, bar)
        config = configuration(lens, facts, (), asked.measure)
        size = max(1, len(facts)) if out is None else block_size
        return cast(ContributionData, found_or_kept(work, facts, config, ContributionData, out, size))


class ContributionWork(ReadingWork):
    """Contributions of blocks of facts; every row has its fact's score beside it."""

    columns = (*COLUMNS, "score")

    def __init__(self, lens: LoadedModel, facts: Facts, asked: Asked, batch_size: int | None, bar: Any) -> None:
        super().__init__(lens, facts, batch_size, bar)
        self.asked = asked
        self.others = _others(lens, facts, self.prompts, asked.against)

    def definition(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as JSON, but for the block's size."""
        asked = self.asked
        of_asked = {"measure": name_of(asked.measure), "against": list(asked.against), "features": asked.features}
        return of_asked | super().definition()

    def tables(self, batch: Batch) -> list[pd.DataFrame]:
        """A table for each prompt of a batch."""
        lens, asked = self.lens, self.asked
        with _evaluating(lens):
            ids, at = batch.ids.to(lens.device), batch.last.to(lens.device)
            streams, beside = streams_behind(lens, ids, at)

            def head(rows: Float[Tensor, "row 1 hidden"]) -> Float[Tensor, "row vocabulary"]:
                with lens.hooks.aside():
                    return logits_behind(lens.model, lens.hooks.layers, beside, rows)

            found: list[Ray] = []
            for prompt, stream in zip(batch.prompts, streams, strict=True):
                found.append(ray(head, stream, asked.score(prompt.target_id, self.others[str(prompt.fact.id)])))
                self.bar.update(1)
            parts = parts_of(lens.hooks, ids, at, torch.stack([of.direction for of in found]))
            tables = _tables(lens, batch, found, parts, asked.features)
        return [table.assign(score=of.score) for table, of in zip(tables, found, strict=True)]


@torch.no_grad()
def streams_behind(
    lens: LoadedModel, ids: Int[Tensor, "batch time"], at: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch hidden"], list[tuple[Any, ...] | None]]:
    """The residual stream behind the layers at one position of every prompt, and what layers return beside theirs."""
    beside: list[tuple[Any, ...] | None] = []
    streams: list[Tensor] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        beside.append(beside_of(output))
        if len(beside) == lens.n_layers:
            hidden = hidden_of(output)
            rows = torch.arange(len(at), device=hidden.device)
            streams.append(hidden[rows, at.to(hidden.device)])

    with ExitStack() as stack:
        for mixer in lens.hooks.mixers:
            stack.enter_context(mixer.probing())  # attention computes openly, as where parts are taken
        for layer in lens.hooks.layers:
            stack.callback(layer.register_forward_hook(watch).remove)
        lens.hooks.trunk(input_ids=ids, use_cache=False)
    return streams[0], beside


def _others(
    lens: LoadedModel, facts: Facts, prompts: Sequence[Prompt], against: Sequence[str]
) -> dict[str, int | None]:
    """First tokens of the other answers, by fact; None: the mean of all tokens."""
    if not against:
        return {str(prompt.fact.id): None for prompt in prompts}
    each = list(against) * len(facts) if len(against) == 1 else list(against)
    answers = {str(fact.id): answer for fact, answer in zip(facts, each, strict=True)}
    asked = {str(p.fact.id): replace(p.fact, target=answers[str(p.fact.id)]) for p in prompts}
    return {fact_id: read_fact(fact, lens.tokenizer).target_id for fact_id, fact in asked.items()}


@contextmanager
def _evaluating(lens: LoadedModel) -> Iterator[None]:
    """While the block runs, nothing drops out."""
    training = [module for module in lens.model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _Rows:
    """Rows of one fact's table, column by column."""

    def __init__(self, tokens: Sequence[str], pieces: Sequence[str]) -> None:
        self.names = np.array([*tokens, ""], dtype=object)  # NOWHERE is the last
        self.pieces = np.array([*pieces, ""], dtype=object)
        self.parts: list[dict[str, Any]] = []

    def add(
        self,
        layer: int,
        part: str,
        values: Float[np.ndarray, " row"],
        kind: str = "",
        path: str = "",
        source: Int[np.ndarray, " row"] | int = NOWHERE,
        feature: Int[np.ndarray, " row"] | int = NOWHERE,
    ) -> None:
        """Rows of one part."""
        n = len(values)
        source = np.broadcast_to(np.asarray(source), (n,))
        self.parts.append({
            "layer": np.full(n, layer), "part": [part] * n, "kind": [kind] * n, "path": [path] * n, "source": source,
            "token": self.names[source], "piece": self.pieces[source],
            "feature": np.broadcast_to(np.asarray(feature), (n,)), "contribution": values,
        })  # fmt: skip

    def table(self, model: str, fact_id: str) -> pd.DataFrame:
        """All of them."""
        import pandas as pd

        columns = {
            name: np.concatenate([np.asarray(of[name], dtype=_DTYPES.get(name, object)) for of in self.parts])
            for name in COLUMNS
            if name not in ("model", "fact_id")
        }
        return pd.DataFrame({"model": model, "fact_id": fact_id} | columns)[list(COLUMNS)]


_DTYPES: dict[str, Any] = {"layer": int, "source": int, "feature": int, "contribution": float}


def _tables(lens: LoadedModel, batch: Batch, rays: Sequence[Ray], parts: Parts, features: bool) -> list[pd.DataFrame]:
    """A table for each prompt of a batch."""
    found = []
    for row, (prompt, of) in enumerate(zip(batch.prompts, rays, strict=True)):
        last = len(prompt.ids) - 1

        def one(values: Tensor, row: int = row) -> Float[np.ndarray, " row"]:
            return values[row : row + 1].double().cpu().numpy()

        rows = _Rows(prompt.tokens, piece_of(prompt))
        rows.add(-1, "embedding", one(parts.embedding), source=last)
        total = float(parts.embedding[row])
        for number, layer in enumerate(parts.layers):
            for part in layer.sublayers:
                total += float(part.total[row])
                if part.summands is None:
                    rows.add(number, part.sublayer.part, one(part.total))
                else:
                    assert part.sublayer.mixer is not None
                    _add_mixer(rows, number, part.sublayer.mixer.kind, part.summands, row, last, features)
            size = sum(float(part.total[row].abs()) for part in layer.sublayers) + abs(float(parts.embedding[row]))
            rest = one(layer.rest)
            if abs(rest[0]) > ROUNDING * size:
                total += float(rest[0])
                rows.add(number, "rest", rest)
            if layer.added is not None:
                total += float(layer.added[row])
                rows.add(number, "added", one(layer.added))
        # Exactly what is left: the score of no residual stream, and what rounding has lost in the layers.
        rows.add(lens.n_layers, "bias", np.array([of.score - total]))
        found.append(rows.table(lens.name, str(prompt.fact.id)))
    return found


def _add_mixer(rows: _Rows, layer: int, kind: str, summands: Summands, row: int, last: int, features: bool) -> None:
    """Rows of a mixer: its sources, what its position adds of itself, its biases."""
    path = summands.path.names[0]
    sources = summands.sources[row, : last + 1].double().cpu().numpy()  # [T, F]
    place = np.arange(last + 1)
    ways: list[tuple[str, Float[np.ndarray, "place feature"], Int[np.ndarray, " place"]]] = [(path, sources, place)]
    if summands.skip is not None:
        ways.append(("skip", summands.skip[row : row + 1].double().cpu().numpy(), place[-1:]))
    for name, values, at in ways:
        if features:
            feature = np.tile(np.arange(values.shape[1]), len(at))
            rows.add(layer, "mixer", values.ravel(), kind, name, np.repeat(at, values.shape[1]), feature)
        else:
            rows.add(layer, "mixer", values.sum(1), kind, name, at)
    rows.add(layer, "mixer", summands.constant[row : row + 1].double().cpu().numpy(), kind, "bias")
