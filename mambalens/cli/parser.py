"""Options and arguments of the command line; those of a sweep are made from its settings, which describe them once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from mambalens.cli.settings import CONDITIONS, SweepSettings
from mambalens.hooks.errors import MambalensError

Verb = TypeVar("Verb", bound=Callable[..., Any])


class Verbs(click.Group):
    """Verbs in the order in which they are written; one that is interrupted ends with 130, as shells have it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs' names."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)


def option(
    *names: str, help: str, kind: type = str, many: bool = False, least: int | None = None, metavar: str | None = None,
    **more: Any,
) -> Callable[[Verb], Verb]:  # fmt: skip
    """An option.

    Args:
        names: the flag, and the parameter if it is called otherwise.
        help: what it is for.
        kind: what a value is; bool makes a flag.
        many: it may be given several times; the parameter is a tuple.
        least: the least number that it takes.
        metavar: stands for the value in help; without, its kind.
        more: as for `click.option`.
    """
    if kind is bool:
        return click.option(*names, is_flag=True, help=help, **more)
    called = "int range" if least is not None else kind.__name__.lower()
    metavar = metavar or (f"<list[{called}]>" if many else f"<{called}>")
    return click.option(*names, type=_type(kind, least), multiple=many, metavar=metavar, help=help, **more)


def argument(
    name: str, metavar: str, help: str, kind: type = str, many: bool = False, **more: Any
) -> Callable[[Verb], Verb]:
    """An argument, with in its help what click says of options only: that it is required, or its default.

    Args:
        name: the parameter.
        metavar: stands for the value in help.
        help: what it is for.
        kind: what a value is.
        many: there may be several; the parameter is a tuple.
        more: `required` (unless there is a default, it is), `default`.
    """
    # A default of None, said to click, would be taken for a value.
    required = more.setdefault("required", "default" not in more)
    if "default" in more:
        help += f"  [default: {more['default']}]"
    elif required:
        help += "  [required]"
    shown = (metavar if required else f"[{metavar}]") + "..." * many
    return click.argument(name, type=_type(kind), nargs=-1 if many else 1, metavar=shown, help=help, **more)


def typed(*names: str) -> list[str]:
    """Which of these options the command line has, as flags."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [f"--{name.replace('_', '-')}" for name in given]


def prompt_or_facts(prompt: str | None) -> None:
    """Refuse options of a single prompt beside those that choose among facts.

    Raises:
        MambalensError: if there are.
    """
    choosing, of_one = typed("facts", "where", "limit", "all_facts"), typed("subject", "target")
    if prompt is not None and choosing:
        raise MambalensError(
            f"--prompt is a single one, and {', '.join(choosing)} would choose among facts: leave out either."
        )
    if prompt is None and of_one:
        raise MambalensError(f"{' and '.join(of_one)} would be of a single prompt: give --prompt too, or leave it out.")


def settings(*names: str, **defaults: Any) -> Callable[[Verb], Verb]:
    """Options of a sweep that another verb has too, in this order; one with a default of its own takes one value."""
    known = {setting.name: setting for setting in fields(SweepSettings)}

    def with_options(verb: Verb) -> Verb:
        for name in reversed((*names, *defaults)):
            many = known[name].metadata["many"] and name not in defaults
            default = defaults.get(name, known[name].default)
            verb = _option_of(known[name], many, default, known[name].metadata["help"])(verb)
        return verb

    return with_options


def every_setting(verb: Verb) -> Verb:
    """Everything that a sweep can be told: None or nothing where it was not given, since a file may say it."""
    for setting in reversed(fields(SweepSettings)):
        about, default = setting.metadata, setting.default
        if setting.name == "model":
            verb = argument("model", "MODEL", about["help"], many=True, required=False)(verb)
            continue
        shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
        words = "" if default in (None, (), False, MISSING) else f"  [default: {shown}]"
        verb = _option_of(setting, about["many"], None, about["help"] + words)(verb)
    return verb


def _option_of(setting: Field[Any], many: bool, default: Any, help: str) -> Callable[[Verb], Verb]:
    flag, about = f"--{setting.name.replace('_', '-')}", setting.metadata
    metavar = "COLUMN=VALUE" if setting.name in CONDITIONS else None
    return option(
        flag, help=help, kind=about["kind"], many=many, least=about["least"], metavar=metavar, default=default,
        callback=_memory if setting.name == "memory" else None,
    )  # fmt: skip


def _memory(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """A size, refused before any model is asked anything."""
    if value is not None:
        from mambalens.system.memory import size_of

        size_of(value)
    return value


def _type(kind: type, least: int | None = None) -> Any:
    if kind is Path:
        return click.Path(path_type=Path)
    return kind if least is None else click.IntRange(min=least)
