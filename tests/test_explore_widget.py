"""The widget of lens.explore in a real JupyterLab: what the page does, and what the next cell reads of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mambalens import Fact, Lens
from mambalens.explore.state import Cut

expect = pytest.importorskip("playwright.sync_api").expect
pytest.importorskip("jupyterlab")
pytest.importorskip("anywidget")
PATIENCE = 120
"""Seconds, where many tests share few cores."""
ROOT = Path(__file__).parent.parent
ODD = Fact('<script>alert("x")</script> & <b>Peru</b>: the capital is', "<b>Peru</b>", " Lima</script><script>alert(2)</script>",
           "<script>odd</script>", "<script>odd</script>")  # fmt: skip
CELLS = [
    "from mambalens import Fact, Facts, Lens\n"
    "lens, other = Lens.load('atlas-mamba1'), Lens.load('atlas-gpt-neox')\n"
    f"odd = Fact({ODD.prompt!r}, {ODD.subject!r}, {ODD.target!r}, {ODD.relation!r}, {ODD.id!r})\n"
    "widget = lens.explore(Fact('The capital of Peru is', 'Peru', 'Lima'), others=[other], facts=Facts([odd]))\n"
    "widget",
    "import json\n"
    "print('READ', json.dumps([widget.knockouts, json.loads(widget.result.to_json(orient='records', double_precision=15))]))",
    "import time\nslow = lens.hooks.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.4))\nprint('slow')",
    "slow.remove()\nprint('quick')",
]


def notebook(folder: Path) -> str:
    cells = [
        {
            "cell_type": "code",
            "id": f"cell{i}",
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for i, source in enumerate(CELLS)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (folder / "tour.ipynb").write_text(
        json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})
    )
    return "tour.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that asks nobody else for anything."""
    folder = tmp_path_factory.mktemp("lab")
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    notebook(notebooks)
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    token = secrets.token_urlsafe(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {f"JUPYTER_{name}": str(folder / name.lower()) for name in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")}
    own |= {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
    }
    own |= {"IPYTHONDIR": str(folder / "ipython"), "HOME": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = [
        "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.extension_manager=readonly",
        "--ServerApp.terminals_enabled=False", "--ServerApp.allow_root=True",
    ]  # fmt: skip
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options], env={**os.environ, **own}, cwd=notebooks, stdout=log, stderr=log
    )
    address, end = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}api?token={token}", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield f"{address}lab/tree/tour.ipynb?token={token}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def tab(browser: Any, lab: str) -> Iterator[Any]:
    """The notebook in a window; our code writes nothing to the console, and nobody else is asked for anything."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(PATIENCE * 1000)
    tab = context.new_page()
    complaints: list[str] = []
    home = lab.partition("/lab")[0]
    tab.on("console", lambda said: complaints.append(said.text) if ours(said) else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.on("request", lambda asked: None if asked.url.startswith((home, home.replace("http", "ws"), "blob:", "data:")) else complaints.append(asked.url))  # fmt: skip
    tab.goto(lab)
    tab.wait_for_selector(".jp-Notebook .jp-Cell")
    tab.wait_for_selector(".jp-Toolbar-kernelName:has-text('Python 3')")
    run(tab, 0)
    tab.wait_for_selector(".mambalens-widget[data-ready]")
    yield tab
    assert complaints == []
    context.close()


def ours(said: Any) -> bool:
    """JupyterLab itself writes to the console: what counts is errors, and whatever a widget's module writes."""
    return said.type == "error" or str(said.location.get("url", "")).startswith("blob:")


def run(tab: Any, number: int) -> str:
    """Run a cell, and give what it printed last."""
    cell, end = tab.locator(".jp-Cell").nth(number), time.monotonic() + PATIENCE
    prompt = cell.locator(".jp-InputPrompt").first
    before = prompt.inner_text()
    while (now := prompt.inner_text()) == before or not re.search(r"\d", now):
        assert time.monotonic() < end, tab.locator("body").inner_text()
        if tab.locator(
            ".jp-Dialog .jp-mod-accept"
        ).count():  # which kernel, where it was asked to run before there was one
            tab.click(".jp-Dialog .jp-mod-accept")
        elif now == before:
            cell.locator(".cm-content").click()
            tab.keyboard.press("Control+Enter")
        tab.wait_for_timeout(1000)
    return str(cell.locator(".jp-OutputArea-output").last.inner_text()).strip() if number else ""


def settled(tab: Any) -> None:
    tab.wait_for_function("(({ round, answered }) => round && round === answered)(document.querySelector('.mambalens-widget').dataset)")  # fmt: skip


def read(tab: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the second cell reads of the widget."""
    text = run(tab, 1)
    knockouts, rows = json.loads(text.partition("READ ")[2].replace("\n", ""))
    return knockouts, rows


def probability(lens: Lens, cuts: list[Cut]) -> float:
    (batch,) = lens.batches([lens.prompt(Fact("The capital of Peru is", "Peru", "Lima"))])
    with contextlib.ExitStack() as stack:
        for cut in cuts:
            stack.enter_context(lens.hooks.knockout(**cut.knockout))
        return float(lens.last_logits(batch)[0].softmax(-1)[batch.targets[0]])


def test_a_person_cuts_in_the_widget_and_the_next_cell_goes_on_from_there(tab: Any) -> None:
    lens = Lens.load("atlas-mamba1")
    settled(tab)
    tab.uncheck("[data-name=chosen][value=atlas-gpt-neox]")
    for position in (3, 4):
        tab.locator(".token").nth(position).click()
    settled(tab)
    cut = Cut((3, 4), (5,), tuple(range(12)), "both")
    knockouts, rows = read(tab)
    assert knockouts == [json.loads(json.dumps(cut.knockout))]
    assert [row["model"] for row in rows] == ["atlas-mamba1"]
    assert rows[0]["prob"] == pytest.approx(probability(lens, [cut]), rel=1e-5)
    shown = tab.inner_text(".card[data-model=atlas-mamba1] .big")
    assert f"{rows[0]['prob'] * 100:.3g}"[:4] in shown
    tab.locator(".mambalens-widget .undo").click()
    settled(tab)
    assert read(tab)[0][0]["sources"] == [3]
    tab.click("[data-copy=python]")
    expect(tab.locator(".copied")).to_have_text("Copied.")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tab.evaluate("navigator.clipboard.readText()"), "copied", "exec"), {})
    assert float(printed.getvalue().split()[-1]) == pytest.approx(read(tab)[1][0]["prob"], rel=1e-6)


def test_what_is_looked_at_closer_is_cut_by_a_click(tab: Any) -> None:
    lens, other = Lens.load("atlas-mamba1"), Lens.load("atlas-gpt-neox")
    settled(tab)
    tab.fill("[data-name=window]", "10")
    tab.click("[data-reading=heatmap]")
    tab.wait_for_selector(".reading[data-shows=heatmap] .mark")
    tab.click(".mark[data-row='4'][data-column='1']")
    settled(tab)
    cell = Cut((4,), (5,), tuple(range(1, 11)), "both")
    knockouts, rows = read(tab)
    assert knockouts == [json.loads(json.dumps(cell.knockout))]
    assert [row["model"] for row in rows] == ["atlas-mamba1", "atlas-gpt-neox"]
    # A transformer has attention alone, which is its path 'both', too.
    for row, one in zip(rows, (lens, other), strict=True):
        assert row["base_prob"] == pytest.approx(probability(one, []), rel=1e-5)
        assert row["prob"] == pytest.approx(probability(one, [cell]), rel=1e-5)
    tab.click("[data-reading=flow]")
    tab.wait_for_selector(".reading[data-shows=flow] .edge")
    with lens.hooks.knockout(**cell.knockout):
        edge = (
            lens.flow([Fact("The capital of Peru is", "Peru", "Lima")], progress=False, certify=20).strongest(1).iloc[0]
        )
    tab.locator(".edge[data-edge='0'] .hit").click(force=True)
    settled(tab)
    made = Cut((int(edge.source),), (int(edge.target),), (int(edge.layer),), edge.path)
    assert read(tab)[0] == [json.loads(json.dumps(cut.knockout)) for cut in (cell, made)]
    # A dark notebook is a dark page, also where the system is light; its figures are drawn again.
    paper = "document.querySelector('.reading svg rect').getAttribute('fill')"
    assert tab.evaluate(paper) == "#ffffff"
    tab.evaluate("document.body.dataset.jpThemeLight = 'false'")
    expect(tab.locator(".mambalens-widget")).to_have_css("color-scheme", "dark")
    tab.wait_for_function(f"{paper} === '#161616'")


def test_facts_are_texts_and_a_long_question_is_cancelled(tab: Any) -> None:
    settled(tab)
    tab.click("summary:text('Find a fact')")
    tab.click(".facts button")
    settled(tab)
    assert tab.input_value(".mambalens-widget [data-name=prompt]") == ODD.prompt
    for reading in ("heatmap", "flow", "contributions", "layers", "attention"):
        tab.click(f"[data-reading={reading}]")
        tab.wait_for_selector(f".reading[data-shows={reading}] h3")
    assert tab.locator(".mambalens-widget").locator("script, b").count() == 0
    assert run(tab, 2) == "slow"
    tab.click("[data-reading=routes]")
    tab.wait_for_selector(".mambalens-widget .working:not([hidden])")
    tab.click(".mambalens-widget .cancel")
    tab.wait_for_selector(".mambalens-widget .working", state="hidden")
    assert run(tab, 3) == "quick"
    assert tab.get_attribute(".mambalens-widget .reading", "data-shows") == "attention"
    tab.locator(".token").nth(1).click()
    settled(tab)
    assert [one["sources"] for one in read(tab)[0]] == [[1]]
