"""What a page asks: models, prompt and cuts; read from JSON, a link or a command line, and written as link and code."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qs, urlencode

from mambalens.defaults import ABLATION, ABLATIONS, DTYPE, FACTS, GROUP, PATH
from mambalens.facts.fact import Fact
from mambalens.hooks.errors import MambalensError, choose

PATHS = ("main", "conv", "erase", "both")
GROUPS = ("all", "slow", "middle", "fast", "context-dependent", "context-independent")
"""Groups of features that a page offers; a feature's number is one too."""
AVERAGED = 100
"""Facts that ablation 'mean' takes means over."""
PROMPT, WORDS, CUTS, NUMBERS, MODELS = 4000, 400, 50, 2000, 16
"""Characters of a prompt, and of a subject or target; cuts; positions or layers of a cut; models."""
LARGEST = 100_000
"""No position or layer is as large."""
_CUT = re.compile(r"([\d,-]+)>([\d,-]+):([\d,-]+):([a-z]+)(?::([a-z-]+|\d{1,6}))?")


@dataclass(frozen=True)
class Cut:
    """What some positions hand to others in some layers, on one path, by some features."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    layers: tuple[int, ...]
    path: str = PATH
    features: str = GROUP
    """A group, or a feature's number."""

    @classmethod
    def read(cls, told: Any) -> Cut:
        """A cut from JSON.

        Raises:
            MambalensError: for anything that is none.
        """
        if not isinstance(told, Mapping):
            raise MambalensError("A cut has sources, targets, layers and a path.")
        path = told.get("path", PATH)
        if path not in PATHS:
            raise MambalensError(f"path={_short(path)} is not a path: {choose(path, PATHS)}.")
        sources, targets, layers = (_numbers(told.get(name), name) for name in ("sources", "targets", "layers"))
        features = told.get("features", GROUP)
        if features not in GROUPS and not (isinstance(features, str) and re.fullmatch(r"\d{1,6}", features, re.ASCII)):
            raise MambalensError(f"features={_short(features)} is no group or number: {choose(features, GROUPS)}.")
        cut = cls(sources, targets, layers, path, features)
        if cut.sources[0] > cut.targets[-1]:
            raise MambalensError(
                f"The cut {cut.text!r} cuts nothing: no source stands before a target. Choose an earlier source or a "
                "later target."
            )
        return cut

    @classmethod
    def parse(cls, text: str) -> Cut:
        """A cut from its text.

        >>> Cut.parse("0,2-3>5:0-8:main").sources
        (0, 2, 3)
        """
        found = _CUT.fullmatch(text[:NUMBERS])
        if found is None:
            raise MambalensError(
                f"{_short(text)} is not a cut: write SOURCES>TARGETS:LAYERS:PATH, such as '3-4>7:0-8:main', and behind "
                "it a group of features if not all are cut, as in '3-4>7:0-8:main:slow'."
            )
        names = ("sources", "targets", "layers")
        numbers = {name: _ranges(part, text) for name, part in zip(names, found.groups(), strict=False)}
        return cls.read({**numbers, "path": found[4], "features": found[5] or GROUP})

    @property
    def text(self) -> str:
        """It in one word, as links and the command line have it.

        >>> Cut((0, 2, 3), (5,), tuple(range(9))).text
        '0,2-3>5:0-8:main'
        """
        parts = [f"{_short_ranges(self.sources)}>{_short_ranges(self.targets)}", _short_ranges(self.layers), self.path]
        return ":".join(parts if self.features == GROUP else [*parts, self.features])

    @property
    def json(self) -> dict[str, Any]:
        """It as JSON."""
        numbers = {"sources": self.sources, "targets": self.targets, "layers": self.layers}
        lists = {name: list(values) for name, values in numbers.items()}
        return {**lists, "path": self.path, "features": self.features}

    @property
    def knockout(self) -> dict[str, Any]:
        """It as `HookManager.knockout` is told it."""
        features = int(self.features) if self.features.isdecimal() else self.features
        positions = {"sources": list(self.sources), "targets": list(self.targets), "layers": list(self.layers)}
        return {**positions, "path": self.path, "features": features}


@dataclass(frozen=True)
class State:
    """Everything that a page shows comes from this."""

    prompt: str
    subject: str = ""
    """'' where the person names none."""
    target: str = ""
    """The answer that is watched; '' for what the first model says."""
    models: tuple[str, ...] = ()
    """Names of models; cuts count the tokens of the first."""
    cuts: tuple[Cut, ...] = ()
    ablation: str = ABLATION
    """What stands in the place of what is cut: 'zero', 'mean' or 'resample'."""
    other: str = ""
    """The prompt whose values 'resample' puts in."""
    other_subject: str = ""

    @classmethod
    def read(cls, told: Any) -> State:
        """A state from JSON.

        Raises:
            MambalensError: for anything that is none, or larger than a page may ask.
        """
        if not isinstance(told, Mapping):
            raise MambalensError("A question has a prompt, models and cuts.")
        words = {name: _text(told.get(name, ""), name.replace("_", " "), most) for name, most in _WORDS.items()}
        ablation = told.get("ablation", ABLATION)
        if ablation not in ABLATIONS:
            raise MambalensError(f"ablation={_short(ablation)} is not an ablation: {choose(ablation, ABLATIONS)}.")
        models = _several(told.get("models", []), "models", MODELS)
        cuts = tuple(Cut.read(cut) for cut in _several(told.get("cuts", []), "cuts", CUTS))
        names = tuple(_text(name, "model", PROMPT) for name in models)
        return cls(models=names, cuts=cuts, ablation=ablation, **words)

    @classmethod
    def of_link(cls, fragment: Any) -> State:
        """A state from what stands behind the # of a link; the reverse of `link`."""
        if not isinstance(fragment, str) or len(fragment) > 20 * PROMPT:
            raise MambalensError("This link is longer than a page's: copy it again.")
        try:
            told = parse_qs(fragment.removeprefix("#"), keep_blank_values=True, errors="strict", max_num_fields=200)
        except ValueError:
            raise MambalensError("This link cannot be read: copy it again.") from None
        words = {name: told.get(name, [""])[0] for name in _WORDS}
        words["ablation"] = told.get("ablation", [ABLATION])[0]
        cuts = [Cut.parse(text).json for text in told.get("cut", [])[: CUTS + 1]]
        return cls.read({**words, "models": told.get("model", []), "cuts": cuts})

    @property
    def link(self) -> str:
        """What stands behind the # of a link to it."""
        pairs = [(name, word) for name in _WORDS if (word := getattr(self, name))]
        pairs += [("ablation", self.ablation)] if self.ablation != ABLATION else []
        models, cuts = [("model", name) for name in self.models], [("cut", cut.text) for cut in self.cuts]
        return urlencode(pairs + models + cuts, safe=">:,")

    @property
    def json(self) -> dict[str, Any]:
        """It as JSON."""
        words = {name: getattr(self, name) for name in (*_WORDS, "ablation")}
        return {**words, "models": list(self.models), "cuts": [cut.json for cut in self.cuts]}

    @property
    def fact(self) -> Fact:
        """What the lens is asked; where no subject is named, the whole prompt is it.

        Raises:
            MambalensError: for an empty prompt.
        """
        if not self.prompt.strip():
            raise MambalensError("The prompt is empty: type one, or choose an example.")
        return Fact(self.prompt, self.subject or self.prompt, self.target)

    @property
    def stands_in(self) -> Fact | None:
        """Whose values 'resample' puts in; None for another ablation.

        Raises:
            MambalensError: if it is empty.
        """
        if self.ablation != "resample":
            return None
        if not self.other.strip():
            raise MambalensError("ablation='resample' puts in another prompt's values: type that prompt.")
        return Fact(self.other, self.other_subject or self.other, self.target or ".")


_SO = {"dtype": DTYPE, "tokenizer": None}
"""Options that are so anyway."""
_WORDS = {"prompt": PROMPT, "subject": WORDS, "target": WORDS, "other": PROMPT, "other_subject": WORDS}
"""Texts of a state, and how many characters each may have."""


@dataclass(frozen=True)
class Loaded:
    """How the models of a page were asked for, which its code repeats."""

    given: Mapping[str, str]
    """What was typed for every model, by its name."""
    facts: str | None = FACTS
    """Where the facts are from that means are taken over; None: they are objects."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What `Lens.load` was told of every model beside that, by its name."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What code cannot repeat of a model, in a sentence."""

    def _typed(self, state: State) -> list[str]:
        return [self.given.get(name, name) for name in state.models]

    def _options_of(self, state: State) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """What `Lens.load` is told of every model beside its name, and those that are the same for all."""
        every = [
            {option: value for option, value in self.options.get(name, {}).items()
             if option not in _SO or value != _SO[option]}
            for name in state.models
        ]  # fmt: skip
        first: dict[str, Any] = every[0] if every else {}
        return every, {
            option: value for option, value in first.items() if all(one.get(option) == value for one in every)
        }

    def _notes(self, state: State) -> list[str]:
        """What code cannot repeat, as comments."""
        said = [self.notes[name] for name in state.models if name in self.notes]
        if state.cuts and state.ablation == "mean" and self.facts is None:
            said.append("Means are over facts that were an object: put them in the place of load_facts.")
        return [f"# {' '.join(note.split())}" for note in said]

    def python(self, state: State) -> str:
        """A program that prints, for every model, the probability of the answer before and after the cuts."""
        fact, other = state.fact, state.stands_in
        options, alike = self._options_of(state)
        if all(one == alike for one in options):
            loop = f"for name in {self._typed(state)!r}:"
            words = "".join(f", {option}={value!r}" for option, value in alike.items())
        else:
            models = [f"    ({name!r}, {one!r})," for name, one in zip(self._typed(state), options, strict=True)]
            loop = "\n".join(["models = [  # name, options", *models, "]", "for name, options in models:"])
            words = ", **options"
        cuts = [
            f"    ({list(c.sources)}, {list(c.targets)}, {_as_range(c.layers)}, {features!r}, {c.path!r}),"
            for c in state.cuts
            for features in [c.knockout["features"]]
        ]
        names = "Fact, Lens" if state.ablation != "mean" else "Fact, Lens, load_facts"
        imports = [f"from mambalens import {names}"]
        asked = None
        if state.cuts and state.ablation == "mean":
            asked = f"Asked.of('mean', over=load_facts({self.facts or FACTS!r}).sample({AVERAGED}))"
        elif state.cuts and other is not None:
            asked = f"Asked.of('resample', other=Fact({other.prompt!r}, {other.subject!r}, {other.target!r}))"
        if asked is not None:
            imports.append("from mambalens.sweep.ablation import Asked, values_for")
        values = ["    instead = values_for(lens, lens.prompt(fact), asked)  # stands in the place of what is cut"]
        arguments = "sources, targets, layers, features, path" + (", instead=instead" if asked else "")
        return "\n".join([
            "from contextlib import ExitStack",
            "",
            *imports,
            "",
            f"fact = Fact({fact.prompt!r}, {fact.subject!r}, {fact.target!r})",
            *(["cuts = [  # sources, targets, layers, features, path", *cuts, "]"] if cuts else ["cuts = []"]),
            *([f"asked = {asked}"] if asked else []),
            *self._notes(state),
            loop,
            f"    lens = Lens.load(name{words})",
            *(values if asked else []),
            "    (batch,) = lens.batches([lens.prompt(fact)])",
            "    answer = batch.targets[0]  # the target's first token",
            "    before = lens.last_logits(batch)[0].softmax(-1)[answer]",
            "    with ExitStack() as stack:",
            "        for sources, targets, layers, features, path in cuts:",
            f"            stack.enter_context(lens.hooks.knockout({arguments}))",
            "        after = lens.last_logits(batch)[0].softmax(-1)[answer]",
            "    print(name, float(before), float(after))",
            "",
        ])  # fmt: skip

    def command(self, state: State) -> str:
        """A command line that prints the same numbers; without its --print, it opens the page in this state."""
        options, alike = self._options_of(state)
        said = {option: value for option, value in alike.items() if option in ("dtype", "tokenizer")}
        words = [("--prompt", state.prompt), ("--subject", state.subject), ("--target", state.target),
                 *(("--cut", cut.text) for cut in state.cuts), ("--ablation", state.ablation), ("--other", state.other),
                 ("--other-subject", state.other_subject), ("--facts", self.facts or FACTS),
                 ("--dtype", said.get("dtype", DTYPE)), ("--tokenizer", said.get("tokenizer", ""))]  # fmt: skip
        left_out = {("--ablation", ABLATION), ("--facts", FACTS), ("--dtype", DTYPE)}  # what is so anyway
        given = [f"{name}={word}" for name, word in words if word and (name, word) not in left_out]
        unsaid = [
            f"# {name!r} was loaded with {option}={value!r}, which a command line of these models cannot say."
            for name, one in zip(state.models, options, strict=True)
            for option, value in one.items()
            if option not in said
        ]
        line = shlex.join(["mambalens", "explore", "--print", *given, "--", *self._typed(state)])
        return "\n".join([*self._notes(state), *unsaid, line])


def _short(value: object) -> str:
    """What was given, for a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def _text(value: Any, name: str, most: int) -> str:
    """A text of limited length, without characters that no prompt has."""
    if not isinstance(value, str):
        raise MambalensError(f"{name}={_short(value)} is not a text.")
    if len(value) > most:
        raise MambalensError(f"The {name} has {len(value):,} characters: at most {most:,} are read.")
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise MambalensError(f"The {name} has the character {character!r}, which cannot be shown: leave it out.")
    return value


def _several(values: Any, name: str, most: int) -> Sequence[Any]:
    if not isinstance(values, list):
        raise MambalensError(f"{name}={_short(values)} is not a list.")
    if len(values) > most:
        raise MambalensError(f"There are {len(values):,} {name}: at most {most:,} are taken.")
    return values


def _numbers(values: Any, name: str) -> tuple[int, ...]:
    """Numbers of positions or layers, each once, in order."""
    for value in _several(values, name, NUMBERS):
        if type(value) is not int or not 0 <= value < LARGEST:
            raise MambalensError(f"{name} has {_short(value)}: give whole numbers from 0.")
    if not values:
        raise MambalensError(f"A cut needs {name}: choose at least one.")
    return tuple(sorted(set(values)))


def _ranges(text: str, cut: str) -> list[int]:
    """Numbers from '0,2-3'."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        ends = first, last or first
        if not all(re.fullmatch(r"\d{1,5}", end, re.ASCII) for end in ends) or int(ends[0]) > int(ends[1]):
            raise MambalensError(f"{_short(part)} in the cut {_short(cut)} is no number or range: write '3' or '3-5'.")
        if int(ends[1]) - int(ends[0]) > NUMBERS:
            raise MambalensError(f"{_short(part)} in the cut {_short(cut)} is more than {NUMBERS:,} numbers.")
        found += range(int(ends[0]), int(ends[1]) + 1)
    return found


def _short_ranges(numbers: Iterable[int]) -> str:
    """Numbers as '0,2-3'; the reverse of `_ranges`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _as_range(numbers: Sequence[int]) -> str:
    """Numbers in Python."""
    whole = len(numbers) > 2 and all(after == one + 1 for one, after in pairwise(numbers))
    return f"range({numbers[0]}, {numbers[-1] + 1})" if whole else str(list(numbers))
