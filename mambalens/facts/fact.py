"""What a model is asked."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any, NamedTuple

from mambalens.facts.roles import pieces
from mambalens.html.render import render


@dataclass(frozen=True)
class Fact:
    """A prompt and the continuation that the model should know."""

    prompt: str
    """Text that ends right before the target."""
    subject: str
    """What the fact is about, as it is spelled in the prompt."""
    target: str
    """The continuation; its first token is what is scored. Where a letter or digit would follow the prompt directly, a
    space is put between (`continuation`)."""
    relation: str | None = None
    id: str | None = None

    def _repr_html_(self) -> str:
        return render("facts.html", heading="", facts=[self.shown], left=0)

    @property
    def shown(self) -> dict[str, Any]:
        """What templates show of it: the prompt in pieces, the target, the relation."""
        marked = pieces(self.prompt, self.subject)
        return {"id": self.id, "pieces": marked, "target": self.continuation, "relation": self.relation}

    @property
    def continuation(self) -> str:
        """The target as it follows the prompt.

        >>> Fact("The capital of Peru is", "Peru", "Lima").continuation
        ' Lima'
        """
        first = self.target[:1]
        spaced = first.isalnum() and unicodedata.east_asian_width(first) not in "WF"
        return " " + self.target if spaced and not self.prompt[-1:].isspace() else self.target


class Answered(NamedTuple):
    """How a model did on the facts that some were chosen from, because it answers them right."""

    model: str
    asked: int
    right: int
    unusable: tuple[tuple[str, str], ...] = ()
    """Facts that the model could not be asked, and why."""
