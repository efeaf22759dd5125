"""Tiny random models of every supported architecture, with decays that differ between features."""

from __future__ import annotations

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCABULARY, LAYERS = 61, 4

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": LAYERS, "pad_token_id": 0,
           "bos_token_id": None, "eos_token_id": None}  # fmt: skip
_ROTARY = _COMMON | {"num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 128}

CONFIGS = {
    "mamba1": MambaConfig(**_COMMON, state_size=5, expand=2, conv_kernel=4, time_step_rank=3, use_bias=True),
    "mamba2": Mamba2Config(
        **_COMMON, state_size=6, expand=2, conv_kernel=4, head_dim=8, num_heads=6, n_groups=2, chunk_size=8
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    ),
    "gpt_neox": GPTNeoXConfig(**_ROTARY),
    "llama": LlamaConfig(**_ROTARY, num_key_value_heads=2),
    "mistral": MistralConfig(**_ROTARY, num_key_value_heads=2, sliding_window=5),
    "qwen2": Qwen2Config(**_ROTARY, num_key_value_heads=2),
}  # fmt: skip
SSM = ("mamba1", "mamba2")
TRANSFORMERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2")
ROTARY = ("gpt_neox", "llama", "mistral", "qwen2")


def tiny(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", vocabulary: int = VOCABULARY
) -> PreTrainedModel:
    """A random model in eval mode."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.vocab_size = vocabulary
    implementation = None if name in SSM else attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                # The default gives every feature the same decay, which hides errors.
                parameter.uniform_(-2.0, 1.5)
            elif parameter_name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.uniform_(-1.5, 0.5)
            elif parameter_name.endswith(".D"):
                parameter.uniform_(-1.0, 1.0)
            elif parameter.ndim >= 2:
                # The default scale leaves all logits equal to three digits.
                parameter.normal_(std=0.25)
            elif "norm" not in parameter_name and "ln_" not in parameter_name:
                parameter.normal_(std=0.2)
    return model.to(dtype)


def token_ids(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    """Random tokens other than padding [batch, time]."""
    return torch.randint(1, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))
