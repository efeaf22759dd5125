"""What the benchmark of peers writes by hand for Mamba is the knockout, so its times are of the same thing."""

from __future__ import annotations

import importlib.util
import sys
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import LAYERS, in_double, tiny, token_ids

from mambalens.hooks import HookManager

WINDOW = range(1, LAYERS)


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(name: str, model: Any, ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Logits behind the last token, with torch's own hooks."""
    reads, place, lost = benchmark("peers_mamba").LOST[name]
    handles = []
    for layer in WINDOW:
        mixer, seen = model.backbone.layers[layer].mixer, {}

        def cut(module: Any, inputs: Any, mixer: Any = mixer, seen: Any = seen) -> Any:
            changed = inputs[0].clone()
            changed[:, -1] -= lost(mixer, seen, sources)
            return (changed, *inputs[1:])

        for read in reads:
            module, _, side = read.rpartition(".")

            def see(_: Any, inputs: Any, output: Any, read: str = read, side: str = side, seen: Any = seen) -> None:
                seen[read] = inputs[0] if side == "input" else output

            handles.append(attrgetter(module)(mixer).register_forward_hook(see))
        handles.append(getattr(mixer, place).register_forward_pre_hook(cut))
    try:
        return model(ids).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
@torch.no_grad()
def test_what_peers_have_to_write_for_mamba_is_the_knockout(name: str) -> None:
    model, ids = tiny(name), token_ids(3, 9)
    sources = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    sources[:, 2], sources[0, -1] = True, True
    with in_double(model):
        plain = model(ids).logits[:, -1]
        with HookManager(model).knockout(sources, [-1], WINDOW):
            hooked = model(ids).logits[:, -1]
        found = by_hand(name, model, ids, sources)
    assert (hooked - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, hooked, rtol=0, atol=1e-9)
