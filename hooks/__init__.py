"""Touches the model: adapters for token mixers, and the hook manager that cuts between positions.

Knows no facts, no tokenizers and no plots; torch and transformers are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambalens.hooks.errors import MambalensError
    from mambalens.hooks.groups import GROUPS, decay_norm, group_mask
    from mambalens.hooks.knockout import PATHS, Knockout
    from mambalens.hooks.manager import HookManager
    from mambalens.hooks.masks import Cut
    from mambalens.hooks.mixer import Mixer
    from mambalens.hooks.steering import Addition
    from mambalens.hooks.token_mixing import TokenMixing
    from mambalens.hooks.values import Values

_HOMES = {
    "MambalensError": "errors",
    "GROUPS": "groups",
    "decay_norm": "groups",
    "group_mask": "groups",
    "PATHS": "knockout",
    "Cut": "masks",
    "Knockout": "knockout",
    "HookManager": "manager",
    "Mixer": "mixer",
    "Addition": "steering",
    "TokenMixing": "token_mixing",
    "Values": "values",
}

__all__ = [
    "GROUPS",
    "PATHS",
    "Addition",
    "Cut",
    "HookManager",
    "Knockout",
    "MambalensError",
    "Mixer",
    "TokenMixing",
    "Values",
    "decay_norm",
    "group_mask",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
