"""What flows cost: `python tests/benchmarks/flow.py` (random models).

Three parts, each with one JSON line for every measurement and a table; ratios are of figures taken in one run.

models: 16 prompts of 12 to 18 tokens. Seconds for one plain forward pass of the prompts, for every edge attributed
    (`lens.flow`) and for the 40 strongest edges of each cut exactly (`flow.certify`), everything included, from text to
    tables; and what memory rises by over the loaded model, each in a fresh process. `rows/plain` is what certifying
    takes at least, counted: a cut changes every position from its target on, in every layer from its own on.
exact: one prompt of 15 tokens, every edge cut by replay (`method="exact"`), and by a hooked pass for each (measured on
    40 of them, scaled to all).
growth: how attributing and certifying grow with the prompt's length (four prompts, smaller models).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import (
    NAMES,
    PROMPTS,
    SHAPES,
    facts_of,
    load,
    parser_of,
    peak_bytes,
    peak_in_fresh_process,
    report,
    run,
    seconds,
    tokenizer,
)

from mambalens import Lens
from mambalens.flow.exact import without_edges
from mambalens.result import Flow

TOP, SAMPLED = 40, 40


class Flowed:
    """A flow of random prompts, as `lens.flow` runs it."""

    def __init__(self, model: Any, lengths: list[int]) -> None:
        self.lens = Lens(model, tokenizer(model.config.vocab_size), "random")
        self.facts = facts_of(lengths, model.config.vocab_size)
        prompts = [self.lens.prompt(fact) for fact in self.facts]
        self.batch = next(self.lens.batches(prompts))

    @torch.no_grad()
    def plain(self) -> None:
        """One forward pass."""
        self.lens.model(self.batch.ids, use_cache=False)

    def attributed(self) -> Flow:
        """Every edge of every prompt."""
        return self.lens.flow(self.facts, progress=False)

    def certified(self) -> Flow:
        """The same with the strongest of each prompt cut."""
        return self.lens.flow(self.facts, progress=False, certify=TOP)


def lengths_of_prompts() -> list[int]:
    """Of 16 prompts."""
    return np.random.default_rng(0).integers(12, 19, PROMPTS).tolist()


def models(names: list[str]) -> pd.DataFrame:
    """Flows of models as people have them."""
    lines = []
    for name in names:
        flowed = Flowed(load(SHAPES[name]()), lengths_of_prompts())
        plain, attributed = seconds(flowed.plain), seconds(flowed.attributed, 1)
        flow = flowed.attributed()
        certified = seconds(lambda flow=flow: flow.certify(TOP, 0, progress=False), 1)
        plain_peak, attributed_peak, certified_peak = (
            peak_in_fresh_process(__file__, part, name) / 1e6 for part in ("plain", "attributed", "certified")
        )
        line = {
            "model": NAMES[name],
            "edges": len(flow.table),
            "plain_s": plain,
            "attribute_s": attributed,
            "certify_s": certified,
            "attribute/plain": attributed / plain,
            "certify/plain": certified / plain,
            "rows/plain": rows_of(flow, flowed.lens.n_layers),
            "plain_peak_mb": plain_peak,
            "attribute_peak_mb": attributed_peak,
            "certify_peak_mb": certified_peak,
            "attribute_peak/plain": attributed_peak / plain_peak,
            "certify_peak/plain": certified_peak / plain_peak,
            "backend": flowed.lens.hooks.backend,
        }
        lines.append(report(line))
    return pd.DataFrame(lines)


def rows_of(flow: Flow, layers: int) -> float:
    """What the cuts' rows cost at least, in plain passes: positions from the target on, layers from the cut one on."""
    cut = flow.certify(TOP, 0, progress=False).table.query("chosen == 'top'")
    tokens = flow.table.groupby("fact_id").target.max() + 1
    rows = (cut.fact_id.map(tokens) - cut.target) * (layers - cut.layer)
    return float(rows.sum() / layers / tokens.sum())


def exact(names: list[str]) -> pd.DataFrame:
    """Every edge of one prompt, each alone."""
    lines = []
    for name in names:
        flowed = Flowed(load(SHAPES[name]()), [15])
        plain = seconds(flowed.plain)
        flow = flowed.attributed()
        replayed = once(lambda flowed=flowed: flowed.lens.flow(flowed.facts, method="exact", progress=False))
        hooked = once(lambda flowed=flowed, flow=flow: hooked_cuts(flowed, flow)) / SAMPLED * len(flow.table)
        line = {
            "model": NAMES[name],
            "edges": len(flow.table),
            "plain_s": plain,
            "exact_s": replayed,
            "hooked_s_scaled": hooked,
            "exact/plain": replayed / plain,
            "hooked/exact": hooked / replayed,
        }
        lines.append(report(line))
    return pd.DataFrame(lines)


def once(work: Callable[[], Any]) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.no_grad()
def hooked_cuts(flowed: Flowed, flow: Flow) -> None:
    """Some edges of one prompt, by a hooked pass for each."""
    work = flow._work()
    length = flowed.batch.ids.shape[1]
    listed = work.edges(length)
    for number in np.random.default_rng(0).choice(len(listed.where), SAMPLED, replace=False):
        edge = work.edge(listed, int(number))
        mask = torch.zeros(length, length, dtype=torch.bool)
        mask[edge.target, edge.source] = True
        with without_edges(flowed.lens, {(edge.mixer, edge.path): mask}, work.features):
            flowed.lens.last_logits(flowed.batch)


def growth(names: list[str]) -> pd.DataFrame:
    """Cost by prompt length."""
    lines = []
    for name in names:
        for tokens in (16, 32, 64, 128, 256):
            flowed = Flowed(load(SHAPES[name](256, 12, 1000)), [tokens] * 4)
            plain, attributed = seconds(flowed.plain), seconds(flowed.attributed, 1)
            flow = flowed.attributed()
            certified = seconds(lambda flow=flow: flow.certify(TOP, 0, progress=False), 1)
            line = {
                "model": name,
                "tokens": tokens,
                "edges": len(flow.table) // 4,
                "plain_s": plain,
                "attribute_s": attributed,
                "certify_s": certified,
                "attribute/plain": attributed / plain,
                "certify/plain": certified / plain,
                "attribute_us_per_edge": 1e6 * attributed / len(flow.table),
            }
            lines.append(report(line))
    return pd.DataFrame(lines)


def peak(part: str, name: str) -> float:
    """What `peak_in_fresh_process` runs there."""
    flowed = Flowed(load(SHAPES[name]()), lengths_of_prompts())
    return peak_bytes(getattr(flowed, part))


PARTS = {"models": models, "exact": exact, "growth": growth}


if __name__ == "__main__":
    run(parser_of(__doc__, PARTS).parse_args(), PARTS, peak)
