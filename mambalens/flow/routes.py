"""Relays and routes: by which positions what a source knows comes to the last token.

A route is a chain of positions, s -> r -> ... -> t, where several may relay side by side; a hop of it is every edge
between its positions, of all layers and paths. Cutting one hop of a chain that carries the answer loses what cutting
all of them loses, and no more: what the hops lose in common is the chain's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mambalens.facts.pieces import PIECES, piece_of
from mambalens.facts.prompts import Batch, Prompt
from mambalens.flow.exact import Edge
from mambalens.flow.work import FlowWork, Listed
from mambalens.runs.intervals import mean_intervals
from mambalens.sweep.prediction import target_probability

if TYPE_CHECKING:
    import pandas as pd

RELAYS = 8
"""Positions of a prompt that a longer chain is looked for behind."""
SIDE_BY_SIDE = 4
"""Positions that relay side by side at most."""
GAIN = 0.02
"""Share of the answer that one more relay beside the others has to add."""
KEEP = 0.9
"""Share of a hop's cost that the edges named for it have together."""


ROUTES = ("model", "fact_id", "rank", "relays", "relay_tokens", "pieces", "carried_pct", "hop_pct", "joint_pct", "ways",
          "edges", "ablation")  # fmt: skip
"""Columns of a table of routes."""


class Hop(NamedTuple):
    """One step of a route: every edge from any of some positions to any of others, right of them."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


Hops = tuple[Hop, ...]


class Route(NamedTuple):
    """A chain of positions with what its cuts cost."""

    hops: Hops
    costs: tuple[float, ...]
    """What cutting each hop alone costs: share of the answer's probability that is lost, 1 for all of it."""
    joint: float
    """What cutting all hops costs."""

    @property
    def carried(self) -> float:
        """What the route carries, see `carried_by`."""
        return carried_by(self.costs, self.joint)

    @property
    def relays(self) -> tuple[tuple[int, ...], ...]:
        """The positions between source and last token, step by step."""
        return tuple(hop.targets for hop in self.hops[:-1])


def carried_by(costs: Sequence[float], joint: float) -> float:
    """What a chain of hops carries.

    Equation: Routes
        carried = min(min_i loss(H_i), (sum_i loss(H_i) - loss(H_1 u ... u H_n)) / (n - 1))

        Source: this package; the second term is, of two hops, the interaction of their cuts

        Of a chain of n hops H_i; loss is the share of the answer's probability that is lost. The second term is what
        the first hop loses that is not lost once more where the others are cut too: hops that lose the same X, which is
        also what they lose together, carry X, and hops that have nothing to do with each other carry 0. In a chain of
        three it is a mean of two such shares, which two hops that lose the same make large by themselves, whatever lies
        between them. What a chain carries passes every hop of it, so it is never more than its smallest loss, which is
        below zero where a hop works against the answer.

    Args:
        costs: what cutting each hop alone loses.
        joint: what cutting all of them loses.
    """
    return min(*costs, (sum(costs) - joint) / (len(costs) - 1))


def routes_of(work: FlowWork, prompt: Prompt, batch: Batch, start: Sequence[int], k: int, prob: float) -> list[Route]:
    """The strongest routes of one prompt to its last token.

    Every position that is no source is tried as the one relay, exactly. The strongest gets others beside it, as long as
    one adds to what they carry, and the strongest every position before them as a first relay.

    Args:
        work: the model.
        prompt: the prompt.
        batch: the same as a batch.
        start: positions at which routes begin, without the last.
        k: how many.
        prob: probability of the answer.
    """
    last = len(prompt.ids) - 1
    loss = Losses(work, batch, work.edges(len(prompt.ids)), prob)
    between = [r for r in range(min(start) + 1, last) if r not in start]

    def by(relays: Iterable[int]) -> Hops:
        """The chain with these relays side by side."""
        side = tuple(sorted(relays))
        return Hop(tuple(start), side), Hop(side, (last,))

    single = [loss.route(hops) for hops in loss.asked([by({r}) for r in between])]
    found = {route.hops: route for route in single}
    best = max(single, key=lambda route: route.carried, default=None)
    while best is not None and len(best.relays[0]) < SIDE_BY_SIDE:
        wider = loss.asked([by({*best.relays[0], r}) for r in between if r not in best.relays[0]])
        widest = max((loss.route(hops) for hops in wider), key=lambda route: route.carried, default=None)
        if widest is None or widest.carried < best.carried + GAIN:
            break
        best = found[widest.hops] = widest
    ends = sorted(single, key=lambda route: -route.costs[1])[:RELAYS]
    double = [
        (Hop(tuple(start), (r,)), Hop((r,), end.relays[0]), end.hops[1])
        for end in ends for r in between if r < end.relays[0][0]
    ]  # fmt: skip
    found |= {hops: loss.route(hops) for hops in loss.asked(double)}
    return sorted(found.values(), key=lambda route: -route.carried)[:k]


class Losses:
    """What cutting hops loses of the answer, each set of hops once."""

    def __init__(self, work: FlowWork, batch: Batch, listed: Listed, prob: float) -> None:
        self.work, self.batch, self.listed, self.prob = work, batch, listed, prob
        self.known: dict[Hops, float] = {}

    def edges(self, hop: Hop) -> list[Edge]:
        """All edges of a hop."""
        here = np.isin(self.listed.source, hop.sources) & np.isin(self.listed.target, hop.targets)
        return [self.work.edge(self.listed, int(number)) for number in here.nonzero()[0]]

    def asked(self, chains: Sequence[Hops]) -> Sequence[Hops]:
        """The chains themselves, after cutting each of their hops alone and all of them together."""
        alone = [(hop,) for hops in chains for hop in hops]
        new = [hops for hops in dict.fromkeys([*alone, *chains]) if hops not in self.known]
        if new:
            losses = self.of([[edge for hop in hops for edge in self.edges(hop)] for hops in new])
            self.known |= dict(zip(new, losses, strict=True))
        return chains

    def route(self, hops: Hops) -> Route:
        """A chain that was asked for."""
        return Route(hops, tuple(self.known[hop,] for hop in hops), self.known[hops])

    def of(self, cuts: Sequence[Sequence[Edge]]) -> list[float]:
        """What cutting sets of edges loses."""
        (prob,) = self.work.exact.scores(self.batch, [cuts], target_probability)
        return (1 - prob / self.prob).tolist()


def carriers(loss: Losses, hop: Hop, rows: pd.DataFrame) -> list[Edge]:
    """The edges of a hop that have `KEEP` of its cost when they are cut together, the strongest first."""
    edges = loss.edges(hop)
    if not edges:
        return []
    effect = rows.exact.fillna(rows.attributed)
    keys = zip(rows.layer, rows.mixer, rows.path, rows.source, rows.target, strict=True)
    known = {
        (int(a), str(b), str(c), int(d), int(e)): float(v) for (a, b, c, d, e), v in zip(keys, effect, strict=True)
    }

    def strength(edge: Edge) -> float:
        return known[edge.mixer.layer, edge.mixer.kind, edge.path.names[0], edge.source, edge.target]

    ordered = sorted(edges, key=strength)
    sizes = range(1, len(ordered) + 1)
    losses = loss.of([ordered[:size] for size in sizes])
    wanted = KEEP * losses[-1]
    enough = next((size for size, lost in zip(sizes, losses, strict=True) if lost >= wanted), len(ordered))
    return ordered[:enough]


def table_of(
    prompt: Prompt, model: str, routes: Sequence[Route], named: Sequence[Sequence[Sequence[Edge]]], ablation: str
) -> pd.DataFrame:
    """One prompt's routes as rows, see `Flow.routes`."""
    import pandas as pd

    of = piece_of(prompt)
    rows: list[dict[str, Any]] = []
    for rank, (route, edges) in enumerate(zip(routes, named, strict=True), 1):
        pieces = [sorted({of[r] for r in side}, key=list(PIECES).index) for side in route.relays]
        rows.append({
            "model": model, "fact_id": str(prompt.fact.id), "rank": rank,
            "relays": [list(side) for side in route.relays],
            "relay_tokens": [[prompt.tokens[r] for r in side] for side in route.relays],
            "pieces": " → ".join(["source", *(" + ".join(side) for side in pieces), "last"]),
            "carried_pct": 100 * route.carried, "hop_pct": [100 * cost for cost in route.costs],
            "joint_pct": 100 * route.joint, "ways": [ways(of_hop) for of_hop in edges],
            "edges": [[(e.mixer.layer, e.path.names[0], e.source, e.target) for e in of_hop] for of_hop in edges],
            "ablation": ablation,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=list(ROUTES))


def ways(edges: Sequence[Edge]) -> str:
    """By what some edges carry: `'conv of layers 5, 7, 9-11'`."""
    layers: dict[str, set[int]] = {}
    for edge in edges:
        way = "attention" if edge.mixer.kind == "attention" else edge.path.names[0]
        layers.setdefault(way, set()).add(edge.mixer.layer)
    return "; ".join(f"{way} of layer{'s' * (len(of) > 1)} {_runs(sorted(of))}" for way, of in layers.items())


def _runs(numbers: Sequence[int]) -> str:
    """Numbers, three and more in a row as 'first-last'."""
    found: list[str] = []
    begin = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            run = numbers[begin:end]
            found += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
            begin = end
    return ", ".join(found)


def pieces_asked(table: pd.DataFrame) -> list[str]:
    """The chains of pieces that any fact's route has, and every single piece as the one relay."""
    relays = ("after_subject", "soon_after", "relation")
    return list(dict.fromkeys([*(f"source → {piece} → last" for piece in relays), *table.pieces]))


def losses_by_piece(
    work: FlowWork, prompt: Prompt, batch: Batch, start: Sequence[int], chains: Sequence[str], prob: float
) -> list[Route | None]:
    """What chains of pieces cost in one prompt, all positions of a piece together; None where it lacks one of them.

    Args:
        work: the model.
        prompt: the prompt.
        batch: the same as a batch.
        start: positions at which routes begin.
        chains: as `pieces_asked` names them.
        prob: probability of the answer.
    """
    of, last = piece_of(prompt), len(prompt.ids) - 1
    loss = Losses(work, batch, work.edges(len(prompt.ids)), prob)
    found: list[Hops | None] = []
    for chain in chains:
        names = [side.split(" + ") for side in chain.split(" → ")[1:-1]]
        sides = [tuple(i for i in range(last) if of[i] in side and i not in start) for side in names]
        stops = [tuple(start), *sides, (last,)]
        hops = tuple(Hop(a, b) for a, b in pairwise(stops))
        found.append(hops if all(sides) and all(loss.edges(hop) for hop in hops) else None)
    loss.asked([hops for hops in found if hops is not None])
    return [None if hops is None else loss.route(hops) for hops in found]


def by_pieces(
    model: str, chains: Sequence[str], routes: Sequence[Sequence[Route | None]], ablation: str
) -> pd.DataFrame:
    """What chains of pieces carry over many facts, the strongest first; see `_plainest_first`.

    Args:
        model: what tables call it.
        chains: as `pieces_asked` names them.
        routes: of every fact, from `losses_by_piece`.
        ablation: what tables call what stood in the place of the edges.

    Returns:
        model, pieces, facts (those that have the pieces), carried_pct, low, high (mean and 95 % bootstrap interval over
        these), joint_pct, joint_low, joint_high (all hops cut together), ablation.
    """
    import pandas as pd

    rows = []
    for chain, of_chain in zip(chains, zip(*routes, strict=True), strict=True):
        there = [route for route in of_chain if route is not None]
        if there:
            carried = np.array([100 * route.carried for route in there])
            joint = np.array([100 * route.joint for route in there])
            of_carried, of_joint = mean_intervals([carried, joint], "bootstrap")
            rows.append((model, chain, len(there), *of_carried, *of_joint, ablation))
    names = ["model", "pieces", "facts", "carried_pct", "low", "high", "joint_pct", "joint_low", "joint_high",
             "ablation"]  # fmt: skip
    return pd.DataFrame(_plainest_first(rows), columns=names)


def _plainest_first(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows of `by_pieces` by what they carry; a piece more that adds less than `GAIN` comes after the chain without."""
    left, ordered = sorted(rows, key=lambda row: -row[3]), []
    while left:
        most = left[0]
        as_good = [row for row in left if row[3] >= most[3] - 100 * GAIN and _words(row[1]) <= _words(most[1])]
        ordered.append(min(as_good, key=lambda row: len(_words(row[1]))))
        left.remove(ordered[-1])
    return ordered


def _words(chain: str) -> set[str]:
    """The pieces of a chain."""
    return set(chain.replace(" + ", " → ").split(" → "))
