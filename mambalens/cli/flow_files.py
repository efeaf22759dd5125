"""A flow and what was asked of it, as tables, figure and page in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from mambalens.flow.table import EDGES
from mambalens.hooks.errors import MambalensError
from mambalens.result import Flow
from mambalens.runs.folder import FLOW
from mambalens.runs.stored import folders_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRAPH, BY_PIECE, PAGE, ROUTES = "graph.png", "by_piece.png", "flow.html", "routes.csv"
LISTS = ("relays", "relay_tokens", "hop_pct", "ways", "edges")
"""Columns of routes that hold lists: a .csv file has them as JSON."""


class Found(NamedTuple):
    """A flow and what was asked of it; None where it was not."""

    flow: Flow
    agreement: pd.DataFrame | None = None
    certificate: pd.DataFrame | None = None
    routes: pd.DataFrame | None = None
    routes_by_piece: pd.DataFrame | None = None
    circuit: pd.DataFrame | None = None

    @property
    def single(self) -> bool:
        """Whether it is of one prompt."""
        return len(self.flow.base) == 1


def write(found: Found, out: Path) -> list[str]:
    """Write tables, figure and page into a folder.

    Returns:
        The files' names.
    """
    name, figure = figure_of(found)
    figure.savefig(out / name, dpi=130)
    found.flow.report(out / PAGE, routes=found.routes)
    written = [name, PAGE]
    for table_name in ("certificate", "agreement", "routes", "routes_by_piece", "circuit"):
        table: pd.DataFrame | None = getattr(found, table_name)
        if table is None:
            continue
        if table_name == "routes":
            table = table.assign(**{column: table[column].map(json.dumps) for column in LISTS})
        table.to_csv(out / f"{table_name}.csv", index=False)
        written.append(f"{table_name}.csv")
    return written


def read_routes(folder: Path) -> pd.DataFrame | None:
    """The routes that `write` left in a folder, if there are any.

    Raises:
        MambalensError: if the file is not as it was left.
    """
    path = folder / ROUTES
    if not path.exists():
        return None
    try:
        table = pd.read_csv(path, dtype={"model": str, "fact_id": str}, keep_default_na=False)
        return table.assign(**{column: table[column].map(json.loads) for column in LISTS})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise MambalensError(
            f"The routes in {str(path)!r} cannot be read ({error}): remove the file, or ask for the flow again."
        ) from error


def figure_of(found: Found) -> tuple[str, Figure]:
    """The graph of a single prompt with its first route, or the flow by piece over several; with the file's name."""
    if not found.single:
        return BY_PIECE, found.flow.plot_pieces()
    route: Any = ()
    if found.routes is not None:
        of_fact = found.routes[found.routes.fact_id == found.flow.base.fact_id[0]]
        route = of_fact.edges.iloc[0] if len(of_fact) else ()
    return GRAPH, found.flow.plot(route=route)


def load(folders: Sequence[Path], where: Mapping[str, list[str]]) -> Found:
    """Flows that were kept, put together, with the routes that were found in them.

    Args:
        folders: folders of flows.
        where: columns and the values that are kept.
    """
    flow = Flow.concat([Flow.load(folder) for folder in folders])
    places = [place for folder in folders for place in folders_of(folder, FLOW)]
    kept = [routes for place in places if (routes := read_routes(place)) is not None]
    if where:
        flow = flow.where(**where)
    # A route's edges may be among those that are filtered out.
    some = set(where) & (set(EDGES) - {"model", "fact_id"})
    return Found(flow, routes=pd.concat(kept, ignore_index=True) if kept and not some else None)
