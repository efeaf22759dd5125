"""The one place where tests ask the replay engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from mambalens.hooks import HookManager, Values
from mambalens.hooks.knockout import Features, Path
from mambalens.sweep.replay import UNCUT, Replay, Row


class Replayed(NamedTuple):
    """A knockout to replay, in the words of `HookManager.knockout`; its source is one of the batch's source sets."""

    source: int
    layers: Sequence[int]
    features: Features = "all"
    path: Path = "main"
    mixers: str | None = None


def replayed(
    hooks: HookManager, ids: Tensor, last: Tensor, sources: Tensor, targets: Tensor, knockouts: Iterable[Replayed],
    memory: int = 2**30, instead: Values | None = None,
) -> dict[int, Tensor]:  # fmt: skip
    """Logits behind the last tokens by number: 0 cuts nothing, then one for every knockout [batch, vocabulary].

    Args:
        hooks: the model's hook manager.
        ids: [batch, T].
        last: last position of every prompt [batch].
        sources: source sets [sets, batch, T].
        targets: [batch, T].
        knockouts: what to replay.
        memory: bytes to plan with.
        instead: what stands in the place of what is cut.
    """
    cuts = [UNCUT]
    for source, layers, features, path, mixers in knockouts:
        cutting = hooks.resolve(layers, features, path, mixers)
        cuts.append(Row(cutting if instead is None else cutting.replacing(), ((source + 1, 0),)))
    found = dict(Replay(hooks, ids, last, sources, targets, memory, instead).logits(cuts))
    assert sorted(found) == list(range(len(cuts)))
    return found
