"""Whose turn it is in a notebook: a cell's, or a question's that a widget asks; never both, since they share models.

A knockout is hooks on the model itself. Were a question to run in its thread while a cell runs in the kernel's, each
would have the other's cuts, and numbers would be wrong without a word. So a question waits while a cell runs, and a
cell that begins ends the question at its next layer; it is asked again behind the cell.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """A turn is one question's, or all running cells' (a notebook with subshells may run several)."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._cells = 0
        self._stop: threading.Event | None = None

    def cell_begins(self, *_: Any) -> None:
        """Returns when no question runs."""
        with self._changed:
            self._cells += 1
            if self._stop is not None:
                self._stop.set()
            self._changed.wait_for(lambda: self._stop is None)

    def cell_ends(self, *_: Any) -> None:
        """The last cell that ends gives the turn away."""
        with self._changed:
            # The cell in which the first widget is made began before anybody counted.
            self._cells = max(0, self._cells - 1)
            self._changed.notify_all()

    @property
    def taken(self) -> bool:
        """Whether a cell runs."""
        return self._cells > 0

    @contextmanager
    def question(self, stop: threading.Event) -> Iterator[None]:
        """A question's turn.

        Args:
            stop: set when a cell wants the turn.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._cells and self._stop is None)
            self._stop = stop
        try:
            yield
        finally:
            with self._changed:
                self._stop = None
                self._changed.notify_all()


TURNS = Turns()
"""Of this process: all widgets share it, since they may share a model."""


def shell() -> Any:
    """The notebook's IPython, where cells can be heard to begin and to end; None elsewhere."""
    import sys

    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    found = get_ipython()
    return found if getattr(found, "kernel", None) is not None else None


def listen(notebook: Any) -> None:
    """Hear a notebook's cells, from now on and once."""
    if getattr(notebook, "mambalens_turns", None) is TURNS:
        return
    notebook.mambalens_turns = TURNS
    notebook.events.register("pre_execute", TURNS.cell_begins)
    notebook.events.register("post_execute", TURNS.cell_ends)
    # This one runs, and its end will be heard.
    parent = notebook.get_parent()
    if parent.get("header", {}).get("msg_type", "execute_request") == "execute_request":
        TURNS.cell_begins()
