"""What a sweep and a flow ask of a GPU, counted without one: `python tests/benchmarks/launches.py` (minutes).

Tiny models of 64 layers on a pretended device (tests/pretend_device.py): what is counted does not depend on the width. Eight
prompts of 5 to 8 tokens, or of 128, one batch, 4 sources, every window of 9 layers, target last: 224 knockouts. Operations a
layer are those of the whole sweep, the head included, by the number of layers; each is at least one launch of a kernel. Those
of the model's own code in the check of the replay, which runs two rows of it, stand for themselves. Beside them those of one plain
pass, of one flow of a prompt at one point, and how often the host waits for the device in the sweep's batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' models and the pretended device

import numpy as np
import torch
from models import architecture
from pretend_device import counted
from transformers.utils import logging
from verbs import FACTS, QUIET, WORDS, tokenizer

from mambalens import Fact, Facts, Lens

LAYERS, WINDOW, PROMPTS, LONG = 64, 9, 8, 128
LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * (LAYERS // 4)
DEEP: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": LAYERS},
    "mamba2": {"num_hidden_layers": LAYERS},
    "recurrent_gemma": {"num_hidden_layers": LAYERS},
    "olmo_hybrid": {"num_hidden_layers": LAYERS, "layer_types": LINEAR},
    "kimi_linear": {"num_hidden_layers": LAYERS, "layer_types": LINEAR, "mlp_layer_types": ["dense"] * LAYERS},
    "gpt2": {"n_layer": LAYERS, "n_positions": 2 * LONG},
}


def facts_of(tokens: int | None) -> Facts:
    """The prompts: those of the tests, or some of one length."""
    given = [FACTS[number % len(FACTS)] for number in range(PROMPTS)]
    if tokens is not None:
        drawn = np.random.default_rng(0).choice(WORDS, (PROMPTS, tokens - 2))
        given = [Fact(f"Peru {' '.join(words)} is", "Peru", "Lima", "capital") for words in drawn]
    return Facts([Fact(f.prompt, f.subject, f.target, f.relation, str(number)) for number, f in enumerate(given)])


def main() -> None:
    """Print a table."""
    logging.set_verbosity_error()
    print(
        "| model | tokens | plain pass | sweep without its check | check | flow | waits of a batch | copies of a batch |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, options in DEEP.items():
        lens = Lens(architecture(name, torch.float32, **options).to("pretend:0"), tokenizer(), name)
        for tokens in (None, LONG):
            facts = facts_of(tokens)
            (batch,) = lens.batches([lens.prompt(fact) for fact in facts])
            with torch.no_grad(), counted() as plain:
                lens.model(batch.ids.to(lens.device), use_cache=False)
            with counted() as swept:
                found = lens.sweep(facts, ("subject", "relation", "first", "last"), window=WINDOW, **QUIET)
            assert found.checks.passed.all() and len(found.checks) == 1
            with counted() as flow:
                lens.flow(facts[:1], points=1, **QUIET)
            of_plain, of_sweep, of_flow = (sum(of.launches.values()) / LAYERS for of in (plain, swept, flow))
            numbers = (of_plain, of_sweep - of_plain, of_plain, of_flow)
            print(
                f"| {name} | {tokens or '5 to 8'} | {' | '.join(f'{number:.0f}' for number in numbers)} "
                f"| {swept.synchronisations} | {swept.transfers} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
