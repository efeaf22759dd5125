"""The logit lens as a heatmap: layers across, tokens or pieces of prompts down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mambalens.facts.pieces import PIECES
from mambalens.figures.framed import best, frame
from mambalens.figures.style import lines, plain, visible
from mambalens.hooks.errors import MambalensError
from mambalens.interventions.lens_data import METRICS, checked_metric

if TYPE_CHECKING:
    from mambalens.interventions.lens_data import LogitLensData

MOST_LETTERS = 7
"""Letters of a token that a cell has room for."""
WRITTEN = 16
"""Layers up to which cells are wide enough for tokens."""


def logit_lens(
    found: LogitLensData,
    fact_id: str | None = None,
    metric: str = "log_odds",
    title: str | None = None,
    words: bool | None = None,
) -> Figure:
    """What the model would answer behind every layer.

    Args:
        found: of a logit lens.
        fact_id: one fact, whose tokens stand at the rows; None: the only one, or means over all by piece of the prompt.
        metric: of the answer: 'log_odds', 'prob' or 'rank'.
        title: a heading.
        words: write the top token into every cell of one fact; by default where the model has at most 16 layers.

    Raises:
        MambalensError: for a metric or fact that there is not.
    """
    checked_metric(metric)
    facts = list(found.answers)
    if fact_id is None and len(facts) == 1:
        fact_id = facts[0]
    if fact_id is not None and fact_id not in facts:
        raise MambalensError(f"The logit lens has no fact {fact_id!r}: it has {', '.join(map(repr, facts[:5]))}.")
    ((model, layers),) = found.n_layers.items()
    bold: list[int] = []
    tops, framed = None, []
    if fact_id is None:
        summary = found.summary(metric)
        grid = summary.pivot(index="piece", columns="layer", values="mean")
        count = summary.groupby("piece").n.max()
        pieces = [piece for piece in PIECES if piece in grid.index]
        grid = grid.loc[pieces]
        framed = best(summary, grid, smallest=metric == "rank")
        values = grid.to_numpy(float)
        rows = [f"{piece}  ({count[piece]})" for piece in pieces]
        heading = f"{model}: the answer behind every layer, means over {len(facts)} facts; framed: the best of "
        heading += "each piece, with its 95 % interval at the right"
    else:
        table = found.table[found.table.fact_id == fact_id]
        values = table.pivot(index="position", columns="layer", values=metric).to_numpy(float)
        words = layers <= WRITTEN if words is None else words
        tops = table.pivot(index="position", columns="layer", values="top_token").to_numpy() if words else None
        of_fact = found.prompts[found.prompts.fact_id == fact_id]
        rows = [visible(str(token)) for token in of_fact.tokens.iloc[0]]
        bold = [int(p) for p in of_fact.subject.iloc[0]]
        heading = f"{model}: {found.answers[fact_id].strip()!r} behind every layer"
        heading += "; in the cells the top token" if words else ""
    cell = 0.62 if tops is not None else 0.3
    figure, axis = plt.subplots(
        figsize=(max(cell * values.shape[1], 3.0) + (4.4 if framed else 2.9), max(0.28 * len(rows), 1.0) + 1.5),
        layout="constrained",
    )
    norm: Normalize = LogNorm(1, max(float(values.max()), 2.0)) if metric == "rank" else Normalize()
    colours = plt.get_cmap("viridis_r" if metric == "rank" else "viridis")
    image = axis.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    if tops is not None:
        _write(axis, tops, values, colours, norm)
    frame(axis, framed)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    for row in bold:
        axis.get_yticklabels()[row].set_fontweight("bold")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    axis.tick_params(labelsize=8.5)
    axis.set_xlabel("Layers behind it (0: the embeddings)", fontsize=9)
    axis.set_ylabel("Token" if fact_id is not None else "Piece (facts that have it)", fontsize=9)
    figure.suptitle("\n".join(lines(plain(title or heading), int(13.5 * figure.get_figwidth()))), fontsize=9.5)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label(METRICS[metric], fontsize=8.5)
    bar.ax.tick_params(labelsize=8)
    plt.close(figure)
    return figure


def _write(axis: plt.Axes, tops: np.ndarray, values: np.ndarray, colours: Colormap, norm: Normalize) -> None:
    """The top token in every cell, in a colour that is read on it."""
    for (row, column), token in np.ndenumerate(tops):
        red, green, blue, _ = colours(norm(values[row, column]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = visible(str(token).strip() or str(token))
        text = text if len(text) <= MOST_LETTERS else text[: MOST_LETTERS - 1] + "…"
        axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
