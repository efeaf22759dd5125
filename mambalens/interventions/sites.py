"""What of a layer can be put in the place of what another prompt has there."""

from __future__ import annotations

from collections.abc import Sequence

from mambalens.hooks import HookManager
from mambalens.hooks.errors import MambalensError, choose
from mambalens.hooks.sublayers import sublayers_of

SITES: dict[str, str] = {
    "residual": "the residual stream at the position, before the layer; numbered as one more layer, behind the last",
    "mixer": "what the layer's token mixers give at the position",
    "mlp": "what the layer's MLP (or experts) gives at the position",
    "value": "what the layer's token mixers read of the position: the values v of attention and delta rules, the input "
    "x of a scan, that of a short convolution; keys, queries, decays, gates and skips stay",
    "state": "what later positions have of the position and those left of it: the recurrent state after it and the "
    "last inputs of the convolution, or the keys and values up to it",
}
"""What each site is."""


def check_site(site: str, sites: Sequence[str] = tuple(SITES)) -> str:
    """The site itself, if there is one of that name.

    Raises:
        MambalensError: if there is none.
    """
    if site not in sites:
        raise MambalensError(f"{site!r} is not a site: {choose(site, sites)}.")
    return site


def windows_of(window: int | Sequence[Sequence[int]], n_layers: int, behind: bool = False) -> list[list[int]]:
    """The layers of every window.

    Args:
        window: a size (every run of that many layers), or lists of layers.
        n_layers: of the model.
        behind: whether the place behind the last layer, with the number that a next layer would have, is one too. It is
            a window of its own, and may stand in a list; runs of several layers end at the last.

    Raises:
        MambalensError: for a window longer than the model, an empty one, or a layer that there is not.
    """
    places = n_layers + behind
    if isinstance(window, int):
        if not 1 <= window <= n_layers:
            raise MambalensError(f"window={window}, but the model has {n_layers} layers: give 1 to {n_layers}.")
        runs = [list(range(start, start + window)) for start in range(n_layers - window + 1)]
        return [*runs, [n_layers]] if behind and window == 1 else runs
    windows = [sorted({int(layer) for layer in layers}) for layers in window]
    if not windows or not all(windows):
        raise MambalensError("window is a list with an empty window in it, or none at all.")
    wrong = next((layer for layers in windows for layer in layers if not 0 <= layer < places), None)
    if wrong is not None:
        last = f" ({n_layers}: the residual stream behind the last)" if behind else ""
        raise MambalensError(f"window has the layer {wrong}, but the model has the layers 0 to {n_layers - 1}{last}.")
    if len({(layers[0], len(layers)) for layers in windows}) < len(windows):
        raise MambalensError(
            "Two windows have the same first layer and the same size; the table could not tell them apart."
        )
    return windows


def layers_with(site: str, hooks: HookManager) -> set[int]:
    """The layers of a model that have a site; of the residual stream, the place behind the last is one more."""
    if site == "residual":
        return set(range(hooks.n_layers + 1))
    if site in ("state", "value"):
        return {mixer.layer for mixer in hooks.mixers}
    found = sublayers_of(hooks.layers, hooks.mixers)
    return {number for number, of_layer in enumerate(found) if any(sublayer.part == site for sublayer in of_layer)}


def windows_with(site: str, window: int | Sequence[Sequence[int]], hooks: HookManager) -> list[list[int]]:
    """The windows in which a layer has the site; where it is a size, others are left out.

    Raises:
        MambalensError: if no layer has it, or a window that was named has none.
    """
    windows, having = windows_of(window, hooks.n_layers, site == "residual"), layers_with(site, hooks)
    if not having:
        raise MambalensError(f"site={site!r}: no layer of the model has {WHAT[site]}.")
    if not isinstance(window, int):
        wrong = next((layers for layers in windows if not having & set(layers)), None)
        if wrong is not None:
            raise MambalensError(f"site={site!r}: none of the layers {wrong} has {WHAT[site]}; "
                                 f"these have: {sorted(having)}.")  # fmt: skip
    return [layers for layers in windows if having & set(layers)]


WHAT = {
    "residual": "a residual stream", "mixer": "a token mixer", "mlp": "an MLP", "value": "a token mixer",
    "state": "a token mixer",
}  # fmt: skip
"""What a layer lacks that has no such site."""
