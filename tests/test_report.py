"""The report: what is in the page, and what a reader can do with it in a browser."""

from __future__ import annotations

import base64
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pages import until

from mambalens import Fact, Facts, Lens, MambalensError, SweepResult, load_facts
from mambalens.cli.app import app

MODELS = ("atlas-mamba2", "atlas-gpt-neox")
ODD = Fact(
    '<b>Peru</b> & "Chile" </script>: the capital of <b>Peru</b> is', "<b>Peru</b>", "Lima</script>", "odd", "odd-1"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in MODELS:
        lens = Lens.load(name)
        known = lens.known(load_facts("atlas"), limit=14, progress=False)
        facts = Facts([*known, ODD], [*known.extra, {}])
        facts.answered = known.answered
        roles = ("subject", "last", "context")
        paths = ("main", "both") if "mamba" in name else ("main",)
        lens.sweep(facts, roles, window=6, features=("all", "slow") if paths[1:] else ("all",), paths=paths,
                   out=folder / "roles" / name, progress=False)  # fmt: skip
        lens.sweep(facts[-4:], "each", window=6, out=folder / "tokens" / name, progress=False)
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    out = runs / "page.html"
    done = CliRunner().invoke(app, ["report", str(runs / "roles"), str(runs / "tokens"), "--out", str(out)])
    assert done.exit_code == 0 and "page.html" in done.output
    return out


@pytest.fixture(scope="module")
def data(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def unpacked(text: str, width: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(-1, width)


def test_curves_are_the_summary(runs: Path, data: dict[str, Any]) -> None:
    result = SweepResult.load(runs / "roles")
    for metric in ("change_pct", "hit", "rank", "kl", "prob"):
        for by, subset in (([], "all facts"), (["relation"], "relation: capital")):
            summary = result.summary(metric=metric, by=by)
            summary = summary[summary.relation == "capital"] if by else summary
            keys = ["model", "source", "target", "features", "path", "window_size"]
            found = {tuple(s[key] for key in keys): s for s in data["series"]}
            for key, rows in summary.groupby(keys, sort=False):
                series = found[key]
                assert series["starts"] == rows.window_start.tolist()
                assert series["curves"][subset]["n"] == rows.n.tolist()
                drawn = np.array(series["curves"][subset][metric], float)
                np.testing.assert_allclose(drawn, rows[["mean", "low", "high"]].T.to_numpy(float), rtol=1e-4)


def test_every_facts_own_numbers_are_those_of_the_table(runs: Path, data: dict[str, Any]) -> None:
    tables = [SweepResult.load(runs / kind).table for kind in ("roles", "tokens")]
    table = pd.concat(tables).set_index(["model", "fact_id", "source", "features", "path", "window_start"])
    seen = 0
    for model, details in data["details"].items():
        for series in details["curves"]:
            width = len(series["starts"])
            for metric in data["metrics"]:
                grid = unpacked(series["values"][metric], width)
                for row, fact in enumerate(details["facts"]):
                    for column, start in enumerate(series["starts"]):
                        key = (model, fact["id"], series["source"], series["features"], series["path"], start)
                        expected = table[metric][key] if key in table.index else np.nan
                        assert grid[row, column] == pytest.approx(float(expected), rel=1e-5, nan_ok=True)
                        seen += 1
        for grid in details["tokens"]:
            values = unpacked(grid["values"]["change_pct"], len(grid["starts"]))
            for row, fact in enumerate(details["facts"]):
                begin, end = grid["offsets"][row : row + 2]
                assert end - begin in (0, len(fact["tokens"]))
                for i in range(end - begin):
                    for column, start in enumerate(grid["starts"]):
                        expected = table.change_pct[model, fact["id"], f"each:{i}", "all", "main", start]
                        assert values[begin + i, column] == pytest.approx(expected, rel=1e-5)
    assert seen > 1000
    first = data["details"][MODELS[0]]["facts"][0]
    assert "".join(text for text, _ in first["pieces"]) == SweepResult.load(runs / "tokens").where(
        model=MODELS[0], fact_id=first["id"]).facts.set_index("fact_id").prompt[first["id"]]  # fmt: skip


def test_the_page_needs_no_network_and_escapes_what_facts_say(page: Path, data: dict[str, Any]) -> None:
    text = page.read_text()
    own = text[: text.index('<script type="application/json"')]
    assert not re.search(r"<(script|img|iframe)[^>]+src=|<link[^>]+href=\"(?!data:)|@import|url\((?!['\"]?data:)", own)
    assert "default-src 'none'" in own
    assert text.count("</script>") == text.count("<script") == 4
    (odd,) = [fact for fact in data["details"][MODELS[0]]["facts"] if fact["id"] == "odd-1"]
    assert odd["target"] == "Lima</script>"


def test_the_page_says_what_was_run_and_left_out(page: Path, runs: Path) -> None:
    text = page.read_text()
    known = SweepResult.load(runs / "roles" / MODELS[0]).configs[0]["answered"][0]
    assert f"{known['asked']} facts, of which {MODELS[0]} answers {known['right']} right" in text
    assert "(100.0 %)" not in text.split("Settings of")[0]  # the odd fact is swept, and not answered right
    assert "the role &#39;context&#39; is empty" in text


def test_details_are_kept_of_as_many_facts_as_asked_and_the_rest_is_said(runs: Path) -> None:
    result = SweepResult.load(runs / "roles").where(model=MODELS[0])
    text = result.report(runs / "few.html", details=3).read_text()
    found = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    details = found["details"][MODELS[0]]
    assert len(details["facts"]) == 3 and details["left_out"] == 12
    assert found["series"][0]["curves"]["all facts"]["n"][0] == 15
    none = curves_of(result.report(runs / "none.html", details=0))
    assert none["details"][MODELS[0]]["facts"] == [] and none["details"][MODELS[0]]["left_out"] == 15
    assert none["series"] == found["series"]


def test_sweeps_that_contradict_each_other_are_refused(runs: Path) -> None:
    result = SweepResult.load(runs / "roles").where(model=MODELS[0])
    other = SweepResult(result.table.assign(prob=result.table.prob * 0.9), result.skipped, result.facts, result.configs)
    with pytest.raises(MambalensError, match="different numbers for the same knockouts of 'atlas-mamba2'"):
        SweepResult.concat([result, other]).report(runs / "x.html")
    once, twice = (
        curves_of(each.report(runs / f"{name}.html"))
        for name, each in (("once", result), ("twice", SweepResult.concat([result, result])))
    )
    assert twice["series"] == once["series"]
    mine = result.facts.assign(prompt="Another prompt")
    with pytest.raises(MambalensError, match="Different facts have the id"):
        SweepResult.concat([result, SweepResult(result.table, result.skipped, mine, result.configs)])


def curves_of(path: Path) -> dict[str, Any]:
    return json.loads(re.findall(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[0])


def test_parts_of_the_facts_that_were_swept_in_fewer_windows_stay_in_their_place(tmp_path: Path) -> None:
    lens = Lens.load(MODELS[0])
    known = lens.known(load_facts("atlas").where(wording="near"), limit=12, progress=False)
    marked = [
        Facts(known[begin::2], [{"source": "mine", "half": half} for _ in known[begin::2]])
        for begin, half in ((0, "a"), (1, "b"))
    ]
    every = lens.sweep(marked[0], "subject", window=6, progress=False)
    late = lens.sweep(marked[1], "subject", window=[list(range(4, 10))], progress=False)
    data = curves_of(SweepResult.concat([every, late]).report(tmp_path / "x.html"))
    (series,) = data["series"]
    assert series["starts"] == list(range(7))
    assert series["curves"]["all facts"]["n"] == [6, 6, 6, 6, 12, 6, 6]
    of_half = series["curves"]["half: b"]
    assert of_half["n"] == [0, 0, 0, 0, 6, 0, 0] and "source: mine" not in series["curves"]
    expected = late.summary()["mean"][0]
    assert of_half["change_pct"][0] == [None] * 4 + [pytest.approx(expected, rel=1e-4)] + [None] * 2


# --- in a browser


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "narrow"])
def tab(request: pytest.FixtureRequest, browser: Any, page: Path) -> Iterator[Any]:
    width, height = request.param
    tab = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    yield tab
    assert complaints == []
    tab.close()


def drawn(tab: Any, plot: str) -> list[dict[str, Any]]:
    """The lines of a plot, without its bands."""
    return tab.evaluate(
        "(id) => document.getElementById(id).data.filter((d) => d.mode !== 'lines')"
        ".map((d) => ({name: d.name, x: [...d.x], y: d.y && [...d.y], z: d.z, dash: d.line?.dash}))", plot,
    )  # fmt: skip


def lengths(tab: Any) -> str:
    return tab.inner_text(".dt-info")


def test_the_page_fits_its_width(tab: Any) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_switches_change_the_curves(tab: Any, runs: Path) -> None:
    result = SweepResult.load(runs / "roles")
    assert {line["name"] for line in drawn(tab, "curves-plot")} == set(MODELS)  # the subject's, models overlaid
    tab.select_option("[name=metric]", "hit")
    summary = result.where(source="subject", features="all", path="main").summary(metric="hit")
    for line in drawn(tab, "curves-plot"):
        assert line["y"] == pytest.approx(summary[summary.model == line["name"]]["mean"].tolist(), rel=1e-4)
    tab.select_option("[name=lines]", "source")
    tab.select_option("[name=x]", "depth")
    names = SweepResult.load(runs / "roles").models
    lines = {line["name"]: line for line in drawn(tab, "curves-plot")}
    assert set(lines) == {"subject", "last", "context"}
    assert lines["subject"]["x"] == pytest.approx([100 * start / 12 for start in range(7)])
    tab.uncheck("[name=show-source][value=last]")
    tab.check(f"[name=show-model][value={names[1]}]")
    assert {line["name"] for line in drawn(tab, "curves-plot")} == {
        f"{source}, {model}" for source in ("subject", "context") for model in names
    }
    tab.select_option("[name=path]", "both")
    assert {line["name"] for line in drawn(tab, "curves-plot")} == {"subject", "context"}  # the transformer has no conv
    tab.select_option("[name=features]", "slow")
    tab.select_option("[name=subset]", "relation: capital")
    assert drawn(tab, "curves-plot")[0]["y"][0] is not None


def test_filtering_changes_the_table_and_choosing_a_fact_draws_its_curve_and_heatmap(tab: Any, runs: Path) -> None:
    assert "of 30 facts" in lengths(tab)
    tab.fill(".dt-search input", "odd-1 nothing has this")
    assert tab.inner_text("#facts-table tbody") == "No fact has this."
    tab.fill(".dt-search input", "Chile")
    assert "of 2 facts (of 30)" in lengths(tab)
    tab.click(f"#facts-table button[data-model={MODELS[1]}]")
    assert tab.inner_text("#fact-prompt").startswith('<b>Peru</b> & "Chile" </script>')
    assert tab.evaluate("document.activeElement.id") == "fact-heading"
    assert tab.locator("#facts-table tr.chosen").count() == 1
    result = SweepResult.load(runs / "roles").where(model=MODELS[1], fact_id="odd-1")
    lines = {line["name"]: line["y"] for line in drawn(tab, "fact-plot")}
    for source in ("subject", "last"):
        expected = result.table[result.table.source == source].change_pct.tolist()
        assert lines[source] == pytest.approx(expected, rel=1e-4)
    assert tab.inner_text("#fact-table tbody tr:first-child td:first-child") == "subject"
    table = SweepResult.load(runs / "tokens").where(model=MODELS[1], fact_id="odd-1").table
    (heatmap,) = drawn(tab, "heatmap-plot")
    expected = table.pivot(index="source", columns="window_start", values="change_pct")
    order = [f"each:{i}" for i in range(len(expected))]
    np.testing.assert_allclose(np.array(heatmap["z"], float), expected.loc[order].to_numpy(), rtol=1e-4, atol=1e-4)
    tab.fill(".dt-search input", "Morelia")
    until(tab, "!document.querySelector('#facts-table tr.chosen')")
    tab.fill(".dt-search input", "")
    tab.locator("thead tr:nth-child(2) input").nth(1).fill("Chile")  # a column's own filter
    until(tab, "document.querySelector('.dt-info').textContent.includes('of 2 facts (of 30)')")


def test_a_fact_without_single_tokens_says_how_to_get_them(tab: Any, runs: Path) -> None:
    tokens = set(SweepResult.load(runs / "tokens").table.fact_id)
    row = next(i for i, fact in enumerate(json.loads(tab.inner_text("#data"))["details"][MODELS[0]]["facts"])
               if fact["id"] not in tokens)  # fmt: skip
    while not tab.query_selector(f"#facts-table button[data-model={MODELS[0]}][data-row='{row}']"):
        tab.click(".dt-paging-button.next")
    tab.click(f"#facts-table button[data-model={MODELS[0]}][data-row='{row}']")
    assert "--source each" in tab.inner_text("#heatmap-note")


def test_what_is_shown_can_be_saved(tab: Any, runs: Path, tmp_path: Path) -> None:
    tab.select_option("[name=metric]", "kl")
    with tab.expect_download() as download:
        tab.click("#curves-csv")
    download.value.save_as(tmp_path / "curves.csv")
    rows = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert len(rows) == 2 * 7 and {row["model"] for row in rows} == set(MODELS)
    lines = {line["name"]: line["y"] for line in drawn(tab, "curves-plot")}
    assert [float(row["mean_kl"]) for row in rows if row["model"] == MODELS[0]] == pytest.approx(lines[MODELS[0]])
    tab.fill(".dt-search input", "Chile")
    with tab.expect_download() as download:
        tab.click("#facts-csv")
    download.value.save_as(tmp_path / "facts.csv")
    facts = list(csv.DictReader((tmp_path / "facts.csv").open()))
    assert {row["model"] for row in facts} == set(MODELS)
    result = SweepResult.load(runs / "roles").where(
        model=facts[0]["model"], fact_id="odd-1", path="main", features="all"
    )
    assert facts[0]["prompt"] == ODD.prompt and facts[0]["target"] == ODD.target
    worst = result.table[result.table.source == "subject"].change_pct.min()
    assert float(facts[0]["change_pct_subject"]) == pytest.approx(worst, rel=1e-4)
    tab.click(f"#facts-table button[data-model={MODELS[0]}]")
    with tab.expect_download() as download:
        tab.click("#fact-csv")
    download.value.save_as(tmp_path / "fact.csv")
    assert {row["source"] for row in csv.DictReader((tmp_path / "fact.csv").open())} >= {"subject", "each:0"}


def test_everything_can_be_reached_by_keyboard(tab: Any) -> None:
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the curves"
    reached = set()
    for _ in range(120):
        tab.keyboard.press("Tab")
        reached.add(
            tab.evaluate(
                "(document.activeElement.name || document.activeElement.id || document.activeElement.dataset.model) ?? ''"
            )
        )
    assert {"metric", "x", "lines", "show-model", "curves-csv", MODELS[0]} <= reached
    tab.focus("[name=metric]")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.forms[0].elements.metric.value") == "prob"
    tab.focus(f"#facts-table button[data-model={MODELS[0]}]")
    tab.keyboard.press("Enter")
    assert tab.is_visible("#fact-plot")


EVIL = '<img src=x onerror="alert(1)"> &amp; <script>alert(2)</script>'
MEAN = Fact(f"{EVIL} Peru's {EVIL} capital is", f"Peru's {EVIL}", f"Lima {EVIL}", "capital", f"id {EVIL}")


def test_html_in_any_field_stays_text(browser: Any, tmp_path: Path) -> None:
    facts = [MEAN, *load_facts("atlas")[:3]]
    extra = [{f"column {EVIL}"[:40]: f"<b>&{i} {EVIL}"[:30]} for i in range(4)]
    lens = Lens.load(MODELS[0])
    sweeps = [lens.sweep(Facts(facts, extra), source, window=6, progress=False) for source in ("subject", "each")]
    page = SweepResult.concat(sweeps).report(tmp_path / "page.html", title=EVIL)
    tab, complaints = browser.new_page(), []
    for event in ("console", "pageerror", "dialog"):
        tab.on(event, lambda what: complaints.append(str(what)))
    tab.on(
        "request",
        lambda asked: complaints.append(asked.url) if not asked.url.startswith(("data:", page.as_uri())) else None,
    )
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    assert tab.inner_text("h1") == tab.title() == EVIL
    assert extra[0].keys() <= set(tab.locator("#facts-table .dt-column-title").all_inner_texts())
    assert set(tab.locator("#facts-table tbody td:last-child").all_inner_texts()) == {
        one for row in extra for one in row.values()
    }
    for words in ("<b>&2", "&amp;", "<script>alert(2)</script>"):  # what is sought is the text itself
        tab.fill(".dt-search input", words)
        until(tab, "document.querySelector('.dt-info').textContent.includes('of 1 facts (of 4)')")
    tab.fill(".dt-search input", "img")
    tab.select_option("[name=subset]", index=1)
    tab.click("#facts-table button[data-row]")
    assert tab.inner_text("#fact-prompt") == f"{MEAN.prompt} → {MEAN.target}"
    tab.hover("#heatmap-plot .heatmaplayer", force=True)
    tab.hover("#fact-plot .points path >> nth=0", force=True)
    tab.wait_for_selector("#fact-plot .hoverlayer text")
    # (Plotly keeps an img of its own beside its toolbar.)
    assert tab.locator("img[src=x], main b img, main script, [onerror]").count() == 0
    ticks = tab.locator("#heatmap-plot .ytick text").all_text_contents()
    assert "".join(ticks) == MEAN.prompt.replace(" ", "·")
    assert complaints == []
    tab.close()


def test_the_page_is_dark_where_its_reader_wants_it_so(browser: Any, page: Path) -> None:
    tab = browser.new_page(color_scheme="dark")
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.click("#facts-table button[data-row]")
    paper = (
        "() => [getComputedStyle(document.body).backgroundColor, ...['curves-plot', 'fact-plot'].map("
        "(id) => document.getElementById(id).layout.paper_bgcolor)]"
    )
    assert tab.evaluate(paper) == ["rgb(22, 22, 22)", "#161616", "#161616"]
    # Everything that is written can be read: DataTables and Plotly too.
    faint = """() => [...document.querySelectorAll("main *")].filter((e) => e.checkVisibility() && !e.closest("option, .disabled, .heatmaplayer") &&
      [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).filter((e) => {
        const style = getComputedStyle(e), colour = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
        const [r, g, b] = colour.match(/\\d+/g).map(Number);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b < 120;
      }).map((e) => `${e.className?.baseVal ?? e.className}: ${e.textContent}`)"""
    assert tab.evaluate(faint) == []
    tab.emulate_media(color_scheme="light")
    until(tab, "document.getElementById('curves-plot').layout.paper_bgcolor === '#ffffff'")
    assert tab.evaluate(paper) == ["rgb(255, 255, 255)", "#ffffff", "#ffffff"]
    tab.close()


def test_a_sweep_of_single_tokens_alone_has_its_facts_and_heatmaps(browser: Any, runs: Path) -> None:
    page = SweepResult.load(runs / "tokens").where(model=MODELS[0]).report(runs / "tokens.html")
    tab, complaints = browser.new_page(), []
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    assert "choose a fact below" in tab.inner_text("#curves-note")
    tab.click("#facts-table button[data-row='0']")
    assert len(drawn(tab, "heatmap-plot")) == 1 and tab.is_hidden("#fact-plot") and complaints == []
    tab.close()


def test_a_dark_page_is_printed_on_white(browser: Any, page: Path) -> None:
    tab = browser.new_page(color_scheme="dark")
    tab.goto(page.as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(paper) == "rgb(22, 22, 22)"
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate(paper) == "rgb(255, 255, 255)"
    tab.close()
