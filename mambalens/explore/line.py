"""Questions in line: one is answered at a time, and a newer one of the same page takes an older one's place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from mambalens.hooks.errors import MambalensError

LONGEST = 64
"""Questions that may wait."""
LOOK = 0.2
"""Seconds between two looks whether anybody waits."""


class Dropped(Exception):
    """Nobody waits for this answer any more."""


class _Place(NamedTuple):
    future: Future[Any]
    gone: threading.Event


class Line:
    """One thread that runs models, and who waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "explore")
        self._places: dict[Hashable, _Place] = {}

    async def ask(
        self,
        key: Hashable,
        work: Callable[[threading.Event], Any],
        left: Callable[[], Awaitable[bool]],
    ) -> Any:
        """Wait in line and have some work done.

        Args:
            key: who asks for what; a newer question of the same key drops this one.
            work: called in the thread, with an event that is set when the answer is not wanted any more.
            left: whether nobody waits any more.

        Raises:
            Dropped: the question was dropped.
            MambalensError: too many questions wait, or what the work raises.
        """
        self.drop(key)
        if len(self._places) >= LONGEST:
            raise MambalensError("Too many questions wait: ask again in a moment.")
        gone = threading.Event()
        place = _Place(self._thread.submit(work, gone), gone)
        self._places[key] = place
        done = asyncio.wrap_future(place.future)
        try:
            while not (await asyncio.wait({done}, timeout=LOOK))[0]:
                if await left():
                    self._let_go(place)
            return done.result()
        except (CancelledError, asyncio.CancelledError):
            if place.gone.is_set():
                raise Dropped from None
            raise
        finally:
            done.cancel()  # where the wait itself was ended, nobody hears what becomes of the work
            self._let_go(place)
            if self._places.get(key) is place:
                del self._places[key]

    def drop(self, key: Hashable) -> None:
        """Nobody waits for this one any more: it does not begin, or ends at its next layer."""
        if place := self._places.get(key):
            self._let_go(place)

    def close(self) -> None:
        """Drop everything; what runs ends at its next layer."""
        for place in self._places.values():
            self._let_go(place)
        self._thread.shutdown(cancel_futures=True)

    @staticmethod
    def _let_go(place: _Place) -> None:
        place.gone.set()
        place.future.cancel()
