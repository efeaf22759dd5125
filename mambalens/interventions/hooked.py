"""Patches by hooked passes, one for every patch: for models that replay does not reproduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambalens.hooks import HookManager, Values
from mambalens.hooks.calls import bound
from mambalens.hooks.errors import MambalensError
from mambalens.hooks.knockout import Path, Paths
from mambalens.hooks.sublayers import sublayers_of
from mambalens.interventions.embeddings import noisy_embeddings
from mambalens.interventions.groups import Prompts, Spot
from mambalens.interventions.walk import Score, Scores, values_of

HOOKED = ("residual", "mixer", "mlp", "value")
"""Sites that hooks reach."""


@torch.no_grad()
def hooked_scores(
    hooks: HookManager,
    site: str,
    windows: Sequence[Sequence[int]],
    prompts: Prompts,
    spots: Sequence[Spot],
    score: Score,
    done: Callable[[int], Any] = lambda _: None,
) -> Scores:
    """What becomes of predictions; as `PatchReplay.scores`, without a check.

    Raises:
        MambalensError: for a site that hooks do not reach.
    """
    if site not in HOOKED:
        raise MambalensError(f"site={site!r} is patched by replay alone, which cannot be used here: "
                             f"{', '.join(map(repr, HOOKED))} are patched by hooks too.")  # fmt: skip
    if site == "value" and hooks.cutting:
        raise MambalensError("site='value' puts in what positions hand on, and so may the knockout that is running: "
                             "leave its block, or knock out with ablation='resample'.")  # fmt: skip
    prompts = prompts.to(hooks.model.get_input_embeddings().weight.device)
    values = values_of(hooks, prompts, windows) if site == "value" else None
    base = _logits(hooks, prompts)
    of = torch.arange(len(base), device=base.device)
    scored = score(base, of).double().cpu()
    patched = scored[[spot.prompt for spot in spots]][:, None].repeat(1, len(windows), 1)
    for together in _passes(spots):
        for window, layers in enumerate(windows):
            some = [spots[number] for number in together]
            with ExitStack() as stack:
                for change in _changes(hooks, site, layers, some, prompts, values):
                    stack.enter_context(change)
                found = score(_logits(hooks, prompts), of).double().cpu()
            patched[together, window] = found[[spot.prompt for spot in some]]
            done(len(together))
    return Scores(scored, patched, ([], scored[:0]))


def _logits(hooks: HookManager, prompts: Prompts) -> Float[Tensor, "batch vocabulary"]:
    """Behind the last tokens."""
    with noisy_embeddings(hooks.model, prompts.noise):
        logits = hooks.model(input_ids=prompts.ids, use_cache=False).logits
    at = prompts.last.to(logits.device)
    logits = logits[torch.arange(len(at), device=at.device), at]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _passes(spots: Sequence[Spot]) -> list[list[int]]:
    """Numbers of the spots that share a pass: of each prompt one, and none of a prompt that another is patched from."""
    passes: list[list[int]] = []
    for number, spot in enumerate(spots):
        for one in passes:
            patched = {spots[i].prompt for i in one}
            givers = {spots[i].other for i in one}
            if spot.prompt not in patched | givers and spot.other not in patched:
                one.append(number)
                break
        else:
            passes.append([number])
    return passes


def _changes(
    hooks: HookManager,
    site: str,
    layers: Sequence[int],
    spots: Sequence[Spot],
    prompts: Prompts,
    values: Values | None,
) -> list[Any]:
    """Hooks of one pass, as context managers. A prompt that gives is in the same pass, and is itself left alone."""
    if values is not None:
        return _reading(hooks, layers, spots, prompts, values)

    def put(value: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time hidden"]:
        changed = value.clone()
        for spot in spots:
            changed[spot.prompt, list(spot.positions)] = value[spot.other, list(spot.others)]
        return changed

    if site != "residual":
        found = sublayers_of(hooks.layers, hooks.mixers)
        return [sub.changing(put) for layer in layers for sub in found[layer] if sub.part == site]

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (put(args[0]), *args[1:]), kwargs
        name = list(bound(module, args, kwargs))[1]
        return args, kwargs | {name: put(kwargs[name])}

    def behind(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        return (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)

    inside = [hooks.layers[layer] for layer in layers if layer < hooks.n_layers]
    changes = [_Handle(layer.register_forward_pre_hook(before, with_kwargs=True)) for layer in inside]
    if hooks.n_layers in layers:
        changes.append(_Handle(hooks.layers[-1].register_forward_hook(behind)))
    return changes


def _reading(
    hooks: HookManager, layers: Sequence[int], spots: Sequence[Spot], prompts: Prompts, values: Values
) -> list[Any]:
    """Knockouts of everything that the patched positions hand on, with the other prompts' values in their place."""
    batch, time = prompts.ids.shape
    giver, given = torch.arange(batch)[:, None].repeat(1, time), torch.arange(time).repeat(batch, 1)
    sources = torch.zeros(batch, time, dtype=torch.bool)
    for spot in spots:
        at = list(spot.positions)
        sources[spot.prompt, at] = True
        giver[spot.prompt, at], given[spot.prompt, at] = spot.other, torch.tensor(spot.others)
    every, instead = torch.ones_like(sources), values.at(giver, given)
    # Where the scan or attention carries values, they come by it; else by the convolution, which is all there is.
    paths: dict[str, Path] = {
        mixer.kind: "main" if mixer.value_path is Paths.MAIN else "conv" for mixer in hooks.mixers_of(layers)
    }
    return [
        hooks.knockout(sources, every, layers, path=path, mixers=kind, instead=instead) for kind, path in paths.items()
    ]


class _Handle:
    """A hook that a `with` takes out again."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        """Nothing: it is in."""

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
