"""From facts to token ids, roles and scored tokens; facts that cannot be used are kept with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mambalens.facts.fact import Fact
from mambalens.facts.roles import role_positions, subject_spans
from mambalens.hooks.errors import MambalensError
from mambalens.html.render import render


@dataclass(frozen=True)
class Prompt:
    """A fact as the model reads it."""

    fact: Fact
    ids: list[int]
    """Token ids of the prompt."""
    tokens: list[str]
    """The prompt's text, cut where the tokens meet."""
    offsets: list[tuple[int, int]]
    """Characters from and to of every token."""
    spans: list[tuple[int, int]]
    """Characters from and to of the subject's occurrences; empty where it is not found."""
    target_id: int
    """First token of the target."""

    def _repr_html_(self) -> str:
        subject, last = set(self.positions("subject")), len(self.tokens) - 1
        tokens = [
            (i, token, "subject" if i in subject else "last" if i == last else "")
            for i, token in enumerate(self.tokens)
        ]
        return render("prompt.html", tokens=tokens, target=self.fact.continuation)

    def positions(self, role: str, target: Sequence[int] = ()) -> list[int]:
        """Positions of a role; `target` are the positions that 'others' leaves out."""
        return role_positions(role, self.offsets, self.spans, target)


class Skip(NamedTuple):
    """Something that was left out, and why."""

    fact_id: str
    source: str
    """The role that is empty; '' where the whole fact cannot be used."""
    reason: str


class Batch(NamedTuple):
    """Prompts side by side, padded on the right: a causal model never looks there."""

    prompts: list[Prompt]
    ids: Int[Tensor, "batch time"]
    last: Int[Tensor, " batch"]
    """Last position of every prompt."""
    targets: Int[Tensor, " batch"]
    """First token of every target."""

    def mask(self, positions: Sequence[Sequence[int]]) -> Bool[Tensor, "batch time"]:
        """Positions for every row as a mask."""
        mask = torch.zeros(self.ids.shape, dtype=torch.bool)
        for row, columns in enumerate(positions):
            mask[row, list(columns)] = True
        return mask

    def part(self, rows: Sequence[int]) -> Batch:
        """Some of the prompts."""
        return Batch([self.prompts[row] for row in rows], self.ids[rows], self.last[rows], self.targets[rows])

    def trimmed(self) -> Batch:
        """Without the columns that only fill up."""
        return self._replace(ids=self.ids[:, : int(self.last.max()) + 1])


def read_fact(fact: Fact, tokenizer: Any) -> Prompt:
    """Tokenize a fact.

    Raises:
        MambalensError: the tokenizer has no offsets, the prompt no token, or the target cannot be encoded.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise MambalensError(
            f"{type(tokenizer).__name__} gives no character offsets, which roles are found with: load the fast "
            "tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))."
        )
    encoded = tokenizer(fact.prompt, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
    while ids and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
        ids, offsets = ids[:-1], offsets[:-1]  # an end-of-text token that the tokenizer adds is no part of the prompt
    if not ids:
        raise MambalensError(f"the prompt {fact.prompt!r} has no token")
    return Prompt(
        fact, ids, _token_texts(fact.prompt, ids, offsets, tokenizer), offsets,
        subject_spans(fact.prompt, fact.subject), _first_token(fact, ids, tokenizer),
    )  # fmt: skip


def _first_token(fact: Fact, prompt_ids: list[int], tokenizer: Any) -> int:
    """The target's first token, in its place behind the prompt."""
    together = tokenizer(fact.prompt + fact.continuation)["input_ids"]
    if together[: len(prompt_ids)] == prompt_ids and len(together) > len(prompt_ids):
        first = together[len(prompt_ids)]
    else:  # prompt and target share a token: the model is asked for the target's own first token
        alone = tokenizer(fact.continuation, add_special_tokens=False)["input_ids"]
        first = alone[0] if alone else None
    if first is None or first in (tokenizer.unk_token_id, tokenizer.eos_token_id):
        raise MambalensError(f"the target {fact.target!r} cannot be encoded")
    return int(first)


def whole_target(prompt: Prompt, tokenizer: Any) -> Prompt:
    """The prompt with its target's tokens behind it."""
    fact, ids = prompt.fact, prompt.ids
    together = list(tokenizer(fact.prompt + fact.continuation)["input_ids"])
    if together[-1:] == [tokenizer.eos_token_id]:
        together = together[:-1]
    if together[: len(ids)] != ids or len(together) <= len(ids):  # prompt and target share a token
        together = ids + list(tokenizer(fact.continuation, add_special_tokens=False)["input_ids"])
    return replace(prompt, ids=together)


def _token_texts(text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Any) -> list[str]:
    """What each token stands for; a token that ends a character split over several shows that character."""
    return [
        text[start:end] if end > start else tokenizer.decode([i]) for i, (start, end) in zip(ids, offsets, strict=True)
    ]


def read_facts(facts: Sequence[Fact], tokenizer: Any, subject: bool = True) -> tuple[list[Prompt], list[Skip]]:
    """Tokenize facts; those that cannot be encoded, or lack the subject where it is needed, are listed instead."""
    prompts, skipped = [], []
    for fact in facts:
        reason = ""
        try:
            prompt = read_fact(fact, tokenizer)
            if subject and not prompt.spans:
                reason = f"the subject {fact.subject!r} is not in the prompt {fact.prompt!r}"
        except MambalensError as error:
            if not getattr(tokenizer, "is_fast", False):
                raise
            reason = str(error)
        if reason:
            skipped.append(Skip(str(fact.id), "", reason))
        else:
            prompts.append(prompt)
    return prompts, skipped


def none_usable(facts: Sequence[Fact], skipped: Sequence[Skip]) -> MambalensError:
    """The error where no fact is left, with the first reasons."""
    reasons = "; ".join(f"{skip.fact_id}: {skip.reason}" for skip in skipped[:3])
    return MambalensError(f"None of the {len(facts)} facts can be used ({reasons or 'there are none'}).")


def batches(prompts: Sequence[Prompt], size: Callable[[int], int], padding: int) -> Iterator[Batch]:
    """Batches of prompts of like length, the longest first, so that too large a batch fails at once.

    Args:
        prompts: what to batch.
        size: how many prompts of a length make a batch.
        padding: token to fill up with.
    """
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    while ordered:
        longest = len(ordered[0].ids)
        count = max(1, size(longest))
        rows, ordered = ordered[:count], ordered[count:]
        ids = torch.full((len(rows), longest), padding)
        for row, prompt in enumerate(rows):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        last = torch.tensor([len(prompt.ids) - 1 for prompt in rows])
        yield Batch(rows, ids, last, torch.tensor([prompt.target_id for prompt in rows]))
