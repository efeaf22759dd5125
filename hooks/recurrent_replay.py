"""Replay in a token mixer that is a recurrence: what a base pass keeps, and how rows resume from it."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import by_feature
from mambalens.hooks.recurrence import Inputs, Instead, Recurrence, States, side_by_side
from mambalens.hooks.resume import Base, Rows


class Kept(NamedTuple):
    """What rows resume from in a layer."""

    states: States
    """State before the first replayed position, without what source sets write or erase."""
    window: Float[Tensor, "batch before channel"]
    """Inputs of the convolution before it, as many as its kernel reaches back."""
    most_cuts: int
    """See `Mixer.keeping`."""


def keep(
    mixer: Recurrence, base: Base, hidden: Float[Tensor, "batch time given"]
) -> tuple[Float[Tensor, "batch time hidden"], Kept]:
    """The mixer's output left of what is replayed, and what rows have to know.

    Positions from the first replayed one on, and padding, are left out wherever tokens stand alone.

    Args:
        mixer: the mixer.
        base: which positions are replayed, and the source sets.
        hidden: the mixer's input, as `told` gives it.
    """
    batch, time = len(base.first), base.reach
    count = len(base.tokens[0])
    # Where all is replayed there is none: one goes through then that nobody reads, since modules reshape with -1.
    tokens = base.tokens if count else (base.first[:1] * 0, base.first[:1] * 0)
    gate, inner, beside = mixer.project(hidden[tokens][None])
    inner = _spread(inner[:, :count], base.tokens, batch, time)
    beside = None if beside is None else _spread(beside[:, :count], base.tokens, batch, time)
    inputs = mixer.scan_inputs(mixer.activate(mixer.convolve(inner, None)), beside)
    # What is replayed leaves the states alone; nobody reads what it reads here.
    before, sources = base.before[:, :time], base.sources[..., :time]
    if base.instead is None or base.instead.main is None:
        y, states = mixer.scan_and_states(inputs.frozen(before), sources)
    else:
        frozen = inputs.frozen(before)
        y, states = mixer.scan(frozen)[0], mixer.replaced_states(frozen, before, sources, base.instead.main[:, :time])
    window = _window(inner, base, mixer.kernel - 1)
    y = mixer.with_skip(y, inputs)[tokens][None]
    out = mixer.finish(y, gate, hidden.dtype)[:, :count]
    return _spread(out, base.tokens, *hidden.shape[:2]), Kept(states, window, sys.maxsize)


class SeenPrompts(NamedTuple):
    """What a recurrence has seen of whole prompts; see `resume.Seen`."""

    mixer: Recurrence
    inputs: Inputs
    inner: Float[Tensor, "batch time channel"]
    """Inputs of the convolution."""

    def kept(self, base: Base, prompts: Int[Tensor, " batch"]) -> Kept:
        """What rows resume from: the state and the convolution's inputs before their first position."""
        base, prompts = base.to(self.inner.device), prompts.to(self.inner.device)
        reach = torch.arange(base.reach, device=prompts.device)
        inputs = self.inputs.of(prompts).of((slice(None), reach)).frozen(base.before[:, : base.reach])
        states = self.mixer.states(inputs, base.sources[..., : base.reach])
        return Kept(states, _window(self.inner[prompts], base, self.mixer.kernel - 1), sys.maxsize)


def see(
    mixer: Recurrence, hidden: Float[Tensor, "batch time given"]
) -> tuple[Float[Tensor, "batch time hidden"], SeenPrompts]:
    """The mixer's output for whole prompts, and what it has seen of them.

    Args:
        mixer: the mixer.
        hidden: the mixer's input, as `told` gives it.
    """
    gate, inner, beside = mixer.project(hidden)
    inputs = mixer.scan_inputs(mixer.activate(mixer.convolve(inner, None)), beside)
    y = mixer.with_skip(mixer.scan(inputs)[0], inputs)
    return mixer.finish(y, gate, hidden.dtype), SeenPrompts(mixer, inputs, inner)


def _window(inner: Float[Tensor, "batch time channel"], base: Base, past: int) -> Float[Tensor, "batch before channel"]:
    """Inputs of the convolution before the first replayed position, as many as its kernel reaches back."""
    at = base.first[:, None] + torch.arange(past, device=base.first.device)  # columns of the padded input
    return F.pad(inner, (0, 0, past, 0)).gather(1, at[..., None].expand(-1, -1, inner.shape[-1]))


def resume(
    mixer: Recurrence, kept: Kept, base: Base, rows: Rows, hidden: Float[Tensor, "batch row_time given"]
) -> Float[Tensor, "batch row_time hidden"]:
    """The mixer's output for rows side by side."""
    projected = mixer.project(hidden)
    inner = side_by_side(projected.inner, len(rows))
    keep = kept_taps_of_rows(base, rows, mixer.kernel) if rows.known.conv.any() else None
    others = [] if keep is None else _other_inputs(base, keep, mixer.kernel)
    convolved = mixer.activate(mixer.convolve(inner, keep, kept.window[:, None], others))
    convolved = rearrange(convolved, "batch row time channel -> batch (row time) channel")
    inputs = mixer.scan_inputs(convolved, projected.beside)
    y = _cut_rows(mixer, inputs.by_row(len(rows)), kept, base, rows)  # [B, R, L, F, P]
    y = rearrange(y, "batch row time ... -> batch (row time) ...")
    return mixer.finish(mixer.with_skip(y, inputs, in_place=True), projected.gate, hidden.dtype)


def _cut_rows(
    mixer: Recurrence, inputs: Inputs, kept: Kept, base: Base, rows: Rows
) -> Float[Tensor, "batch row time feature width"]:
    """What rows read: each target set does without what its source set writes, or erases."""
    known, device = rows.known, base.first.device
    pairs = list(zip(known.on(Paths.MAIN), known.on(Paths.ERASE), known.target, strict=True))
    instead = None  # [B, 1, L, F, P]
    if base.instead is not None and base.instead.main is not None:
        instead = base.own_columns(base.instead.main)[:, None]

    def without(
        inputs: Inputs, written: Int[Tensor, " some"], erased: Int[Tensor, " some"]
    ) -> Float[Tensor, "batch some time feature width"]:
        """Every position of some rows without their source sets, whose numbers are on the CPU."""
        cut: list[Tensor | None] = []
        for number in (written, erased):
            if base.known.own_sources[number].any():
                own = base.own_sources[number.to(device, non_blocking=True)]
                cut.append(~own.transpose(0, 1)[..., None])  # [B, some, L, 1]
            else:
                cut.append(None)
        # The states are few; numbered by both, in one number, they are told apart faster than pair by pair.
        before = base.sources_before.to(written.device)
        codes = written * before[written] * len(base.sources) + erased * before[erased]
        codes, state = codes.unique(return_inverse=True)
        states = [kept.states(*divmod(code, len(base.sources))) for code in codes.tolist()]
        values, erasures = cut
        return mixer.resume_scan(inputs.cut(values, erasures, instead), states, state)

    written, erased, _ = pairs[0]
    some = (written > 0) | (erased > 0)  # set 0 only fills up
    if len(pairs) == 1 and rows.features is None and (base.all_targets or not some.any()):
        return without(inputs, written, erased)
    y = without(inputs, torch.zeros_like(written), torch.zeros_like(written))
    for written, erased, target in pairs:
        here = ((written > 0) | (erased > 0)).nonzero().flatten()  # one row in many, where edges are cut one by one
        if len(here):
            there = here.to(device, non_blocking=True)
            cut = base.targets[target[here].to(device, non_blocking=True)].transpose(0, 1)[..., None]  # [B, some, L, 1]
            if rows.features is not None:
                cut = cut & rows.features[there][None, :, None]
            of_cut = without(inputs.of((slice(None), there)), written[here], erased[here])
            y[:, there] = torch.where(cut[..., None], of_cut, y[:, there])
    return y


def kept_taps_of_rows(base: Base, rows: Rows, kernel: int) -> list[Bool[Tensor, "batch cut length feature"]]:
    """For every distance k, 1 where the tap from t-k to t stays, of every feature or of all."""
    keep = []
    for k in range(kernel):
        columns = base.columns - k  # [B, L]
        reached = base.sources.gather(2, columns.clamp_min(0).expand(len(base.sources), -1, -1)) & (columns >= 0)
        cut = torch.zeros((), dtype=torch.bool, device=columns.device)
        for source, target in zip(rows.conv, rows.target, strict=True):
            cut = cut | (reached[source] & base.targets[target])  # [R, B, L]; set 0 is empty
        cut = cut.transpose(0, 1)
        keep.append(~by_feature(cut, None if rows.features is None else rows.features[None, :, None]))
    return keep


def _other_inputs(base: Base, keep: list[Bool[Tensor, "batch cut length feature"]], kernel: int) -> list[Instead]:
    """What the convolution of rows reads where taps are cut; nothing where nothing stands there."""
    if base.instead is None or base.instead.conv is None:
        return []
    inner, past = base.instead.conv, kernel - 1
    columns = base.columns[:, :1] + torch.arange(-past, base.length, device=inner.device)  # from before the first
    prompts = torch.arange(len(inner), device=inner.device)[:, None]
    found = inner[prompts, columns.clamp_min(0)] * (columns >= 0)[..., None]
    found = found[:, None].expand(-1, keep[0].shape[1], -1, -1)  # [B, R, past + L, C]
    return [Instead([~taps for taps in keep], found[:, :, past:], found[:, :, :past])]


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
