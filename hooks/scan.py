"""The arithmetic of state-space token mixers, as pure functions: tensors in, tensors out.

Letters are the papers': Gu & Dao 2023 (arXiv:2312.00752, eq. 2) for Mamba-1, Dao & Gu 2024 (arXiv:2405.21060, eq. 1
and listing 1) for Mamba-2, Ali et al. 2024 (arXiv:2403.01590, eq. 12) for the scan read as attention. Per feature:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t . h_t        (the skip D x_t is added by the caller)
    alpha[t, s] = C_t . exp(A sum_{k=s+1..t} dt_k) dt_s B_s                y_t = sum_{s<=t} alpha[t, s] x_s

A knockout needs no T x T matrix: the output of a target whose sources S are cut is `C_t . h_t` of the same recurrence
with `x_s = 0` for s in S, because the recurrence is linear in x. Callers mask x and scan once more.

Mamba-1's elementwise work is done in tiles of a few megabytes, channels innermost, with `exp2`, which
vectorizes better than `exp`: it is what a scan costs. States of Mamba-1 are [state, feature] in here.
"""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks import fused, native
from mambalens.hooks.indices import to_pick
from mambalens.hooks.linear_scan import LOOPS, linear_scan

CHUNK = 64
"""Positions of an SSD scan handled as one small attention matrix."""
TILE = {"cpu": 2**21}
"""Numbers of a tile, of positions x state x features say; by device, see `tile` for the others."""


def tile(device: torch.device) -> int:
    """Numbers that are worked on at a time on a device."""
    return TILE.get(device.type, 2**26)


def near(device: torch.device) -> int:
    """Numbers of a tile that stays in the processor's nearest memory while it is worked on several times."""
    return tile(device) // 8


def even(length: int, size: int) -> int:
    """The size of parts of at most `size` that are as even as can be."""
    return math.ceil(length / math.ceil(length / size))


def selective_scan(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    start: Float[Tensor, "#batch state feature"] | None = None,
) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch state feature"]]:
    """Mamba-1's scan (S6) without the skip.

    Equation: Recurrence
        h_t[n] = exp(dt_t A[n]) h_{t-1}[n] + dt_t B_t[n] x_t
        y_t = C_t . h_t

        Source: Gu & Dao 2023, arXiv:2312.00752, eq. 2, B discretized as dt_t B_t, as its code does

        Of one channel of Mamba-1: x, dt and A[n] are its own, B and C are shared by all channels.

    Args:
        x, dt, A, B, C: as in the recurrence above.
        start: state before the first position; zero by default.

    Returns:
        y, and the state after the last position.
    """
    batch, time, _ = x.shape
    rate, in_place = _rate(A), not torch.is_grad_enabled()
    if native.fits(x, dt, rate, B, C):
        return native.scan(x, dt, rate, B, C, start)
    if in_place and x.device.type in LOOPS and batch * time * rate.numel() > near(x.device):
        return _by_position(x, dt, rate, B, C, start)
    width, chunk = _tiles(rate, batch, time)
    decays, writes = (_Scratch(slot, x) if in_place else None for slot in range(2))
    rows, states = [], []
    for at in _slices(batch, width):
        h = start if start is None or len(start) == 1 else start[at]
        outputs = []
        for now in _slices(time, chunk):
            size = (*x[at, now].shape[:2], *rate.shape)
            decay = torch.mul(dt[at, now, None], rate, out=decays.of(*size) if decays else None).exp2_()  # [b, L, N, D]
            dtx = dt[at, now] * x[at, now]
            write = torch.mul(dtx[:, :, None], B[at, now, :, None], out=writes.of(*size) if writes else None)
            history = linear_scan(decay, write, h, in_place)
            outputs.append((C[at, now, None] @ history)[:, :, 0])
            h = history[:, -1].clone() if in_place else history[:, -1]  # the next tile writes where it lies
        rows.append(torch.cat(outputs, 1))
        assert h is not None
        states.append(h)
    return torch.cat(rows), torch.cat(states)


def _by_position(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    rate: Float[Tensor, "state feature"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    start: Float[Tensor, "#batch state feature"] | None,
) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch state feature"]]:
    """`selective_scan` position by position: states of a few prompts stay in the processor's nearest memory."""
    y, dtx, ends = torch.empty_like(x), dt * x, []
    scratch = _Scratch(0, x)
    for at in _slices(len(x), max(1, near(x.device) // rate.numel())):
        of_start = None if start is None else start if len(start) == 1 else start[at]
        h: Tensor | None = None
        for t in range(x.shape[1]):
            of_dt, of_dtx, of_B = dt[at, t, None], dtx[at, t, None], B[at, t, :, None]
            before = of_start if h is None else h
            if before is None:
                h = of_dtx * of_B  # [b, N, D]
            else:
                decay = torch.mul(of_dt, rate, out=scratch.of(len(of_dt), *rate.shape)).exp2_()
                h = torch.mul(decay, before, out=h).addcmul_(of_dtx, of_B)
            y[at, t] = (C[at, t, None] @ h)[:, 0]
        assert h is not None
        ends.append(h)
    return y, torch.cat(ends)


def selective_states(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    keep: Bool[Tensor, "sets batch time"],
) -> list[Float[Tensor, "batch state feature"]]:
    """Mamba-1's states after the last position from the inputs that are kept, for several choices of these at once.

    The state is a sum over positions, `sum_s keep_s exp(A sum_{k>s} dt_k) dt_s B_s x_s`: what each position leaves is
    computed once, and one matrix product adds it up for all choices.

    Equation: Knockout
        h^-S_t = sum_{s<=t, s not in S} exp(A sum_{k=s+1..t} dt_k) dt_s B_s x_s

        Source: Endy et al. 2025, arXiv:2505.24244, eq. 5

        T are the targets, S the sources, F the features. The state h^-S is that of the recurrence with x_s = 0 for the
        sources, which is why a knockout needs no T x T matrix; the skip stays.
    """
    batch, time, _ = x.shape
    rate = _rate(A)
    weights = keep.to(x.dtype).transpose(0, 1).contiguous()  # [B, sets, T]
    if native.fits(x, dt, rate, B):
        return list(native.scan_and_states(x, dt, rate, B, B, weights)[1].unbind(1))
    width, chunk = _tiles(rate, batch, time)
    later, dtx = sum_of_later(dt), dt * x  # [B, T, D]
    total, scratch = x.new_empty(batch, len(keep), rate.numel()), _Scratch(0, x)
    for at in _slices(batch, width):
        for now in _slices(time, chunk):
            part = later[at, now, None]
            left = torch.mul(part, rate, out=scratch.of(*part.shape[:2], *rate.shape))  # [b, L, N, D]
            left.exp2_().mul_(dtx[at, now, None]).mul_(B[at, now, :, None])
            if now.start == 0:
                torch.bmm(weights[at, :, now], left.flatten(2), out=total[at])
            else:
                total[at].baddbmm_(weights[at, :, now], left.flatten(2))
    return list(total.unflatten(-1, rate.shape).unbind(1))


def selective_scan_and_states(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    keep: Bool[Tensor, "sets batch time"],
) -> tuple[Float[Tensor, "batch time feature"], list[Float[Tensor, "batch state feature"]]] | None:
    """`selective_scan` and `selective_states` at once, where all is kept first; None where nothing does both."""
    rate = _rate(A)
    if not native.fits(x, dt, rate, B, C) or not keep[0].all():
        return None
    y, states = native.scan_and_states(x, dt, rate, B, C, keep.to(x.dtype).transpose(0, 1).contiguous())
    return y, list(states.unbind(1))


def selective_step(
    x: Float[Tensor, "batch rows feature"],
    dt: Float[Tensor, "batch rows feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch rows state"],
    C: Float[Tensor, "batch rows state"],
    states: list[Float[Tensor, "batch state feature"]],
    number: Int[Tensor, " rows"],
) -> Float[Tensor, "batch rows feature"]:
    """One position of Mamba-1's scan for many rows, each from one of its prompt's states.

    Args:
        x, dt, A, B, C: as in the recurrence above, `rows` for every prompt.
        states: states before the position, from `selective_states`.
        number: which of them each row resumes from; on the CPU.
    """
    batch = len(x)
    rate = _rate(A)
    if native.fits(x, dt, rate, B, C, *states):
        return native.step(x, dt, rate, B, C, states, number)
    y = own_entry(B[..., None, :], C[..., None, :], dt)
    y *= x
    scratch = _Scratch(0, x)
    for index in number.unique().tolist():
        rows = (number == index).nonzero().flatten()
        start = states[index]
        if fused.compiled():
            some = to_pick(rows, x.device)
            done = fused.step(dt[:, some], rate, C[:, some], start)
            if done is not None:
                y[:, some] += done
                continue
        width, chunk = _tiles(rate, batch, len(rows))
        for at in _slices(batch, width):
            for of_tile in rows.split(even(len(rows), chunk)):
                some = to_pick(of_tile, x.device)
                part = dt[at, some]
                room = scratch.of(*part.shape[:2], *rate.shape)
                y[at, some] += fused.step_in_torch(part, rate, C[at, some], start[at], room)
    return y


def ssd_scan(
    x: Float[Tensor, "batch time feature width"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    C: Float[Tensor, "batch time group state"],
    start: Float[Tensor, "#batch feature state width"] | None = None,
    end: bool = True,
) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, "batch feature state width"] | None]:
    """Mamba-2's scan (SSD) without the skip: chunks of attention, a recurrence between them.

    Equation: Recurrence
        h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T
        y_t = h_t^T C_t

        Source: Dao & Gu 2024, arXiv:2405.21060, eq. 1; listing 1 for the chunks

        Of one head of Mamba-2: A is one number, x_t and y_t are as wide as the head, h_t is a matrix, state x width; B
        and C are shared by the heads of a group.

    Args:
        x, dt, A, B, C: as in the recurrence above.
        start: state before the first position; zero by default.
        end: whether the state after the last position is wanted.

    Returns:
        y, and the state after the last position or None.
    """
    batch, time, heads, _ = x.shape
    length = even(time, CHUNK)
    at_once = max(1, tile(x.device) // 4 // (batch * heads * length * length))  # chunks
    h = start  # [B, H, N, P]
    outputs: list[Tensor] = []
    for x_c, dt_c, B_c, C_c in zip(*(t.split(at_once * length, 1) for t in (x, dt, B, C)), strict=True):
        last = len(outputs) + 1 == -(-time // (at_once * length))
        y, h = _ssd_chunks(x_c, dt_c, A, B_c, C_c, h, min(length, x_c.shape[1]), end or not last)
        outputs.append(y)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], h if end else None


def _ssd_chunks(
    x: Float[Tensor, "batch time feature width"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    C: Float[Tensor, "batch time group state"],
    start: Float[Tensor, "#batch feature state width"] | None,
    length: int,
    end: bool,
) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, "#batch feature state width"] | None]:
    """`ssd_scan` in chunks of a length that are worked on together."""
    time = x.shape[1]
    chunks = -(-time // length)
    if time % length:  # steps of 0 neither decay nor write
        missing = chunks * length - time
        x, dt, B, C = (torch.cat([t, t.new_zeros(len(t), missing, *t.shape[2:])], 1) for t in (x, dt, B, C))
    x, dt, B, C = (t.unflatten(1, (chunks, length)) for t in (x, dt, B, C))
    per_group = x.shape[3] // B.shape[3]
    B, C = (rearrange(t, "batch chunk time group state -> batch chunk group time state") for t in (B, C))
    scores = repeat(C @ B.mT, "batch chunk group t s -> batch chunk (group head) t s", head=per_group)
    decay = _decay_between(rearrange(dt * A, "batch chunk time feature -> batch chunk feature time"))  # [B, J, H, L, L]
    dtx = rearrange(dt[..., None] * x, "batch chunk time feature width -> batch chunk feature time width")
    y = (scores * decay) @ dtx  # [B, J, H, L, P]
    if start is not None or chunks > 1 or end:
        by_head = "batch chunk group time state -> batch chunk (group head) time state"
        since_start = rearrange(torch.exp((dt * A).cumsum(2)), "batch chunk time feature -> batch chunk feature time 1")
        written = (decay[:, :, :, -1, :, None] * repeat(B, by_head, head=per_group)).mT @ dtx  # [B, J, H, N, P]
        states = linear_scan(since_start[:, :, :, -1:], written, start, not torch.is_grad_enabled())
        if start is not None or chunks > 1:
            first = torch.zeros_like(states[:, :1]) if start is None else start[:, None].expand_as(states[:, :1])
            before = torch.cat([first, states[:, :-1]], 1)
            y = torch.addcmul(y, since_start, repeat(C, by_head, head=per_group) @ before)
        start = states[:, -1]
    y = rearrange(y, "batch chunk feature time width -> batch (chunk time) feature width")
    return y[:, :time], start


def selective_attention(
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
) -> Float[Tensor, "batch feature time time"]:
    """Effective attention alpha[t, s] of Mamba-1, one state index at a time: O(features T^2) memory.

    Equation: Effective attention
        alpha[t, s] = sum_n C_t[n] exp(A[n] sum_{k=s+1..t} dt_k) dt_s B_s[n]    for s <= t, else 0
        y_t = sum_{s<=t} alpha[t, s] x_s

        Source: Ali et al. 2024, arXiv:2403.01590, eq. 12

        Of one channel of Mamba-1.
    """
    steps = dt.transpose(1, 2)  # [B, D, T]
    # Sums of step sizes as differences of running sums; in float64, so that long prompts lose no digits to it.
    running = steps.double().cumsum(-1)
    between = (running[..., None] - running[..., None, :]).to(steps.dtype).clamp_min_(0)  # [B, D, T, T], over s+1..t
    rate = _rate(A)  # [N, D]
    alpha, decay = torch.zeros_like(between), torch.empty_like(between)
    for n in range(A.shape[1]):
        scores = C[:, :, n, None] * B[:, None, :, n]  # [B, T, T]
        torch.mul(between, rate[n, :, None, None], out=decay).exp2_()
        alpha.addcmul_(scores[:, None], decay)
    return alpha.tril_().mul_(steps[:, :, None, :])


def selective_effects(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, "feature state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    gradient: Float[Tensor, "batch time feature"],
) -> Float[Tensor, "batch time time"]:
    """What every position s hands to every t > s over Mamba-1's scan, times a gradient at t, of all features together.

        sum_f gradient_t[f] alpha[t, s, f] x_s[f]

    What each position left in the state goes on from step to step, and is read with C_t and the gradient at once: no
    attention of single features, and no position after s is looked at twice. Where all pairs of positions fit a tile,
    there are no steps.

    Args:
        x, dt, A, B, C: as in `selective_scan`.
        gradient: of what is read.

    Returns:
        Targets in rows; zero where s >= t.
    """
    batch, time, count = x.shape
    found = x.new_zeros(batch, time, time)
    if not count:
        return found
    rate = _rate(A)  # [N, D]
    numbers = tile(x.device)
    pairs = numbers // (time * time * rate.numel())  # prompts whose pairs fit
    if pairs:
        of_prompts = [[t[at] for t in (x, dt, B, C, gradient)] for at in _slices(batch, pairs)]
        return torch.cat([_effects_of_pairs(x, dt, rate, B, C, of) for x, dt, B, C, of in of_prompts])
    fitting = numbers // (time * len(rate))  # features of all prompts together
    features = max(1, min(count, fitting))
    scratch, decays = _Scratch(0, x), _Scratch(1, x)
    for at in _slices(batch, max(1, fitting // features)):
        for some in _slices(count, features):
            rate_of, written = rate[:, some], dt[at, :, some] * x[at, :, some]
            prompts = len(written)
            left = scratch.of(prompts, time, *rate_of.shape)  # [b, T, N, f]: what each position left in the state
            decay = decays.of(prompts, *rate_of.shape)
            for t in range(time):
                if t:
                    torch.mul(dt[at, t, None, some], rate_of, out=decay).exp2_()
                    left[:, :t] *= decay[:, None]
                    read = C[at, t, :, None] * gradient[at, t, None, some]  # [b, N, f]
                    found[at, t, :t] += (left[:, :t].flatten(2) @ read.flatten(1)[..., None])[..., 0]
                torch.mul(B[at, t, :, None], written[:, t, None], out=left[:, t])
    return found


def _effects_of_pairs(
    x: Float[Tensor, "batch time feature"],
    dt: Float[Tensor, "batch time feature"],
    rate: Float[Tensor, "state feature"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    gradient: Float[Tensor, "batch time feature"],
) -> Float[Tensor, "batch time time"]:
    """`selective_effects` of all pairs of positions at once."""
    batch, time, _ = x.shape
    running = dt.double().cumsum(1)  # in float64, so that differences lose no digits
    between = (running[:, :, None] - running[:, None]).to(dt.dtype).clamp_min_(0)  # [B, T, T, D], over s+1..t
    left = _Scratch(0, x).of(batch, time, time, *rate.shape)
    torch.mul(between[:, :, :, None], rate, out=left).exp2_()
    left *= (B[..., None] * (dt * x)[:, :, None])[:, None]
    read = C[..., None] * gradient[:, :, None]  # [B, T, N, D]
    return (left.flatten(3) @ read.flatten(2)[..., None])[..., 0].tril_(-1)


def ssd_attention(
    dt: Float[Tensor, "batch time feature"],
    A: Float[Tensor, " feature"],
    B: Float[Tensor, "batch time group state"],
    C: Float[Tensor, "batch time group state"],
) -> Float[Tensor, "batch feature time time"]:
    """Effective attention alpha[t, s] of Mamba-2.

    Equation: Effective attention
        alpha[t, s] = (C_t . B_s) exp(A sum_{k=s+1..t} dt_k) dt_s    for s <= t, else 0

        Source: Dao & Gu 2024, arXiv:2405.21060, eq. 16

        Of one head of Mamba-2, the step size taken in: what it acts on is x_s.
    """
    steps = rearrange(dt, "batch time feature -> batch feature time")
    C = rearrange(C, "batch time group state -> batch group time state")
    scores = C @ rearrange(B, "batch time group state -> batch group state time")
    scores = repeat(scores, "batch group t s -> batch (group head) t s", head=steps.shape[1] // scores.shape[1])
    return scores * _decay_between(steps * A[:, None]) * steps[:, :, None, :]


def own_entry(
    B: Float[Tensor, "*batch group state"], C: Float[Tensor, "*batch group state"], dt: Float[Tensor, "*batch feature"]
) -> Float[Tensor, "*batch feature"]:
    """What a position's own input adds to its output, feature by feature, without the skip.

    Equation: Effective attention
        alpha[t, t] = (C_t . B_t) dt_t

        Source: Ali et al. 2024, arXiv:2403.01590, eq. 12, at s = t, where nothing has decayed yet

    Args:
        B, C: of every group; one group in Mamba-1.
        dt: step sizes; a group's features lie side by side.
    """
    own = (B * C).sum(-1, keepdim=True)  # [..., G, 1]
    own = own * rearrange(dt, "... (group head) -> ... group head", group=B.shape[-2])
    return rearrange(own, "... group head -> ... (group head)")


def add_skip(
    y: Float[Tensor, "*batch feature width"],
    D: Float[Tensor, " feature"],
    x: Float[Tensor, "*batch feature width"],
    in_place: bool = False,
) -> Float[Tensor, "*batch feature width"]:
    """A scan's output with the skip.

    Equation: Recurrence
        y_t = C_t . h_t + D x_t

        Source: Gu et al. 2022, arXiv:2111.00396, eq. 1, where the skip is D u

    Args:
        y: output of the scan.
        D: the skip.
        x: input of the scan.
        in_place: whether y itself may be changed.
    """
    return (y.addcmul_ if in_place else y.addcmul)(D[:, None], x)


def causal_conv(
    inner: Float[Tensor, "*batch time channel"],
    weight: Float[Tensor, "channel kernel"],
    bias: Float[Tensor, " channel"] | None,
    keep: list[Bool[Tensor, "*#batch #time #channel"]] | None = None,
    past: Float[Tensor, "*#batch before channel"] | None = None,
) -> Float[Tensor, "*batch time channel"]:
    """Depthwise causal convolution, some of its taps cut.

    Equation: Convolution
        out_t = sum_{k=0..K-1} keep_k[t] w[K-1-k] inner[t-k] + bias

        Source: Gu & Dao 2023, arXiv:2312.00752, section 3.4, the block's short convolution
        Source: the cut of a tap, keep_k[t] = 0, is this package's

        K taps w, the nearest last, of one channel; keep_k[t] is 0 where the tap from t-k to t is cut, else 1.

    Args:
        inner: input.
        weight: taps, the nearest last.
        bias: added to every output.
        keep: for every distance k from target to source, 1 where the tap from t-k to t stays and 0 where it is cut;
            each broadcasts to the output.
        past: inputs before the first, `kernel - 1` of them; zero by default.
    """
    kernel, time = weight.shape[1], inner.shape[-2]
    if keep is not None:
        return _cut_conv(inner, weight, bias, keep, past)
    nearest = weight[:, -1]
    if past is not None and time == 1:  # what the past adds is the same for all rows that share it
        before = (past * weight[:, :-1].T).sum(-2, keepdim=True)
        return torch.addcmul(before if bias is None else before + bias, inner, nearest)
    out = inner * nearest if bias is None else torch.addcmul(bias, inner, nearest)
    for k in range(1, kernel):
        tap = weight[:, kernel - 1 - k]
        if k < time:
            out[..., k:, :].addcmul_(inner[..., : time - k, :], tap)
        if past is not None:
            first = past[..., kernel - 1 - k :, :][..., :time, :]  # past[t-k] at t < k
            out[..., : first.shape[-2], :] += first * tap
    return out


def conv_attention(
    weight: Float[Tensor, "some kernel"],
    keep: list[Bool[Tensor, "*#batch #time #some"]] | None,
    batch: int,
    time: int,
) -> Float[Tensor, "batch some time time"]:
    """A causal convolution read as attention: its taps, those that are cut set to zero.

    Equation: Effective attention
        alpha[t, s] = keep_{t-s}[t] w[K-1-(t-s)]    for 0 <= t-s < K, else 0

        Source: this package, from the convolution's equation

        Of one channel of a convolution that nothing follows; its bias comes from no position.

    Args:
        weight: taps, the nearest last.
        keep: as for `causal_conv`.
        batch, time: prompts and positions.
    """
    some, kernel = weight.shape
    alpha = weight.new_zeros(batch, some, time, time)
    for k in range(min(kernel, time)):
        tap = weight[:, kernel - 1 - k].expand(batch, time, some)
        tap = tap if keep is None else tap * keep[k]
        alpha.diagonal(-k, -2, -1).copy_(tap[:, k:].transpose(1, 2))
    return alpha


def _cut_conv(
    inner: Float[Tensor, "*batch time channel"],
    weight: Float[Tensor, "channel kernel"],
    bias: Float[Tensor, " channel"] | None,
    keep: list[Bool[Tensor, "*#batch #time #channel"]],
    past: Float[Tensor, "*#batch before channel"] | None,
) -> Float[Tensor, "*batch time channel"]:
    """`causal_conv` with some taps cut."""
    kernel, time = weight.shape[1], inner.shape[-2]
    before = inner.new_zeros(*inner.shape[:-2], kernel - 1, inner.shape[-1])
    if past is not None:
        before = past.expand_as(before)
    padded = torch.cat([before, inner], -2)
    out = inner.new_zeros(inner.shape) if bias is None else bias.expand_as(inner).clone()
    for k in range(kernel):
        begin = kernel - 1 - k
        out += weight[:, begin] * padded[..., begin : begin + time, :] * keep[k]
    return out


def _rate(A: Float[Tensor, "feature state"]) -> Float[Tensor, "state feature"]:
    """A in powers of two, channels innermost."""
    return (A * math.log2(math.e)).T.contiguous()


def _tiles(rate: Float[Tensor, "state feature"], batch: int, time: int) -> tuple[int, int]:
    """How many prompts and positions make a tile."""
    fitting = max(1, tile(rate.device) // rate.numel())
    chunk = min(time, fitting)
    return min(batch, fitting // chunk), chunk


def _slices(length: int, size: int) -> list[slice]:
    size = even(length, size)
    return [slice(begin, begin + size) for begin in range(0, length, size)]


_kept = threading.local()


class _Scratch:
    """Memory for tiles, kept from call to call: fresh pages from the system would cost more than the arithmetic.

    Args:
        slot: tiles that are in use at the same time have different ones.
        like: tensor whose device and dtype it takes.
    """

    def __init__(self, slot: int, like: Float[Tensor, " ..."]) -> None:
        self.key, self.like = f"{slot} {like.device} {like.dtype}", like

    def of(self, *shape: int) -> Float[Tensor, " ..."]:
        """The memory in some shape; whatever was in it."""
        size, rooms = math.prod(shape), _kept.__dict__
        if self.key not in rooms or rooms[self.key].numel() < size:
            rooms[self.key] = self.like.new_empty(size)
        return rooms[self.key][:size].view(shape)


def sum_of_later(dt: Float[Tensor, "batch time feature"]) -> Float[Tensor, "batch time feature"]:
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
