"""What each feature of a model's token mixers does: how long it remembers, how much it carries between tokens."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.facts.prompts import Batch, none_usable, read_facts
from mambalens.facts.sequence import Facts
from mambalens.hooks import HookManager, Mixer, TokenMixing, group_mask
from mambalens.model import LoadedModel
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd


COLUMNS = ("model", "layer", "kind", "feature", "decay_norm", "group")
MEASURED = ("half_life", "exchange_share", "enrichment_share", "exchange_share_last", "enrichment_share_last")


def feature_table(
    lens: LoadedModel, facts: Facts | None = None, batch_size: int | None = None, progress: bool = True
) -> pd.DataFrame:
    """See `Lens.features`."""
    import pandas as pd

    measures = [_Measure(mixer) for mixer in lens.hooks.mixers]
    if facts is not None:
        prompts, skipped = read_facts(facts, lens.tokenizer, subject=False)
        if not prompts:
            raise none_usable(facts, skipped)
        by_mixer = dict(zip(lens.hooks.mixers, measures, strict=True))
        bar = tqdm(total=len(prompts), desc=f"features {lens.name}", unit="prompt", disable=not progress, leave=False)
        with bar:
            for batch in lens.batches(prompts, batch_size):
                _see(lens.hooks, batch, by_mixer)
                bar.update(len(batch.prompts))
    tables = []
    for mixer, measure in zip(lens.hooks.mixers, measures, strict=True):
        norm, group = _decays(mixer)
        measured = {"decay_norm": norm, "group": group} | ({} if facts is None else measure.columns())
        table = pd.DataFrame({"feature": range(mixer.n_features), **measured})
        tables.append(table.assign(model=lens.name, layer=mixer.layer, kind=mixer.kind))
    columns = [*COLUMNS, *([] if facts is None else MEASURED)]
    return pd.concat(tables, ignore_index=True)[columns]


def _see(hooks: HookManager, batch: Batch, measures: dict[Mixer, _Measure]) -> None:
    def see(mixer: Mixer, mixing: TokenMixing) -> None:
        measures[mixer].add(mixing, batch.last)

    hooks.watch(batch.ids.to(hooks.model.get_input_embeddings().weight.device), see)


def thirds(mixer: Mixer) -> dict[str, Bool[Tensor, " feature"]]:
    """Masks of a mixer's features by decay norm, those that are not empty; none where nothing decays."""
    if not mixer.decays:
        return {}
    norm = mixer.decay_norm().cpu()
    masks = {group: group_mask(norm, group) for group in ("slow", "middle", "fast")}
    return {group: mask for group, mask in masks.items() if mask.any()}


def _decays(mixer: Mixer) -> tuple[list[float], list[str]]:
    """Decay norm and third of every feature; NaN and '' where nothing decays."""
    if not mixer.decays:
        return [math.nan] * mixer.n_features, [""] * mixer.n_features
    masks = thirds(mixer)
    groups = [next(group for group, mask in masks.items() if mask[f]) for f in range(mixer.n_features)]
    return mixer.decay_norm().tolist(), groups


class _Measure:
    """Sums over prompts for one mixer, in float64."""

    def __init__(self, mixer: Mixer) -> None:
        self.squares: dict[str, Float[Tensor, " feature"]] = defaultdict(
            lambda: torch.zeros(mixer.n_features, dtype=torch.float64)
        )
        self.log_half_life = torch.zeros(mixer.n_features, dtype=torch.float64)
        self.writes = 0

    def add(self, mixing: TokenMixing, last: Int[Tensor, " batch"]) -> None:
        last = last.to(mixing.output.device)
        columns = torch.arange(mixing.output.shape[1], device=last.device)
        inside = (columns <= last[:, None])[..., None]  # [B, T, 1]
        at_last = (columns == last[:, None])[..., None]
        enrichment = mixing.enrichment
        parts = {"exchange": mixing.output - enrichment, "enrichment": enrichment, "whole": mixing.output}
        for name, part in parts.items():
            square = part.double().square().sum(-1)  # [B, T, F]
            self.squares[name] += (square * inside).sum((0, 1)).cpu()
            self.squares[f"{name}_last"] += (square * at_last).sum((0, 1)).cpu()
        half_life = mixing.half_life(last + 1).double().log()
        self.log_half_life += torch.where(inside, half_life, 0.0).sum((0, 1)).cpu()
        self.writes += int(inside.sum())

    def columns(self) -> dict[str, list[float]]:
        """The measures by name.

        Equation: Measures
            exchange share = sqrt(sum_t |exchange_t|^2 / sum_t |y_t|^2)
            enrichment share = sqrt(sum_t |enrichment_t|^2 / sum_t |y_t|^2)
            half-life of a feature = exp(mean_s log half-life_s)

            Source: this package

            Sums and means run over the positions of all prompts; in the columns `..._last`, over last tokens alone.
        """
        found = {"half_life": (self.log_half_life / self.writes).exp().tolist()}
        for part in ("exchange", "enrichment"):
            for where in ("", "_last"):
                share = (self.squares[part + where] / self.squares["whole" + where]).sqrt()
                found[f"{part}_share{where}"] = share.tolist()
        return found
