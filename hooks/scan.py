"""The arithmetic of state-space token mixers, as pure functions: tensors in, tensors out.

Letters are the papers': Gu & Dao 2023 (arXiv:2312.00752, eq. 2) for Mamba-1, Dao & Gu 2024 (arXiv:2405.21060, eq. 1
and listing 1) for Mamba-2, Ali et al. 2024 (arXiv:2403.01590, eq. 12) for the scan read as attention. Per feature:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t        (the skip D x_t is added by the caller)
    alpha[t, s] = C_t . exp(A sum_{k=s+1..t} dt_k) dt_s B_s                y_t = sum_{s<=t} alpha[t, s] x_s

A knockout needs no T x T matrix: the output of a target whose sources S are cut is `C_t . h_t` of the same recurrence
with `x_s = 0` for s in S, because the recurrence is linear in x. Callers mask x and scan once more.

Mamba-1's elementwise work is done in tiles that stay in the processor's cache, channels innermost, with `exp2`, which
vectorizes better than `exp`: it is what a scan costs. States of Mamba-1 are [state, feature] in here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mambalens.hooks import fused

CHUNK = 64
"""Positions of an SSD scan handled as one small attention matrix."""
TILE = {"cpu": 2**18}
"""Numbers of a tile of positions x state x features; by device, 2**26 elsewhere."""


def selective_scan(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    start: Float[Tensor, "#batch state feature"] | None = None,
) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch state feature"]]:
    """Mamba-1's scan (S6) without the skip.

    Args:
        x, dt, A, B, C: as in the recurrence above.
        start: state before the first position; zero by default.

    Returns:
        y, and the state after the last position.
    """
    batch, time, _ = x.shape
    rate = _rate(A)
    width, chunk = _tiles(rate, batch, time)
    begin = x.new_zeros(1, *rate.shape) if start is None else start
    in_place = not torch.is_grad_enabled()
    decays, writes = (_Scratch(x) if in_place else None for _ in range(2))
    rows, states = [], []
    for at in _slices(batch, width):
        h = begin[at if len(begin) > 1 else slice(None)].expand(len(x[at]), -1, -1)
        outputs = []
        for now in _slices(time, chunk):
            size = (*x[at, now].shape[:2], *rate.shape)
            decay = torch.mul(dt[at, now, None], rate, out=decays.of(*size) if decays else None).exp2_()  # [b, L, N, D]
            dtx = dt[at, now] * x[at, now]
            write = torch.mul(dtx[:, :, None], B[at, now, :, None], out=writes.of(*size) if writes else None)
            # `unbind`, not indexing: the backward of an index allocates a zero tensor of the full size at every step.
            steps = []
            for decay_t, write_t in zip(decay.unbind(1), write.unbind(1), strict=True):
                h = torch.addcmul(write_t, decay_t, h, out=write_t if in_place else None)
                steps.append(h)
            history = write if in_place else torch.stack(steps, 1)  # h_t, in the place of the writes
            outputs.append((C[at, now, None] @ history)[:, :, 0])
            h = h.clone() if in_place else h  # the next tile writes where it lies
        rows.append(torch.cat(outputs, 1))
        states.append(h)
    return torch.cat(rows), torch.cat(states)


def selective_states(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    keep: Bool[Tensor, "sets batch time"],
) -> Float[Tensor, "sets batch state feature"]:
    """Mamba-1's state after the last position from the inputs that are kept, for several choices of these at once.

    The state is a sum over positions, `sum_s keep_s exp(A sum_{k>s} dt_k) dt_s B_s x_s`: what each position leaves is
    computed once, and one matrix product adds it up for all choices.
    """
    batch, time, _ = x.shape
    rate = _rate(A)
    width, chunk = _tiles(rate, batch, time)
    later = _sum_of_later(dt)  # [B, T, D]
    weights = keep.to(x.dtype).transpose(0, 1)  # [B, sets, T]
    total, scratch = x.new_zeros(batch, len(keep), rate.numel()), _Scratch(x)
    for at in _slices(batch, width):
        for now in _slices(time, chunk):
            part = later[at, now, None]
            left = torch.mul(part, rate, out=scratch.of(*part.shape[:2], *rate.shape))  # [b, L, N, D]
            left.exp2_().mul_((dt[at, now] * x[at, now])[:, :, None]).mul_(B[at, now, :, None])
            total[at].baddbmm_(weights[at, :, now], left.flatten(2))
    return total.unflatten(-1, rate.shape).transpose(0, 1)


def selective_step(
    x: Float[Tensor, "batch rows feature"],
    dt: Float[Tensor, "batch rows feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch rows state"],
    C: Float[Tensor, "batch rows state"],
    start: Float[Tensor, "batch state feature"],
) -> Float[Tensor, "batch rows feature"]:
    """One position of Mamba-1's scan for many rows that resume from the same states."""
    batch, rows, _ = x.shape
    rate = _rate(A)
    own = (B * C).sum(-1, keepdim=True) * dt * x
    carried = fused.step(dt, rate, C, start)
    if carried is None:
        width, chunk = _tiles(rate, batch, rows)
        carried, scratch = torch.empty_like(x), _Scratch(x)
        for at in _slices(batch, width):
            for some in _slices(rows, chunk):
                part = dt[at, some]
                room = scratch.of(*part.shape[:2], *rate.shape)
                carried[at, some] = fused.step_in_torch(part, rate, C[at, some], start[at], room)
    return own.add_(carried)


def ssd_scan(
    x: Float[Tensor, "batch time feature width"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    C: Float[Tensor, "batch time group state"],
    start: Float[Tensor, "#batch feature state width"] | None = None,
) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, "batch feature state width"]]:
    """Mamba-2's scan (SSD) without the skip: chunks of attention, a recurrence between them.

    Args:
        x, dt, A, B, C: as in the recurrence above.
        start: state before the first position; zero by default.

    Returns:
        y, and the state after the last position.
    """
    batch, _, features, width = x.shape
    per_group = features // B.shape[2]
    h = x.new_zeros(batch, features, B.shape[3], width) if start is None else start  # [B, H, N, P]
    outputs = []
    for x_c, dt_c, B_c, C_c in zip(*(t.split(CHUNK, 1) for t in (x, dt, B, C)), strict=True):
        B_c, C_c = (t.repeat_interleave(per_group, 2).transpose(1, 2) for t in (B_c, C_c))  # [B, H, L, N]
        decay = _decay_between((dt_c * A).transpose(1, 2))  # [B, H, L, L]
        since_start = torch.exp((dt_c * A).cumsum(1)).transpose(1, 2)  # [B, H, L]
        dtx = (dt_c[..., None] * x_c).transpose(1, 2)  # [B, H, L, P]
        inside = (C_c @ B_c.transpose(2, 3) * decay) @ dtx  # [B, H, L, P]
        carried = since_start[..., None] * (C_c @ h)  # [B, H, L, P]
        outputs.append((inside + carried).transpose(1, 2))
        to_end = decay[:, :, -1, :, None] * B_c  # [B, H, L, N]
        h = since_start[:, :, -1, None, None] * h + to_end.transpose(2, 3) @ dtx
    return torch.cat(outputs, 1), h


def ssd_states(
    x: Float[Tensor, "batch time feature width"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    keep: Bool[Tensor, "sets batch time"],
) -> Float[Tensor, "sets batch feature state width"]:
    """Mamba-2's state after the last position from the inputs that are kept, see `selective_states`."""
    features = x.shape[2]
    left = torch.exp(_sum_of_later(dt) * A) * dt  # [B, T, H]
    left = (left[..., None] * x).unflatten(2, (B.shape[2], -1)).permute(0, 2, 1, 3, 4)  # [B, G, T, H / G, P]
    writes = B.permute(0, 2, 3, 1) * keep.to(x.dtype)[:, :, None, None]  # [sets, B, G, N, T]
    states = writes @ left.flatten(3)  # [sets, B, G, N, (H / G) P]
    return states.unflatten(-1, (features // B.shape[2], -1)).transpose(3, 4).flatten(2, 3)


def ssd_step(
    x: Float[Tensor, "batch rows feature width"],
    dt: Float[Tensor, "batch rows feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch rows group state"],
    C: Float[Tensor, "batch rows group state"],
    start: Float[Tensor, "batch feature state width"],
) -> Float[Tensor, "batch rows feature width"]:
    """One position of Mamba-2's scan for many rows that resume from the same states."""
    groups = C.shape[2]
    states = start.unflatten(1, (groups, -1))  # [B, G, H / G, N, P]
    carried = C.transpose(1, 2)[:, :, None] @ states  # [B, G, H / G, R, P]
    carried = carried.flatten(1, 2).transpose(1, 2) * torch.exp(dt * A)[..., None]
    own = (B * C).sum(-1).repeat_interleave(x.shape[2] // groups, 2) * dt  # [B, R, H]
    return carried.addcmul_(own[..., None], x)


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
    inner: Float[Tensor, "*batch time channel"],
    weight: Float[Tensor, "channel kernel"],
    bias: Float[Tensor, " channel"] | None,
    keep: list[Tensor] | None = None,
    past: Float[Tensor, "*#batch before channel"] | None = None,
) -> Float[Tensor, "*batch time channel"]:
    """Depthwise causal convolution `sum_k weight[:, -1-k] inner[t-k] + bias`, some of its taps cut.

    Args:
        inner: input.
        weight: taps, the nearest last.
        bias: added to every output.
        keep: for every distance k from target to source, 1 where the tap from t-k to t stays and 0 where it is cut;
            each broadcasts to the output.
        past: inputs before the first, `kernel - 1` of them; zero by default.
    """
    kernel, time = weight.shape[1], inner.shape[-2]
    out = inner.new_zeros(inner.shape) if bias is None else bias.expand_as(inner).clone()
    for k in range(kernel):
        tap = weight[:, kernel - 1 - k]
        seen = None if keep is None else keep[k].expand(*inner.shape[:-1], keep[k].shape[-1])
        if k < time:
            source = inner[..., : time - k, :]
            out[..., k:, :].addcmul_(source if seen is None else source * seen[..., k:, :], tap)
        if k and past is not None:
            first = past[..., kernel - 1 - k :, :][..., :time, :]  # past[t-k] at t < k
            reached = first.shape[-2]
            if seen is not None:
                first = first * seen[..., :reached, :]
            out[..., :reached, :] += first * tap
    return out


def _rate(A: Float[Tensor, "feature state"]) -> Float[Tensor, "state feature"]:
    """A in powers of two, channels innermost."""
    return (A * math.log2(math.e)).T.contiguous()


def _tiles(rate: Tensor, batch: int, time: int) -> tuple[int, int]:
    """How many prompts and positions make a tile."""
    fitting = max(1, TILE.get(rate.device.type, 2**26) // rate.numel())
    chunk = min(time, fitting)
    return max(1, min(batch, fitting // max(chunk, 1))), max(chunk, 1)


def _slices(length: int, size: int) -> list[slice]:
    """Parts of at most a size, as even as can be."""
    size = -(-length // max(1, -(-length // size)))
    return [slice(begin, begin + size) for begin in range(0, length, max(1, size))]


class _Scratch:
    """Memory for the tiles of one call: a fresh allocation for each would cost more than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.room = like, like.new_empty(0)

    def of(self, *shape: int) -> Tensor:
        """The room in some shape."""
        size = math.prod(shape)
        if self.room.numel() < size:
            self.room = self.like.new_empty(size)
        return self.room[:size].view(shape)


def _sum_of_later(dt: Float[Tensor, "batch time feature"]) -> Float[Tensor, "batch time feature"]:
    """Sum of dt over s+1.. at s, added up from the end: what is small, and counts, loses no digits."""
    shifted = F.pad(dt[:, 1:], (0, 0, 0, 1))
    return shifted.flip(1).cumsum(1).flip(1)


def _decay_between(log_decay: Float[Tensor, "... time"]) -> Float[Tensor, "... time time"]:
    """exp(sum of log_decay over s+1..t) at [t, s], zero above the diagonal."""
    # The sum is a difference of running sums; in float64, so that long prompts lose no digits to it.
    running = log_decay.double().cumsum(-1)
    later = torch.ones(2 * log_decay.shape[-1:], dtype=torch.bool, device=log_decay.device).triu(1)
    difference = (running[..., None] - running[..., None, :]).masked_fill(later, -torch.inf)
    return torch.exp(difference.to(log_decay.dtype))
