"""How softmax attention reads: what passes through a module's attention, and other keys and values beside its own.

Most modules of transformers read by a function of their file; the rest by code of their own, behind their cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

EAGER = "eager_attention_forward"
"""Name under which a file of transformers has the function by which its eager attention reads."""


class Probe:
    """What passes through one attention call. It takes the place of the cache: keys and values pass there."""

    keys: Float[Tensor, "batch group time width"]
    values: Float[Tensor, "batch group time value_width"]
    output: Float[Tensor, "batch time head_width"]

    def update(
        self,
        keys: Float[Tensor, "batch group time width"],
        values: Float[Tensor, "batch group time value_width"],
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "batch group time width"], Float[Tensor, "batch group time value_width"]]:
        """As a cache that was empty."""
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        """Tokens of earlier passes."""
        return 0


class Other(NamedTuple):
    """Keys and values in the place of some of a module's own."""

    keys: Float[Tensor, "batch group key width"] | None
    """None: the own ones."""
    values: Float[Tensor, "batch group key value_width"]
    entries: Bool[Tensor, " batch #feature query key"]
    """Which entries of effective attention read these values."""


class Beside(NamedTuple):
    """Other keys and values behind a module's own, and a mask over all of them.

    Equation: Ablation
        y_t = sum_s alpha[t, s] v_s - sum_{s in S} alpha[t, s] (v_s - v~_s)    for t in T

        Source: this package, as for scans

        Of one head of attention: a softmax over the own columns without S and the other columns of S alone, whose keys
        are the own ones, so that alpha is what it was. Where keys are replaced too, their scores are theirs.
    """

    others: tuple[Other, ...]
    mask: Float[Tensor, " batch #feature query keys"]
    """Added to the scores, over the own columns and those of each of the others."""

    @classmethod
    def of(cls, others: list[Other], mask: Float[Tensor, " #batch #feature query key"]) -> Beside:
        """Those of several knockouts; where they meet, the last one's are read.

        Args:
            others: what each puts in.
            mask: the module's own, added to the scores.
        """
        low = torch.finfo(mask.dtype).min
        taken = torch.zeros((), dtype=torch.bool, device=mask.device)
        parts = []
        for other in reversed(others):
            parts.append(torch.where(other.entries & ~taken, mask, low))
            taken = taken | other.entries
        parts.append(torch.where(taken, low, mask))
        return cls(tuple(others), torch.cat(torch.broadcast_tensors(*parts[::-1]), -1))  # some of heads, some of all

    def joined(
        self, keys: Float[Tensor, "batch group key width"], values: Float[Tensor, "batch group key value_width"]
    ) -> tuple[Float[Tensor, "batch group keys width"], Float[Tensor, "batch group keys value_width"]]:
        """A module's keys and values with the others behind them."""
        other_keys = [keys if other.keys is None else other.keys.to(keys.dtype) for other in self.others]
        return (
            torch.cat([keys, *other_keys], 2),
            torch.cat([values, *(other.values.to(values.dtype) for other in self.others)], 2),
        )


class BesideCache:
    """Stands in for a cache: others stand behind the keys and values that pass."""

    def __init__(self, cache: Any, beside: Beside) -> None:
        self.cache, self.beside = cache, beside

    def update(
        self,
        keys: Float[Tensor, "batch group time width"],
        values: Float[Tensor, "batch group time value_width"],
        *_: Any,
        **__: Any,
    ) -> tuple[Float[Tensor, "batch group all_time width"], Float[Tensor, "batch group all_time value_width"]]:
        """Keys and values as the cache gives them, the others behind them."""
        return self.beside.joined(*self.cache.update(keys, values))

    def get_seq_length(self, *_: Any) -> int:
        """Tokens of earlier passes."""
        return 0


def reads_by_function(attention: nn.Module) -> bool:
    """Whether a function of the module's file reads."""
    return EAGER in vars(sys.modules[type(attention).__module__])


@contextmanager
def around_reading(attention: nn.Module, around: Callable[..., tuple[Tensor, Any]]) -> Iterator[bool]:
    """While the block runs, something stands around the function by which the module reads, if it has one.

    Some models gate what was read before the output projection, and some keep values in a compressed form in their
    cache (multi-head latent attention): there it is not gated yet, and values are whole.

    Args:
        attention: the module, whose attention is eager meanwhile.
        around: called in the function's place with the function and its arguments: module, queries, keys, values, mask
            and so on; gives what it would, what was read and the weights.

    Yields:
        Whether it has one.
    """
    home = vars(sys.modules[type(attention).__module__])
    reads: Any = home.get(EAGER)
    if reads is None:
        yield False
        return

    def changed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(reads, module, *args, **kwargs) if module is attention else reads(module, *args, **kwargs)

    home[EAGER] = changed
    try:
        yield True
    finally:
        home[EAGER] = reads


@contextmanager
def watched_reading(attention: nn.Module, probe: Probe) -> Iterator[None]:
    """While the block runs, the probe gets what the heads read, their keys and values from the function that reads."""

    def watch(
        reads: Any, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, *args: Any, **more: Any
    ) -> Any:
        read, weights = reads(module, query, keys, values, *args, **more)
        probe.keys, probe.values, probe.output = keys, values, read.flatten(2)
        return read, weights

    with around_reading(attention, watch):
        yield


@contextmanager
def changed_reading(attention: nn.Module, change: Callable[..., Tensor]) -> Iterator[bool]:
    """While the block runs, what the heads read goes through a function, with their weights and values before it.

    Yields:
        Whether a function of the module's file reads.
    """

    def around(
        reads: Any, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, *args: Any, **more: Any
    ) -> Any:
        read, weights = reads(module, query, keys, values, *args, **more)
        return change(weights, values, read), weights

    with around_reading(attention, around) as found:
        yield found


@contextmanager
def others_beside(attention: nn.Module, beside: Beside) -> Iterator[bool]:
    """While the block runs, the function that reads finds others behind its keys and values.

    Yields:
        Whether a function of the module's file reads.
    """

    def around(
        reads: Any, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, *args: Any, **more: Any
    ) -> Any:
        keys, values = beside.joined(keys, values)
        if args:
            args = (beside.mask, *args[1:])
        else:
            more = more | {"attention_mask": beside.mask}
        return reads(module, query, keys, values, *args, **more)

    with around_reading(attention, around) as found:
        yield found
