"""What tests of pages share."""

from __future__ import annotations

import time
from typing import Any


def until(tab: Any, holds: str, seconds: float = 60) -> None:
    """Wait until an expression holds in a page. (The pages' policy forbids what `wait_for_function` does.)"""
    end = time.monotonic() + seconds
    while not tab.evaluate(holds):
        assert time.monotonic() < end, holds
        tab.wait_for_timeout(10)
