"""Figures made to be read: information-flow curves and token-by-layer heatmaps.

A role has the same colour, marker and dash everywhere; the colours are told apart without colour vision too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from mambalens.hooks.errors import MambalensError, choose
from mambalens.result import METRICS

if TYPE_CHECKING:
    from mambalens.result import SweepResult

# Okabe & Ito's palette, with markers so that no line depends on its colour.
_STYLES: dict[str, tuple[str, str]] = {
    "subject": ("#D55E00", "o"),
    "relation": ("#0072B2", "s"),
    "last": ("#009E73", "^"),
    "first": ("#CC79A7", "D"),
    "others": ("#000000", "v"),
    "context": ("#E69F00", "P"),
    "subject_last": ("#A63603", "X"),
    "subject_first": ("#FDAE6B", "p"),
    "relation_minus_last": ("#56B4E9", "<"),
    "all": ("#666666", ">"),
}
_SPARE = ("#7F3C8D", "#11A579", "#3969AC", "#F2B701", "#E73F74", "#80BA5A")
_PATHS = {"conv": "convolution", "both": "both paths"}
_AXES = {
    "layer": "First layer of the window",
    "depth": "Depth of the window's first layer (%)",
}


def style(role: str, index: int = 0) -> tuple[str, str]:
    """Colour and marker of a role; a group of features or another label gets a spare one by its index."""
    return _STYLES.get(role, (_SPARE[index % len(_SPARE)], "osD^vP"[index % 6]))


def flow(
    result: SweepResult,
    metric: str = "change_pct",
    x: str = "layer",
    rows: str | None = None,
    columns: str | None = None,
    interval: str = "bootstrap",
    title: str | None = None,
) -> Figure:
    """Information-flow curves: one line per source (or per group of features, if there are several), with intervals.

    Args:
        result: a sweep.
        metric: a column of `result.METRICS`.
        x: 'layer' (the window's first layer) or 'depth' (the same in % of the model's layers).
        rows, columns: what the panels differ in: 'path', 'model', 'features', 'source', 'target', 'window_size', or a
            column of the facts ('wording', 'relation'). By default whatever the sweep has several of.
        interval: see `SweepResult.summary`.
        title: a heading; by default models, source, target and window.

    Raises:
        MambalensError: where lines and panels cannot show everything that varies; `SweepResult.where` keeps a part.
    """
    if x not in _AXES:
        raise MambalensError(f"x={x!r} is not an axis: {choose(x, _AXES)}.")
    hue, rows, columns = _layout(result.table, rows, columns)
    by = [name for name in (rows, columns) if name not in result.table.columns]
    summary = result.summary(interval, metric, by)
    if x == "depth":
        summary["x"] = 100 * summary.window_start / summary.model.map(result.n_layers)
    else:
        summary["x"] = summary.window_start
    order = list(summary[hue].unique())
    row_values, column_values = list(summary[rows].unique()), list(summary[columns].unique())
    height, width = 2.6 * len(row_values) + 1.4, 3.6 * len(column_values) + 0.8
    figure, axes = plt.subplots(
        len(row_values),
        len(column_values),
        figsize=(max(width + 1.1, 6.2), height),
        squeeze=False,
        sharey=True,
        sharex=x == "depth",
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for axis_row, row_value in zip(axes, row_values, strict=True):
        for axis, column_value in zip(axis_row, column_values, strict=True):
            panel = summary[(summary[rows] == row_value) & (summary[columns] == column_value)]
            _panel(axis, panel, hue, order, handles, baseline=metric == "change_pct")
            n = sorted(panel.n.unique())
            counted = f" · {n[0]} facts" if len(n) == 1 else f" · {n[0]} to {n[-1]} facts" if n else " · not run"
            values = ((rows, row_value), (columns, column_value))
            words = [_label(name, value, result) for name, value in values]
            axis.set_title(", ".join(dict.fromkeys(words)) + counted, fontsize=9)
    figure.supxlabel(_AXES[x], fontsize=10)
    figure.supylabel(METRICS[metric], fontsize=10)
    sizes = sorted(summary.window_size.unique())
    window = f"window of {sizes[0]} layers" if len(sizes) == 1 else f"windows of {sizes[0]} to {sizes[-1]} layers"
    target = ", ".join(summary.target.unique())
    heading = title or f"{', '.join(result.models)}: knocking out {hue} → {target}, {window}"
    figure.suptitle("\n".join(textwrap.wrap(heading, int(11 * figure.get_figwidth()))), fontsize=11)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9, title=hue,
        title_fontsize=9, alignment="left",
    )  # fmt: skip
    plt.close(figure)  # shown by whoever gets it, once
    return figure


def _layout(table: pd.DataFrame, rows: str | None, columns: str | None) -> tuple[str, str, str]:
    """What lines, rows and columns of panels stand for, so that each line has one value at each window."""
    varying = [name for name in ("path", "model", "features", "target", "window_size") if table[name].nunique() > 1]
    hue = "source"
    if table.source.nunique() == 1 and "features" in varying and "features" not in (rows, columns):
        hue = "features"
    left = [name for name in varying if name not in (hue, rows, columns)]
    if rows is None:
        rows = left.pop(0) if left else "path" if columns != "path" else "model"
    if columns is None:
        columns = left.pop(0) if left else "model" if rows != "model" else "path"
    if left:
        raise MambalensError(
            f"One figure cannot show sources by {rows}, {columns} and {', '.join(left)}: keep one of them, for example "
            f"result.where({left[0]}={table[left[0]].iloc[0]!r}), or --where {left[0]}={table[left[0]].iloc[0]}."
        )
    return hue, rows, columns


def _panel(axis: Any, panel: pd.DataFrame, hue: str, order: list[str], handles: dict[str, Any], baseline: bool) -> None:
    if baseline:
        axis.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    for name, line in panel.groupby(hue, sort=False):
        line, index = line.sort_values("x"), order.index(str(name))
        colour, marker = style(str(name), index)
        drawn = axis.plot(
            line.x, line["mean"], color=colour, marker=marker, markersize=4.5, linewidth=1.6, markeredgecolor="white",
            markeredgewidth=0.5, zorder=20 - index,  # the first source named lies on top where lines meet
        )  # fmt: skip
        axis.fill_between(line.x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        handles.setdefault(str(name), drawn[0])
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, labelbottom=True)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _label(name: str, value: Any, result: SweepResult) -> str:
    if name == "path":
        return _PATHS.get(str(value), main_path(result))
    return f"{value} wording" if name == "wording" else str(value)


def main_path(result: SweepResult) -> str:
    """What the main path is in these models: 'scan', 'attention', or 'scan or attention'."""
    kinds = {"attention" if kind == "attention" else "scan" for config in result.configs for kind in config["kinds"]}
    return " or ".join(sorted(kinds, reverse=True))


def heatmap(
    result: SweepResult, tokens: Sequence[str], subject: Sequence[int] = (), metric: str = "change_pct"
) -> Figure:
    """One fact, every position as the source: tokens down, windows across, base probability stated.

    Args:
        result: a sweep of one fact with sources='each'.
        tokens: the prompt's tokens.
        subject: the subject's positions, which are set in bold.
    """
    table = result.table
    if not len(table) or table.fact_id.nunique() != 1 or not table.source.str.startswith("each:").all():
        raise MambalensError("A heatmap is drawn from a sweep of one fact with sources='each'.")
    first = table.iloc[0]
    grid = table.assign(position=table.source.str.removeprefix("each:").astype(int))
    grid = grid.pivot(index="position", columns="window_start", values=metric)
    values = grid.to_numpy(float)
    # White is 'no change'; one scale for losses, another for gains, so that a large gain does not hide the losses.
    reach = max(100.0, float(np.nanmax(np.abs(values)))) if metric == "change_pct" else float(np.nanmax(np.abs(values)))
    low = -100.0 if metric == "change_pct" else -reach
    norm = TwoSlopeNorm(0.0, low, max(reach, 1e-9))
    figure, axis = plt.subplots(
        figsize=(0.42 * values.shape[1] + 4.2, max(0.3 * values.shape[0] + 1.6, 2.8)), layout="constrained"
    )
    image = axis.imshow(values, aspect="auto", cmap="RdBu", norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(tokens)), [_visible(token) for token in tokens], fontsize=9)
    axis.set_xticks(range(values.shape[1]), grid.columns, fontsize=9)
    axis.set_xlabel(f"First layer of the window ({first.window_size} layers)")
    axis.set_ylabel("Source token")
    fact = result.facts.iloc[0]
    for position in subject:
        axis.get_yticklabels()[position].set_fontweight("bold")
    path = _PATHS.get(first.path, main_path(result))
    axis.set_title(
        f"{first.model}: token → {first.target}, {path}\n"
        f"P({str(fact.target).strip()!r}) = {first.base_prob:.3g} without a knockout",
        fontsize=10,
    )
    bar = figure.colorbar(image, ax=axis, label=METRICS[metric])
    if metric == "change_pct":
        bar.set_ticks([-100, -50, 0, *([reach / 2] if reach <= 100 else []), reach])
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:+.0f}" if value else "0")
    plt.close(figure)
    return figure


def _visible(token: str) -> str:
    """A token as a row label: its spaces can be seen, and no mathematics is read into a dollar sign."""
    return token.replace("\n", "⏎").replace(" ", "·").replace("$", r"\$")
