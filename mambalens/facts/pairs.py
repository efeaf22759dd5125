"""Counterfactual pairs: each fact with another one in the same words, of another subject, with another answer."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from mambalens.facts.fact import Answered, Fact
from mambalens.facts.pieces import piece_of
from mambalens.facts.prompts import Prompt, Skip, read_facts
from mambalens.facts.roles import pieces
from mambalens.hooks.errors import MambalensError, choose

if TYPE_CHECKING:
    import pandas as pd


class Pair(NamedTuple):
    """A fact, and one to put in its place."""

    fact: Fact
    other: Fact


class Pairs(Sequence[Pair]):
    """Pairs of facts, as `Facts.pairs` finds them.

    `pairs[3]` is a Pair, `pairs[:10]` are Pairs again.

    Args:
        pairs: the pairs.
        left_out: facts that have no other one, with the reason.
        name: where the facts come from.
        answered: how models did on the facts that these were chosen from (`Facts.answered`).
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        left_out: Sequence[Skip] = (),
        name: str = "",
        answered: Sequence[Answered] = (),
    ) -> None:
        self._pairs, self.left_out, self.name, self.answered = list(pairs), tuple(left_out), name, tuple(answered)

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Pairs:
        """Pairs in any sequence; facts without an id have their number as theirs."""
        if isinstance(pairs, Pairs):
            return pairs
        return cls([
            Pair(fact if fact.id is not None else replace(fact, id=str(number)), other)
            for number, (fact, other) in enumerate(pairs)
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        if isinstance(index, slice):
            return Pairs(self._pairs[index], self.left_out, self.name, self.answered)
        return self._pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __repr__(self) -> str:
        return f"<{len(self)} pairs of facts, {len(self.left_out)} facts left out>"

    @property
    def facts(self) -> list[Fact]:
        """The facts that the pairs are of."""
        return [pair.fact for pair in self]

    @property
    def table(self) -> pd.DataFrame:
        """One row a pair: fact_id, prompt, subject, target, relation, and the same of the other, such as other_id."""
        import pandas as pd

        columns = ["id", "prompt", "subject", "target", "relation"]
        rows = [[getattr(fact, column) for fact in pair for column in columns] for pair in self]
        return pd.DataFrame(rows, columns=["fact_id", *columns[1:], *(f"other_{column}" for column in columns)])


def wording(fact: Fact) -> tuple[str, ...] | None:
    """A fact's prompt without its subject: the texts between its occurrences; None where it does not occur."""
    found = pieces(fact.prompt, fact.subject)
    if not any(what for _, what in found):
        return None
    parts, text = [], ""
    for piece, what in found:
        if what:
            parts.append(text)
        text = "" if what else piece
    return (*parts, text)


def in_words_of(fact: Fact, other: Fact) -> Fact:
    """Another fact, asked in the words of a fact."""
    words = wording(fact)
    assert words is not None
    return Fact(other.subject.join(words), other.subject, other.target, other.relation, f"{other.id} as {fact.id}")


def find_pairs(
    facts: Sequence[Fact],
    table: pd.DataFrame,
    same: str | Sequence[str] | None = "relation",
    seed: int = 0,
    tokenizer: Any = None,
) -> Pairs:
    """See `Facts.pairs`."""
    columns = [same] if isinstance(same, str) else list(same or ())
    for column in columns:
        if column not in table.columns:
            raise MambalensError(f"same={column!r}: the facts have no such column: {choose(column, table.columns)}.")
    keys = list(zip(*(table[column].astype(str) for column in columns), strict=True)) if columns else [()] * len(facts)
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    words = [wording(fact) for fact in facts]
    worded: dict[Any, list[int]] = {}
    for number, key in enumerate(keys):
        worded.setdefault((key, words[number]), []).append(number)
    alike = _Alike(tokenizer)
    found, left_out = [], []
    for number, fact in enumerate(facts):
        if words[number] is None:
            reason = f"the subject {fact.subject!r} is not in the prompt {fact.prompt!r}"
            left_out.append(Skip(str(fact.id), "", reason))
            continue
        # A fact's partner is the same whatever other facts are asked about.
        order = random.Random(f"{seed} {fact.id}")
        own = _others(fact, facts, worded[keys[number], words[number]])
        order.shuffle(own)
        partner = next((other for other in own if alike(fact, other)), None)
        if partner is None:
            subjects = {other.subject for other in own}
            rest = [o for o in _others(fact, facts, groups[keys[number]]) if o.subject not in subjects]
            order.shuffle(rest)
            in_words = (in_words_of(fact, other) for other in rest)
            partner = next((other for other in in_words if alike(fact, other)), None)
        if partner is None:
            why = "no other fact" + (f" with the same {' and '.join(columns)}" if columns else "")
            what = " and equally many tokens" if (own or rest) and tokenizer is not None else ""
            left_out.append(Skip(str(fact.id), "", f"{why} has another subject and another answer{what}"))
        else:
            found.append(Pair(fact, partner))
    return Pairs(found, left_out)


def _others(fact: Fact, facts: Sequence[Fact], among: Sequence[int]) -> list[Fact]:
    """Facts with another subject and another answer."""
    answer = fact.target.strip()
    return [facts[i] for i in among if facts[i].subject != fact.subject and facts[i].target.strip() != answer]


class _Alike:
    """Whether two facts' tokens stand side by side, and their answers begin with different tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._read: dict[Fact, Prompt | None] = {}

    def __call__(self, fact: Fact, other: Fact) -> bool:
        if self.tokenizer is None:
            return True
        one, two = self._prompt(fact), self._prompt(other)
        if one is None or two is None or one.target_id == two.target_id:
            return False
        return len(one.ids) == len(two.ids) and one.positions("subject") == two.positions("subject")

    def _prompt(self, fact: Fact) -> Prompt | None:
        if fact not in self._read:
            prompts, _ = read_facts([fact], self.tokenizer)
            self._read[fact] = prompts[0] if prompts else None
        return self._read[fact]


STANDS_FOR = {
    "subject_middle": ("subject_first", "subject_last"),
    "subject_first": ("subject_last",),
    "soon_after": ("after_subject", "last"),
    "after_subject": ("last",),
    "relation": ("soon_after", "after_subject", "last"),
    "context": ("subject_first", "subject_last", "last"),
    "subject_last": ("last",),
}
"""What is taken in the place of a piece that the other prompt lacks."""


def aligned(prompt: Prompt, other: Prompt) -> list[int]:
    """For every position of a prompt, the one of another prompt that stands for it.

    Prompts of equal length whose subjects stand at the same positions are aligned position by position. Others are by
    pieces (`facts.pieces`): within a piece from its end on, where the other's is shorter by its first position.
    """
    if len(prompt.ids) == len(other.ids) and prompt.positions("subject") == other.positions("subject"):
        return list(range(len(prompt.ids)))
    of: dict[str, list[int]] = {}
    for position, piece in enumerate(piece_of(other)):
        of.setdefault(piece, []).append(position)
    own: dict[str, list[int]] = {}
    for position, piece in enumerate(piece_of(prompt)):
        own.setdefault(piece, []).append(position)
    found = [0] * len(prompt.ids)
    for piece, positions in own.items():
        there = next(of[name] for name in (piece, *STANDS_FOR.get(piece, ())) if name in of)
        for back, position in enumerate(reversed(positions), 1):
            found[position] = there[max(-back, -len(there))]
    return found
