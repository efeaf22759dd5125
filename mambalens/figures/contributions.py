"""What every part of a model adds to the answer: parts by layer, and below them mixers by source and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mambalens.facts.pieces import PIECES
from mambalens.figures.framed import Framed, changing, frame
from mambalens.figures.style import lines, plain, signed, visible
from mambalens.hooks.errors import MambalensError

if TYPE_CHECKING:
    import pandas as pd

    from mambalens.interventions.contribution_data import ContributionData

COLOURS = {"mixer": "#0072B2", "mlp": "#E69F00", "embedding": "#009E73", "rest": "#CC79A7", "added": "#D55E00"}
WORDS = {
    "mixer": "token mixers",
    "mlp": "MLPs",
    "embedding": "embedding",
    "rest": "the stream itself",
    "added": "added vectors",
    "bias": "biases",
}


class Grid(NamedTuple):
    """What the lower panel shows."""

    rows: list[str]
    bold: list[int]
    values: Float[np.ndarray, "row layer"]
    has: Bool[np.ndarray, " layer"]
    """Layers that have a token mixer."""
    framed: list[Framed]
    """Cells of which the interval is said."""


def contributions(found: ContributionData, fact_id: str | None = None, title: str | None = None) -> Figure:
    """Contributions by layer as bars, and of mixers by source and layer as a heatmap.

    Args:
        found: contributions.
        fact_id: one fact, whose tokens stand at the rows; None: the only one, or means over all by piece of the prompt,
            with 95 % intervals.
        title: a heading.

    Raises:
        MambalensError: if there is no such fact.
    """
    facts = found.scores.fact_id.tolist()
    if fact_id is None and len(facts) == 1:
        fact_id = facts[0]
    if fact_id is not None and fact_id not in facts:
        found.tokens(fact_id)  # refuses
        raise MambalensError(f"Nothing is left of the contributions to the fact {fact_id!r}.")
    one = found if fact_id is None else found.where(fact_id=fact_id)
    (layers,) = found.n_layers.values()
    grid = _by_piece(one, layers) if fact_id is None else _by_token(one, fact_id, layers)
    wide = float(np.clip(0.32 * layers, 3.6, 9.0))
    height = max(0.26 * len(grid.rows), 0.9)
    figure, axes = plt.subplots(
        2, 2, figsize=(wide + 3.4, height + 3.6), layout="constrained",
        gridspec_kw={"height_ratios": [1.9, height], "width_ratios": [wide, 0.16]},
    )  # fmt: skip
    bars, mixers, beside, scale = axes[0, 0], axes[1, 0], axes[0, 1], axes[1, 1]
    beside.set_axis_off()
    _bars(bars, one.summary(by=("layer", "part")))
    reach = float(np.abs(grid.values).max()) or 1.0
    shown = np.where(grid.has, grid.values, np.nan)
    colours = plt.get_cmap("RdBu").with_extremes(bad="#D0D0D0")  # layers without a mixer
    image = mixers.imshow(
        shown, aspect="auto", cmap=colours, norm=TwoSlopeNorm(0.0, -reach, reach), interpolation="nearest"
    )
    mixers.spines[:].set_visible(False)
    frame(mixers, grid.framed)
    mixers.set_yticks(range(len(grid.rows)), grid.rows, fontsize=9)
    for row in grid.bold:
        mixers.get_yticklabels()[row].set_fontweight("bold")
    mixers.tick_params(axis="y", length=0)
    mixers.set_ylabel("Source" + (" (facts that have it)" if fact_id is None else ""), fontsize=9)
    mixers.set_xlabel("Layer", fontsize=9)
    unit = "nats" if "nats" in found.axis else ""
    bars.set_ylabel("Adds" + (f" ({unit})" if unit else ""), fontsize=9)
    for axis in (bars, mixers):
        axis.set_xlim(-1.6, layers - 0.4)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axis.set_xticks(sorted({*axis.get_xticks()[axis.get_xticks() >= 0].astype(int)} & {*range(layers)}))
        axis.tick_params(labelsize=8.5)
    if "embedding" in set(one.table.part):
        bars.set_xticks([-1, *bars.get_xticks()], ["emb.", *(f"{at:.0f}" for at in bars.get_xticks())])
    bar = figure.colorbar(image, cax=scale)
    bar.set_label("Token mixer adds" + (f" ({unit})" if unit else ""), fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    about = [title] if title else _heading(one, fact_id)
    room = int(13.5 * figure.get_figwidth())
    figure.suptitle("\n".join(line for text in (*about, _sum(one)) for line in lines(plain(text), room)), fontsize=9.5)
    plt.close(figure)
    return figure


def _bars(axis: Axes, summary: pd.DataFrame) -> None:
    """Bars of every part by layer, with intervals where there are several facts."""
    parts = [part for part in COLOURS if part in set(summary.part)]
    in_layers = [part for part in parts if part != "embedding"]
    width = 0.8 / max(1, len(in_layers))
    for part in parts:
        rows = summary[summary.part == part]
        offset = 0.0 if part == "embedding" else (in_layers.index(part) - (len(in_layers) - 1) / 2) * width
        at, mean = rows.layer.to_numpy(float) + offset, rows["mean"].to_numpy(float)
        axis.bar(at, mean, width, color=COLOURS[part], label=WORDS[part])
        reach = np.abs(np.stack([rows.low, rows.high]) - mean)
        if np.isfinite(reach).all():
            axis.errorbar(at, mean, reach, fmt="none", ecolor="#333333", elinewidth=0.8, capsize=1.5)
    axis.axhline(0, color="#333333", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, ncols=len(parts), loc="lower left", bbox_to_anchor=(0.0, 1.0), borderpad=0.0)


def _of_mixers(found: ContributionData) -> pd.DataFrame:
    """What mixers bring of positions."""
    table = found.table
    return table[(table.part == "mixer") & (table.source >= 0)]


def _with_mixers(found: ContributionData, layers: int) -> Bool[np.ndarray, " layer"]:
    return np.isin(np.arange(layers), found.table.layer[found.table.part == "mixer"].unique())


def _by_token(found: ContributionData, fact_id: str, layers: int) -> Grid:
    """One prompt's tokens down."""
    tokens = found.tokens(fact_id)
    subject = [int(p) for p in found.prompts[found.prompts.fact_id == fact_id].subject.iloc[0]]
    sums = _of_mixers(found).groupby(["source", "layer"]).contribution.sum().unstack("layer")
    values = sums.reindex(index=range(len(tokens)), columns=range(layers)).fillna(0.0).to_numpy(float)
    return Grid([visible(token) for token in tokens], subject, values, _with_mixers(found, layers), [])


def _by_piece(found: ContributionData, layers: int) -> Grid:
    """Pieces of prompts down, means over the facts that have them."""
    summary = found.where(part="mixer").summary(by=("piece", "layer"))
    summary = summary[summary.piece.isin(PIECES)]
    grid = summary.pivot(index="piece", columns="layer", values="mean")
    grid = grid.reindex(index=[piece for piece in PIECES if piece in grid.index], columns=range(layers))
    grid = grid.rename_axis(index="piece", columns="layer").fillna(0.0)
    count = summary.groupby("piece").n.max()
    rows = [f"{piece}  ({count[piece]})" for piece in grid.index]
    return Grid(rows, [], grid.to_numpy(float), _with_mixers(found, layers), changing(summary, grid))


def _heading(found: ContributionData, fact_id: str | None) -> list[str]:
    (model,) = found.n_layers
    if fact_id is None:
        about = f"means over {len(found.scores)} facts with 95 % intervals; framed: where a source does most"
        return [f"{model}: what adds to the answer", about]
    return [f"{model}: what adds to {str(found.scores.target.iloc[0]).strip()!r}"]


def _sum(found: ContributionData) -> str:
    """The score as a sum: '+4.20 = biases −7.62, token mixers +9.10, ...'."""
    parts = found.summary(by=("part",)).set_index("part")["mean"]
    # A part stays on the line of its number.
    listed = [f"{WORDS[part]} {signed(parts[part])}".replace(" ", "\u00a0") for part in WORDS if part in parts]
    return f"{found.axis}: {signed(float(found.scores.score.mean()))} = {', '.join(listed)}"
