"""Knockout in a state-space token mixer: what Mamba-1 and Mamba-2 share.

The module's own forward runs first and keeps its cache in order. Where something is cut, the targets' outputs are
computed again with the sources' inputs to the scan (and their convolution taps) masked, and put in the place of the
module's; every other position keeps the module's output bit for bit.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from mambalens.hooks.errors import MambalensError
from mambalens.hooks.features import decay_norm
from mambalens.hooks.knockout import Cut
from mambalens.hooks.mixer import Captured, CutsOf, Mixer, Pass, TokenMixing, replace_forward
from mambalens.hooks.rows import Base, Rows


class Projected(NamedTuple):
    """What the input projection gives, before the convolution."""

    gate: Tensor
    """[batch, T, channels]."""
    inner: Tensor
    """Input of the convolution [batch, T, conv channels]."""
    dt: Tensor | None
    """Raw step sizes where they do not go through the convolution (Mamba-2) [batch, T, heads]."""


class ScanInputs(NamedTuple):
    """Inputs of the scan, in float32 or better."""

    x: Tensor
    """[batch, T, features, width]."""
    dt: Tensor
    """Step sizes after softplus [batch, T, features]."""
    A: Tensor
    """[features, state] in Mamba-1, [features] in Mamba-2."""
    B: Tensor
    """[batch, T, groups, state]; one group in Mamba-1."""
    C: Tensor
    """As B."""


class History(NamedTuple):
    """A prompt's mixer inputs and padding so far, for targets that are generated later."""

    hidden: Tensor
    padding: Tensor | None
    state: Tensor
    """The cached state after them, to notice a cache that was reordered in between."""


class Memory(NamedTuple):
    """What rows resume from in a state-space layer."""

    states: Tensor
    """State before the last position, without the inputs of each source set [sets, batch, features, ...]."""
    window: Tensor
    """Inputs of the convolution before the last position [batch, kernel - 1, channels]."""

    @property
    def row_bytes(self) -> int:
        """What a row takes of memory: its state, the decayed state and their product with C."""
        return 3 * self.states[0, 0].numel() * self.states.element_size()


class SSMMixer(Mixer):
    """Base of the adapters for mixers with a causal convolution and a scan."""

    has_conv = True

    @abstractmethod
    def project(self, hidden: Tensor) -> Projected:
        """The input projection of `hidden` [batch, T, width]."""

    @abstractmethod
    def convolve(self, inner: Tensor, keep: list[Tensor] | None) -> Tensor:
        """The causal convolution without activation; `keep[k]` [batch, T, features or 1] for every distance k."""

    @abstractmethod
    def scan_inputs(self, convolved: Tensor, projected: Projected) -> ScanInputs:
        """Split what the convolution gave into the inputs of the scan."""

    @abstractmethod
    def scan(self, inputs: ScanInputs, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scan of `x` [batch, T, features, width] without the skip, and the last state in the cache's layout."""

    @abstractmethod
    def step(self, inputs: ScanInputs, x: Tensor, state: Tensor) -> Tensor:
        """One position [batch, 1, features, width] of the scan, from the state before it in the cache's layout."""

    @abstractmethod
    def alpha(self, inputs: ScanInputs) -> Tensor:
        """Effective attention [batch, features, T, T]."""

    @abstractmethod
    def finish(self, y: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """Gate, norm and output projection of the scan's output with its skip [batch, T, features, width]."""

    @property
    def n_features(self) -> int:
        return int(self.module.A_log.shape[0])

    def decay_norm(self) -> Tensor:
        return decay_norm(self.module.A_log)

    def inputs(self, hidden: Tensor, padding: Tensor | None, cuts: Sequence[Cut]) -> tuple[ScanInputs, Projected]:
        """Inputs of the scan under the cuts of the convolution's taps, and the projection they come from."""
        projected = self.project(_without_padding(hidden, padding))
        kernel = int(self.module.conv_kernel_size)
        keep = kept_taps([cut for cut in cuts if cut.conv], kernel)
        convolved = self.module.act(self.convolve(projected.inner, keep))
        return self.scan_inputs(_without_padding(convolved, padding), projected), projected

    def knocked_out(self, hidden: Tensor, padding: Tensor | None, cuts: Sequence[Cut]) -> tuple[Tensor, Tensor | None]:
        """The mixer's output under the cuts, right at every position where `changed` holds.

        Args:
            hidden: the mixer's input [batch, T, width], from the first column of the prompt.
            padding: 1 for tokens, 0 for padding [batch, T].
            cuts: over these T columns.

        Returns:
            Output [batch, T, width], and the state after the last position where cut taps have changed it.
        """
        inputs, projected = self.inputs(hidden, padding, cuts)
        y, state = self.mix(inputs, cuts, base=any(cut.conv for cut in cuts))
        return self.finish(y + self.skip(inputs) * inputs.x, projected.gate, hidden.dtype), state

    def mix(self, inputs: ScanInputs, cuts: Sequence[Cut], base: bool) -> tuple[Tensor, Tensor | None]:
        """The scan under the cuts of the main path: one more scan for every distinct set of cuts at a target.

        Args:
            base: whether positions that are no target are needed too; without, they hold anything.

        Returns:
            y [batch, T, features, width] without the skip, and with `base` the last state.
        """
        y, state = self.scan(inputs, inputs.x) if base else (torch.zeros_like(inputs.x), None)
        code = target_codes(cuts) if cuts else torch.zeros(())
        for pattern in code.unique().tolist():
            if pattern:
                active = [cut for i, cut in enumerate(cuts) if pattern >> i & 1]
                masked, _ = self.scan(inputs, inputs.x * kept_inputs(active)[..., None])
                y = torch.where((code == pattern)[..., None, None], masked, y)
        return y, state

    def skip(self, inputs: ScanInputs) -> Tensor:
        """The skip D [features, 1]."""
        return self.module.D.to(inputs.x.dtype)[:, None]

    def attach(self, cuts: CutsOf, current: Callable[[], Pass]) -> Callable[[], None]:
        histories: WeakKeyDictionary[Any, History] = WeakKeyDictionary()

        def wrap(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
            signature = inspect.signature(original)

            def forward(*args: Any, **kwargs: Any) -> Tensor:
                given = signature.bind(*args, **kwargs).arguments
                hidden, cache, padding = given["hidden_states"], given.get("cache_params"), given.get("attention_mask")
                running = current()
                history = histories.get(cache) if cache is not None else None
                if running.keep_history and running.past and cache is not None:
                    self._check(history, cache, hidden, running.past)
                out = original(*args, **kwargs)
                if running.keep_history and history is not None and running.past:
                    hidden, padding = _continued(history, hidden, padding)
                active = [cut.to(out.device) for cut in cuts(self) if cut.targets[:, running.past :].any()]
                active = [cut for cut in active if cut.sources.any()]
                if active:
                    changed = changed_positions(active, int(self.module.conv_kernel_size))[:, running.past :]
                    ours, state = self.knocked_out(hidden, padding, active)
                    out = torch.where(changed[..., None], ours[:, running.past :].to(out.dtype), out)
                    if state is not None and cache is not None:
                        cache.update_recurrent_state(state, self.module.layer_idx)
                if running.keep_history and cache is not None:
                    recurrent = cache.get_recurrent_state(self.module.layer_idx).clone()
                    histories[cache] = History(hidden, padding, recurrent)
                return out

            return forward

        return replace_forward(self.module, wrap)

    def _check(self, history: History | None, cache: Any, hidden: Tensor, past: int) -> None:
        """Refuse a cache that is not the one this knockout filled: its state says nothing of single sources."""
        state = cache.get_recurrent_state(self.module.layer_idx)
        same = history is not None and history.hidden.shape[:2] == (hidden.shape[0], past)
        if history is None or not same or not torch.equal(history.state, state):
            raise MambalensError(
                "The cache was filled, reordered or cropped outside this knockout, so targets among generated tokens "
                "cannot be computed: run the prompt inside the block and generate greedily or by sampling."
            )

    def token_mixing(self, call: Captured, cuts: Sequence[Cut]) -> TokenMixing:
        given = call.arguments(self.module)
        hidden = given["hidden_states"]
        cuts = [cut.to(hidden.device) for cut in cuts]
        inputs, _ = self.inputs(hidden, given.get("attention_mask"), cuts)
        y, _ = self.mix(inputs, cuts, base=True)
        alpha = self.alpha(inputs)
        main = [cut for cut in cuts if cut.main]
        if main:
            alpha = alpha.masked_fill(blocked_entries(main), 0.0)
        return TokenMixing(alpha, inputs.x, self.skip(inputs)[:, 0], y + self.skip(inputs) * inputs.x)

    def remember(self, call: Captured, base: Base) -> Memory:
        given = call.arguments(self.module)
        hidden = given["hidden_states"]
        inputs, projected = self.inputs(hidden, None, ())
        # A step size of zero neither decays nor writes: the state stays what it was before the last position.
        inputs = inputs._replace(dt=inputs.dt * base.before_last[..., None])
        states = [self.scan(inputs, inputs.x * ~source[..., None, None])[1] for source in base.sources]
        reach = int(self.module.conv_kernel_size) - 1
        at = base.last[:, None] + torch.arange(reach, device=hidden.device)  # columns of the padded input
        window = F.pad(projected.inner, (0, 0, reach, 0))
        window = window.gather(1, at[..., None].expand(-1, -1, window.shape[-1]))
        return Memory(torch.stack(states), window)

    @contextmanager
    def resuming(self, memory: Memory, base: Base, rows: Rows, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.resume(memory, base, rows, hidden_states)

        restore = replace_forward(self.module, lambda original: forward)
        try:
            yield kwargs | {"cache_params": None, "attention_mask": None}
        finally:
            restore()

    def resume(self, memory: Memory, base: Base, rows: Rows, hidden: Tensor) -> Tensor:
        """The mixer's output for rows [rows, 1, width]: the convolution's last step, and the scan's."""
        projected = self.project(hidden)
        kernel = int(self.module.conv_kernel_size)
        inner = torch.cat([memory.window[rows.prompt], projected.inner], 1)  # [R, kernel, channels]
        keep = None
        if rows.conv.any():
            keep = []
            for k in range(kernel):
                column = base.last[rows.prompt] - k
                cut = base.sources[rows.source, rows.prompt, column.clamp_min(0)] & (column >= 0) & rows.conv
                keep.append(~_by_feature(cut[:, None], None if rows.features is None else rows.features[:, None]))
        convolved = self.module.act(self.convolve(inner, keep)[:, -1:])
        inputs = self.scan_inputs(convolved, projected)
        cut_set = torch.where(rows.main, rows.source, 0)
        state = memory.states[cut_set, rows.prompt]  # [R, features, ...]
        own = ~(base.sources[cut_set, rows.prompt, base.last[rows.prompt]])[:, None]  # [R, 1]
        if rows.features is not None:
            cut = rows.features.reshape(*rows.features.shape, *[1] * (state.ndim - 2))
            state = torch.where(cut, state, memory.states[0, rows.prompt])
            own = own | ~rows.features
        y = self.step(inputs, inputs.x * own[:, None, :, None], state)
        return self.finish(y + self.skip(inputs) * inputs.x, projected.gate, hidden.dtype)

    def parity(self, call: Captured) -> float:
        given = call.arguments(self.module)
        hidden = given["hidden_states"]
        inputs, projected = self.inputs(hidden, given.get("attention_mask"), ())
        y, _ = self.mix(inputs, (), base=True)
        ours = self.finish(y + self.skip(inputs) * inputs.x, projected.gate, hidden.dtype)
        return float((ours - call.output).abs().max() / call.output.abs().max().clamp_min(1e-30))


def target_codes(cuts: Sequence[Cut]) -> Tensor:
    """Which of the cuts of the main path hold at each target, as the bits of a number [batch, T]."""
    code = torch.zeros(cuts[0].targets.shape, dtype=torch.long, device=cuts[0].targets.device)
    for i, cut in enumerate(cuts):
        if cut.main:
            code = code + (cut.targets.long() << i)
    return code


def kept_inputs(cuts: Sequence[Cut]) -> Tensor:
    """1 where the scan keeps a source's input under all of the cuts together [batch, T, features or 1]."""
    dropped = torch.zeros((*cuts[0].sources.shape, 1), dtype=torch.bool, device=cuts[0].sources.device)
    for cut in cuts:
        dropped = dropped | _by_feature(cut.sources, cut.features)
    return ~dropped


def kept_taps(cuts: Sequence[Cut], kernel: int) -> list[Tensor] | None:
    """For every distance k, 1 where the tap from t-k to t stays [batch, T, features or 1]; None if all do."""
    if not cuts:
        return None
    keep = []
    for k in range(kernel):
        dropped = torch.zeros((*cuts[0].targets.shape, 1), dtype=torch.bool, device=cuts[0].targets.device)
        for cut in cuts:
            time = cut.sources.shape[1]
            source = F.pad(cut.sources[:, : max(time - k, 0)], (min(k, time), 0))  # sources[t-k] at t
            dropped = dropped | _by_feature(cut.targets & source, cut.features)
        keep.append(~dropped)
    return keep


def blocked_entries(cuts: Sequence[Cut]) -> Tensor:
    """Entries alpha[t, s] that the cuts block [batch, features or 1, T, S]."""
    blocked = torch.zeros((), dtype=torch.bool, device=cuts[0].targets.device)
    for cut in cuts:
        pair = cut.targets[:, None, :, None] & cut.sources[:, None, None, :]
        blocked = blocked | (pair if cut.features is None else pair & cut.features[None, :, None, None])
    return blocked


def changed_positions(cuts: Sequence[Cut], kernel: int) -> Tensor:
    """Positions whose output the cuts can change [batch, T].

    A cut of the scan changes its targets. A cut tap changes what the target writes into the state, so everything from
    it on.
    """
    changed = target_codes(cuts) != 0
    taps = kept_taps([cut for cut in cuts if cut.conv], kernel)
    if taps is not None:
        cut_here = torch.stack([(~keep).any(-1) for keep in taps]).any(0)
        changed = changed | (cut_here.long().cumsum(1) > 0)
    return changed


def _by_feature(mask: Tensor, features: Tensor | None) -> Tensor:
    """A mask [batch, T] for the given features [batch, T, features], or for all of them [batch, T, 1]."""
    return mask[..., None] if features is None else mask[..., None] & features


def _continued(history: History, hidden: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Inputs and padding of the prompt so far with the new ones behind them."""
    if history.padding is not None:
        new = history.padding.new_ones(hidden.shape[:2]) if padding is None else padding
        padding = torch.cat([history.padding, new], 1)
    return torch.cat([history.hidden, hidden], 1), padding


def _without_padding(hidden: Tensor, padding: Tensor | None) -> Tensor:
    """Zero at padding, as transformers does before and after the convolution."""
    return hidden if padding is None else (hidden * padding[..., None]).to(hidden.dtype)
