"""What the documentation's pages take from the code when they are built, so that it is written once.

A page says `<!-- fill: NAME -->` where something is to stand, or `<!-- check: NAME -->` below a table that has to list
what the code lists. An unknown name, or a table that differs, ends the build.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equations import collect
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "build" / "docs-source" / "mambalens"
WIDTH = 84
"""Characters of a line of help."""


def on_startup(command: str, dirty: bool) -> None:
    """Lay the packages out as they are imported: mambalens.hooks and mambalens.data stand at the repository's top."""
    SOURCE.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "mambalens").iterdir() if path.name != "__pycache__"}
    wanted |= {name: ROOT / name for name in ("hooks", "data")}
    for link in SOURCE.iterdir():
        link.unlink()
    for name, path in wanted.items():
        (SOURCE / name).symlink_to(path)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill a page's markers."""

    def filled(marker: re.Match[str]) -> str:
        what, _, argument = marker[2].strip().partition(" ")
        known = FILLS if marker[1] == "fill" else CHECKS
        if what not in known:
            raise PluginError(f"{page.file.src_uri}: nothing is called {what!r} to {marker[1]}: {', '.join(known)}.")
        try:
            return known[what](argument) if marker[1] == "fill" else known[what](argument, markdown)
        except LookupError as error:
            raise PluginError(f"{page.file.src_uri}: {marker[0]}: {error.args[0]}") from error

    return re.sub(r"<!-- (fill|check): (.*?) -->", filled, markdown)


def architectures(_: str) -> str:
    """The table that the tests make."""
    found = re.search(r"<!-- architectures -->\n(.*?)\n<!-- end -->", readme(), re.DOTALL)
    if found is None:
        raise LookupError("README.md has no table between <!-- architectures --> and <!-- end -->.")
    return found[1]


def readme_table(first: str) -> str:
    """The README's table whose first cell is this."""
    found = re.search(rf"^\| {re.escape(first)} \|.*?(?=\n\n|\Z)", readme(), re.DOTALL | re.MULTILINE)
    if found is None:
        raise LookupError(f"README.md has no table that begins with {first!r}.")
    return found[0]


def readme() -> str:
    """README.md."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def verbs(_: str) -> str:
    """Every verb of the command line with its help, as it is now."""
    from click.testing import CliRunner

    from mambalens.cli.app import app

    table, parts = ["| verb | what it does |", "|---|---|"], []
    for name, command in app.commands.items():
        summary = " ".join((command.help or "").strip().split("\n\n")[0].split())
        table.append(f"| [`{name}`](#{name}) | {summary} |")
        shown = CliRunner().invoke(app, [name, "--help"], prog_name="mambalens", terminal_width=WIDTH)
        if shown.exit_code:
            raise LookupError(f"'mambalens {name} --help' ended with {shown.exit_code}.")
        parts.append(f"## {name}\n\n```text\n{shown.output.rstrip()}\n```")
    return "\n".join(table) + "\n\n" + "\n\n".join(parts)


def settings(_: str) -> str:
    """The settings of a sweep as a TOML file has them."""
    from dataclasses import MISSING, fields

    from mambalens.cli.settings import SweepSettings

    kinds = {"str": "text", "int": "number", "bool": "true or false"}
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for setting in fields(SweepSettings):
        about, default = setting.metadata, setting.default
        kind = kinds[about["kind"].__name__] + (", or a list" if about["many"] else "")
        shown = "" if default in (None, (), MISSING) else f"`{default}`"
        if isinstance(default, tuple) and default:
            shown = ", ".join(f"`{value}`" for value in default)
        if default is MISSING:
            shown = "must be given"
        lines.append(f"| `{setting.name}` | {kind} | {shown.replace('False', 'false')} | {about['help']} |")
    return "\n".join(lines)


def roles(_: str) -> str:
    """Every role and what it means."""
    found = constant("mambalens/facts/roles.py", "ROLES")
    return "\n".join(["| role | positions |", "|---|---|", *(f"| `{role}` | {text} |" for role, text in found.items())])


def metrics(_: str) -> str:
    """Every metric and what axes call it."""
    found = constant("mambalens/runs/table.py", "METRICS")
    return "\n".join(
        ["| metric | what it is |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in found.items())]
    )


def groups(_: str) -> str:
    """Every group of features and the thirds it is made of."""
    found = constant("hooks/groups.py", "GROUPS")
    rows = (f"| `{name}` | {', '.join(parts)} |" for name, parts in found.items())
    return "\n".join(["| group | thirds by decay norm |", "|---|---|", *rows])


def experiments(_: str) -> str:
    """The paper's experiments as `mambalens reproduce` knows them."""
    from mambalens.experiments.reproduce import EXPERIMENTS

    lines = ["| name | what it shows | windows | models in the paper |", "|---|---|---|---|"]
    for name, found in EXPERIMENTS.items():
        windows = ", ".join(map(str, found.windows))
        lines.append(f"| `{name}` | {found.shows} | {windows} | {found.paper} |")
    return "\n".join(lines)


def equations(_: str) -> str:
    """Every equation with its source, its letters and the function that computes it."""
    parts, heading = [], None
    for equation in collect(ROOT):
        if equation.heading != heading:
            heading = equation.heading
            parts.append(f"## {heading}")
        sources = "; ".join(equation.sources)
        sources = sources[0].upper() + sources[1:]
        about = f"{equation.letters.rstrip('.')}.\n\n" if equation.letters else ""
        parts.append(f"```text\n{equation.lines}\n```\n\n{about}*{sources}.* Computed by `{equation.function}`.")
    return "\n\n".join(parts)


def constant(file: str, name: str) -> Any:
    """The value of a constant, read from its file: importing it could take torch."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = node.value  # type: ignore[attr-defined]
            if isinstance(value, ast.Tuple):  # which may hold another constant's values: (*EDGE, "features")
                parts = [constant(file, e.value.id) if isinstance(e, ast.Starred) else (ast.literal_eval(e),)
                         for e in value.elts]  # type: ignore[attr-defined]  # fmt: skip
                return tuple(part for several in parts for part in several)
            return ast.literal_eval(value)
    raise LookupError(f"{file} has no {name}.")


def lists(argument: str, markdown: str) -> str:
    """Refuse a page whose tables do not list what a constant lists: `FILE NAME`."""
    file, _, name = argument.partition(" ")
    wanted = list(constant(file, name))
    rows = re.findall(r"^\| `([a-z_]+)` \|", markdown, re.MULTILINE)
    missing = [key for key in wanted if key not in rows]
    if missing:
        raise LookupError(f"the page does not list {', '.join(missing)} of {name}.")
    return ""


FILLS: dict[str, Callable[[str], str]] = {
    "architectures": architectures,
    "readme-table": readme_table,
    "verbs": verbs,
    "settings": settings,
    "roles": roles,
    "metrics": metrics,
    "groups": groups,
    "experiments": experiments,
    "equations": equations,
}
CHECKS: dict[str, Callable[[str, str], str]] = {"lists": lists}
