"""The arithmetic of delta rules, as pure functions: tensors in, tensors out.

Letters are those of Yang et al. 2024 (arXiv:2412.06464). Per head, with a state S of keys x values:

    S_t = (I - e_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + w_t k_t v_t^T        y_t = S_t^T q_t

The strength beta_t of the papers stands here twice: w_t with which a position writes, and e_t with which it erases.
They are the same number until a knockout takes one of them away. The recurrence is linear in v, whatever its keys do:

    alpha[t, s] = w_s k_s . p_s        p_t = q_t        p_{j-1} = diag(exp(g_j)) (I - e_j k_j k_j^T) p_j

In a chunk of positions the recurrence is a triangular system (the UT transform): what position t really adds to the
state, along its key, is u_t = w_t v_t - e_t S_{t-1}'^T k_t, with S' the decayed state that it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks.indices import to_pick
from mambalens.hooks.recurrence import Index, Other, side_by_side
from mambalens.hooks.scan import even, tile
from mambalens.hooks.values import kept_values

CHUNK = {True: 64, False: 16}
"""Positions that are solved as one system: with one decay a head, and with one for every channel of its keys."""

CHANNELS = {"cpu": 2**15}
"""Numbers of time x time x key that are worked on at a time; by device, 2**26 elsewhere."""
FEW = 8
"""Channels below which they are not worth to be taken together."""


class DeltaInputs(NamedTuple):
    """Inputs of a delta rule, in float32 or better; see `recurrence.Inputs`."""

    x: Float[Tensor, "*batch time feature width"]
    """The values v."""
    k: Float[Tensor, "*batch time group key"]
    """Keys; a group's heads lie side by side."""
    q: Float[Tensor, "*batch time group key"]
    """Queries, scaled."""
    write: Float[Tensor, "*batch time feature"]
    erase: Float[Tensor, "*batch time feature"]
    log_decay: Float[Tensor, "*batch time feature channel"]
    """g; of the whole head, or of every channel of its keys."""

    def cut(
        self,
        values: Bool[Tensor, "*#batch time #feature"] | None,
        erasures: Bool[Tensor, "*#batch time #feature"] | None,
        instead: Float[Tensor, "*#batch time feature width"] | None = None,
    ) -> DeltaInputs:
        """The same with these values, and with these erasures."""
        x = self.x if values is None else kept_values(self.x, values, instead)
        return self._replace(x=x, erase=self.erase if erasures is None else self.erase * erasures)

    def with_values(self, x: Float[Tensor, "*batch time feature width"]) -> DeltaInputs:
        """The same with other values."""
        return self._replace(x=x)

    def frozen(self, moving: Bool[Tensor, "batch time"]) -> DeltaInputs:
        """The same with positions outside `moving` leaving the state as they find it."""
        moves = moving[..., None]
        return self._replace(
            write=self.write * moves, erase=self.erase * moves, log_decay=self.log_decay * moves[..., None]
        )

    def by_row(self, rows: int) -> DeltaInputs:
        """What belongs to rows, row by row."""
        return DeltaInputs(*(side_by_side(t, rows) for t in self))

    def of(self, index: Index) -> DeltaInputs:
        """The inputs of these prompts or rows."""
        return DeltaInputs(*(t[index] for t in self))

    def own_entry(self) -> Float[Tensor, "*batch time feature"]:
        """alpha[t, t].

        Equation: Effective attention
            alpha[t, t] = w_t k_t . q_t

            Source: this package, from Yang et al. 2024, arXiv:2412.06464, eq. 10

            Of one head of a delta rule.
        """
        own = (self.k * self.q).sum(-1)  # [..., G]
        return self.write * _by_head(own, self.write.shape[-1], -1)

    def of_heads(self, heads: Int[Tensor, " some"]) -> DeltaInputs:
        """Some heads alone, each with a key and a query of its own."""
        group = heads * self.k.shape[-2] // self.write.shape[-1]
        x, k, q = self.x[..., heads, :], self.k[..., group, :], self.q[..., group, :]
        return DeltaInputs(x, k, q, self.write[..., heads], self.erase[..., heads], self.log_decay[..., heads, :])


class Chunk(NamedTuple):
    """Positions that are solved as one system, head by head."""

    v: Float[Tensor, "batch feature time width"]
    k: Float[Tensor, "batch feature time key"]
    q: Float[Tensor, "batch feature time key"]
    write: Float[Tensor, "batch feature time 1"]
    erase: Float[Tensor, "batch feature time 1"]
    since_start: Float[Tensor, "batch feature time channel"]
    """Decay from the state before the chunk to each position, its own included."""
    to_end: Float[Tensor, "batch feature time channel"]
    """Decay of what each position writes until the chunk's last."""
    system: Float[Tensor, "batch feature time time"]
    """I + L, with L[t, s] = e_t k_t . (decay from s to t) k_s below the diagonal; only what lies below it is read."""
    scores: Float[Tensor, "batch feature time time"]
    """q_t . (decay from s to t) k_s, zero above the diagonal."""

    def solved(self, right: Float[Tensor, "batch feature time some"]) -> Float[Tensor, "batch feature time some"]:
        """(I + L)^-1 of something."""
        return torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)


def delta_scan(
    inputs: DeltaInputs | list[Chunk], start: Float[Tensor, "#batch feature key width"] | None = None, end: bool = True
) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, "batch feature key width"] | None]:
    """A delta rule: chunks of positions, a recurrence between them.

    Equation: Recurrence
        S_t = (I - e_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + w_t k_t v_t^T
        y_t = S_t^T q_t

        Source: Yang et al. 2024, arXiv:2412.06464, eq. 10, with e_t = w_t = beta_t and one decay a head
        Source: Kimi Team 2025, arXiv:2510.26692, eq. 1, with a decay for every channel of the keys

        Of one head of a delta rule.

    Args:
        inputs: as in the recurrence above, or its chunks.
        start: state before the first position; zero by default.
        end: whether the state after the last position is wanted.

    Returns:
        y, and the state after the last position or None.
    """
    state, outputs = start, []
    chunks = inputs if isinstance(inputs, list) else in_chunks(inputs)
    for number, chunk in enumerate(chunks):
        added = chunk.write * chunk.v
        if state is not None:
            added = added - chunk.erase * ((chunk.k * chunk.since_start) @ state)
        added = chunk.solved(added)  # u
        y = chunk.scores @ added
        if state is not None:
            y = y + (chunk.q * chunk.since_start) @ state
        outputs.append(rearrange(y, "batch feature time width -> batch time feature width"))
        if end or number + 1 < len(chunks):
            written = (chunk.k * chunk.to_end).mT @ added
            state = written if state is None else chunk.since_start[:, :, -1, :, None] * state + written
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state if end else None


def delta_writes(inputs: DeltaInputs | list[Chunk]) -> Float[Tensor, "batch feature key time"]:
    """What is left after the last position of what each position writes: the state is `sum_s writes[:, s] v_s^T`.

    Equation: Knockout
        S^-S_T = sum_{s not in S} c_s v_s^T    c_s = T_T ... T_{s+1} w_s k_s    T_j = (I - e_j k_j k_j^T) diag(exp(g_j))

        Source: this package, from Yang et al. 2024, arXiv:2412.06464, eq. 10, which is linear in v

        For knockouts of what delta rules write; where erasures are cut, e_s = 0 for the sources.

    Args:
        inputs: as in the recurrence, or its chunks.
    """
    parts: list[Tensor] = []
    later: Tensor | None = None  # the product of the transitions of later chunks [B, H, K, K]
    chunks = inputs if isinstance(inputs, list) else in_chunks(inputs)
    for number, chunk in reversed(list(enumerate(chunks))):
        keys = chunk.k * chunk.to_end
        # The transposed system, so that it is solved for the keys and not for the positions.
        solved = torch.linalg.solve_triangular(chunk.system.mT, keys, upper=True, unitriangular=True)  # [B, H, L, K]
        own = (solved * chunk.write).mT
        parts.append(own if later is None else later @ own)
        if number:
            decay = torch.diag_embed(chunk.since_start[:, :, -1].expand(*keys.shape[:2], keys.shape[-1]))
            transition = decay - (solved * chunk.erase).mT @ (chunk.k * chunk.since_start)
            later = transition if later is None else later @ transition
    return torch.cat(parts[::-1], -1)


@dataclass(frozen=True, eq=False)
class Left:
    """A state as what positions have left in it, by their keys and values."""

    writes: Float[Tensor, "batch feature key time"]
    """See `delta_writes`; one tensor for all states of the same erasures."""
    stays: Bool[Tensor, "batch time"]
    """1 for positions whose values are in it."""
    values: Float[Tensor, "batch feature time width"]

    @cached_property
    def state(self) -> Float[Tensor, "batch feature key width"]:
        """The state itself."""
        return (self.writes * self.stays[:, None, None]) @ self.values

    @property
    def is_long(self) -> bool:
        """Whether the state is faster read than the positions that it consists of."""
        key, time = self.writes.shape[2:]
        return time * (key + self.values.shape[3]) > key * self.values.shape[3]


def delta_states(
    inputs: DeltaInputs,
    chunks: list[Chunk],
    sources: Bool[Tensor, "set batch time"],
    others: Sequence[Other] = (),
) -> Callable[[int, int], Left]:
    """States after the last position without what some source set writes and another erases, by their numbers.

    `delta_writes` is computed once, and once more for each set of erasures that is asked for. Where something stands
    in the place of what is not written, it is as many positions more, with the same keys.

    Args:
        inputs: as in the recurrence.
        chunks: the same in chunks.
        sources: what each set does without.
        others: values that stand in the place of some positions', set by set.
    """

    def by_head(x: Float[Tensor, "batch time feature width"]) -> Float[Tensor, "batch feature time width"]:
        return rearrange(x.to(inputs.x.dtype), "batch time feature width -> batch feature time width")

    values, stays = by_head(inputs.x), ~sources
    for other in others:
        stays = stays & ~other.sources
    values = torch.cat([values, *(by_head(other.values) for other in others)], 2) if others else values
    stays = torch.cat([stays, *(other.sources for other in others)], 2) if others else stays

    def positions(writes: Float[Tensor, "batch feature key time"]) -> Float[Tensor, "batch feature key all_time"]:
        return torch.cat([writes] * (1 + len(others)), 3) if others else writes

    writes = {0: positions(delta_writes(chunks))}
    found: dict[tuple[int, int], Left] = {}

    def state(written: int, erased: int) -> Left:
        if erased not in writes:
            writes[erased] = positions(delta_writes(inputs.cut(None, ~sources[erased][..., None])))
        if (written, erased) not in found:
            found[written, erased] = Left(writes[erased], stays[written], values)
        return found[written, erased]

    return state


def delta_step(
    inputs: DeltaInputs, states: Sequence[Left], number: Int[Tensor, " row"]
) -> Float[Tensor, "batch row feature width"]:
    """One position of a delta rule for many rows, each from one of its prompt's states.

    Args:
        inputs: of that position [batch, row, ...].
        states: states before the position, from `delta_states`.
        number: which of them each row resumes from; on the CPU.
    """
    heads = inputs.write.shape[-1]
    own = _by_head((inputs.k * inputs.q).sum(-1), heads, -1)[..., None]  # [B, R, H, 1]
    k, q = _by_head(inputs.k, heads, -2), _by_head(inputs.q, heads, -2)
    read = torch.addcmul(q, own * inputs.erase[..., None], k, value=-1).mul_(torch.exp(inputs.log_decay))  # p before
    read = rearrange(read, "batch row feature key -> batch feature row key")
    y = own * inputs.write[..., None] * inputs.x
    # In one go what differs in nothing but the values that it lacks: short prompts are read position by position.
    together: dict[int, list[int]] = {}
    for index, state in enumerate(states):
        together.setdefault(index if state.is_long else id(state.writes) + len(states), []).append(index)
    for indices in together.values():
        of_group = torch.isin(number, torch.tensor(indices)).nonzero().flatten()
        rows: Any = to_pick(of_group, y.device)
        first = states[indices[0]]
        if first.is_long:
            carried = read[:, :, rows] @ first.state
        else:
            of_rows = number[of_group].to(y.device, non_blocking=True)
            stays = torch.stack([state.stays for state in states], 1)[:, of_rows]  # [B, R, T]
            carried = ((read[:, :, rows] @ first.writes) * stays[:, None]) @ first.values
        y[:, rows] += rearrange(carried, "batch feature row width -> batch row feature width")
    return y


def delta_erasures(inputs: DeltaInputs) -> DeltaInputs:
    """A delta rule whose values are what its positions erase: alpha[t, s] x_s is what erasing by s adds to y_t.

    Equation: Erasing
        y_t - y^-E_t = (k_s . p_s) (u_s - w_s v_s)    for E = {s}
        u = (I + L)^-1 diag(w) V    what positions really add to the state, along their keys

        Source: this package, from Yang et al. 2024, arXiv:2412.06464, eq. 10, where one erasure is linear

        Of one head of a delta rule; y^-E is read of a state from which s has removed nothing, p_s is what its target
        reads after position s.
    """
    (chunk,) = in_chunks(inputs, inputs.x.shape[-3])
    written = chunk.write * chunk.v
    erased = rearrange(chunk.solved(written) - written, "batch feature time width -> batch time feature width")
    return inputs._replace(x=erased, write=torch.ones_like(inputs.write))


def delta_attention(inputs: DeltaInputs) -> Float[Tensor, "batch feature time time"]:
    """Effective attention of a delta rule, the removals by the positions in between included: O(features T^2) memory.

    Equation: Effective attention
        alpha[t, s] = w_s k_s . p_s    for s <= t, else 0
        p_t = q_t    p_{j-1} = diag(exp(g_j)) (I - e_j k_j k_j^T) p_j
        alpha = Q (I + L)^-1 diag(w)    Q[t, s] = q_t . D_ts k_s    L[t, s] = e_t k_t . D_ts k_s for s < t, else 0

        Source: this package, from Yang et al. 2024, arXiv:2412.06464, eq. 10

        Of one head of a delta rule; D_ts = diag(exp(sum_{j=s+1..t} g_j)). The last line is the first, for all t.
    """
    (chunk,) = in_chunks(inputs, inputs.x.shape[-3])
    alpha = torch.linalg.solve_triangular(chunk.system, chunk.scores, upper=False, left=False, unitriangular=True)
    return alpha * chunk.write.mT


def in_chunks(inputs: DeltaInputs, size: int | None = None) -> list[Chunk]:
    """The positions in chunks of at most a size, head by head."""
    batch, time, heads = inputs.write.shape
    length = even(time, size or CHUNK[inputs.log_decay.shape[-1] == 1])
    together = max(1, tile(inputs.x.device) // 4 // (batch * heads * length * length)) * length
    parts = zip(*(t.split(together, 1) for t in inputs), strict=True)
    return [chunk for part in parts for chunk in _chunks_of(DeltaInputs(*part), length)]


def _chunks_of(inputs: DeltaInputs, length: int) -> list[Chunk]:
    """Chunks of a length, the last of which may be shorter; what each of them needs is made of all at once."""
    heads, time = inputs.write.shape[-1], inputs.write.shape[1]
    length = min(length, time)
    chunks = -(-time // length)
    if missing := chunks * length - time:  # strengths of 0 neither write nor erase
        inputs = DeltaInputs(*(torch.cat([t, t.new_zeros(len(t), missing, *t.shape[2:])], 1) for t in inputs))
    # A prompt's chunks as further prompts, chunk by chunk.
    v, k, q, write, erase, g = (t.unflatten(1, (chunks, length)).transpose(0, 1).flatten(0, 1) for t in inputs)
    k, q = (
        rearrange(_by_head(t, heads, -2), "batch time feature key -> batch feature time key").contiguous()
        for t in (k, q)
    )
    v = rearrange(v, "batch time feature width -> batch feature time width")
    write, erase = (rearrange(t, "batch time feature -> batch feature time 1") for t in (write, erase))
    g = rearrange(g, "batch time feature channel -> batch feature time channel")
    # The sum over s+1..t is a difference of running sums; in float64, so that it loses no digits.
    running = g.double().cumsum(2)
    to_end = torch.exp((running[:, :, -1:] - running).to(g.dtype))
    of_keys, of_queries = _decayed_products(k, q, running)
    whole = Chunk(v, k, q, write, erase, torch.exp(running.to(g.dtype)), to_end, erase * of_keys, of_queries)
    if chunks == 1:
        return [whole]
    found = [Chunk(*of) for of in zip(*(t.unflatten(0, (chunks, -1)).unbind() for t in whole), strict=True)]
    if missing:
        last = Chunk(*(t[:, :, : length - missing] for t in found[-1]))
        own = slice(0, length - missing)
        found[-1] = last._replace(system=last.system[..., own], scores=last.scores[..., own])
    return found


def _decayed_products(
    k: Float[Tensor, "batch feature time key"],
    q: Float[Tensor, "batch feature time key"],
    running: Float[Tensor, "batch feature time channel"],
) -> tuple[Float[Tensor, "batch feature time time"], Float[Tensor, "batch feature time time"]]:
    """k_t . D_ts k_s and q_t . D_ts k_s, zero above the diagonal; running are the running sums of the log decays."""
    time = k.shape[2]
    later = torch.ones(time, time, dtype=torch.bool, device=k.device).triu(1)

    def decay(running: Float[Tensor, "*batch time some"]) -> Float[Tensor, "*batch time time some"]:
        between = running[..., None, :] - running[..., None, :, :]
        return torch.exp(between.masked_fill_(later[..., None], -torch.inf).to(k.dtype))

    if running.shape[-1] == 1:
        between = decay(running)[..., 0]
        return (k @ k.mT).mul_(between), (q @ k.mT).mul_(between)
    at_once = CHANNELS.get(k.device.type, 2**26) // (k.shape[0] * k.shape[1] * time * time)
    of_keys, of_queries = (k.new_zeros(*k.shape[:3], time) for _ in range(2))
    if at_once < FEW:  # channel by channel: all at once would need the memory of time x time x key
        for channel in range(running.shape[-1]):
            between = decay(running[..., channel, None])[..., 0] * k[..., None, :, channel]
            of_keys = torch.addcmul(of_keys, between, k[..., channel, None])
            of_queries = torch.addcmul(of_queries, between, q[..., channel, None])
        return of_keys, of_queries
    readers, found = torch.stack([k, q], -1), torch.stack([of_keys, of_queries], -1)  # [B, H, L, K, 2]
    for begin in range(0, running.shape[-1], at_once):
        some = slice(begin, begin + at_once)
        found = found + (decay(running[..., some]) * k[..., None, :, some]) @ readers[..., some, :]
    return found[..., 0], found[..., 1]


def _by_head(values: Float[Tensor, " ..."], heads: int, axis: int) -> Float[Tensor, " ..."]:
    """What groups of heads share, for each head along an axis."""
    groups = values.shape[axis]
    return values if groups == heads else values.repeat_interleave(heads // groups, axis)
