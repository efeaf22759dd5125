"""The arithmetic of state-space token mixers, as pure functions: tensors in, tensors out.

Letters are the papers': Gu & Dao 2023 (arXiv:2312.00752, eq. 2) for Mamba-1, Dao & Gu 2024 (arXiv:2405.21060, eq. 1
and listing 1) for Mamba-2, Ali et al. 2024 (arXiv:2403.01590, eq. 12) for the scan read as attention. Per feature:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t        (the skip D x_t is added by the caller)
    alpha[t, s] = C_t . exp(A sum_{k=s+1..t} dt_k) dt_s B_s                y_t = sum_{s<=t} alpha[t, s] x_s

A knockout needs no T x T matrix: the output of a target whose sources S are cut is `C_t . h_t` of the same recurrence
with `x_s = 0` for s in S, because the recurrence is linear in x. Callers mask x and scan once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

CHUNK = 64
"""Positions of an SSD scan handled as one small attention matrix."""


def selective_scan(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch feature state"]]:
    """Mamba-1's scan (S6) without the skip.

    Returns:
        y, and the state after the last position.
    """
    A = A.T.contiguous()  # [N, D]: channels innermost keep the vector units busy
    h = x.new_zeros(x.shape[0], *A.shape)  # [B, N, D]
    outputs = []
    # `unbind`, not indexing: the backward of an index allocates a zero tensor of the full size at every step.
    for dt_t, dtx_t, B_t, C_t in zip(dt.unbind(1), (dt * x).unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.exp(dt_t[:, None] * A) * h + dtx_t[:, None] * B_t[..., None]
        outputs.append((h * C_t[..., None]).sum(1))  # [B, D]
    return torch.stack(outputs, 1), h.transpose(1, 2)


def ssd_scan(
    x: Float[Tensor, "batch time feature width"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    C: Float[Tensor, "batch time group state"],
) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, "batch feature width state"]]:
    """Mamba-2's scan (SSD) without the skip: chunks of attention, a recurrence between them.

    Returns:
        y, and the state after the last position.
    """
    batch, _, features, width = x.shape
    per_group = features // B.shape[2]
    h = x.new_zeros(batch, features, width, B.shape[3])  # [B, H, P, N]
    outputs = []
    for x_c, dt_c, B_c, C_c in zip(*(t.split(CHUNK, 1) for t in (x, dt, B, C)), strict=True):
        B_c, C_c = (t.repeat_interleave(per_group, 2).transpose(1, 2) for t in (B_c, C_c))  # [B, H, L, N]
        decay = _decay_between((dt_c * A).transpose(1, 2))  # [B, H, L, L]
        since_start = torch.exp((dt_c * A).cumsum(1)).transpose(1, 2)  # [B, H, L]
        dtx = (dt_c[..., None] * x_c).transpose(1, 2)  # [B, H, L, P]
        inside = (C_c @ B_c.transpose(2, 3) * decay) @ dtx  # [B, H, L, P]
        carried = since_start[..., None] * (C_c @ h.transpose(2, 3))  # [B, H, L, P]
        outputs.append((inside + carried).transpose(1, 2))
        to_end = decay[:, :, -1, :, None] * B_c  # [B, H, L, N]
        h = since_start[:, :, -1, None, None] * h + dtx.transpose(2, 3) @ to_end
    return torch.cat(outputs, 1), h


def selective_attention(
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
) -> Float[Tensor, "batch feature time time"]:
    """Effective attention alpha[t, s] of Mamba-1, one state index at a time: O(features T^2) memory."""
    steps = dt.transpose(1, 2)  # [B, D, T]
    alpha = steps.new_zeros(*steps.shape, steps.shape[-1])
    for n in range(A.shape[1]):
        scores = C[:, :, n, None] * B[:, None, :, n]  # [B, T, T]
        alpha = alpha + scores[:, None] * _decay_between(steps * A[:, n, None])
    return alpha * steps[:, :, None, :]


def ssd_attention(
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    C: Float[Tensor, "batch time group state"],
) -> Float[Tensor, "batch feature time time"]:
    """Effective attention alpha[t, s] of Mamba-2."""
    steps = dt.transpose(1, 2)  # [B, H, T]
    scores = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)  # [B, G, T, T]
    scores = scores.repeat_interleave(steps.shape[1] // scores.shape[1], 1)
    return scores * _decay_between(steps * A[:, None]) * steps[:, :, None, :]


def causal_conv(
    inner: Float[Tensor, "batch time channel"],
    weight: Float[Tensor, "channel kernel"],
    bias: Float[Tensor, " channel"] | None,
    keep: list[Tensor] | None = None,
) -> Float[Tensor, "batch time channel"]:
    """Depthwise causal convolution `sum_k weight[:, -1-k] inner[t-k] + bias`, some of its taps cut.

    Args:
        keep: for every distance k from target to source, 1 where the tap from t-k to t stays and 0 where it is cut;
            each broadcasts to [batch, time, channel].
    """
    kernel, time = weight.shape[1], inner.shape[1]
    if keep is None:
        padded = F.pad(inner.transpose(1, 2), (kernel - 1, 0))
        return F.conv1d(padded, weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    out = inner.new_zeros(inner.shape) if bias is None else bias.expand_as(inner)
    for k in range(min(kernel, time)):
        shifted = F.pad(inner[:, : time - k], (0, 0, k, 0))  # inner[t-k] at t
        out = out + weight[:, kernel - 1 - k] * shifted * keep[k]
    return out


def _decay_between(log_decay: Float[Tensor, "... time"]) -> Float[Tensor, "... time time"]:
    """exp(sum of log_decay over s+1..t) at [t, s], zero above the diagonal."""
    # The sum is a difference of running sums; in float64, so that long prompts lose no digits to it.
    running = log_decay.double().cumsum(-1)
    later = torch.ones(2 * log_decay.shape[-1:], dtype=torch.bool, device=log_decay.device).triu(1)
    difference = (running[..., None] - running[..., None, :]).masked_fill(later, -torch.inf)
    return torch.exp(difference.to(log_decay.dtype))
