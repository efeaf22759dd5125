"""Features knocked out one by one: what each costs the prediction, held against how much it carries between tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from scipy import stats

from mambalens.defaults import ABLATION
from mambalens.facts.prompts import Skip, none_usable, read_facts
from mambalens.facts.roles import check_role
from mambalens.facts.sequence import Facts
from mambalens.features.measures import MEASURED, feature_table
from mambalens.hooks.errors import MambalensError, choose
from mambalens.hooks.knockout import Path, Paths
from mambalens.model import LoadedModel
from mambalens.runs.intervals import LEVEL, RESAMPLES
from mambalens.sweep.ablation import Asked as Ablating
from mambalens.sweep.ablation import ablation_of
from mambalens.sweep.answers import Answerer, Asked
from mambalens.sweep.prediction import change, target_probability
from mambalens.system.memory import budget
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd


class CausalData:
    """What knocking out single features, or blocks of them, costs.

    Attributes:
        table: one row a block: model, layer, kind, block, features (their numbers), n_features, decay_norm and what
            `Lens.features` measures (means over the block), drop_pct (mean over facts of 100 (base_prob - prob) /
            base_prob), low and high (95 % bootstrap interval over facts), ablation (what stood in their place).
        drops: drop_pct of every fact and block.
        skipped: facts that could not be used, with the reason.
        source, target: roles.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        drops: Float[np.ndarray, "fact block"],
        skipped: pd.DataFrame,
        source: str,
        target: str,
    ) -> None:
        self.table, self.drops, self.skipped, self.source, self.target = table, drops, skipped, source, target

    def __repr__(self) -> str:
        facts, blocks = self.drops.shape
        return f"<CausalFeatures: {self.source} → {self.target}; {blocks} blocks of features, {facts} facts>"

    def correlation(self, by: str = "exchange_share_last", seed: int = 0) -> pd.DataFrame:
        """Spearman's rank correlation between a measure of the features and what knocking them out costs.

        The interval is of the facts (percentiles of 2,000 resamples of them, seeded): of the features there are no more
        than were knocked out. The measure is not resampled.

        Args:
            by: a measure of `Lens.features`.
            seed: of the resamples.

        Returns:
            One row for 'all' layers together and one a layer: layer, n (blocks), rho, low, high; NaN where nothing
            varies.
        """
        import pandas as pd

        measures = ["decay_norm", *MEASURED]
        if by not in measures:
            raise MambalensError(f"by={by!r} is not a measure of features: {choose(by, measures)}.")
        resampled = self._resampled_means(seed)
        rows = []
        for layer in ["all", *self.table.layer.unique()]:
            inside = np.ones(len(self.table), bool) if layer == "all" else (self.table.layer == layer).to_numpy()
            inside = inside & self.table[by].notna().to_numpy()
            measure = self.table.loc[inside, by].to_numpy(float)
            rho = float(_rank_correlation(measure, self.drops[:, inside].mean(0, keepdims=True))[0])
            low = high = float("nan")
            if len(self.drops) > 1 and not np.isnan(rho):
                low, high = _interval(_rank_correlation(measure, resampled[:, inside]))
            rows.append((layer, int(inside.sum()), rho, float(low), float(high)))
        return pd.DataFrame(rows, columns=["layer", "n", "rho", "low", "high"])

    def _resampled_means(self, seed: int) -> Float[np.ndarray, "resample block"]:
        """Mean drop of every block in resamples of the facts."""
        facts = len(self.drops)
        counts = np.random.default_rng(seed).multinomial(facts, np.full(facts, 1 / facts), RESAMPLES)
        return counts @ self.drops / facts


def _rank_correlation(
    measure: Float[np.ndarray, " block"], effects: Float[np.ndarray, "row block"]
) -> Float[np.ndarray, " row"]:
    """Spearman's rho of a measure with each row of effects; NaN where one of them does not vary."""
    if measure.size < 2:
        return np.full(len(effects), np.nan)
    x, y = stats.rankdata(measure), stats.rankdata(effects, axis=1)
    x, y = x - x.mean(), y - y.mean(1, keepdims=True)
    norm = np.sqrt((x**2).sum() * (y**2).sum(1))
    return np.divide(y @ x, norm, out=np.full(len(effects), np.nan), where=norm > 0)


def _interval(values: Float[np.ndarray, " resample *rest"]) -> Float[np.ndarray, " 2 *rest"]:
    """Percentiles around the middle `LEVEL` along the first axis."""
    tail = 50 * (1 - LEVEL)
    return np.nanpercentile(values, [tail, 100 - tail], axis=0)


def causal_features(
    lens: LoadedModel,
    facts: Facts,
    source: str,
    target: str,
    layers: Sequence[int] | int | str | None,
    block: int,
    path: Path,
    batch_size: int | None,
    memory: int | str | None,
    progress: bool,
    put_in: Ablating,
) -> CausalData:
    """See `Lens.causal_features`."""
    import pandas as pd

    check_role(source), check_role(target)
    if source == "each" or target == "each":
        raise MambalensError("'each' is for heatmaps: name one role as the source and one as the target.")
    if block < 1:
        raise MambalensError(f"block={block}: give 1 or more features to knock out together.")
    # A path that these layers do not have is refused before any long work, and keys where there are none.
    put_in.check([lens.hooks.resolve(layers, "all", path)])
    if put_in.name != ABLATION:
        Paths.named(path).replaceable(path)
    having = [mixer for mixer in lens.hooks.mixers_of(layers) if Paths.named(path) & mixer.paths]
    chosen = {(mixer.layer, mixer.kind) for mixer in having}
    room = budget(memory, lens.device)
    prompts, skipped = read_facts(facts, lens.tokenizer)
    usable = []
    for prompt in prompts:
        positions = prompt.positions(target)
        empty = target if not positions else source if not prompt.positions(source, positions) else None
        if empty is None:
            usable.append(prompt)
        else:
            skipped.append(Skip(str(prompt.fact.id), "", f"the role {empty!r} is empty"))
    if not usable:
        raise none_usable(facts, skipped)
    ablation, without = ablation_of(lens, put_in, facts, usable)
    skipped += without
    left_out = {skip.fact_id for skip in without}
    usable = [prompt for prompt in usable if str(prompt.fact.id) not in left_out]
    measured = feature_table(lens, Facts([prompt.fact for prompt in usable]), batch_size, progress)
    table = _blocks(measured[[key in chosen for key in zip(measured.layer, measured.kind, strict=True)]], block)
    answerer = Answerer(lens, room, ablation=ablation)
    asked = [
        Asked(lens.hooks.resolve([layer], list(features), path, kind), 0)
        for layer, kind, features in zip(table.layer, table.kind, table.features, strict=True)
    ]
    order = {id(prompt): row for row, prompt in enumerate(usable)}
    drops = np.full((len(usable), len(table)), np.nan)
    bar = tqdm(total=drops.size, desc=f"knock out features of {lens.name}", unit="prompt", disable=not progress)
    with bar:
        for batch in lens.batches(usable, batch_size, functools.partial(answerer.prompts_at_once, [source])):
            targets = [prompt.positions(target) for prompt in batch.prompts]
            sources = [p.positions(source, t) for p, t in zip(batch.prompts, targets, strict=True)]
            rows = [order[id(prompt)] for prompt in batch.prompts]
            answers = answerer.answers(batch, asked, [sources], targets)
            base = target_probability(next(answers)[1], batch.targets)
            for number, logits in answers:
                drop = -change(base, target_probability(logits, batch.targets))
                drops[rows, number] = drop.cpu().numpy()
                bar.update(len(rows))
    result = CausalData(table, drops, pd.DataFrame(skipped, columns=list(Skip._fields)), source, target)
    table["drop_pct"] = drops.mean(0)
    table["low"], table["high"] = _interval(result._resampled_means(0)) if len(usable) > 1 else (np.nan, np.nan)
    table["ablation"] = put_in.label
    return result


def _blocks(measured: pd.DataFrame, size: int) -> pd.DataFrame:
    """Blocks of a layer's features that carry about the same share between tokens, the largest share first."""
    import pandas as pd

    rows = []
    for (layer, _), of_mixer in measured.groupby(["layer", "kind"], sort=False):
        of_layer = of_mixer.sort_values("exchange_share_last", ascending=False, kind="stable")
        for number, begin in enumerate(range(0, len(of_layer), size)):
            part = of_layer.iloc[begin : begin + size]
            means = {name: part[name].mean() for name in ("decay_norm", *MEASURED)}
            rows.append(
                {"model": part.model.iloc[0], "layer": layer, "kind": part.kind.iloc[0], "block": number,
                 "features": tuple(part.feature), "n_features": len(part), **means}
            )  # fmt: skip
    return pd.DataFrame(rows)
