"""Steering with facts: directions between two sets of prompts, and what facts are answered with when one is added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.evaluation import FactLike
from mambalens.facts.fact import Fact
from mambalens.facts.files import as_facts
from mambalens.facts.pairs import Pairs
from mambalens.facts.prompts import Batch, Prompt, Skip, none_usable, read_fact, read_facts
from mambalens.facts.roles import check_role
from mambalens.hooks.behind import hidden_of
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.steering import Addition
from mambalens.model import LoadedModel
from mambalens.sweep.prediction import Prediction, kl_divergence
from mambalens.system.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd

STEERED = (
    "fact_id", "model", "target", "base_prob", "prob", "base_top_token", "top_token", "changed", "base_hit", "hit",
    "kl",
)  # fmt: skip
"""Columns of what facts are answered with. Probabilities are those of the target's first token, `hit` whether it is the
top one, `changed` whether another token is on top than without the vector, `kl` KL(base || steered) in nats."""
OTHERS = ("other_target", "base_other_prob", "other_prob", "base_other_hit", "other_hit")
"""Columns that pairs have beside them: the same of the other fact's answer."""
SUBJECT_ROLES = ("subject", "subject_first", "subject_last", "context")
"""Roles that a prompt without a subject does not have."""


def positions_of(prompt: Prompt, role: str) -> list[int]:
    """Positions of a role.

    Raises:
        MambalensError: where the prompt has none.
    """
    if check_role(role) == "each":
        raise MambalensError("positions='each': 'each' is for sources of a sweep; give a role such as 'last' or 'all'.")
    found = prompt.positions(role)
    if not found or (role in SUBJECT_ROLES and not prompt.spans):
        raise MambalensError(f"The role {role!r} is empty in the prompt {prompt.fact.prompt!r}.")
    return found


@contextmanager
def steer(
    model: LoadedModel,
    fact: Fact,
    vector: Float[Tensor, "*rows hidden"],
    layers: Sequence[int] | int | str | None,
    positions: str | None,
    scale: float,
) -> Iterator[Addition]:
    """See `Lens.steer`."""
    at = None if positions is None else positions_of(model.prompt(fact), positions)
    with model.hooks.add(vector, layers, at, scale) as addition:
        yield addition


@torch.no_grad()
def direction(
    model: LoadedModel,
    positive: Iterable[Fact | str],
    negative: Iterable[Fact | str],
    layer: int | Sequence[int],
    positions: str,
    batch_size: int | None,
) -> Float[Tensor, " *layers hidden"]:
    """The direction from the one set of prompts to the other; see `Lens.direction`.

    Equation: Steering
        v^l = mean over positive prompts of h^l_t - mean over negative prompts of h^l_t

        Source: Rimsky et al. 2024, arXiv:2312.06681

        h^l_t is the residual stream behind layer l at position t; of a role with several positions, their mean.
    """
    layers = model.hooks.layer_numbers([layer] if isinstance(layer, int) else layer)
    means = [_mean_residual(model, prompts, layers, positions, batch_size) for prompts in (positive, negative)]
    found = means[0] - means[1]
    return found[0] if isinstance(layer, int) else found


def _mean_residual(
    model: LoadedModel, asked: Iterable[Fact | str], layers: list[int], role: str, batch_size: int | None
) -> Float[Tensor, "layer hidden"]:
    """The mean over prompts of the residual stream behind some layers, in float64."""
    given = [asked] if isinstance(asked, Fact | str) else list(asked)
    if not given:
        raise MambalensError("There is no prompt to take a direction from: give facts or texts.")
    prompts = [read_fact(_as_fact(one), model.tokenizer) for one in given]
    where = {id(prompt): positions_of(prompt, role) for prompt in prompts}
    totals: dict[int, Tensor] = {}
    for batch in model.batches(prompts, batch_size):
        mask = batch.mask([where[id(prompt)] for prompt in batch.prompts]).double()
        weights = mask / mask.sum(1, keepdim=True)  # [B, T]
        with _reading(model, layers) as seen:
            model.last_logits(batch)
        for layer, hidden in seen.items():
            mean = torch.einsum("bt,btw->w", weights.to(hidden.device), hidden.double()).cpu()
            totals[layer] = totals[layer] + mean if layer in totals else mean
    return torch.stack([totals[layer] for layer in layers]) / len(prompts)


def _as_fact(asked: Fact | str) -> Fact:
    """A text as a fact without a subject; the target is not looked at."""
    return asked if isinstance(asked, Fact) else Fact(asked, subject="", target=asked[-1:] or ".")


@contextmanager
def _reading(model: LoadedModel, layers: Iterable[int]) -> Iterator[dict[int, Float[Tensor, "batch time hidden"]]]:
    """While the block runs, what is behind some layers in the last pass, with what running blocks add to it."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[layer] = hidden_of(output)

        return hook

    handles = [model.hooks.layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def steered(
    model: LoadedModel,
    facts: FactLike | Pairs,
    vector: Float[Tensor, "*rows hidden"],
    layers: Sequence[int] | int | str | None,
    positions: str | None,
    scale: float,
    batch_size: int | None,
    progress: bool,
) -> pd.DataFrame:
    """See `Lens.steered`."""
    import pandas as pd

    asked = as_facts(facts.facts if isinstance(facts, Pairs) else facts)
    other_facts = [pair.other for pair in facts] if isinstance(facts, Pairs) else []
    others = {fact.id: other for fact, other in zip(asked, other_facts, strict=False)}
    prompts, skipped = read_facts(asked, model.tokenizer, subject=positions in SUBJECT_ROLES)
    where: dict[str | None, list[int]] = {}
    for prompt in prompts:
        try:
            where[prompt.fact.id] = [] if positions is None else positions_of(prompt, positions)
        except MambalensError as error:
            skipped.append(Skip(str(prompt.fact.id), "", str(error)))
    prompts = [prompt for prompt in prompts if prompt.fact.id in where]
    if not prompts:
        raise none_usable(asked, skipped)
    rows: dict[str | None, dict[str, Any]] = {}
    bar = tqdm(total=len(prompts), desc=f"steer {model.name}", unit="fact", disable=not progress, leave=False)
    with bar:
        for batch in model.batches(prompts, batch_size):
            at = None if positions is None else batch.mask([where[prompt.fact.id] for prompt in batch.prompts])
            before = model.last_logits(batch)
            with model.hooks.add(vector, layers, at, scale):
                after = model.last_logits(batch)
            for row in _rows(model, batch, before, after, others):
                rows[row["fact_id"]] = row
            bar.update(len(batch.prompts))
    columns = [*STEERED, *(OTHERS if others else ()), "skipped"]
    reasons = {skip.fact_id: {"model": model.name, "skipped": skip.reason} for skip in skipped}
    of_fact = [{"fact_id": fact.id, "target": fact.target} for fact in asked]
    found = [of | (rows.get(of["fact_id"]) or reasons[str(of["fact_id"])]) for of in of_fact]
    return pd.DataFrame(found, columns=columns)


def _rows(
    model: LoadedModel,
    batch: Batch,
    before: Float[Tensor, "batch vocabulary"],
    after: Float[Tensor, "batch vocabulary"],
    others: dict[str | None, Fact],
) -> Iterator[dict[str, Any]]:
    """A row of the table for every prompt of a batch."""
    base, now = Prediction.of(before, batch.targets), Prediction.of(after, batch.targets)
    kl = kl_divergence(base.log_probs, now.log_probs)
    for i, prompt in enumerate(batch.prompts):
        tops = int(base.top[i]), int(now.top[i])
        row = {
            "fact_id": prompt.fact.id, "model": model.name, "target": prompt.fact.target,
            "base_prob": float(base.prob[i]), "prob": float(now.prob[i]),
            "base_top_token": model.tokenizer.decode([tops[0]]), "top_token": model.tokenizer.decode([tops[1]]),
            "changed": tops[0] != tops[1], "base_hit": tops[0] == prompt.target_id, "hit": tops[1] == prompt.target_id,
            "kl": float(kl[i]), "skipped": "",
        }  # fmt: skip
        other = others.get(prompt.fact.id)
        if other is not None:
            # Its answer, behind this prompt.
            token = read_fact(
                Fact(prompt.fact.prompt, prompt.fact.subject, other.continuation), model.tokenizer
            ).target_id
            row |= {
                "other_target": other.target, "base_other_prob": float(base.log_probs[i, token].exp()),
                "other_prob": float(now.log_probs[i, token].exp()), "base_other_hit": tops[0] == token,
                "other_hit": tops[1] == token,
            }  # fmt: skip
        yield row
