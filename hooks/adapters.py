"""Finds the token mixers of a model, and the adapter of each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

from torch import nn

from mambalens.hooks.errors import MambalensError
from mambalens.hooks.mixer import Mixer

SUPPORTED = (
    "Mamba and Mamba-2 layers as transformers has them, attention that takes an attention mask, and both together"
)
NO_MIXER = ("mlp", "moe")
"""Types of layers, as configurations name them, that work on every position alone."""


def find_mixers(model: Any) -> tuple[nn.Module, list[nn.Module], list[Mixer]]:
    """The module of a causal LM that runs its layers, the layers, and their token mixers in the order of the layers.

    Raises:
        MambalensError: naming the model's class, or the first layer whose mixer no adapter knows.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise MambalensError(f"{name} is an encoder-decoder model. Supported: {SUPPORTED}.")
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise MambalensError(f"{name} has no language-model head. Supported: {SUPPORTED}.")
    known = adapters()
    found: dict[str, list[Mixer]] = {}  # by the list of layers they live in
    for path, module in model.named_modules():
        place = re.match(r"(.*?)\.(\d+)\.", path)
        adapter = next((adapter for adapter in known if place and adapter.matches(module)), None)
        if adapter is not None and place is not None:
            found.setdefault(place[1], []).append(adapter(module, int(place[2])))
    if not found:
        raise MambalensError(f"{name} has no token mixer that mambalens knows. Supported: {SUPPORTED}.")
    stack, mixers = max(found.items(), key=lambda item: len(item[1]))
    layers = list(model.get_submodule(stack))
    types = getattr(config, "layer_types", None) or [""] * len(layers)
    with_mixers = {mixer.layer for mixer in mixers}
    for number, layer in enumerate(layers):
        if number not in with_mixers and types[number] not in NO_MIXER:
            parts = ", ".join(type(child).__name__ for child in layer.children())
            raise MambalensError(
                f"{name}: layer {number} ({parts}) has no token mixer that mambalens knows. Supported: {SUPPORTED}."
            )
    return model.get_submodule(stack.rpartition(".")[0]), layers, mixers


def adapters() -> list[type[Mixer]]:
    """Every adapter in this folder, and those that somebody else has defined; one derived from another goes first."""
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if found.name.startswith("mixer_"):
            importlib.import_module(f"{__package__}.{found.name}")
    return _concrete(Mixer)  # type: ignore[type-abstract]


def _concrete(cls: type[Mixer]) -> list[type[Mixer]]:
    derived = [found for child in cls.__subclasses__() for found in _concrete(child)]
    return derived if inspect.isabstract(cls) else [*derived, cls]
