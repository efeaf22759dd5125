"""Features: how slowly they decay, how much they carry between tokens, and what knocking them out costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mambalens.figures.style import style
from mambalens.hooks.errors import MambalensError

if TYPE_CHECKING:
    from mambalens.features.causal import CausalData

LABELS = {
    "decay_norm": "Decay norm",
    "half_life": "Half-life (tokens)",
    "exchange_share": "Exchange share, all tokens",
    "exchange_share_last": "Exchange share, last token",
    "enrichment_share": "Enrichment share, all tokens",
    "enrichment_share_last": "Enrichment share, last token",
}
"""What axes call the measures of `Lens.features`."""
_GROUPS = ("slow", "middle", "fast")


def decay_spectrum(table: pd.DataFrame, measure: str = "decay_norm") -> Figure:
    """Every feature's decay norm by layer, in the order of falling decay norm, the cuts between the thirds marked.

    Args:
        table: of one model, from `Lens.features`.
        measure: 'decay_norm', or 'half_life' to see how the groups by decay norm differ in what the data does.
    """
    rows = table[table.decay_norm.notna()]
    if not len(rows):
        raise MambalensError("No feature in the table has a decay norm: there is no spectrum to draw.")
    if measure not in rows:
        raise MambalensError(f"The table has no {measure!r}: call features with facts.")
    layers = list(rows.layer.unique())
    columns = min(6, len(layers))
    height = -(-len(layers) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(1.75 * columns + 1.4, 1.5 * height + 1.0), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    size = 22 if len(rows) < 40 * len(layers) else 5
    for axis, layer in zip(axes.flat, layers, strict=False):
        of_layer = rows[rows.layer == layer].sort_values("decay_norm", ascending=False, kind="stable")
        position = np.linspace(0, 100, len(of_layer)) if len(of_layer) > 1 else np.zeros(1)
        for group in _GROUPS:
            inside = (of_layer.group == group).to_numpy()
            colour, marker = style(group)
            handles[group] = axis.scatter(
                position[inside], of_layer[measure][inside], color=colour, marker=marker, s=size, linewidth=0
            )
            last = inside.nonzero()[0]
            if group != "fast" and len(last) and last[-1] + 1 < len(position):
                axis.axvline((position[last[-1]] + position[last[-1] + 1]) / 2, color="#999999", linewidth=0.8)
        axis.set_title(f"layer {layer}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if measure == "half_life":
            axis.set_yscale("log")
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    figure.supxlabel("Features by falling decay norm (% of the layer's)", fontsize=9)
    figure.supylabel(LABELS.get(measure, measure), fontsize=9)
    figure.suptitle(f"{_models(table)}: {LABELS.get(measure, measure).lower()} of every feature", fontsize=10)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        markerscale=3 if size < 20 else 1,
    )
    plt.close(figure)
    return figure


def shares_by_layer(table: pd.DataFrame, measure: str = "exchange_share_last") -> Figure:
    """A share by layer: median over features and the middle half, by group; a panel for each model.

    Args:
        table: from `Lens.features` with facts; of several models, put together.
        measure: one of the shares, or 'half_life'.
    """
    if measure not in table:
        raise MambalensError(f"The table has no {measure!r}: call features with facts.")
    if not table[measure].notna().any():
        raise MambalensError(f"No feature in the table has a {measure!r}.")
    models = list(table.model.unique())
    figure, axes = plt.subplots(
        1, len(models), figsize=(max(3.4 * len(models) + 1.4, 5.6), 3.3), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for axis, model in zip(axes.flat, models, strict=True):
        rows = table[(table.model == model) & table[measure].notna()]
        for group, part in rows.groupby("group", sort=False):
            name = str(group) or "all"
            colour, marker = style(name)
            quartiles = part.groupby("layer")[measure].quantile([0.25, 0.5, 0.75]).unstack()
            drawn = axis.plot(
                quartiles.index, quartiles[0.5], color=colour, marker=marker, markersize=4.5, linewidth=1.6,
                markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
            axis.fill_between(quartiles.index, quartiles[0.25], quartiles[0.75], color=colour, alpha=0.15, linewidth=0)
            handles[name] = drawn[0]
        axis.set_title(f"{model}, {', '.join(rows.kind.unique())}", fontsize=9)
        axis.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if measure == "half_life":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    ordered = {name: handles[name] for name in (*_GROUPS, "all") if name in handles}
    figure.supxlabel("Layer", fontsize=9)
    figure.supylabel(LABELS.get(measure, measure), fontsize=9)
    figure.suptitle("Median and middle half of a group's features", fontsize=10)
    figure.legend(
        ordered.values(), ordered.keys(), loc="outside right center", frameon=False, fontsize=9, title="features"
    )
    plt.close(figure)
    return figure


def causal_scatter(causal: CausalData, by: str = "exchange_share_last") -> Figure:
    """What each feature (or block) costs when it is knocked out alone, by a measure of it; colour is the layer."""
    rho = causal.correlation(by).iloc[0]  # refuses what is no measure
    table = causal.table[causal.table[by].notna()]
    if not len(table):
        raise MambalensError(f"No feature of the table has a value of {by!r}.")
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axis.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    if len(table) <= 200:
        error = np.abs(table[["low", "high"]].to_numpy().T - table.drop_pct.to_numpy())
        axis.errorbar(table[by], table.drop_pct, yerr=error, fmt="none", ecolor="#BBBBBB", elinewidth=0.8, zorder=1)
    points = axis.scatter(
        table[by], table.drop_pct, c=table.layer, cmap="viridis", s=26 if len(table) <= 200 else 12, zorder=2,
        edgecolor="white", linewidth=0.4,
    )  # fmt: skip
    # Effects span orders of magnitude and both signs.
    reach = float(table.drop_pct.abs().max())
    if reach > 0:
        axis.set_yscale("symlog", linthresh=max(reach * 1e-3, 1e-9))
    lines = ["costs most"]
    dearest = table.sort_values("drop_pct", ascending=False).head(3)
    for layer, block, features, drop in dearest[["layer", "block", "features", "drop_pct"]].to_numpy():
        name = f"feature {features[0]}" if len(features) == 1 else f"block {block}"
        lines.append(f"layer {layer}, {name}: {drop:.2g} %")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}
    axis.text(0.02, 0.97, "\n".join(lines), transform=axis.transAxes, fontsize=7.5, va="top", bbox=box)
    if by == "half_life":
        axis.set_xscale("log")
    axis.set_xlabel(LABELS.get(by, by))
    axis.set_ylabel("Drop of the target's probability (%)")
    what = "feature" if (table.n_features == 1).all() else f"block of {table.n_features.max()} features"
    axis.set_title(
        f"{_models(table)}: {causal.source} → {causal.target} knocked out, one {what} at a time\n"
        f"rank correlation {rho.rho:.2f} [{rho.low:.2f}, {rho.high:.2f}], {len(causal.drops)} facts",
        fontsize=10,
    )
    axis.grid(color="#EEEEEE", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.colorbar(points, ax=axis, label="Layer", ticks=MaxNLocator(integer=True))
    plt.close(figure)
    return figure


def _models(table: pd.DataFrame) -> str:
    return ", ".join(table.model.unique())
