"""A widget's questions, one at a time, in a thread of their own or in the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mambalens.explore.line import LONGEST, Dropped
from mambalens.explore.turns import TURNS, Turns
from mambalens.hooks.errors import MambalensError


class Queue:
    """Who waits for an answer.

    Args:
        threaded: run in a thread, so that a question can be dropped while it runs; else in the caller's, one after
            the other.
        turns: whose turn it is.
    """

    def __init__(self, threaded: bool, turns: Turns = TURNS) -> None:
        self._thread = ThreadPoolExecutor(1, "explore") if threaded else None
        self._turns = turns
        self._lock = threading.Lock()
        self._waiting: dict[Hashable, _Place] = {}

    def put(self, key: Hashable, work: Callable[[threading.Event], Any], done: Callable[[Any], None]) -> None:
        """Have some work done.

        Args:
            key: who asks for what; a newer question of the same key drops this one.
            work: called with an event that is set when the answer is not wanted any more.
            done: called with what the work gives, or with the exception that it raises; `Dropped` where it was dropped.

        Raises:
            MambalensError: if too many questions wait.
        """
        place = _Place()
        with self._lock:
            if key in self._waiting:
                self._waiting.pop(key).drop()
            if len(self._waiting) >= LONGEST:
                raise MambalensError("Too many questions wait: ask again in a moment.")
            self._waiting[key] = place

        def run() -> None:
            done(self._outcome(place, work))
            with self._lock:
                if self._waiting.get(key) is place:
                    del self._waiting[key]

        if self._thread is None:
            run()
        else:
            self._thread.submit(run)

    def drop(self, key: Hashable) -> None:
        """Nobody waits for this one any more: it does not begin, or ends at its next layer."""
        with self._lock:
            if place := self._waiting.get(key):
                place.drop()

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            for place in self._waiting.values():
                place.drop()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _outcome(self, place: _Place, work: Callable[[threading.Event], Any]) -> Any:
        while not place.dropped:
            stop = place.begin()
            try:
                if self._thread is None:
                    return work(stop)
                with self._turns.question(stop):
                    return work(stop)
            except Dropped:
                continue  # a cell took the turn: asked again behind it, unless nobody waits
            except Exception as error:
                return error
        return Dropped()


class _Place:
    def __init__(self) -> None:
        self.dropped = False
        self._stop = threading.Event()

    def begin(self) -> threading.Event:
        """The event that ends one try."""
        self._stop = threading.Event()
        if self.dropped:
            self._stop.set()
        return self._stop

    def drop(self) -> None:
        self.dropped = True
        self._stop.set()
