"""Every edge attributed by a few forward and backward passes.

The first pass is the model as it is: its gradient at what arrives says what every edge's cut changes, to first order.
Where the model is sure, that is far from what the cut really does: the gradient is small, and the answer is lost all
the same. So the strongest edges are looked at once more, along their own cut: they are dealt into groups, each group is
cut by half in a pass of its own, and a weighted mean of the two gradients of an edge takes the place of the first. The
groups are small, so that what an edge is told is little disturbed by what else is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mambalens.defaults import POINTS, TOP
from mambalens.facts.prompts import Batch
from mambalens.hooks import Mixer
from mambalens.hooks.edges import Arrivals, Places, Weakened, effects_of, node_of
from mambalens.hooks.knockout import Paths
from mambalens.measures import Measure
from mambalens.model import LoadedModel

SHARE = 0.5
"""How much of an edge the second look cuts."""
FIRST = 0.25
"""Weight of the first look at an edge that is looked at twice. The middle of a cut alone would tell the mean of a
gradient that changes evenly, but it is disturbed by the rest of its group. Of the weights and shares that were tried on
40 facts of atlas-mamba1 and atlas-mamba2, these agreed best with exact cuts."""
Where = tuple[Mixer, Paths]
"""A mixer and one of its paths."""


@dataclass(frozen=True, eq=False)
class Asked:
    """What a flow is of.

    Attributes:
        features: mask of every mixer whose edges are asked for; None: every feature.
        paths: ways of the edges.
        measure: of the prediction.
        points: gradients that are taken: one of the model as it is, the others of the strongest edges.
        strongest: edges of a prompt that are looked at twice.
    """

    features: Mapping[Mixer, Bool[Tensor, " feature"] | None]
    paths: Paths
    measure: Measure
    points: int = POINTS
    strongest: int = TOP

    def ways(self, mixer: Mixer) -> list[Paths]:
        """The asked ways that a mixer has."""
        return list(self.paths & mixer.paths)


class Attributed(NamedTuple):
    """Edges of a batch."""

    effects: dict[Where, Float[Tensor, "batch time source"]]
    """Attributed change of the measure by cutting each edge alone, targets in rows; zero where there is no edge."""
    logits: Float[Tensor, "batch vocabulary"]
    """Of the model as it is, behind the last tokens."""


class Looked(NamedTuple):
    """One pass and its gradients."""

    logits: Float[Tensor, "batch vocabulary"]
    arrivals: dict[Mixer, Arrivals]
    gradients: dict[Where, Float[Tensor, "batch time *rest"]]
    """By node."""


def attribute(lens: LoadedModel, batch: Batch, asked: Asked) -> Attributed:
    """Attribute every edge s -> t, s < t, of a batch's prompts.

    Equation: Every edge
        effect[t, s] = <dm/da_t, a^-s_t - a_t>
        effect[t, s] = <1/4 dm/da_t + 3/4 dm/da_t(1/2), a^-s_t - a_t>    for the strongest

        Source: this package, as attribution patching of parts of the model, Syed et al. 2023, arXiv:2310.10348
        Source: for the second, as integrated gradients, Sundararajan et al. 2017, arXiv:1703.01365, along each cut

        a_t is what arrives at t, of the scan, the heads or the convolution; a^-s_t the same with the edge cut; m the
        measure. dm/da_t(1/2) is the gradient where half of the edge, and of its group, is cut.
    """
    looked = look(lens, batch, asked, None)
    effects = {
        (mixer, path): looked.arrivals[mixer].effects(path, looked.gradients[mixer, node_of(path)])
        for mixer in looked.arrivals
        for path in asked.ways(mixer)
    }
    behind = torch.arange(batch.ids.shape[1]) > batch.last[:, None]  # padding
    effects = {
        where: effect.masked_fill((behind[:, :, None] | behind[:, None]).to(effect.device), 0.0)
        for where, effect in effects.items()
    }
    if asked.points > 1 and effects:
        _look_twice(lens, batch, asked, looked, effects)
    return Attributed(effects, looked.logits)


def _look_twice(
    lens: LoadedModel,
    batch: Batch,
    asked: Asked,
    first: Looked,
    effects: dict[Where, Float[Tensor, "batch time source"]],
) -> None:
    """Put what a second look at the strongest edges says in the place of what was there."""
    groups, count = asked.points - 1, len(batch.prompts)
    where = list(effects)
    time = batch.ids.shape[1]
    strength = torch.stack([effects[w].abs().cpu() for w in where], 1).flatten(1)  # [B, W T T]
    many = min(asked.strongest, strength.shape[1])
    top = strength.topk(many, 1)
    number = torch.arange(many).expand(count, -1)
    prompt = torch.arange(count)[:, None].expand(-1, many)
    there = top.values > 0
    index, number, prompt = top.indices[there], number[there], prompt[there]
    of_where, target, source = index // (time * time), index // time % time, index % time
    group = number % groups  # dealt out in turns, so that every group has strong and weak ones
    for begin in range(groups):  # one group of every prompt at a time: no more memory than the first look
        now: dict[Where, Places] = {}
        for w in of_where[group == begin].unique().tolist():
            here = (of_where == w) & (group == begin)
            now[where[w]] = Places(prompt[here], target[here], source[here]).to(effects[where[w]].device)
        if not now:
            continue
        second = look(lens, batch, asked, now)
        for (mixer, path), at in now.items():
            gradient = second.gradients[mixer, node_of(path)][at.at]
            again = effects_of(first.arrivals[mixer], path, at, gradient)
            effects[mixer, path][tuple(at)] = FIRST * effects[mixer, path][tuple(at)] + (1 - FIRST) * again


def look(lens: LoadedModel, batch: Batch, asked: Asked, weakened: Mapping[Where, Places] | None) -> Looked:
    """One forward and one backward pass.

    Args:
        lens: the model.
        batch: prompts.
        asked: what is asked for.
        weakened: edges of which `SHARE` is cut.
    """
    arrived = {}
    with ExitStack() as stack:
        stack.enter_context(_frozen(lens))
        around = lens.hooks.cuts_around(batch.last, batch.ids.shape[1])
        for mixer, features in asked.features.items():
            cut = None
            if weakened is not None:
                cut = Weakened({path: of for (cut_mixer, path), of in weakened.items() if cut_mixer is mixer}, SHARE)
            arrived[mixer] = stack.enter_context(mixer.attributing(cut, features, around.get(mixer, ())))
        with torch.enable_grad():
            logits = lens.differentiable_logits(batch)
            measured = asked.measure(logits, batch.targets.to(logits.device))
            arrivals = {mixer: found[-1] for mixer, found in arrived.items()}
            nodes = {(mixer, node): value for mixer, of in arrivals.items() for node, value in of.nodes.items()}
            gradients = torch.autograd.grad(measured.sum(), list(nodes.values()), allow_unused=True)
    for of in arrivals.values():
        of.forget_graph()
    found = {
        where: torch.zeros_like(node) if gradient is None else gradient
        for (where, node), gradient in zip(nodes.items(), gradients, strict=True)
    }
    return Looked(logits.detach(), arrivals, found)


@contextmanager
def _frozen(lens: LoadedModel) -> Iterator[None]:
    """While the block runs, gradients reach what the embeddings give and no weight, and nothing drops out."""
    wanted = [parameter for parameter in lens.model.parameters() if parameter.requires_grad]
    training = [module for module in lens.model.modules() if module.training]

    def begin(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()  # a copy: some models scale what they get in place

    handle = lens.model.get_input_embeddings().register_forward_hook(begin)
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
