"""What `mambalens explore` does: prints an answer, or opens the page and loads the models behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mambalens.explore.server import Loading, serve
from mambalens.explore.state import MODELS, State
from mambalens.hooks.errors import MambalensError

if TYPE_CHECKING:
    from mambalens.explore.questions import Questions
    from mambalens.facts.sequence import Facts
    from mambalens.lens import Lens


def opened(
    models: Sequence[str],
    told: Mapping[str, Any],
    facts: Callable[[], Facts],
    load: Callable[[str], Lens],
    named: str,
    port: int,
    browser: bool,
    say: Callable[[str], None],
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        models: as typed.
        told: the state that the page begins with, without its models.
        facts: reads what can be searched in the page.
        load: loads a model.
        named: name or path of these, for the page's code.
        port: where to listen; 0: any free port.
        browser: open it in a browser.
        say: hears what is done.
    """
    _checked(models)
    state = State.read(told)

    def everything(does: Callable[[str], None]) -> Questions:
        from mambalens.explore.answers import Answers
        from mambalens.explore.origins import loaded
        from mambalens.explore.questions import Questions

        searched, lenses = facts(), {}
        for model in models:
            does(f"loading {model}")
            say(f"loading {model}")
            lenses[model] = load(model)
        given = _named(lenses)
        answers = Answers({name: lenses[typed] for name, typed in given.items()}, searched)
        does("warming up")
        answers.warm_up()
        return Questions(answers, loaded(answers.lenses, named))

    serve(Loading(everything), state.link if state.prompt else "", port, browser, say)


def answered(
    models: Sequence[str], told: Mapping[str, Any], facts: Callable[[], Facts], load: Callable[[str], Lens]
) -> Iterator[str]:
    """The watched answer's probability in every model, before and after the cuts, with all digits.

    Args:
        models: as typed.
        told: the state, without its models.
        facts: reads the facts that means are taken over.
        load: loads a model.
    """
    from mambalens.explore.answers import Answers, Question
    from mambalens.facts.sequence import Facts

    _checked(models)
    asked = State.read(told)
    _ = asked.fact
    lenses = {model: load(model) for model in models}
    given = _named(lenses)
    state = replace(asked, models=tuple(given))
    over = facts() if state.ablation == "mean" else Facts([])
    answers = Answers({name: lenses[typed] for name, typed in given.items()}, over)
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
