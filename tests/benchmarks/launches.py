"""What a sweep asks of a GPU, counted without one: `python tests/benchmarks/launches.py` (a minute).

Tiny models of 64 layers on a pretended device (tests/pretend_device.py): what is counted does not depend on the width. Eight
prompts of 5 to 8 tokens, one batch, 4 sources, every window of 9 layers, target last: 224 knockouts. Operations a layer are
those of the whole sweep, the check of its replay and the head included, by the number of layers; each is at least one
launch of a kernel. Beside them those of one plain pass, and how often the host waits for the device in the batch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' models and the pretended device

import torch
from models import architecture
from pretend_device import counted
from transformers.utils import logging
from verbs import FACTS, QUIET, tokenizer

from mambalens import Fact, Facts, Lens

LAYERS, WINDOW, PROMPTS = 64, 9, 8
DEEP: dict[str, dict[str, Any]] = {
    "mamba": {"num_hidden_layers": LAYERS},
    "mamba2": {"num_hidden_layers": LAYERS},
    "olmo_hybrid": {
        "num_hidden_layers": LAYERS,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * (LAYERS // 4),
    },
    "gpt2": {"n_layer": LAYERS},
}


def main() -> None:
    """Print a table."""
    logging.set_verbosity_error()
    given = [FACTS[number % len(FACTS)] for number in range(PROMPTS)]
    facts = Facts([Fact(f.prompt, f.subject, f.target, f.relation, str(number)) for number, f in enumerate(given)])
    print(
        "| model | operations a layer, plain pass | operations a layer, sweep | waits of a batch | copies of a batch |"
    )
    print("|---|---|---|---|---|")
    for name, options in DEEP.items():
        lens = Lens(architecture(name, torch.float32, **options).to("pretend:0"), tokenizer(), name)
        (batch,) = lens.batches([lens.prompt(fact) for fact in facts])
        with torch.no_grad(), counted() as plain:
            lens.model(batch.ids.to(lens.device), use_cache=False)
        with counted() as swept:
            found = lens.sweep(facts, ("subject", "relation", "first", "last"), window=WINDOW, **QUIET)
        assert found.checks.passed.all() and len(found.checks) == 1
        operations = [sum(of.launches.values()) / LAYERS for of in (plain, swept)]
        print(f"| {name} | {operations[0]:.0f} | {operations[1]:.0f} | {swept.synchronisations} | {swept.transfers} |")


if __name__ == "__main__":
    main()
