"""What the command line's texts name: facts, features, columns' values, models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mambalens.hooks.errors import MambalensError
from mambalens.system import processes

if TYPE_CHECKING:
    from mambalens.facts.sequence import Facts
    from mambalens.hooks.knockout import Features
    from mambalens.lens import Lens


def facts(name: str, where: Sequence[str], limit: int | None = None) -> Facts:
    """The facts of a file or a bundled set that --where and --limit leave.

    Raises:
        MambalensError: if there is none.
    """
    from mambalens.facts.files import load_facts

    chosen = load_facts(name).where(**conditions(where))
    if not len(chosen):
        raise MambalensError(f"No fact of {name!r} has {' and '.join(where)}.")
    return chosen.sample(limit) if limit else chosen


def features(text: str) -> Features:
    """What --features names: a group, a feature's number, or a selection's file."""
    if text.endswith(".csv"):
        from mambalens.features.selection import Selection

        return Selection.load(text)
    return int(text) if text.isdigit() else text


def conditions(where: Sequence[str]) -> dict[str, list[str]]:
    """COLUMN=VALUE texts as columns and what they may be; several values of a column: any of them.

    Raises:
        MambalensError: for a text without an equals sign.
    """
    wanted: dict[str, list[str]] = {}
    for text in where:
        column, equals, value = text.partition("=")
        if not equals:
            raise MambalensError(f"--where {text!r} is not COLUMN=VALUE.")
        wanted.setdefault(column, []).append(value)
    return wanted


def lens(model: str, dtype: str, tokenizer: str | None) -> Lens:
    """A model, loaded onto this process's device."""
    from transformers.utils import logging

    from mambalens.lens import Lens

    # Weights load in a moment, and the reference scans are the ones that run here.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"tokenizer": tokenizer} if tokenizer else {}
    if processes.count() > 1:  # each process that accelerate or torchrun has started has a device
        from accelerate import PartialState

        options["device"] = PartialState().device
    return Lens.load(model, dtype=dtype, **options)
