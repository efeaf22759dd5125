"""Every edge of a token mixer at once: where edges arrive in a pass, and what cutting each of them changes there.

Cutting the edge s -> t of a mixer changes one vector: what arrives at t, the output of the scan or of the heads (paths
'main' and 'erase') or of the convolution behind its activation ('conv'). How it changes is known exactly; what that
does to the model's answer is known to first order, from the gradient at what arrives.

    effect[t, s] = <dm/da_t, a^-s_t - a_t>        a_t what arrives at t, a^-s_t the same without s

That is the attribution of an edge (as attribution patching does for heads: Syed et al. 2023, arXiv:2310.10348, there
between parts of the model and not between tokens).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambalens.hooks.knockout import Paths


class Places(NamedTuple):
    """Some edges of one mixer on one path, by prompt, target and source."""

    prompt: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    source: Int[Tensor, " edge"]

    @property
    def at(self) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
        """Where they arrive."""
        return self.prompt, self.target

    def to(self, device: torch.device) -> Places:
        """The same on a device."""
        return Places(*(t.to(device) for t in self))


class Weakened(NamedTuple):
    """Edges that a pass cuts in part."""

    places: Mapping[Paths, Places]
    share: float
    """How much of them is cut: 0 nothing, 1 all."""


class Arrivals(ABC):
    """What arrives over the edges of one mixer, in one differentiable pass.

    Attributes:
        nodes: what arrives [batch, T, ...], by path ('erase' arrives where 'main' does), to be differentiated with
            respect to; float32 or better.
        features: which features are cut; None for every one.
    """

    nodes: dict[Paths, Float[Tensor, "batch time *rest"]]
    features: Bool[Tensor, " feature"] | None

    @abstractmethod
    def forget_graph(self) -> None:
        """Keep the numbers without how they came about."""

    @abstractmethod
    def changes(self, path: Paths, places: Places) -> Float[Tensor, " edge *rest"]:
        """What cutting each of some edges alone changes at the node where it arrives: a^-s_t - a_t."""

    @abstractmethod
    def effects(self, path: Paths, gradient: Float[Tensor, "batch time *rest"]) -> Float[Tensor, "batch time source"]:
        """The effects of all edges, targets in rows: zero where s >= t.

        Args:
            path: the path.
            gradient: dm/da at the node where its edges arrive.
        """

    def by_feature(self, path: Paths, values: Float[Tensor, " edge *rest"]) -> Float[Tensor, "edge feature"]:
        """What belongs to a node, added up for each of the mixer's features."""
        return values.flatten(2).sum(2)


def node_of(path: Paths) -> Paths:
    """The node at which a path's edges arrive."""
    return Paths.MAIN if path is Paths.ERASE else path


def effects_of(
    arrivals: Arrivals, path: Paths, places: Places, gradient: Float[Tensor, " edge *rest"]
) -> Float[Tensor, " edge"]:
    """The effects of some edges.

    Args:
        arrivals: of a pass, whose changes are taken.
        path: the path.
        places: the edges.
        gradient: dm/da at the node of each edge.
    """
    return (arrivals.changes(path, places) * gradient).flatten(1).sum(1)


def effects_by_feature(
    arrivals: Arrivals, path: Paths, places: Places, gradient: Float[Tensor, " edge *rest"]
) -> Float[Tensor, "edge feature"]:
    """The effects of some edges, parted into what comes by each of the mixer's features; they add up to `effects_of`.

    Args:
        arrivals: of a pass that was given a mask of features, be it of all: only there has each its own channels where
            features share some of the convolution's.
        path: the path.
        places: the edges.
        gradient: dm/da at the node of each edge.
    """
    return arrivals.by_feature(path, arrivals.changes(path, places) * gradient)
