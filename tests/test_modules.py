"""Front-end modules as one text: it runs as the modules do, and what cannot be read is refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mambalens.html.modules import join, joined, named, styles

MODULES = {
    "a.js": 'export const name = "a";\nlet count = 0;\nexport function next() { return (count += 1); }\n',
    "b.js": 'import { name as other, next } from "./a.js";\nconst name = "b";\nexport const both = () => `${name}${other}${next()}`;\n',
    "c.js": 'import * as a from "./a.js";\nimport { both } from "./b.js";\nconst next = [both(), a.name, a.next(), both()];\n'
    "export default next;\n",
}


def written(folder: Path, files: dict[str, str]) -> tuple[Path]:
    for name, text in files.items():
        (folder / name).write_text(text)
    return (folder,)


def test_one_text_does_what_the_modules_do_and_each_module_runs_once(tmp_path: Path, browser: Any) -> None:
    text = join("c.js", written(tmp_path, MODULES))
    page = browser.new_page()
    found = page.evaluate(
        "async (text) => (await import(URL.createObjectURL(new Blob([text], { type: 'text/javascript' })))).default",
        text,
    )
    page.close()
    assert found == ["ba1", "a", 2, "ba3"]


@pytest.mark.parametrize(("entry", "package"), [("page.js", "explore"), ("report.js", "report"), ("flow.js", "report")])
def test_each_page_is_one_text(entry: str, package: str) -> None:
    text = joined(entry, f"mambalens.{package}")
    assert not re.search('^export |from "\\./', text, re.MULTILINE)
    assert text.count("function walk(") == 1
    assert "</script" not in text.lower()


def test_imports_of_what_is_no_file_are_kept_once_and_stand_first(tmp_path: Path, browser: Any) -> None:
    outside = 'import Thing from "thing";\n'
    files = {
        "a.js": outside + "export const a = Thing + 1;\n",
        "b.js": 'import { a } from "./a.js";\n' + outside + "document.title = `${a + Thing}`;\n",
    }
    text = join("b.js", written(tmp_path, files))
    assert text.startswith(outside) and text.count(outside) == 1
    page = browser.new_page()
    imports = '{"imports": {"thing": "data:text/javascript,export default 20"}}'
    page.set_content(f'<script type="importmap">{imports}</script><script type="module">{text}</script>')
    page.wait_for_function("document.title === '41'")
    page.close()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"c.js": 'import { c } from "./d.js";\n', "d.js": 'import { c } from "./c.js";\nexport const d = c;\n'}, "circle"),
        ({"c.js": 'import d from "./d.js";\n', "d.js": "export default 1;\n"}, "c.js imports in words"),
        ({"c.js": 'import { d } from "./d.js";\n', "d.js": "export let d = 1;\n"}, "d.js exports in words"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused(tmp_path: Path, files: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        join("c.js", written(tmp_path, files))


def test_no_name_leads_out_of_the_folders() -> None:
    assert named("dom.js", "mambalens.explore") is not None
    assert named("explore.js", "mambalens.explore") is not None
    for name in ("../modules.py", "..", "", "/etc/passwd", "nothing.js"):
        assert named(name, "mambalens.explore") is None


PACKAGES = Path(__file__).parent.parent / "mambalens"
STYLED = {
    "report": styles("mambalens.report", "report.css"),
    "flow": styles("mambalens.report", "report.css", "flow.css"),
    "widget": styles("mambalens.explore", "explore.css", "widget.css"),
    "explore": styles("mambalens.explore", "page.css", "explore.css"),
}


@pytest.mark.parametrize("page", STYLED)
def test_every_colour_that_a_page_names_is_given_and_once(page: str) -> None:
    text = STYLED[page]
    given = re.findall(r"(--[\w-]+):", text)
    named_here = set(re.findall(r"var\((--[\w-]+)\)", text))
    by_hand = {"--share", "--full"}  # of single cells, by the flow's template and its classes
    assert named_here and named_here - by_hand <= set(given)
    assert all(given.count(name) == 1 for name in set(given) - by_hand - {"--dt-html-background"})
    assert text.count("--ink: ") == 1 and "--paper: light-dark(" in text


def test_colours_of_styles_are_those_of_figures(browser: Any) -> None:
    page = browser.new_page()
    page.set_content(f'<html class="mambalens-theme"><style>{STYLED["flow"]}</style><p></p></html>')
    figures = join("figures.js", (PACKAGES / "html" / "scripts",))
    found = page.evaluate(
        """async (text) => {
          const { LIGHT, DARK } = await import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
          const shown = document.querySelector("p").style, names = ["ink", "soft", "line", "paper", "loss", "gain", "none"];
          const colour = (value) => { shown.color = value; return getComputedStyle(document.querySelector("p")).color; };
          return [LIGHT, DARK].map((theme, dark) => {
            document.documentElement.style.colorScheme = dark ? "dark" : "light";
            return names.map((name) => [name, colour(`var(--${name})`), colour(Array.isArray(theme[name]) ? `rgb(${theme[name]})` : theme[name])]);
          });
        }""",
        figures,
    )
    page.close()
    light, dark = found
    assert len(light) == len(dark) == 7 and all(ours == theirs for _, ours, theirs in light + dark), found
    assert all(ours != other for (_, ours, _), (_, other, _) in zip(light, dark, strict=True))


def test_everything_that_pages_carry_is_in_the_package() -> None:
    carried = tomllib.loads((PACKAGES.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = [path.relative_to(PACKAGES) for path in PACKAGES.rglob("*") if path.suffix in (".css", ".js", ".html")]
    assert {path.suffix for path in found} == {".css", ".js", ".html"}
    for path in found:
        package, *rest = path.parts
        assert any(Path(*rest).match(pattern) for pattern in carried[f"mambalens.{package}"]), path
