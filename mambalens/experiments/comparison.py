"""Several models side by side, on the facts that all of them know (as the paper's main figures are made)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mambalens.facts.files import as_facts
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.lens import FactLike, Lens
from mambalens.result import SweepResult


def known_to_all(
    models: Iterable[Lens | str],
    facts: FactLike,
    batch_size: int | None = None,
    progress: bool = True,
    subject_tokens: int | None = None,
    **options: Any,
) -> Facts:
    """The facts whose target's first token is the top prediction of every model, in their old order.

    Args:
        models: lenses, or names to load one after the other.
        facts: facts, a name or a path.
        batch_size: prompts a batch.
        progress: show a progress bar.
        subject_tokens: only subjects of at most so many tokens of every model's tokenizer.
        options: for `Lens.load`.
    """

    def known(model: Lens | str, left: Facts) -> Facts:
        lens = _lens(model, options)
        left = left if subject_tokens is None else lens.with_short_subjects(left, subject_tokens)
        return lens.known(left, batch_size, progress)

    left = as_facts(facts)
    for model in models:
        left = known(model, left)
    return left


def compare(
    models: Sequence[Lens | str],
    facts: FactLike,
    common: bool = True,
    out: str | Path | None = None,
    load: dict[str, Any] | None = None,
    **sweep: Any,
) -> SweepResult:
    """The same sweep of several models, as one result to plot (`result.plot(columns='model', x='depth')`).

    Args:
        models: lenses, or names to load one after the other; one at a time is held.
        facts: facts, a name or a path.
        common: only the facts that all models know; otherwise each model is swept over those that it knows.
        out: a folder to save in, one below it for each model.
        load: options for `Lens.load`.
        sweep: options of `Lens.sweep`.

    Raises:
        MambalensError: if two models have the same name, or no fact is left.
    """
    names = [Path(model).name if isinstance(model, str) else model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise MambalensError(f"Two of the models are called {twice!r}: the table could not tell them apart.")
    asked, options = as_facts(facts), load or {}
    batching = {key: sweep[key] for key in ("batch_size", "progress") if key in sweep}
    chosen = known_to_all(models, asked, **batching, **options) if common else asked
    if not len(chosen):
        raise MambalensError(f"No fact of the {len(asked)} is answered right by all of {', '.join(names)}.")

    def swept(model: Lens | str) -> SweepResult:
        lens = _lens(model, options)
        mine = chosen if common else lens.known(chosen, **batching)
        if not len(mine):
            raise MambalensError(f"{lens.name} answers none of the {len(asked)} facts right.")
        return lens.sweep(mine, out=None if out is None else Path(out) / lens.name, **sweep)

    return SweepResult.concat([swept(model) for model in models])


def _lens(model: Lens | str, options: dict[str, Any]) -> Lens:
    return model if isinstance(model, Lens) else Lens.load(model, **options)
