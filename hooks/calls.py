"""What a module is called with, told by types: transformers renames arguments from release to release."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache

RESIDUAL = "residual"
"""What the argument is called by which a module takes the residual stream, to add to it itself (BLOOM)."""


def signature_of(module_class: type[nn.Module]) -> inspect.Signature:
    """The signature of a class's forward, `self` included, also where a decorator takes old names of arguments."""
    return inspect.signature(module_class.forward)


def cache_argument(module_class: type[nn.Module]) -> str | None:
    """Name of the argument that takes a cache: the one annotated as transformers' `Cache`; None where none is."""
    for name, parameter in signature_of(module_class).parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, str):  # of a module with postponed annotations
            home = vars(sys.modules[module_class.__module__])
            try:
                annotation = eval(annotation, {"Cache": Cache, "Optional": typing.Optional} | home)
            except (NameError, TypeError, SyntaxError):
                continue
        members = typing.get_args(annotation) or (annotation,)
        if any(isinstance(member, type) and issubclass(member, Cache) for member in members):
            return name
    return None


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The cache among the arguments or the outputs of a call."""
    return next((value for value in values if isinstance(value, Cache)), None)


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those that a module takes as `**kwargs` among them."""
    signature = signature_of(type(module))
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    return given | given.pop(rest, {})


def recurrent_state(cache: Cache, layer: int) -> Float[Tensor, " batch *state"]:
    """The state that a state-space layer has left in a cache; `get_recurrent_state` is not in every release."""
    held: Any = cache.layers[layer]
    return held.recurrent_states[0]


def conv_state(cache: Cache, layer: int) -> Float[Tensor, "batch channel before"]:
    """The last inputs of a layer's convolution that a cache holds."""
    held: Any = cache.layers[layer]
    return held.conv_states[0]
