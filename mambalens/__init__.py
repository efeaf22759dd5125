"""Shows how facts travel through Mamba-1, Mamba-2 and transformer language models.

>>> from mambalens import Fact
>>> Fact("The capital of Peru is", subject="Peru", target=" Lima").subject
'Peru'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambalens.comparison import compare, known_to_all
    from mambalens.facts import Fact, Facts, load_facts
    from mambalens.hooks.errors import MambalensError
    from mambalens.lens import Lens
    from mambalens.result import SweepResult
    from mambalens.selection import Selection

# Loaded when first used: `import mambalens` and `mambalens --help` do without torch.
_HOMES = {
    "Fact": "facts",
    "Facts": "facts",
    "load_facts": "facts",
    "Lens": "lens",
    "MambalensError": "hooks.errors",
    "Selection": "selection",
    "SweepResult": "result",
    "compare": "comparison",
    "known_to_all": "comparison",
}

__all__ = [
    "Fact",
    "Facts",
    "Lens",
    "MambalensError",
    "Selection",
    "SweepResult",
    "compare",
    "known_to_all",
    "load_facts",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
