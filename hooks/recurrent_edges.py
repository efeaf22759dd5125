"""Every edge of a mixer that is a recurrence, see `edges`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambalens.hooks.edges import Arrivals, Places, Weakened
from mambalens.hooks.knockout import Paths
from mambalens.hooks.masks import Cut, Kept, in_patterns, kept_taps, on, patterns, replaced_taps
from mambalens.hooks.recurrence import Instead, Recurrence


class RecurrentArrivals(Arrivals):
    """What arrives in a mixer that is a recurrence: behind the convolution's activation, and what is read of the state.

    Attributes:
        output: the mixer's output.
    """

    def __init__(
        self,
        mixer: Recurrence,
        hidden: Float[Tensor, "batch time given"],
        padding: Shaped[Tensor, "batch time"] | None,
        weakened: Weakened | None,
        features: Bool[Tensor, " feature"] | None,
        around: Sequence[Cut] = (),
    ) -> None:
        self.mixer = mixer
        self.features = features = None if features is None else features.to(hidden.device)
        self.nodes = {}
        taps = on(Paths.CONV, around)
        keep, self.others = (
            kept_taps(taps, mixer.kernel),
            [Instead(*other) for other in replaced_taps(taps, mixer.kernel)],
        )
        self.scanned = on(Paths.MAIN | Paths.ERASE, around)
        projected = mixer.project(without_padding(hidden, padding) if mixer.masks_input else hidden)
        # What features share goes through the convolution once for each of them where some features are cut.
        shared = None
        if features is not None or (keep is not None and keep[0].shape[-1] > 1):
            shared = mixer.channels_by_feature(hidden.device)
        if shared is not None:
            every = torch.ones(1, 1, mixer.n_features, dtype=torch.bool, device=hidden.device)
            keep = [every if keep is None else keep[k] & every for k in range(mixer.kernel)]
        self.keep = keep
        self.convolved = mixer.convolve(projected.inner, keep, instead=self.others)
        activated = mixer.activation(self.convolved)
        if mixer.convolution is not None:
            self.inner, self.weight = projected.inner, mixer.convolution.weight[:, 0].detach()
            self.feature_of = torch.arange(self.inner.shape[-1], device=hidden.device)
            if shared is not None:
                channels, self.feature_of = shared
                self.inner, self.weight = self.inner[..., channels], self.weight[channels]
                self.others = [other.by_feature(channels, self.feature_of, mixer.n_features) for other in self.others]
            if keep is not None and keep[0].shape[-1] > 1:
                self.keep = [taps[..., self.feature_of] for taps in keep]
            self.nodes[Paths.CONV] = self._arrived(Paths.CONV, activated, weakened)
            activated = self.nodes[Paths.CONV].to(activated.dtype)
        if mixer.masks_convolved:
            activated = without_padding(activated, padding)
        inputs: Any = mixer.scan_inputs(activated, projected.beside)
        self.inputs = inputs
        # Scans keep their states for the backward pass, many times their input: they are computed again instead.
        self.ways = list(in_patterns(self.scanned, patterns(self.scanned))) if self.scanned else []
        y = checkpoint(lambda: self._scanned(inputs), use_reentrant=False)
        if Paths.MAIN in mixer.paths:
            y = self.nodes[Paths.MAIN] = self._arrived(Paths.MAIN, y, weakened)
        self.output = mixer.finish(mixer.with_skip(y, inputs), projected.gate, hidden.dtype)

    def _scanned(self, inputs: Any) -> Float[Tensor, "batch time feature width"]:
        """What is read, under what running knockouts cut."""
        y = self.mixer.scan(inputs)[0]
        for where, kept in self.ways:
            y = torch.where(where[..., None, None], self.mixer.scan(inputs.cut(*kept))[0], y)
        return y

    def _by_way(self) -> Iterator[tuple[Bool[Tensor, "batch time"] | None, Kept]]:
        """Targets by what running knockouts cut of what they read; None for all of them."""
        if not self.ways:
            yield None, Kept(None, None)
            return
        yield ~torch.stack([where for where, _ in self.ways]).any(0), Kept(None, None)
        yield from self.ways

    def _arrived(
        self, node: Paths, values: Float[Tensor, "batch time *rest"], weakened: Weakened | None
    ) -> Float[Tensor, "batch time *rest"]:
        """What arrives where some edges are cut in part."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        self.nodes[node] = values
        for path in (node, Paths.ERASE) if node is Paths.MAIN else (node,):
            places = None if weakened is None else weakened.places.get(path)
            if places is not None and weakened is not None:
                change = self.changes(path, places) * weakened.share
                values = values.index_put(places.at, change, accumulate=True)
        return values

    def forget_graph(self) -> None:
        """Keep the numbers without how they came about."""
        self.convolved, self.output = self.convolved.detach(), self.output.detach()
        if Paths.CONV in self.nodes:
            self.inner = self.inner.detach()
        self.inputs = type(self.inputs)(*(t.detach() for t in self.inputs))
        self.nodes = {path: node.detach() for path, node in self.nodes.items()}

    def changes(self, path: Paths, places: Places) -> Float[Tensor, " edge *rest"]:
        if path is Paths.CONV:
            return self._tap_changes(places)
        change = torch.zeros_like(self.nodes[Paths.MAIN][places.at])
        for where, kept in self._by_way():
            here = torch.arange(len(places.source), device=places.source.device)
            here = here if where is None else here[where[places.at]]
            if not len(here):
                continue
            prompt, target, source = places.prompt[here], places.target[here], places.source[here]
            inputs = self.inputs.of(prompt).cut(*(None if part is None else part[prompt] for part in kept))
            edges = torch.arange(len(here), device=here.device)
            stays = torch.ones(inputs.x.shape[:2], dtype=torch.bool, device=inputs.x.device)
            stays[edges, source] = False
            cut = stays[..., None]
            without = inputs.cut(cut, None) if path is Paths.MAIN else inputs.cut(None, cut)
            change[here] = self.mixer.scan(without)[0][edges, target] - self.nodes[Paths.MAIN][prompt, target]
        return change if self.features is None else change * self.features[:, None]

    def _tap(
        self, distance: int, at: tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]
    ) -> Float[Tensor, "edge channel"]:
        """What comes to targets over the tap from so many positions back, under what running knockouts cut."""
        prompt, target = at
        source = target - distance
        tap = self.inner[prompt, source]
        if self.keep is not None:
            tap = tap * _at(self.keep[distance], prompt, target)
            for other in self.others:
                tap = tap + other.inner.to(tap.dtype)[prompt, source] * _at(other.taps[distance], prompt, target)
        return tap * self.weight[:, self.weight.shape[1] - 1 - distance]

    def _tap_changes(self, places: Places) -> Float[Tensor, "edge channel"]:
        distance = places.target - places.source
        tap = torch.zeros_like(self.convolved[places.at])
        for k in range(self.weight.shape[1]):
            here = distance == k
            if here.any():
                tap[here] = self._tap(k, (places.prompt[here], places.target[here]))
        before = self.convolved[places.at]
        change = self.mixer.activation(before - tap) - self.mixer.activation(before)
        change = change if self.features is None else change * self.features[self.feature_of]
        return change.to(self.nodes[Paths.CONV].dtype)

    def effects(self, path: Paths, gradient: Float[Tensor, "batch time *rest"]) -> Float[Tensor, "batch time source"]:
        if path is Paths.CONV:
            return self._tap_effects(gradient)
        found: Tensor | None = None
        for where, kept in self._by_way():
            inputs = self.inputs.cut(*kept)
            inputs = inputs if path is Paths.MAIN else self.mixer.erasures(inputs)
            chosen = torch.arange(inputs.x.shape[2], device=gradient.device)
            chosen = chosen if self.features is None else chosen[self.features]
            of_way = gradient if where is None else gradient * where[..., None, None]
            effects = -self.mixer.edge_effects(inputs, of_way, chosen)
            found = effects if found is None else found + effects
        assert found is not None
        return found.tril_(-1)

    def by_feature(self, path: Paths, values: Float[Tensor, " edge *rest"]) -> Float[Tensor, "edge feature"]:
        if path is not Paths.CONV:
            return super().by_feature(path, values)
        return values.new_zeros(len(values), self.mixer.n_features).index_add_(1, self.feature_of, values)

    def _tap_effects(self, gradient: Float[Tensor, "batch time channel"]) -> Float[Tensor, "batch time source"]:
        batch, time = gradient.shape[:2]
        kernel = self.weight.shape[1]
        if self.features is not None:
            gradient = gradient * self.features[self.feature_of]
        found = gradient.new_zeros(batch, time, time)
        before = self.mixer.activation(self.convolved)
        for k in range(1, min(kernel, time)):
            if self.keep is None:
                tap = self.inner[:, : time - k] * self.weight[:, kernel - 1 - k]
            else:
                at = torch.ones(batch, time, dtype=torch.bool, device=gradient.device)[:, k:].nonzero(as_tuple=True)
                tap = self._tap(k, (at[0], at[1] + k)).unflatten(0, (batch, time - k))
            change = self.mixer.activation(self.convolved[:, k:] - tap) - before[:, k:]
            effect = torch.linalg.vecdot(gradient[:, k:], change.to(gradient.dtype))
            found.diagonal(-k, 1, 2).copy_(effect)
        return found


def _at(
    taps: Bool[Tensor, "#batch #time channel"], prompt: Int[Tensor, " edge"], target: Int[Tensor, " edge"]
) -> Bool[Tensor, "edge channel"]:
    """What holds for taps into some targets; of all prompts or positions at once, or one by one."""
    return taps[prompt if len(taps) > 1 else prompt * 0, target if taps.shape[1] > 1 else target * 0]


def without_padding(
    hidden: Float[Tensor, "batch time given"], padding: Shaped[Tensor, "batch time"] | None
) -> Float[Tensor, "batch time given"]:
    """Zero at padding, as transformers does before and after the convolution."""
    return hidden if padding is None else (hidden * padding[..., None]).to(hidden.dtype)
