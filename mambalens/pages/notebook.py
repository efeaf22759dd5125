"""How facts, prompts, lenses, predictions and results show themselves in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from mambalens.pages.render import pieces, render

if TYPE_CHECKING:
    from mambalens.facts import Fact, Facts
    from mambalens.lens import Lens
    from mambalens.prompts import Prompt
    from mambalens.result import SweepResult

SHOWN_FACTS = 5
SHOWN_WINDOWS = 12


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
        facts = [_fact(self.fact)] if self.fact.subject else []
        return render("predictions.html", facts=facts, text=self.fact.prompt, rows=rows)


def fact_html(fact: Fact) -> str:
    """One fact: the prompt with its subject marked, and the target."""
    return render("facts.html", heading="", facts=[_fact(fact)], left=0)


def facts_html(facts: Facts) -> str:
    """The first few facts."""
    heading = f"{len(facts)} facts{f' of {facts.name}' if facts.name else ''}"
    shown = [_fact(fact) for fact in facts[:SHOWN_FACTS]]
    return render("facts.html", heading=heading, facts=shown, left=len(facts) - len(shown))


def prompt_html(prompt: Prompt) -> str:
    """A prompt's tokens with their roles and positions."""
    subject, last = set(prompt.positions("subject")), len(prompt.tokens) - 1
    tokens = [
        (i, token, "subject" if i in subject else "last" if i == last else "") for i, token in enumerate(prompt.tokens)
    ]
    return render("prompt.html", tokens=tokens, target=prompt.fact.continuation)


def lens_html(lens: Lens) -> str:
    """A model: its layers by kind of mixer, its size, where it is."""
    layers = lens.describe()
    counted = layers[layers.mixer != ""].groupby("mixer", sort=False)
    kinds = [(kind, part.layer.nunique(), int(part.features.max()), bool(part.conv.any())) for kind, part in counted]
    size = sum(parameter.numel() for parameter in lens.model.parameters())
    dtype = str(lens.model.dtype).removeprefix("torch.")
    return render("lens.html", lens=lens, kinds=kinds, size=size, dtype=dtype, architecture=type(lens.model).__name__)


def result_html(result: SweepResult) -> str:
    """What was swept, and the dearest window of every source."""
    roles = result.roles()
    worst = roles.dearest()
    rows = worst.head(SHOWN_WINDOWS).to_dict("records")
    varying = [name for name in ("model", "target", "features", "path", "window_size")
               if result.table[name].nunique() > 1]  # fmt: skip
    return render(
        "result.html", result=result, rows=rows, varying=varying, left=len(worst) - len(rows),
        n_facts=result.table.fact_id.nunique(), tokens=len(roles.table) < len(result.table),
    )  # fmt: skip


def _fact(fact: Fact) -> dict[str, object]:
    return {"id": fact.id, "pieces": pieces(fact.prompt, fact.subject), "target": fact.continuation,
            "relation": fact.relation}  # fmt: skip
