"""Groups of features by their decay norm, as the paper sorts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mambalens.hooks.errors import MambalensError, choose

GROUPS: dict[str, tuple[str, ...]] = {
    "all": ("slow", "middle", "fast"),
    "slow": ("slow",),
    "middle": ("middle",),
    "fast": ("fast",),
    "context-dependent": ("slow", "middle"),
    "context-independent": ("middle", "fast"),
}
"""Names and the thirds they are made of. The last two are what the paper's code runs under these names."""


def decay_norm(A_log: Float[Tensor, " feature *state"]) -> Float[Tensor, " feature"]:
    """The L1 norm, over the state, of the decay that a step of size 1 applies: large means slow decay, a long memory.

    Equation: Groups
        norm[f] = sum_n exp(A[f, n]) = sum_n exp(-exp(A_log[f, n]))

        Source: Endy et al. 2025, arXiv:2505.24244, which sorts features by it

    Computed in float64.
    """
    return torch.exp(-torch.exp(A_log.detach().double())).reshape(len(A_log), -1).sum(1)


def parse_group(group: str) -> tuple[str, float | None]:
    """A group's name and, in 'slow:0.1' or 'fast:0.1', the fraction of a layer's features.

    Raises:
        MambalensError: if there is no such group, or the fraction is not between 0 and 1.
    """
    name, colon, fraction = group.partition(":")
    if name not in GROUPS:
        raise MambalensError(
            f"features={group!r} is not a group of features: {choose(name, GROUPS)}, or a part such as 'slow:0.1'."
        )
    if not colon:
        return name, None
    if name not in ("slow", "fast"):
        raise MambalensError(f"features={group!r}: a fraction goes with 'slow' or 'fast', not with {name!r}.")
    try:
        part = float(fraction)
    except ValueError:
        part = -1.0
    if not 0 < part <= 1:
        raise MambalensError(f"features={group!r}: the fraction {fraction!r} is not a number above 0 and up to 1.")
    return name, part


def count_of(fraction: float, count: int) -> int:
    """How many of `count` features a fraction is: rounded down, as the paper's thirds are."""
    return int(fraction * count + 1e-9)


def group_mask(norm: Float[Tensor, " feature"], group: str) -> Bool[Tensor, " feature"]:
    """Features of a named group: the slowest and the fastest floor(F/3), and the rest; ties go by index.

    'slow:0.1' and 'fast:0.1' are the slowest and fastest floor(0.1 F) instead.

    Equation: Groups
        slow = the floor(F/3) features of the largest norm, fast = the floor(F/3) of the smallest, middle = the rest
        context-dependent = slow and middle, context-independent = middle and fast

        Source: Endy et al. 2025, arXiv:2505.24244, as its code runs them

        F is the number of a layer's features.

    >>> group_mask(torch.tensor([0.1, 0.9, 0.5]), "slow").tolist()
    [False, True, False]
    """
    name, fraction = parse_group(group)
    end = len(norm) // 3 if fraction is None else count_of(fraction, len(norm))
    order = torch.argsort(norm, descending=True, stable=True)
    parts = {"slow": order[:end], "fast": order[len(norm) - end :]}
    if fraction is None:
        parts["middle"] = order[end : len(norm) - end]
    mask = torch.zeros(len(norm), dtype=torch.bool, device=norm.device)
    for part in GROUPS[name]:
        mask[parts[part]] = True
    return mask


def explicit_mask(features: Any, count: int, layer: int) -> Bool[Tensor, " feature"]:
    """A boolean mask, an index list or one index over one layer's features, checked against their number."""
    given = torch.as_tensor(features)
    if given.dtype == torch.bool:
        if given.shape != (count,):
            raise MambalensError(
                f"features is a boolean mask of shape {list(given.shape)}, but layer {layer} has {count} features."
            )
        return given.cpu()
    if given.numel() and (given.ndim > 1 or given.is_floating_point()):
        raise MambalensError(f"features={features!r} is neither a boolean mask nor a list of feature numbers.")
    wrong = [int(f) for f in given.flatten() if not -count <= int(f) < count]
    if wrong:
        raise MambalensError(f"features has {wrong}, but layer {layer} has {count} features: 0 to {count - 1}.")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[given.flatten().long()] = True
    return mask


def for_layer(features: Any, layer: int, layers: Sequence[int], n_layers: int) -> Any:
    """The part of `features` that speaks of `layer`: itself, or its entry where it has one for each layer."""
    if isinstance(features, str | int):
        return features
    if isinstance(features, Mapping):
        if layer not in features:
            raise MambalensError(f"features has no entry for layer {layer}; it has {sorted(features)}.")
        return features[layer]
    nested = features.ndim == 2 if isinstance(features, Tensor) else any(
        isinstance(f, Sequence) or getattr(f, "ndim", 0) > 0 for f in features
    )  # fmt: skip
    if not nested:
        return features
    if len(features) == n_layers:
        return features[layer]
    if len(features) == len(layers):
        return features[list(layers).index(layer)]
    raise MambalensError(
        f"features has entries for {len(features)} layers, but the model has {n_layers} and the knockout {len(layers)}."
    )
