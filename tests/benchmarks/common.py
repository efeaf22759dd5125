"""What benchmarks share: models of the shapes that people have, clocks, and how memory rises."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as words
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    Mamba2Config,
    MambaConfig,
    OlmoHybridConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from mambalens import Fact, Facts

PROMPTS = 16
"""Prompts of about 15 tokens that costs are told of."""
SPREAD = 0.02
"""Of random weights; transformers' 0.1 for Mamba makes models that carry rounding from layer to layer as no trained one
does."""


def mamba1(width: int = 768, layers: int = 24, vocabulary: int = 50280) -> MambaConfig:
    """The shape of state-spaces/mamba-130m."""
    return MambaConfig(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, state_size=16,
                       initializer_range=SPREAD)  # fmt: skip


def mamba2(width: int = 768, layers: int = 24, vocabulary: int = 50288) -> Mamba2Config:
    """The shape of state-spaces/mamba2-130m."""
    heads = 2 * width // 64
    return Mamba2Config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_heads=heads,
                        head_dim=64, n_groups=1, state_size=128, chunk_size=256,
                        initializer_range=SPREAD)  # fmt: skip


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


def load(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose decays differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(-2.0, 2.0)
    return model


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token a word: 'w0', 'w1', ..."""
    known = {f"w{number}": number for number in range(vocabulary)}
    made = Tokenizer(words.WordLevel(known, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def facts_of(lengths: list[int], vocabulary: int) -> Facts:
    """Prompts of random words, two of them the subject."""
    draw, made = np.random.default_rng(0), []
    for length in lengths:
        prompt = [f"w{number}" for number in draw.choice(np.arange(2, vocabulary - 1), length, replace=False)]
        made.append(Fact(" ".join(prompt), " ".join(prompt[2:4]), f"w{vocabulary - 1}"))
    return Facts(made)


def seconds(work: Callable[[], Any], runs: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median of a few runs after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        started = clock()
        work()
        times.append(clock() - started)
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


def peak_in_fresh_process(script: str, part: str, *arguments: Any) -> float:
    """`peak_bytes` of one piece of work in a process that has done nothing else: what `script --peak` prints."""
    command = [sys.executable, script, "--peak", part, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def report(line: dict[str, Any]) -> dict[str, Any]:
    """Print a measurement as JSON."""
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}))
    return line


Part = Callable[[list[str]], pd.DataFrame]
"""Measures models of some shapes."""


def parser_of(description: str | None, parts: Mapping[str, Part]) -> argparse.ArgumentParser:
    """What every benchmark's command line has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=parts, help="by default all")
    parser.add_argument("--model", action="append", choices=SHAPES, help="by default all")
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    return parser


def run(options: argparse.Namespace, parts: Mapping[str, Part], peak: Callable[..., float]) -> None:
    """Measure what was asked for: tables, or a peak for the process that waits for it."""
    logging.set_verbosity_error()
    if options.peak:
        print(peak(*options.peak))
        return
    for part in options.part or parts:
        table = parts[part](options.model or list(SHAPES))
        print(f"\n{part}: {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print(table.to_string(index=False, float_format="{:.2f}".format) + "\n")
