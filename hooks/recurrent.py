"""Knockout in a token mixer that is a recurrence: everything but its arithmetic.

The module's own forward runs first and keeps its cache in order. Where something is cut, the targets' outputs are
computed again with the sources' values (what they erase, their convolution taps) left out, and put in the place of the
module's; every other position keeps the module's output bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mambalens.hooks.calls import bound, cache_among
from mambalens.hooks.edges import Arrivals, Weakened
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import (
    Cut,
    blocked_entries,
    changed_positions,
    in_patterns,
    kept_taps,
    on,
    patterns,
    replaced_taps,
)
from mambalens.hooks.mixer import Captured, Pass, replace_forward, weights_at_hand
from mambalens.hooks.recurrence import Instead, Projected, Recurrence
from mambalens.hooks.recurrent_edges import RecurrentArrivals, without_padding
from mambalens.hooks.recurrent_replay import Kept, keep, resume, see
from mambalens.hooks.recurrent_summands import of_recurrence
from mambalens.hooks.resume import Base, Rows, Seen
from mambalens.hooks.summands import Summands
from mambalens.hooks.token_mixing import TokenMixing
from mambalens.hooks.values import Written

EXPLICIT = 2**24
"""Numbers of effective attention that the explicit form of a scan under many different cuts makes at a time."""
WRITTEN = Paths.MAIN | Paths.ERASE
"""The ways through the state."""


class History(NamedTuple):
    """A prompt's mixer inputs and padding so far, for targets that are generated later."""

    hidden: Float[Tensor, "batch time given"]
    padding: Shaped[Tensor, "batch time"] | None
    state: Float[Tensor, " batch *state"]
    """The cached state after them, to notice a cache that was reordered in between."""


class RecurrentMixer(Recurrence):
    """Base of the adapters for mixers that are recurrences: knockouts, effective attention and replay."""

    def inputs(
        self,
        hidden: Float[Tensor, "batch time given"],
        padding: Shaped[Tensor, "batch time"] | None,
        cuts: Sequence[Cut],
    ) -> tuple[Any, Projected]:
        """Inputs of the recurrence under the cuts of the convolution's taps, and the projection they come from."""
        projected = self.project(without_padding(hidden, padding) if self.masks_input else hidden)
        taps = on(Paths.CONV, cuts)
        others = [Instead(*other) for other in replaced_taps(taps, self.kernel)]
        convolved = self.convolved(projected.inner, kept_taps(taps, self.kernel), instead=others)
        if self.masks_convolved:
            convolved = without_padding(convolved, padding)
        return self.scan_inputs(convolved, projected.beside), projected

    def knocked_out(
        self,
        hidden: Float[Tensor, "batch time given"],
        padding: Shaped[Tensor, "batch time"] | None,
        cuts: Sequence[Cut],
    ) -> tuple[Float[Tensor, "batch time hidden"], Float[Tensor, " batch *state"] | None]:
        """The mixer's output under the cuts, right at every position where `changed` holds.

        Args:
            hidden: the mixer's input as `told` gives it, from the first column of the prompt.
            padding: 1 for tokens, 0 for padding.
            cuts: over these T columns.

        Returns:
            Output, and the state after the last position where cut taps have changed it.
        """
        inputs, projected = self.inputs(hidden, padding, cuts)
        y, state = self.mix(inputs, cuts, base=bool(on(Paths.CONV, cuts)))
        return self.finish(self.with_skip(y, inputs), projected.gate, hidden.dtype), state

    def under(
        self,
        hidden: Float[Tensor, "batch time given"],
        padding: Shaped[Tensor, "batch time"] | None,
        cuts: Sequence[Cut],
    ) -> tuple[Float[Tensor, "batch time hidden"], tuple[Any, Float[Tensor, "batch time channel"]]]:
        inputs, projected = self.inputs(hidden, padding, cuts)
        y, _ = self.mix(inputs, cuts, base=True)
        return self.finish(self.with_skip(y, inputs), projected.gate, hidden.dtype), (inputs, projected.inner)

    def mix(
        self, inputs: Any, cuts: Sequence[Cut], base: bool, explicit: bool | None = None
    ) -> tuple[Float[Tensor, "batch time feature width"], Float[Tensor, " batch *state"] | None]:
        """What is read under the cuts of the paths 'main' and 'erase'.

        Equation: Knockout
            alpha[t, s, f] = 0    for t in T, s in S, f in F, in every layer of the window
            y_t = sum_{s<=t, s not in S} alpha[t, s] x_s + D x_t = C_t . h^-S_t + D x_t

            Source: Endy et al. 2025, arXiv:2505.24244, eq. 5
            Source: Geva et al. 2023, arXiv:2304.14767, section 4, for the knockout of attention that it adapts

            T are the targets, S the sources, F the features. h^-S is the state of the same recurrence with x_s = 0 for
            s in S: one more scan for every distinct S, and no T x T matrix. The skip D x_t stays.

        One more scan for every different way in which targets are cut. Where these are many, as edges may be, the
        entries of effective attention themselves are set to zero instead: it costs what half as many scans as there
        are positions do. (Not where erasures are cut: every way of doing so has an effective attention of its own. Nor
        where something stands in the place of what is cut.)

        Args:
            inputs: inputs of the scan.
            cuts: what is cut.
            base: whether positions that are no target are needed too; without, they hold anything.
            explicit: which of the two; by default whichever costs less.

        Returns:
            y without the skip, and with `base` the last state.
        """
        y, state = self.scan(inputs, end=True) if base else (torch.zeros_like(inputs.x), None)
        written = on(WRITTEN, cuts)
        if not written:
            return y, state
        found = patterns(written)
        if explicit is None:
            explicit = 2 * len(found) > inputs.x.shape[1]
        if explicit and not on(Paths.ERASE, written) and all(cut.instead is None for cut in written):
            return self._explicit(inputs, blocked_entries(written)), state
        for where, kept in in_patterns(written, found):
            masked, _ = self.scan(inputs.cut(*kept))
            y = torch.where(where[..., None, None], masked, y)
        return y, state

    def _explicit(
        self, inputs: Any, blocked: Bool[Tensor, " batch #feature time time"]
    ) -> Float[Tensor, "batch time feature width"]:
        """The scan as effective attention with the blocked entries set to zero."""
        y = torch.empty_like(inputs.x)
        batch, time, count, _ = inputs.x.shape
        for features in torch.arange(count, device=y.device).split(max(1, EXPLICIT // (batch * time * time))):
            alpha = self.alpha(inputs, features)  # [B, f, T, T]
            alpha = alpha.masked_fill(blocked if blocked.shape[1] == 1 else blocked[:, features], 0.0)
            y[:, :, features] = torch.einsum("bfts,bsfp->btfp", alpha, inputs.x[:, :, features])
        return y

    def attach(self, current: Callable[[], Pass]) -> Callable[[], None]:
        histories: WeakKeyDictionary[Any, History] = WeakKeyDictionary()

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = bound(self.module, args, kwargs)
                hidden, padding = self.told(given)
                cache = cache_among(given.values())
                running = current()
                history = histories.get(cache) if cache is not None else None
                if running.keep_history and running.past and cache is not None:
                    self._check(history, cache, hidden, running.past)
                returned = original(*args, **kwargs)
                out = _output(returned)
                if running.keep_history and history is not None and running.past:
                    hidden, padding = _continued(history, hidden, padding)
                active = [cut.to(out.device) for cut in running.cuts_of(self)]
                if active:
                    changed = changed_positions(active, self.kernel, self.remembers)[:, running.past :]
                    # What is computed again from the prompt on is computed under its cuts too: cut taps are remembered.
                    every = [cut.to(out.device) for cut in running.cuts[self]] if running.past else active
                    with weights_at_hand(self.module):
                        ours, state = self.knocked_out(hidden, padding, every)
                    out = torch.where(changed[..., None], ours[:, running.past :].to(out.dtype), out)
                    if state is not None and cache is not None:
                        self.cache_state(cache, state)
                if running.keep_history and cache is not None:
                    histories[cache] = History(hidden, padding, self.cached_state(cache).clone())
                return out if self.alone else (out, *returned[1:])

            return forward

        return replace_forward(self.module, wrap)

    def _check(self, history: History | None, cache: Any, hidden: Float[Tensor, "batch new given"], past: int) -> None:
        """Refuse a cache that is not the one this knockout filled: its state says nothing of single sources."""
        state = self.cached_state(cache)
        same = history is not None and history.hidden.shape[:2] == (hidden.shape[0], past)
        if history is None or not same or not torch.equal(history.state, state):
            raise MambalensError(
                "The cache was filled, reordered or cropped outside this knockout, so targets among generated tokens "
                "cannot be computed: run the prompt inside the block and generate greedily or by sampling."
            )

    def written(self, call: Captured) -> Written:
        hidden, padding = self.told(call.arguments(self.module))
        with weights_at_hand(self.module):
            inputs, projected = self.inputs(hidden, padding, ())
        return Written(
            inputs.x if Paths.MAIN in self.paths else None, projected.inner if Paths.CONV in self.paths else None
        )

    def token_mixing(self, call: Captured, cuts: Sequence[Cut]) -> TokenMixing:
        hidden, padding = self.told(call.arguments(self.module))
        cuts = [cut.to(hidden.device) for cut in cuts]
        with weights_at_hand(self.module):
            inputs, _ = self.inputs(hidden, padding, cuts)
            skip = self.skip(inputs)
            y, _ = self.mix(inputs, cuts, base=True)
            output = self.with_skip(y, inputs)
        diagonal = inputs.own_entry()  # [B, T, F]
        main, erased = on(Paths.MAIN, cuts), on(Paths.ERASE, cuts)
        blocked = blocked_entries(main) if main else None  # [B, F or 1, T, T]
        if blocked is not None:
            diagonal = diagonal.masked_fill(blocked.diagonal(dim1=-2, dim2=-1).transpose(1, 2), 0.0)

        def alpha_of(features: Int[Tensor, " some"]) -> Float[Tensor, "batch some time time"]:
            alpha = self.alpha(inputs, features)
            for where, kept in in_patterns(erased, patterns(erased)) if erased else ():
                # What is erased no more stays for these targets.
                theirs = self.alpha(inputs.cut(None, kept.erasures), features)
                alpha = torch.where(where[:, None, :, None], theirs, alpha)
            if blocked is None:
                return alpha
            return alpha.masked_fill_(blocked if blocked.shape[1] == 1 else blocked[:, features], 0.0)

        return TokenMixing(inputs.x, skip[:, 0], output, diagonal, alpha_of, self.decay(inputs))

    @contextmanager
    def keeping(self, base: Base) -> Iterator[list[Kept]]:
        kept: list[Kept] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = self.told(bound(self.module, args, kwargs))
            with weights_at_hand(self.module):
                out, of_layer = keep(self, base.to(hidden.device), hidden)
            kept.append(of_layer)
            return out if self.alone else (out, None)

        restore = replace_forward(self.module, lambda original: forward)
        try:
            yield kept
        finally:
            restore()

    @contextmanager
    def watching(self, around: Sequence[Cut] = ()) -> Iterator[list[Seen]]:
        seen: list[Seen] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = self.told(bound(self.module, args, kwargs))
            with weights_at_hand(self.module):
                out, of_layer = see(self, hidden, [cut.to(hidden.device) for cut in around])
            seen.append(of_layer)
            return out if self.alone else (out, None)

        restore = replace_forward(self.module, lambda original: forward)
        try:
            yield seen
        finally:
            restore()

    def kept_numbers(self, time: int, sets: int) -> int:
        return sets * self.state_numbers

    @contextmanager
    def resuming(self, kept: Kept, base: Base, rows: Rows) -> Iterator[None]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = self.told(bound(self.module, args, kwargs))
            with weights_at_hand(self.module):
                out = resume(self, kept, base.to(hidden.device), rows.to(hidden.device), hidden)
            return out if self.alone else (out, None)

        restore = replace_forward(self.module, lambda original: forward)
        try:
            yield
        finally:
            restore()

    @contextmanager
    def attributing(
        self,
        weakened: Weakened | None = None,
        features: Bool[Tensor, " feature"] | None = None,
        around: Sequence[Cut] = (),
    ) -> Iterator[list[Arrivals]]:
        found: list[Arrivals] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, padding = self.told(bound(self.module, args, kwargs))
            with weights_at_hand(self.module):
                cuts = [cut.to(hidden.device) for cut in around]
                arrivals = RecurrentArrivals(self, hidden, padding, weakened, features, cuts)
            found.append(arrivals)
            return arrivals.output if self.alone else (arrivals.output, None)

        restore = replace_forward(self.module, lambda original: forward)
        try:
            yield found
        finally:
            restore()

    def summands(
        self,
        call: Captured,
        at: Int[Tensor, " batch"],
        direction: Float[Tensor, "batch hidden"],
        cuts: Sequence[Cut] = (),
    ) -> Summands:
        hidden, padding = self.told(call.arguments(self.module))
        cuts = [cut.to(hidden.device) for cut in cuts]
        with weights_at_hand(self.module):
            with torch.no_grad():
                inputs, projected = self.inputs(hidden, padding, cuts)
            return of_recurrence(self, inputs, projected, hidden.dtype, at, direction, cuts)

    def parity(self, call: Captured) -> float:
        hidden, padding = self.told(call.arguments(self.module))
        with weights_at_hand(self.module):
            inputs, projected = self.inputs(hidden, padding, ())
            y, _ = self.mix(inputs, (), base=True)
            ours = self.finish(self.with_skip(y, inputs), projected.gate, hidden.dtype)
        theirs = _output(call.output)
        return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))


def _output(returned: Any) -> Float[Tensor, "batch time hidden"]:
    """The mixer's output, of what its module returns."""
    return returned[0] if isinstance(returned, tuple) else returned


def _continued(
    history: History, hidden: Float[Tensor, "batch new given"], padding: Shaped[Tensor, "batch new"] | None
) -> tuple[Float[Tensor, "batch time given"], Shaped[Tensor, "batch time"] | None]:
    """Inputs and padding of the prompt so far with the new ones behind them."""
    if history.padding is not None:
        new = history.padding.new_ones(hidden.shape[:2]) if padding is None else padding
        padding = torch.cat([history.padding, new], 1)
    return torch.cat([history.hidden, hidden], 1), padding
