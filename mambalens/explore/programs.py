"""What `mambalens explore` does: loads the models, and prints an answer or opens the page."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mambalens.explore.answers import Answers, Question
from mambalens.explore.server import serve
from mambalens.explore.state import MODELS, Loaded, State
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.lens import Lens


def opened(
    models: Sequence[str],
    told: Mapping[str, Any],
    facts: Facts,
    load: Callable[[str], Lens],
    options: tuple[str, str | None],
    port: int,
    browser: bool,
    say: Callable[[str], None],
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        models: as typed.
        told: the state that the page begins with, without its models.
        facts: what can be searched in the page.
        load: loads a model.
        options: dtype and tokenizer, for the page's code.
        port: where to listen; 0: any free port.
        browser: open it in a browser.
        say: hears what is done.
    """
    _checked(models)
    State.read(told)
    lenses = {}
    for model in models:
        say(f"loading {model}")
        lenses[model] = load(model)
    given = _named(lenses)
    state = State.read({**told, "models": list(given)}) if told["prompt"] else None
    by_name = {name: lenses[typed] for name, typed in given.items()}
    serve(Answers(by_name, facts), Loaded(given, *options), state, port, browser, say)


def answered(models: Sequence[str], told: Mapping[str, Any], load: Callable[[str], Lens]) -> Iterator[str]:
    """The watched answer's probability in every model, before and after the cuts, with all digits.

    Args:
        models: as typed.
        told: the state, without its models.
        load: loads a model.
    """
    _checked(models)
    _ = State.read(told).fact
    lenses = {model: load(model) for model in models}
    given = _named(lenses)
    state = State.read({**told, "models": list(given)})
    answers = Answers({name: lenses[typed] for name, typed in given.items()}, Facts([]))
    for name in given:
        found = answers.predict(Question(state, name, threading.Event()))["answer"]
        yield f"{given[name]} {found['base']} {found['prob']}"


def _checked(models: Sequence[str]) -> None:
    twice = [model for model in dict.fromkeys(models) if list(models).count(model) > 1]
    if twice:
        raise MambalensError(f"{twice[0]!r} is named twice: name each model once.")
    if len(models) > MODELS:
        raise MambalensError(f"{len(models)} models are named: at most {MODELS} go side by side.")


def _named(lenses: Mapping[str, Lens]) -> dict[str, str]:
    """What was typed for every model, by its name in the page: its own, or what was typed where two share it."""
    names = [lens.name for lens in lenses.values()]
    return {lens.name if names.count(lens.name) == 1 else typed: typed for typed, lens in lenses.items()}
