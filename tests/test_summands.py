"""What a mixer's output is a sum of: every source's share equals what the explicit form loses without that source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import explicit
import pytest
import torch
import torch.nn.functional as F
from models import ARCHITECTURES, architecture, in_double, token_ids
from torch import Tensor, nn

from mambalens.hooks import HookManager, MambalensError
from mambalens.hooks.fixed_scales import FixedScales
from mambalens.hooks.knockout import Paths
from mambalens.hooks.layer_parts import parts_of
from mambalens.hooks.mixer import Captured, Mixer
from mambalens.hooks.summands import Summands

IDS, LAST = token_ids(2, 9), torch.tensor([8, 5])
"""Two prompts, one padded on the right."""
ROWS = torch.arange(2)
TOLERANCE = 1e-9


def directions(seed: int = 3) -> Tensor:
    return torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_parts_of_every_layer_add_up_to_the_residual_stream(name: str) -> None:
    model, towards, streams = architecture(name), directions(), []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        streams.append(output[0] if isinstance(output, tuple) else output)

    hooks = HookManager(model)
    with in_double(model):
        parts = parts_of(hooks, IDS, LAST, towards)
        handles = [layer.register_forward_hook(keep) for layer in hooks.layers]
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    before = parts.embedding
    for layer, stream in zip(parts.layers, streams, strict=True):
        after = (stream[ROWS, LAST] * towards).sum(-1)
        found = before + sum(part.total for part in layer.sublayers) + layer.rest
        torch.testing.assert_close(found, after, atol=TOLERANCE, rtol=0)
        if name == "minimax":  # its layers put a norm on the residual stream itself
            assert float(layer.rest.abs().max()) > 1
        else:
            torch.testing.assert_close(layer.rest, torch.zeros_like(layer.rest), atol=TOLERANCE, rtol=0)
        for part in layer.sublayers:
            assert (part.summands is None) == (part.sublayer.part == "mlp")
            if part.summands is not None:
                torch.testing.assert_close(part.summands.total, part.total, atol=TOLERANCE, rtol=0)
        before = after


def _called(model: nn.Module, mixer: Mixer, towards: Tensor) -> tuple[Captured, Tensor, Summands]:
    """A mixer's call in a run, its input, and the summands."""
    found: list[Captured] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append(Captured(args, kwargs, output, None))

    handle = mixer.module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad(), mixer.probing():
        model(input_ids=IDS, use_cache=False)
        handle.remove()
        call = found[0]
        given = call.arguments(mixer.module)
        hidden = next(given[key] for key in ("hidden_states", "input_states", "x") if key in given)
        return call, hidden, mixer.summands(call, LAST, towards)


def _scaled(x: Tensor, whole: Tensor, eps: float) -> Tensor:
    """RMSNorm of a part without its weight: the scale is that of the whole."""
    return x * torch.rsqrt(whole.square().mean(-1, keepdim=True) + eps)


def _mamba1(m: Any, hidden: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    return m.out_proj(part * F.silu(m.in_proj(hidden).chunk(2, -1)[1]))


def _mamba2(m: Any, hidden: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    gate = F.silu(m.in_proj(hidden).split([m.intermediate_size, m.conv_dim, m.num_heads], -1)[0])
    size = getattr(m.norm, "group_size", part.shape[-1])
    part, whole = ((t * gate).unflatten(-1, (-1, size)) for t in (part, whole))
    return m.out_proj(_scaled(part, whole, m.norm.variance_epsilon).flatten(-2) * m.norm.weight)


def _delta(m: Any, hidden: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    gate = explicit.delta_projection(m, hidden)[3]
    norm, out = (m.o_norm, m.o_proj) if hasattr(m, "o_norm") else (m.norm, m.out_proj)
    width = norm.weight.shape[0]
    act = torch.sigmoid if hasattr(m, "forget_gate") else F.silu
    part, whole, gate = (t.unflatten(-1, (-1, width)) for t in (part, whole, gate.flatten(2)))
    return out((_scaled(part, whole, norm.variance_epsilon) * norm.weight * act(gate)).flatten(-2))


def _lightning(m: Any, hidden: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    normed = m.norm.weight * _scaled(part, whole, m.norm.variance_epsilon)
    return m.out_proj(torch.sigmoid(m.output_gate(hidden)) * normed)


def _rglru(m: Any, hidden: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    return F.linear(part * m.act_fn(m.linear_y(hidden)), m.linear_out.weight)


def _shortconv(m: Any, hidden: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    return F.linear(m.in_proj(hidden).chunk(3, -1)[1] * part, m.out_proj.weight)


def _zamba(m: Any, hidden: Tensor, part: Tensor, whole: Tensor) -> Tensor:
    return m.out_proj(part * F.silu(m.in_proj(hidden)[..., 1::2]))


RECURRENCES: dict[str, tuple[Callable, Callable]] = {
    "mamba": (explicit.mamba1_scan, _mamba1),
    "falcon_mamba": (explicit.mamba1_scan, _mamba1),
    "jamba": (explicit.mamba1_scan, _mamba1),
    "zamba": (explicit.zamba, _zamba),
    "mamba2": (explicit.mamba2_scan, _mamba2),
    "nemotron_h": (explicit.mamba2_scan, _mamba2),
    "qwen3_next": (explicit.delta, _delta),
    "qwen3_5_text": (explicit.delta, _delta),
    "olmo_hybrid": (explicit.delta, _delta),
    "kimi_linear": (explicit.delta, _delta),
    "bailing_hybrid": (explicit.delta, _delta),
    "minimax": (explicit.lightning, _lightning),
    "recurrent_gemma": (explicit.rglru, _rglru),
    "lfm2": (explicit.shortconv, _shortconv),
}
"""By model: what its mixer reads, explicitly, and what is behind that, with the norm's scale that of the whole."""


@pytest.mark.parametrize("name", [name for name in RECURRENCES if name in ARCHITECTURES])
def test_a_source_of_a_recurrence_has_the_share_that_is_lost_without_it(name: str) -> None:
    """Feature by feature, with entries of the explicit form set to zero, and the skip by setting all of them to zero."""
    model, towards = architecture(name), directions()
    mixer = next(mixer for mixer in HookManager(model).mixers if mixer.kind != "attention")
    reads, behind = RECURRENCES[name]
    module, time, count = mixer.module, IDS.shape[1], mixer.n_features
    by_taps = mixer.kind == "shortconv"

    def read(blocked: Tensor) -> Tensor:
        entries = blocked.expand(2, time, time, count)
        none = torch.zeros_like(entries)
        masks = (none, entries) if by_taps else (entries, none)
        more = () if reads in (explicit.mamba1_scan, explicit.mamba2_scan) else (none,)
        found = reads(module, hidden, None, *masks, *more)
        return found[0] if isinstance(found, tuple) else found

    def along(part: Tensor) -> Tensor:
        return (behind(module, hidden, part, whole)[ROWS, LAST] * towards).sum(-1)

    with in_double(model), torch.no_grad():
        call, hidden, found = _called(model, mixer, towards)
        nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        whole = read(nothing)
        for source in range(time):
            at = torch.zeros(1, 1, time, 1, dtype=torch.bool)
            at[:, :, source] = True
            lost = (whole - read(at)).unflatten(-1, (count, -1))  # [B, T, F, P]
            for feature in range(0, count, max(1, count // 5)):
                only = torch.zeros_like(lost)
                only[:, :, feature] = lost[:, :, feature]
                share = along(only.flatten(2))
                torch.testing.assert_close(found.sources[:, source, feature], share, atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(found.sources[:, source].sum(-1), along(lost.flatten(2)), atol=TOLERANCE, rtol=0)
        skipped = along(read(~nothing))
        own = torch.zeros_like(skipped) if found.skip is None else found.skip.sum(-1)
        torch.testing.assert_close(own, skipped, atol=TOLERANCE, rtol=0)
        output = call.output[0] if isinstance(call.output, tuple) else call.output
        torch.testing.assert_close(found.total, (output[ROWS, LAST] * towards).sum(-1), atol=TOLERANCE, rtol=0)
    assert found.path is (Paths.CONV if by_taps else Paths.MAIN)
    assert (found.skip is not None) == (mixer.kind in ("mamba1", "mamba2"))
    assert float(found.sources[1, LAST[1] + 1 :].abs().max()) == 0.0  # padding


def _llama(m: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = m.v_proj(hidden).unflatten(-1, (-1, m.head_dim))
    return values, torch.ones_like(hidden[..., :1]), m.o_proj.weight


def _gpt2(m: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = m.c_attn(hidden).chunk(3, -1)[2].unflatten(-1, (-1, m.head_dim))
    return values, torch.ones_like(hidden[..., :1]), m.c_proj.weight.T


def _neox(m: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = m.query_key_value(hidden).unflatten(-1, (-1, 3 * m.head_size)).chunk(3, -1)[2]
    return values, torch.ones_like(hidden[..., :1]), m.dense.weight


def _bloom(m: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = m.query_key_value(hidden).unflatten(-1, (-1, 3, m.head_dim))[..., 2, :]
    return values, torch.ones_like(hidden[..., :1]), m.dense.weight


def _gated(m: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate = m.q_proj(hidden).unflatten(-1, (-1, 2 * m.head_dim))[..., m.head_dim :].flatten(-2)
    return m.v_proj(hidden).unflatten(-1, (-1, m.head_dim)), torch.sigmoid(gate), m.o_proj.weight


ATTENTION = {"llama": _llama, "mistral": _llama, "gemma2": _llama, "gpt_oss": _llama, "gpt2": _gpt2, "gpt_neox": _neox,
             "bloom": _bloom, "qwen3_next": _gated}  # fmt: skip
"""By model: values [B, T, groups, width], the gate of what is read, and the output projection's weight."""


@pytest.mark.parametrize("name", [name for name in ATTENTION if name in ARCHITECTURES])
def test_a_source_of_attention_has_the_share_of_its_weight_times_its_value(name: str) -> None:
    model, towards = architecture(name), directions()
    mixer = next(mixer for mixer in HookManager(model).mixers if mixer.kind == "attention")
    with in_double(model), torch.no_grad():
        call, hidden, found = _called(model, mixer, towards)
        values, gate, out = ATTENTION[name](mixer.module, hidden)
        weights = call.output[1]  # [B, H, T, S]
        count = weights.shape[1]
        values = values.repeat_interleave(count // values.shape[2], 2)
        gate = gate.expand(2, IDS.shape[1], out.shape[1]).unflatten(-1, (count, -1))
        lead = (towards @ out).unflatten(-1, (count, -1)) * gate[ROWS, LAST]  # [B, H, P]
        for source in range(IDS.shape[1]):
            share = weights[ROWS, :, LAST, source] * (values[:, source] * lead).sum(-1)
            torch.testing.assert_close(found.sources[:, source], share, atol=TOLERANCE, rtol=0)
        output = call.output[0] - call.arguments(mixer.module).get("residual", 0.0)
        torch.testing.assert_close(found.total, (output[ROWS, LAST] * towards).sum(-1), atol=TOLERANCE, rtol=0)
    assert found.path is Paths.MAIN and found.skip is None


class _Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs()


def test_a_layer_that_is_not_linear_in_its_sublayers_is_refused() -> None:
    model = architecture("gemma2")
    model.model.layers[1].post_attention_layernorm = _Doubling()
    with pytest.raises(MambalensError, match="cannot be parted into contributions"):
        parts_of(HookManager(model), IDS, LAST, directions())


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.layer_norm(x, (6,), torch.arange(6.0).double(), torch.ones(6).double(), 1e-3),
        lambda x: F.rms_norm(x, (6,), torch.arange(6.0).double(), 1e-3),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
        lambda x: x * torch.pow(x.pow(2).mean(-1, keepdim=True) + 1e-3, -0.5),
        lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: F.normalize(x, dim=-1),
    ],
)
def test_a_norm_with_its_scale_fixed_gives_the_same_and_is_linear(norm: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with FixedScales() as fixed:
        found = norm(x)
    torch.testing.assert_close(found, norm(x), atol=1e-12, rtol=0)
    assert len(fixed.scales) == 1

    def held(x: Tensor) -> Tensor:
        with FixedScales(fixed.scales):
            return norm(x)

    a, b = x * 3.0 + 1.0, x.flip(-1)
    nothing = held(torch.zeros_like(x))
    torch.testing.assert_close(held(a + b) - nothing, held(a) + held(b) - 2 * nothing, atol=1e-12, rtol=0)
    torch.testing.assert_close(held(x), found, atol=1e-12, rtol=0)
