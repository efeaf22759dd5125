"""What an adapter says of a token mixer that is a recurrence, linear in its values.

    S_t = T_t(S_{t-1}) + what position t writes, linear in x_t        y_t = what position t reads of S_t  (+ a skip)

behind projections and, mostly, a causal convolution; a gate, norm and output projection follow. The transition T_t may
decay the state (state-space models, gated linear recurrences) and remove something from it (delta rules).
`recurrent.RecurrentMixer` makes knockouts, effective attention and replay of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from mambalens.hooks import pointwise, scan
from mambalens.hooks.calls import recurrent_state
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut
from mambalens.hooks.mixer import Mixer
from mambalens.hooks.token_mixing import Decay

AT_ONCE = 2**22
"""Numbers of effective attention that are made at a time."""


class Projected(NamedTuple):
    """What the input projection gives, before the convolution."""

    gate: Float[Tensor, "batch time inner"]
    inner: Float[Tensor, "batch time channel"]
    """Input of the convolution."""
    beside: Float[Tensor, "batch time other"] | None
    """What the scan takes beside it, such as raw step sizes (Mamba-2) or decays and strengths (delta rules)."""


Index = Int[Tensor, " some"] | tuple[slice, Int[Tensor, " some"]]
"""Prompts, or every prompt and some rows."""


@runtime_checkable
class Inputs(Protocol):
    """Inputs of a recurrence, in float32 or better: what its positions write, keep, remove and read."""

    @property
    def x(self) -> Float[Tensor, "*batch time feature width"]:
        """The values, which the recurrence is linear in."""

    def cut(
        self,
        values: Bool[Tensor, "*#batch time #feature"] | None,
        erasures: Bool[Tensor, "*#batch time #feature"] | None,
        instead: Float[Tensor, "*#batch time feature width"] | None = None,
    ) -> Inputs:
        """The same with the values, and what is removed from the state, only where these are 1; None: everywhere.

        Args:
            values, erasures: which are kept.
            instead: what stands where values are not kept; zero by default.
        """

    def with_values(self, x: Float[Tensor, "*batch time feature width"]) -> Inputs:
        """The same with other values."""

    def frozen(self, moving: Bool[Tensor, "batch time"]) -> Inputs:
        """The same with positions outside `moving` leaving the state as they find it."""

    def by_row(self, rows: int) -> Inputs:
        """What belongs to rows side by side [batch, rows x length, ...], row by row [batch, rows, length, ...]."""

    def of(self, index: Index) -> Inputs:
        """The inputs of some prompts, which may be named several times, or of some rows."""

    def own_entry(self) -> Float[Tensor, "*batch time feature"]:
        """alpha[t, t]: what a position's own value adds to its output, without the skip."""


State = Any
"""State of a prompt's features [batch, ...], as an adapter keeps it."""
States = Callable[[int, int], State]
"""State without the values of one source set and the erasures of another, by their numbers; 0 leaves out nothing."""


class Other(NamedTuple):
    """Values that stand in the place of some positions'."""

    values: Float[Tensor, "batch time feature width"]
    sources: Bool[Tensor, "set batch time"]
    """Which positions, set by set."""


def _is_silu(module: nn.Module) -> bool:
    """Whether it is x sigmoid(x), and nothing that somebody has hung on it."""
    if type(module) not in (nn.SiLU, SiLUActivation):
        return False
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


class Recurrence(Mixer):
    """The arithmetic of a mixer that is a recurrence."""

    masks_input: ClassVar[bool] = True
    """Whether the module sets padding to zero before everything else."""
    masks_convolved: ClassVar[bool] = True
    """Whether the module sets padding to zero behind the convolution and its activation too."""
    remembers: ClassVar[bool] = True
    """Whether there is a state behind the convolution, by which a cut tap reaches positions right of its target."""
    alone: ClassVar[bool] = True
    """Whether the module gives its output alone, not with something behind it."""

    @property
    def convolution(self) -> nn.Conv1d | None:
        """The causal convolution before the recurrence; None where there is none."""
        return self.module.conv1d

    @property
    def kernel(self) -> int:
        """Positions that the convolution sees, the own one among them; 1 where there is none."""
        return 1 if self.convolution is None else int(self.convolution.kernel_size[0])

    @property
    def convolution_bias(self) -> Float[Tensor, " channel"] | None:
        """What it adds to every output."""
        return None if self.convolution is None else self.convolution.bias

    def reach(self, path: Paths) -> int | None:
        return self.kernel - 1 if path is Paths.CONV else None

    @property
    def activation(self) -> nn.Module:
        """The activation behind the convolution."""
        return self.module.act

    def told(
        self, given: Mapping[str, Any]
    ) -> tuple[Float[Tensor, "batch time given"], Shaped[Tensor, "batch time"] | None]:
        """What a call of the module says of every position, and its padding: 1 for tokens, 0 for padding.

        The mixer's input, as `project` takes it. What else the module is told of a position stands behind it.

        Args:
            given: the call's arguments by name.
        """
        return given["hidden_states"], given.get("attention_mask")

    @abstractmethod
    def project(self, hidden: Float[Tensor, "batch time given"]) -> Projected:
        """The input projection, which takes every position alone."""

    def channels_by_feature(self, device: torch.device) -> tuple[Int[Tensor, " wider"], Int[Tensor, " wider"]] | None:
        """Channels of the convolution, those that features share once for each, and the feature of each of them.

        None where every channel is a feature.
        """
        return None

    def convolve(
        self,
        inner: Float[Tensor, "*batch time channel"],
        keep: list[Bool[Tensor, "*#batch #time feature"]] | None,
        past: Float[Tensor, "*#batch before channel"] | None = None,
        instead: Sequence[Instead] = (),
    ) -> Float[Tensor, "*batch time wider"]:
        """The causal convolution without activation.

        Where taps are cut for some features only, what features share is convolved for each of them.

        Args:
            inner: input.
            keep: for every distance k, which taps stay, of every feature or of all; None for all.
            past: inputs before the first; zero by default.
            instead: what is read where taps are cut; nothing by default.
        """
        if self.convolution is None:
            return inner
        weight, bias = self.convolution.weight[:, 0], self.convolution_bias
        found = None if keep is None or keep[0].shape[-1] == 1 else self.channels_by_feature(inner.device)
        if keep is not None and found is not None:
            channels, feature = found
            inner, weight, keep = inner[..., channels], weight[channels], [taps[..., feature] for taps in keep]
            bias = None if bias is None else bias[channels]
            past = None if past is None else past[..., channels]
            instead = [other.by_feature(channels, feature, self.n_features) for other in instead]
        out = scan.causal_conv(inner, weight, bias, keep, past)
        for other in instead:
            out = out + scan.causal_conv(other.inner.to(out.dtype), weight, None, other.taps, other.past)
        return out

    def convolved(
        self,
        inner: Float[Tensor, "*batch time channel"],
        keep: list[Bool[Tensor, "*#batch #time feature"]] | None,
        past: Float[Tensor, "*#batch before channel"] | None = None,
        instead: Sequence[Instead] = (),
    ) -> Float[Tensor, "*batch time wider"]:
        """`convolve` with the activation behind it, both at once where that can be."""
        if keep is None and not instead and self.convolution is not None and _is_silu(self.activation):
            return pointwise.silu_conv(inner, self.convolution.weight[:, 0], self.convolution_bias, past)
        return self.activation(self.convolve(inner, keep, past, instead))

    @abstractmethod
    def scan_inputs(
        self, convolved: Float[Tensor, "batch time channel"], beside: Float[Tensor, "batch time other"] | None
    ) -> Inputs:
        """Split what the convolution gave, after the activation, into the inputs of the recurrence.

        Args:
            convolved: that.
            beside: what `project` gives of the same positions for it.
        """

    @abstractmethod
    def scan(
        self, inputs: Any, end: bool = False
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        """What positions read, without the skip, and with `end` the last state as caches have it."""

    @abstractmethod
    def states(self, inputs: Any, sources: Bool[Tensor, "set batch time"]) -> States:
        """States after the last position without each of the source sets; set 0 is empty."""

    def scan_and_states(
        self, inputs: Any, sources: Bool[Tensor, "set batch time"]
    ) -> tuple[Float[Tensor, "batch time feature width"], States]:
        """`scan` and `states` of the same inputs."""
        return self.scan(inputs)[0], self.states(inputs, sources)

    def replaced_states(
        self,
        inputs: Any,
        moving: Bool[Tensor, "batch time"],
        sources: Bool[Tensor, "set batch time"],
        others: Sequence[Other],
    ) -> States:
        """States after the last position without each of the source sets, with other values at some positions.

        Equation: Ablation
            h_t = sum_{s<=t} (decay from s to t) dt_s B_s x_s + sum_{s in S} (decay from s to t) dt_s B_s (x~_s - x_s)

            Source: this package; the state is linear in x (Gu & Dao 2023, arXiv:2312.00752, eq. 2)

        Args:
            inputs: as for `scan`; frozen outside `moving`.
            moving: positions that do something to the state.
            sources: as for `states`: what each set does without.
            others: values that stand in the place of some positions', set by set.
        """
        same = not bool(sources.any())
        whole = self.states(inputs, sources[:1] if same else sources)
        changes = []
        for other in others:
            change = inputs.with_values(other.values.to(inputs.x.dtype) - inputs.x).frozen(moving)
            changes.append(self.states(change, ~other.sources))

        def state(written: int, erased: int) -> State:
            found = whole(*((0, 0) if same else (written, erased)))
            for change in changes:
                found = added(found, change(written, 0))
            return found

        return state

    @abstractmethod
    def under(
        self,
        hidden: Float[Tensor, "batch time given"],
        padding: Shaped[Tensor, "batch time"] | None,
        cuts: Sequence[Cut],
    ) -> tuple[Float[Tensor, "batch time hidden"], tuple[Any, Float[Tensor, "batch time channel"]]]:
        """The mixer's output under cuts, at every position, the recurrence's inputs and those of the convolution.

        Args:
            hidden: the mixer's input, as `told` gives it.
            padding: 1 for tokens, 0 for padding.
            cuts: over these T columns.
        """

    @abstractmethod
    def resume_scan(
        self, inputs: Any, states: Sequence[State], number: Int[Tensor, " row"]
    ) -> Float[Tensor, "batch row time feature width"]:
        """What rows read that resume from their prompts' states, without the skip.

        Args:
            inputs: as for `scan`, but of rows.
            states: some that `states` gave.
            number: which of them each row resumes from; on the CPU, so that nobody waits for a device to know.
        """

    @abstractmethod
    def alpha(self, inputs: Any, features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
        """Effective attention of the features with these numbers."""

    def edge_effects(
        self, inputs: Any, gradient: Float[Tensor, "batch time feature width"], features: Int[Tensor, " some"]
    ) -> Float[Tensor, "batch time time"]:
        """What every position hands to every other over the scan, times a gradient, of some features together.

        Args:
            inputs: as for `scan`.
            gradient: of what positions read.
            features: numbers of the features.

        Returns:
            Targets in rows; what stands at s >= t means nothing.
        """
        batch, time = inputs.x.shape[:2]
        found = gradient.new_zeros(batch, time, time)
        for some in features.split(max(1, AT_ONCE // (batch * time * time))) if len(features) else ():
            alpha = self.alpha(inputs, some)  # [B, f, T, T]
            handed = torch.einsum("btfp,bsfp->bfts", gradient[:, :, some], inputs.x[:, :, some])
            found += torch.linalg.vecdot(alpha, handed, dim=1)
        return found

    @abstractmethod
    def finish(
        self, y: Float[Tensor, "batch time feature width"], gate: Float[Tensor, "batch time inner"], dtype: torch.dtype
    ) -> Float[Tensor, "batch time hidden"]:
        """Gate, norm and output projection of what was read, with its skip.

        Takes every position alone.
        """

    @property
    @abstractmethod
    def state_numbers(self) -> int:
        """Numbers of a prompt's state, of all features."""

    def erasures(self, inputs: Any) -> Any:
        """Inputs whose values are what positions erase: alpha[t, s] x_s of them is what erasing by s adds to y_t."""
        raise NotImplementedError(f"{self.kind} erases nothing")

    def decay(self, inputs: Any) -> Decay | None:
        """How the features forget; None where that says nothing."""
        return None

    def skip(self, inputs: Any) -> Float[Tensor, "feature 1"]:
        """The skip D; zero where there is none."""
        return inputs.x.new_zeros(self.n_features, 1)

    def with_skip(
        self, y: Float[Tensor, "*batch feature width"], inputs: Any, in_place: bool = False
    ) -> Float[Tensor, "*batch feature width"]:
        """What was read, with the skip."""
        return y

    def cached_state(self, cache: Any) -> Float[Tensor, " batch *state"]:
        """The state that the module has left in a cache."""
        return recurrent_state(cache, self.module.layer_idx)

    def cache_state(self, cache: Any, state: Float[Tensor, " batch *state"]) -> None:
        """Put another state in its place."""
        cache.update_recurrent_state(state, self.module.layer_idx)


class Instead(NamedTuple):
    """Other inputs of a convolution, which some of its taps read."""

    taps: list[Bool[Tensor, "*batch time feature"]]
    """For every distance k, 1 where the tap from t-k to t reads them, of every feature or of all."""
    inner: Float[Tensor, "*batch time channel"]
    past: Float[Tensor, "*batch before channel"] | None = None
    """Those before the first; zero by default."""

    def by_feature(self, channels: Int[Tensor, " wider"], feature: Int[Tensor, " wider"], count: int) -> Instead:
        """The same with channels that features share once for each of them."""
        taps = [taps.expand(*taps.shape[:-1], count)[..., feature] for taps in self.taps]
        return Instead(taps, self.inner[..., channels], None if self.past is None else self.past[..., channels])


def added(one: State, other: State) -> State:
    """The sum of two states."""
    if isinstance(one, list):
        return [added(part, of_other) for part, of_other in zip(one, other, strict=True)]
    return one if other is None else one + other


def side_by_side(values: Shaped[Tensor, "batch row_time *rest"], rows: int) -> Shaped[Tensor, "batch row time *rest"]:
    """What belongs to rows side by side, row by row."""
    return values.unflatten(1, (rows, -1))
