"""What a model answers: predictions, accuracy, and the facts it knows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mambalens.facts.fact import Answered, Fact
from mambalens.facts.files import as_facts
from mambalens.facts.prompts import Prompt, read_facts, whole_target
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.html.render import render
from mambalens.model import LoadedModel
from mambalens.sweep.prediction import Prediction
from mambalens.system.progress import tqdm

LOGIT_TOKENS = 512
"""Tokens of a batch whose logits are wanted at every position: 0.3 GB for a vocabulary of 150,000."""

FactLike = Fact | Iterable[Fact] | str | Path


class NextTokens(pd.DataFrame):
    """The most probable next tokens, as a table that shows the prompt too; see `Lens.predict`."""

    _metadata = ["fact", "scored"]  # noqa: RUF012 (how pandas wants it)
    fact: Fact
    scored: int
    """Id of the target's first token; -1 for a text without a target."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame  # a part of it is a plain table

    def _repr_html_(self) -> str:
        rows = list(zip(self["token"], self["prob"], self["token_id"] == self.scored, strict=True))
        facts = [self.fact.shown] if self.fact.subject else []
        return render("predictions.html", facts=facts, text=self.fact.prompt, rows=rows)


def predict(model: LoadedModel, fact: Fact | str, k: int = 5) -> pd.DataFrame:
    """See `Lens.predict`."""
    asked = isinstance(fact, Fact)
    if isinstance(fact, str):
        fact = Fact(fact, subject="", target=fact[-1:] or ".")
    (batch,) = model.batches([model.prompt(fact)])
    top = model.last_logits(batch)[0].softmax(-1).topk(k)
    tokens = [model.tokenizer.decode([i]) for i in top.indices.tolist()]
    found = NextTokens({"token": tokens, "prob": top.values.tolist(), "token_id": top.indices.tolist()})
    found.fact, found.scored = fact, batch.prompts[0].target_id if asked else -1
    return found


def evaluate(
    model: LoadedModel,
    facts: FactLike,
    batch_size: int | None = None,
    progress: bool = True,
    whole_target: bool = False,
) -> pd.DataFrame:
    """See `Lens.evaluate`."""
    facts = as_facts(facts)
    prompts, skipped = read_facts(facts, model.tokenizer)
    found: dict[str, dict[str, Any]] = {skip.fact_id: {"skipped": skip.reason} for skip in skipped}
    bar = tqdm(total=len(prompts), desc=f"evaluate {model.name}", unit="fact", disable=not progress, leave=False)
    with bar:
        for batch in model.batches(prompts, batch_size):
            answer = Prediction.of(model.last_logits(batch), batch.targets)
            for row, prompt in enumerate(batch.prompts):
                top = int(answer.top[row])
                found[str(prompt.fact.id)] = {
                    "target_prob": float(answer.prob[row]),
                    "target_rank": int(answer.rank[row]),
                    "correct": top == prompt.target_id,
                    "top_token": model.tokenizer.decode([top]),
                    "top_prob": float(answer.log_probs[row, top].exp()),
                    "skipped": "",
                }
            bar.update(len(batch.prompts))
    empty = {"target_prob": float("nan"), "target_rank": 0, "correct": False, "top_token": "",
             "top_prob": float("nan"), "skipped": ""}  # fmt: skip
    rows = [
        {"fact_id": fact.id, "relation": fact.relation, "target": fact.target, **empty, **found[str(fact.id)]}
        for fact in facts
    ]
    table = pd.DataFrame(rows, columns=["fact_id", "relation", "target", *empty])
    if whole_target:
        whole = whole_targets(model, prompts, batch_size)
        table["target_tokens"] = [whole.get(fact.id, (0, 0.0))[0] for fact in facts]
        table["target_log_prob"] = [whole.get(fact.id, (0, float("nan")))[1] for fact in facts]
    return table


@torch.no_grad()
def whole_targets(
    model: LoadedModel, prompts: Sequence[Prompt], batch_size: int | None
) -> dict[str | None, tuple[int, float]]:
    """Tokens of every target, and the sum of their log-probabilities, by fact."""
    found = {}
    longer = [whole_target(prompt, model.tokenizer) for prompt in prompts]
    starts = {id(prompt): len(short.ids) for short, prompt in zip(prompts, longer, strict=True)}
    for batch in model.batches(longer, batch_size, lambda length: max(1, LOGIT_TOKENS // length)):
        logits = model.model(input_ids=batch.ids.to(model.device), use_cache=False).logits
        for row, prompt in enumerate(batch.prompts):
            at = torch.arange(starts[id(prompt)], len(prompt.ids))
            log_probs = logits[row, at - 1].double().log_softmax(-1).cpu()
            total = log_probs.gather(1, batch.ids[row, at][:, None]).sum()
            found[prompt.fact.id] = (len(at), float(total))
    return found


def accuracy(evaluated: pd.DataFrame) -> pd.DataFrame:
    """See `Lens.accuracy`."""
    table = evaluated.fillna({"relation": "(none)"})
    rows = []
    for relation, part in [*table.groupby("relation"), ("all", table)]:
        usable = part[part.skipped == ""]
        means = (float(usable.correct.mean()), float(usable.target_prob.mean()))
        rows.append((relation, len(usable), *means, len(part) - len(usable)))
    return pd.DataFrame(rows, columns=["relation", "facts", "accuracy", "target_prob", "skipped"])


def accuracy_of_models(evaluated: pd.DataFrame) -> pd.DataFrame:
    """Share of facts that are answered right, by relation, models side by side.

    Args:
        evaluated: tables of `evaluate` of several models, with the name in the column `model`.

    Returns:
        One row a relation that has usable facts, and 'all' at the end; facts (those that some model can be asked), and
        a column for each model, by name.
    """
    usable = evaluated[evaluated.skipped == ""]
    facts = accuracy(usable.drop_duplicates("fact_id")).set_index("relation").facts
    shares = {model: accuracy(part).set_index("relation").accuracy for model, part in usable.groupby("model")}
    table = pd.DataFrame(shares, index=facts.index).rename_axis(columns="model")
    table.insert(0, "facts", facts)
    return table


def with_short_subjects(model: LoadedModel, facts: FactLike, tokens: int = 1) -> Facts:
    """The facts whose subject is at most so many tokens of this model's tokenizer."""
    facts = as_facts(facts)
    prompts, _ = read_facts(facts, model.tokenizer)
    short = {prompt.fact.id for prompt in prompts if len(prompt.positions("subject")) <= tokens}
    return facts.pick(i for i, fact in enumerate(facts) if fact.id in short)


def known(
    model: LoadedModel,
    facts: FactLike,
    batch_size: int | None = None,
    progress: bool = True,
    limit: int | None = None,
    seed: int = 0,
) -> Facts:
    """See `Lens.known`."""
    if limit is not None and limit < 1:
        raise MambalensError(f"limit={limit} leaves no fact: give 1 or more, or None for all that the model knows.")
    facts = as_facts(facts)
    order = list(range(len(facts)))
    if limit is not None:
        order = random.Random(seed).sample(order, len(order))
    found: list[int] = []
    unusable: list[tuple[str, str]] = []
    asked = 0
    while asked < len(order) and (limit is None or len(found) < limit):
        tried = order[asked:] if limit is None else order[asked : asked + 2 * limit]
        table = evaluate(model, facts.pick(tried), batch_size, progress)
        found += [i for i, right in zip(tried, table.correct, strict=True) if right]
        left_out = table[table.skipped != ""]
        unusable += zip(left_out.fact_id.astype(str), left_out.skipped, strict=True)
        asked += len(tried)
    answered = Answered(model.name, asked - len(unusable), len(found), tuple(unusable))
    return facts.pick(sorted(found[:limit])).answered_by(answered)
