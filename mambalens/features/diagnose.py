"""Operator diagnostics of a model's layers over many prompts (`mambalens.features.operators`), as one tidy table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambalens.facts.prompts import Prompt, none_usable, read_facts
from mambalens.facts.sequence import Facts
from mambalens.features import operators
from mambalens.features.measures import thirds
from mambalens.hooks import Mixer, TokenMixing
from mambalens.model import LoadedModel
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd


COLUMNS = ("model", "layer", "n_layers", "kind", "group", "diagnostic", "lag", "value", "n_features", "n_prompts")
SEQUENCES, LENGTH = 4, 25
"""Random sequences for the induction score, and tokens of each before it is repeated."""
_OF_PROMPTS: dict[str, Callable[..., Float[Tensor, "batch feature"]]] = {
    "sink_share": operators.sink_share,
    "effective_rank": operators.effective_rank,
    "mean_distance": operators.mean_distance,
}


def diagnose(lens: LoadedModel, facts: Facts, batch_size: int | None, progress: bool, seed: int) -> pd.DataFrame:
    """See `Lens.diagnose`."""
    import pandas as pd

    prompts, skipped = read_facts(facts, lens.tokenizer, subject=False)
    if not prompts:
        raise none_usable(facts, skipped)
    longest = max(len(prompt.ids) for prompt in prompts)
    measures = {mixer: _Diagnosis(mixer, longest) for mixer in lens.hooks.mixers}
    by_length: dict[int, list[Prompt]] = defaultdict(list)  # so that no operator has columns of padding
    for prompt in prompts:
        by_length[len(prompt.ids)].append(prompt)
    bar = tqdm(total=len(prompts), desc=f"diagnose {lens.name}", unit="prompt", disable=not progress, leave=False)
    with bar:
        for same in by_length.values():
            for batch in lens.batches(same, batch_size):
                lens.hooks.watch(batch.ids.to(lens.device), lambda mixer, mixing: measures[mixer].add(mixing))
                bar.update(len(batch.prompts))
    lens.hooks.watch(
        repeated_tokens(lens.tokenizer, seed).to(lens.device),
        lambda mixer, mixing: measures[mixer].add_induction(mixing),
    )
    rows = [row for mixer, measure in measures.items() for row in measure.rows(lens.name, lens.n_layers, len(prompts))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def repeated_tokens(tokenizer: Any, seed: int) -> Int[Tensor, "sequence time"]:
    """Random tokens, each sequence twice in a row; no token twice in a sequence."""
    special = set(tokenizer.all_special_ids)
    usable = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    length = min(LENGTH, len(usable))
    picked = torch.stack([usable[torch.randperm(len(usable), generator=generator)[:length]] for _ in range(SEQUENCES)])
    return torch.cat([picked, picked], 1)


class _Diagnosis:
    """Sums over prompts for one mixer."""

    def __init__(self, mixer: Mixer, longest: int) -> None:
        self.mixer, count = mixer, mixer.n_features
        self.sums: dict[str, Float[Tensor, " feature"]] = defaultdict(lambda: torch.zeros(count, dtype=torch.float64))
        self.counts: dict[str, Float[Tensor, " feature"]] = defaultdict(lambda: torch.zeros(count, dtype=torch.float64))
        self.dependence = operators.PositionDependence(count, longest)

    def add(self, mixing: TokenMixing) -> None:
        for now, alpha in mixing.chunks(torch.arange(mixing.n_features)):
            values = {name: measure(alpha) for name, measure in _OF_PROMPTS.items()}
            profile = operators.in_bins(operators.recency_profile(alpha))
            values |= {f"recency {lag}": share for lag, share in profile.items()}
            for name, value in values.items():
                self._count(name, value, now)
            for of_prompt in alpha:
                self.dependence.add(of_prompt, now)

    def add_induction(self, mixing: TokenMixing) -> None:
        for now, alpha in mixing.chunks(torch.arange(mixing.n_features)):
            self._count("induction_score", operators.induction_score(alpha), now)

    def _count(self, name: str, value: Float[Tensor, "batch some"], features: slice) -> None:
        """Add values where there are any."""
        value = value.double().cpu()
        self.sums[name][features] += value.nan_to_num(0.0).sum(0)
        self.counts[name][features] += (~value.isnan()).sum(0)

    def rows(self, model: str, n_layers: int, prompts: int) -> list[tuple[Any, ...]]:
        features = {name: total / self.counts[name] for name, total in self.sums.items()}
        features["position_dependence"] = self.dependence.value()
        lags = self.dependence.lags()
        found = []
        groups = {"all": torch.ones(self.mixer.n_features, dtype=torch.bool)} | thirds(self.mixer)
        for group, mask in groups.items():
            values = {name: float(value[mask].nanmean()) for name, value in features.items()}
            values["interaction_rank"] = float(operators.interaction_rank(lags[mask]))
            count = int(mask.sum())
            for name, value in values.items():
                diagnostic, _, lag = name.partition(" ")
                label = (model, self.mixer.layer, n_layers, self.mixer.kind, group, diagnostic, lag)
                found.append((*label, value, count, SEQUENCES if diagnostic == "induction_score" else prompts))
        return found
