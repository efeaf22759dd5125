"""How much memory a sweep may use."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn

from mambalens.hooks.errors import MambalensError

SHARE = 0.5
"""Of what is free, by default: other jobs grow too."""
LEAST = 2**20
LEARNT_FROM = 2**25 - 2**13
"""Bytes: glibc's limit, 32 MiB, less what it adds to a tensor itself."""


def budget(memory: int | str | None, device: torch.device) -> int:
    """Bytes that a sweep may use beside the model.

    Args:
        memory: bytes, text like '4GB' or '500MiB', or None for `SHARE` of what is free on the device.
        device: where the model takes its input.

    Raises:
        MambalensError: for text that is no size, or less than a mebibyte.
    """
    return max(LEAST, int(SHARE * free(device))) if memory is None else size_of(memory)


def size_of(memory: int | str) -> int:
    """Bytes that were asked for, as a number or as text like '4GB'.

    Raises:
        MambalensError: for text that is no size, or less than a mebibyte.
    """
    try:
        size = convert_file_size_to_int(memory) if isinstance(memory, str) and not memory.isdigit() else int(memory)
    except (ValueError, TypeError):
        raise MambalensError(f"memory={memory!r} is not a size: give bytes, or text like '4GB' or '500MiB'.") from None
    if size < LEAST:
        raise MambalensError(f"memory={memory!r} is less than a mebibyte, which no model can work with.")
    return size


def widest(layers: Iterable[nn.Module]) -> int:
    """The longest side of any matrix in some layers: how wide what they keep of a position may be."""
    return max((max(p.shape) for layer in layers for p in layer.parameters() if p.ndim == 2), default=1)


def keep_pages() -> None:
    """Let this process keep memory that tensors on the CPU give back, up to 64 MB, instead of asking for it anew.

    glibc asks the system for anything that is larger than the largest it has been given back so far, and returns what
    is free beyond twice that size: fresh pages each time, for which the system took 0.4 of 4.8 s of a sweep of Mamba-1
    130M, and then 0.1. A tensor that is never touched, of the largest size it learns from, costs nothing. Other
    allocators are as they are.
    """
    torch.empty(LEARNT_FROM, dtype=torch.uint8)


def free(device: torch.device) -> int:
    """Free bytes on a device; in a control group (a container, a batch job) those that its limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the limits of this process's control group (version 2) and those around it leave."""
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    left, folder = [], root / path.strip("/")
    for group in (folder, *folder.parents):
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
                left.append(max(0, int(limit) - used))
        except (OSError, ValueError):
            continue
    return left


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
