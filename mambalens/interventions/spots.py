"""Where the prompts of a batch are patched: single positions or roles, each with what the table calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mambalens.facts.pieces import piece_of
from mambalens.facts.prompts import Prompt
from mambalens.facts.roles import check_role
from mambalens.hooks.errors import MambalensError
from mambalens.runs.table import ROLE

EACH = "each"
Where = str | int | Sequence[str | int]
"""'each', roles, or positions, negative ones from the end."""


class Place(NamedTuple):
    """Positions of one prompt that are patched together."""

    positions: tuple[int, ...]
    """Empty where the prompt has none of the role."""
    position: int
    """What the table says: the position, or `ROLE`."""
    role: str
    """'each', or the role."""
    piece: str
    """What the position is, or the role."""


def check_positions(positions: Where) -> tuple[str | int, ...]:
    """Where to patch, as a tuple.

    Raises:
        MambalensError: for an unknown role, or none.
    """
    found = (positions,) if isinstance(positions, str | int) else tuple(positions)
    if not found:
        raise MambalensError("positions is empty: give 'each', a role or a position.")
    for one in found:
        if isinstance(one, str):
            check_role(one)
    return found


def places_of(prompt: Prompt, positions: Sequence[str | int]) -> Iterator[Place]:
    """Where one prompt is patched, each on its own.

    Raises:
        MambalensError: for a position that it does not have.
    """
    time, pieces = len(prompt.ids), piece_of(prompt)
    for one in positions:
        if one == EACH:
            yield from (Place((at,), at, EACH, pieces[at]) for at in range(time))
        elif isinstance(one, str):
            yield Place(tuple(prompt.positions(one, [time - 1])), ROLE, one, one)
        else:
            if not -time <= one < time:
                raise MambalensError(
                    f"positions has {one}, but the prompt {prompt.fact.prompt!r} has {time} tokens: "
                    f"give {-time} to {time - 1}."
                )
            yield Place((one % time,), one % time, EACH, pieces[one % time])


def differs(prompt: Prompt, other: Prompt, places: Sequence[int], others: Sequence[int]) -> bool:
    """Whether something else may stand at positions of another prompt: not where all up to there is the same."""
    return any(
        at != there or prompt.ids[: at + 1] != other.ids[: at + 1] for at, there in zip(places, others, strict=True)
    )
