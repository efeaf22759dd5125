"""How far a flow can be trusted: what circuits keep, and attributed numbers held against exact cuts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mambalens.figures.style import PATH_STYLES, PATHS, main_path, put_in
from mambalens.flow.agreement import agreement
from mambalens.hooks.errors import MambalensError, choose

if TYPE_CHECKING:
    from mambalens.flow.data import FlowData

CURVE = ("model", "order", "edges", "share_edges", "kept", "low", "high")
"""Columns of a faithfulness curve."""
ORDERS = {
    "effect": ("#D55E00", "o", "by effect"),
    "attention": ("#0072B2", "s", "by attention weight"),
    "random": ("#666666", "^", "at random"),
}
"""Colour, marker and words for the order in which edges are kept."""


def faithfulness(curve: pd.DataFrame, title: str | None = None) -> Figure:
    """What a model keeps of the answer with all edges cut but some: a line for each order, a panel for each model.

    Args:
        curve: one row for every model, order ('effect', 'attention', 'random') and number of edges: `CURVE`.
            share_edges is between 0 and 1, kept (with low and high) the share of the answer, 1 where nothing is lost.
        title: a heading.

    Raises:
        MambalensError: if a column is missing, an order is not known, or there is no row.
    """
    missing = [name for name in CURVE if name not in curve]
    if missing:
        raise MambalensError(f"The curve has no {' and no '.join(missing)}: its columns are {', '.join(CURVE)}.")
    if not len(curve):
        raise MambalensError("The curve has no row: there is nothing to draw.")
    for order in curve.order.unique():
        if order not in ORDERS:
            raise MambalensError(f"order={order!r} is not an order of edges: {choose(order, ORDERS)}.")
    models = list(curve.model.unique())
    figure, axes = plt.subplots(
        1, len(models), figsize=(max(3.4 * len(models) + 1.6, 5.4), 3.5), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for axis, model in zip(axes.flat, models, strict=True):
        rows = curve[curve.model == model]
        for level in (0, 1):
            axis.axhline(level, color="#999999", linewidth=0.8, zorder=0)
        # No edge at all has no place on a logarithmic axis.
        none = rows.kept[rows.share_edges <= 0]
        if len(none):
            handles["no edge kept"] = axis.axhline(
                none.iloc[0], color="black", linewidth=1, linestyle=(0, (2, 2)), zorder=1
            )
        for order, (colour, marker, words) in ORDERS.items():
            line = rows[(rows.order == order) & (rows.share_edges > 0)].sort_values("share_edges")
            if not len(line):
                continue
            x = 100 * line.share_edges
            drawn = axis.plot(x, line.kept, color=colour, marker=marker, markersize=4.5, linewidth=1.6,
                              markeredgecolor="white", markeredgewidth=0.5, label=words)  # fmt: skip
            axis.fill_between(x, line.low, line.high, color=colour, alpha=0.18, linewidth=0)
            handles[words] = drawn[0]
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_title(model, fontsize=9)
        axis.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    # A random set can do worse than nothing without bound; what matters lies between nothing and the whole answer.
    low = float(min(curve.kept.min(), curve.low.min(), 0.0))
    axes.flat[0].set_ylim(max(low, -1.0) - 0.05, max(1.08, min(float(np.nanmax(curve.high)), 1.6) + 0.03))
    figure.supxlabel("Edges that are kept (% of all; logarithmic)", fontsize=9)
    axes.flat[0].set_ylabel("Share of the answer that is kept", fontsize=9)
    figure.suptitle(title or "What is left of the answer with all other edges cut", fontsize=10.5)
    order_of = [words for *_, words in ORDERS.values()]
    ordered = {name: handles[name] for name in (*order_of, "no edge kept") if name in handles}
    figure.legend(
        ordered.values(), ordered.keys(), loc="outside right center", frameon=False, fontsize=9, title="edges chosen",
        title_fontsize=9, alignment="left",
    )  # fmt: skip
    plt.close(figure)
    return figure


def certificate(flow: FlowData, title: str | None = None) -> Figure:
    """Attributed against exact effects of the edges that were cut, by path; a panel for each model.

    Stated are medians over facts of what `flow.agreement.agreement` says of their strongest edges.

    Args:
        flow: with edges that have both numbers.
        title: a heading.

    Raises:
        MambalensError: if no edge has both numbers.
    """
    table = flow.table[flow.table.exact.notna() & flow.table.attributed.notna()]
    if not len(table):
        raise MambalensError("No edge of the flow was cut and attributed too: there is nothing to compare. Certify it.")
    agreed = agreement(flow)
    agreed = agreed[agreed.fact_id.isin(table.fact_id)]
    models = list(table.model.unique())
    figure, axes = plt.subplots(
        1, len(models), figsize=(3.9 * len(models) + 1.5, 4.6), squeeze=False, layout="constrained"
    )
    words = {"main": main_path(flow), **PATHS}
    handles: dict[str, Any] = {}
    for axis, model in zip(axes.flat, models, strict=True):
        rows = table[table.model == model]
        reach = float(rows[["attributed", "exact"]].abs().to_numpy().max()) or 1.0
        limit = 1.25 * reach
        # A wrong sign is what hurts: the quadrants where signs differ are grey.
        for corner in ((-limit, 0.0), (0.0, -limit)):
            axis.add_patch(plt.Rectangle(corner, limit, limit, color="#F3F3F3", zorder=0, linewidth=0))
        axis.plot([-limit, limit], [-limit, limit], color="#999999", linewidth=0.8, zorder=1)
        for path, (colour, marker) in PATH_STYLES.items():
            part = rows[rows.path == path]
            if len(part):
                handles[words[path]] = axis.scatter(
                    part.attributed, part.exact, color=colour, marker=marker, s=18 if len(rows) <= 500 else 9,
                    alpha=0.75 if len(rows) <= 500 else 0.5, linewidth=0, zorder=2,
                )  # fmt: skip
        for scale in (axis.set_xscale, axis.set_yscale):
            scale("symlog", linthresh=reach / 30)  # effects span orders of magnitude and both signs
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        ticks = [sign * size for sign in (-1, 1) for size in _ticks(reach)]
        for one in (axis.xaxis, axis.yaxis):
            one.set_ticks(sorted([0.0, *ticks]))
            one.set_ticks([], minor=True)
            one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{model}\n{_said(agreed[agreed.model == model], len(rows))}", fontsize=9)
        axis.set_xlabel("Attributed", fontsize=9)
    axes.flat[0].set_ylabel("Exact, by a cut", fontsize=9)
    unit = flow.measure
    heading = f"Change by cutting one edge: {unit[0].lower()}{unit[1:]}{put_in(flow.ablation)}"
    figure.suptitle(title or heading, fontsize=10.5)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9, title="path",
                  title_fontsize=9, alignment="left", markerscale=1.5)  # fmt: skip
    plt.close(figure)
    return figure


def _ticks(reach: float) -> list[float]:
    """A round number below the largest effect, and one below an eighth of it."""
    found = []
    for size in (reach, reach / 8):
        unit = 10.0 ** np.floor(np.log10(size))
        found.append(float(unit * max(step for step in (1, 2, 5) if step * unit <= size * (1 + 1e-9))))
    return found


def _said(agreed: pd.DataFrame, cut: int) -> str:
    """What `flow.agreement` says of one model's facts, in words."""
    rho, signs = agreed.rank_correlation.median(), agreed.sign_agreement.median()
    known = f"rank correlation {rho:.2f}".replace("-", "−") if np.isfinite(rho) else "rank correlation not known"
    same = f"signs agree in {100 * signs:.0f} %" if np.isfinite(signs) else "signs not known"
    whose = " in the median fact" if len(agreed) > 1 else ""
    return (
        f"strongest edges: {known},\n{same}{whose}\n"
        f"{cut:,} edges cut, of {len(agreed):,} fact{'s' if len(agreed) != 1 else ''}"
    )
