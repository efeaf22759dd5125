"""Operator diagnostics of several models side by side."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mambalens.figures.style import style
from mambalens.hooks.errors import MambalensError, choose

TITLES = {
    "sink_share": "First token's share (sink)",
    "mean_distance": "Mean distance (tokens)",
    "effective_rank": "Effective rank",
    "interaction_rank": "Interaction rank",
    "position_dependence": "Variance explained by position",
    "induction_score": "Induction score",
}


def diagnostics(table: pd.DataFrame, group: str = "all") -> Figure:
    """One panel a diagnostic, one line a model, depth across; the recency profile below, one panel a model.

    Args:
        table: from `Lens.diagnose`; of several models, put together.
        group: of features.
    """
    rows = table[table.group == group]
    if not len(rows):
        raise MambalensError(f"group={group!r} is not in the table: {choose(group, table.group.unique())}.")
    rows = rows.assign(depth=100 * rows.layer / rows.n_layers)
    models = list(rows.model.unique())
    figure = plt.figure(figsize=(10.4, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[2, 1.1]).flat
    handles: dict[str, Any] = {}
    for axis, (name, title) in zip(top.subplots(2, 3, sharex=True).flat, TITLES.items(), strict=True):
        for index, model in enumerate(models):
            line = rows[(rows.model == model) & (rows.diagnostic == name)].sort_values("depth")
            colour, marker = style(model, index)
            drawn = axis.plot(line.depth, line.value, color=colour, marker=marker, markersize=4.5, linewidth=1.6,
                              markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
            handles[model] = drawn[0]
        axis.set_title(title, fontsize=9)
        axis.set_ylim(bottom=0)
        _plain(axis)
    top.supxlabel("Depth (%)", fontsize=9)
    top.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9
    )
    recency = rows[rows.diagnostic == "recency"]
    lags = list(recency.lag.unique())
    shades = plt.get_cmap("viridis")
    for axis, model in zip(bottom.subplots(1, len(models), sharey=True, squeeze=False).flat, models, strict=True):
        grid = recency[recency.model == model].pivot(index="layer", columns="lag", values="value")[lags]
        axis.stackplot(
            grid.index,
            grid.to_numpy().T,
            labels=lags,
            colors=[shades(i / max(1, len(lags) - 1)) for i in range(len(lags))],
        )
        axis.set_title(f"{model}: where targets read", fontsize=9)
        axis.set_ylim(0, 1)
        axis.margins(x=0)
        axis.set_xlabel("Layer", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _plain(axis)
        axis.grid(False)
    bottom.supylabel("Share of |alpha|", fontsize=9)
    bottom.legend(
        *axis.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8, title="tokens back"
    )
    plt.close(figure)
    return figure


def _plain(axis: Any) -> None:
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
