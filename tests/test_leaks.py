"""Planted leaks are refused by name; what does not leak is taken, and left as it was."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, LAYERS, VOCABULARY, architecture, tiny, token_ids
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from mambalens.hooks import HookManager, MambalensError
from mambalens.hooks.knockout import Paths
from mambalens.hooks.leaks import TIME, refuse_leaks
from mambalens.hooks.mixer_attention import AttentionMixer
from mambalens.hooks.mixer_mamba1 import Mamba1Mixer

DTYPES = [torch.float32, torch.bfloat16]


def shifted(hidden: Tensor, distance: int = 1) -> Tensor:
    """Every position holds what was `distance` before it."""
    return nn.functional.pad(hidden, (0, 0, distance, 0))[:, : hidden.shape[1]]


def running_mean(hidden: Tensor) -> Tensor:
    """The mean of what was so far."""
    return hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None].to(hidden.dtype)


class Around(nn.Module):
    """A module with something done to what it gives."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.change(self.inner(*args, **kwargs))


class TokenShift(nn.Module):
    """An MLP that reads the token before, as RWKV's does."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(0.7 * hidden + 0.3 * shifted(hidden))


class SequenceRouter(nn.Module):
    """An MLP whose gate reads the sequence so far."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden) * running_mean(hidden).mean(-1, keepdim=True).sigmoid()


class ShortConvolution(nn.Module):
    """A causal convolution [B, T, H] -> [B, T, H]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(width, width, 4, groups=width, padding=3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv1d(hidden.mT)[..., : hidden.shape[1]].mT


class ConvolvedLayer(LlamaDecoderLayer):
    """A foreign layer around Llama's attention."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states + self.short(hidden_states), *args, **kwargs)


class AveragingLayer(LlamaDecoderLayer):
    """Mixes positions in its own forward."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs) + hidden_states.mean(1, keepdim=True)


class LinearAttention(nn.Module):
    """A token mixer that no adapter knows: sum of outer products without a decay."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        outer = (self.k(hidden)[..., None] * self.v(hidden)[..., None, :]).cumsum(1)
        return (self.q(hidden)[..., None] * outer).sum(-2)


class TwoMixersLayer(LlamaDecoderLayer):
    """A second token mixer beside attention."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, *args, **kwargs) + self.second(hidden_states)


class ImpureLayer(LlamaDecoderLayer):
    """Mixes no positions, but reads what the trunk has left for it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states + self.left[0], *args, **kwargs)


def convolution_before_attention(model: Any) -> None:
    layer = model.model.layers[1]
    layer.short, layer.__class__ = ShortConvolution(24), ConvolvedLayer


def token_shift(model: Any) -> None:
    model.model.layers[2].mlp = TokenShift(model.model.layers[2].mlp)


def far_token_shift(model: Any) -> None:
    model.model.layers[0].mlp = Around(model.model.layers[0].mlp, lambda given: given + 0.3 * shifted(given, 9))


def mean_over_positions(model: Any) -> None:
    model.model.layers[3].__class__ = AveragingLayer


def router_that_sees_the_sequence(model: Any) -> None:
    model.model.layers[1].mlp = SequenceRouter(model.model.layers[1].mlp)


def second_mixer(model: Any) -> None:
    layer = model.model.layers[0]
    layer.second, layer.__class__ = LinearAttention(24), TwoMixersLayer


def convolved_values(model: Any) -> None:
    attention = model.model.layers[1].self_attn
    attention.v_proj = nn.Sequential(attention.v_proj, ShortConvolution(12))


def shift_of_embeddings(model: Any) -> None:
    model.set_input_embeddings(_Shifting(*model.get_input_embeddings().weight.shape))


def shift_behind_the_layers(model: Any) -> None:
    model.model.norm = Around(model.model.norm, lambda hidden: hidden + 0.3 * shifted(hidden))


def argument_beside_the_layers(model: Any) -> None:
    layer, left = model.model.layers[2], [torch.zeros(())]
    layer.left, layer.__class__ = left, ImpureLayer
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: left.__setitem__(0, running_mean(output))
    )


class _Shifting(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 0.3 * shifted(super().forward(ids))


PLANTED = {
    convolution_before_attention: r"layer 1 \(ConvolvedLayer\), in short \(ShortConvolution\), which no path",
    token_shift: r"layer 2 \(LlamaDecoderLayer\), in mlp \(TokenShift\), which no path",
    far_token_shift: r"layer 0 \(LlamaDecoderLayer\), in mlp \(Around\), which no path",
    mean_over_positions: r"layer 3 \(AveragingLayer\), in the layer's own code, which no path",
    router_that_sees_the_sequence: r"layer 1 \(LlamaDecoderLayer\), in mlp \(SequenceRouter\), which no path",
    second_mixer: r"layer 0 \(TwoMixersLayer\), in second \(LinearAttention\), which no path",
    convolved_values: r"layer 1 \(LlamaDecoderLayer\), in self_attn\.v_proj\.1 \(ShortConvolution\), which no path",
    shift_of_embeddings: r"before layer 0 \(LlamaDecoderLayer\), in what it is given",
    shift_behind_the_layers: r"behind the last layer, layer 3 \(LlamaDecoderLayer\)",
    argument_beside_the_layers: r"layer 2 \(ImpureLayer\), in the layer's own code",
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plant", list(PLANTED), ids=lambda plant: plant.__name__)
def test_a_planted_leak_is_refused_by_name(plant: Callable[[Any], None], dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    HookManager(model, check=True)
    torch.manual_seed(0)
    plant(model)
    model.to(dtype)
    before = fingerprint(model)
    with pytest.raises(MambalensError, match=f"LlamaForCausalLM leaks: .*{PLANTED[plant]}.*Supported: Mamba"):
        HookManager(model, check=True)
    assert fingerprint(model) == before


@pytest.mark.parametrize("plant", [convolution_before_attention, mean_over_positions, second_mixer])
def test_a_known_mixer_in_a_foreign_layer_is_tested_without_being_asked(plant: Callable[[Any], None]) -> None:
    model = tiny("llama", torch.float32)
    plant(model)
    with pytest.raises(MambalensError, match="LlamaForCausalLM leaks"):
        HookManager(model)


def test_a_foreign_class_with_a_known_name_is_tested_without_being_asked() -> None:
    model, name = tiny("llama"), LlamaAttention.__name__
    namesake = type(name, (LlamaAttention,), {"__module__": "somewhere.else"})
    for layer in model.model.layers:
        layer.self_attn.__class__ = namesake
    token_shift(model)
    with pytest.raises(MambalensError, match="LlamaForCausalLM leaks"):
        HookManager(model)


@pytest.fixture
def adapters() -> Iterator[None]:
    """Adapters that a test defines are gone after it."""
    yield
    gc.collect()
    assert {child.__name__ for child in Mamba1Mixer.__subclasses__()} == set()


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_adapter_that_forgets_a_path_is_refused(dtype: torch.dtype) -> None:
    class Forgetful(Mamba1Mixer):
        paths = Paths.MAIN

    with pytest.raises(
        MambalensError,
        match=r"MambaForCausalLM leaks: .* in layer 0 \(MambaBlock\), in mixer \(MambaMixer\): the mamba1 adapter does "
        "not cut all of it",
    ):
        HookManager(tiny("mamba1", dtype), check=True)
    del Forgetful


@pytest.mark.usefixtures("adapters")
def test_an_adapter_that_cuts_the_targets_own_entry_is_refused() -> None:
    class Silent(Mamba1Mixer):
        def attach(self, current: Callable[[], Any]) -> Callable[[], None]:
            detach = super().attach(current)

            def silence(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                cuts = current().cuts_of(self)
                return output.masked_fill(cuts[0].targets[..., None], 0.0) if cuts else output

            handle = self.module.register_forward_hook(silence)
            return lambda: (handle.remove(), detach())

    with pytest.raises(
        MambalensError,
        match=r"MambaForCausalLM: in layer 0 \(MambaBlock\) a target does not read itself .*: the mamba1 adapter cuts "
        "too much of MambaMixer",
    ):
        HookManager(tiny("mamba1"), check=True)
    del Silent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", list(ARCHITECTURES))
def test_no_tested_architecture_leaks(model_type: str, dtype: torch.dtype) -> None:
    model = architecture(model_type, dtype)
    hooks = HookManager(model)
    if dtype == torch.float32:
        hooks.check()
    else:  # whose arithmetic need not be as close
        refuse_leaks(model, hooks.layers, hooks.mixers, hooks.knockout)


def test_the_tables_of_tested_classes_are_what_the_tests_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """So no tested architecture is checked when it is loaded, which takes time."""

    def unexpected(self: HookManager) -> None:
        raise AssertionError(f"{self} was checked.")

    monkeypatch.setattr(HookManager, "check", unexpected)
    mixers = [mixer for model_type in ARCHITECTURES for mixer in HookManager(architecture(model_type)).mixers]
    assert {type(m.module).__name__ for m in mixers if m.kind == "attention"} == AttentionMixer.tested
    unknown = AutoModelForCausalLM.from_config(GemmaConfig(**_SMALL, head_dim=6))
    with pytest.raises(AssertionError, match="was checked"):
        HookManager(unknown)


_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 128}  # fmt: skip
INKLING = _SMALL | {
    "head_dim": 6, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 6,
    "sliding_window_size": 5, "d_rel": 4, "rel_extent": 16, "moe_intermediate_size": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1,
}  # fmt: skip


@pytest.mark.skipif("inkling_text" not in CONFIG_MAPPING, reason="this release of transformers does not have it")
@pytest.mark.parametrize("experts", ["dense", "sparse"])
def test_inkling_is_refused_by_name(experts: str) -> None:
    config = AutoConfig.for_model("inkling_text", **INKLING, mlp_layer_types=[experts] * 3)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        MambalensError, match=r"InklingForCausalLM leaks: .* in layer 0 \(InklingDecoderLayer\), in self_attn\.k_sconv"
    ):
        HookManager(model)


@pytest.mark.skipif("inkling_text" not in CONFIG_MAPPING, reason="this release of transformers does not have it")
def test_inkling_without_convolutions_in_attention_is_refused_for_those_around_it() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("inkling_text", **INKLING)).eval()
    for layer in model.model.layers:
        layer.self_attn.k_sconv = layer.self_attn.v_sconv = _Plain()
    with pytest.raises(MambalensError, match=r"in attn_sconv \(InklingShortConvolution\), which no path"):
        HookManager(model)
    for layer in model.model.layers:
        layer.attn_sconv = _Plain()
    with pytest.raises(MambalensError, match=r"in mlp_sconv \(InklingShortConvolution\), which no path"):
        HookManager(model)
    for layer in model.model.layers:
        layer.mlp_sconv = _Plain()
    with pytest.raises(MambalensError, match="InklingAttention cannot be compared"):  # but leaks no more
        HookManager(model)


class _Plain(nn.Module):
    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_rounding_in_experts_is_no_leak(experts: str, dtype: torch.dtype) -> None:
    """As many tokens go to an expert as the other tokens decide, and its kernels round accordingly."""
    if (experts, dtype) == ("grouped_mm", torch.float64):
        pytest.skip("torch has no such kernel")
    wide = {"hidden_size": 192, "intermediate_size": 160, "num_hidden_layers": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    config = MixtralConfig(**_SMALL | wide, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts).to(dtype)
    HookManager(model, check=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**_SMALL | {"num_hidden_layers": 48}),
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=48, state_size=4),
        MixtralConfig(**_SMALL | {"num_hidden_layers": 12}, num_local_experts=4, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_deep_model_gives_no_false_alarm(config: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    HookManager(model, check=True)


def fingerprint(model: Any) -> list[Any]:
    """All that a check could leave behind in a model."""
    modules = [
        (path, module.training, sorted(vars(module)), *(len(getattr(module, hooks)) for hooks in HOOKS))
        for path, module in model.named_modules()
    ]
    weights = [(name, weight.dtype, weight.requires_grad, weight.grad) for name, weight in model.named_parameters()]
    return [modules, weights, repr(model.config), torch.random.get_rng_state().tolist()]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "gpt2", "llama", "jamba", "falcon_h1", "gpt_oss"])
def test_a_model_is_left_bit_for_bit_as_it_was(model_type: str, training: bool) -> None:
    """Also one in training: its dropout would look like a leak."""
    model, ids = architecture(model_type, torch.float32), token_ids(2, 7)
    with torch.no_grad():
        base = model(ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train(training)
    model.get_input_embeddings().train(not training)
    before = fingerprint(model)
    HookManager(model, check=True)
    assert fingerprint(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, base)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_may_be_on_or_off(context: Callable[[], Any]) -> None:
    for name in ("mamba1", "gpt2"):
        with context():
            HookManager(tiny(name, torch.float32), check=True)
    model = tiny("llama", torch.float32)
    token_shift(model)
    with context(), pytest.raises(MambalensError, match="leaks"):
        HookManager(model, check=True)


def test_a_check_costs_four_passes_and_a_refusal_two_more() -> None:
    model = tiny("llama")
    passes: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    HookManager(model, check=True)
    assert passes == [(1, TIME)] * 3 + [(1, 7)]
    passes.clear()
    token_shift(model)
    with pytest.raises(MambalensError, match="leaks"):
        HookManager(model, check=True)
    assert passes == [(1, TIME)] * 4


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[LAYERS - 2].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(MambalensError, match=r"layer 2 \(LlamaDecoderLayer\) gives numbers that are not finite"):
        HookManager(model, check=True)


def test_layers_whose_positions_cannot_be_told_are_refused() -> None:
    """They would look as if they did not leak."""

    class Padded(LlamaDecoderLayer):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return nn.functional.pad(super().forward(hidden_states, *args, **kwargs), (0, 0, 0, 1))

    model = tiny("llama")
    model.model.layers[LAYERS - 1].__class__ = Padded
    with pytest.raises(MambalensError, match=r"layer 3 \(Padded\) gives nothing with an entry for each of 23 tokens"):
        HookManager(model)


def test_attention_that_cannot_be_compared_is_refused_by_name() -> None:
    model = tiny("llama")
    odd = type("OddAttention", (LlamaAttention,), {"forward": _odd})
    for layer in model.model.layers:
        layer.self_attn.__class__ = odd
    with pytest.raises(MambalensError, match="LlamaForCausalLM: OddAttention cannot be compared .*AttributeError"):
        HookManager(model)


def _odd(self: Any, hidden_states: Tensor, past_key_values: Any = None, attention_mask: Any = None, **rest: Any) -> Any:
    if past_key_values is not None:
        past_key_values.update_index(hidden_states)
    return LlamaAttention.forward(
        self, hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **rest
    )


_odd.__annotations__["past_key_values"] = LlamaAttention.forward.__annotations__["past_key_values"]
