"""What a page is told: predictions before and after cuts, and readings of them; all numbers are the lens's own."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from mambalens.defaults import ABLATION
from mambalens.explore.asked import Lens
from mambalens.explore.line import Dropped
from mambalens.explore.state import AVERAGED, GROUPS, PATHS, PROMPT, Cut, State
from mambalens.facts.fact import Fact
from mambalens.facts.sequence import Facts
from mambalens.flow.table import levels
from mambalens.hooks.errors import MambalensError, choose
from mambalens.model import LoadedModel
from mambalens.sweep.ablation import Asked, values_for

if TYPE_CHECKING:
    from torch import Tensor

    from mambalens.facts.prompts import Batch
    from mambalens.hooks import Values

TOP = 5
"""Tokens that each prediction lists."""
TOKENS, GRID, EDGES, ROUTES = 512, 128, 40, 3
"""Tokens of a prompt that is predicted, and of one that is looked at closely; edges and routes that are told."""
REMEMBERED = 64
"""Predictions without cuts that are kept, and values that stand in for what is cut."""
FOUND = 20
"""Facts that a search tells."""


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
        self._base: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._values: OrderedDict[tuple[Any, ...], Values | None] = OrderedDict()

    def warm_up(self) -> None:
        """Run every model once: what the first pass sets up, no click waits for."""
        for name, lens in self.lenses.items():
            self._says(name, Fact("The", "The", "."))
            with lens.hooks.knockout([0], [0]):
                lens.predict("The", 1)

    def about(self) -> dict[str, Any]:
        """The models, and three examples to begin with."""
        models = [
            {
                "name": name,
                "n_layers": lens.n_layers,
                "kinds": lens.hooks.kinds,
                "paths": list(lens.hooks.paths.choices),
                "features": max(mixer.n_features for mixer in lens.hooks.mixers),
                "decays": any(mixer.kind != "attention" for mixer in lens.hooks.mixers),
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
            {"title": "Read an answer", "says": f"“{plain.prompt}”: what does the model say, and how surely?",
             "state": plain.json},
            {"title": "Cut the subject off", "says": "The last token gets nothing from “Peru”: is the answer lost?",
             "state": replace(plain, cuts=(cuts[0],)).json},
            {"title": "Cut it off late", "says": f"The same in layers {late[0]} to {late[-1]} alone. Does it matter?",
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
        given = self._asked(asked.state)
        with self._within(asked):
            table = lens.sweep(
                [fact], "each", window=window, paths=path, progress=False, ablation=given.name, over=given.over,
                other=given.other,
            ).table  # fmt: skip
        grid = table.pivot(index="position", columns="window_start", values=["prob", "change_pct"]).sort_index()
        return self._reading(asked, batch, {
            "window": window, "path": path, "starts": grid["prob"].columns.to_numpy(),
            "positions": grid.index.to_numpy(), "base_prob": float(table.base_prob.iloc[0]),
            "prob": grid["prob"].to_numpy(float), "change_pct": grid["change_pct"].to_numpy(float),
        })  # fmt: skip

    def flow(self, asked: Question) -> dict[str, Any]:
        """The strongest edges beside the cuts; half of those that are told are cut exactly."""
        lens, fact, batch = self._read(asked, GRID)
        given = self._asked(asked.state)
        with self._within(asked):
            found = lens.flow([fact], progress=False)
            found = found.certify(
                EDGES // 2, 0, progress=False, ablation=given.name, over=given.over, other=given.other
            )
        columns = ["layer", "path", "source", "target", "attributed", "exact", "effect", "begin", "end"]
        strongest = found.strongest(EDGES).join(levels(found.table)[["begin", "end"]])[columns]
        return self._reading(asked, batch, {"edges": strongest.to_dict("records"), "of": len(found.table)})

    def routes(self, asked: Question) -> dict[str, Any]:
        """The strongest chains from the subject to the last token, scored by exact cuts beside those that there are."""
        lens, fact, batch = self._read(asked, GRID)
        if not asked.state.subject:
            raise MambalensError("Routes begin at the subject: name it beside the prompt.")
        with self._within(asked):
            table = lens.flow([fact], progress=False).routes(k=ROUTES, progress=False)
        rows = table[["rank", "relays", "relay_tokens", "carried_pct", "joint_pct", "edges"]].to_dict("records")
        return self._reading(asked, batch, {"routes": rows})

    def layers(self, asked: Question) -> dict[str, Any]:
        """The logit lens: what each layer would answer were it the last, at every position."""
        lens, fact, batch = self._read(asked, GRID)
        with self._within(asked):
            table = lens.logits_by_layer(fact, k=1).table
        grid = table.pivot(index="layer", columns="position", values=["prob", "rank", "top_token"]).sort_index()
        return self._reading(asked, batch, {
            "prob": grid["prob"].to_numpy(float), "rank": grid["rank"].to_numpy(int),
            "top": grid["top_token"].to_numpy(), "layers": grid.index.to_numpy(),
        })  # fmt: skip

    def contributions(self, asked: Question) -> dict[str, Any]:
        """What each layer's mixer adds to the answer's log-odds from every token, and the rest adds."""
        lens, fact, batch = self._read(asked, GRID)
        with self._within(asked):
            found = lens.contributions(fact)
        table, n = found.table, len(batch.prompts[0].ids)
        mixer = np.zeros((lens.n_layers, n))
        others = np.zeros(lens.n_layers)
        of_mixer = (table.part == "mixer") & (table.source >= 0)
        for layer, source, value in table[of_mixer][["layer", "source", "contribution"]].to_numpy(float):
            mixer[int(layer), int(source)] += value
        inside = ~of_mixer & table.layer.between(0, lens.n_layers - 1)
        for layer, value in table[inside][["layer", "contribution"]].to_numpy(float):
            others[int(layer)] += value
        outside = float(table[~of_mixer & ~inside].contribution.sum())
        return self._reading(asked, batch, {
            "mixer": mixer, "others": others, "outside": outside, "score": float(found.scores.score.iloc[0]),
        })  # fmt: skip

    def attention(self, asked: Question, layer: int, features: str) -> dict[str, Any]:
        """A layer's effective attention: the mean magnitude over a group of features, or a single one as it is."""
        lens, _, batch = self._read(asked, GRID)
        if layer >= lens.n_layers:
            raise MambalensError(f"{asked.model} has no layer {layer}: it has layers 0 to {lens.n_layers - 1}.")
        kinds = [mixer.kind for mixer in lens.hooks.mixers_of(layer)]
        if not kinds:
            raise MambalensError(f"Layer {layer} of {asked.model} has no token mixer: choose another.")
        single = int(features) if features.isdecimal() else None
        with self._within(asked):
            alpha = lens.hooks.effective_attention(
                batch.ids.to(lens.device), layer, features=features if single is None else single,
                reduce="mean_abs" if single is None else None, mixers=kinds[0],
            )  # fmt: skip
        grid = alpha[0] if single is None else alpha[0, 0]
        return self._reading(asked, batch, {
            "layer": layer, "features": features, "kind": kinds[0], "alpha": grid.float().cpu().numpy(),
        })  # fmt: skip

    @staticmethod
    def _reading(asked: Question, batch: Batch, found: Mapping[str, Any]) -> dict[str, Any]:
        prompt = batch.prompts[0]
        about = {"model": asked.model, "tokens": prompt.tokens, "target": prompt.fact.continuation}
        subject = prompt.positions("subject") if asked.state.subject else []
        told: dict[str, Any] = _plain({**about, "subject": subject, **found})
        return told

    def _read(self, asked: Question, most: int) -> tuple[Lens, Fact, Batch]:
        """The lens, the fact with the answer that is watched, and its prompt as a batch of one.

        Raises:
            MambalensError: for a model that is not loaded, a prompt that is too long, or cuts that do not fit it.
        """
        for name in (asked.model, *asked.state.models):
            if name not in self.lenses:
                raise MambalensError(f"The model {name[:80]!r} is not loaded: {choose(name[:80], self.lenses)}.")
        lens, fact = self.lenses[asked.model], asked.state.fact
        if not asked.state.target:  # the first model's answer is watched
            fact = replace(fact, target=self._says(next(iter(asked.state.models), asked.model), fact))
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

    def _says(self, name: str, fact: Fact) -> str:
        """What a model without cuts says next."""
        lens = self.lenses[name]
        (batch,) = lens.batches([lens.prompt(replace(fact, target="."))])
        return str(lens.tokenizer.decode([int(self._without_cuts(name, lens, fact, batch).argmax())]))

    def _without_cuts(self, name: str, lens: Lens, fact: Fact, batch: Batch) -> Tensor:
        """Probabilities of all next tokens in the model as it is."""
        return _remembered(self._base, (name, fact.prompt), lambda: lens.last_logits(batch)[0].softmax(-1))

    def _asked(self, state: State) -> Asked:
        """What stands in for what is cut, as the verbs of the lens are told it."""
        over = self.facts.sample(AVERAGED) if state.ablation == "mean" else None
        return Asked.of(state.ablation, over=over, other=state.stands_in)

    def knockouts(self, state: State, model: str) -> list[dict[str, Any]]:
        """A state's cuts as `HookManager.knockout` of a model is told them, with what stands in for what is cut."""
        told = [cut.knockout for cut in state.cuts]
        if not told or state.ablation == ABLATION:
            return told
        instead = self._instead(state, model)
        return [{**one, "instead": instead} for one in told]

    def _instead(self, state: State, model: str) -> Values | None:
        """What stands in for what is cut."""
        lens = self.lenses[model]
        key = model, state.prompt, state.subject, state.ablation, state.other, state.other_subject
        with torch.no_grad():
            prompt = lens.prompt(replace(state.fact, target=state.target or "."))
            return _remembered(
                self._values, key, lambda: values_for(cast(LoadedModel, lens), prompt, self._asked(state))
            )

    @contextmanager
    def _within(self, asked: Question) -> Iterator[None]:
        """The state's cuts are made, in a run that ends when nobody waits any more."""
        lens = self.lenses[asked.model]
        with self._until_gone(asked), ExitStack() as stack:
            for one in self.knockouts(asked.state, asked.model):
                stack.enter_context(lens.hooks.knockout(**one))
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
    "routes": Answers.routes,
    "layers": Answers.layers,
    "contributions": Answers.contributions,
    "attention": Answers.attention,
}
"""What a page can ask of a model, by name."""


def options(reading: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """What a reading is told beside the state.

    Raises:
        MambalensError: for a window, layer, path or group that is none.
    """
    if reading == "heatmap":
        return {"window": _number(told, "window", 1), "path": _path(told.get("path", "main"))}
    if reading == "attention":
        features = told.get("features", "all")
        if features not in GROUPS and not (isinstance(features, str) and features.isdecimal() and len(features) < 7):
            raise MambalensError(f"features={str(features)[:40]!r} is no group: {choose(str(features)[:40], GROUPS)}.")
        return {"layer": _number(told, "layer", 0), "features": features}
    return {}


def _number(told: Mapping[str, Any], name: str, least: int) -> int:
    value = told.get(name, least)
    if type(value) is not int or not least <= value <= 1000:
        raise MambalensError(f"{name}={str(value)[:40]!r} is none: give a whole number from {least}.")
    return value


def _remembered(kept: OrderedDict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """What was made for a key, made now if it is not among those that are kept."""
    if key not in kept:
        kept[key] = make()
        while len(kept) > REMEMBERED:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _path(path: Any) -> Any:
    if path not in PATHS:
        raise MambalensError(f"path={str(path)[:40]!r} is not a path: {choose(str(path)[:40], PATHS)}.")
    return path


def _plain(value: Any) -> Any:
    """The same in what JSON knows; what is no finite number is nothing."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
