"""The flow of one prompt as a graph: tokens across, layers up, an edge for every strong hand-over."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.transforms import Affine2D

from mambalens.figures.one import of_one
from mambalens.figures.style import PATH_STYLES, PATHS, main_path, plain, put_in, signed, visible
from mambalens.flow.table import levels
from mambalens.hooks.errors import MambalensError, choose

if TYPE_CHECKING:
    from mambalens.flow.data import FlowData

MOST = 40
"""Edges that a graph shows."""
HALO = "#F0E442"
"""Colour around a marked route."""
Edge = tuple[int, str, int, int]
"""Layer, path, source and target."""
_DASHES = (0, (3.2, 1.6))
_WIDEST, _THINNEST = 5.0, 0.7  # points
_LEFT, _RIGHT, _TOP = 0.75, 2.1, 0.95  # margins in inches
_LONGEST = 16  # characters of a token's label


class _Prompt(NamedTuple):
    """What a graph is drawn from."""

    model: str
    edges: pd.DataFrame
    """Edges of one prompt with their `effect`, the strongest first."""
    tokens: list[str]
    subject: list[int]
    base: Any
    target: str
    layers: int


def graph(
    flow: FlowData,
    fact_id: str,
    route: Iterable[Edge | Sequence[Edge]] = (),
    most: int = MOST,
    model: str | None = None,
    features: str | None = None,
    title: str | None = None,
) -> Figure:
    """The strongest edges of one prompt, each from its source before a layer to its target after it.

    Where a layer has a convolution and a scan behind it, edges of the one end, and those of the other begin, half a
    layer up: there the convolution hands on to the scan. Solid edges were cut and their numbers are exact, dashed ones
    are attributed. Width is the size of the effect; an arrow's head says that the edge helps the answer, a bar that it
    works against it. The path has its colour and its marker in the edge's middle. What is not shown is said.

    Args:
        flow: edges and what is known of their facts.
        fact_id: the fact.
        route: hops that are marked, each an edge (layer, path, source, target) or several side by side. Of a hop's
            edges those are marked that are shown, and its strongest in any case.
        most: edges that are shown.
        model, features: which, where the flow has several.
        title: a heading; by default the model and the prompt.

    Raises:
        MambalensError: if the flow has no such fact, model or features, or several and none was named, or no such edge.
    """
    prompt = _prompt(flow, fact_id, model, features)
    if most < 1:
        raise MambalensError(f"most={most}: give 1 or more edges to show.")
    edges = prompt.edges
    hops = route_hops(edges, route, f"has {len(prompt.tokens)} tokens and {prompt.layers} layers")
    marked = [index for hop in hops for place, index in enumerate(hop) if not place or index in edges.index[:most]]
    shown = edges[(np.arange(len(edges)) < most) | edges.index.isin(marked)]
    length, rows = len(prompt.tokens), prompt.layers + 1
    column = float(np.clip(11.5 / length, 0.42, 0.95))
    row = float(np.clip(7.0 / rows, 0.32, 0.55))
    labels, slanted = _labels(prompt.tokens, column)
    deep = max(map(len, labels))
    bottom = 0.32 + (0.062 * deep if slanted else 0.25)
    inner = max(column * length, 4.6)
    column, height = inner / length, row * rows
    size = (_LEFT + inner + _RIGHT, max(_TOP + height + bottom, 4.6))
    # Fixed margins: angles of arrowheads and distances between edges are known only where an inch is an inch.
    figure = plt.figure(figsize=size)
    height = size[1] - _TOP - bottom
    axis = figure.add_axes((_LEFT / size[0], bottom / size[1], inner / size[0], height / size[1]))
    axis.set_xlim(-0.5, length - 0.5)
    axis.set_ylim(-0.45, prompt.layers + 0.55)
    scale = np.array([column, height / rows])
    _streams(axis, prompt, shown, [[index for index in hop if index in marked] for hop in hops])
    reach = float(shown.effect.abs().max()) if len(shown) else 1.0
    # The strongest on top; the marked route on top of all.
    order = [*(index for index in shown.index[::-1] if index not in marked), *marked]
    together = shown.groupby(["layer", "source", "target"], observed=True).path.transform("count")
    for rank, index in enumerate(order):
        edge = shown.loc[index]
        beside = list(PATH_STYLES).index(edge.path) - 1 if together[index] > 1 else 0
        _edge(axis, edge, scale, reach, beside, index in marked, 3 + rank / max(len(order), 1))
    _axes(axis, prompt, labels, slanted)
    said = _said(prompt, shown, title, flow.measure, flow.ablation)
    for number, (lines, place, large) in enumerate(zip(said, (0.12, 0.36, 0.58), (11, 9, 9), strict=True)):
        text = textwrap.shorten(lines, int((size[0] - 0.4) * (13.2 if number == 0 else 16)), placeholder=" …")
        figure.text(0.2 / size[0], 1 - place / size[1], plain(text), fontsize=large, va="top",
                    color="black" if number == 0 else "#444444")  # fmt: skip
    _legend(axis, flow, shown, reach, (len(marked), sum(map(len, hops))), size)
    plt.close(figure)  # shown by whoever gets it, once
    return figure


def _prompt(flow: FlowData, fact_id: str, model: str | None, features: str | None) -> _Prompt:
    edges = flow.table[flow.table.fact_id == fact_id]
    if not len(edges):
        raise MambalensError(f"fact_id={fact_id!r} is not in the flow: {choose(fact_id, flow.table.fact_id.unique())}.")
    edges = of_one(edges, "One graph cannot show", f"the flow of {fact_id!r}", model=model, features=features)
    model = str(edges.model.iloc[0])
    prompts = flow.prompts[(flow.prompts.model == model) & (flow.prompts.fact_id == fact_id)]
    if not len(prompts):
        raise MambalensError(f"The flow was kept without the tokens of {fact_id!r}: run it again in its folder.")
    known = flow.base[(flow.base.model == model) & (flow.base.fact_id == fact_id)]
    if not len(known):
        raise MambalensError(f"The flow was kept without the base of {fact_id!r}: run it again in its folder.")
    edges = levels(edges).assign(effect=edges.exact.fillna(edges.attributed))
    order = np.argsort(-edges.effect.abs().to_numpy(), kind="stable")
    layers = next((one.n_layers for one in flow.configs if one.model == model), int(edges.layer.max()) + 1)
    tokens, subject = list(prompts.tokens.iloc[0]), [int(i) for i in prompts.subject.iloc[0]]
    target = str(flow.facts.target[flow.facts.fact_id == fact_id].iloc[0])
    return _Prompt(model, edges.iloc[order], tokens, subject, known.iloc[0], target.strip() or target, layers)


def route_hops(edges: pd.DataFrame, route: Iterable[Edge | Sequence[Edge]], has: str) -> list[list[Any]]:
    """Rows of a route's edges, hop by hop, the strongest of each hop first.

    Args:
        edges: of one prompt, the strongest first.
        route: hops, each an edge or several.
        has: what the prompt has, for the message.

    Raises:
        MambalensError: if the prompt has no such edge.
    """
    names = edges[["layer", "path", "source", "target"]].itertuples(index=False, name=None)
    rows = {edge: (place, index) for place, (edge, index) in enumerate(zip(names, edges.index, strict=True))}
    found = []
    for hop in filter(len, route):  # a hop that no single path reaches has no edge
        places = []
        for edge in [hop] if isinstance(hop[0], int | np.integer) else hop:
            if tuple(edge) not in rows:  # type: ignore[arg-type]
                raise MambalensError(
                    f"The route's edge {edge} is not an edge of this prompt, which {has}: give layer, path, source and "
                    "target as the flow's table has them."
                )
            places.append(rows[tuple(edge)])  # type: ignore[arg-type]
        found.append([index for _, index in sorted(places)])
    return found


def _labels(tokens: Sequence[str], column: float) -> tuple[list[str], bool]:
    """Tokens as labels, and whether they must be slanted to have room beside each other."""
    short = [token if len(token) <= _LONGEST else token[: _LONGEST - 1] + "…" for token in tokens]
    return [visible(token) for token in short], max(map(len, short)) * 0.085 > column


def _streams(axis: Any, prompt: _Prompt, shown: pd.DataFrame, hops: list[list[Any]]) -> None:
    """Residual streams as faint lines, stronger between the first and the last edge that a position has."""
    last = len(prompt.tokens) - 1
    for position in range(last + 1):
        axis.axvline(position, color="#E8E8E8", linewidth=0.8, zorder=0)
        rows = [*shown.begin[shown.source == position], *shown.end[shown.target == position]]
        if position == last and len(shown):
            rows.append(prompt.layers)  # from here the answer is read
        if rows:
            axis.plot([position] * 2, [min(rows), max(rows)], color="#BBBBBB", linewidth=1.4, zorder=1)
            axis.plot([position] * len(rows), rows, "o", color="#777777", markersize=2.8, zorder=2.5, clip_on=False)
    for before, after in pairwise(prompt.edges.loc[hop] for hop in hops):
        for relay in set(before.target) & set(after.source):
            begin, end = before.end[before.target == relay].min(), after.begin[after.source == relay].max()
            if begin <= end:
                axis.plot([relay, relay], [begin, end], color=HALO, linewidth=8, zorder=0.5)


def _edge(axis: Any, edge: Any, scale: np.ndarray, reach: float, beside: int, marked: bool, zorder: float) -> None:
    """One edge: its line, the path's marker in its middle, and its head."""
    begin, end = np.array([edge.source, edge.begin], float), np.array([edge.target, edge.end], float)
    along = (end - begin) * scale  # inches
    length = float(np.hypot(*along))
    unit = along / length
    # Several paths between the same two nodes lie beside each other.
    aside = 0.055 * beside * np.array([-unit[1], unit[0]])
    begin, end = begin + (0.05 * unit + aside) / scale, end - (0.09 * unit - aside) / scale
    colour, marker = PATH_STYLES[edge.path]
    width = max(_WIDEST * abs(edge.effect) / reach, _THINNEST) if reach else _THINNEST
    if marked:
        for colours, more in (("#8A7F00", 5.2), (HALO, 4.2)):
            axis.plot(*zip(begin, end, strict=True), color=colours, linewidth=width + more, zorder=zorder,
                      solid_capstyle="round")  # fmt: skip
    exact = bool(np.isfinite(edge.exact))
    axis.plot(
        *zip(begin, end, strict=True), color=colour, linewidth=width, linestyle="-" if exact else _DASHES,
        solid_capstyle="butt", dash_capstyle="butt", zorder=zorder, label="_edge", gid=f"edge:{edge.name}",
    )  # fmt: skip
    middle = (begin + end) / 2
    axis.plot(*middle, marker=marker, color=colour, markersize=4.2 + 0.6 * width, markeredgecolor="white",
              markeredgewidth=0.7, zorder=zorder)  # fmt: skip
    head = _head(edge.effect > 0, float(np.degrees(np.arctan2(unit[1], unit[0]))))
    axis.plot(*end, marker=head, color=colour, markersize=(7.5 if edge.effect > 0 else 4.8) + 1.1 * width,
              markeredgewidth=1.8 if edge.effect > 0 else 0, zorder=zorder)  # fmt: skip


def _head(against: bool, angle: float) -> MarkerStyle:
    """A triangle for an edge that helps the answer, a bar for one that works against it."""
    turned = Affine2D().rotate_deg(angle)
    return MarkerStyle("|" if against else ">", transform=turned)


def _axes(axis: Any, prompt: _Prompt, labels: list[str], slanted: bool) -> None:
    axis.set_xticks(range(len(labels)), labels, fontsize=8.5)
    if slanted:
        for label in axis.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    for position in prompt.subject:
        axis.get_xticklabels()[position].set_fontweight("bold")
    step = 1 if prompt.layers <= 32 else 4
    rows = [*range(0, prompt.layers, step), prompt.layers]
    axis.set_yticks(rows, [*map(str, rows[:-1]), "end"], fontsize=7.5)
    axis.set_ylabel("Residual stream before layer", fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.annotate(
        plain(f"→ {prompt.target}"), (len(labels) - 1, prompt.layers), (9, 0), textcoords="offset points", fontsize=9.5,
        fontweight="bold", va="center", annotation_clip=False,
    )  # fmt: skip


def _said(prompt: _Prompt, shown: pd.DataFrame, title: str | None, measure: str, ablation: str) -> tuple[str, str, str]:
    """Heading, what is known without a cut, and what is shown and left out."""
    base, edges = prompt.base, prompt.edges
    text = "".join(prompt.tokens).strip()
    whole = float(edges.effect.abs().sum())
    share = 100 * float(shown.effect.abs().sum()) / whole if whole else 100.0
    exact = int(shown.exact.notna().sum())
    left = edges.effect.abs()[~edges.index.isin(shown.index)].max()
    rest = "" if np.isnan(left) else f"; none that is left out has more than {left:.2g}"
    words = measure[0].lower() + measure[1:]
    return (
        title or f"{prompt.model}: {text}",
        f"Without a cut P({prompt.target!r}) = {base.prob:.3g}; {words}: {signed(base.measure)}",
        f"{len(shown):,} of {len(edges):,} edges, {share:.0f} % of the absolute effect{rest}; "
        f"{exact:,} of the {len(shown):,} are exact{put_in(ablation)}",
    )


def _legend(
    axis: Any,
    flow: FlowData,
    shown: pd.DataFrame,
    reach: float,
    marked: tuple[int, int],
    size: tuple[float, float],
) -> None:
    words = {"main": main_path(flow), **PATHS}
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, markeredgecolor="white", linewidth=2,
               label=words[path])
        for path, (colour, marker) in PATH_STYLES.items() if path in set(shown.path)
    ]  # fmt: skip
    grey = "#444444"
    handles += [
        Line2D([], [], color=grey, linewidth=2, label="cut: exact"),
        Line2D([], [], color=grey, linewidth=2, linestyle=_DASHES, label="attributed"),
        Line2D([], [], color=grey, linewidth=0, marker=">", markersize=7, label="helps the answer"),
        Line2D([], [], color=grey, linewidth=0, marker="|", markersize=9, markeredgewidth=2, label="works against it"),
    ]
    if marked[0]:
        part = "" if marked[0] == marked[1] else f"\n({marked[0]} of its {marked[1]} edges)"
        handles.append(Line2D([], [], color=HALO, linewidth=7, label=f"the marked route{part}"))
    unit = f" {flow.unit}" if flow.unit else ""
    for relative in (1.0, 0.4):
        handles.append(Line2D([], [], color=grey, linewidth=max(_WIDEST * relative, _THINNEST),
                              label=f"{relative * reach:.2g}{unit}"))  # fmt: skip
    axis.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1 - (_RIGHT - 0.3) / size[0], 1 - (_TOP + 0.6) / size[1]),
        bbox_transform=axis.figure.transFigure, frameon=False, fontsize=8.5, borderaxespad=0, handlelength=2.4,
        labelspacing=0.65,
    )  # fmt: skip
