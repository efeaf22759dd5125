"""The flow over many facts: which piece of the prompt hands over to which, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mambalens.facts.pieces import PIECES
from mambalens.figures.one import of_one
from mambalens.figures.style import PATH_STYLES, PATHS, main_path, plain, put_in, signed
from mambalens.hooks.errors import MambalensError
from mambalens.runs.intervals import mean_intervals

if TYPE_CHECKING:
    from mambalens.flow.data import FlowData

ROWS = 12
"""Pairs of pieces that are shown."""


class Pieces(NamedTuple):
    """Mean effects of pairs of pieces, the pairs in the order in which they stand in a prompt."""

    pairs: list[tuple[str, str]]
    n: list[int]
    """Facts that have both pieces."""
    total: list[tuple[float, float, float]]
    """Mean over those facts of a pair's effect in all layers and paths, and its 95 % interval."""
    means: dict[str, Float[np.ndarray, "pair layer"]]
    """By path: mean effects over those facts, zero for a fact without such an edge; NaN in a layer without the path."""
    share: float
    """Share that the pairs have of all pairs' mean effects, without signs and by number of facts, in %."""
    of: int
    """Pairs that there are."""
    facts: int


def pieces_of(flow: FlowData, model: str | None = None, features: str | None = None, most: int = ROWS) -> Pieces:
    """The pairs of pieces whose mean effects are largest.

    Args:
        flow: edges of many facts.
        model, features: which, where the flow has several.
        most: pairs that are kept.

    Raises:
        MambalensError: if the flow has no such model or features, several and none was named, or nothing at all.
    """
    table = flow.by_piece()
    if not len(table):
        raise MambalensError("The flow has no edges: there is nothing to add up by pieces.")
    table = of_one(table, "One mean cannot be of", model=model, features=features)
    name = str(table.model.iloc[0])
    layers = max([int(table.layer.max()) + 1, *(one.n_layers for one in flow.configs if one.model == name)])
    pairs = table.source_piece.astype(str) + "\0" + table.target_piece.astype(str)
    # A fact that has both pieces and no edge between them on a path, or in a layer, has an effect of zero there.
    having = table.groupby(pairs).fact_id.nunique()
    sums = table.groupby([pairs.rename("pair"), table.path.astype(str), "layer"]).effect.sum()
    cells = sums.div(having.reindex(sums.index.get_level_values("pair")).to_numpy())
    # Pairs that few facts have matter as little as they are rare.
    weight = (cells.abs().groupby("pair").sum() * having).sort_values(ascending=False, kind="stable")
    order = list(PIECES)
    kept = sorted(weight.index[:most], key=lambda pair: [order.index(piece) for piece in pair.split("\0")])
    totals = table.groupby([pairs.rename("pair"), "fact_id"]).effect.sum()
    means = {}
    for path in (path for path in PATH_STYLES if path in set(table.path)):
        has = np.isin(np.arange(layers), table.layer[table.path == path].unique())
        grid = cells.xs(path, level="path").unstack("layer").reindex(index=kept, columns=range(layers))
        means[path] = np.where(has, grid.fillna(0.0).to_numpy(float), np.nan)
    whole = float(weight.sum())
    return Pieces(
        [(source, target) for source, target in (pair.split("\0") for pair in kept)],
        [int(having[pair]) for pair in kept],
        mean_intervals([totals[pair].to_numpy(float) for pair in kept], "bootstrap"),
        means,
        100 * float(weight[kept].sum()) / whole if whole else 100.0,
        len(weight),
        int(table.fact_id.nunique()),
    )


def flow_by_piece(
    flow: FlowData,
    model: str | None = None,
    features: str | None = None,
    most: int = ROWS,
    title: str | None = None,
) -> Figure:
    """Mean effects over facts: pairs of pieces down, layers across, a panel a path, the sum of all at the right.

    Args:
        flow: edges of many facts.
        model, features: which, where the flow has several.
        most: pairs of pieces that are shown, those with the largest effects.
        title: a heading.

    Raises:
        MambalensError: see `pieces_of`.
    """
    found = pieces_of(flow, model, features, most)
    panels, rows = len(found.means), len(found.pairs)
    layers = next(iter(found.means.values())).shape[1]
    wide = float(np.clip(0.2 * layers, 2.2, 4.2))
    figure, axes = plt.subplots(
        1, panels, figsize=(wide * panels + 5.4, max(0.27 * rows + 1.9, 3.2)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    reach = max(float(np.nanmax(np.abs(grid))) for grid in found.means.values()) or 1.0
    words = {"main": main_path(flow), **PATHS}
    for axis, (path, grid) in zip(axes.flat, found.means.items(), strict=True):
        axis.set_facecolor("#D0D0D0")  # layers without the path
        image = axis.imshow(
            grid, aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(0, -reach, reach), interpolation="nearest"
        )
        axis.set_title(words[path], fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axis.tick_params(labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
        axis.grid(axis="y", which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="minor", length=0)
    axes.flat[0].set_yticks(
        range(rows), [f"{source} → {target}  ({n})" for (source, target), n in zip(found.pairs, found.n, strict=True)],
        fontsize=8.5,
    )  # fmt: skip
    right = axes.flat[-1].secondary_yaxis("right")
    several = [
        signed(mean) + ("" if np.isnan(low) else f" [{signed(low)}, {signed(high)}]") for mean, low, high in found.total
    ]
    right.set_yticks(range(rows), several, fontsize=8)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    figure.supxlabel("Layer", fontsize=9)
    name = model or flow.table.model.iloc[0]
    left = found.of - rows
    said = (
        f"{rows} of {found.of} pairs of pieces, {found.share:.0f} % of the absolute mean effects" if left
        else f"all {found.of} pairs of pieces"
    )  # fmt: skip
    figure.suptitle(
        plain(title or f"{name}: what cutting the edges between pieces of the prompt changes, means over facts")
        + f"\n{said}{put_in(flow.ablation)}; in parentheses how many of {found.facts} facts have both\n"
        "at the right the sum of all layers and paths with its 95 % interval",
        fontsize=9.5,
    )
    bar = figure.colorbar(image, ax=axes, pad=0.01, shrink=0.9)
    bar.set_label(f"Change of the {flow.measure[0].lower()}{flow.measure[1:]}", fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    plt.close(figure)
    return figure
