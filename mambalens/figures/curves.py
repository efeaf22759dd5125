"""Information-flow curves: what knocking out a source costs, window by window."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from mambalens.figures.style import INSTEAD, PATHS, main_path, style
from mambalens.hooks.errors import MambalensError, choose

if TYPE_CHECKING:
    from mambalens.runs.data import SweepData

_AXES = {
    "layer": "First layer of the window",
    "depth": "Depth of the window's first layer (%)",
}
APART = 0.05
"""How far lines are set apart, of the distance between windows, so that equal ones do not hide each other."""


def flow(
    result: SweepData,
    metric: str = "change_pct",
    x: str = "layer",
    rows: str | None = None,
    columns: str | None = None,
    interval: str = "bootstrap",
    title: str | None = None,
) -> Figure:
    """Information-flow curves: one line per source, or per group of features where panels have one source each.

    Lines of a panel are set apart a little to the sides (`APART`): those with the same numbers can both be seen, unless
    windows are many.

    Args:
        result: a sweep; single tokens as sources (each) are left to `heatmap`.
        metric: a column of `runs.table.METRICS`, or 'measure' where the sweep has one.
        x: 'layer' (the window's first layer) or 'depth' (the same in % of the model's layers).
        rows, columns: what the panels differ in: 'path', 'model', 'ablation', 'features', 'source', 'target',
            'window_size', or a column of the facts ('wording', 'relation'). By default whatever the sweep has several
            of.
        interval: see `SweepData.summary`.
        title: a heading; by default models, source, target and window.

    Raises:
        MambalensError: where lines and panels cannot show everything that varies; `SweepData.where` keeps a part.
    """
    if x not in _AXES:
        raise MambalensError(f"x={x!r} is not an axis: {choose(x, _AXES)}.")
    result = result.roles()
    if not len(result.rows):
        raise MambalensError("The sweep has single tokens as sources only (each): draw result.heatmap(fact_id).")
    hue, rows, columns = _layout(result.groups(), rows, columns)
    by = [name for name in (rows, columns) if name not in result.rows.columns]
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
            values = ((rows, row_value, row_values), (columns, column_value, column_values))
            words = [_label(name, value, result) for name, value, every in values if len(every) > 1]
            title_words = ", ".join(dict.fromkeys(words)) or _label("path", summary.path[0], result)
            axis.set_title(title_words + counted, fontsize=9)
    apart = " (lines set slightly apart)" if len(order) > 1 else ""
    figure.supxlabel(_AXES[x] + apart, fontsize=10)
    figure.supylabel(result.metrics[metric], fontsize=10)
    sizes = sorted(summary.window_size.unique())
    window = (
        _label("window_size", sizes[0], result) if len(sizes) == 1 else f"windows of {sizes[0]} to {sizes[-1]} layers"
    )
    target = ", ".join(summary.target.unique())
    put_in = _put_in(summary) if "ablation" not in (rows, columns) else ""
    heading = title or f"{', '.join(result.models)}: knocking out {_what(summary, hue)} → {target}, {window}{put_in}"
    figure.suptitle("\n".join(textwrap.wrap(heading, int(11 * figure.get_figwidth()))), fontsize=11)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9, title=hue,
        title_fontsize=9, alignment="left",
    )  # fmt: skip
    plt.close(figure)  # shown by whoever gets it, once
    return figure


def _layout(groups: pd.DataFrame, rows: str | None, columns: str | None) -> tuple[str, str, str]:
    """What lines, rows and columns of panels stand for, so that each line has one value at each window."""
    names = ("path", "model", "ablation", "features", "target", "window_size")
    varying = [name for name in names if groups[name].nunique() > 1]
    hue = "source"
    one_source = groups.source.nunique() == 1 or "source" in (rows, columns)
    if one_source and "features" in varying and "features" not in (rows, columns):
        hue = "features"
    left = [name for name in varying if name not in (hue, rows, columns)]
    if rows is None:
        rows = left.pop(0) if left else "path" if columns != "path" else "model"
    if columns is None:
        columns = left.pop(0) if left else "model" if rows != "model" else "path"
    if left:
        raise MambalensError(
            f"One figure cannot show sources by {rows}, {columns} and {', '.join(left)}: keep one of them, for example "
            f"result.where({left[0]}={groups[left[0]].iloc[0]!r}), or --where {left[0]}={groups[left[0]].iloc[0]}."
        )
    return hue, rows, columns


def _put_in(summary: pd.DataFrame) -> str:
    """What stands in the sources' place, if anything does."""
    words = [INSTEAD[name] for name in summary.ablation.unique() if name in INSTEAD]
    return f", {' or '.join(words)}" if words else ""


def _what(summary: pd.DataFrame, hue: str) -> str:
    """What is knocked out, as far as lines do not say it."""
    if hue == "features":
        return f"{' or '.join(summary.source.unique())} by features"
    groups = [group for group in summary.features.unique() if group != "all"]
    return f"source ({', '.join(groups)} features)" if len(groups) == 1 else "source"


def _panel(axis: Any, panel: pd.DataFrame, hue: str, order: list[str], handles: dict[str, Any], baseline: bool) -> None:
    if baseline:
        axis.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    windows = panel.x.drop_duplicates().sort_values()
    apart = (windows.diff().min() if len(windows) > 1 else 1.0) * min(APART, 0.8 / len(order))
    for name, line in panel.groupby(hue, sort=False):
        line, index = line.sort_values("x"), order.index(str(name))
        colour, marker = style(str(name), index)
        at = line.x + apart * (index - (len(order) - 1) / 2)
        drawn = axis.plot(
            at, line["mean"], color=colour, marker=marker, markersize=4.5, linewidth=1.6, markeredgecolor="white",
            markeredgewidth=0.5, zorder=20 - index,  # the first source named lies on top where lines meet
        )  # fmt: skip
        axis.fill_between(at, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
        handles.setdefault(str(name), drawn[0])
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, labelbottom=True)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _label(name: str, value: Any, result: SweepData) -> str:
    if name == "window_size":
        return f"window of {value} layer{'s' if value > 1 else ''}"
    if name == "ablation":
        return f"{value} ablation"
    if name == "path":
        return PATHS.get(str(value), main_path(result))
    return f"{value} wording" if name == "wording" else str(value)
