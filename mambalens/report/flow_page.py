"""One page of a flow: a prompt's edges as a graph to click through, and the flow by piece over all facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mambalens.defaults import DETAILED
from mambalens.facts.roles import pieces
from mambalens.figures.flow_graph import Edge, route_hops
from mambalens.figures.flow_pieces import pieces_of
from mambalens.figures.style import PATH_STYLES, PATHS, main_path, put_in, signed
from mambalens.flow.table import EDGE, EDGE_FEATURES, levels
from mambalens.flow.verbs import FlowVerbs
from mambalens.hooks.errors import MambalensError
from mambalens.html.render import render
from mambalens.report.assets import left_out, plain, rounded, texts, write

if TYPE_CHECKING:
    from mambalens.flow.data import FlowData

EDGES = 300
"""Edges of a prompt that a page keeps."""
FEATURES = 5
"""Features of an edge that a page keeps."""
STRONG = 0.87
"""Share of the largest mean from which black can be read on its colour, and white cannot."""
_PROMPT = ["model", "features", "fact_id"]

Route = Sequence[Edge | Sequence[Edge]]
"""Hops, each an edge (layer, path, source, target) or several side by side."""


def write_flow_report(
    flow: FlowData,
    path: str | Path,
    title: str | None = None,
    facts: int = DETAILED,
    edges: int = EDGES,
    features: pd.DataFrame | None = None,
    routes: pd.DataFrame | Mapping[tuple[str, str], Route] | None = None,
    progress: bool = True,
) -> Path:
    """Write one HTML page to look at a flow with; it needs no network.

    Args:
        flow: edges and what is known of their facts.
        path: the .html file.
        title: a heading; by default the models.
        facts: facts of each model that can be chosen; means by piece are over all.
        edges: the strongest edges of each prompt, which the page keeps.
        features: what edges carry by single features, as `Flow.edge_features` gives it: columns
            `flow.table.EDGE_FEATURES`. Without, a flow that knows its model computes it for the edges that the page
            keeps; of others, the page says nothing about features.
        routes: by model and fact_id, the route to mark; or a table of them with the columns model, fact_id and edges,
            of which the first of each fact is taken.
        progress: show a progress bar where features are computed.

    Returns:
        The file.

    Raises:
        MambalensError: if it cannot be written, or what is given does not fit the flow.
    """
    for name, number in (("facts", facts), ("edges", edges)):
        if number < 1:
            raise MambalensError(f"{name}={number}: give 1 or more to keep in the page.")
    if not len(flow.table):
        raise MambalensError("The flow has no edges: there is nothing to report.")
    features = _features_known(flow, facts, edges, progress) if features is None else features
    missing = [name for name in EDGE_FEATURES if features is not None and name not in features]
    if missing:
        raise MambalensError(
            f"The features have no {' and no '.join(missing)}: columns are {', '.join(EDGE_FEATURES)}."
        )
    heading = title or f"Where facts flow: {', '.join(flow.models)}"
    return write(path, _page(flow, heading, facts, edges, features, _routes(routes)))


def _page(
    flow: FlowData,
    title: str,
    most_facts: int,
    most_edges: int,
    features: pd.DataFrame | None,
    routes: dict[tuple[str, str], Route],
) -> str:
    words = {"main": main_path(flow), **PATHS}
    paths = [path for path in PATH_STYLES if path in set(flow.table.path)]
    prompts = list(_prompts(flow, most_facts, most_edges, features, routes))
    data = {
        "measure": {"name": flow.measure, "unit": flow.unit},
        "layers": _layers(flow),
        "paths": [{"name": path, "word": words[path]} for path in paths],
        "prompts": prompts,
        "kept": most_edges,
        "has_features": features is not None,
    }
    return render(
        "flow.html", title=title, data=plain(data), measure=flow.measure, unit=flow.unit,
        models=[_about(flow, model) for model in flow.models], n_prompts=len(prompts),
        choices={name: list(dict.fromkeys(one[name] for one in prompts)) for name in ("model", "features")},
        paths={path: words[path] for path in paths}, deepest=max(_layers(flow).values()) - 1,
        not_kept={name: left for name in flow.models if (left := _n_facts(flow, name) - most_facts) > 0},
        pieces=[_by_piece(flow, model, group, words) for model, group in _groups(flow)],
        unfinished=flow.unfinished, **left_out(flow.skipped), **texts("flow.js", "flow.css"),
    )  # fmt: skip


def _features_known(flow: FlowData, facts: int, edges: int, progress: bool) -> pd.DataFrame | None:
    """The strongest features of the edges that the page keeps, where the flow's model is at hand."""
    if not isinstance(flow, FlowVerbs) or not flow.knows_model:
        return None
    kept = flow.where(fact_id=list(flow.table.fact_id.unique()[:facts]))
    return kept.edge_features(edges, FEATURES, progress)


def _routes(routes: pd.DataFrame | Mapping[tuple[str, str], Route] | None) -> dict[tuple[str, str], Route]:
    """Routes by model and fact."""
    if not isinstance(routes, pd.DataFrame):
        return dict(routes or {})
    missing = [name for name in ("model", "fact_id", "edges") if name not in routes]
    if missing:
        raise MambalensError(f"The routes have no {' and no '.join(missing)}: they need model, fact_id and edges.")
    first = routes.drop_duplicates(["model", "fact_id"])
    keys = zip(first.model.astype(str), first.fact_id.astype(str), strict=True)
    return dict(zip(keys, first.edges.tolist(), strict=True))


def _layers(flow: FlowData) -> dict[str, int]:
    """Layers of every model."""
    return {one.model: one.n_layers for one in flow.configs}


def _n_facts(flow: FlowData, model: str) -> int:
    return int(flow.table.fact_id[flow.table.model == model].nunique())


def _groups(flow: FlowData) -> list[tuple[str, str]]:
    return list(flow.table[["model", "features"]].drop_duplicates().itertuples(index=False, name=None))


def _prompts(
    flow: FlowData,
    most_facts: int,
    most_edges: int,
    features: pd.DataFrame | None,
    routes: dict[tuple[str, str], Route],
) -> Iterable[dict[str, Any]]:
    """Every prompt that can be chosen, with its strongest edges."""
    table = flow.table.assign(effect=flow.effect)
    facts = flow.facts.drop_duplicates("fact_id").set_index("fact_id")
    base = flow.base.set_index(["model", "fact_id"])
    tokens = flow.prompts.set_index(["model", "fact_id"])
    single = {} if features is None else dict(tuple(features.groupby(["model", "fact_id"], sort=False, observed=True)))
    ids = {
        model: set(part.fact_id.unique()[:most_facts])
        for model, part in table.groupby("model", sort=False, observed=True)
    }
    for found_key, found in table.groupby(_PROMPT, sort=False, observed=True):
        key: tuple[Any, ...] = found_key  # type: ignore[assignment]
        model, group, fact_id = key
        if fact_id not in ids[model]:
            continue
        for what, known in (("base", base), ("tokens", tokens)):
            if (model, fact_id) not in known.index:
                raise MambalensError(
                    f"The flow was kept without the {what} of {fact_id!r}: run it again in its folder."
                )
        found = levels(found)
        edges = found.iloc[np.argsort(-found.effect.abs().to_numpy(), kind="stable")]
        hops = route_hops(edges, routes.get((model, fact_id), ()), f"is {fact_id!r}")
        steps = {index: step for step, hop in enumerate(hops) for index in hop}
        leads = [hop[0] for hop in hops]
        kept = edges[(np.arange(len(edges)) < most_edges) | edges.index.isin(leads)]
        of_base, of_tokens, fact = base.loc[(model, fact_id)], tokens.loc[(model, fact_id)], facts.loc[fact_id]
        at = [dict(zip(edges[name], edges[f"{name}_piece"], strict=True)) for name in ("source", "target")]
        yield {
            "model": model,
            "features": group,
            "id": fact_id,
            "text": pieces(fact["prompt"], fact["subject"]),
            "target": str(fact["target"]),
            "prob": rounded([of_base.prob])[0],
            "measure": rounded([of_base.measure])[0],
            "tokens": list(of_tokens.tokens),
            "pieces": [str(at[0].get(i, at[1].get(i, ""))) for i in range(len(of_tokens.tokens))],
            "subject": [int(i) for i in of_tokens.subject],
            "n": len(edges),
            "whole": float(edges.effect.abs().sum()),
            "exact": int(edges.exact.notna().sum()),
            "edges": {
                **{name: kept[name].tolist() for name in (*EDGE, "begin", "end")},
                "attributed": rounded(kept.attributed),
                "exact": rounded(kept.exact),
                "step": [steps.get(index) for index in kept.index],
                "lead": [index in leads for index in kept.index],
            },
            "single": _single(kept, single.get((model, fact_id))),
        }  # fmt: skip


def _single(kept: pd.DataFrame, features: pd.DataFrame | None) -> dict[int, list[tuple[Any, float | None]]]:
    """Features of the edges that have any, by the edge's place among those kept, the strongest first."""
    if features is None:
        return {}
    names = list(EDGE)
    place = {edge: i for i, edge in enumerate(kept[names].itertuples(index=False, name=None))}
    found = {}
    for edge, rows in features.groupby(names, sort=False, observed=True):
        if edge in place:
            rows = rows.iloc[np.argsort(-rows.effect.abs().to_numpy(), kind="stable")]
            found[place[edge]] = list(zip(rows.feature.tolist(), rounded(rows.effect), strict=True))
    return found


def _about(flow: FlowData, model: str) -> dict[str, Any]:
    """What was run on a model."""
    table, base = flow.table[flow.table.model == model], flow.base[flow.base.model == model]
    return {
        "name": model,
        "layers": _layers(flow)[model],
        "facts": _n_facts(flow, model),
        "edges": len(table),
        "exact": int(table.exact.notna().sum()),
        "put_in": put_in(flow.ablation),
        "median": float(base.prob.median()),
    }


def _by_piece(flow: FlowData, model: str, features: str, words: dict[str, str]) -> dict[str, Any]:
    """Mean effects by pieces of the prompt, as cells with shares of colours."""
    found = pieces_of(flow, model, features)
    reach = max(float(np.nanmax(np.abs(grid))) for grid in found.means.values()) or 1.0

    def cell(value: float) -> dict[str, Any]:
        if np.isnan(value):
            return {"text": "", "title": "the layer has no such path", "kind": "none", "share": 0}
        return {
            "text": signed(value) if abs(value) >= 0.05 * reach else "·",
            "title": signed(value, 4),
            "kind": ("loss" if value < 0 else "gain") + (" strong" if abs(value) > STRONG * reach else ""),
            "share": round(85 * abs(value) / reach),  # of the full colour, as in figures of scripts
        }

    return {
        "name": model if len(flow.models) > 1 else "",
        "features": features if flow.table.features.nunique() > 1 else "",
        "facts": found.facts,
        "of": found.of,
        "share": found.share,
        "panels": [
            {
                "word": words[path], "layers": list(range(grid.shape[1])),
                "rows": [[cell(value) for value in row] for row in grid],
            }
            for path, grid in found.means.items()
        ],
        "pairs": [
            {
                "source": source, "target": target, "n": n, "total": signed(mean),
                "interval": "" if np.isnan(low) else f"[{signed(low)}, {signed(high)}]",
            }
            for (source, target), n, (mean, low, high) in zip(found.pairs, found.n, found.total, strict=True)
        ],
    }  # fmt: skip
