"""Touches the model: adapters for token mixers, and the hook manager that cuts between positions.

Knows no facts, no tokenizers and no plots; imports torch and transformers only.
"""

from mambalens.hooks.errors import MambalensError
from mambalens.hooks.features import GROUPS, decay_norm, group_mask
from mambalens.hooks.knockout import PATHS, Cut, Knockout
from mambalens.hooks.manager import HookManager
from mambalens.hooks.mixer import Mixer, TokenMixing

__all__ = [
    "GROUPS",
    "PATHS",
    "Cut",
    "HookManager",
    "Knockout",
    "MambalensError",
    "Mixer",
    "TokenMixing",
    "decay_norm",
    "group_mask",
]
