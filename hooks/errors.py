"""The one error class of the project, and the near matches its sentences offer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MambalensError(ValueError):
    """Something the user can put right; the message quotes the input and says what to do."""


def choose(word: object, options: Iterable[str]) -> str:
    """End of a sentence that lists `options`, the ones nearest to `word` first.

    >>> choose("slwo", ["all", "slow", "fast"])
    "did you mean 'slow'? Known: all, slow, fast"
    """
    known = list(options)
    near = difflib.get_close_matches(str(word), known, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(repr(match) for match in near)}? " if near else ""
    return f"{meant}Known: {', '.join(known)}"
