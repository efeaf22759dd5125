"""What knockouts cost: `python tests/benchmarks/sweep.py` (random models, two cores, about ten minutes).

Three parts, each with one JSON line for every measurement and a table; ratios are of figures taken in one run.

models: 16 prompts of about 15 tokens, 4 sources, every window of 9 layers, target last. Seconds for one plain forward
    pass of the prompts, for the sweep by eager hooks in the same batch (measured on two windows, scaled to all) and for
    the replayed sweep, everything a sweep does included: the uncut row, the check against the model's own pass of one
    prompt, probability, rank, top token and KL. `bound_s` is the lower bound: the multiply-adds of the rows with the
    weight matrices of the layers they go through and the head, at the rate at which these matrices multiply as many
    rows as there are on average. Peak memory is over what the process held with the model loaded.
growth: how a sweep's cost grows with the prompt's length and with the depth (smaller models).
long: an eager knockout of a 4,096-token prompt against a plain forward pass: peak memory and time.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Mamba2Config, MambaConfig, OlmoHybridConfig
from transformers.utils import logging

from mambalens.hooks import HookManager, fused
from mambalens.sweep.prediction import Prediction, kl_divergence
from mambalens.sweep.replay import UNCUT, Replay, Row
from mambalens.system.memory import budget

PROMPTS, SOURCES, WINDOW = 16, 4, 9


def mamba1(width: int = 768, layers: int = 24, vocabulary: int = 50280) -> MambaConfig:
    """The shape of state-spaces/mamba-130m."""
    return MambaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, state_size=16)


def mamba2(width: int = 768, layers: int = 24, vocabulary: int = 50288) -> Mamba2Config:
    """The shape of state-spaces/mamba2-130m."""
    heads = 2 * width // 64
    return Mamba2Config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_heads=heads,
                        head_dim=64, n_groups=1, state_size=128, chunk_size=256)  # fmt: skip


def gpt2(width: int = 1024, layers: int = 24, vocabulary: int = 50257) -> GPT2Config:
    """The shape of gpt2-medium."""
    return GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=vocabulary, n_positions=2048)


def deltanet(width: int = 768, layers: int = 24, vocabulary: int = 50257) -> OlmoHybridConfig:
    """An OLMo hybrid of 140M parameters: three layers of Gated DeltaNet to one of attention, an MLP in each."""
    heads = width // 128
    return OlmoHybridConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=vocabulary, intermediate_size=width,
                            num_attention_heads=width // 64, linear_num_key_heads=heads, linear_num_value_heads=heads,
                            linear_key_head_dim=64, linear_value_head_dim=128, tie_word_embeddings=True,
                            pad_token_id=0)  # fmt: skip


SHAPES: dict[str, Callable[..., Any]] = {"mamba1": mamba1, "mamba2": mamba2, "deltanet": deltanet, "gpt2": gpt2}
NAMES = {"mamba1": "mamba-130m", "mamba2": "mamba2-130m", "deltanet": "deltanet-140m", "gpt2": "gpt2-medium"}


def load(config: Any) -> Any:
    """A random model whose decays differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(-2.0, 2.0)
    return model


def seconds(work: Callable[[], Any], runs: int = 3) -> float:
    """Median of a few runs after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[runs // 2]


def peak_bytes(work: Callable[[], Any]) -> float:
    """How far the process's memory rises (Linux; NaN elsewhere).

    Memory that was used before stays with the allocator and would not rise again: call it in a fresh process.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")

    def of(field: str) -> int:
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])

    stop, levels = threading.Event(), [of("VmRSS")]

    def watch() -> None:
        while not stop.wait(0.002):
            levels.append(of("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return max(levels) - levels[0]


def peak_in_fresh_process(part: str, *arguments: Any) -> float:
    """`peak_bytes` of one piece of work in a process that has done nothing else."""
    command = [sys.executable, __file__, "--peak", part, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


class Sweep:
    """A sweep of random prompts, as `lens.sweep` runs it."""

    def __init__(self, model: Any, lengths: Tensor, window: int) -> None:
        self.model, self.hooks, self.last, self.window = model, HookManager(model), lengths - 1, window
        count, columns = len(lengths), int(lengths.max())
        self.ids = torch.randint(2, model.config.vocab_size, (count, columns))
        self.targets = torch.arange(columns) == self.last[:, None]
        self.sources = (torch.rand(SOURCES, count, columns) < 0.3) & (torch.arange(columns) < self.last[:, None])
        self.starts = range(self.hooks.n_layers - window + 1)
        windows = [self.hooks.resolve(range(start, start + window)) for start in self.starts]
        self.cuts = [Row(cutting, ((source + 1, 0),)) for cutting in windows for source in range(SOURCES)]

    def plain(self) -> None:
        """One forward pass."""
        self.model(self.ids, use_cache=False)

    def replayed(self) -> None:
        """The whole sweep."""
        scored, shortest = torch.zeros(len(self.ids), dtype=torch.long), int(self.last.argmin())
        self.model(self.ids[shortest : shortest + 1, : self.last[shortest] + 1], use_cache=False)
        memory = budget(None, self.ids.device)
        answers = Replay(self.hooks, self.ids, self.last, self.sources, memory=memory).logits([UNCUT, *self.cuts])
        base = Prediction.of(next(answers)[1], scored)
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


def report(line: dict[str, Any]) -> dict[str, Any]:
    """Print a measurement as JSON."""
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}))
    return line


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
            "replay_peak_mb": peak_in_fresh_process("replayed", name) / 1e6,
            "plain_peak_mb": peak_in_fresh_process("plain", name) / 1e6,
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
        plain, plain_peak = seconds(sweep.plain), peak_in_fresh_process("long", name, 0)
        for layers in (2, 4):
            knocked = seconds(functools.partial(knocked_out, sweep, layers))
            knocked_peak = peak_in_fresh_process("long", name, layers)
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


PARTS = {"models": models, "growth": growth, "long": long}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="by default all")
    parser.add_argument("--model", action="append", choices=SHAPES, help="by default all")
    parser.add_argument(
        "--compile", action="store_true", help="compile Mamba-1's step, as long sweeps do by themselves"
    )
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.peak:
        print(peak(*options.peak))
        return
    if options.compile:
        started = time.perf_counter()
        print(f"compiled: {fused.compile_step(torch.device('cpu'))}, {time.perf_counter() - started:.1f} s")
    for part in options.part or PARTS:
        table = PARTS[part](options.model or list(SHAPES))
        print(f"\n{part}: {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print(table.to_string(index=False, float_format="{:.2f}".format) + "\n")


if __name__ == "__main__":
    main()
