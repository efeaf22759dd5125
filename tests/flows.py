"""Flows made up for tests of figures and of the page: real prompts, random effects of which few are strong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mambalens import Fact, Lens
from mambalens.facts.pieces import piece_of
from mambalens.flow.data import FlowData
from mambalens.flow.table import EDGE_FEATURES, EDGES
from mambalens.runs.config import RunConfig

TAPS = 3
"""Tokens that the convolution looks back."""


def made(
    facts: Sequence[Fact],
    lens: Lens,
    layers: int = 12,
    paths: Sequence[str] = ("main", "conv"),
    exact: int = 30,
    model: str = "atlas-mamba1",
    seed: int = 0,
) -> FlowData:
    """A flow of facts: every edge, a relay from the subject through the token after it, and `exact` edges cut."""
    rng = np.random.default_rng(seed)
    rows, prompts = [], []
    for fact in facts:
        prompt = lens.prompt(fact)
        pieces = piece_of(prompt)
        of_fact = edges(pieces, layers, paths, rng, exact)
        prob = float(rng.uniform(0.4, 0.99))
        log_odds = float(np.log(prob / (1 - prob)))
        rows.append(of_fact.assign(fact_id=fact.id, model=model, base_prob=prob, base_measure=log_odds))
        prompts.append((model, fact.id, prompt.tokens, prompt.positions("subject")))
    table = pd.concat(rows, ignore_index=True)[list(EDGES)]
    return FlowData(
        table.astype(dict.fromkeys(("mixer", "path", "features"), "category")),
        pd.DataFrame(columns=["fact_id", "source", "reason"]),
        pd.DataFrame([(f.id, f.prompt, f.subject, f.target, f.relation) for f in facts],
                     columns=["fact_id", "prompt", "subject", "target", "relation"]),
        pd.DataFrame(prompts, columns=["model", "fact_id", "tokens", "subject"]),
        [RunConfig(model=model, n_layers=layers, kinds=("mamba1",), facts="made up", n_facts=len(facts), target="last")],
    )  # fmt: skip


def edges(
    pieces: Sequence[str], layers: int, paths: Sequence[str], rng: np.random.Generator, exact: int
) -> pd.DataFrame:
    """Every edge of a prompt whose positions are those pieces; attributed numbers miss the exact ones as real ones do."""
    time, rows = len(pieces), []
    for layer in range(layers):
        for path in paths:
            for target in range(time):
                for source in range(max(0, target - TAPS) if path == "conv" else 0, target):
                    size = 0.012 * rng.standard_t(2.5)
                    if pieces[target] == "last":
                        size *= 4
                    rows.append((layer, "mamba1", path, source, target, pieces[source], pieces[target], "all", size))
    names = ["layer", "mixer", "path", "source", "target", "source_piece", "target_piece", "features", "attributed"]
    table = pd.DataFrame(rows, columns=names)
    subject = pieces.index("subject_last")
    relay = min(subject + 1, time - 1)
    for layer, path, source, target, size in [
        (layers // 3, "conv", subject, relay, -2.1),
        (layers // 2, "conv", subject, relay, -1.4),
        (2 * layers // 3, "main", relay, time - 1, -2.6),
        (layers - 2, "main", relay, time - 1, -1.1),
        (layers - 2, "main", subject, time - 1, 0.8),
    ]:
        at = (table.layer == layer) & (table.path == path) & (table.source == source) & (table.target == target)
        table.loc[at, "attributed"] = size * rng.uniform(0.7, 1.3)
    table["exact"] = np.nan
    strong = table.attributed.abs().sort_values(ascending=False).index[:exact]
    drawn = rng.choice(len(table), min(exact // 3, len(table)), replace=False)
    table["chosen"] = ""
    table.loc[drawn, "chosen"] = "sample"
    table.loc[strong, "chosen"] = "top"
    for index in {*strong, *drawn}:
        table.loc[index, "exact"] = table.attributed[index] * rng.uniform(0.5, 1.4) + 0.02 * rng.standard_normal()
    return table


def features_of(flow: FlowData, count: int = 4, seed: int = 0) -> pd.DataFrame:
    """What single features of the strongest edges carry: shares of the edge that add up to it."""
    rng, rows = np.random.default_rng(seed), []
    for edge in flow.strongest(10).itertuples():
        for feature, share in zip(rng.choice(384, count, replace=False), rng.dirichlet(np.ones(count)), strict=True):
            rows.append((edge.model, edge.fact_id, edge.layer, edge.mixer, edge.path, edge.source, edge.target,
                         int(feature), share * edge.attributed))  # fmt: skip
    return pd.DataFrame(rows, columns=list(EDGE_FEATURES))
