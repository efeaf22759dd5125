"""Mamba-2's modules fill prompts up to whole chunks; short ones are taken in chunks of their own length."""

from __future__ import annotations

import pytest
import torch
from models import architecture, in_double, token_ids

from mambalens.hooks import HookManager

FILL_UP = ["mamba2", "bamba", "zamba2", "falcon_h1", "granitemoehybrid", "nemotron_h"]


@pytest.mark.parametrize("name", FILL_UP)
def test_short_chunks_give_what_filled_up_ones_give(name: str) -> None:
    model = architecture(name)
    hooks, ids = HookManager(model), token_ids(2, 5)
    modules = [mixer.module for mixer in hooks.mixers if hasattr(mixer.module, "chunk_size")]
    assert modules and all(module.chunk_size == 8 for module in modules)
    with torch.no_grad(), in_double(model):
        filled_up = model(ids, use_cache=False).logits
        with hooks.short(5):
            assert all(module.chunk_size == 5 for module in modules)
            short = model(ids, use_cache=False).logits
        assert (short - filled_up).abs().max() < 1e-9
    assert all(module.chunk_size == 8 for module in modules)


def test_chunks_are_themselves_again_behind_an_error_and_never_longer() -> None:
    model = architecture("mamba2")
    hooks = HookManager(model)
    module = hooks.mixers[0].module
    with pytest.raises(ZeroDivisionError), hooks.short(3):
        _ = module.chunk_size // 0
    assert module.chunk_size == 8
    with hooks.short(9):
        assert module.chunk_size == 8
