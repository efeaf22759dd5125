"""How far attributions can be trusted: what was said of edges, held against what cutting them exactly changed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mambalens.defaults import TOP
from mambalens.flow.data import FlowData
from mambalens.runs.intervals import LEVEL, RESAMPLES

LEAST = 3
"""Edges that a rank correlation needs."""


def agreement(flow: FlowData) -> pd.DataFrame:
    """How attributions agree with exact cuts, fact by fact.

    Returns:
        model, fact_id; top (strongest edges that were cut), rank_correlation (Spearman's, of attributed and exact
        effects among these), sign_agreement (share of them with the same sign), sampled (edges that were drawn),
        effect_top (the exact effects' absolute values added up over the strongest), effect_rest (the same over all
        others, estimated from those drawn), share_rest (effect_rest / (effect_top + effect_rest)).
    """
    from scipy import stats  # takes as long to import as a model takes to load

    rows = []
    for (model, fact_id), edges in flow.table.groupby(["model", "fact_id"], sort=False, observed=True):
        strong = edges[edges.chosen == "top"]
        if not len(strong):
            cut = edges[edges.chosen == "all"]
            strong = cut.iloc[np.argsort(-cut.attributed.abs().to_numpy(), kind="stable")[:TOP]]
        others = edges.drop(strong.index)
        drawn = others[others.chosen.isin(["sample", "all"])]
        of_top = float(strong.exact.abs().sum())
        of_rest = float(drawn.exact.abs().mean()) * len(others) if len(drawn) else np.nan
        several = len(strong) >= LEAST and strong.attributed.nunique() > 1 and strong.exact.nunique() > 1
        rows.append((
            model, fact_id, len(strong),
            float(stats.spearmanr(strong.attributed, strong.exact).statistic) if several else np.nan,
            float((np.sign(strong.attributed) == np.sign(strong.exact)).mean()) if len(strong) else np.nan,
            len(drawn), of_top, of_rest, of_rest / (of_top + of_rest) if of_top + of_rest > 0 else np.nan,
        ))  # fmt: skip
    names = ["model", "fact_id", "top", "rank_correlation", "sign_agreement", "sampled", "effect_top", "effect_rest",
             "share_rest"]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


MEASURED = ("rank_correlation", "sign_agreement", "share_rest")
"""What a certificate says of a fact."""


def summary(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Medians and means over facts with 95 % bootstrap intervals, one row per model and number.

    Args:
        table: from `agreement`.
        seed: of the resamples.

    Returns:
        model, measured (a name of `MEASURED`), facts, median, median_low, median_high, mean, mean_low, mean_high.
    """
    rows = []
    for model, facts in table.groupby("model", sort=False):
        for name in MEASURED:
            values = facts[name].dropna().to_numpy(float)
            numbers: list[float] = []
            for of in (np.median, np.mean):
                if len(values):
                    drawn = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values)))
                    ends = np.percentile(of(drawn, axis=1), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
                    numbers += [float(of(values)), *map(float, ends)]
                else:
                    numbers += [np.nan] * 3
            rows.append((model, name, len(values), *numbers))
    names = ["model", "measured", "facts", "median", "median_low", "median_high", "mean", "mean_low", "mean_high"]
    return pd.DataFrame(rows, columns=names)
