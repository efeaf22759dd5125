"""Which rows have a number, where the numbers are known on the CPU: picked on a device without waiting for it."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def having(number: Int[Tensor, " row"], wanted: int, device: torch.device) -> slice | Int[Tensor, " some"]:
    """The rows that have a number, to index tensors of a device by.

    Args:
        number: of every row; on the CPU, whatever the device.
        wanted: the number; some row has it.
        device: where what is indexed lies.
    """
    return to_pick((number == wanted).nonzero().flatten(), device)


def to_pick(rows: Int[Tensor, " some"], device: torch.device) -> slice | Int[Tensor, " some"]:
    """Ascending rows as a slice where they are evenly spaced, which copies nothing; else on the device."""
    found = as_slice(rows)
    return found if isinstance(found, slice) else found.to(device, non_blocking=True)


def as_slice(numbers: Int[Tensor, " some"]) -> slice | Int[Tensor, " some"]:
    """Ascending numbers as a slice where they are evenly spaced; else as they are."""
    first, last, count = int(numbers[0]), int(numbers[-1]), len(numbers)
    step = (last - first) // (count - 1) if count > 1 else 1
    even = torch.arange(first, last + 1, step, device=numbers.device)
    return slice(first, last + 1, step) if torch.equal(even, numbers) else numbers
