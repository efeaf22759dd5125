"""Front-end code as one text: what a page or a notebook that can fetch nothing carries in place of its modules."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

SHARED = files("mambalens.html") / "scripts"
"""Modules that pages share."""
STYLES = files("mambalens.html") / "styles"
"""Styles that pages share."""
_IMPORT = re.compile(
    r'^import (?:\* as (?P<whole>\w+)|\{(?P<names>[^}]*)\}) from "\./(?P<file>[\w.-]+)";\n', re.MULTILINE
)
_OUTSIDE = re.compile(r'^import \w+ from "(?![./])[^"]+";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|const|class) (?P<name>\w+))", re.MULTILINE)


@functools.cache
def joined(entry: str, package: str) -> str:
    """A module among the templates of a package, with everything that it imports from there or from what is shared."""
    return join(entry, (files(package) / "templates", SHARED))


def join(entry: str, folders: Sequence[Traversable]) -> str:
    """A module with everything that it imports.

    What it imports stands before it, each module once, as an object of its exports, so that no name of one module is
    seen in another. The module itself stays one: its own exports are kept, and so are imports of what is no file, as
    `import DataTable from "datatables";`, which the page's import map resolves.

    Args:
        entry: the module's file.
        folders: where it and what it imports are.

    Raises:
        ValueError: for an import or export in words that are not read here, or imports that go in a circle.
    """
    text = "".join(_with_imports(entry, folders, done={}, above=()))
    outside = dict.fromkeys(_OUTSIDE.findall(text))
    return "".join(outside) + _OUTSIDE.sub("", text)


def styles(package: str, *names: str) -> str:
    """Styles as one text: those that pages share, and then files among the templates of a package."""
    shared = sorted(STYLES.iterdir(), key=lambda file: file.name)
    own = [files(package) / "templates" / name for name in names]
    return "\n".join(file.read_text(encoding="utf-8") for file in (*shared, *own))


def named(name: str, package: str) -> Traversable | None:
    """A file of front-end code, of a package or shared; None if there is none of this name."""
    for folder in (files(package) / "templates", SHARED, STYLES):
        # One part of a path, and only of what is carried: no name leads elsewhere.
        for file in folder.iterdir():
            if file.name == name:
                return file
    return None


def _with_imports(
    name: str, folders: Sequence[Traversable], done: dict[str, str], above: tuple[str, ...]
) -> Iterator[str]:
    """The texts of what a module imports, and its own; `done` are the objects that stand for modules already."""
    if name in above:
        raise ValueError(f"Imports go in a circle: {' -> '.join((*above, name))}.")
    text = next(folder / name for folder in folders if (folder / name).is_file()).read_text(encoding="utf-8")
    for told in _IMPORT.finditer(text):
        if told["file"] not in done:
            yield from _with_imports(told["file"], folders, done, (*above, name))
    body = _IMPORT.sub(lambda told: _taken(told, done), text)
    if re.search(r"^import\b", _OUTSIDE.sub("", body), re.MULTILINE):
        raise ValueError(f"{name} imports in words that are not read here: name what it takes from './file.js'.")
    if not above:
        yield body
        return
    exports = [told["name"] for told in _EXPORT.finditer(body)]
    body = _EXPORT.sub("", body)
    if re.search(r"^export\b", body, re.MULTILINE):
        raise ValueError(f"{name} exports in words that are not read here: write export before its function or const.")
    done[name] = f"module{len(done)}"
    yield f"const {done[name]} = (() => {{\n{body}return {{ {', '.join(exports)} }};\n}})();\n"


def _taken(told: re.Match[str], done: dict[str, str]) -> str:
    """An import as a constant."""
    if told["whole"]:
        return f"const {told['whole']} = {done[told['file']]};\n"
    return f"const {{{told['names'].replace(' as ', ': ')}}} = {done[told['file']]};\n"
