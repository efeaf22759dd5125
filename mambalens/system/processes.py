"""Processes that share a run, as accelerate and torchrun start them: they say who is who in the environment."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes share the run."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def first() -> bool:
    """Whether this is the process that speaks for all."""
    return rank() == 0
