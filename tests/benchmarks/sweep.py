"""What knockouts cost: `python tests/benchmarks/sweep.py` (random models, two cores, about ten minutes).

Four parts, each with one JSON line for every measurement and a table; ratios are of figures taken in one run.

models: 16 prompts of about 15 tokens, 4 sources, every window of 9 layers, target last. Seconds for one plain forward
    pass of the prompts, for the sweep by eager hooks in the same batch (measured on two windows, scaled to all) and for
    the replayed sweep, everything a sweep does included: the uncut row, the check against the model's own passes of
    one prompt, probability, rank, top token and KL. `bound_s` is the lower bound: the multiply-adds of the rows with the
    weight matrices of the layers they go through and the head, at the rate at which these matrices multiply as many
    rows as there are on average. Peak memory is over what the process held with the model loaded.
growth: how a sweep's cost grows with the prompt's length and with the depth (smaller models).
deep: Mamba-1 of the 790M, 1.4B (48 layers, float32) and 2.8B (64 layers, bfloat16) shapes, eight prompts, one source,
    every window of 9 layers, by `lens.sweep`: how often replay reproduces the model, and by how much of the model's own
    noise it misses it (`mambalens.sweep.checks`). Times are the processor's. Needs 12 GB; does not run by default.
long: an eager knockout of a 4,096-token prompt against a plain forward pass: peak memory and time.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from common import (
    NAMES,
    PROMPTS,
    SHAPES,
    facts_of,
    load,
    mamba1,
    parser_of,
    peak_bytes,
    peak_in_fresh_process,
    report,
    run,
    seconds,
    tokenizer,
)
from torch import Tensor

from mambalens import Lens
from mambalens.facts.prompts import Batch
from mambalens.hooks import fused
from mambalens.hooks.on_cpu import Room
from mambalens.sweep.checks import check
from mambalens.sweep.prediction import Prediction, kl_divergence
from mambalens.sweep.replay import UNCUT, Replay, Row
from mambalens.system.memory import budget

SOURCES, WINDOW = 4, 9
DEEP = {
    "mamba-790m": (1536, 48, torch.float32),
    "mamba-1.4b": (2048, 48, torch.float32),
    "mamba-2.8b": (2560, 64, torch.bfloat16),
}
"""Width, layers and precision."""


class Sweep:
    """A sweep of random prompts, as `lens.sweep` runs it."""

    def __init__(self, model: Any, lengths: Tensor, window: int) -> None:
        self.lens = Lens(model, tokenizer(model.config.vocab_size), "random")
        self.model, self.hooks, self.last, self.window = model, self.lens.hooks, lengths - 1, window
        count, columns = len(lengths), int(lengths.max())
        self.ids = torch.randint(2, model.config.vocab_size, (count, columns))
        self.batch = Batch([], self.ids, self.last, self.last)
        self.targets = torch.arange(columns) == self.last[:, None]
        self.sources = (torch.rand(SOURCES, count, columns) < 0.3) & (torch.arange(columns) < self.last[:, None])
        self.room = Room()  # as a sweep's batches share it
        self.starts = range(self.hooks.n_layers - window + 1)
        windows = [self.hooks.resolve(range(start, start + window)) for start in self.starts]
        self.cuts = [Row(cutting, ((source + 1, 0),)) for cutting in windows for source in range(SOURCES)]

    def plain(self) -> None:
        """One forward pass."""
        self.model(self.ids, use_cache=False)

    def replayed(self) -> None:
        """The whole sweep."""
        scored, memory = torch.zeros(len(self.ids), dtype=torch.long), budget(None, self.ids.device)
        replay = Replay(self.hooks, self.ids, self.last, self.sources, memory=memory, room=self.room)
        answers = replay.logits([UNCUT, *self.cuts])
        uncut = next(answers)[1]
        assert check(self.lens, self.batch, uncut).passed
        base = Prediction.of(uncut, scored)
        probs = base.log_probs.exp()
        for _, logits in answers:
            kl_divergence(base.log_probs, Prediction.of(logits, scored).log_probs, probs)

    def eager(self) -> None:
        """Two of the knockouts: the first and the last window."""
        for start in (self.starts[0], self.starts[-1]):
            with self.hooks.knockout(self.sources[0], self.targets, range(start, start + self.window)):
                self.plain()

    def row_layers(self) -> int:
        """Layers that rows go through, over all rows."""
        starts = [0, *(cut.start for cut in self.cuts)]
        return sum(self.hooks.n_layers - start for start in starts) * len(self.ids)

    def bound(self) -> tuple[float, float]:
        """Seconds of the rows' multiply-adds, and the rate they are counted at in multiply-adds a second."""
        head = self.model.get_output_embeddings().weight
        rows = self.row_layers() // self.hooks.n_layers
        transposed = self.hooks.kinds == ["attention"]  # GPT-2 keeps its weights as [in, out]
        in_layers, adds, timed = 0.0, 0, {}
        for layer in self.hooks.layers:
            weights = [p for name, p in layer.named_parameters() if p.ndim == 2 and "A_log" not in name]
            shapes = tuple(w.shape for w in weights)
            if shapes not in timed:
                inputs = [
                    (torch.randn(rows, w.shape[0 if transposed else 1]), w.T if transposed else w) for w in weights
                ]
                timed[shapes] = seconds(functools.partial(_multiplied, inputs), 7)
            in_layers += timed[shapes]
            adds += rows * sum(w.numel() for w in weights)
        behind = torch.randn((len(self.cuts) + 1) * len(self.ids), head.shape[1])
        total_s = in_layers + seconds(lambda: F.linear(behind, head), 3)
        return total_s, (adds + len(behind) * head.numel()) / total_s


def _multiplied(inputs: list[tuple[Tensor, Tensor]]) -> None:
    for x, w in inputs:
        F.linear(x, w)


@torch.no_grad()
def models(names: list[str]) -> pd.DataFrame:
    """Sweeps of models as people have them."""
    lines = []
    for name in names:
        sweep = Sweep(load(SHAPES[name]()), torch.randint(12, 19, (PROMPTS,)), WINDOW)
        plain, replay = seconds(sweep.plain), seconds(sweep.replayed)
        bound, rate = sweep.bound()
        eager = seconds(sweep.eager, 1) / 2 * len(sweep.cuts)
        line = {
            "model": NAMES[name],
            "knockouts": len(sweep.cuts),
            "plain_s": plain,
            "eager_s_scaled": eager,
            "replay_s": replay,
            "bound_s": bound,
            "gemm_gflops": 2e-9 * rate,
            "replay/plain": replay / plain,
            "replay/bound": replay / bound,
            "eager/replay": eager / replay,
            "replay_peak_mb": peak_in_fresh_process(__file__, "replayed", name) / 1e6,
            "plain_peak_mb": peak_in_fresh_process(__file__, "plain", name) / 1e6,
            "weights_mb": sum(p.numel() for p in sweep.model.parameters()) * 4e-6,
            "backend": sweep.hooks.backend,
        }
        lines.append(report(line))
    return pd.DataFrame(lines)


@torch.no_grad()
def growth(names: list[str]) -> pd.DataFrame:
    """Cost by prompt length and by depth."""
    lines = []
    for name in names:
        for what, tokens, depth in [
            *(("tokens", tokens, 12) for tokens in (16, 64, 256, 1024)),
            *(("depth", 64, depth) for depth in (6, 12, 24, 48)),
        ]:
            window = depth // 2
            sweep = Sweep(load(SHAPES[name](256, depth, 1000)), torch.full((4,), tokens), window)
            replay = seconds(sweep.replayed)
            row_layers, base_tokens = sweep.row_layers(), 4 * tokens * depth
            line = {
                "model": name,
                "grows": what,
                "tokens": tokens,
                "depth": depth,
                "knockouts": len(sweep.cuts),
                "replay_s": replay,
                "us_per_prompt_token": 1e6 * replay / (4 * tokens),
                "us_per_token_layer": 1e6 * replay / (row_layers + base_tokens),
            }
            lines.append(report(line))
    return pd.DataFrame(lines)


@torch.no_grad()
def deep(names: list[str]) -> pd.DataFrame:
    """Sweeps of models of many layers; `names` say nothing."""
    lines = []
    for name, (width, layers, dtype) in DEEP.items():
        lens = Lens(load(mamba1(width, layers), dtype), tokenizer(50280), name)
        facts = facts_of(np.random.default_rng(0).integers(12, 19, 8).tolist(), 50280)
        batch = next(lens.batches([lens.prompt(fact) for fact in facts]))
        plain = seconds(lambda lens=lens, batch=batch: lens.model(batch.ids, use_cache=False), 3, time.process_time)
        started = time.process_time()
        result = lens.sweep(facts, "subject", window=WINDOW, progress=False)
        swept = time.process_time() - started
        checks = result.checks
        knockouts = len(result.table) // len(facts)
        line = {
            "model": name,
            "layers": layers,
            "dtype": str(dtype).removeprefix("torch."),
            "knockouts": knockouts,
            "plain_cpu_s": plain,
            "sweep_cpu_s": swept,
            "sweep/plain": swept / plain,
            "replayed": float(checks.passed.mean()),
            "difference_nats": float(checks.difference.max()),
            "difference/noise": float((checks.difference / checks.noise).max()),
        }
        lines.append(report(line))
    return pd.DataFrame(lines)


def knocked_out(sweep: Sweep, layers: int) -> None:
    """One eager knockout in the first layers."""
    with sweep.hooks.knockout(sweep.sources[0], sweep.targets, range(layers)):
        sweep.plain()


def long_prompt(name: str) -> Sweep:
    """One prompt of 4,096 tokens and a model of four layers."""
    return Sweep(load(SHAPES[name](layers=4)), torch.tensor([4096]), 2)


@torch.no_grad()
def long(names: list[str]) -> pd.DataFrame:
    """An eager knockout of a long prompt, in half of the layers and in all."""
    lines = []
    for name in names:
        if name == "gpt2":  # has 1,024 positions
            continue
        sweep = long_prompt(name)
        plain, plain_peak = seconds(sweep.plain), peak_in_fresh_process(__file__, "long", name, 0)
        for layers in (2, 4):
            knocked = seconds(functools.partial(knocked_out, sweep, layers))
            knocked_peak = peak_in_fresh_process(__file__, "long", name, layers)
            line = {
                "model": name,
                "tokens": 4096,
                "layers_cut": f"{layers} of 4",
                "plain_s": plain,
                "knockout_s": knocked,
                "plain_peak_mb": plain_peak / 1e6,
                "knockout_peak_mb": knocked_peak / 1e6,
                "time_ratio": knocked / plain,
                "peak_ratio": knocked_peak / plain_peak,
            }
            lines.append(report(line))
    return pd.DataFrame(lines)


@torch.no_grad()
def peak(part: str, name: str, layers: str = "0") -> float:
    """What `peak_in_fresh_process` runs there."""
    if part == "long":
        sweep = long_prompt(name)
        return peak_bytes(lambda: knocked_out(sweep, int(layers)) if int(layers) else sweep.plain())
    sweep = Sweep(load(SHAPES[name]()), torch.randint(12, 19, (PROMPTS,)), WINDOW)
    return peak_bytes(sweep.replayed if part == "replayed" else sweep.plain)


PARTS = {"models": models, "growth": growth, "long": long, "deep": deep}


def main() -> None:
    """Command line."""
    parser = parser_of(__doc__, PARTS)
    parser.add_argument(
        "--compile", action="store_true", help="compile Mamba-1's step, as long sweeps do by themselves without numba"
    )
    options = parser.parse_args()
    options.part = options.part or ["models", "growth", "long"]
    if options.compile:
        started = time.perf_counter()
        print(f"compiled: {fused.compile_step(torch.device('cpu'))}, {time.perf_counter() - started:.1f} s")
    run(options, PARTS, peak)


if __name__ == "__main__":
    main()
