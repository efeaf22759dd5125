"""The slow, obvious twins: T x T attention with entries set to zero, plain loops, -inf scores.

Nothing here uses the package. `blocked` masks are [batch, target, source, feature].

What is blocked may be replaced: `instead` lists entries on the main path and of the convolution, as masks like these that
do not meet, and the values [batch, T, features, width] and inputs of the convolution [batch, T, channels] read there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

Instead = list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def convolution(
    inner: Tensor, weight: Tensor, bias: Tensor | None, blocked: Tensor, instead: list[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """sum_k w[K-1-k] inner[t-k] + bias tap by tap; `blocked` [B, T, S, channels], and so what reads other inputs."""
    out = torch.zeros_like(inner)
    kernel = weight.shape[1]
    for t in range(inner.shape[1]):
        for k in range(min(kernel, t + 1)):
            tap = weight[:, kernel - 1 - k] * inner[:, t - k]
            out[:, t] += torch.where(blocked[:, t, t - k], torch.zeros_like(tap), tap)
            for entries, others in instead:
                out[:, t] += weight[:, kernel - 1 - k] * others[:, t - k] * entries[:, t, t - k]
    return out if bias is None else out + bias


def of_taps(instead: Instead, head: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """What the convolution reads instead; of one head, for all channels."""
    return [
        (taps if head is None else taps[..., head, None], inner) for _, taps, _, inner in instead if inner is not None
    ]


def mamba1_scan(
    m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, instead: Instead = ()
) -> Tensor:
    """MambaMixer's scan with skip by explicit alpha[t, s, d] [batch, T, channels]."""
    pad = 1.0 if padding is None else padding[..., None].to(hidden.dtype)
    inner, _ = m.in_proj(hidden * pad).chunk(2, -1)
    x = F.silu(convolution(inner, m.conv1d.weight[:, 0], m.conv1d.bias, conv, of_taps(instead))) * pad
    dt, B, C = m.x_proj(x).split([m.time_step_rank, m.ssm_state_size, m.ssm_state_size], -1)
    if hasattr(m, "dt_layernorm"):
        dt, B, C = m.dt_layernorm(dt), m.b_layernorm(B), m.c_layernorm(C)
    dt = F.softplus(m.dt_proj(dt))
    A = -torch.exp(m.A_log)
    batch, time, channels = x.shape
    alpha = x.new_zeros(batch, time, time, channels)
    for t in range(time):
        for s in range(t + 1):
            decay = torch.exp(A * dt[:, s + 1 : t + 1].sum(1)[..., None])  # [B, D, N]
            alpha[:, t, s] = (C[:, t, None] * decay * B[:, s, None]).sum(-1) * dt[:, s]
    y = torch.einsum("btsd,bsd->btd", alpha.masked_fill(main, 0), x)
    for entries, _, values, _ in instead:
        y = y + torch.einsum("btsd,bsd->btd", alpha * entries, values[..., 0])
    return y + m.D * x


def mamba1(m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, instead: Instead = ()) -> Tensor:
    """MambaMixer's output."""
    pad = 1.0 if padding is None else padding[..., None].to(hidden.dtype)
    gate = m.in_proj(hidden * pad).chunk(2, -1)[1]
    return m.out_proj(mamba1_scan(m, hidden, padding, main, conv, instead) * F.silu(gate))


def _mamba2_projection(m: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    projected = m.in_proj(hidden * getattr(m, "ssm_in_multiplier", 1.0)) * getattr(m, "mup_vector", 1.0)
    return projected.split([m.intermediate_size, m.conv_dim, m.num_heads], -1)


def mamba2_scan(
    m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, instead: Instead = ()
) -> Tensor:
    """Mamba2Mixer's scan with skip by explicit alpha[t, s, head], one head after the other."""
    pad = 1.0 if padding is None else padding[..., None].to(hidden.dtype)
    _, inner, dt = _mamba2_projection(m, hidden * pad)
    dt = F.softplus(dt + m.dt_bias).clamp(*m.time_step_limit)
    batch, time = hidden.shape[:2]
    heads = []
    for h in range(m.num_heads):
        cut = conv[..., h, None].expand(-1, -1, -1, m.conv_dim)  # this head's own view of x, B and C
        u = F.silu(convolution(inner, m.conv1d.weight[:, 0], m.conv1d.bias, cut, of_taps(instead, h))) * pad
        x, B, C = u.split([m.intermediate_size, m.n_groups * m.ssm_state_size, m.n_groups * m.ssm_state_size], -1)
        group = slice((h * m.n_groups // m.num_heads) * m.ssm_state_size, None)
        B, C = (v[..., group][..., : m.ssm_state_size] for v in (B, C))
        x = x[..., h * m.head_dim : (h + 1) * m.head_dim]
        alpha = x.new_zeros(batch, time, time)
        for t in range(time):
            for s in range(t + 1):
                decay = torch.exp(-torch.exp(m.A_log[h]) * dt[:, s + 1 : t + 1, h].sum(1))
                alpha[:, t, s] = (C[:, t] * B[:, s]).sum(-1) * decay * dt[:, s, h]
        y = alpha.masked_fill(main[..., h], 0) @ x
        for entries, _, values, _ in instead:
            y = y + (alpha * entries[..., h]) @ values[:, :, h]
        heads.append(y + m.D[h] * x)
    return torch.cat(heads, -1)


def mamba2(m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, instead: Instead = ()) -> Tensor:
    """Mamba2Mixer's output."""
    pad = 1.0 if padding is None else padding[..., None].to(hidden.dtype)
    gate, _, _ = _mamba2_projection(m, hidden * pad)
    y = mamba2_scan(m, hidden, padding, main, conv, instead)
    if type(m).__name__ != "Mamba2Mixer" and not isinstance(m.norm, torch.nn.Identity):
        return m.out_proj(m.norm(y, gate))
    y = y * F.silu(gate)
    if isinstance(m.norm, torch.nn.Identity):
        return m.out_proj(y)
    # Before 5.23 transformers takes all groups for one: their module, whose other arithmetic is compared here.
    grouped = y.unflatten(-1, (-1, getattr(m.norm, "group_size", y.shape[-1])))
    grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + m.norm.variance_epsilon)
    return m.out_proj(grouped.flatten(-2) * m.norm.weight)


def delta_projection(m: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys, values before the convolution [B, T, channels], gate, raw strengths and log decays [B, T, H, ...]."""
    if hasattr(m, "forget_gate"):  # Kimi Delta Attention
        gate = m.g_proj(hidden) if hasattr(m, "g_proj") else m.g_b_proj(m.g_a_proj(hidden))
        return m.q_proj(hidden), m.k_proj(hidden), m.v_proj(hidden), gate, m.b_proj(hidden), m.forget_gate(hidden)
    if hasattr(m, "in_proj_qkvz"):  # Qwen3-Next: the heads of a key side by side, each as [q | k | v of its heads | z]
        per_key = m.num_v_heads // m.num_k_heads
        qkvz = m.in_proj_qkvz(hidden).unflatten(-1, (m.num_k_heads, -1))
        sizes = [m.head_k_dim, m.head_k_dim, per_key * m.head_v_dim, per_key * m.head_v_dim]
        q, k, v, gate = (part.flatten(2) for part in qkvz.split(sizes, -1))
        b, a = (part.flatten(2) for part in m.in_proj_ba(hidden).unflatten(-1, (m.num_k_heads, -1)).chunk(2, -1))
    elif hasattr(m, "in_proj_qkv"):  # Qwen3.5
        q, k, v = m.in_proj_qkv(hidden).split([m.key_dim, m.key_dim, m.value_dim], -1)
        gate, b, a = m.in_proj_z(hidden), m.in_proj_b(hidden), m.in_proj_a(hidden)
    else:  # OLMo hybrid
        q, k, v, gate = m.q_proj(hidden), m.k_proj(hidden), m.v_proj(hidden), m.g_proj(hidden)
        b, a = m.b_proj(hidden), m.a_proj(hidden)
    return q, k, v, gate, b, (-torch.exp(m.A_log) * F.softplus(a + m.dt_bias))[..., None]


def delta(
    m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, erase: Tensor, instead: Instead = ()
) -> tuple[Tensor, Tensor]:
    """A delta rule, target by target: the state from the start, matrix by matrix (Yang et al. 2024, eq. 10).

    Returns:
        What is read [batch, T, heads x width], and the module's output.
    """
    pad = 1.0 if padding is None else padding[..., None].to(hidden.dtype)
    q, k, v, gate, b, g = delta_projection(m, hidden * pad)
    batch, time, heads = main.shape[0], main.shape[1], main.shape[3]
    groups = getattr(m, "num_k_heads", heads)
    beta = torch.sigmoid(b) * (2 if getattr(m, "allow_neg_eigval", False) else 1)
    width, inner = v.shape[-1] // heads, torch.cat([q, k, v], -1)
    size = q.shape[-1] // groups
    y = hidden.new_zeros(batch, time, heads, width)
    for h in range(heads):
        cut = conv[..., h, None].expand(-1, -1, -1, inner.shape[-1])  # this head's own view of q, k and v
        u = F.silu(convolution(inner, m.conv1d.weight[:, 0], m.conv1d.bias, cut, of_taps(instead, h)))
        own = h * groups // heads * size
        q_h, k_h = (u[..., at : at + size] for at in (own, groups * size + own))
        q_h, k_h = (t / torch.sqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q_h, k_h))
        v_h = u[..., 2 * groups * size + h * width :][..., :width]
        for t in range(time):
            S = hidden.new_zeros(batch, size, width)
            for s in range(t + 1):
                S = torch.exp(g[:, s, h].to(S.dtype).expand(-1, size))[..., None] * S
                erased = beta[:, s, h].masked_fill(erase[:, t, s, h], 0)[:, None, None]
                S = S - erased * k_h[:, s, :, None] * (k_h[:, s, :, None] * S).sum(1, keepdim=True)
                written = beta[:, s, h].masked_fill(main[:, t, s, h], 0)[:, None, None]
                S = S + written * k_h[:, s, :, None] * v_h[:, s, None, :]
                for entries, _, values, _ in instead:
                    written = (beta[:, s, h] * entries[:, t, s, h])[:, None, None]
                    S = S + written * k_h[:, s, :, None] * values[:, s, h, None, :]
            y[:, t, h] = (S * q_h[:, t, :, None]).sum(1) / size**0.5
    norm, out = (m.o_norm, m.o_proj) if hasattr(m, "o_norm") else (m.norm, m.out_proj)
    return y.flatten(2), out(norm(y, gate.view_as(y)).flatten(2))


SCANS = {"mamba1": mamba1_scan, "mamba2": mamba2_scan}
MIXERS = {"mamba1": mamba1, "mamba2": mamba2}
_blocked: dict[int, Tensor] = {}
_instead: dict[int, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
"""For every attention layer: entries, and the values and keys [batch, T, groups, width] that are read there."""


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float = 0.0,
               **_: Any) -> tuple[Tensor, None]:  # fmt: skip
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scaling = scaling or query.shape[-1] ** -0.5
    scores = query @ key.transpose(2, 3) * scaling
    others = [
        (
            entries.permute(0, 3, 1, 2),
            *(t if t is None else t.repeat_interleave(repeats, 2).transpose(1, 2) for t in t2),
        )
        for entries, *t2 in _instead.get(module.layer_idx, [])
    ]
    for entries, _, other in others:
        scores = scores if other is None else torch.where(entries, query @ other.transpose(2, 3) * scaling, scores)
    if attention_mask is not None:
        scores = scores + attention_mask
    if module.layer_idx in _blocked:
        scores = scores.masked_fill(_blocked[module.layer_idx].permute(0, 3, 1, 2), -torch.inf)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    # A target whose every allowed source is blocked has nothing to read: zeros.
    weights = weights.nan_to_num(0.0)
    lost = (scores < torch.finfo(scores.dtype).min / 4).all(-1, keepdim=True)
    weights = weights.masked_fill(lost & torch.isinf(scores).any(-1, keepdim=True), 0.0)
    read = weights @ value
    for entries, other, _ in others:
        read = read + (weights * entries) @ other - (weights * entries) @ value
    return read.transpose(1, 2), None


AttentionInterface.register("explicit", _attention)
AttentionMaskInterface.register("explicit", eager_mask)


@contextmanager
def explicit_model(
    model: Any, name: str, main: dict[int, Tensor], conv: dict[int, Tensor], instead: dict[int, Any] | None = None
) -> Iterator[None]:
    """While the block runs, every mixer of the model computes the explicit form with the entries blocked.

    `instead` has what is read in their place, by layer: an `Instead`, or in attention what `_instead` says.
    """
    instead = instead or {}
    if name not in MIXERS:
        before = model.config._attn_implementation
        model.config._attn_implementation = "explicit"
        _blocked.update(main)
        _instead.update(instead)
        try:
            yield
        finally:
            model.config._attn_implementation = before
            _blocked.clear()
            _instead.clear()
        return
    handles = []
    for layer, block in enumerate(model.backbone.layers):
        features = block.mixer.A_log.shape[0]

        def hook(m: Any, args: Any, kwargs: Any, out: Tensor, layer: int = layer, features: int = features) -> Tensor:
            hidden = args[0] if args else kwargs["hidden_states"]
            none = torch.zeros(*hidden.shape[:2], hidden.shape[1], features, dtype=torch.bool)
            taps = conv.get(layer, none)
            others = instead.get(layer, ())
            return MIXERS[name](m, hidden, kwargs.get("attention_mask"), main.get(layer, none), taps, others)

        handles.append(block.mixer.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def blocked_everywhere(
    model: Any,
    main: dict[tuple[int, str], Tensor],
    conv: dict[tuple[int, str], Tensor],
    erase: dict[tuple[int, str], Tensor] | None = None,
) -> Iterator[None]:
    """Entries blocked by layer and kind of mixer, in any model with eager attention.

    Scans compute the explicit form, and so does what has a twin in `TWINS` where anything is blocked. Attention runs
    the model's code, in which `softmax` sees -inf where it is blocked.
    """
    handles, undo = [], []
    for path, module in model.named_modules():
        place = re.match(r".*?\.(\d+)\.", path)
        if place is None:
            continue
        layer, A_log = int(place[1]), getattr(module, "A_log", None)
        if type(module).__name__ in TWINS:
            handles.append(_twin(module, layer, main, conv, erase or {}))
        elif A_log is not None and path.rpartition(".")[2] != "forget_gate":
            handles.append(_explicit_scan(module, layer, ("mamba1", "mamba2")[A_log.ndim == 1], main, conv))
        elif (layer, "attention") in main and hasattr(type(module), "forward") and _is_attention(module):
            undo.append(_softmax_blocked(module, main[layer, "attention"]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for restore in undo:
            restore()


def _is_attention(module: Any) -> bool:
    return (
        type(module).__name__.endswith("Attention")
        and "attention_mask" in inspect.signature(type(module).forward).parameters
    )


def _explicit_scan(module: Any, layer: int, kind: str, main: dict, conv: dict) -> Any:
    def hook(m: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        none = torch.zeros(*hidden.shape[:2], hidden.shape[1], m.A_log.shape[0], dtype=torch.bool)
        return MIXERS[kind](m, hidden, None, main.get((layer, kind), none), conv.get((layer, kind), none))

    return module.register_forward_hook(hook, with_kwargs=True)


def _twin(module: Any, layer: int, *blocked: dict[tuple[int, str], Tensor]) -> Any:
    def of_layer(entries: dict[tuple[int, str], Tensor]) -> Tensor | None:
        return next((mask for (number, kind), mask in entries.items() if number == layer and kind != "attention"), None)

    masks, twin = [of_layer(entries) for entries in blocked], TWINS[type(module).__name__]

    def hook(m: Any, args: Any, kwargs: Any, out: Any) -> Any:
        known = next((mask for mask in masks if mask is not None), None)
        if known is None:
            return out
        hidden = args[0] if args else next(kwargs[name] for name in ("hidden_states", "input_states") if name in kwargs)
        padding = kwargs.get("attention_mask")
        padding = padding if padding is not None and padding.ndim == 2 else None
        begins = {}
        if "begins" in inspect.signature(twin).parameters:
            begins["begins"] = (kwargs["position_ids"] == 0).expand(hidden.shape[:2])
        given = [torch.zeros_like(known) if mask is None else mask for mask in masks]
        ours = twin(m, hidden, padding, *given, **begins)[1]
        return (ours, *out[1:]) if isinstance(out, tuple) else ours

    return module.register_forward_hook(hook, with_kwargs=True)


def _softmax_blocked(module: Any, blocked: Tensor) -> Any:
    forward = module.forward
    softmax = F.softmax

    def ours(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entries = blocked.permute(0, 3, 1, 2)  # [B, H, T, S]
        entries = F.pad(entries, (0, scores.shape[-1] - entries.shape[-1]))  # a sink is another column
        scores = scores.masked_fill(scores < -1e30, -torch.inf).masked_fill(entries, -torch.inf)
        return softmax(scores, *args, **kwargs).nan_to_num(0.0)

    def run(*args: Any, **kwargs: Any) -> Any:
        F.softmax = ours
        try:
            return forward(*args, **kwargs)
        finally:
            F.softmax = softmax

    module.forward = run
    return lambda: module.__dict__.pop("forward")


def _tokens(hidden: Tensor, padding: Tensor | None) -> Tensor:
    """1 for tokens, 0 for padding [batch, T, 1]."""
    return hidden.new_ones(*hidden.shape[:2], 1) if padding is None else padding[..., None].to(hidden.dtype)


def shortconv(
    m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, erase: Tensor, instead: Instead = ()
) -> tuple[Tensor, Tensor]:
    """LFM2's gated short convolution: y = C * conv(B * x) (LFM2 technical report); its bias is no position's."""
    B, C, x = m.in_proj(hidden * _tokens(hidden, padding)).chunk(3, -1)
    y = convolution(B * x, m.conv.weight[:, 0], None, conv, of_taps(instead))
    return y, m.out_proj(C * (y if m.conv.bias is None else y + m.conv.bias))


def lightning(
    m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, erase: Tensor, instead: Instead = ()
) -> tuple[Tensor, Tensor]:
    """MiniMax's lightning attention (arXiv:2501.08313, section 2.2), head by head, every target from the beginning."""
    qkv = m.act_fn(m.qkv_proj(hidden)) * _tokens(hidden, padding)
    width, heads = m.head_dim, []
    for h in range(m.num_attention_heads):
        q, k, v = qkv[..., 3 * h * width : 3 * (h + 1) * width].chunk(3, -1)
        decay = torch.exp(-m.slope_rate[h, 0, 0])
        y = torch.zeros_like(v)
        for t in range(hidden.shape[1]):
            S = hidden.new_zeros(len(hidden), width, width)
            for s in range(t + 1):
                S = decay * S + (k[:, s, :, None] * v[:, s, None]).masked_fill(main[:, t, s, h, None, None], 0.0)
                for entries, _, values, _ in instead:
                    S = S + k[:, s, :, None] * values[:, s, h, None] * entries[:, t, s, h, None, None]
            y[:, t] = (S * q[:, t, :, None]).sum(1)
        heads.append(y)
    y = torch.cat(heads, -1)
    normed = m.norm.weight * y * torch.rsqrt(y.square().mean(-1, keepdim=True) + m.norm.variance_epsilon)
    return y, m.out_proj(torch.sigmoid(m.output_gate(hidden)) * normed)


def rglru(
    m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, erase: Tensor,
    begins: Tensor | None = None, instead: Instead = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Griffin's recurrent block (arXiv:2402.19427, eq. 1 to 4), every target from the beginning; padding is heeded nowhere.

    Documents begin where `begins` is 1 [batch, T], by default in the first column: the state is empty there, and the
    input not normalised.
    """
    lru, (batch, time) = m.rg_lru, hidden.shape[:2]
    u = convolution(m.linear_x(hidden), m.conv_1d.weight[:, 0], m.conv_1d.bias, conv, of_taps(instead))
    width = lru.input_gate_weight.shape[1]

    def gate(weight: Tensor, bias: Tensor) -> Tensor:
        blocks = [u[..., n * width : (n + 1) * width] @ weight[n] + bias[n] for n in range(len(weight))]
        return torch.sigmoid(torch.cat(blocks, -1))

    if begins is None:
        begins = (torch.arange(time) == 0).expand(batch, time)
    first = begins[..., None]
    # The parameter is -Lambda of the paper, in which a = sigmoid(Lambda) and a_t = a^(8 r_t).
    a = torch.sigmoid(-lru.recurrent_param) ** (8 * gate(lru.recurrent_gate_weight, lru.recurrent_gate_bias))
    x = gate(lru.input_gate_weight, lru.input_gate_bias) * u * torch.where(first, 1.0, torch.sqrt(1 - a**2))
    y = torch.zeros_like(u)
    for t in range(time):
        h = torch.zeros_like(u[:, 0])
        for s in range(t + 1):
            h = torch.where(first[:, s], 0.0, a[:, s] * h) + x[:, s].masked_fill(main[:, t, s], 0.0)
            for entries, _, values, _ in instead:
                h = h + values[:, s, :, 0] * entries[:, t, s]
        y[:, t] = h
    return y, m.linear_out(y * m.act_fn(m.linear_y(hidden)))


def zamba(
    m: Any, hidden: Tensor, padding: Tensor | None, main: Tensor, conv: Tensor, erase: Tensor, instead: Instead = ()
) -> tuple[Tensor, Tensor]:
    """Zamba's heads, each a Mamba-1 (arXiv:2312.00752, algorithm 2) of its own, every target from the beginning."""
    tokens = _tokens(hidden, padding)
    projected = m.in_proj(hidden * tokens)
    inner, gate = projected[..., 0::2], projected[..., 1::2]
    u = F.silu(convolution(inner, m.conv1d.weight[:, 0], m.conv1d.bias, conv, of_taps(instead))) * tokens
    width, heads = m.mamba_head_dim, []
    for n in range(m.n_mamba_heads):
        own = slice(n * width, (n + 1) * width)
        x = u[..., own]
        sizes = [m.time_step_rank, m.ssm_state_size, m.ssm_state_size]
        dt, B, C = (x @ m.x_proj_weight[n].T).split(sizes, -1)
        dt = F.softplus(dt @ m.dt_proj_weight[n].T + m.dt_proj_bias[n])
        A, y = -torch.exp(m.A_log[n]), torch.zeros_like(x)
        for t in range(hidden.shape[1]):
            h = hidden.new_zeros(len(hidden), width, m.ssm_state_size)
            for s in range(t + 1):
                written = (dt[:, s] * x[:, s])[..., None] * B[:, s, None]
                h = torch.exp(dt[:, s, :, None] * A) * h + written.masked_fill(main[:, t, s, own, None], 0.0)
                for entries, _, values, _ in instead:
                    replaced = (dt[:, s] * values[:, s, own, 0])[..., None] * B[:, s, None]
                    h = h + replaced * entries[:, t, s, own, None]
            y[:, t] = (h * C[:, t, None]).sum(-1) + m.D[n] * x[:, t]
        heads.append(y)
    y = torch.cat(heads, -1)
    return y, m.out_proj(y * F.silu(gate))


TWINS: dict[str, Callable] = {
    "Qwen3NextGatedDeltaNet": delta,
    "Qwen3_5GatedDeltaNet": delta,
    "Qwen3_5MoeGatedDeltaNet": delta,
    "Qwen4ExpTextGatedDeltaNet": delta,
    "OlmoHybridGatedDeltaNet": delta,
    "KimiLinearDeltaAttention": delta,
    "BailingHybridDeltaAttention": delta,
    "Glm5NextTextLinearAttention": delta,
    "Lfm2ShortConv": shortconv,
    "Lfm2MoeShortConv": shortconv,
    "Lfm3ShortConv": shortconv,
    "MiniMaxLightningAttention": lightning,
    "RecurrentGemmaRecurrentBlock": rglru,
    "ZambaMambaMixer": zamba,
}
"""Twins by class of module. A twin takes the module, hidden states, padding, and what is blocked on the paths 'main',
'conv' and 'erase' [batch, target, source, feature]; it gives what is read, before gate and norm, with the skip
[batch, T, features x width], and the mixer's output."""
