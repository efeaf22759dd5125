"""What was run on one model, as a run's folder and a result keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from mambalens.defaults import ABLATION
from mambalens.facts.fact import Answered
from mambalens.hooks.errors import MambalensError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What was run on one model, to label tables and figures with."""

    model: str
    """What results call the model."""
    n_layers: int
    """Layers of the model."""
    kinds: tuple[str, ...] = ()
    """Kinds of token mixers that the model has."""
    facts: str = ""
    """Where the facts come from; '' where they have no name."""
    n_facts: int = 0
    """Facts that were asked for."""
    answered: tuple[Answered, ...] = ()
    """How models did on the facts that these were chosen from."""
    sources: tuple[str, ...] = ()
    """Roles that were knocked out."""
    target: str = ""
    """Role that was not to receive the information."""
    window: int | tuple[tuple[int, ...], ...] = ()
    """Consecutive layers that a knockout covered, or the layers of every window."""
    features: tuple[str, ...] = ()
    """What the table calls the groups of features."""
    paths: tuple[str, ...] = ()
    """Paths that were cut, each on its own."""
    mixers: str | None = None
    """The only kind of mixers that was cut; None: every kind."""
    ablation: str = ABLATION
    """What stood in the place of what was cut, as tables call it ('mean', 'mean+keys')."""
    dtype: str = ""
    """Precision of the model's weights, such as 'float32'."""
    measure: str = ""
    """Measure that a flow is of, or that a sweep has beside its other columns."""
    points: int = 0
    """Gradients that a flow has taken of every prompt."""

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> Self:
        """What a folder's JSON says.

        Folders of older releases lack some keys, and those of newer ones may have others: what is not there has its
        default, and what is not known is left out.

        Raises:
            MambalensError: if it does not say which model, and how many layers.
        """
        missing = [name for name in ("model", "n_layers") if name not in about]
        if missing:
            raise MambalensError(f"What was run is not known: its configuration has no {' and no '.join(missing)}.")
        values = {one.name: _tuples(about[one.name]) for one in fields(cls) if one.name in about}
        answered = [
            Answered(**{name: _tuples(known[name]) for name in Answered._fields if name in known})
            for known in about.get("answered") or []
        ]
        return cls(**values | {"answered": tuple(answered)})

    def to_json(self) -> dict[str, Any]:
        """The same as JSON has it: lists in place of tuples."""
        values = {one.name: _lists(getattr(self, one.name)) for one in fields(self)}
        return values | {"answered": [_lists(known._asdict()) for known in self.answered]}

    def __getitem__(self, name: str) -> Any:
        """A field by its name, as JSON has it."""
        return self.to_json()[name]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(one) for one in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(one) for key, one in value.items()}
    return [_lists(one) for one in value] if isinstance(value, list | tuple) else value
