"""What `mambalens flow` prints of a flow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mambalens.cli.output import skipped
from mambalens.facts.fact import Fact
from mambalens.figures.flow_pieces import pieces_of
from mambalens.figures.style import put_in, signed

if TYPE_CHECKING:
    import pandas as pd

    from mambalens.cli.flow_files import Found
    from mambalens.lens import Lens
    from mambalens.result import Flow

SHOWN = 12
"""Edges, or pairs of pieces, on the screen."""
CHAINS = 5
"""Chains of pieces on the screen."""
TOLD = 1.0
"""What a route carries of the answer at least, in %, to be told on the screen; the first is in any case."""


def told(found: Found, lens: Lens, source: str, keep: float | None) -> None:
    """Print what was found.

    Args:
        found: a flow and what was asked of it.
        lens: the model.
        source: role at which routes begin.
        keep: share of the answer that circuits keep.
    """
    flow = found.flow
    if found.single:
        _edges(flow, lens)
    else:
        _by_piece(flow)
    click.echo(f"\n{_certificate(found)}")
    if found.routes is not None:
        click.echo(f"\n{_routes(found, source)}")
    if found.circuit is not None and keep is not None:
        click.echo(f"\n{_circuit(found, keep)}")
    skipped(flow)


def _edges(flow: Flow, lens: Lens) -> None:
    """The strongest edges of the one prompt."""
    about: Any = flow.facts.iloc[0]
    base: Any = flow.base.iloc[0]
    fact = Fact(about.prompt, about.subject, about.target)
    scored = lens.prompt(fact).target_id
    first: Any = lens.predict(fact, 1).iloc[0]
    other = f"; the model's own answer is {first.token!r}, {first.prob:.3g}" if first.token_id != scored else ""
    click.echo(f"{lens.name}: {fact.prompt} →{fact.continuation}")
    token = lens.tokenizer.decode([scored])
    click.echo(f"Without a cut the target's first token, {token!r}, has the probability {base.prob:.3g}{other}.\n")
    strongest, tokens = flow.strongest(SHOWN), flow.tokens(base.fact_id)
    click.echo(
        f"The {len(strongest)} strongest of {base.edges:,} edges, and by how much cutting each alone changes the "
        f"{_lower(flow.measure)};\nbelow zero, the edge helps the answer:\n"
    )
    _lines({
        "layer": [str(layer) for layer in strongest.layer],
        "path": list(strongest.path.astype(str)),
        "from": [_token(tokens, position) for position in strongest.source],
        "to": [_token(tokens, position) for position in strongest.target],
        "effect": [signed(effect) for effect in strongest.effect],
        "": ["attributed" if np.isnan(exact) else "exact" for exact in strongest.exact],
    }, right=("layer", "effect"))  # fmt: skip


def _by_piece(flow: Flow) -> None:
    """What pieces of the prompt hand over, over all facts."""
    found = pieces_of(flow)
    order = sorted(range(len(found.pairs)), key=lambda i: -abs(found.total[i][0]))
    shown = [(*found.pairs[i], found.n[i], *found.total[i]) for i in order[:SHOWN]]
    click.echo(
        f"{', '.join(flow.models)}, {len(flow.base)} facts: by how much cutting the edges between two pieces of the "
        f"prompt changes the\n{_lower(flow.measure)}, each edge alone, added up over layers and paths; means over the "
        "facts that have both pieces,\nwith 95 % intervals; below zero, the edges help the answer:\n"
    )
    _lines({
        "from": [row[0] for row in shown], "to": [row[1] for row in shown], "facts": [str(row[2]) for row in shown],
        "effect": [signed(row[3]) for row in shown],
        "": ["" if np.isnan(row[4]) else f"[{signed(row[4])}, {signed(row[5])}]" for row in shown],
    }, right=("facts", "effect"))  # fmt: skip


def _certificate(found: Found) -> str:
    """How far the attributed numbers can be trusted, in a line."""
    if found.agreement is None or found.certificate is None:
        return "Certificate: none, no edge was cut. --certify 40 cuts the 40 strongest of every fact exactly."
    known = found.certificate.set_index("measured")
    top = found.agreement.top
    most = str(top.max()) if top.min() == top.max() else f"{top.min()} to {top.max()}"
    begin = f"the {most} strongest edges cut exactly"
    if (found.flow.table.chosen == "all").all():
        begin = f"every edge cut exactly; the {most} strongest as attributed"

    def said(name: str, scale: float, digits: int, unit: str = "") -> str:
        row: Any = known.loc[name]
        if not row.facts:
            return "not known"
        span = f" [{scale * row.median_low:.{digits}f}, {scale * row.median_high:.{digits}f}]"
        return f"{scale * row['median']:.{digits}f}{unit}" + ("" if found.single else span)

    parts = [
        begin,
        f"rank correlation with the attributed numbers {said('rank_correlation', 1, 2)}",
        f"same sign {said('sign_agreement', 100, 0, ' %')}",
    ]
    if known.facts["share_rest"]:
        parts.append(f"all other edges {said('share_rest', 100, 0, ' %')} of the absolute effect")
    parts[0] += put_in(found.flow.ablation)
    medians = "" if found.single else f" (medians over {len(top)} facts)"
    return f"Certificate: {', '.join(parts)}{medians}"


def _routes(found: Found, source: str) -> str:
    """Routes of the one prompt, or chains of pieces over all facts, in words."""
    routes = found.routes
    if routes is None or not len(routes):
        return f"Routes: none, no token lies between {source} and the last."
    if found.routes_by_piece is not None:
        chains = found.routes_by_piece.head(CHAINS)
        rows: list[Any] = list(chains.itertuples())
        lines = [
            f"  {row.pieces.replace('source', source, 1)} carries {_share(row.carried_pct)} %"
            + ("" if np.isnan(row.low) else f" [{_share(row.low)}, {_share(row.high)}]")
            + f" of the answer in {row.facts} fact{'s' * (row.facts > 1)}"
            for row in rows
        ]
        begin = f"Routes by pieces, the {len(chains)} strongest of {len(found.routes_by_piece)}{_put_in(chains)}:"
        return "\n".join([begin, *lines])
    lines = [f"Routes, and what cutting each step alone loses of the answer's probability{_put_in(routes)}:"]
    told = routes[(routes.carried_pct >= TOLD) | (routes["rank"] == 1)]
    shown: list[Any] = list(told.itertuples())
    for row in shown:
        sides = [
            " + ".join(f"{at} {token!r}" for at, token in zip(*side, strict=True))
            for side in zip(row.relays, row.relay_tokens, strict=True)
        ]
        stops = [source, *sides, "last"]
        lines.append(f"  {row.rank}. {' → '.join(stops)} carries {_share(row.carried_pct)} % of the answer")
        for begin, end, loss, ways in zip(stops, stops[1:], row.hop_pct, row.ways, strict=False):
            lines.append(f"       {begin} → {end}: {_share(loss)} %, {ways or 'no edge'}")
    if len(told) < len(routes):
        most = max(0.0, routes.carried_pct.drop(told.index).max())
        lines.append(f"  No other carries more than {_share(most)} %.")
    return "\n".join(lines)


def _circuit(found: Found, keep: float) -> str:
    """How few edges keep the answer."""
    assert found.circuit is not None
    first = found.circuit.drop_duplicates(["model", "fact_id"])
    # A fact without a row keeps its answer with every edge cut.
    sizes = [*first.edges, *[0] * (len(found.flow.base) - len(first))]
    if found.single:
        if not len(first):
            return f"Circuit: none is needed, the model keeps {100 * keep:g} % of the answer with every edge cut."
        row: Any = first.iloc[0]
        return (
            f"Circuit: {row.edges} of {row.of:,} edges keep {100 * row.kept:.1f} % of the answer, all others "
            f"cut{_put_in(first)}."
        )
    return (
        f"Circuits that keep {100 * keep:g} % of the answer, all other edges cut: {np.median(sizes):g} edges in the "
        f"median over {len(sizes)} facts, {min(sizes)} to {max(sizes)}{_put_in(first)}."
    )


def _put_in(table: pd.DataFrame) -> str:
    """What stood in the place of what was cut, as a table of routes or circuits has it."""
    return put_in(str(table.ablation.iloc[0])) if len(table) else ""


def _lines(columns: dict[str, list[str]], right: tuple[str, ...]) -> None:
    """Print a table of texts, every column as wide as it must be."""
    padded = []
    for name, values in columns.items():
        width = max(map(len, [name, *values]))
        padded.append([text.rjust(width) if name in right else text.ljust(width) for text in (name, *values)])
    for line in zip(*padded, strict=True):
        click.echo("  ".join(line).rstrip())


def _share(percent: float) -> str:
    return signed(percent, 1).removeprefix("+")


def _token(tokens: list[str], position: int) -> str:
    return f"{position:2} {tokens[position]!r}"


def _lower(words: str) -> str:
    return words[0].lower() + words[1:]
