"""How a model was loaded, in words that load it again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mambalens.data import checkpoints
from mambalens.loading.gguf import SMOLLM2


class Origin(NamedTuple):
    """What `Lens.load` was told, and what it gave."""

    name: str
    """A bundled name, a hub id, or the whole path of a folder or file."""
    options: dict[str, Any]
    """Options that can be written in a program."""
    left_out: tuple[str, ...]
    """Names of those that cannot, such as objects."""
    dtype: str
    """Of the model when it was loaded."""
    device: str
    """Where it took its input then."""

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any], dtype: Any, device: Any) -> Origin:
        """What loading a name with these options gave: a model of a dtype, on a device."""
        plain = {option: _plain(value) for option, value in options.items()}
        if isinstance(plain.get("tokenizer"), str):
            plain["tokenizer"] = whole(plain["tokenizer"])
        kept = {option: value for option, value in plain.items() if _is_written(value)}
        place = name if name in checkpoints() or name == SMOLLM2 else whole(name)
        return cls(place, kept, tuple(option for option in plain if option not in kept), short(dtype), str(device))


def short(dtype: Any) -> str:
    """A dtype's name, as options have it: 'float32'."""
    return str(dtype).removeprefix("torch.")


def whole(place: str) -> str:
    """A folder's or file's path from the root; anything else as it is."""
    return str(Path(place).resolve()) if Path(place).exists() else place


def _plain(value: Any) -> Any:
    """Dtypes, devices and paths as their names."""
    if isinstance(value, Path):
        return str(value)
    if re.fullmatch(r"torch\.\w+", repr(value)):
        return short(value)
    return str(value) if type(value).__name__ == "device" else value


def _is_written(value: Any) -> bool:
    """Whether Python reads what it writes of a value."""
    if isinstance(value, dict):
        return all(_is_written(one) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple):
        return all(map(_is_written, value))
    return value is None or type(value) in (str, int, float, bool)
