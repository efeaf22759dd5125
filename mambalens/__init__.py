"""Shows how facts travel through Mamba-1, Mamba-2 and transformer language models.

>>> from mambalens import Fact
>>> Fact("The capital of Peru is", subject="Peru", target=" Lima").subject
'Peru'
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambalens.experiments.comparison import compare, known_to_all
    from mambalens.facts.fact import Fact
    from mambalens.facts.files import load_facts
    from mambalens.facts.sequence import Facts
    from mambalens.features.selection import Selection
    from mambalens.hooks.errors import MambalensError
    from mambalens.lens import Lens
    from mambalens.result import Flow, SweepResult

# Loaded when first used: `import mambalens` and `mambalens --help` do without torch.
_HOMES = {
    "Fact": "facts.fact",
    "Facts": "facts.sequence",
    "Flow": "result",
    "load_facts": "facts.files",
    "Lens": "lens",
    "MambalensError": "hooks.errors",
    "Selection": "features.selection",
    "SweepResult": "result",
    "compare": "experiments.comparison",
    "known_to_all": "experiments.comparison",
}

__all__ = [
    "Fact",
    "Facts",
    "Flow",
    "Lens",
    "MambalensError",
    "Selection",
    "SweepResult",
    "compare",
    "known_to_all",
    "load_facts",
]

_HERE = Path(__file__).parent


class _Beside:
    """Finds `mambalens.hooks` and `mambalens.data` in a checkout, where their folders stand beside this one.

    Python started in a checkout imports this folder, whatever is installed.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, part = name.partition(".")
        if package != __name__ or part not in ("hooks", "data"):
            return None
        folder = _HERE.parent / part
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if not (_HERE / "hooks").is_dir():
    sys.meta_path.append(_Beside)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
