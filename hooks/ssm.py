"""Knockout in a state-space token mixer: what Mamba-1 and Mamba-2 share.

The module's own forward runs first and keeps its cache in order. Where something is cut, the targets' outputs are
computed again with the sources' inputs to the scan (and their convolution taps) masked, and put in the place of the
module's; every other position keeps the module's output bit for bit.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambalens.hooks.calls import bound, cache_among, recurrent_state
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.groups import decay_norm
from mambalens.hooks.knockout import Cut
from mambalens.hooks.mixer import Captured, CutsOf, Mixer, Pass, replace_forward, weights_at_hand
from mambalens.hooks.resume import Base, Rows
from mambalens.hooks.token_mixing import Decay, TokenMixing


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

    states: list[Tensor]
    """State before the first replayed position, without the inputs of each source set [batch, ...]."""
    window: Tensor
    """Inputs of the convolution before it [batch, kernel - 1, channels]."""
    most_cuts: int
    """See `Mixer.remembering`."""


class SSMMixer(Mixer):
    """Base of the adapters for mixers with a causal convolution and a scan."""

    has_conv = True
    decays = True
    tested: ClassVar[frozenset[str]]
    """Classes of modules whose arithmetic the tests compare with the adapter's."""
    parts: ClassVar[tuple[str, ...]]
    """Attributes that a module of this kind has."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        A_log = getattr(module, "A_log", None)
        dimensions = 2 if cls.kind == "mamba1" else 1
        return isinstance(A_log, Tensor) and A_log.ndim == dimensions and all(hasattr(module, p) for p in cls.parts)

    @property
    def familiar(self) -> bool:
        return type(self.module).__name__ in self.tested

    @abstractmethod
    def project(self, hidden: Tensor) -> Projected:
        """The input projection of `hidden` [batch, T, width], which takes every position alone."""

    @abstractmethod
    def convolve(self, inner: Tensor, keep: list[Tensor] | None, past: Tensor | None = None) -> Tensor:
        """The causal convolution without activation of `inner` [..., T, channels].

        Args:
            inner: input.
            keep: for every distance k, which taps stay [..., T, features or 1]; None for all.
            past: inputs before the first [..., kernel - 1, channels]; zero by default.
        """

    @abstractmethod
    def scan_inputs(self, convolved: Tensor, dt: Tensor | None) -> ScanInputs:
        """Split what the convolution gave, after the activation [batch, T, channels], into the inputs of the scan.

        Args:
            convolved: that.
            dt: raw step sizes of the same positions, as `project` gives them.
        """

    @abstractmethod
    def scan(self, inputs: ScanInputs, x: Tensor, end: bool = False) -> tuple[Tensor, Tensor | None]:
        """The scan of `x` [batch, T, features, width] without the skip, and with `end` the last state as caches do."""

    @abstractmethod
    def states(self, inputs: ScanInputs, keep: Tensor) -> list[Tensor]:
        """States [batch, ...] after the last position for several choices of inputs `keep` [sets, batch, T]."""

    @abstractmethod
    def resume_scan(self, inputs: ScanInputs, x: Tensor, states: list[Tensor], number: Tensor) -> Tensor:
        """The scan of rows that resume from their prompts' states.

        Args:
            inputs: as for `scan`, but [batch, rows, length, ...].
            x: [batch, rows, length, features, width].
            states: from `states`.
            number: which of them each row resumes from [rows].

        Returns:
            y without the skip, as x.
        """

    @abstractmethod
    def alpha(self, inputs: ScanInputs, features: Tensor) -> Tensor:
        """Effective attention [batch, n, T, T] of the features with these numbers [n]."""

    @abstractmethod
    def decay(self, inputs: ScanInputs) -> Decay:
        """How the features forget."""

    @abstractmethod
    def finish(self, y: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """Gate, norm and output projection of the scan's output with its skip [batch, T, features, width].

        Takes every position alone.
        """

    @property
    def n_features(self) -> int:
        return int(self.module.A_log.shape[0])

    def decay_norm(self) -> Tensor:
        with weights_at_hand(self.module):
            return decay_norm(self.module.A_log)

    def inputs(self, hidden: Tensor, padding: Tensor | None, cuts: Sequence[Cut]) -> tuple[ScanInputs, Projected]:
        """Inputs of the scan under the cuts of the convolution's taps, and the projection they come from."""
        projected = self.project(_without_padding(hidden, padding))
        kernel = int(self.module.conv_kernel_size)
        keep = kept_taps([cut for cut in cuts if cut.conv], kernel)
        convolved = self.module.act(self.convolve(projected.inner, keep))
        return self.scan_inputs(_without_padding(convolved, padding), projected.dt), projected

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
        y, state = self.scan(inputs, inputs.x, end=True) if base else (torch.zeros_like(inputs.x), None)
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
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                given = bound(self.module, args, kwargs)
                hidden, padding = given["hidden_states"], given.get("attention_mask")
                cache = cache_among(given.values())
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
                    with weights_at_hand(self.module):
                        ours, state = self.knocked_out(hidden, padding, active)
                    out = torch.where(changed[..., None], ours[:, running.past :].to(out.dtype), out)
                    if state is not None and cache is not None:
                        cache.update_recurrent_state(state, self.module.layer_idx)
                if running.keep_history and cache is not None:
                    recurrent = recurrent_state(cache, self.module.layer_idx).clone()
                    histories[cache] = History(hidden, padding, recurrent)
                return out

            return forward

        return replace_forward(self.module, wrap)

    def _check(self, history: History | None, cache: Any, hidden: Tensor, past: int) -> None:
        """Refuse a cache that is not the one this knockout filled: its state says nothing of single sources."""
        state = recurrent_state(cache, self.module.layer_idx)
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
        with weights_at_hand(self.module):
            inputs, _ = self.inputs(hidden, given.get("attention_mask"), cuts)
            skip = self.skip(inputs)
        y, _ = self.mix(inputs, cuts, base=True)
        per_group = inputs.dt.shape[2] // inputs.B.shape[2]
        diagonal = (inputs.B * inputs.C).sum(-1).repeat_interleave(per_group, 2) * inputs.dt  # [B, T, F]
        main = [cut for cut in cuts if cut.main]
        blocked = blocked_entries(main) if main else None  # [B, F or 1, T, T]
        if blocked is not None:
            diagonal = diagonal.masked_fill(blocked.diagonal(dim1=-2, dim2=-1).transpose(1, 2), 0.0)

        def alpha_of(features: Tensor) -> Tensor:
            alpha = self.alpha(inputs, features)
            if blocked is None:
                return alpha
            return alpha.masked_fill_(blocked if blocked.shape[1] == 1 else blocked[:, features], 0.0)

        output = y + skip * inputs.x
        return TokenMixing(inputs.x, skip[:, 0], output, diagonal, alpha_of, self.decay(inputs))

    @contextmanager
    def remembering(self, base: Base) -> Iterator[list[Memory]]:
        kept: list[Memory] = []

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with weights_at_hand(self.module):
                return remember(hidden_states)

        def remember(hidden_states: Tensor) -> Tensor:
            here = base.to(hidden_states.device)
            # Positions from the first replayed one on, and padding, are left out wherever tokens stand alone.
            batch, time = len(here.first), here.reach
            gate, inner, dt = self.project(hidden_states[here.tokens][None])
            inner = _spread(inner, here.tokens, batch, time)
            dt = None if dt is None else _spread(dt, here.tokens, batch, time)
            inputs = self.scan_inputs(self.module.act(self.convolve(inner, None)), dt)
            y, _ = self.scan(inputs, inputs.x)
            # A step size of zero neither decays nor writes: the state stays what it was before the first replayed one.
            before = here.before[:, :time, None]
            states = self.states(inputs._replace(dt=inputs.dt * before), ~here.sources[..., :time])
            past = int(self.module.conv_kernel_size) - 1
            at = here.first[:, None] + torch.arange(past, device=here.first.device)  # columns of the padded input
            window = F.pad(inner, (0, 0, past, 0))
            window = window.gather(1, at[..., None].expand(-1, -1, window.shape[-1]))
            kept.append(Memory(states, window, sys.maxsize))
            y = torch.addcmul(y, self.skip(inputs), inputs.x)[here.tokens][None]
            out = self.finish(y, gate, hidden_states.dtype)
            return _spread(out, here.tokens, *hidden_states.shape[:2])

        restore = replace_forward(self.module, lambda original: forward)
        try:
            yield kept
        finally:
            restore()

    def kept_numbers(self, time: int, sets: int) -> int:
        return sets * self.module.A_log.numel() * self.state_width

    @property
    def state_width(self) -> int:
        """Numbers of a feature's state for each number of `A_log`."""
        return 1

    @contextmanager
    def resuming(self, memory: Memory, base: Base, rows: Rows) -> Iterator[None]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            device = hidden_states.device
            with weights_at_hand(self.module):
                return self.resume(memory, base.to(device), rows.to(device), hidden_states)

        restore = replace_forward(self.module, lambda original: forward)
        try:
            yield
        finally:
            restore()

    def resume(self, memory: Memory, base: Base, rows: Rows, hidden: Tensor) -> Tensor:
        """The mixer's output for rows [batch, cuts x length, width]."""
        projected = self.project(hidden)
        inner = projected.inner.unflatten(1, (len(rows), base.length))  # [B, R, L, channels]
        keep = self._kept_taps_of_rows(base, rows) if rows.conv.any() else None
        convolved = self.module.act(self.convolve(inner, keep, memory.window[:, None])).flatten(1, 2)
        inputs = self.scan_inputs(convolved, projected.dt)
        x = inputs.x.unflatten(1, (len(rows), base.length))  # [B, R, L, F, P]
        dt, B, C = (t.unflatten(1, (len(rows), base.length)) for t in (inputs.dt, inputs.B, inputs.C))
        rowwise = ScanInputs(x, dt, inputs.A, B, C)
        number = torch.where(rows.main, rows.source, 0)
        y = self._cut_rows(rowwise, memory, base, number, rows.features).flatten(1, 2)
        return self.finish(y.addcmul_(self.skip(inputs), inputs.x), projected.gate, hidden.dtype)

    def _cut_rows(
        self, inputs: ScanInputs, memory: Memory, base: Base, number: Tensor, features: Tensor | None
    ) -> Tensor:
        """The scan of rows [batch, rows, length, ...] whose targets read nothing of a source set each."""
        kept = ~base.own_sources[number].transpose(0, 1)[..., None, None]  # [B, R, L, 1, 1]
        masked = inputs.x if kept.all() else inputs.x * kept
        y = self.resume_scan(inputs, masked, memory.states, number)
        if features is None and (base.all_targets or not number.any()):
            return y
        cut = base.targets[:, None, :, None]  # [B, 1, L, 1]
        if features is not None:
            cut = cut & features[None, :, None]
        whole = self.resume_scan(inputs, inputs.x, memory.states, torch.zeros_like(number))
        return torch.where(cut[..., None], y, whole)

    def _kept_taps_of_rows(self, base: Base, rows: Rows) -> list[Tensor]:
        """For every distance k, 1 where the tap from t-k to t stays [batch, cuts, length, features or 1]."""
        keep = []
        for k in range(int(self.module.conv_kernel_size)):
            columns = base.columns - k  # [B, L]
            source = base.sources.gather(2, columns.clamp_min(0).expand(len(base.sources), -1, -1))
            cut = (source & (columns >= 0) & base.targets)[rows.source] & rows.conv[:, None, None]  # [R, B, L]
            features = None if rows.features is None else rows.features[None, :, None]
            keep.append(~_by_feature(cut.transpose(0, 1), features))
        return keep

    def parity(self, call: Captured) -> float:
        given = call.arguments(self.module)
        hidden = given["hidden_states"]
        with weights_at_hand(self.module):
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


def _spread(packed: Tensor, tokens: tuple[Tensor, Tensor], batch: int, time: int) -> Tensor:
    """Values of tokens [1, tokens, ...] at their places in [batch, T, ...], zero elsewhere."""
    spread = packed.new_zeros(batch, time, *packed.shape[2:])
    spread[tokens] = packed[0]
    return spread


def _continued(history: History, hidden: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Inputs and padding of the prompt so far with the new ones behind them."""
    if history.padding is not None:
        new = history.padding.new_ones(hidden.shape[:2]) if padding is None else padding
        padding = torch.cat([history.padding, new], 1)
    return torch.cat([history.hidden, hidden], 1), padding


def _without_padding(hidden: Tensor, padding: Tensor | None) -> Tensor:
    """Zero at padding, as transformers does before and after the convolution."""
    return hidden if padding is None else (hidden * padding[..., None]).to(hidden.dtype)
