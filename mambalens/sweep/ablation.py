"""What stands in the place of what a knockout takes away: nothing, means over facts, or another prompt's values.

`hooks.values` finds what positions hand on; here it is said whose values stand where, fact by fact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mambalens.defaults import ABLATION, ABLATIONS, WITH_KEYS
from mambalens.facts.fact import Fact
from mambalens.facts.files import as_facts
from mambalens.facts.pairs import STANDS_FOR, Pair, Pairs, aligned
from mambalens.facts.pieces import PIECES, piece_of
from mambalens.facts.prompts import Batch, Prompt, Skip, batches, none_usable, read_facts
from mambalens.facts.sequence import Facts
from mambalens.hooks import Values
from mambalens.hooks.errors import MambalensError, choose
from mambalens.hooks.knockout import Cutting, refuse_keys
from mambalens.model import LoadedModel

AT_ONCE = 512
"""Tokens of a pass that means are taken of: what every mixer hands on at each of them is held at once."""


class Asked(NamedTuple):
    """An ablation as it is asked for."""

    name: str = ABLATION
    over: Facts | None = None
    """Facts that means are taken over; the facts in question by default."""
    other: Pairs | Fact | None = None
    """Whose values stand in: a partner for every fact, or one fact for all; by default partners are found."""
    keys: bool = False
    """Put in keys of attention too."""

    @classmethod
    def of(cls, name: str, over: Any = None, other: Pairs | Fact | None = None, keys: bool = False) -> Asked:
        """What a user has said, checked.

        Raises:
            MambalensError: for an unknown ablation, or something that it has no use for.
        """
        if name not in ABLATIONS:
            raise MambalensError(f"ablation={name!r} is not an ablation: {choose(name, ABLATIONS)}.")
        for what, given, of in (("over", over, "mean"), ("other", other, "resample")):
            if given is not None and name != of:
                raise MambalensError(f"{what} is of ablation={of!r}, but ablation={name!r}: leave {what} out.")
        if keys and name == ABLATION:
            raise MambalensError(
                f"keys=True puts in keys of attention, but ablation={name!r} puts in nothing: give ablation='mean' or "
                "'resample', or leave keys out."
            )
        return cls(name, None if over is None else as_facts(over), other, keys)

    @property
    def label(self) -> str:
        """What tables call it."""
        return self.name + WITH_KEYS * self.keys

    def check(self, cuttings: Iterable[Cutting]) -> None:
        """See that what is cut has what is to be put in.

        Raises:
            MambalensError: for keys, where nothing that is cut has them.
        """
        if self.keys:
            refuse_keys(cuttings)


class Ablation:
    """Values for the prompts of a batch.

    Args:
        values: what stands at every position of a batch's prompts.
        numbers: how many numbers that is of one position, to plan memory with.
        identity: what tells it from others, as JSON.
    """

    def __init__(self, values: Callable[[Batch], Values], numbers: int, identity: dict[str, Any]) -> None:
        self.values, self.numbers, self.identity = values, numbers, identity


def ablation_of(
    lens: LoadedModel, asked: Asked, facts: Facts, prompts: Sequence[Prompt]
) -> tuple[Ablation | None, list[Skip]]:
    """An ablation, ready for the prompts.

    Args:
        lens: the model.
        asked: what is asked for.
        facts: the facts in question, among which partners are found.
        prompts: their prompts, those that can be used.

    Returns:
        It, None where nothing stands in; and the facts that it has nothing for, with the reason.
    """
    if asked.name == "mean":
        over, of = list(prompts), facts
        if asked.over is not None:
            of = asked.over
            over, unusable = read_facts(of, lens.tokenizer)
            if not over:
                raise none_usable(of, unusable)
        if len(over) < 2:
            raise MambalensError(
                "ablation='mean' takes means over facts, and here is one fact alone: give it several with over=..."
            )
        return means_of(lens, over, asked.keys), []
    if asked.name == "resample":
        return others_of(lens, asked, facts, prompts)
    return None, []


def values_for(lens: LoadedModel, prompt: Prompt, asked: Asked) -> Values | None:
    """What stands at every position of one prompt.

    Raises:
        MambalensError: if it is not said whose values, or the other fact cannot be used.
    """
    if asked.name == ABLATION:
        return None
    if asked.name == "mean" and asked.over is None:
        raise MambalensError("ablation='mean' takes means over facts: say which, over=facts.")
    if asked.name == "resample" and asked.other is None:
        raise MambalensError("ablation='resample' puts in another fact's values: say which, other=fact.")
    ablation, _ = ablation_of(lens, asked, Facts([prompt.fact]), [prompt])
    assert ablation is not None
    padding = lens.tokenizer.pad_token_id or 0
    return ablation.values(next(batches([prompt], lambda _: 1, padding)))


def means_of(lens: LoadedModel, over: Sequence[Prompt], keys: bool) -> Ablation:
    """Means over facts, piece by piece of their prompts (`facts.pieces`).

    Equation: Ablation
        x~_s = mean of x over the positions of all facts' prompts that belong to the piece of s

        Source: this package, as the mean ablation of Wang et al. 2022, arXiv:2211.00593, with pieces for positions
    """
    names = list(PIECES)
    counts = torch.zeros(len(names))
    total: Values | None = None
    numbers = 0
    for batch in lens.batches(over, None, lambda time: max(1, AT_ONCE // time)):
        group = torch.full(batch.ids.shape, -1)
        for row, prompt in enumerate(batch.prompts):
            group[row, : len(prompt.ids)] = torch.tensor([names.index(piece) for piece in piece_of(prompt)])
        counts += torch.bincount(group[group >= 0], minlength=len(names))
        found = lens.hooks.values(batch.ids.to(lens.device), keys=keys)
        numbers = _numbers(found)
        sums = found.sums(group, len(names))
        total = sums if total is None else total.plus(sums)
    assert total is not None
    precise = torch.promote_types(lens.model.dtype, torch.float32)

    def mean(part: torch.Tensor) -> torch.Tensor:
        of_piece = counts.clamp_min(1).to(part).view(1, -1, *(1 for _ in part.shape[2:]))
        return (part / of_piece).to(precise)

    means = total.each(mean)
    there = {name: number for number, name in enumerate(names) if counts[number]}

    def values(batch: Batch) -> Values:
        columns = torch.zeros(batch.ids.shape, dtype=torch.long)
        for row, prompt in enumerate(batch.prompts):
            stands = [
                next(there[name] for name in (p, *STANDS_FOR.get(p, ())) if name in there) for p in piece_of(prompt)
            ]
            columns[row, : len(stands)] = torch.tensor(stands)
        return means.at(torch.zeros_like(columns), columns)

    identity = {"ablation": "mean", "over": _digest([_asked(prompt.fact) for prompt in over])}
    return Ablation(values, numbers, identity | ({"keys": True} if keys else {}))


def others_of(
    lens: LoadedModel, asked: Asked, facts: Facts, prompts: Sequence[Prompt]
) -> tuple[Ablation | None, list[Skip]]:
    """Another prompt's values at the positions that are aligned (`facts.pairs.aligned`).

    Equation: Ablation
        x~_s = x'_s'    of the other prompt x', at its position s' that stands for s

        Source: this package, as the resampling of Chan et al. 2022, Causal scrubbing (Alignment Forum)
    """
    if isinstance(asked.other, Fact):
        pairs = Pairs([Pair(prompt.fact, asked.other) for prompt in prompts])
    else:
        pairs = asked.other if asked.other is not None else facts.pairs()
    partner = {str(pair.fact.id): pair.other for pair in pairs}
    reasons = {skip.fact_id: skip.reason for skip in pairs.left_out}
    skipped: list[Skip] = []
    read: dict[Fact, Prompt] = {}
    others: dict[str, Prompt] = {}
    for prompt in prompts:
        name = str(prompt.fact.id)
        other = partner.get(name)
        if other is None:
            skipped.append(Skip(name, "", f"nothing to put in: {reasons.get(name, 'it is in none of the pairs')}"))
            continue
        if other not in read:
            found, unusable = read_facts([other], lens.tokenizer)
            if unusable:
                skipped.append(Skip(name, "", f"nothing to put in: of {other.prompt!r}, {unusable[0].reason}"))
                continue
            read[other] = found[0]
        others[name] = read[other]
    if not others:
        raise none_usable(facts, skipped)
    padding = lens.tokenizer.pad_token_id or 0

    def values(batch: Batch) -> Values:
        theirs = [others[str(prompt.fact.id)] for prompt in batch.prompts]
        (run,) = batches(theirs, lambda _: len(theirs), padding)
        row = {id(prompt): number for number, prompt in enumerate(run.prompts)}
        columns = torch.zeros(batch.ids.shape, dtype=torch.long)
        for number, (prompt, other) in enumerate(zip(batch.prompts, theirs, strict=True)):
            columns[number, : len(prompt.ids)] = torch.tensor(aligned(prompt, other))
        rows = torch.tensor([row[id(other)] for other in theirs])
        found = lens.hooks.values(run.ids.to(lens.device), keys=asked.keys)
        return found.at(rows[:, None].expand_as(columns), columns)

    one = torch.tensor([next(iter(others.values())).ids[:1]])
    numbers = _numbers(lens.hooks.values(one.to(lens.device), keys=asked.keys))
    paired = [(name, _asked(prompt.fact)) for name, prompt in sorted(others.items())]
    identity = {"ablation": "resample", "others": _digest(paired)} | ({"keys": True} if asked.keys else {})
    return Ablation(values, numbers, identity), skipped


def _numbers(values: Values) -> int:
    """How many numbers stand at one position."""
    parts = [part for written in values.of.values() for part in written if part is not None]
    return sum(part[0, 0].numel() for part in parts)


def _asked(fact: Fact) -> tuple[Any, ...]:
    return (fact.prompt, fact.subject, fact.target)


def _digest(value: Sequence[Any] | Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
