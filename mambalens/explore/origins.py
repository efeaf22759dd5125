"""How the lenses of a page were loaded, as its program loads them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mambalens.explore.state import Loaded
from mambalens.facts.files import BUNDLED, ELSEWHERE
from mambalens.loading.origin import short, whole

if TYPE_CHECKING:
    from mambalens.explore.asked import Lens


def loaded(lenses: Mapping[str, Lens], facts: str | None) -> Loaded:
    """How lenses were loaded.

    Args:
        lenses: the lenses, by their names in the page.
        facts: name or path of the facts that means are taken over; None where they have none.
    """
    given: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {}
    notes: dict[str, str] = {}
    for name, lens in lenses.items():
        origin = lens.origin
        if origin is None:
            given[name], options[name] = name, {}
            notes[name] = f"{name!r} was made of a model object: put its lens in the place of Lens.load."
            continue
        given[name], options[name] = origin.name, dict(origin.options)
        said = [f"{option}= of Lens.load is an object and left out here" for option in origin.left_out]
        if (now := short(lens.model.dtype)) != origin.dtype:
            said.append(f"it was cast from {origin.dtype} to {now} since: lens.model.to(torch.{now}) does so here")
        if (device := str(lens.device)) != origin.device and "device_map" not in origin.options:
            options[name]["device"] = device
        if said:
            notes[name] = f"{name!r}: {'; '.join(said)}."
    return Loaded(given, None if facts is None else _named(facts), options, notes)


def _named(facts: str) -> str:
    """Facts by their name, or by their file's whole path."""
    return facts if facts in (*BUNDLED, *ELSEWHERE) else whole(facts)
