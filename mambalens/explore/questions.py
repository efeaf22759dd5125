"""Whatever a page asks, as one function from a question to an answer: the same for a server and a notebook."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mambalens.explore.answers import READINGS, Answers, Question, options
from mambalens.explore.state import WORDS, Loaded, State
from mambalens.hooks.errors import MambalensError


class Asking(NamedTuple):
    """A question that has been understood."""

    run: Callable[[threading.Event], dict[str, Any]]
    """Answers it; the event is set when nobody waits any more."""
    model: str | None = None
    """The model that it runs; None: none, and it is answered at once."""
    reading: str = ""


class Questions:
    """Answers what a page asks, in words that JSON has.

    Args:
        answers: who answers about models.
        loaded: how the models were asked for, which the page's code repeats.
    """

    def __init__(self, answers: Answers, loaded: Loaded) -> None:
        self.answers, self.loaded = answers, loaded

    def understand(self, told: Mapping[str, Any]) -> Asking:
        """What a question asks for.

        Args:
            told: `verb` is 'about' (models and examples), 'search' (facts that have all `words`), 'open' (the state
                that a `link` stands for), 'code' (a `state` as program and command, for the answer that is `watched`,
                and as link), or 'ask' (a `reading` of `READINGS` of a `model` in a `state`).

        Raises:
            MambalensError: for anything that is no question.
        """
        verbs = {"about": self._about, "search": self._search, "open": self._open, "code": self._code, "ask": self._ask}
        verb = told.get("verb")
        if not isinstance(verb, str) or verb not in verbs:
            raise MambalensError(f"{str(verb)[:40]!r} is nothing that can be asked.")
        return verbs[verb](told)

    def _about(self, told: Mapping[str, Any]) -> Asking:
        return Asking(lambda gone: self.answers.about())

    def _search(self, told: Mapping[str, Any]) -> Asking:
        words = told.get("words", "")
        if not isinstance(words, str) or len(words) > WORDS:
            raise MambalensError(f"A search has at most {WORDS} characters.")
        return Asking(lambda gone: {"facts": self.answers.search(words)})

    def _open(self, told: Mapping[str, Any]) -> Asking:
        state = State.of_link(told.get("link"))
        return Asking(lambda gone: {"state": state.json})

    def _code(self, told: Mapping[str, Any]) -> Asking:
        # Code names the answer that is watched; the link leaves it open where the person has named none.
        state = State.read(told.get("state"))
        watched = State.read({**state.json, "target": told.get("watched") or state.target})
        words = {"python": self.loaded.python(watched), "command": self.loaded.command(watched), "link": state.link}
        return Asking(lambda gone: words)

    def _ask(self, told: Mapping[str, Any]) -> Asking:
        reading, model = told.get("reading"), told.get("model")
        if not isinstance(reading, str) or reading not in READINGS:
            raise MambalensError(f"{str(reading)[:40]!r} is nothing that can be asked.")
        if not isinstance(model, str):
            raise MambalensError("A question names its model.")
        state, more = State.read(told.get("state")), options(reading, told)

        def run(gone: threading.Event) -> dict[str, Any]:
            return READINGS[reading](self.answers, Question(state, model, gone), **more)

        return Asking(run, model, reading)
