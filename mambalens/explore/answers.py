"""What a page is told: predictions before and after cuts, heatmap, flow, logit lens; the lens's own numbers."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mambalens.explore.state import PATHS, PROMPT, Cut, State
from mambalens.facts.fact import Fact
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError, choose
from mambalens.lens import Lens

if TYPE_CHECKING:
    from torch import Tensor

    from mambalens.facts.prompts import Batch

TOP = 5
"""Tokens that each prediction lists."""
TOKENS, GRID, EDGES = 512, 128, 40
"""Tokens of a prompt that is predicted, and of one whose heatmap or flow is asked for; edges that are told."""
REMEMBERED = 64
"""Predictions without cuts that are kept."""
FOUND = 20
"""Facts that a search tells."""


class Dropped(Exception):
    """Nobody waits for this answer any more."""


@dataclass(frozen=True)
class Question:
    """A model, and what it is asked."""

    state: State
    model: str
    gone: threading.Event
    """Set when nobody waits for the answer."""


class Answers:
    """Answers questions about some models, one at a time.

    Args:
        lenses: the models, by name.
        facts: what a person can search.
    """

    def __init__(self, lenses: Mapping[str, Lens], facts: Facts) -> None:
        self.lenses, self.facts = dict(lenses), facts
        self._base: OrderedDict[tuple[str, Fact], Tensor] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """The models, and three examples to begin with."""
        models = [
            {
                "name": name,
                "n_layers": lens.n_layers,
                "kinds": lens.hooks.kinds,
                "paths": list(lens.hooks.paths.choices),
            }
            for name, lens in self.lenses.items()
        ]
        return {"models": models, "examples": self.examples(), "most_characters": PROMPT, "facts": len(self.facts)}

    def examples(self) -> list[dict[str, Any]]:
        """A prompt, a cut that costs the answer, and one that spares it, for the first model."""
        name, lens = next(iter(self.lenses.items()))
        plain = State("The capital of Peru is", "Peru", "Lima", (name,))
        prompt = lens.prompt(plain.fact)
        subject, last = prompt.positions("subject"), len(prompt.ids) - 1
        path = lens.hooks.paths.choices[-1]  # 'both', or the one that there is
        every = tuple(range(lens.n_layers))
        late = every[-max(1, lens.n_layers // 4) :]
        cuts = [Cut(tuple(subject), (last,), layers, path) for layers in (every, late)]
        return [
            {"title": "A prompt and its answer", "says": plain.prompt, "state": plain.json},
            {"title": "Cut the subject off", "says": "in every layer", "state": replace(plain, cuts=(cuts[0],)).json},
            {"title": "Cut it off late", "says": f"in layers {late[0]} to {late[-1]} alone",
             "state": replace(plain, cuts=(cuts[1],)).json},
        ]  # fmt: skip

    def search(self, words: str) -> list[dict[str, str]]:
        """Facts that have all of these words."""
        wanted = words.casefold().split()
        found = []
        for fact in self.facts:
            text = f"{fact.prompt} {fact.continuation} {fact.relation or ''}".casefold()
            if all(word in text for word in wanted):
                found.append({"prompt": fact.prompt, "subject": fact.subject, "target": fact.target})
                if len(found) == FOUND:
                    break
        return found

    def predict(self, asked: Question) -> dict[str, Any]:
        """The prompt's tokens, the answer that is watched, and the prediction without and with the cuts."""
        lens, fact, batch = self._read(asked, TOKENS)
        prompt, answer = batch.prompts[0], int(batch.targets[0])
        with self._until_gone(asked):
            base = self._without_cuts(asked.model, lens, fact, batch)
        cut = base
        if asked.state.cuts:
            with self._within(asked):
                cut = lens.last_logits(batch)[0].softmax(-1)
        either = list(dict.fromkeys([*base.topk(TOP).indices.tolist(), *cut.topk(TOP).indices.tolist(), answer]))
        # The watched answer in the order of the others.
        either.sort(key=lambda token: -float(base[token]))
        rows = [
            {
                "id": token,
                "token": lens.tokenizer.decode([token]),
                "base": float(base[token]),
                "prob": float(cut[token]),
            }
            for token in either
        ]
        return {
            "model": asked.model,
            "tokens": prompt.tokens,
            "subject": prompt.positions("subject") if asked.state.subject else [],
            "target": fact.target,
            "answer": {
                "id": answer,
                "token": lens.tokenizer.decode([answer]),
                "base": float(base[answer]),
                "prob": float(cut[answer]),
                "base_rank": int((base > base[answer]).sum()) + 1,
                "rank": int((cut > cut[answer]).sum()) + 1,
            },
            "top": rows,
        }

    def heatmap(self, asked: Question, window: int, path: str) -> dict[str, Any]:
        """What every token as the source costs in every window of layers, in % of the answer's probability."""
        lens, fact, batch = self._read(asked, GRID)
        with self._within(asked):
            table = lens.sweep([fact], "each", window=window, paths=path, progress=False).table
        grid = table.pivot(index="position", columns="window_start", values=["prob", "change_pct"]).sort_index()
        return _plain({
            "model": asked.model, "tokens": batch.prompts[0].tokens, "window": window, "path": path,
            "starts": grid["prob"].columns.to_numpy(), "positions": grid.index.to_numpy(),
            "base_prob": float(table.base_prob.iloc[0]), "prob": grid["prob"].to_numpy(float),
            "change_pct": grid["change_pct"].to_numpy(float),
        })  # fmt: skip

    def flow(self, asked: Question) -> dict[str, Any]:
        """The strongest edges of all layers and paths; half of those that are told are cut exactly."""
        lens, fact, batch = self._read(asked, GRID)
        with self._within(asked):
            found = lens.flow([fact], progress=False, certify=EDGES // 2)
        columns = ["layer", "path", "source", "target", "attributed", "exact", "effect"]
        strongest = found.strongest(EDGES)[columns]
        return _plain({
            "model": asked.model, "tokens": batch.prompts[0].tokens, "edges": strongest.to_dict("records"),
            "of": len(found.table), "measure": "log_odds",
        })  # fmt: skip

    def layers(self, asked: Question) -> dict[str, Any]:
        """The logit lens at the last token: what each layer would answer were it the last."""
        lens, fact, _ = self._read(asked, TOKENS)
        with self._within(asked):
            rows = lens.logits_by_layer(fact).at_last()
        return _plain({
            "model": asked.model,
            "layers": rows[["layer", "prob", "rank", "top_token"]].to_dict("records"),
        })  # fmt: skip

    def _read(self, asked: Question, most: int) -> tuple[Lens, Fact, Batch]:
        """The lens, the fact with the answer that is watched, and its prompt as a batch of one.

        Raises:
            MambalensError: for a model that is not loaded, a prompt that is too long, or cuts that do not fit it.
        """
        for name in (asked.model, *asked.state.models):
            if name not in self.lenses:
                raise MambalensError(f"The model {name[:80]!r} is not loaded: {choose(name[:80], self.lenses)}.")
        lens, fact = self.lenses[asked.model], asked.state.fact
        named = asked.state.target != ""
        # The first model's answer is watched where none is named; a target of its own reads the prompt until then.
        if not named:
            first = self.lenses[next(iter(asked.state.models), asked.model)]
            fact = replace(fact, target=first.predict(fact.prompt, 1).token[0])
        prompt = lens.prompt(fact)
        if len(prompt.ids) > most:
            raise MambalensError(
                f"The prompt has {len(prompt.ids):,} tokens: at most {most} are read here. Shorten it."
            )
        if not prompt.spans:
            raise MambalensError(f"The subject {fact.subject!r} is not in the prompt: spell it as there.")
        self._fits(asked, fact, [*prompt.offsets])
        (batch,) = lens.batches([prompt])
        return lens, fact, batch

    def _fits(self, asked: Question, fact: Fact, offsets: Sequence[tuple[int, int]]) -> None:
        """Cuts name positions of the prompt as the first model reads it, and layers of this one."""
        state = asked.state
        if not state.cuts:
            return
        first = next(iter(state.models), asked.model)
        if first != asked.model and [*self.lenses[first].prompt(fact).offsets] != offsets:
            raise MambalensError(
                f"{asked.model} has other tokens in this prompt than {first}, and the cuts count those of {first}. "
                f"Look at {asked.model} on its own."
            )
        n_layers = self.lenses[asked.model].n_layers
        for cut in state.cuts:
            if max(*cut.sources, *cut.targets) >= len(offsets):
                raise MambalensError(
                    f"The cut {cut.text!r} is not in this prompt: it has tokens 0 to {len(offsets) - 1}."
                )
            if cut.layers[-1] >= n_layers:
                raise MambalensError(
                    f"The cut {cut.text!r} is not in {asked.model}, which has layers 0 to {n_layers - 1}."
                )

    def _without_cuts(self, name: str, lens: Lens, fact: Fact, batch: Batch) -> Tensor:
        """Probabilities of all next tokens in the model as it is."""
        key = name, replace(fact, subject="", target="")
        if key not in self._base:
            self._base[key] = lens.last_logits(batch)[0].softmax(-1)
            while len(self._base) > REMEMBERED:
                self._base.popitem(last=False)
        self._base.move_to_end(key)
        return self._base[key]

    @contextmanager
    def _within(self, asked: Question) -> Iterator[None]:
        """The state's cuts are made, in a run that ends when nobody waits any more."""
        lens = self.lenses[asked.model]
        with self._until_gone(asked), ExitStack() as stack:
            for cut in asked.state.cuts:
                knockout = lens.hooks.knockout([*cut.sources], [*cut.targets], [*cut.layers], path=_path(cut.path))
                stack.enter_context(knockout)
            yield

    @contextmanager
    def _until_gone(self, asked: Question) -> Iterator[None]:
        """A layer that is reached when nobody waits any more ends the run."""
        hooks = self.lenses[asked.model].hooks

        def look(*_: Any) -> None:
            if asked.gone.is_set():
                raise Dropped

        with ExitStack() as stack:
            for module in (*hooks.layers, *(mixer.module for mixer in hooks.mixers)):
                stack.callback(module.register_forward_pre_hook(look).remove)
            yield


READINGS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "predict": Answers.predict,
    "heatmap": Answers.heatmap,
    "flow": Answers.flow,
    "layers": Answers.layers,
}
"""What a page can ask of a model, by name."""


def options(reading: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What a reading is told beside the state.

    Raises:
        MambalensError: for a window or path that is none.
    """
    if reading != "heatmap":
        return {}
    window, path = told.get("window", 1), told.get("path", "main")
    if type(window) is not int or not 1 <= window <= 1000:
        raise MambalensError(f"window={str(window)[:40]!r} is no number of layers: give 1 or more.")
    return {"window": window, "path": _path(path)}


def _path(path: Any) -> Any:
    if path not in PATHS:
        raise MambalensError(f"path={str(path)[:40]!r} is not a path: {choose(str(path)[:40], PATHS)}.")
    return path


def _plain(value: Any) -> Any:
    """The same in what JSON knows; what is no finite number is nothing."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | list):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
