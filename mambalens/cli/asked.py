"""What the command line's texts name: facts, features, columns' values, models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mambalens.hooks.errors import MambalensError
from mambalens.system import processes

if TYPE_CHECKING:
    from mambalens.facts.fact import Fact
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


def ablation(
    name: str,
    keys: bool = False,
    over: str | None = None,
    over_where: Sequence[str] = (),
    other: str | None = None,
    other_subject: str | None = None,
    fact: Fact | None = None,
) -> dict[str, Any]:
    """What stands in the place of what is cut, as `Lens.sweep` and `Flow.certify` are told it.

    Args:
        name, keys: the ablation, and whether keys of attention go with the values.
        over, over_where: facts that means are taken over.
        other, other_subject: the prompt whose values are put in, and its subject.
        fact: the one prompt that is asked about, if it is one alone.

    Raises:
        MambalensError: for an unknown ablation, and where what it needs is missing or something has no use for it.
    """
    from mambalens.facts.fact import Fact
    from mambalens.sweep.ablation import Asked

    if over is None and over_where:
        raise MambalensError("--over-where chooses among the facts of --over: give --over too.")
    if (other is None) != (other_subject is None):
        raise MambalensError("The other prompt has a subject: give --other and --other-subject, both or neither.")
    # Its answer is not asked for.
    partner = None if other is None or other_subject is None else Fact(other, other_subject, ".")
    Asked.of(name, other=partner, keys=keys)
    if over is not None and name != "mean":
        raise MambalensError(f"--over names facts that means are taken over, but --ablation is {name}: leave it out.")
    if fact is not None and name == "mean" and over is None:
        raise MambalensError("--ablation mean puts in means over facts, and --prompt is one alone: say which, --over.")
    if fact is not None and name == "resample" and partner is None:
        raise MambalensError(
            "--ablation resample puts in another prompt's values: give it with --other and --other-subject."
        )
    return {"ablation": name, "keys": keys, "other": partner,
            "over": None if over is None else facts(over, over_where)}  # fmt: skip


def conditions(where: Sequence[str], flag: str = "--where") -> dict[str, list[str]]:
    """COLUMN=VALUE texts as columns and what they may be; several values of a column: any of them.

    Args:
        where: the texts.
        flag: the option that has them.

    Raises:
        MambalensError: for a text without an equals sign.
    """
    wanted: dict[str, list[str]] = {}
    for text in where:
        column, equals, value = text.partition("=")
        if not equals:
            raise MambalensError(f"{flag} {text!r} is not COLUMN=VALUE.")
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
