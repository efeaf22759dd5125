"""By which features of its mixer an edge has its effect.

What an edge hands over arrives in every channel or head of the mixer on its own, so that its effect, to first order, is
a sum over them. Only the edges that are asked for are looked at: no feature has its whole T x T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.facts.prompts import Batch
from mambalens.flow.attribution import Asked, Where, look
from mambalens.flow.certificate import listed_of
from mambalens.flow.table import EDGE_FEATURES
from mambalens.flow.work import FlowWork, batches_of_one
from mambalens.hooks.edges import Places, effects_by_feature, node_of
from mambalens.model import LoadedModel

if TYPE_CHECKING:
    import pandas as pd

AT_ONCE = 2**22
"""Numbers that arrive at a prompt's positions, times the edges that are looked at together."""


def edge_features(work: FlowWork, edges: pd.DataFrame, k: int, bar: Any) -> pd.DataFrame:
    """The strongest features of some edges.

    Args:
        work: model and prompts.
        edges: rows of a flow's table, some of every prompt.
        k: features of an edge at most.
        bar: progress, of prompts.

    Returns:
        One row per edge and feature, edges in their order; columns in `flow.table.EDGE_FEATURES`.
    """
    rows, features, effects = [], [], []
    of_fact = edges.groupby("fact_id", sort=False, observed=True).indices
    for prompt, batch in batches_of_one(work.lens, list(work.prompts.values())):
        at = of_fact[str(prompt.fact.id)]
        listed = listed_of(work, edges.iloc[at])
        numbers = {work.where[where]: np.flatnonzero(listed.where == where) for where in np.unique(listed.where)}
        places = {where: Places(*(torch.from_numpy(part) for part in (np.zeros_like(some), listed.target[some],
                  listed.source[some]))) for where, some in numbers.items()}  # fmt: skip
        for where, of_features in by_feature(work.lens, batch, work.asked, places).items():
            mask = work.features[where[0]]
            chosen = np.arange(of_features.shape[1]) if mask is None else mask.cpu().numpy().nonzero()[0]
            parts = of_features.cpu().numpy().astype(float)[:, chosen]
            strongest = np.argsort(-np.abs(parts), 1, kind="stable")[:, :k]
            rows.append(np.repeat(at[numbers[where]], strongest.shape[1]))
            features.append(chosen[strongest].ravel())
            effects.append(np.take_along_axis(parts, strongest, 1).ravel())
        bar.update(1)
    row, feature, effect = (np.concatenate(part) for part in (rows, features, effects))
    order = np.argsort(row, kind="stable")
    table = edges.iloc[row[order]].reset_index(drop=True)
    return table.assign(feature=feature[order], effect=effect[order])[list(EDGE_FEATURES)]


def by_feature(
    lens: LoadedModel, batch: Batch, asked: Asked, edges: Mapping[Where, Places]
) -> dict[Where, Float[Tensor, "edge feature"]]:
    """The effects of some edges, parted into features; zero for features that are not asked for.

    Equation: Every edge
        effect[t, s, f] = <dm/da_t, a^-s_t - a_t>_f

        Source: this package, as attribution patching, Syed et al. 2023, arXiv:2310.10348

        Of the model as it is, see `attribution.attribute`. <., .>_f adds up what belongs to feature f: a channel, or
        the width of a head. Heads that share channels of the convolution are as if each had them for itself.

    Args:
        lens: the model.
        batch: prompts.
        asked: what the flow is of.
        edges: by mixer and path.
    """
    of_mixers = {mixer: asked.features[mixer] for mixer, _ in edges}
    # A mask even where it is of all: with one, every feature has channels of its own.
    masks = {mixer: torch.ones(mixer.n_features).bool() if mask is None else mask for mixer, mask in of_mixers.items()}
    looked = look(lens, batch, Asked(masks, asked.paths, asked.measure), None)
    found = {}
    for (mixer, path), places in edges.items():
        arrivals, gradient = looked.arrivals[mixer], looked.gradients[mixer, node_of(path)]
        size = max(1, AT_ONCE // gradient[0].numel())
        parts = zip(*(part.to(gradient.device).split(size) for part in places), strict=True)
        some = [Places(*part) for part in parts]
        found[mixer, path] = torch.cat(
            [effects_by_feature(arrivals, path, these, gradient[these.at]) for these in some]
        )
    return found
