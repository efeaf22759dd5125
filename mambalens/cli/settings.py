"""What `mambalens sweep` can be told: every option described once, for the command line, TOML files and Python."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from mambalens import defaults
from mambalens.hooks.errors import MambalensError, choose

CONDITIONS = ("where", "over_where")
"""Settings of the form COLUMN=VALUE; in a TOML file they may be tables."""


def _option(text: str, default: Any = MISSING, kind: type = str, many: bool = False, least: int | None = None) -> Any:
    """A setting: its help, default and kind; `many` takes a list."""
    about = {"help": text, "kind": kind, "many": many, "least": least}
    return field(metadata=about) if default is MISSING else field(default=default, metadata=about)


@dataclass(frozen=True)
class SweepSettings:
    """A sweep of one or several models; of several targets, windows and ablations, each combination is swept alone."""

    model: tuple[str, ...] = _option("Bundled names, folders, .gguf files or hub ids.", many=True)
    out: str = _option("Folder for results and figure.")
    facts: str = _option("atlas, counterfact, known_1000, or a .jsonl, .json, .csv or .parquet file.", defaults.FACTS)
    source: tuple[str, ...] = _option("Roles to knock out.", defaults.SOURCES, many=True)
    target: tuple[str, ...] = _option("Role that is not to receive the information.", (defaults.TARGET,), many=True)
    window: tuple[int, ...] = _option("Consecutive layers that a knockout covers.", (defaults.WINDOW,), int, many=True)
    features: tuple[str, ...] = _option(
        "Groups ('slow', 'fast:0.1'), feature numbers or a selection's .csv.", defaults.FEATURES, many=True
    )
    path: tuple[str, ...] = _option("main, conv, erase or both.", defaults.PATHS, many=True)
    measure: str | None = _option("Two more columns: log_odds, log_prob, logit or prob.", None)
    ablation: tuple[str, ...] = _option("Put in: zero, mean, resample.", (defaults.ABLATION,), many=True)
    keys: bool = _option("Put in keys of attention with the values.", False, bool)
    over: str | None = _option("Facts to average over, if others.", None)
    over_where: tuple[str, ...] = _option("Keep of --over facts with this value.", (), many=True)
    mixers: str | None = _option("Cut only this kind: attention, mamba2, deltanet, ... (in hybrid models).", None)
    all_facts: bool = _option("Also facts the model answers wrong.", False, bool)
    common: bool = _option("Only facts that all of several models know.", False, bool)
    subject_tokens: int | None = _option("Subjects of at most so many tokens.", None, int, least=1)
    where: tuple[str, ...] = _option("Keep facts with this value, e.g. wording=far.", (), many=True)
    limit: int | None = _option("At most this many facts, drawn at random with seed 0.", None, int, least=1)
    batch_size: int | None = _option("Prompts a batch at most.", None, int, least=1)
    block_size: int = _option("Facts a block: what a killed run computes again at most.", defaults.BLOCK, int, least=1)
    memory: str | None = _option("What to use beside the model, e.g. 4GB; by default half of what is free.", None)
    dtype: str = _option("float32, bfloat16, float16, float64 or auto.", defaults.DTYPE)
    tokenizer: str | None = _option("Where the tokenizer is, if elsewhere.", None)

    def __post_init__(self) -> None:
        if self.common and self.all_facts:
            raise MambalensError("common and all_facts contradict each other: give one of them.")
        for name in ("model", "source", "target", "window", "features", "path", "ablation"):
            values = getattr(self, name)
            if not values:
                raise MambalensError(f"{name} is empty: name at least one.")
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise MambalensError(f"{name} has {twice!r} twice.")
        if self.keys and defaults.ABLATION in self.ablation:
            raise MambalensError(
                f"keys puts in keys of attention with values, but ablation has {defaults.ABLATION!r}, which puts in "
                "nothing: leave one of them out."
            )
        if self.over is not None and "mean" not in self.ablation:
            raise MambalensError("over names facts that means are taken over: give ablation mean too, or leave it out.")

    @classmethod
    def read(cls, file: str | Path | None, given: Mapping[str, Any]) -> SweepSettings:
        """Settings from a TOML file, if there is one, and what was given beside it, which goes first.

        Raises:
            MambalensError: for a file that is no TOML, an unknown key (with the near match), a value of the wrong kind,
                or a setting that is missing.
        """
        known = {setting.name: setting for setting in fields(cls)}
        values: dict[str, Any] = {}
        if file is not None:
            for key, value in _toml(Path(file)).items():
                if key not in known:
                    raise MambalensError(f"{str(file)!r}: {key!r} is no setting: {choose(key, known)}.")
                values[key] = _of_kind(value, known[key], f"{str(file)!r}: {key}")
        values |= {
            key: _of_kind(value, known[key], f"--{key.replace('_', '-')}")
            for key, value in given.items()
            if value is not None and value != [] and value != ()
        }
        missing = [name for name in ("model", "out") if name not in values]
        if missing:
            raise MambalensError(f"{' and '.join(missing)} must be given, on the command line or in a file (--config).")
        return cls(**values)


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MambalensError(f"The file {str(path)!r} cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MambalensError(f"The file {str(path)!r} is not TOML ({error}).") from error


def _of_kind(value: Any, setting: Field[Any], place: str) -> Any:
    """A value as the setting has it; `CONDITIONS` may be tables of columns and values."""
    kind, many = setting.metadata["kind"], setting.metadata["many"]
    if setting.name in CONDITIONS and isinstance(value, Mapping):
        value = [f"{key}={one}" for key, ones in value.items() for one in (ones if isinstance(ones, list) else [ones])]
    if many:
        listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return tuple(_one(item, kind, setting, place) for item in listed)
    return _one(value, kind, setting, place)


def _one(value: Any, kind: type, setting: Field[Any], place: str) -> Any:
    if setting.name in ("features", "memory") and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, Path):
        value = str(value)
    if type(value) is not kind:
        words = {str: "text", int: "a whole number", bool: "true or false"}
        raise MambalensError(f"{place} has {value!r}, which is not {words[kind]}.")
    least = setting.metadata["least"]
    if least is not None and value < least:
        raise MambalensError(f"{place} has {value!r}: give {least} or more.")
    return value
