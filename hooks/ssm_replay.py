"""Replay in a state-space token mixer: what a base pass keeps, and how rows resume from it."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks.masks import by_feature
from mambalens.hooks.recurrence import Recurrence, ScanInputs
from mambalens.hooks.resume import Base, Rows


class Kept(NamedTuple):
    """What rows resume from in a state-space layer."""

    states: list[Float[Tensor, " batch *state"]]
    """State before the first replayed position, without the inputs of each source set."""
    window: Float[Tensor, "batch before channel"]
    """Inputs of the convolution before it, as many as its kernel reaches back."""
    most_cuts: int
    """See `Mixer.keeping`."""


def keep(
    mixer: Recurrence, base: Base, hidden: Float[Tensor, "batch time hidden"]
) -> tuple[Float[Tensor, "batch time hidden"], Kept]:
    """The mixer's output left of what is replayed, and what rows have to know.

    Positions from the first replayed one on, and padding, are left out wherever tokens stand alone.

    Args:
        mixer: the mixer.
        base: which positions are replayed, and the source sets.
        hidden: the mixer's input.
    """
    batch, time = len(base.first), base.reach
    gate, inner, dt = mixer.project(hidden[base.tokens][None])
    inner = _spread(inner, base.tokens, batch, time)
    dt = None if dt is None else _spread(dt, base.tokens, batch, time)
    inputs = mixer.scan_inputs(mixer.module.act(mixer.convolve(inner, None)), dt)
    y, _ = mixer.scan(inputs, inputs.x)
    # A step size of zero neither decays nor writes: the state stays what it was before the first replayed one.
    before = base.before[:, :time, None]
    states = mixer.states(inputs._replace(dt=inputs.dt * before), ~base.sources[..., :time])
    past = int(mixer.module.conv_kernel_size) - 1
    at = base.first[:, None] + torch.arange(past, device=base.first.device)  # columns of the padded input
    window = F.pad(inner, (0, 0, past, 0))
    window = window.gather(1, at[..., None].expand(-1, -1, window.shape[-1]))
    y = mixer.with_skip(y, inputs)[base.tokens][None]
    out = mixer.finish(y, gate, hidden.dtype)
    return _spread(out, base.tokens, *hidden.shape[:2]), Kept(states, window, sys.maxsize)


def resume(
    mixer: Recurrence, kept: Kept, base: Base, rows: Rows, hidden: Float[Tensor, "batch row_time hidden"]
) -> Float[Tensor, "batch row_time hidden"]:
    """The mixer's output for rows side by side."""
    projected = mixer.project(hidden)
    inner = _by_row(projected.inner, len(rows))
    keep = kept_taps_of_rows(base, rows, int(mixer.module.conv_kernel_size)) if rows.conv.any() else None
    convolved = mixer.module.act(mixer.convolve(inner, keep, kept.window[:, None]))
    convolved = rearrange(convolved, "batch row time channel -> batch (row time) channel")
    inputs = mixer.scan_inputs(convolved, projected.dt)
    x, dt, B, C = (_by_row(t, len(rows)) for t in (inputs.x, inputs.dt, inputs.B, inputs.C))
    y = _cut_rows(mixer, ScanInputs(x, dt, inputs.A, B, C), kept, base, rows)  # [B, R, L, F, P]
    y = rearrange(y, "batch row time ... -> batch (row time) ...")
    return mixer.finish(mixer.with_skip(y, inputs, in_place=True), projected.gate, hidden.dtype)


def _cut_rows(
    mixer: Recurrence, inputs: ScanInputs, kept: Kept, base: Base, rows: Rows
) -> Float[Tensor, "batch row time feature width"]:
    """The scan of rows: each target set reads nothing of its source set."""
    pairs = list(zip(rows.on_main, rows.target, strict=True))

    def without(number: Int[Tensor, " row"]) -> Float[Tensor, "batch row time feature width"]:
        """Every position without its row's source set."""
        stays = ~base.own_sources[number].transpose(0, 1)[..., None, None]  # [B, R, L, 1, 1]
        return mixer.resume_scan(inputs, inputs.x if stays.all() else inputs.x * stays, kept.states, number)

    if len(pairs) == 1 and rows.features is None and (base.all_targets or not rows.on_main.any()):
        return without(pairs[0][0])
    y = mixer.resume_scan(inputs, inputs.x, kept.states, torch.zeros_like(rows.on_main[0]))
    for source, target in pairs:
        if source.any():
            cut = base.targets[target] & (source > 0)[:, None, None]  # set 0 only fills up
            cut = cut.transpose(0, 1)[..., None]  # [B, R, L, 1]
            if rows.features is not None:
                cut = cut & rows.features[None, :, None]
            y = torch.where(cut[..., None], without(source), y)
    return y


def kept_taps_of_rows(base: Base, rows: Rows, kernel: int) -> list[Bool[Tensor, "batch cut length feature"]]:
    """For every distance k, 1 where the tap from t-k to t stays, of every feature or of all."""
    keep = []
    for k in range(kernel):
        columns = base.columns - k  # [B, L]
        reached = base.sources.gather(2, columns.clamp_min(0).expand(len(base.sources), -1, -1)) & (columns >= 0)
        cut = torch.zeros((), dtype=torch.bool, device=columns.device)
        for source, target in zip(rows.source, rows.target, strict=True):
            cut = cut | (reached[source] & base.targets[target])  # [R, B, L]
        cut = (cut & rows.conv[:, None, None]).transpose(0, 1)
        keep.append(~by_feature(cut, None if rows.features is None else rows.features[None, :, None]))
    return keep


def _by_row(values: Float[Tensor, "batch row_time *rest"], rows: int) -> Float[Tensor, "batch row time *rest"]:
    """What belongs to rows side by side, row by row."""
    return rearrange(values, "batch (row time) ... -> batch row time ...", row=rows)


def _spread(
    packed: Float[Tensor, "1 token *rest"],
    tokens: tuple[Int[Tensor, " token"], Int[Tensor, " token"]],
    batch: int,
    time: int,
) -> Float[Tensor, "batch time *rest"]:
    """Values of tokens at their places, zero elsewhere."""
    spread = packed.new_zeros(batch, time, *packed.shape[2:])
    spread[tokens] = packed[0]
    return spread
