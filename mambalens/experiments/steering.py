"""Does the direction from one set of facts to another turn the answers of the one into those of the other?"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd

from mambalens.defaults import TARGET
from mambalens.facts.pairs import Pair, Pairs
from mambalens.facts.sequence import Facts
from mambalens.hooks.errors import MambalensError
from mambalens.lens import Lens
from mambalens.runs.intervals import mean_intervals

BETWEEN = ("model", "layer", "facts", "base_hit", "hit", "changed", "base_other_hit", "other_hit", "low", "high")
"""Columns of the experiment: shares of facts; low and high are the 95 % bootstrap interval of other_hit."""


def between(
    lens: Lens,
    positive: Facts,
    negative: Facts,
    layers: Sequence[int] | None = None,
    positions: str = TARGET,
    scale: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Steer the facts of one set with the direction to another, layer by layer.

    The subjects that both have are parted in two halves, drawn with `seed`. The direction is taken from the facts of
    the one half, and added to those of the other, so that no fact is steered with what it has given itself.

    Args:
        lens: model and tokenizer.
        positive: facts that the direction leads to, such as capitals.
        negative: facts that it leads away from, and that are steered, such as languages of the same countries.
        layers: layers behind which it is taken and added, each on its own; None: every layer.
        positions: role at which it is taken and added.
        scale: how many times it is added.
        seed: of the halves.
        batch_size: prompts a batch.

    Returns:
        One row a layer; columns in `BETWEEN`: how many facts are steered, the share of them that is answered right
        without (base_hit) and with the direction (hit), whose answer changes, and that is answered as the positive fact
        of the same subject is (base_other_hit, other_hit with its interval).

    Raises:
        MambalensError: where fewer than four subjects have facts on both sides.
    """
    of_subject = {fact.subject: fact for fact in positive}
    subjects = list(dict.fromkeys(fact.subject for fact in negative if fact.subject in of_subject))
    if len(subjects) < 4:
        raise MambalensError(
            f"Subjects with facts on both sides: {len(subjects)}. It takes 4, two to give the direction and two to "
            "steer."
        )
    random.Random(seed).shuffle(subjects)
    known, asked = set(subjects[: len(subjects) // 2]), set(subjects[len(subjects) // 2 :])
    leads_to, leads_away = ([fact for fact in side if fact.subject in known] for side in (positive, negative))
    numbers = list(range(lens.n_layers)) if layers is None else list(layers)
    directions = lens.direction(leads_to, leads_away, numbers, positions, batch_size)
    pairs = Pairs([Pair(fact, of_subject[fact.subject]) for fact in negative if fact.subject in asked])
    rows = []
    for layer, direction in zip(numbers, directions, strict=True):
        table = lens.steered(pairs, direction, layer, positions, scale, batch_size, progress=False)
        table = table[table.skipped == ""]
        ((_, low, high),) = mean_intervals([table.other_hit.to_numpy(float)], "bootstrap")
        shares = [float(table[name].mean()) for name in BETWEEN[3:8]]
        rows.append((lens.name, layer, len(table), *shares, low, high))
    return pd.DataFrame(rows, columns=list(BETWEEN))
