"""Sequences of facts."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from mambalens.facts.fact import Answered, Fact
from mambalens.hooks.errors import MambalensError, choose
from mambalens.html.render import render

if TYPE_CHECKING:
    import pandas as pd

    from mambalens.facts.pairs import Pairs

SHOWN_FACTS = 5
"""Facts that a sequence of them shows in a notebook."""


class Facts(Sequence[Fact]):
    """A sequence of facts, with the further columns of the file they came from.

    `facts[3]` is a Fact, `facts[:10]` and `facts.where(relation="capital")` are Facts again.
    """

    def __init__(self, facts: Iterable[Fact], extra: Sequence[dict[str, Any]] | None = None, name: str = "") -> None:
        self._facts = [
            fact if fact.id is not None else Fact(fact.prompt, fact.subject, fact.target, fact.relation, str(i))
            for i, fact in enumerate(facts)
        ]
        self.extra = list(extra) if extra is not None else [{} for _ in self._facts]
        """Further columns of the file, one dict a fact."""
        self.name = name
        self.answered: tuple[Answered, ...] = ()
        """How models did on the facts that these were chosen from (`Lens.known`), in the order they were asked."""
        seen: set[str | None] = set()
        for fact in self._facts:
            if fact.id in seen:
                raise MambalensError(f"The fact id {fact.id!r} occurs twice: ids must differ, or be left out.")
            seen.add(fact.id)

    def __len__(self) -> int:
        return len(self._facts)

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> Facts: ...
    def __getitem__(self, index: int | slice) -> Fact | Facts:
        if isinstance(index, slice):
            return self.pick(range(len(self))[index])
        return self._facts[index]

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts)

    def __repr__(self) -> str:
        return f"<{len(self)} facts{f' of {self.name}' if self.name else ''}>"

    def _repr_html_(self) -> str:
        heading = f"{len(self)} facts{f' of {self.name}' if self.name else ''}"
        shown = [fact.shown for fact in self[:SHOWN_FACTS]]
        return render("facts.html", heading=heading, facts=shown, left=len(self) - len(shown))

    def pick(self, indices: Iterable[int]) -> Facts:
        """The facts at these indices, in the order given."""
        indices = list(indices)
        picked = Facts([self._facts[i] for i in indices], [self.extra[i] for i in indices], self.name)
        picked.answered = self.answered
        return picked

    def answered_by(self, answered: Answered) -> Facts:
        """The same facts, with a note that a model was asked and these were chosen by its answers."""
        noted = self.pick(range(len(self)))
        noted.answered = (*self.answered, answered)
        return noted

    @property
    def table(self) -> pd.DataFrame:
        """One row a fact: fact_id, prompt, subject, target, relation, and the file's further columns."""
        import pandas as pd

        columns = ["fact_id", "prompt", "subject", "target", "relation"]
        core = [(fact.id, fact.prompt, fact.subject, fact.target, fact.relation) for fact in self._facts]
        table = pd.DataFrame(core, columns=columns)
        extra = pd.DataFrame(self.extra, index=table.index)
        return pd.concat([table, extra], axis=1) if len(extra.columns) else table

    def where(self, **values: Any) -> Facts:
        """The facts whose columns have these values; a list means any of them.

        Raises:
            MambalensError: for a column that the facts do not have.
        """
        table = self.table
        keep = [True] * len(self)
        for column, value in values.items():
            if column not in table.columns:
                raise MambalensError(f"The facts have no column {column!r}: {choose(column, table.columns)}.")
            allowed = {str(v) for v in (value if isinstance(value, list | tuple | set) else [value])}
            keep = [k and str(v) in allowed for k, v in zip(keep, table[column], strict=True)]
        return self.pick(i for i, k in enumerate(keep) if k)

    def pairs(self, same: str | Sequence[str] | None = "relation", seed: int = 0, tokenizer: Any = None) -> Pairs:
        """For every fact another one in the same words, with another subject and another answer.

        Among several, one is drawn. Where no fact stands in the same words, another fact's subject is put into them.

        Args:
            same: columns in which both are alike; None: none.
            seed: of the draw, in which a fact's partner depends on the facts that are alike alone.
            tokenizer: where it is given, both have as many tokens, the subject at the same positions, and answers that
                begin with different tokens.

        Returns:
            The pairs; `left_out` has the facts that have no partner, and why.

        Raises:
            MambalensError: for a column that the facts do not have.
        """
        from mambalens.facts.pairs import Pairs, find_pairs

        found = find_pairs(self, self.table, same, seed, tokenizer)
        return Pairs(found, found.left_out, self.name, self.answered)

    def sample(self, n: int, seed: int = 0) -> Facts:
        """At most n facts drawn at random, in their old order.

        Raises:
            MambalensError: for a negative number.
        """
        if n < 0:
            raise MambalensError(f"sample({n}) is no number of facts: give 0 or more.")
        return self.pick(sorted(random.Random(seed).sample(range(len(self)), min(n, len(self)))))
