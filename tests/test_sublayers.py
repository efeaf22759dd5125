"""Sublayers are found in every architecture, and what they give can be read and replaced."""

import pytest
import torch

from mambalens.hooks import HookManager
from mambalens.hooks.sublayers import sublayers_of
from tests.models import ARCHITECTURES, architecture, in_double, token_ids

MLPS = {
    "mamba": [[]] * 3,
    "mamba2": [[]] * 3,
    "falcon_mamba": [[]] * 3,
    "jamba": [["JambaMLP"], ["JambaSparseMoeBlock"], ["JambaMLP"]],
    "zamba2": [[], ["Zamba2MLP"], [], ["Zamba2MLP"]],
    "bamba": [["BambaMLP"]] * 3,
    "falcon_h1": [["FalconH1MLP"]] * 3,
    "granitemoehybrid": [["GraniteMoeHybridMoE", "GraniteMoeHybridMLP"]] * 3,
    "nemotron_h": [[], ["NemotronHMLP"], [], ["NemotronHMLP"], []],
    "qwen3_next": [["Qwen3NextMLP"], ["Qwen3NextSparseMoeBlock"], ["Qwen3NextSparseMoeBlock"]],
    "qwen3_5_text": [["Qwen3_5MLP"]] * 3,
    "qwen3_5_moe_text": [["Qwen3_5MoeSparseMoeBlock"]] * 3,
    "olmo_hybrid": [["OlmoHybridMLP"]] * 3,
    "kimi_linear": [["KimiLinearMLP"], ["KimiLinearMoE"], ["KimiLinearMLP"]],
    "bailing_hybrid": [["BailingHybridMLP"], ["BailingHybridMoE"], ["BailingHybridMoE"]],
    "zamba": [[], ["ZambaMLP"], [], ["ZambaMLP"]],
    "recurrent_gemma": [["RecurrentGemmaMlp"]] * 3,
    "minimax": [["MiniMaxSparseMoeBlock"]] * 3,
    "lfm2": [["Lfm2MLP"]] * 3,
    "lfm2_moe": [["Lfm2MoeMLP"], ["Lfm2MoeSparseMoeBlock"], ["Lfm2MoeSparseMoeBlock"]],
    "lfm3": [["Lfm3MLP"]] * 3,
    "gpt2": [["GPT2MLP"]] * 3,
    "gpt_neox": [["GPTNeoXMLP"]] * 3,
    "gptj": [["GPTJMLP"]] * 3,
    "opt": [["Linear"]] * 3,
    "bloom": [["BloomMLP"]] * 3,
    "falcon": [["FalconMLP"]] * 3,
    "falcon-alibi": [["FalconMLP"]] * 3,
    "llama": [["LlamaMLP"]] * 3,
    "mistral": [["MistralMLP"]] * 3,
    "qwen2": [["Qwen2MLP"]] * 3,
    "qwen3": [["Qwen3MLP"]] * 3,
    "gemma2": [["Gemma2MLP"]] * 3,
    "gemma3_text": [["Gemma3MLP"]] * 3,
    "phi3": [["Phi3MLP"]] * 3,
    "olmo2": [["Olmo2MLP"]] * 3,
    "cohere": [["CohereMLP"]] * 3,
    "stablelm": [["StableLmMLP"]] * 3,
    "smollm3": [["SmolLM3MLP"]] * 3,
    "mixtral": [["MixtralSparseMoeBlock"]] * 3,
    "deepseek_v2": [["DeepseekV2MLP"], ["DeepseekV2Moe"], ["DeepseekV2Moe"]],
    "deepseek_v3": [["DeepseekV3MLP"], ["DeepseekV3MoE"], ["DeepseekV3MoE"]],
    "gpt_oss": [["GptOssMLP"]] * 3,
}
"""Classes of the modules beside the mixers, by layer."""
NORMED_STREAM = ("minimax",)
"""Whose layers put a norm on the residual stream itself."""


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_mlps_and_experts_of_every_layer_are_found(name: str) -> None:
    hooks = HookManager(architecture(name))
    of_layers = sublayers_of(hooks.layers, hooks.mixers)
    found = [[type(sub.module).__name__ for sub in of_layer if sub.part == "mlp"] for of_layer in of_layers]
    assert found == MLPS[name]
    assert [sub.mixer for of_layer in of_layers for sub in of_layer if sub.part == "mixer"] == hooks.mixers
    if name == "opt":
        assert all(sub.module is sub.block.fc2 for of_layer in of_layers for sub in of_layer if sub.part == "mlp")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_layer_whose_sublayers_give_nothing_adds_nothing_and_the_model_comes_back_bit_for_bit(name: str) -> None:
    model = architecture(name)
    hooks = HookManager(model)
    ids, number = token_ids(2, 7), hooks.n_layers - 1
    sublayers = sublayers_of(hooks.layers, hooks.mixers)[number]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen.append((given, output[0] if isinstance(output, tuple) else output))

    with torch.no_grad(), in_double(model):
        before = model(input_ids=ids, use_cache=False).logits
        handle = hooks.layers[number].register_forward_hook(watch, with_kwargs=True)
        for change in (torch.zeros_like, torch.clone):
            blocks = [sub.changing(change) for sub in sublayers]
            for block in blocks:
                block.__enter__()
            changed = model(input_ids=ids, use_cache=False).logits
            for block in blocks:
                block.__exit__(None, None, None)
        handle.remove()
        after = model(input_ids=ids, use_cache=False).logits
    given, nothing = seen[0]
    assert nothing.shape == given.shape
    if name not in NORMED_STREAM:
        torch.testing.assert_close(nothing, given, atol=1e-12, rtol=0)
    torch.testing.assert_close(changed, before, atol=1e-9, rtol=0)
    assert torch.equal(before, after)
