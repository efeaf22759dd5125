"""The same knockouts by mambalens, TransformerLens and nnsight: `make peers`, or `python tests/benchmarks/peers.py` in an
environment that has all three.

16 prompts of 15 tokens, 4 sources, target last, every window of 9 of 24 layers: 64 knockouts of each prompt, on random
weights that are kept in a folder and loaded by each tool from there. No prompt is padded, so nobody has to mask padding.
Every tool works in a process of its own, with one thread; times are the processor's, and next to each stands one plain
forward pass of the 16 prompts by Hugging Face's model in that process. The shortest of the three is the unit of all: how
much memory a process has kept from before makes them differ, for Mamba-1 by a factor of two.

mambalens: `lens.sweep`, all of it: uncut row, check, probability, rank, top token, KL.
TransformerLens: `TransformerBridge.run_with_hooks`, the 4 sources of a window in one batch. In attention the hook fills the
    scores before the softmax. (`start_at_layer` would save nothing: the layers below run all the same.)
nnsight: `model.trace`, the same batches; the layers below the window are skipped (`.skip`) with what the uncut prompts
    have there. In attention the edit is at the softmax, by `.source`.

Mamba-2 scans in chunks of 16 tokens. Hugging Face's code fills prompts up to a chunk, as released 256 tokens, which would cost
everybody who runs it 40 times as long and says nothing about the tools.

Neither has a knockout for Mamba, nor names for one edge of its scan; `peers_mamba.py` is what a person has to write, once
for both. Peers are measured at the first and the last of the 16 windows, whose mean start is that of all, and scaled.
Answers are log-probabilities of the target; the largest difference from mambalens is over all that was measured. Peak memory
is over what the process held with the model loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import NAMES, PROMPTS, SHAPES, facts_of, load, peak_bytes, report, tokenizer
from peers_mamba import LOST
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

TOKENS, WINDOW, SOURCES = 15, 9, ("subject", "relation", "last", "first")
MEASURED = (0, 15)
"""First layers of the windows that peers are measured at."""
PEERS = {"mambalens": "mambalens", "transformerlens": "transformer-lens", "nnsight": "nnsight"}
"""Tools, and their distributions."""

Answers = np.ndarray
"""Log-probabilities of the targets, [window, source, prompt]."""


class Bench:
    """Prompts, positions of the sources, and a model in a folder."""

    def __init__(self, folder: Path) -> None:
        kept = np.load(folder / "task.npz")
        self.folder, self.name = folder, str(kept["name"])
        self.ids = torch.from_numpy(kept["ids"])  # [prompt, token]
        self.sources = torch.from_numpy(kept["sources"])  # [source, prompt, token]
        self.targets = torch.from_numpy(kept["targets"])  # [prompt]
        self.starts = range(int(kept["layers"]) - WINDOW + 1)

    @classmethod
    def make(cls, name: str, folder: Path) -> Bench:
        """A random model, its tokenizer and 16 prompts; mambalens says where a prompt's roles are."""
        from mambalens import Lens

        config = SHAPES[name]()
        if name == "mamba2":
            config.chunk_size = 16
        model, words = load(config), tokenizer(config.vocab_size)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        prompts = [Lens(model, words, name).prompt(fact) for fact in facts_of([TOKENS] * PROMPTS, config.vocab_size)]
        sources = np.zeros((len(SOURCES), PROMPTS, TOKENS), bool)
        for number, prompt in enumerate(prompts):
            for source, role in enumerate(SOURCES):
                sources[source, number, prompt.positions(role)] = True
        np.savez(folder / "task.npz", name=name, layers=config.num_hidden_layers, sources=sources,
                 ids=np.array([prompt.ids for prompt in prompts]),
                 targets=np.array([prompt.target_id for prompt in prompts]))  # fmt: skip
        return cls(folder)

    def model(self, **options: Any) -> Any:
        """The model, by Hugging Face."""
        return touched(AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, **options).eval())

    def batch(self) -> Tensor:
        """The prompts once for every source, [source * prompt, token]."""
        return self.ids.repeat(len(SOURCES), 1)

    def read(self, logits: Tensor) -> np.ndarray:
        """Log-probabilities of the targets [source, prompt], of the last position's logits."""
        log_probs = logits[:, -1].double().log_softmax(-1)
        return log_probs.gather(1, self.targets.repeat(len(SOURCES))[:, None]).view(len(SOURCES), PROMPTS).numpy()

    def plain(self) -> Callable[[], Any]:
        """One forward pass of the prompts."""
        model = self.model()
        return lambda: model(self.ids, use_cache=False, logits_to_keep=1)


def touched(model: Any) -> Any:
    """A model whose weights are in memory, which they are not before they are read where the file is mapped."""
    for parameter in model.parameters():
        parameter.sum()
    return model


def mambalens(bench: Bench) -> Callable[[range | tuple[int, ...]], Answers]:
    """`lens.sweep`."""
    from mambalens import Lens

    lens = Lens.load(str(bench.folder), dtype="float32")
    touched(lens.model)
    facts = facts_of([TOKENS] * PROMPTS, lens.model.config.vocab_size)

    def sweep(starts: range | tuple[int, ...]) -> Answers:
        windows = [list(range(start, start + WINDOW)) for start in starts]
        result = lens.sweep(facts, SOURCES, window=windows, measure="log_prob", progress=False)
        assert result.checks.passed.all(), "the sweep was not answered by replay"
        order = ["window_start", "source", "fact_id"]
        table = result.table.astype(
            {"source": pd.CategoricalDtype(SOURCES), "fact_id": pd.CategoricalDtype([f.id for f in facts])}
        )
        return table.sort_values(order).measure.to_numpy().reshape(len(starts), len(SOURCES), PROMPTS)

    return sweep


def transformerlens(bench: Bench) -> Callable[[range | tuple[int, ...]], Answers]:
    """Hooks of a TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(bench.folder), device="cpu", dtype=torch.float32)
    touched(bridge.original_model)
    sources = bench.sources.flatten(0, 1)  # [row, token]

    def scores(tensor: Tensor, hook: Any) -> Tensor:
        tensor[:, :, -1] = tensor[:, :, -1].masked_fill(sources[:, None], float("-inf"))
        return tensor

    def hooks(layer: int) -> Iterator[tuple[str, Callable[..., Any]]]:
        if bench.name == "gpt2":
            yield f"blocks.{layer}.attn.hook_attn_scores", scores
            return
        reads, place, lost = LOST[bench.name]
        mixer, seen = bridge.blocks[layer].mixer, {}

        def cut(tensor: Tensor, hook: Any) -> Tensor:
            tensor[:, -1] -= lost(mixer.original_component, seen, sources)
            return tensor

        for read in reads:
            name = read.replace("input", "hook_in").replace("output", "hook_out")
            yield f"blocks.{layer}.mixer.{name}", lambda tensor, hook, read=read: seen.update({read: tensor})
        yield f"blocks.{layer}.mixer.{'inner_norm' if place == 'norm' else place}.hook_in", cut

    def knock_out(starts: range | tuple[int, ...]) -> Answers:
        rows = []
        for start in starts:
            made = [pair for layer in range(start, start + WINDOW) for pair in hooks(layer)]
            rows.append(bench.read(bridge.run_with_hooks(bench.batch(), fwd_hooks=made, logits_to_keep=1)))
        return np.stack(rows)

    return knock_out


def nnsight(bench: Bench) -> Callable[[range | tuple[int, ...]], Answers]:
    """Traces."""
    from nnsight import NNsight

    attention = bench.name == "gpt2"
    model = NNsight(bench.model(**({"attn_implementation": "eager"} if attention else {})))
    layers = model.transformer.h if attention else model.backbone.layers
    sources, copies = bench.sources.flatten(0, 1), len(SOURCES)  # [row, token]

    def knock_out(starts: range | tuple[int, ...]) -> Answers:
        entries, rows = {}, []
        with torch.no_grad():
            with model.trace(bench.ids, use_cache=False, logits_to_keep=1):
                for start in starts:
                    if start:
                        entries[start] = layers[start].input.save()
            for start in starts:
                with model.trace(bench.batch(), use_cache=False, logits_to_keep=1):
                    for layer in range(start):
                        layers[layer].skip(entries[start].repeat(copies, 1, 1))
                    for layer in range(start, start + WINDOW):
                        if attention:
                            softmax = layers[layer].attn.source.attention_interface_1.source.nn_functional_softmax_0
                            softmax.input[:, :, -1].masked_fill_(sources[:, None], float("-inf"))
                        else:
                            reads, place, lost = LOST[bench.name]
                            mixer = layers[layer].mixer
                            seen = {read: attrgetter(read)(mixer) for read in reads}
                            getattr(mixer, place).input[:, -1] -= lost(mixer._module, seen, sources)
                    logits = model.output.logits.save()
                rows.append(bench.read(logits))
        return np.stack(rows)

    return knock_out


TOOLS = {"mambalens": mambalens, "transformerlens": transformerlens, "nnsight": nnsight}


@torch.no_grad()
def measure(tool: str, folder: Path, runs: int) -> None:
    """One tool, in a process of its own: what it took and its answers, into files."""
    torch.set_num_threads(1)
    bench = Bench(folder)
    work = TOOLS[tool](bench)
    starts = bench.starts if tool == "mambalens" else MEASURED
    peak = peak_bytes(lambda: work(starts if tool == "mambalens" else starts[:1]))  # peers' batches are all alike
    plain, found, times, plains = bench.plain(), [], [], []
    plain()
    for _ in range(runs):
        plains.append(_cpu(plain))  # before and behind, since other work on the machine comes and goes
        times.append(_cpu(lambda: found.append(work(starts))))
        plains.append(_cpu(plain))
    np.save(folder / f"{tool}.npy", found[0])
    line = {
        "cpu_s": sorted(times)[runs // 2] * len(bench.starts) / len(starts),
        "plain_cpu_s": float(np.median(plains)),
        "peak_mb": peak / 1e6,
        "knockouts_measured": len(starts) * len(SOURCES),
    }
    (folder / f"{tool}.json").write_text(json.dumps(line))


def _cpu(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(name: str, runs: int) -> list[dict[str, Any]]:
    """All tools on one shape."""
    lines = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        bench = Bench.make(name, folder)
        for tool in TOOLS:
            command = [sys.executable, __file__, "--measure", tool, made, "--runs", str(runs)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
            line = json.loads((folder / f"{tool}.json").read_text())
            ours, theirs = np.load(folder / "mambalens.npy"), np.load(folder / f"{tool}.npy")
            shared = ours if tool == "mambalens" else ours[list(MEASURED)]
            lines.append({
                "shape": NAMES[name],
                "tool": f"{tool} {importlib.metadata.version(PEERS[tool])}",
                "knockouts": len(bench.starts) * len(SOURCES),
                **line,
                "difference_nats": f"{np.abs(theirs - shared).max():.1e}",  # text: `report` rounds numbers
                "largest_effect_nats": float(np.ptp(ours, axis=(0, 1)).max()),
            })  # fmt: skip
    plain = min(line["plain_cpu_s"] for line in lines)
    return [report({**line, "plain_passes": line["cpu_s"] / plain}) for line in lines]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = ("gpt2", "mamba1", "mamba2")
    parser.add_argument("--model", action="append", choices=shapes, help="by default all")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument(
        "--runs", type=int, default=3, help="of which the median is taken, after one for the peak memory"
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]), options.runs)
        return
    table = pd.DataFrame([line for name in options.model or shapes for line in compare(name, options.runs)])
    print(f"\none thread, torch {torch.__version__}\n")
    print(table.to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
