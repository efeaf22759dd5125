"""Prints how many processes the tests may run in: a worker for every core (`make test`)."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

MEMORY = 2e9
"""Bytes that a worker needs at its worst: torch, models, a browser, a clone's wheel."""
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def workers() -> int:
    """Cores that this process may use, of which a container may have fewer than its machine; fewer without memory."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if QUOTA.exists():
        quota, period = QUOTA.read_text().split()
        cores = cores if quota == "max" else min(cores, int(quota) / int(period))
    return max(1, min(round(cores), int(psutil.virtual_memory().available / MEMORY)))


if __name__ == "__main__":
    print(workers())
