"""What a sweep costs: `python tests/benchmarks/sweep.py` (random models, two cores, several minutes).

For each model, 16 prompts of about 15 tokens, 4 sources, window 9, target last, in one run: seconds of one plain forward
pass of the prompts, of the sweep by eager hooks (measured on two windows, scaled to all) and of the replayed sweep, with
their ratios. One JSON line a model, then a table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Mamba2Config, MambaConfig

from mambalens.hooks import HookManager
from mambalens.replay import Cutting, Replay

PROMPTS, SOURCES, WINDOW = 16, 4, 9
CONFIGS: dict[str, Any] = {
    "mamba1-130m": MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, state_size=16),
    "mamba2-130m": Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64,
                                n_groups=1, state_size=128, chunk_size=256),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
}  # fmt: skip


def seconds(work: Callable[[], Any], runs: int = 3) -> float:
    """Median of a few runs after one that is not counted."""
    work()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[runs // 2]


@torch.no_grad()
def measure(name: str) -> dict[str, Any]:
    """One model's line."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    hooks = HookManager(model)
    lengths = torch.randint(12, 19, (PROMPTS,))
    time_ = int(lengths.max())
    ids, last = torch.randint(2, 50000, (PROMPTS, time_)), lengths - 1
    sources = (torch.rand(SOURCES, PROMPTS, time_) < 0.3) & (torch.arange(time_) < last[:, None])
    targets = torch.nn.functional.one_hot(last, time_).bool()
    starts = range(hooks.n_layers - WINDOW + 1)
    cuts = [Cutting(range(a, a + WINDOW), s + 1, True, False, {}) for a in starts for s in range(SOURCES)]

    def replayed() -> float:
        # The answers are consumed as a sweep does, not kept: 64 sets of logits would be a gigabyte.
        return sum(float(logits.log_softmax(-1)[0, 0]) for _, logits in Replay(hooks, ids, last, sources).logits(cuts))

    def eager() -> None:
        for start in (starts[0], starts[-1]):
            with hooks.knockout(sources[0], targets, range(start, start + WINDOW)):
                model(ids, use_cache=False)

    plain = seconds(lambda: model(ids, use_cache=False))
    replay, one_eager = seconds(replayed), seconds(eager, 1) / 2
    line = {
        "model": name,
        "knockouts": len(cuts),
        "plain_forward_s": plain,
        "eager_sweep_s_scaled": one_eager * len(cuts),
        "replay_s": replay,
        "replay_in_plain_forwards": replay / plain,
        "eager_over_replay": one_eager * len(cuts) / replay,
    }
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}))
    return line


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(CONFIGS), metavar="MODEL", help=", ".join(CONFIGS))
    table = pd.DataFrame([measure(name) for name in parser.parse_args().models])
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table.to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
