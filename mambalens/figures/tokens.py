"""One prompt, token by token: which position costs the answer, and which reads which."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from mambalens.figures.style import PATHS, main_path, put_in, visible
from mambalens.hooks.errors import MambalensError

if TYPE_CHECKING:
    from mambalens.runs.data import SweepData


def heatmap(
    result: SweepData, tokens: Sequence[str], subject: Sequence[int] = (), metric: str = "change_pct"
) -> Figure:
    """One fact, every position as the source: tokens down, windows across, base probability stated.

    Args:
        result: a sweep of one fact with sources='each'.
        tokens: the prompt's tokens.
        subject: the subject's positions, which are set in bold.
    """
    table = result.table
    if not len(table) or table.fact_id.nunique() != 1 or (table.position < 0).any():
        raise MambalensError("A heatmap is drawn from a sweep of one fact with sources='each'.")
    first = table.iloc[0]
    grid = table.pivot(index="position", columns="window_start", values=metric)
    values = grid.to_numpy(float)
    # White is 'no change'; one scale for losses, another for gains, so that a large gain does not hide the losses.
    reach = max(100.0, float(np.nanmax(np.abs(values)))) if metric == "change_pct" else float(np.nanmax(np.abs(values)))
    low = -100.0 if metric == "change_pct" else -reach
    norm = TwoSlopeNorm(0.0, low, max(reach, 1e-9))
    figure, axis = plt.subplots(
        figsize=(0.3 * values.shape[1] + 4.6, max(0.3 * values.shape[0] + 1.6, 3.6)), layout="constrained"
    )
    image = axis.imshow(values, aspect="auto", cmap="RdBu", norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(tokens)), [visible(token) for token in tokens], fontsize=9)
    axis.set_xticks(range(values.shape[1]), grid.columns, fontsize=9)
    axis.set_xlabel(f"First layer of the window ({first.window_size} layers)")
    axis.set_ylabel("Source token")
    fact = result.facts.iloc[0]
    for position in subject:
        axis.get_yticklabels()[position].set_fontweight("bold")
    path = PATHS.get(first.path, main_path(result))
    axis.set_title(
        f"{first.model}: token → {first.target}, {path}{put_in(first.ablation)}\n"
        f"P({str(fact.target).strip()!r}) = {first.base_prob:.3g} without a knockout",
        fontsize=10,
    )
    bar = figure.colorbar(image, ax=axis)
    bar.set_label(result.metrics[metric], fontsize=9)
    if metric == "change_pct":
        bar.set_ticks([-100, -50, 0, *([reach / 2] if reach <= 100 else []), reach])
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f}".replace("-", "−") if value else "0")
    plt.close(figure)
    return figure


def attention_map(
    alpha: Float[np.ndarray, "time time"], tokens: Sequence[str], title: str, subject: Sequence[int] = ()
) -> Figure:
    """Effective attention of one layer: targets down, sources across.

    Args:
        alpha: signed entries are drawn around white, magnitudes and softmax weights from white on.
        tokens: the prompt's tokens.
        title: a heading.
        subject: the subject's positions, which are set in bold.
    """
    time = len(tokens)
    side = 0.3 * time
    figure, axis = plt.subplots(figsize=(max(side + 3.0, 6.0), max(side + 2.2, 4.0)), layout="constrained")
    allowed = np.where(np.tril(np.ones((time, time), bool)), alpha, np.nan)
    reach = float(np.nanmax(np.abs(allowed))) or 1.0
    if (alpha < 0).any():
        image = axis.imshow(allowed, cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
    else:
        image = axis.imshow(allowed, cmap="Blues", vmin=0, vmax=reach, interpolation="nearest")
    axis.set_facecolor("#D0D0D0")
    names = [visible(token) for token in tokens]
    axis.set_xticks(range(time), names, fontsize=8, rotation=90)
    axis.set_yticks(range(time), names, fontsize=8)
    for position in subject:
        axis.get_xticklabels()[position].set_fontweight("bold")
        axis.get_yticklabels()[position].set_fontweight("bold")
    axis.set_xlabel("Source token")
    axis.set_ylabel("Target token")
    axis.set_title("\n".join(textwrap.wrap(title, int(9 * figure.get_figwidth()))), fontsize=10)
    figure.colorbar(image, ax=axis, label="alpha", shrink=0.8)
    plt.close(figure)
    return figure
