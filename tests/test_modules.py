"""Front-end modules as one text: it runs as the modules do, and what cannot be read is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mambalens.html.modules import join, joined, named

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
