"""Tiny random models of every architecture, whose decays, gates, norms and biases differ between features."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from mambalens.hooks import HookManager

VOCABULARY, LAYERS = 61, 4

_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": LAYERS, "pad_token_id": 0,
           "bos_token_id": None, "eos_token_id": None}  # fmt: skip
_ROTARY = _COMMON | {"num_attention_heads": 4, "intermediate_size": 40, "max_position_embeddings": 128}

# The architectures that most tests are about, with nothing that ends a text.
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

_BASE = {"vocab_size": VOCABULARY, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = _BASE | {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
                  "max_position_embeddings": 128}  # fmt: skip
_HYBRID = _LLAMA | {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_expand": 2,
                    "mamba_chunk_size": 8}  # fmt: skip
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5,
          "linear_conv_kernel_dim": 4}  # fmt: skip
_LATENT = _EXPERTS | {"num_key_value_heads": 4, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
                      "v_head_dim": 5, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}  # fmt: skip
_LFM2 = _LLAMA | {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "conv_bias": True}

# Every architecture that the documentation names: its type in transformers (and a variant) -> name in the documentation,
# and options of its configuration.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", _BASE | {"num_hidden_layers": 3, "state_size": 5, "time_step_rank": 3}),
    "mamba2": ("Mamba-2", _BASE | {"num_hidden_layers": 3, "state_size": 6, "head_dim": 8, "num_heads": 6, "n_groups": 2,
                                   "chunk_size": 8}),
    "falcon_mamba": ("FalconMamba", _BASE | {"num_hidden_layers": 3, "state_size": 5, "time_step_rank": 3}),
    "jamba": ("Jamba", _LLAMA | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                                 "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 5,
                                 "mamba_dt_rank": 3}),
    "zamba2": ("Zamba2", _LLAMA | {"num_hidden_layers": 4, "n_mamba_heads": 6, "mamba_headdim": 8, "mamba_ngroups": 2,
                                   "mamba_d_state": 6, "mamba_expand": 2, "chunk_size": 8, "hybrid_layer_ids": [1, 3],
                                   "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1,
                                   "num_key_value_heads": 4, "use_mem_rope": True, "adapter_rank": 4,
                                   "use_shared_attention_adapter": False}),
    "bamba": ("Bamba", _HYBRID | {"attn_layer_indices": [1], "attn_rotary_emb": 4}),
    "falcon_h1": ("Falcon-H1", _HYBRID | {"mamba_d_ssm": 48, "ssm_in_multiplier": 0.7, "attention_in_multiplier": 1.2,
                                          "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7], "mamba_rms_norm": False}),
    "granitemoehybrid": ("Granite 4 hybrid", _HYBRID | _EXPERTS | {
        "layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 16}),
    "nemotron_h": ("Nemotron-H", _LLAMA | {
        "hybrid_override_pattern": "M-*-M", "num_hidden_layers": 5, "mamba_num_heads": 6, "mamba_head_dim": 8,
        "n_groups": 2, "ssm_state_size": 6, "chunk_size": 8, "head_dim": 6}),
    "qwen3_next": ("Qwen3-Next", _LLAMA | _DELTA | _LINEAR | {
        "head_dim": 6, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]}),
    "qwen3_5_text": ("Qwen3.5", _LLAMA | _DELTA | _LINEAR | {"head_dim": 6}),
    "qwen3_5_moe_text": ("Qwen3.5 MoE", _LLAMA | _DELTA | _LINEAR | {
        "head_dim": 6, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16}),
    "olmo_hybrid": ("OLMo hybrid", _LLAMA | _DELTA | _LINEAR | {"linear_num_key_heads": 4}),
    "kimi_linear": ("Kimi Linear", _LLAMA | _LATENT | _LINEAR | {"linear_num_heads": 3, "linear_head_dim": 6,
                                                                 "mlp_layer_types": ["dense", "sparse", "dense"]}),
    "bailing_hybrid": ("Ling hybrid", _LLAMA | _LATENT | _LINEAR | {"head_dim": 6, "n_group": 1, "topk_group": 1,
                                                                    "first_k_dense_replace": 1, "num_mtp_layers": 0}),
    "zamba": ("Zamba", _LLAMA | {"num_hidden_layers": 4, "num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_d_state": 5,
                                 "mamba_dt_rank": 3, "attn_layer_period": 2, "attn_layer_offset": 1,
                                 "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}),
    "recurrent_gemma": ("RecurrentGemma", _LLAMA | {"attention_window_size": 5, "lru_width": 24}),
    "minimax": ("MiniMax", _LLAMA | _EXPERTS | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"], "block_size": 4, "head_dim": 6,
        "linear_attn_alpha_factor": 1.2, "linear_attn_beta_factor": 0.8}),
    "lfm2": ("LFM2", _LFM2 | {"block_multiple_of": 8}),
    "lfm2_moe": ("LFM2 MoE", _LFM2 | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                                      "num_dense_layers": 1}),
    "lfm3": ("LFM3", _LFM2 | {"head_dim": 6, "sliding_window": 5}),
    "gpt2": ("GPT-2", {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 128,
                       "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPT-NeoX, Pythia", _LLAMA),
    "gptj": ("GPT-J", {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 3, "n_head": 4, "rotary_dim": 4,
                       "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}),
    "opt": ("OPT", _BASE | {"num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 40,
                            "max_position_embeddings": 128, "word_embed_proj_dim": 24}),
    "bloom": ("BLOOM", _BASE | {"n_layer": 3, "n_head": 4}),
    "falcon": ("Falcon", _BASE | {"num_hidden_layers": 3, "num_attention_heads": 4, "multi_query": True,
                                  "new_decoder_architecture": False, "alibi": False}),
    "falcon-alibi": ("Falcon with ALiBi", _BASE | {"num_hidden_layers": 3, "num_attention_heads": 4, "multi_query": False,
                                                   "new_decoder_architecture": False, "alibi": True}),
    "llama": ("Llama", _LLAMA),
    "mistral": ("Mistral", _LLAMA | {"sliding_window": 5}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", _LLAMA | {"head_dim": 6}),
    "gemma2": ("Gemma 2", _LLAMA | {"head_dim": 6, "sliding_window": 5, "attn_logit_softcapping": 2.0,
                                    "query_pre_attn_scalar": 6}),
    "gemma3_text": ("Gemma 3", _LLAMA | {"head_dim": 6, "sliding_window": 5, "query_pre_attn_scalar": 6}),
    "phi3": ("Phi-3", _LLAMA),
    "olmo2": ("OLMo 2", _LLAMA),
    "cohere": ("Cohere", _LLAMA),
    "stablelm": ("StableLM", _LLAMA),
    "smollm3": ("SmolLM3", _LLAMA | {"no_rope_layers": [1, 1, 0]}),
    "mixtral": ("Mixtral", _LLAMA | _EXPERTS),
    "deepseek_v2": ("DeepSeek-V2", _LLAMA | _LATENT | {"q_lora_rank": 8, "n_routed_experts": 2, "first_k_dense_replace": 1}),
    "deepseek_v3": ("DeepSeek-V3", _LLAMA | _LATENT | {"q_lora_rank": 8, "n_routed_experts": 2, "first_k_dense_replace": 1}),
    "gpt_oss": ("gpt-oss", _LLAMA | _EXPERTS | {"head_dim": 6, "sliding_window": 5}),
}  # fmt: skip
# The oldest transformers in the range does not have all of them.
ARCHITECTURES = {name: given for name, given in ARCHITECTURES.items() if name.partition("-")[0] in CONFIG_MAPPING}


def tiny(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", vocabulary: int = VOCABULARY
) -> PreTrainedModel:
    """A random model of `CONFIGS` in eval mode."""
    return _random(copy.deepcopy(CONFIGS[name]), dtype, None if name in SSM else attention, vocabulary)


def architecture(
    model_type: str,
    dtype: torch.dtype = torch.float64,
    attention: str = "eager",
    vocabulary: int = VOCABULARY,
    **others: Any,
) -> PreTrainedModel:
    """A random model of `ARCHITECTURES` in eval mode, with other options of its configuration."""
    options = ARCHITECTURES[model_type][1] | others
    experts = {"experts_implementation": "eager"} if "num_experts_per_tok" in options else {}
    config = AutoConfig.for_model(model_type.partition("-")[0], **options)
    return _random(config, dtype, attention, vocabulary, **experts)


def _random(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, vocabulary: int, **options: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    config.vocab_size = vocabulary
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **options).eval()
    set_weights(model)
    model = model.to(dtype)
    for module in model.modules():
        if hasattr(module, "decay_factors"):  # powers of a fixed decay (MiniMax), which it has made in float32
            module.query_decay, module.key_decay, module.diagonal_decay = module.decay_factors(module.slope_rate)
    return model


@torch.no_grad()
def set_weights(model: PreTrainedModel) -> None:
    """Random weights on the scale of trained ones."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            # The default gives every feature the same decay, which hides errors.
            parameter.uniform_(-2.0, 1.5)
        elif name.endswith("recurrent_param"):
            parameter.uniform_(-5.0, 0.0)
        elif name.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
            parameter.uniform_(-1.5, 0.5)
        elif name.endswith(".D"):
            parameter.uniform_(-1.0, 1.0)
        elif parameter.ndim >= 2:
            # The default scale leaves all logits equal to three digits.
            parameter.normal_(std=0.25)
        elif name.endswith("bias") or "sinks" in name:
            parameter.normal_(std=0.2)
        else:
            # Weights of norms are ones by default, which hides whether they are applied.
            parameter.uniform_(0.7, 1.3)


class _InDouble:
    """torch, to a file of transformers that rounds to float32 whatever the model's dtype."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _classes(models: tuple[Any, ...]) -> tuple[set[type], list[ModuleType]]:
    """The classes of transformers that models are made of, and the files that these are in."""
    classes = {type(module) for model in models for module in model.modules()}
    classes = {one for one in classes if one.__module__.startswith("transformers.models.")}
    return classes, [sys.modules[home] for home in {one.__module__ for one in classes}]


@contextmanager
def in_torch(*models: Any) -> Iterator[None]:
    """While the block runs, the models take no kernels of other packages, as transformers does where it can import them.

    They have no float64, and do not take tensors of the CPU.
    """
    found = [
        (file, name, function)
        for file in _classes(models)[1]
        for name, function in vars(file).items()
        if "torch_function" in getattr(getattr(function, "__code__", None), "co_freevars", ())
    ]
    for file, name, function in found:
        setattr(file, name, function.__wrapped__)
    try:
        yield
    finally:
        for file, name, function in found:
            setattr(file, name, function)


@contextmanager
def in_double(*models: Any) -> Iterator[None]:
    """While the block runs, the models compute in float64 where their code says float32: norms, scans, decays.

    What they differ by from an explicit form in float64 is then an error, and no rounding.
    """
    classes, files = _classes(models)
    methods = [
        m for one in classes for m in vars(one).values() if torch.float32 in (getattr(m, "__defaults__", None) or ())
    ]
    defaults = [method.__defaults__ for method in methods]
    single = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    for file in files:
        file.torch = _InDouble()
    for method, given in zip(methods, defaults, strict=True):
        method.__defaults__ = tuple(torch.float64 if value is torch.float32 else value for value in given)
    try:
        with in_torch(*models):
            yield
    finally:
        torch.Tensor.float = single  # type: ignore[method-assign]
        for file in files:
            file.torch = torch
        for method, given in zip(methods, defaults, strict=True):
            method.__defaults__ = given


def token_ids(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    """Random tokens other than padding [batch, time]."""
    return torch.randint(1, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def has_keys(hooks: HookManager) -> bool:
    """Whether keys can stand in with values: in attention."""
    return "attention" in hooks.kinds
