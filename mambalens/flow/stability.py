"""Whether circuits of some facts are those of others: how halves of the facts agree on the kinds of their edges.

Positions differ between prompts, so edges are held against each other by what they are: layer, mixer, path and the
pieces of the prompt that they connect.
"""

from __future__ import annotations

import zlib

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from mambalens.flow.data import FlowData
from mambalens.flow.table import EDGE
from mambalens.hooks.errors import MambalensError
from mambalens.runs.intervals import LEVEL

CLASS = ["layer", "mixer", "path", "source_piece", "target_piece"]
"""What makes edges of different prompts the same."""


def stability(flow: FlowData, circuits: pd.DataFrame, splits: int = 100, seed: int = 0) -> pd.DataFrame:
    """How circuits of random halves of the facts agree, and how random edges would.

    Args:
        flow: every edge of the facts.
        circuits: from `Flow.circuit`, or the part of it that is asked about.
        splits: how often the facts are halved.
        seed: of the halves and of the random edges.

    Returns:
        One row per model: model, facts (those that have a circuit), splits, agreement (mean over the splits, 1 for the
        same, 0 for nothing in common), agreement_low, agreement_high (between which 95 % of the splits lie), by_chance,
        by_chance_low, by_chance_high (the same of as many edges of each fact, drawn at random for every split).

    Raises:
        MambalensError: if a model has fewer than two facts with a circuit, or a circuit an edge that the flow has not.
    """
    if splits < 1:
        raise MambalensError(f"splits={splits}: halve the facts once or more.")
    missing = [name for name in ("model", "fact_id", *EDGE) if name not in circuits]
    if missing:
        raise MambalensError(f"The circuits have no {' and no '.join(missing)}: give what flow.circuit() gives.")
    rows = []
    for model, of_model in circuits.groupby("model", sort=False, observed=True):
        ids = list(dict.fromkeys(of_model.fact_id))
        if len(ids) < 2:
            raise MambalensError(f"Circuits of {model!r} are there for {len(ids)} fact: halves need two or more.")
        edges = flow.table[(flow.table.model == model) & flow.table.fact_id.isin(ids)]
        edges = edges.assign(number=edges.groupby(CLASS, observed=True).ngroup())
        inside = of_model[["fact_id", *EDGE]].merge(edges, "left", ["fact_id", *EDGE])
        if inside.number.isna().any():
            lost = inside[inside.number.isna()].iloc[0]
            raise MambalensError(
                f"The flow has no edge {tuple(lost[list(EDGE)])} of {lost.fact_id!r} in {model!r}, which is in its "
                "circuit: give circuits of this flow."
            )
        classes = int(edges.number.max()) + 1
        drawn_from = [edges.number[edges.fact_id == fact].to_numpy() for fact in ids]
        found = [inside.number[inside.fact_id == fact].to_numpy(int) for fact in ids]
        draw = np.random.default_rng([seed, zlib.crc32(str(model).encode())])
        agreements, by_chance = [], []
        for _ in range(splits):
            half = np.isin(np.arange(len(ids)), draw.choice(len(ids), len(ids) // 2, replace=False))
            random = [draw.choice(every, len(some), replace=False)
                      for every, some in zip(drawn_from, found, strict=True)]  # fmt: skip
            agreements.append(agreement_of(_present(found, classes), half))
            by_chance.append(agreement_of(_present(random, classes), half))
        rows.append((model, len(ids), splits, *_spread(agreements), *_spread(by_chance)))
    names = ["model", "facts", "splits", "agreement", "agreement_low", "agreement_high", "by_chance", "by_chance_low",
             "by_chance_high"]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def agreement_of(present: Bool[np.ndarray, "fact class"], half: Bool[np.ndarray, " fact"]) -> float:
    """How two halves of the facts agree on the classes of their edges.

    Equation: Circuits
        agreement(H, H') = sum_c min(p_c(H), p_c(H')) / sum_c max(p_c(H), p_c(H'))

        Source: Jaccard 1912, The distribution of the flora in the alpine zone, with weights

        p_c(H) is the share of the facts of half H whose circuit has an edge of class c: a layer, mixer, path and pair
        of pieces.

    Args:
        present: which classes each fact has; some fact has one.
        half: which facts are in the first half; some, and not all.
    """
    shares = present[half].mean(0), present[~half].mean(0)
    return float(np.minimum(*shares).sum() / np.maximum(*shares).sum())


def _present(classes: list[Int[np.ndarray, " _"]], count: int) -> Bool[np.ndarray, "fact class"]:
    """Which classes each fact has."""
    present = np.zeros((len(classes), count), bool)
    for row, of_fact in zip(present, classes, strict=True):
        row[of_fact] = True
    return present


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Mean, and between what most of the values lie."""
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(np.mean(values)), float(low), float(high)
