"""The page in a notebook: the same front end, whose questions come as messages of a widget."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambalens.defaults import ABLATION
from mambalens.explore.answers import Answers
from mambalens.explore.line import Dropped
from mambalens.explore.origins import loaded
from mambalens.explore.questions import Questions
from mambalens.explore.queue import Queue
from mambalens.explore.state import MODELS, Cut, State
from mambalens.explore.turns import listen, shell
from mambalens.facts.fact import Fact
from mambalens.facts.files import as_facts
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError, choose
from mambalens.html.modules import joined, styles

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pandas as pd

    from mambalens.explore.asked import Lens

try:
    import traitlets
    from anywidget import AnyWidget
except ImportError:
    raise MambalensError("explore in a notebook needs anywidget: pip install 'mambalens[jupyter]'.") from None

WRONG = "Something went wrong here. The log of the kernel says what; ask something else."
"""What a page is told of an error that is not the person's."""
LARGEST = 200_000
"""Characters of a question."""
REMEMBERED = 8
"""States whose answers are kept, for `ExploreWidget.result` after an undo."""
RESULT = ("model", "answer", "answer_id", "base_prob", "prob", "base_rank", "rank", "error")
"""Columns of `ExploreWidget.result`."""
_log = logging.getLogger(__name__)


class ExploreWidget(AnyWidget):
    """The page of `mambalens explore` in a notebook, see `Lens.explore`.

    Questions are answered in a thread while no cell runs: a question waits for a running cell, and a cell that begins
    ends a question, which is asked again behind it. So a cell never has the cuts of a question, nor a question those of
    a cell.
    """

    _esm = joined("widget.js", "mambalens.explore")
    _css = styles("mambalens.explore", "explore.css", "widget.css")
    _link = traitlets.Unicode("").tag(sync=True)

    def __init__(self, lenses: Mapping[str, Lens], facts: Facts, state: State, named: str | None = None) -> None:
        notebook = shell()
        if notebook is not None:
            listen(notebook)
        self._lenses = dict(lenses)
        self._questions = Questions(Answers(self._lenses, facts), loaded(self._lenses, named))
        self._queue = Queue(threaded=notebook is not None)
        self._answers: dict[str, dict[str, dict[str, Any]]] = {}
        self._newest = ""
        super().__init__(_link=state.link if state.prompt else "")
        self._follow()
        self.observe(self._follow, "_link")
        self.on_msg(self._hear)

    def __repr__(self) -> str:
        # What stands in a stored notebook, where no kernel runs.
        return f"mambalens explore: {', '.join(self._lenses)}; a widget, shown where a kernel runs"

    @property
    def state(self) -> State:
        """What the page shows; set it, and the page shows that."""
        return State.of_link(self._newest)

    @state.setter
    def state(self, state: State) -> None:
        self._link = State.read(state.json).link if state.prompt else ""
        self._follow()

    def show(self, link: str) -> None:
        """Show the state that a link stands for, such as one of the page that `mambalens explore` opens.

        Raises:
            MambalensError: for a link that cannot be read.
        """
        self.state = State.of_link(link.partition("#")[2] if "#" in link else link)

    @property
    def fact(self) -> Fact | None:
        """The prompt as a fact; None where there is none. Its target is the answer that is watched."""
        state = self.state
        if not state.prompt.strip():
            return None
        watched = [found["target"] for found in self._of_now().values() if "target" in found]
        return Fact(state.prompt, state.fact.subject, state.target or (watched[0] if watched else ""))

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """The cuts, in the order in which they were made; set them, and the page shows them."""
        return self.state.cuts

    @cuts.setter
    def cuts(self, cuts: Iterable[Cut | str]) -> None:
        """Cuts, or their texts as the command line takes them: '3-4>5:0-11:both'.

        Raises:
            MambalensError: for a text that is no cut, or where there is no prompt yet.
        """
        state = self.state
        if not state.prompt.strip():
            raise MambalensError("There is no prompt to cut in: type one, or set widget.state.")
        self.state = replace(state, cuts=tuple(Cut.parse(one) if isinstance(one, str) else one for one in cuts))

    @property
    def knockouts(self) -> list[dict[str, Any]]:
        """The cuts, each as the arguments of `HookManager.knockout` of the first model that is shown.

        Returns:
            sources, targets, layers, path, features; under ablation 'mean' or 'resample' also `instead`, what stands in
            the place of what is cut: a model's own, so that other models have theirs (`knockouts_of`).

        Raises:
            MambalensError: as `knockouts_of`.
        """
        shown = [name for name in self.state.models if name in self._lenses]
        return self.knockouts_of((shown or list(self._lenses))[0])

    def knockouts_of(self, model: str) -> list[dict[str, Any]]:
        """The cuts as another model's `HookManager.knockout` is told them.

        Args:
            model: its name.

        Raises:
            MambalensError: for a name that the widget does not have; under ablation 'mean' or 'resample', where the
                values cannot be found: a block that cuts the model is open, or the other prompt is missing.
        """
        state = self.state
        if model not in self._lenses:
            raise MambalensError(f"{model!r} is no model of this widget: {choose(model, self._lenses)}.")
        if not state.cuts or state.ablation == ABLATION:
            return self._questions.answers.knockouts(state, model)
        with self._alone(model, ()):
            return self._questions.answers.knockouts(state, model)

    @property
    def result(self) -> pd.DataFrame | None:
        """What the models answer in this state; None before they have.

        Returns:
            One row a model: model, answer (the watched token), answer_id, base_prob (without cuts), prob (with them),
            base_rank, rank (1 is the top), and error: why there is no answer, or ''.
        """
        import pandas as pd

        found = self._of_now()
        names = self.state.models or tuple(self._lenses)
        if not found or any(name not in found for name in names):
            return None
        return pd.DataFrame([_row(name, found[name]) for name in names], columns=list(RESULT))

    def _of_now(self) -> dict[str, dict[str, Any]]:
        return self._answers.get(self._newest, {})

    def _follow(self, *_: Any) -> None:
        self._newest = self._link

    def close(self) -> None:
        """Drop what is asked, and end."""
        if hasattr(self, "_queue"):  # ipywidgets closes one that could not be made, too
            self._queue.close()
        super().close()

    def _hear(self, _: Any, content: Any, buffers: Any) -> None:
        """A message: a question with its number and the view that asks it, or one that is taken back."""
        if not isinstance(content, dict) or type(content.get("number")) is not int:
            return
        number, view = content["number"], content.get("view")
        if not isinstance(view, str) or len(view) > 64:
            return
        if content.get("drop") is True:
            self._queue.drop(str(content.get("key")))
            if str(content.get("key")).startswith(f"{view} predict "):
                self._follow()  # where nothing new is asked, the page is back at what it showed
            return

        def tell(found: Any) -> None:
            if isinstance(found, Dropped):
                found = {"dropped": True}
            elif isinstance(found, MambalensError):
                found = {"error": str(found)}
            elif isinstance(found, Exception):
                _log.error("A question was not answered.", exc_info=found)
                found = {"error": WRONG}
            self.send({"view": view, "number": number, "answer": found})

        try:
            told = content.get("question")
            if not isinstance(told, dict) or len(repr(told)) > LARGEST:
                raise MambalensError("This question is none, or too long.")
            asking = self._questions.understand(told)
            if told["verb"] != "ask":  # in line too: examples are found with the tokenizer, which threads may not share
                self._queue.put(f"{view} {told['verb']}", asking.run, tell)
                return
            state = State.read(told["state"])
            if asking.reading == "predict":
                # The page says its link behind the answer. A cell that is run right behind a click takes the question's
                # turn, and would read the state before the click.
                self._newest = state.link

            def work(gone: threading.Event) -> dict[str, Any]:
                with self._alone(asking.model, state.models):
                    return asking.run(gone)

            def done(found: Any) -> None:
                if asking.reading == "predict" and asking.model is not None and not isinstance(found, Dropped):
                    kept = found if isinstance(found, dict) else {"error": str(found)}
                    self._keep(state, asking.model, kept)
                tell(found)

            self._queue.put(f"{view} {asking.reading} {asking.model}", work, done)
        except Exception as error:
            tell(error)

    def _keep(self, state: State, model: str, found: dict[str, Any]) -> None:
        self._answers.setdefault(state.link, {})[model] = found
        while len(self._answers) > REMEMBERED:
            self._answers.pop(next(iter(self._answers)))

    @contextmanager
    def _alone(self, model: str | None, others: Sequence[str]) -> Iterator[None]:
        """Nobody else's cuts are in what is asked, and nobody else runs these models meanwhile.

        Raises:
            MambalensError: if a cell has left a block open; in another thread, if it runs one of these models.
        """
        mine, handles = threading.get_ident(), []

        def refuse(*_: Any) -> None:
            if threading.get_ident() != mine:
                raise MambalensError("A widget's question runs on this model in another thread: wait for its answer.")

        lenses = [self._lenses[name] for name in {model, *others} if name in self._lenses]
        for lens in lenses:
            if lens.hooks.cutting or lens.hooks.steering:
                raise MambalensError(
                    f"A block that cuts or steers {lens.name} is open in the notebook: leave it, and ask again."
                )
        try:
            for lens in lenses:
                handles += [layer.register_forward_pre_hook(refuse) for layer in lens.hooks.layers]
            yield
        finally:
            for handle in handles:
                handle.remove()


def _row(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    if "answer" not in found:
        return {**dict.fromkeys(RESULT), "model": name, "error": found["error"]}
    answer = found["answer"]
    numbers = {"base_prob": answer["base"], "prob": answer["prob"]}
    ranks = {"base_rank": answer["base_rank"], "rank": answer["rank"]}
    return {"model": name, "answer": answer["token"], "answer_id": answer["id"], **numbers, **ranks, "error": ""}


def widget(
    lens: Lens, fact: Fact | str | None, others: Sequence[Lens], facts: Fact | Iterable[Fact] | str | Path
) -> ExploreWidget:
    """The page with a lens, and others beside it.

    Args:
        lens: the first model, whose tokens cuts count.
        fact: what it begins with: a fact, a prompt or nothing.
        others: models side by side with it.
        facts: what can be searched, and what means are taken over.

    Raises:
        MambalensError: for models of the same name, too many, or a fact that cannot be shown.
    """
    lenses = {one.name: one for one in (lens, *others)}
    if len(lenses) <= len(others):
        raise MambalensError("Two of these lenses have the same name: give each its own, Lens(..., name='...').")
    if len(lenses) > MODELS:
        raise MambalensError(f"{len(lenses)} models are given: at most {MODELS} go side by side.")
    asked = Fact(fact, fact, "") if isinstance(fact, str) else fact
    words = {} if asked is None else {"prompt": asked.prompt, "target": asked.target}
    if isinstance(fact, Fact):
        words["subject"] = fact.subject
    state = State.read({**words, "models": list(lenses)})
    named = str(facts) if isinstance(facts, str | Path) else None
    return ExploreWidget(lenses, as_facts(facts), state, named)
