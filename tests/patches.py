"""Slow twins of patching: plain PyTorch hooks and caches, one prompt at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import explicit
import torch
from torch import Tensor, nn
from transformers import DynamicCache


def first(output: Any) -> Tensor:
    """What a module gives, without what stands beside it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def changed_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, a module's first argument is changed."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: change(kwargs[name])}

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, what a module gives is changed."""

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = change(first(output))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


Seen = list[tuple[Any, Tensor]]
"""Modules, in the order of their calls in a pass, each with its input or output there."""


def seen_by_hooks(model: Any, how: Any, modules: Iterable[Any], ids: Tensor) -> Seen:
    """What modules have in a pass over a prompt [T]; `how` as in `by_hooks`."""
    found: Seen = []

    def keep(value: Tensor, module: Any) -> Tensor:
        found.append((module, value.clone()))
        return value

    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.enter_context(how(module, partial(keep, module=module)))
        model(ids[None], use_cache=False)
    return found


def by_hooks(
    model: Any, how: Any, modules: Sequence[Any], ids: Tensor, other: Tensor | Seen, positions: Sequence[int],
    others: Sequence[int],
) -> Tensor:  # fmt: skip
    """Logits behind the last token [vocabulary], with what modules have in another prompt put in.

    Args:
        model: the model.
        how: `changed_input` or `changed_output`.
        modules: those whose inputs or outputs are changed, one after another as they are called.
        ids, other: the prompt [T] and the other one, or what these modules, and maybe more, have in that.
        positions, others: positions of the prompt, and those that they are taken from.
    """
    seen = seen_by_hooks(model, how, modules, other) if isinstance(other, Tensor) else other
    # A module that stands there twice, as one that layers share, is changed twice.
    taken = iter([value for module, value in seen for _ in range(modules.count(module))])

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        # Some modules take the tokens of all prompts one below the other.
        value.view(-1, value.shape[-1])[list(positions)] = next(taken).view(-1, value.shape[-1])[list(others)]
        return value

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(how(module, put))
        return model(ids[None], use_cache=False).logits[0, -1]


@contextmanager
def changed_stream(layers: Sequence[nn.Module], place: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, the residual stream is changed before a layer, or behind the last."""
    with changed_input(layers[place], change) if place < len(layers) else changed_output(layers[-1], change):
        yield


def by_twins(
    hooks: Any, layers: Sequence[int], ids: Tensor, positions: Sequence[int], values: Sequence[Tensor]
) -> Tensor | None:
    """Logits behind the last token [vocabulary], with other values at some positions; None for fused attention.

    Recurrences compute their explicit form, in which every entry from these positions on reads the other value;
    attention has what its projection of values gives replaced.

    Args:
        hooks: the model's hook manager, for where its mixers are.
        layers: in which.
        ids: the prompt [T].
        positions: positions of the prompt.
        values: for every mixer of the layers, the values that are read there [positions, ...].
    """
    time = len(ids)
    with ExitStack() as stack:
        for mixer, other in zip(hooks.mixers_of(layers), values, strict=True):
            if mixer.kind == "attention":
                if not hasattr(mixer.module, "v_proj"):
                    return None

                def put(value: Tensor, other: Tensor = other) -> Tensor:
                    value = value.clone()
                    value[0, list(positions)] = other.reshape(len(positions), -1)
                    return value

                stack.enter_context(changed_output(mixer.module.v_proj, put))
                continue
            entries = torch.zeros(1, time, time, mixer.n_features, dtype=torch.bool)
            entries[:, :, list(positions)] = True
            entries &= torch.ones(time, time, dtype=torch.bool).tril()[None, :, :, None]
            whole = torch.zeros(1, time, *other.shape[1:], dtype=other.dtype)
            whole[0, list(positions)] = other
            stack.callback(
                mixer.module.register_forward_hook(_explicit(mixer, entries, whole), with_kwargs=True).remove
            )
        return hooks.model(ids[None], use_cache=False).logits[0, -1]


def _explicit(mixer: Any, entries: Tensor, values: Tensor) -> Callable[..., Any]:
    """A hook that gives a recurrence's explicit form with entries that read other values."""
    nothing, by_convolution = torch.zeros_like(entries), mixer.kind == "shortconv"
    main, conv = (nothing, entries) if by_convolution else (entries, nothing)
    # A path without other values has no entries that read them.
    instead = [(main, conv, torch.zeros(()), values) if by_convolution else (main, conv, values, None)]

    def hook(m: Any, args: Any, kwargs: Any, out: Any) -> Any:
        hidden = args[0] if args else next(kwargs[name] for name in ("hidden_states", "input_states") if name in kwargs)
        twin = explicit.TWINS.get(type(m).__name__)
        if twin is None:
            ours = explicit.MIXERS[mixer.kind](m, hidden, None, main, conv, instead)
        else:
            begins = {}
            if "begins" in inspect.signature(twin).parameters:
                begins["begins"] = (kwargs["position_ids"] == 0).expand(hidden.shape[:2])
            ours = twin(m, hidden, None, main, conv, nothing, instead=instead, **begins)[1]
        return (ours, *out[1:]) if isinstance(out, tuple) else ours

    return hook


def by_cache(model: Any, layers: Sequence[int], ids: Tensor, other: Tensor, position: int) -> Tensor:
    """Logits behind the last token [vocabulary], with what another prompt's cache holds after a position put in."""
    if position + 1 == len(ids):
        return model(ids[None], use_cache=False).logits[0, -1]
    # RecurrentGemma's blocks keep their state in themselves, from one prompt to the next, and hand out no cache.
    stack = getattr(getattr(model, "model", None), "layers", [])
    blocks = {i: m for i, layer in enumerate(stack) for m in layer.modules() if hasattr(m, "rg_lru")}

    def run(prompt: Tensor) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
        for block in blocks.values():
            block.conv1d_state = block.rg_lru.recurrent_states = None
        given = {"past_key_values": DynamicCache(config=model.config)} if blocks else {}
        out = model(prompt[None, : position + 1], use_cache=True, **given)
        inside = {i: (block.rg_lru.recurrent_states.clone(), block.conv1d_state.clone()) for i, block in blocks.items()}
        cache = getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)
        return cache or given["past_key_values"], inside

    given, inside = run(other)
    cache, _ = run(ids)
    for layer in blocks.keys() & set(layers):
        blocks[layer].rg_lru.recurrent_states, blocks[layer].conv1d_state = inside[layer]
    for layer in set(layers) - blocks.keys():
        if getattr(cache, "linear_cache", None) and isinstance(cache.linear_cache[layer], Tensor):  # MiniMax
            cache.linear_cache[layer] = given.linear_cache[layer]
        else:
            cache.layers[layer] = given.layers[layer]
    arguments = inspect.signature(model.forward).parameters
    name = "cache_params" if "cache_params" in arguments else "past_key_values"
    # Bamba and MiniMax count positions from the wrong one where nobody says which.
    takes_positions = "position_ids" in arguments
    for at in range(position + 1, len(ids)):
        where = {"position_ids": torch.tensor([[at]])} if takes_positions else {}
        out = model(ids[None, at : at + 1], use_cache=True, **{name: cache}, **where)
    return out.logits[0, -1]
