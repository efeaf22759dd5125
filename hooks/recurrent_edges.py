"""Every edge of a mixer that is a recurrence, see `edges`."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambalens.hooks.edges import Arrivals, Places, Weakened
from mambalens.hooks.knockout import Paths
from mambalens.hooks.recurrence import Recurrence


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
    ) -> None:
        self.mixer = mixer
        self.features = features = None if features is None else features.to(hidden.device)
        self.nodes = {}
        projected = mixer.project(without_padding(hidden, padding) if mixer.masks_input else hidden)
        # What features share goes through the convolution once for each of them where some features are cut.
        shared = whole = None
        if features is not None:
            shared = mixer.channels_by_feature(hidden.device)
            whole = None if shared is None else [torch.ones_like(features)[None, None]] * mixer.kernel
        self.convolved = mixer.convolve(projected.inner, whole)
        activated = mixer.activate(self.convolved)
        if mixer.convolution is not None:
            self.inner, self.weight = projected.inner, mixer.convolution.weight[:, 0].detach()
            self.feature_of = torch.arange(self.inner.shape[-1], device=hidden.device)
            if shared is not None:
                channels, self.feature_of = shared
                self.inner, self.weight = self.inner[..., channels], self.weight[channels]
            self.nodes[Paths.CONV] = self._arrived(Paths.CONV, activated, weakened)
            activated = self.nodes[Paths.CONV].to(activated.dtype)
        if mixer.masks_convolved:
            activated = without_padding(activated, padding)
        inputs: Any = mixer.scan_inputs(activated, projected.beside)
        self.inputs = inputs
        # Scans keep their states for the backward pass, many times their input: they are computed again instead.
        y = checkpoint(lambda: mixer.scan(inputs)[0], use_reentrant=False)
        if Paths.MAIN in mixer.paths:
            y = self.nodes[Paths.MAIN] = self._arrived(Paths.MAIN, y, weakened)
        self.output = mixer.finish(mixer.with_skip(y, inputs), projected.gate, hidden.dtype)

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
        inputs = self.inputs.of(places.prompt)
        edges = torch.arange(len(places.source), device=places.source.device)
        stays = torch.ones(inputs.x.shape[:2], dtype=torch.bool, device=inputs.x.device)
        stays[edges, places.source] = False
        cut = stays[..., None]
        without = inputs.cut(cut, None) if path is Paths.MAIN else inputs.cut(None, cut)
        change = self.mixer.scan(without)[0][edges, places.target] - self.nodes[Paths.MAIN][places.at]
        return change if self.features is None else change * self.features[:, None]

    def _tap_changes(self, places: Places) -> Float[Tensor, "edge channel"]:
        distance = places.target - places.source
        kernel = self.weight.shape[1]
        near = distance < kernel
        tap = self.weight.T[(kernel - 1 - distance).clamp_min(0)] * self.inner[places.prompt, places.source]
        before = self.convolved[places.at]
        change = self.mixer.activate(before - tap * near[:, None]) - self.mixer.activate(before)
        change = change if self.features is None else change * self.features[self.feature_of]
        return change.to(self.nodes[Paths.CONV].dtype)

    def effects(self, path: Paths, gradient: Float[Tensor, "batch time *rest"]) -> Float[Tensor, "batch time source"]:
        if path is Paths.CONV:
            return self._tap_effects(gradient)
        inputs = self.inputs if path is Paths.MAIN else self.mixer.erasures(self.inputs)
        chosen = torch.arange(inputs.x.shape[2], device=gradient.device)
        chosen = chosen if self.features is None else chosen[self.features]
        return -self.mixer.edge_effects(inputs, gradient, chosen).tril_(-1)

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
        before = self.mixer.activate(self.convolved)
        for k in range(1, min(kernel, time)):
            tap = self.inner[:, : time - k] * self.weight[:, kernel - 1 - k]
            change = self.mixer.activate(self.convolved[:, k:] - tap) - before[:, k:]
            effect = torch.linalg.vecdot(gradient[:, k:], change.to(gradient.dtype))
            found.diagonal(-k, 1, 2).copy_(effect)
        return found


def without_padding(
    hidden: Float[Tensor, "batch time given"], padding: Shaped[Tensor, "batch time"] | None
) -> Float[Tensor, "batch time given"]:
    """Zero at padding, as transformers does before and after the convolution."""
    return hidden if padding is None else (hidden * padding[..., None]).to(hidden.dtype)
