"""What a sweep computes: sources, target, windows, groups of features and paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from mambalens import defaults
from mambalens.facts.roles import check_role
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Features, Path, Paths
from mambalens.measures import Measure, measure_of, name_of
from mambalens.sweep.ablation import Asked

if TYPE_CHECKING:
    from mambalens.hooks import HookManager


@dataclass(frozen=True)
class Plan:
    """What a sweep computes."""

    sources: tuple[str, ...] = defaults.SOURCES
    target: str = defaults.TARGET
    window: int | Sequence[Sequence[int]] = defaults.WINDOW
    features: tuple[Features, ...] = defaults.FEATURES
    paths: tuple[Path, ...] = defaults.PATHS
    mixers: str | None = None
    """Only mixers of this kind; windows count the model's layers all the same."""
    measure: str | Measure | None = None
    """What the table has of every answer beside the columns that all have."""
    ablation: str = defaults.ABLATION
    """What stands in the place of the sources: nothing ('zero'), means ('mean') or another prompt's ('resample')."""
    keys: bool = False
    """Put in keys of attention too, see `sweep.ablation.Asked`."""
    names: tuple[str, ...] = field(init=False)
    """What the table calls the groups of features."""

    def __post_init__(self) -> None:
        for role in (*self.sources, self.target):
            check_role(role)
        if self.target == "each":
            raise MambalensError("target='each': 'each' is for sources; give a role such as 'last'.")
        for what, values in (("sources", self.sources), ("features", self.features), ("paths", self.paths)):
            if not values:
                raise MambalensError(f"{what} is empty: name at least one.")
        Asked.of(self.ablation, keys=self.keys)
        if self.ablation != defaults.ABLATION:
            for path in self.paths:
                Paths.named(path).replaceable(path)
        names = [_name(features, i) for i, features in enumerate(self.features)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise MambalensError(f"features has {twice!r} twice; the table could not tell them apart.")
        object.__setattr__(self, "names", tuple(names))
        if self.measure is not None:
            measure_of(self.measure)

    @property
    def ablation_name(self) -> str:
        """What tables call the ablation."""
        return Asked.of(self.ablation, keys=self.keys).label

    @property
    def measure_name(self) -> str:
        """What folders call the measure; '' where there is none."""
        return "" if self.measure is None else name_of(self.measure)

    def windows(self, n_layers: int) -> list[list[int]]:
        """The layers of every window."""
        if isinstance(self.window, int):
            if not 1 <= self.window <= n_layers:
                raise MambalensError(
                    f"window={self.window}, but the model has {n_layers} layers: give 1 to {n_layers}."
                )
            return [list(range(start, start + self.window)) for start in range(n_layers - self.window + 1)]
        windows = [[int(layer) for layer in layers] for layers in self.window]
        keys = [(min(layers, default=-1), len(layers)) for layers in windows]
        if not windows or not all(windows):
            raise MambalensError("window is a list with an empty window in it, or none at all.")
        if len(set(keys)) < len(keys):
            raise MambalensError(
                "Two windows have the same first layer and the same size; the table could not tell them apart."
            )
        return windows

    def check(self, hooks: HookManager) -> list[list[int]]:
        """The windows, after everything that a model can refuse has been tried on it, before any long work.

        Raises:
            MambalensError: for a window, group of features or path that the model does not have, and for keys where
                none of what is cut has them.
        """
        windows = self.windows(hooks.n_layers)
        cuttings = [
            hooks.resolve(layers, features, path, self.mixers, somewhere=True)
            for features, path, layers in product(self.features, self.paths, windows)
        ]
        Asked.of(self.ablation, keys=self.keys).check(cuttings)
        return windows


def _name(features: Features, number: int) -> str:
    """What the table calls a group of features."""
    if isinstance(features, str | int):
        return features if isinstance(features, str) else f"feature {features}"
    return str(getattr(features, "name", f"selection {number}"))
