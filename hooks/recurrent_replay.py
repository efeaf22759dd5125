"""Replay in a token mixer that is a recurrence: what a base pass keeps, and how rows resume from it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut, by_feature
from mambalens.hooks.recurrence import Inputs, Instead, Other, Recurrence, States, side_by_side
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
    if base.around:
        return _keep_cut(mixer, base, hidden)
    count = len(base.tokens[0])
    # Where all is replayed there is none: one goes through then that nobody reads, since modules reshape with -1.
    tokens = base.tokens if count else (base.first[:1] * 0, base.first[:1] * 0)
    gate, inner, beside = mixer.project(hidden[tokens][None])
    inner = _spread(inner[:, :count], base.tokens, batch, time)
    beside = None if beside is None else _spread(beside[:, :count], base.tokens, batch, time)
    inputs = mixer.scan_inputs(mixer.convolved(inner, None), beside)
    # What is replayed leaves the states alone; nobody reads what it reads here.
    before = base.before[:, :time]
    if any(other.written.main is not None for other in base.instead):
        frozen = inputs.frozen(before)
        y, states = mixer.scan(frozen)[0], _states(mixer, frozen, before, base)
    else:
        y, states = mixer.scan_and_states(inputs.frozen(before), base.sources[..., :time])
    window = _window(inner, base, mixer.kernel - 1)
    y = mixer.with_skip(y, inputs)[tokens][None]
    out = mixer.finish(y, gate, hidden.dtype)[:, :count]
    return _spread(out, base.tokens, *hidden.shape[:2]), Kept(states, window, sys.maxsize)


def _keep_cut(
    mixer: Recurrence, base: Base, hidden: Float[Tensor, "batch time given"]
) -> tuple[Float[Tensor, "batch time hidden"], Kept]:
    """`keep` where something is cut of the base pass itself."""
    out, seen = mixer.under(hidden[:, : base.reach], None, [cut.until(base.reach) for cut in base.around])
    kept = SeenPrompts(mixer, *seen).kept(base, torch.arange(len(hidden), device=hidden.device))
    return F.pad(out, (0, 0, 0, hidden.shape[1] - base.reach)), kept


def _states(mixer: Recurrence, inputs: Inputs, moving: Bool[Tensor, "batch time"], base: Base) -> States:
    """States before the first replayed position without what each of the source sets writes or erases.

    Args:
        mixer: the mixer.
        inputs: of the columns left of the last such position; frozen outside `moving`.
        moving: positions left of the first that is replayed.
        base: with the source sets.
    """
    time = moving.shape[1]
    others = [
        Other(other.written.main[:, :time], other.sources[..., :time])
        for other in base.instead
        if other.written.main is not None
    ]
    sources = base.sources[..., :time]
    return mixer.replaced_states(inputs, moving, sources, others) if others else mixer.states(inputs, sources)


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
        before = base.before[:, : base.reach]
        inputs = self.inputs.of(prompts).of((slice(None), reach)).frozen(before)
        states = _states(self.mixer, inputs, before, base)
        return Kept(states, _window(self.inner[prompts], base, self.mixer.kernel - 1), sys.maxsize)


def see(
    mixer: Recurrence, hidden: Float[Tensor, "batch time given"], around: Sequence[Cut] = ()
) -> tuple[Float[Tensor, "batch time hidden"], SeenPrompts]:
    """The mixer's output for whole prompts, and what it has seen of them.

    Args:
        mixer: the mixer.
        hidden: the mixer's input, as `told` gives it.
        around: what is cut of the pass.
    """
    if around:
        out, seen = mixer.under(hidden, None, around)
        return out, SeenPrompts(mixer, *seen)
    gate, inner, beside = mixer.project(hidden)
    inputs = mixer.scan_inputs(mixer.convolved(inner, None), beside)
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
    keep, others = taps_of_rows(base, rows, mixer.kernel) if rows.known.conv.any() else (None, [])
    convolved = mixer.convolved(inner, keep, kept.window[:, None], others)
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

    def without(
        inputs: Inputs, written: Int[Tensor, " some"], erased: Int[Tensor, " some"]
    ) -> Float[Tensor, "batch some time feature width"]:
        """Every position of some rows without their source sets, whose numbers are on the CPU."""
        values, instead = _values_of_rows(base, written)
        erasures = None
        if base.known.own_sources[erased].any():
            own = base.own_sources[erased.to(device, non_blocking=True)]
            erasures = ~own.transpose(0, 1)[..., None]  # [B, some, L, 1]
        # The states are few; numbered by both, in one number, they are told apart faster than pair by pair.
        before = base.sources_before.to(written.device)
        codes = written * before[written] * len(base.sources) + erased * before[erased]
        codes, state = codes.unique(return_inverse=True)
        states = [kept.states(*divmod(code, len(base.sources))) for code in codes.tolist()]
        return mixer.resume_scan(inputs.cut(values, erasures, instead), states, state)

    written, erased, _ = pairs[0]
    some = (written > 0) | (erased > 0)  # set 0 only fills up
    if len(pairs) == 1 and rows.features is None and (base.all_targets or not some.any()):
        return without(inputs, written, erased)
    y = without(inputs, torch.zeros_like(written), torch.zeros_like(written))
    for number, (written, erased, target) in enumerate(pairs):
        here = ((written > 0) | (erased > 0)).nonzero().flatten()  # one row in many, where edges are cut one by one
        if len(here):
            there = here.to(device, non_blocking=True)
            cut = base.targets[target[here].to(device, non_blocking=True)].transpose(0, 1)[..., None]  # [B, some, L, 1]
            if rows.features is not None:
                cut = cut & rows.features[number, there][None, :, None]
            of_cut = without(inputs.of((slice(None), there)), written[here], erased[here])
            y[:, there] = torch.where(cut[..., None], of_cut, y[:, there])
    return y


def _values_of_rows(
    base: Base, written: Int[Tensor, " some"]
) -> tuple[Bool[Tensor, " batch some length 1"] | None, Float[Tensor, " batch #some length feature width"] | None]:
    """Which of their own values rows read without what source sets write, and what they read for the others.

    None: all of them, and nothing.

    Args:
        base: what the mixer is told.
        written: number of the source set of each row; on the CPU.
    """
    known, there = base.known, written.to(base.first.device, non_blocking=True)
    any_gone = bool(known.own_sources[written].any())
    gone = base.own_sources[there].transpose(0, 1)[..., None]  # [B, some, L, 1]
    instead = None
    for other, on_host in zip(base.instead, known.instead, strict=True):
        if other.written.main is not None:
            here = base.own(other.sources)[there].transpose(0, 1)[..., None]
            value = base.own_columns(other.written.main)[:, None]  # [B, 1, L, F, P]
            if instead is not None or len(base.instead) > 1 or any_gone:
                value = value * here[..., None] if instead is None else torch.where(here[..., None], value, instead)
            instead, gone = value, gone | here
            any_gone = any_gone or bool(known.own(on_host.sources)[written].any())
    return (~gone, instead) if any_gone else (None, None)


def taps_of_rows(
    base: Base, rows: Rows, kernel: int
) -> tuple[list[Bool[Tensor, "batch cut length feature"]], list[Instead]]:
    """For every distance k, 1 where the tap from t-k to t stays, of every feature or of all; what others read."""
    gone = _taps_from(base.sources, base, rows, kernel)
    others = []
    for other in base.instead:
        if other.written.conv is not None:
            taps = _taps_from(other.sources, base, rows, kernel)
            others.append(_other_inputs(other.written.conv, base, taps, kernel))
            gone = [one | two for one, two in zip(gone, taps, strict=True)]
    return [~taps for taps in gone], others


def _taps_from(
    sources: Bool[Tensor, "sourceset batch time"], base: Base, rows: Rows, kernel: int
) -> list[Bool[Tensor, "batch cut length feature"]]:
    """For every distance k, 1 where the tap from t-k to t comes from the source set of a row's pair."""
    found = []
    for k in range(kernel):
        columns = base.columns - k  # [B, L]
        reached = sources.gather(2, columns.clamp_min(0).expand(len(sources), -1, -1)) & (columns >= 0)
        taps = torch.zeros((), dtype=torch.bool, device=columns.device)
        for number, (source, target) in enumerate(zip(rows.conv, rows.target, strict=True)):
            cut = (reached[source] & base.targets[target]).transpose(0, 1)  # [B, R, L]; set 0 is empty
            features = None if rows.features is None else rows.features[number][None, :, None]
            taps = taps | by_feature(cut, features)
        found.append(taps)
    return found


def _other_inputs(
    inner: Float[Tensor, "batch time channel"],
    base: Base,
    taps: list[Bool[Tensor, "batch cut length feature"]],
    kernel: int,
) -> Instead:
    """What the convolution of rows reads through some taps."""
    past = kernel - 1
    columns = base.columns[:, :1] + torch.arange(-past, base.length, device=inner.device)  # from before the first
    prompts = torch.arange(len(inner), device=inner.device)[:, None]
    found = inner[prompts, columns.clamp_min(0)] * (columns >= 0)[..., None]
    found = found[:, None].expand(-1, taps[0].shape[1], -1, -1)  # [B, R, past + L, C]
    return Instead(taps, found[:, :, past:], found[:, :, :past])


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
