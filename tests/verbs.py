"""Every verb, asked of small random models with every kind of mixer: to be answered alike on any device."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from models import ARCHITECTURES, architecture
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mambalens import Fact, Lens
from mambalens.facts.pairs import Pair, Pairs
from mambalens.facts.sequence import Facts
from mambalens.hooks import HookManager
from mambalens.sweep.ablation import Asked
from mambalens.sweep.plan import Plan
from mambalens.sweep.run import run

WORDS = ["The", "capital", "of", "Peru", "Chile", "is", "Lima", "Santiago", "old", "the", "land", "was", "Cusco"]
FACTS = Facts([
    Fact("The capital of Peru is", "Peru", "Lima", "capital", "peru"),
    Fact("The old capital of the land Peru was", "land Peru", "Cusco", "capital", "long"),
    Fact("The capital of Chile is", "Chile", "Santiago", "capital", "chile"),
])  # fmt: skip
PAIRS = Pairs([Pair(FACTS[0], FACTS[2]), Pair(FACTS[1], FACTS[2])])
FAR = Fact("Peru was the old capital of", "Peru", "Lima", "capital", "far")
"""With positions between subject and last token, which may relay."""
QUIET: dict[str, Any] = {"progress": False}

KINDS = {
    "mamba": "mamba1", "mamba2": "mamba2", "falcon_h1": "mamba2 and attention side by side", "jamba": "mamba1, attention",
    "zamba": "mamba1 in heads", "zamba2": "mamba2, attention", "olmo_hybrid": "deltanet", "kimi_linear": "kda",
    "minimax": "lightning", "recurrent_gemma": "rglru", "lfm2": "shortconv", "gpt2": "attention",
    "mistral": "attention in a window", "bloom": "attention with ALiBi", "gpt_oss": "attention with sinks",
}  # fmt: skip
"""An architecture for every kind of mixer, and for every way in which attention is told what it may read."""
KINDS = {name: kind for name, kind in KINDS.items() if name in ARCHITECTURES}
SDPA = ("falcon_h1", "jamba", "lfm2", "gpt2", "mistral")
"""The others run transformers' plain attention."""
FEW = ("mamba", "mamba2", "olmo_hybrid", "lfm2", "gpt2")
"""For verbs that take long, and do with every mixer what quicker ones do with all of `KINDS`."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0} | {word: i for i, word in enumerate(WORDS, 1)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")


@functools.cache
def lens_of(name: str, *devices: str, dtype: torch.dtype = torch.float64) -> Lens:
    """A random model on a device, the CPU by default, or its layers in turns on several."""
    model = architecture(name, dtype, attention="sdpa" if name in SDPA else "eager")
    if len(devices) > 1:
        model = spread(model, devices)
    elif devices:
        model = model.to(devices[0])
    return Lens(model, tokenizer(), name)


def spread(model: Any, devices: Sequence[str]) -> Any:
    """Layers in turns on several devices, by accelerate's hooks, as `device_map` does; all else on the first."""
    from accelerate import dispatch_model

    name_of = {module: name for name, module in model.named_modules()}
    layers = [name_of[layer] for layer in HookManager(model).layers]
    inside = layers[0].rsplit(".", 1)[0] + "."
    places = {
        name: devices[0]
        for module, name in name_of.items()
        if name and not list(module.children()) and not name.startswith(inside)
    }
    places |= {name: devices[number % len(devices)] for number, name in enumerate(layers)}
    return dispatch_model(model, places, main_device=devices[0])


def under_knockout(lens: Lens) -> Tensor:
    """Tokens generated from prompts of unequal lengths, of which the generated ones lose something too."""
    ids = torch.tensor([[0, 0, 1, 2, 3, 4, 6], [1, 9, 2, 3, 10, 11, 4]], device=lens.device)
    padded = lens.name not in ("minimax", "recurrent_gemma")  # whose own masks of generated tokens forget padding
    ids = ids if padded else ids[1:]
    with torch.no_grad(), lens.hooks.knockout([2, 3, 4], [-1, 7], path="both"):
        return lens.model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=4, do_sample=False)


def steered(lens: Lens) -> pd.DataFrame:
    vector = lens.direction([FACTS[0], FACTS[1]], [FACTS[2]], 1)
    return lens.steered(FACTS, vector, [1], scale=2.0, **QUIET)


def flow(lens: Lens) -> list[pd.DataFrame]:
    found = lens.flow(FACTS[:2], certify=5, sample=3, points=2, **QUIET)
    return [found.table, found.edge_features(count=3, progress=False)]


def routes(lens: Lens) -> list[pd.DataFrame]:
    found = lens.flow([FAR], points=1, **QUIET)
    routes = found.routes(progress=False)[["rank", "carried_pct", "joint_pct"]]
    return [routes, found.routes_by_piece(progress=False), found.faithfulness(progress=False)]


def hooked_sweep(lens: Lens) -> list[pd.DataFrame]:
    plan = Plan(("subject",), "last", 2, ("all",), ("both",))
    other = dataclasses.replace(plan, ablation="resample")
    asked = Asked.of("resample", None, FACTS[2], False)
    return [
        run(lens, FACTS[:2], plan, None, False, None, False).table,
        run(lens, FACTS[:2], other, None, False, None, False, asked=asked).table,
    ]


def ablated(lens: Lens) -> list[pd.DataFrame]:
    asked: dict[str, Any] = {"sources": ("subject",), "window": 2, "paths": "both", **QUIET}
    mean = lens.sweep(FACTS[:2], ablation="mean", **asked)
    return [mean.table, lens.sweep(FACTS[:2], ablation="resample", other=FACTS[2], **asked).table]


def patched(lens: Lens) -> list[pd.DataFrame]:
    sites = ("mixer",) if lens.name not in FEW else ("residual", "mixer", "state", "value")
    asked: dict[str, Any] = {"positions": ("subject", "last"), **QUIET}
    return [lens.patch(PAIRS[:1] if site in ("state", "value") else PAIRS, site, **asked).table for site in sites]


def attention(lens: Lens) -> list[Tensor]:
    ids = torch.tensor([[1, 2, 3, 4, 6]], device=lens.device)
    with lens.hooks.knockout([1], [3, 4], path="both"):
        return [lens.hooks.effective_attention(ids, m.layer, mixers=m.kind).flatten(0, 2) for m in lens.hooks.mixers]


VERBS: dict[str, Callable[[Lens], Any]] = {
    "sweep": lambda lens: (
        lens.sweep(
            FACTS,
            ("subject", "relation", "each"),
            window=2,
            paths=lens.hooks.paths.choices,
            measure="log_odds",
            **QUIET,
        ).table
    ),
    "sweep of features": lambda lens: (
        lens.sweep(FACTS[:2], ("subject",), "subject_last", window=1, features=("all", [0, 2]), **QUIET).table
    ),
    "hooked sweep": hooked_sweep,
    "ablations": ablated,
    "evaluate": lambda lens: lens.evaluate(FACTS, whole_target=True, **QUIET),
    "features": lambda lens: lens.features(FACTS, **QUIET),
    "flow": flow,
    "patch": patched,
    "contributions": lambda lens: lens.contributions(FACTS[:2], features=True).table,
    "logits by layer": lambda lens: lens.logits_by_layer(FACTS[:2]).table,
    "steering": steered,
    "generation": under_knockout,
    "effective attention": attention,
}
LONG: dict[str, Callable[[Lens], Any]] = {
    "causal features": lambda lens: lens.causal_features(FACTS[:1], block=8, **QUIET).table,
    "diagnose": lambda lens: lens.diagnose(FACTS[:2], **QUIET),
    "exact flow": lambda lens: lens.flow(FACTS[:1], method="exact", **QUIET).table,
    "routes and circuits": routes,
    "trace": lambda lens: lens.trace(FACTS[:2], samples=2, positions=("subject", "last"), **QUIET).table,
    "trace of swapped subjects": lambda lens: lens.trace(FACTS, noise="swap", positions=("last",), **QUIET).table,
}
ON_TWO = ("sweep", "hooked sweep", "flow", "patch", "contributions", "generation", "effective attention")


def columns(found: Any) -> list[np.ndarray]:
    """All that a verb has found, column by column."""
    if isinstance(found, Tensor):
        return [found.detach().cpu().double().numpy()]
    if isinstance(found, pd.DataFrame):
        return [np.stack(column) if column.dtype == object and isinstance(column.iloc[0], list) else column.to_numpy()
                for _, column in found.items()]  # fmt: skip
    return [column for part in found for column in columns(part)]


def difference(found: Any, expected: Any) -> float:
    """The largest difference of two answers to a verb, |a - b| / (1 + |b|); infinite where words or shapes differ."""
    ours, theirs = columns(found), columns(expected)
    if not theirs or [column.shape for column in ours] != [column.shape for column in theirs]:
        return math.inf
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert one.size, "a verb has found nothing, which says nothing of a device"
        if one.dtype.kind != "f":
            apart = 0.0 if (one == other).all() else math.inf
        elif (np.isnan(one) != np.isnan(other)).any():
            apart = math.inf
        else:
            # Equal infinities are no difference.
            apart = float(np.nanmax(np.where(one == other, 0.0, abs(one - other) / (1 + abs(other))), initial=0.0))
        largest = max(largest, apart)
    return largest
