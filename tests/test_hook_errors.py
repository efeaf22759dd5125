"""Bad input to the hooks gets a sentence that quotes it."""

from __future__ import annotations

import pytest
import torch
from models import tiny, token_ids
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import Cache

from mambalens.hooks import HookManager, MambalensError


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": [2, 7]}, r"layers has \[7\], but the model has 4 layers: 0 to 3"),
        ({"layers": "attention"}, "'attention' is not a kind of mixer here"),
        ({"features": "slwo"}, "did you mean 'slow'"),
        ({"features": [99]}, r"features has \[99\], but layer 0 has 48 features"),
        ({"features": torch.ones(3, dtype=torch.bool)}, r"shape \[3\], but layer 0 has 48 features"),
        ({"path": "cov"}, "did you mean 'conv'"),
        ({"sources": [12]}, "Position 12 is out of range: .* 6 tokens"),
        ({"targets": [-7]}, "targets has position -7, but the input has 6 tokens"),
        ({"sources": torch.ones(3, 6, dtype=torch.bool)}, r"shape \[3, 6\], but the input has shape \[2, 6\]"),
        ({"sources": [[1], [2], [3]]}, "positions for 3 rows, but the input has 2"),
        ({"sources": [0.5]}, "are not positions"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_knockout_of_what_is_not_there_quotes_it(arguments: dict, sentence: str) -> None:
    model, ids = tiny("mamba1"), token_ids(2, 6)
    base = model(ids).logits
    given = {"sources": [1], "targets": [-1]} | arguments
    for use_cache in (True, False):
        with pytest.raises(MambalensError, match=sentence), HookManager(model).knockout(**given):
            model(ids, use_cache=use_cache)
        assert torch.equal(model(ids).logits, base)  # a refusal leaves nothing behind either


def test_a_path_and_a_group_that_attention_does_not_have_are_refused() -> None:
    hooks = HookManager(tiny("llama"))
    for path in ("conv", "erase"):
        with (
            pytest.raises(MambalensError, match=f"path='{path}', but none of the layers has it: attention has 'main'"),
            hooks.knockout([0], [1], path=path),
        ):
            pass
    with (
        pytest.raises(MambalensError, match="LlamaAttention, whose features have no decay"),
        hooks.knockout([0], [1], features="slow"),
    ):
        pass


def test_models_that_are_no_causal_language_models_are_named() -> None:
    small = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 8,
    }
    bert = AutoModelForMaskedLM.from_config(BertConfig(**small))
    with pytest.raises(MambalensError, match=r"BertForMaskedLM.*Supported: Mamba and Mamba-2 layers"):
        HookManager(bert)
    rwkv = AutoModelForCausalLM.from_config(
        RwkvConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8, intermediate_size=8)
    )
    with pytest.raises(MambalensError, match="RwkvForCausalLM.*RwkvSelfAttention|RwkvForCausalLM has no token mixer"):
        HookManager(rwkv)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(MambalensError, match="encoder-decoder"):
        HookManager(t5)


def test_a_cache_filled_before_the_block_is_refused() -> None:
    for name in ("mamba1", "mamba2", "llama"):
        model, ids = tiny(name), token_ids(1, 5)
        output = model(ids, use_cache=True)
        cache_name, cache = next((key, value) for key, value in output.items() if isinstance(value, Cache))
        with pytest.raises(MambalensError, match="before the block began"), HookManager(model).knockout([0], [-1]):
            model(ids[:, -1:], use_cache=True, **{cache_name: cache})
