"""Delta-rule token mixers: what Gated DeltaNet and Kimi Delta Attention share.

Queries, keys and values go through one causal convolution, head by head into the recurrence of `delta`, and through a
gated norm. A position does two things to the state: it writes its value along its key, and it erases what stood there.
The path 'main' cuts the one, 'erase' the other; 'conv' the taps that queries, keys and values come from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mambalens.hooks import delta
from mambalens.hooks.delta import DeltaInputs
from mambalens.hooks.indices import having
from mambalens.hooks.knockout import Paths
from mambalens.hooks.recurrence import Other, State, States
from mambalens.hooks.recurrent import RecurrentMixer

EPSILON = 1e-6
"""Added to the squared length of keys and queries, as transformers and flash-linear-attention do."""


class DeltaMixer(RecurrentMixer):
    """A feature is a head of the values.

    Heads may share keys and queries, which go through the convolution too. Where taps are cut for some heads only, each
    of those heads writes, erases and reads with the cut keys and queries, its neighbours with the whole ones.
    """

    paths = Paths.MAIN | Paths.CONV | Paths.ERASE
    decays = True
    masks_convolved = False

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads of the keys, heads of the values, width of a key, width of a value."""

    @abstractmethod
    def strengths(
        self, beside: Float[Tensor, "batch time other"]
    ) -> tuple[Float[Tensor, "batch time feature"], Float[Tensor, "batch time feature channel"]]:
        """Strengths beta and log decays g of every head, in float32 or better."""

    @property
    def n_features(self) -> int:
        return self.sizes[1]

    @property
    def state_numbers(self) -> int:
        _, heads, key, value = self.sizes
        return heads * key * value

    def kept_numbers(self, time: int, sets: int) -> int:
        _, heads, key, value = self.sizes
        # A set may be left out of what is written, of what is erased or of both: a state each, and writes of its own.
        return sets * (3 * self.state_numbers + time * heads * key) + 2 * time * heads * (key + value)

    @property
    def activation(self) -> nn.Module:
        return ACT2FN[self.module.activation]

    def channels_by_feature(self, device: torch.device) -> tuple[Int[Tensor, " wider"], Int[Tensor, " wider"]]:
        """Queries and keys once for each head: [q of head 1, q of head 2, ... | k of head 1, ... | v]."""
        groups, heads, key, value = self.sizes
        at = torch.arange(groups * key, device=device)
        at = repeat(at, "(group key) -> (group head key)", group=groups, head=heads // groups)
        values = torch.arange(heads * value, device=device)
        of_keys, of_values = (torch.arange(heads, device=device).repeat_interleave(n) for n in (key, value))
        channels = torch.cat([at, at + groups * key, values + 2 * groups * key])
        return channels, torch.cat([of_keys, of_keys, of_values])

    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], beside: Float[Tensor, "batch time other"] | None
    ) -> DeltaInputs:
        _, heads, key, value = self.sizes
        precise = torch.promote_types(convolved.dtype, torch.float32)
        keys = (convolved.shape[-1] - heads * value) // 2
        q, k, v = convolved.to(precise).split([keys, keys, heads * value], -1)
        q, k = (_unit(rearrange(t, "batch time (group key) -> batch time group key", key=key)) for t in (q, k))
        v = rearrange(v, "batch time (head width) -> batch time head width", head=heads)
        assert beside is not None
        beta, log_decay = self.strengths(beside.to(precise))
        return DeltaInputs(v, k, q * key**-0.5, beta, beta, log_decay)

    def scan(
        self, inputs: DeltaInputs, end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        return delta.delta_scan(inputs, end=end)

    def states(self, inputs: DeltaInputs, sources: Bool[Tensor, "set batch time"]) -> States:
        return delta.delta_states(inputs, delta.in_chunks(inputs), sources)

    def scan_and_states(
        self, inputs: DeltaInputs, sources: Bool[Tensor, "set batch time"]
    ) -> tuple[Float[Tensor, "batch time feature width"], States]:
        chunks = delta.in_chunks(inputs)  # for both
        return delta.delta_scan(chunks, end=False)[0], delta.delta_states(inputs, chunks, sources)

    def replaced_states(
        self,
        inputs: DeltaInputs,
        moving: Bool[Tensor, "batch time"],
        sources: Bool[Tensor, "set batch time"],
        others: Sequence[Other],
    ) -> States:
        return delta.delta_states(inputs, delta.in_chunks(inputs), sources, others)

    def resume_scan(
        self, inputs: DeltaInputs, states: Sequence[State], number: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch row time feature width"]:
        if inputs.x.shape[2] == 1:
            return delta.delta_step(DeltaInputs(*(t[:, :, 0] for t in inputs)), states, number)[:, :, None]
        y = torch.empty_like(inputs.x)
        for index, state in enumerate(states):
            rows = having(number, index, y.device)
            for i, start in enumerate(state.state):
                y[i, rows] = delta.delta_scan(DeltaInputs(*(t[i, rows] for t in inputs)), start[None], end=False)[0]
        return y

    def erasures(self, inputs: DeltaInputs) -> DeltaInputs:
        return delta.delta_erasures(inputs)

    def alpha(self, inputs: DeltaInputs, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        return delta.delta_attention(inputs.of_heads(features))

    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        norm, out = _first(self.module, "norm", "o_norm"), _first(self.module, "out_proj", "o_proj")
        # One row a head, as the module does: kernels from the hub want it so.
        normed = norm(y.to(dtype).flatten(0, 2), gate.unflatten(-1, y.shape[2:]).flatten(0, 2))
        return out(normed.view(y.shape).flatten(2))


def _unit(vectors: Float[Tensor, "*batch key"]) -> Float[Tensor, "*batch key"]:
    """Vectors of length 1."""
    return vectors * torch.rsqrt(torch.linalg.vecdot(vectors, vectors)[..., None] + EPSILON)


def _first(module: Any, *names: str) -> nn.Module:
    """The submodule under the first of the names that it has."""
    return next(getattr(module, name) for name in names if hasattr(module, name))
