"""The page of a flow: what is in it, and what a reader can do with it in a browser."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from flows import features_of, made
from pages import until

from mambalens import Fact, Facts, Lens, MambalensError, load_facts
from mambalens.figures.flow_pieces import pieces_of
from mambalens.flow.data import FlowData
from mambalens.report.flow_page import write_flow_report
from mambalens.result import Flow

ODD = Fact(
    '<script>alert("x")</script> & <b>Peru</b>: the capital of <b>Peru</b> is', "<b>Peru</b>",
    " Lima</script><script>alert(2)</script>", "<script>odd</script>", "<script>odd</script>",
)  # fmt: skip
ATLAS = load_facts("atlas")
FAR = ATLAS.where(wording="far")[1]
FACTS = [*ATLAS.where(wording="near")[:4], FAR, ODD]


@pytest.fixture(scope="module")
def flow() -> FlowData:
    flow = made(FACTS, Lens.load("atlas-mamba1"))
    skipped = pd.DataFrame([("<script>gone</script>", "", "no <script>subject</script>")], columns=flow.skipped.columns)
    return FlowData(flow.table, skipped, flow.facts, flow.prompts, flow.configs)


def route_of(flow: FlowData, fact_id: str) -> list[tuple[int, str, int, int]]:
    """The relay that `flows.edges` made."""
    subject = int(flow.prompts.set_index("fact_id").subject[fact_id][-1])
    last = len(flow.prompts.set_index("fact_id").tokens[fact_id]) - 1
    return [(4, "conv", subject, subject + 1), (8, "main", subject + 1, last)]


@pytest.fixture(scope="module")
def page(flow: FlowData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    features = features_of(flow).astype({"feature": object})
    features.loc[features.fact_id == ODD.id, "feature"] = "<script>feature</script>"
    routes = {("atlas-mamba1", FAR.id): route_of(flow, FAR.id)}
    return write_flow_report(
        flow, folder / "new" / "flow.html", "<script>title</script>", features=features, routes=routes
    )


def data_of(page: Path) -> dict[str, Any]:
    return json.loads(re.findall(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[0])


def test_every_prompts_strongest_edges_are_those_of_the_table(page: Path, flow: FlowData) -> None:
    data = data_of(page)
    assert [prompt["id"] for prompt in data["prompts"]] == [fact.id for fact in FACTS]
    for prompt in data["prompts"]:
        table = flow.table[flow.table.fact_id == prompt["id"]]
        assert prompt["n"] == len(table) and prompt["exact"] == table.exact.notna().sum()
        assert prompt["whole"] == pytest.approx(table.exact.fillna(table.attributed).abs().sum())
        strongest = flow.strongest(300, prompt["id"])
        for name in ("layer", "path", "source", "target", "mixer"):
            assert prompt["edges"][name] == strongest[name].tolist()
        for name in ("attributed", "exact"):
            np.testing.assert_allclose(np.array(prompt["edges"][name], float), strongest[name], rtol=1e-4)
        pieces = dict(zip(table.source, table.source_piece, strict=True)) | dict(
            zip(table.target, table.target_piece, strict=True)
        )
        assert prompt["pieces"] == [pieces[i] for i in range(len(prompt["tokens"]))]
    (far,) = [prompt for prompt in data["prompts"] if prompt["id"] == FAR.id]
    marked = [i for i, step in enumerate(far["edges"]["step"]) if step is not None]
    assert sorted(tuple(far["edges"][name][i] for name in ("layer", "path", "source", "target")) for i in marked) == (
        route_of(flow, FAR.id))  # fmt: skip
    assert len(far["single"]) == 10 and all(len(rows) == 4 for rows in far["single"].values())


def test_the_page_needs_no_network_and_escapes_what_facts_say(page: Path) -> None:
    text = page.read_text()
    own = text[: text.index('<script type="application/json"')]
    assert not re.search(r"<(script|img|iframe)[^>]+src=|<link[^>]+href=\"(?!data:)|@import|url\((?!['\"]?data:)", own)
    assert "default-src 'none'" in own and "<script" not in own
    assert text.count("</script>") == text.count("<script") == 2
    assert "innerHTML" not in text and "http" not in re.sub(r"http://www.w3.org/2000/svg|http-equiv", "", text)
    (odd,) = [prompt for prompt in data_of(page)["prompts"] if prompt["id"] == ODD.id]
    assert "".join(piece[0] for piece in odd["text"]) == ODD.prompt
    assert page.stat().st_size < 500_000


def test_the_page_says_what_was_run_left_out_and_found_by_piece(page: Path, flow: FlowData) -> None:
    text = re.sub(r"\s+", " ", page.read_text())
    assert f"<td>{len(flow.table):,}</td><td>{flow.table.exact.notna().sum():,}</td>" in text
    assert "no &lt;script&gt;subject&lt;/script&gt;" in text
    found = pieces_of(flow)
    assert f"{len(found.pairs)} of {found.of} pairs of pieces, with {found.share:.0f} %" in text
    row = found.pairs.index(("after_subject", "last"))
    mean = found.total[row][0]
    assert f"after_subject → last</th><td>{found.n[row]}</td><td>−{abs(mean):.2f}</td>" in text
    assert f'title="−{abs(found.means["main"][row, 8]):.4f}"' in text


def test_few_facts_and_edges_are_kept_where_few_are_asked_for_and_the_rest_is_said(
    flow: FlowData, tmp_path: Path
) -> None:
    weak = flow.strongest(10**6, FAR.id).iloc[-1]
    route = [(int(weak.layer), weak.path, int(weak.source), int(weak.target))]
    short = FlowData(
        flow.table[flow.table.fact_id.isin([FAR.id, ODD.id])],
        flow.skipped,
        flow.facts,
        flow.prompts,
        flow.configs,
    )
    page = write_flow_report(short, tmp_path / "x.html", facts=1, edges=5, routes={("atlas-mamba1", FAR.id): route})
    (prompt,) = data_of(page)["prompts"]
    assert len(prompt["edges"]["layer"]) == 6 and prompt["edges"]["step"] == [None] * 5 + [0]
    assert "1 further facts of atlas-mamba1" in page.read_text() and pieces_of(short).facts == 2


def test_the_first_route_of_a_table_is_marked_with_those_of_a_hops_edges_that_the_page_keeps(
    flow: FlowData, tmp_path: Path
) -> None:
    names = flow.strongest(60, FAR.id)[["layer", "path", "source", "target"]].itertuples(index=False, name=None)
    edges = list(names)
    routes = pd.DataFrame({
        "model": "atlas-mamba1", "fact_id": FAR.id, "rank": [1, 2],
        "edges": [[[edges[50], edges[2]], [edges[59], edges[40]]], [[edges[0]], [edges[1]]]],
    })  # fmt: skip
    page = write_flow_report(flow, tmp_path / "x.html", edges=30, routes=routes)
    (prompt,) = [one for one in data_of(page)["prompts"] if one["id"] == FAR.id]
    assert prompt["edges"]["step"] == [0 if i == 2 else None for i in range(30)] + [1]
    assert [i for i, lead in enumerate(prompt["edges"]["lead"]) if lead] == [2, 30]
    with pytest.raises(MambalensError, match="routes have no edges"):
        write_flow_report(flow, tmp_path / "y.html", routes=routes.drop(columns="edges"))


def test_what_does_not_fit_the_flow_is_refused(flow: FlowData, tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    with pytest.raises(MambalensError, match="facts=0"):
        write_flow_report(flow, out, facts=0)
    with pytest.raises(MambalensError, match="features have no feature and no effect"):
        write_flow_report(flow, out, features=features_of(flow).drop(columns=["feature", "effect"]))
    with pytest.raises(MambalensError, match=r"edge \(99, 'main', 0, 1\) is not an edge of this prompt"):
        write_flow_report(flow, out, routes={("atlas-mamba1", FAR.id): [(99, "main", 0, 1)]})
    with pytest.raises(MambalensError, match="no edges"):
        write_flow_report(FlowData(flow.table.iloc[:0], flow.skipped, flow.facts, flow.prompts, flow.configs), out)
    assert not out.exists()


@pytest.fixture(scope="module")
def real() -> Flow:
    """A flow that knows its model."""
    return Lens.load("atlas-mamba2").flow(Facts(FACTS[:2]), points=1, progress=False)


@pytest.fixture(scope="module")
def real_page(real: Flow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real.report(tmp_path_factory.mktemp("real") / "flow.html", edges=60, facts=1, progress=False)


def test_a_flow_that_knows_its_model_tells_the_features_of_the_edges_that_the_page_keeps(
    real: Flow, real_page: Path, tmp_path: Path
) -> None:
    data = data_of(real_page)
    (prompt,) = data["prompts"]
    assert data["has_features"] and sorted(map(int, prompt["single"])) == list(range(60))
    found = real.where(fact_id=prompt["id"]).edge_features(60, 5, progress=False)
    shown = [tuple(row) for place in range(60) for row in prompt["single"][str(place)]]
    assert [feature for feature, _ in shown] == found.feature.tolist()
    np.testing.assert_allclose([effect for _, effect in shown], found.effect, rtol=1e-3)
    own = real.where(fact_id=prompt["id"])
    without = data_of(Flow.with_verbs(own).report(tmp_path / "without.html"))
    assert not without["has_features"] and without["prompts"][0]["single"] == {}


# --- in a browser


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "narrow"])
def tab(request: pytest.FixtureRequest, browser: Any, page: Path) -> Iterator[Any]:
    width, height = request.param
    tab = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    yield tab
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert complaints == []
    tab.close()


def fact(tab: Any, fact_id: str) -> None:
    tab.select_option("[name=fact]", str([one.id for one in FACTS].index(fact_id)))


def slide(tab: Any, count: int) -> None:
    tab.locator("[name=strength]").evaluate(
        "(input, count) => { input.value = count; input.dispatchEvent(new Event('input', { bubbles: true })); }", count
    )


def drawn(tab: Any) -> list[int]:
    """Edges of the graph, by their place in the order of strength."""
    return sorted(tab.evaluate("[...document.querySelectorAll('#graph .edge')].map((e) => Number(e.dataset.edge))"))


def rows(tab: Any) -> list[int]:
    return tab.evaluate("[...document.querySelectorAll('#edges tbody tr')].map((e) => Number(e.dataset.edge))")


def test_the_graph_and_its_table_show_the_strongest_edges(tab: Any, flow: FlowData) -> None:
    for one in FACTS:
        fact(tab, one.id)
        assert drawn(tab) == rows(tab) == list(range(40))
        strongest = flow.strongest(40, one.id)
        assert f"40 of {(flow.table.fact_id == one.id).sum():,} edges" in tab.inner_text("#graph-caption")
        assert f"{strongest.exact.notna().sum()} of the 40 are exact" in tab.inner_text("#graph-caption")
        dashed = tab.locator("#graph .shaft[stroke-dasharray]").count()
        assert dashed == strongest.exact.isna().sum()
        # What works against the answer ends in a bar.
        assert tab.locator("#graph .edge > line[transform]").count() == (strongest.effect > 0).sum()
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.inner_text("#fact-prompt") == f"{ODD.prompt} → {ODD.target.strip()}"
    assert tab.locator("#graph svg > text").last.text_content().startswith("→ Lima</script>")
    assert tab.title() == tab.inner_text("h1") == "<script>title</script>"


def test_switches_filter_by_path_layer_strength_and_certificate(tab: Any, flow: FlowData) -> None:
    fact(tab, FAR.id)
    table = flow.strongest(300, FAR.id).reset_index(drop=True)
    slide(tab, 100)
    assert drawn(tab) == list(range(100))
    assert f"at least {abs(table.effect[99]):.2g} nats" in tab.inner_text("output")
    tab.uncheck("[name=path][value=conv]")
    first = table.head(100)
    assert drawn(tab) == rows(tab) == first.index[first.path == "main"].tolist()
    tab.fill("[name=from]", "3")
    tab.fill("[name=to]", "8")
    inside = (first.path == "main") & first.layer.between(3, 8)
    assert drawn(tab) == first.index[inside].tolist()
    tab.check("[name=exact]")
    assert drawn(tab) == first.index[inside & first.exact.notna()].tolist()
    tab.uncheck("[name=path][value=main]")
    assert drawn(tab) == [] and "choose more paths" in tab.inner_text("#graph-caption")


def test_an_edge_tells_its_numbers_and_features(tab: Any, flow: FlowData) -> None:
    fact(tab, FAR.id)
    prompt = flow.prompts.set_index("fact_id").tokens[FAR.id]
    table = flow.strongest(300, FAR.id).reset_index(drop=True)
    tab.mouse.click(*place(tab, 1))
    assert tab.locator("#graph .edge.chosen").get_attribute("data-edge") == "1"
    edge = table.loc[1]
    said = tab.inner_text("#chosen")
    assert f"{prompt[edge.source].replace(' ', '·')} ({edge.source}) →" in said
    assert f"Attributed\n{shown(edge.attributed)} nats" in said and f"Exact\n{shown(edge.exact)} nats" in said
    assert f"{edge.layer}, {'scan' if edge.path == 'main' else 'convolution'} (mamba1)" in said
    assert edge.source_piece in said and edge.target_piece in said and "Strongest features" in said
    assert tab.locator("#single tbody tr").count() == 4
    assert tab.locator("#graph .edge:not(.dim)").count() == 1
    assert tab.locator("#edges tr.chosen").get_attribute("data-edge") == str(edge.name)
    uncut = table.index[table.exact.isna()][0]
    tab.click(f"#edges tr[data-edge='{uncut}'] button")  # the table chooses too
    assert "Exact\nnot cut" in tab.inner_text("#chosen") and "≈" in tab.inner_text(f"#edges tr[data-edge='{uncut}']")
    assert tab.locator(f"#graph .edge.chosen[data-edge='{uncut}']").count() == 1
    tab.keyboard.press("Escape")
    assert tab.locator("#graph .chosen").count() == 0 and "Choose an edge" in tab.inner_text("#chosen")


def test_the_panel_of_an_edge_tells_the_features_that_the_flow_computed(
    browser: Any, real: Flow, real_page: Path, tmp_path: Path
) -> None:
    found = real.where(fact_id=FACTS[0].id).edge_features(2, 5, progress=False)
    tab = browser.new_page()
    tab.goto(real_page.as_uri())
    tab.click("#edges tr[data-edge='1'] button")
    told = [tab.locator("#single tbody tr").nth(i).inner_text().split() for i in range(5)]
    assert told == [[str(row.feature), shown(row.effect)] for row in found[5:].itertuples()]
    tab.goto(Flow.with_verbs(real).report(tmp_path / "without.html").as_uri())
    tab.click("#edges tr[data-edge='1'] button")
    assert "Attributed" in tab.inner_text("#chosen") and "feature" not in tab.inner_text("#chosen")
    tab.close()


def place(tab: Any, edge: int) -> list[float]:
    """Where the mouse meets an edge and no other, once the graph is scrolled to it."""
    return tab.evaluate(
        """(edge) => {
          const group = document.querySelector(`#graph .edge[data-edge="${edge}"]`), line = group.querySelector(".hit");
          line.scrollIntoView({ inline: "end", block: "center" });
          const from = line.ownerSVGElement.getBoundingClientRect(), at = (name) => Number(line.getAttribute(name));
          for (let part = 0.95; part > 0; part -= 0.01) {
            const x = from.left + at("x1") + part * (at("x2") - at("x1")), y = from.top + at("y1") + part * (at("y2") - at("y1"));
            if (document.elementFromPoint(x, y)?.closest("[data-edge]") === group) return [x, y];
          }
        }""",
        edge,
    )


def shown(value: float) -> str:
    """A number as the page writes it."""
    number = float(f"{abs(value):.3g}")
    return ("−" if value < 0 else "+") + (f"{number:.3g}" if number < 1000 else str(number))


def test_a_node_lists_what_it_reads_and_hands_on(tab: Any, flow: FlowData) -> None:
    fact(tab, FAR.id)
    (_, _, _, relay), (layer, _, _, _) = route_of(flow, FAR.id)
    table = flow.strongest(300, FAR.id)
    tab.locator(f"#graph .node[data-position='{relay}'][data-row='{layer + 0.5}'] .dot").click()
    said = tab.inner_text("#chosen")
    assert f"({relay}), in layer {layer}, behind its convolution" in said and "after_subject" in said
    reads = table[(table.target == relay) & ((table.layer < layer) | (table.layer == layer) & (table.path == "conv"))]
    hands = table[(table.source == relay) & ((table.layer > layer) | (table.layer == layer) & (table.path == "main"))]
    assert f"{len(reads)} of the edges that the page keeps, in what lies below" in said
    assert f"{len(hands)} of the edges that the page keeps, in what lies above" in said
    lists = tab.locator("#chosen ul")
    assert [lists.nth(i).locator("li").count() for i in (0, 1)] == [len(reads), len(hands)]
    assert shown(reads.effect.iloc[0]) in lists.nth(0).locator("li").first.inner_text()
    lists.nth(0).locator("li button").last.click()  # a weak one is drawn when it is chosen
    assert tab.locator("#graph .edge.chosen").count() == 1 and "Share" in tab.inner_text("#chosen")
    assert tab.evaluate("document.activeElement.id") == "chosen"


def test_the_route_is_marked_where_there_is_one(tab: Any) -> None:
    assert tab.locator("#graph .halo").count() == 0 and "marked route" not in tab.text_content(".legend")
    fact(tab, FAR.id)
    assert tab.locator("#graph .halo").count() == 4 and "marked route" in tab.text_content(".legend")
    slide(tab, 1)
    assert len(drawn(tab)) == 2  # the route stays


def test_the_graph_can_be_saved_and_its_file_is_light_whatever_is_chosen(
    browser: Any, page: Path, tmp_path: Path
) -> None:
    tab = browser.new_page(color_scheme="dark", accept_downloads=True)
    tab.goto(page.as_uri())
    fact(tab, ODD.id)
    tab.click("#edges tr[data-edge='3'] button")
    assert tab.get_attribute("#graph rect", "fill") == "#161616" and tab.locator("#graph .edge.dim").count() == 39
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 22)"
    with tab.expect_download() as download:
        tab.click("#graph-svg")
    download.value.save_as(tmp_path / "graph.svg")
    text = (tmp_path / "graph.svg").read_text()
    assert "<script" not in text and 'fill="#ffffff"' in text and 'fill="#161616"' not in text
    root = ElementTree.fromstring(text)
    groups = [one.get("class") for one in root.iter("{http://www.w3.org/2000/svg}g")]
    assert groups.count("mark edge") == 40 and groups.count("pinned") == 1
    with tab.expect_download() as download:
        tab.click("#graph-png")
    assert Path(download.value.path()).read_bytes()[:4] == b"\x89PNG"
    tab.emulate_media(color_scheme="light")
    until(tab, "document.querySelector('#graph rect').getAttribute('fill') === '#ffffff'")
    assert tab.locator("#graph .edge.chosen").get_attribute("data-edge") == "3"  # drawn again, with what is chosen
    tab.close()


def test_layers_and_legend_stay_in_sight_where_the_graph_scrolls(tab: Any) -> None:
    fact(tab, FAR.id)
    tab.evaluate("document.getElementById('graph').scrollLeft = 10_000")
    at = "(() => document.querySelector('#graph .pinned').getBoundingClientRect().left - document.getElementById('graph').getBoundingClientRect().left)()"
    until(tab, f"Math.abs({at}) < 1")
    scrolled = tab.evaluate("document.getElementById('graph').scrollLeft")
    assert (scrolled > 0) == (tab.viewport_size["width"] < 640)
    tab.click("#edges tr[data-edge='1'] button")
    slide(tab, 20)
    assert tab.evaluate("document.getElementById('graph').scrollLeft") == scrolled and abs(tab.evaluate(at)) < 1


def test_the_graph_scrolls_in_its_own_box_and_its_labels_do_not_overlap(tab: Any) -> None:
    fact(tab, FAR.id)
    if tab.viewport_size["width"] < 640:
        assert tab.evaluate(
            "document.getElementById('graph').scrollWidth > document.getElementById('graph').clientWidth"
        )
    else:
        assert tab.evaluate(
            "document.getElementById('graph').scrollWidth <= document.getElementById('graph').clientWidth"
        )
    fact(tab, FACTS[0].id)
    boxes = tab.evaluate(
        "[...document.querySelectorAll('#graph svg > text')].slice(0, -1).map((t) => { const b = t.getBoundingClientRect(); return [b.left, b.right]; })"
    )
    if tab.locator("#graph svg > text[transform]").count() == 0:
        assert all(one[1] <= after[0] for one, after in pairwise(boxes))
    inside = tab.evaluate(
        "(() => { const s = document.querySelector('#graph svg').getBoundingClientRect(); return [...document.querySelectorAll('#graph svg > text')]"
        ".every((t) => { const b = t.getBoundingClientRect(); return b.left >= s.left - 1 && b.right <= s.right + 1 && b.bottom <= s.bottom + 1; }); })()"
    )
    assert inside


def test_everything_can_be_reached_by_keyboard(tab: Any) -> None:
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the graph"
    reached = []
    for _ in range(30):
        tab.keyboard.press("Tab")
        reached.append(
            tab.evaluate(
                "document.activeElement.name || document.activeElement.dataset.edge || document.activeElement.dataset.position || document.activeElement.id || document.activeElement.className"
            )
        )
    assert {"fact", "path", "from", "to", "strength", "exact", "0", "edges-box", "link"} <= set(reached)
    tab.focus("#graph .edge[tabindex='0']")
    tab.keyboard.press("Enter")
    assert tab.locator("#graph .edge.chosen").get_attribute("data-edge") == "0"
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.dataset.edge") == "1"
    assert tab.locator("#graph .edge.chosen").get_attribute("data-edge") == "1"
    tab.focus("#graph .node[tabindex='0']")
    tab.keyboard.press("ArrowDown")
    assert tab.locator("#graph .node.chosen").count() == 1
    before = tab.evaluate("Number(document.activeElement.dataset.row)")
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate("Number(document.activeElement.dataset.row)") > before
    assert "Has read" in tab.inner_text("#chosen")


def test_what_is_shown_can_be_saved(tab: Any, flow: FlowData, tmp_path: Path) -> None:
    fact(tab, ODD.id)
    tab.click("#edges tr[data-edge='0'] button")
    assert "<script>feature</script>" in tab.inner_text("#single")
    with tab.expect_download() as download:
        tab.click("#edges-csv")
    download.value.save_as(tmp_path / "edges.csv")
    found = list(csv.DictReader((tmp_path / "edges.csv").open()))
    strongest = flow.strongest(40, ODD.id)
    assert [int(row["layer"]) for row in found] == strongest.layer.tolist()
    assert [float(row["attributed"]) for row in found] == pytest.approx(strongest.attributed.tolist(), rel=1e-4)
    assert {row["fact_id"] for row in found} == {ODD.id}
