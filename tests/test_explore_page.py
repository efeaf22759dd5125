"""The page of mambalens explore in a browser: what a person does with it, and what it gives in return."""

from __future__ import annotations

import contextlib
import csv
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn

from mambalens import Fact, Facts, Lens, load_facts
from mambalens.explore.answers import Answers
from mambalens.explore.questions import Questions
from mambalens.explore.server import Loading, application
from mambalens.explore.state import Cut, Loaded, State

expect = pytest.importorskip("playwright.sync_api").expect
MODELS = ("atlas-mamba1", "atlas-gpt-neox")
ODD = Fact('<script>alert("x")</script> & <b>Peru</b>: the capital is', "<b>Peru</b>", " Lima</script><script>alert(2)</script>",
           "<script>odd</script>", "<script>odd</script>")  # fmt: skip
PERU = "The capital of Peru is"
FAR = "Peru, they say: the capital is"


@pytest.fixture(scope="module")
def lenses() -> dict[str, Lens]:
    return {name: Lens.load(name) for name in MODELS}


@pytest.fixture(scope="module")
def address(lenses: dict[str, Lens]) -> Iterator[str]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    facts = Facts([*load_facts("atlas"), ODD])
    loading = Loading(lambda says: pytest.fail("nothing is loaded here"))
    loading.questions = Questions(Answers(lenses, facts), Loaded({name: name for name in MODELS}))
    own = application(loading, "token", port)
    server = uvicorn.Server(uvicorn.Config(own, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{port}/token/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as tab:
        yield tab


@pytest.fixture(params=[(1280, 900, "light"), (390, 844, "light"), (1280, 900, "dark")], ids=["wide", "narrow", "dark"])
def any_tab(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address, *request.param) as tab:
        yield tab


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int = 1280, height: int = 900, scheme: str = "light") -> Iterator[Any]:
    """The page in a window; nothing is complained of, asked from elsewhere or wider than it."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(120_000)  # where many tests share few cores
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))

    def elsewhere(request: Any) -> None:
        if not request.url.startswith((address, "blob:", "data:")):
            complaints.append(request.url)

    tab.on("request", elsewhere)
    tab.goto(address)
    tab.wait_for_selector("#explore[data-ready]")
    yield tab
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert complaints == []
    context.close()


def settled(tab: Any) -> None:
    """Every question of the page has its answer. (The page's policy forbids what `wait_for_function` does.)"""
    end = time.monotonic() + 120
    while tab.evaluate("(({ round, answered }) => round !== answered)(document.getElementById('explore').dataset)"):
        assert time.monotonic() < end
        tab.wait_for_timeout(10)


def write(tab: Any, prompt: str = PERU, subject: str = "Peru", target: str = "Lima") -> None:
    for name, text in (("subject", subject), ("target", target), ("prompt", prompt)):
        tab.fill(f"[data-name={name}]", text)
    tab.keyboard.press("Tab")
    tab.wait_for_selector(".token")
    settled(tab)


def big(tab: Any, model: str = MODELS[0]) -> str:
    settled(tab)
    return tab.inner_text(f".card[data-model={model}] .big")


def token(tab: Any, position: int) -> Any:
    return tab.locator(".token").nth(position)


def percent(value: float) -> str:
    """A probability as the page writes it."""
    hundredfold = value * 100
    if 0 < hundredfold < 0.001:
        return "< 0.001 %"
    return f"{hundredfold:.2f} %" if 99.95 <= hundredfold < 100 else f"{hundredfold:#.3g}".rstrip(".") + " %"


def expected(lens: Lens, cuts: list[Cut], prompt: str = PERU) -> tuple[float, float]:
    fact = Fact(prompt, "Peru", "Lima")
    with contextlib.ExitStack() as stack:
        base = probability(lens, fact)
        for cut in cuts:
            features = int(cut.features) if cut.features.isdigit() else cut.features
            own = lens.hooks.knockout(list(cut.sources), list(cut.targets), list(cut.layers), features, cut.path)  # type: ignore[arg-type]
            stack.enter_context(own)
        return base, probability(lens, fact)


def shown(lens: Lens, *cuts: Cut, prompt: str = PERU) -> str:
    base, cut = expected(lens, list(cuts), prompt)
    return f"·L: {percent(base)} → {percent(cut)}" if cuts else f"·L: {percent(base)}"


def every(lens: Lens) -> tuple[int, ...]:
    return tuple(range(lens.n_layers))


def test_clicks_cut_and_cuts_add_up_and_are_taken_back(any_tab: Any, lenses: dict[str, Lens]) -> None:
    tab = any_tab
    lens = lenses[MODELS[0]]
    tab.uncheck(f"[data-name=chosen][value={MODELS[1]}]")
    write(tab)
    assert big(tab) == shown(lens)
    token(tab, 3).click()
    first = Cut((3,), (5,), every(lens), "both")
    assert big(tab) == shown(lens, first)
    token(tab, 4).click(modifiers=["Shift"])
    settled(tab)
    both = Cut((3, 4), (5,), every(lens), "both")
    assert big(tab) == shown(lens, both) and tab.locator(".cuts li").count() == 1
    tab.focus("[data-name=first]")
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    late = Cut((3, 4), (5,), every(lens)[3:], "both")
    assert big(tab) == shown(lens, late) and tab.inner_text(".layers output") == "3–11 of 0–11"
    tab.click(".another")
    tab.check("[data-name=path][value=main]")
    tab.check("[data-name=role][value=targets]")
    token(tab, 3).click()
    tab.check("[data-name=role][value=sources]")
    token(tab, 1).click()
    second = Cut((1,), (3,), every(lens)[3:], "main")
    assert big(tab) == shown(lens, late, second) and tab.locator(".cuts li").count() == 2
    tab.click(".undo")
    assert big(tab) == shown(lens, late)
    token(tab, 1).click()
    tab.click(".cuts li:first-child button:text('Remove')")
    assert big(tab) == shown(lens, second)
    tab.keyboard.press("Control+z")
    assert big(tab) == shown(lens, late, second)
    tab.click(".cuts li:first-child button:text('Change')")
    assert token(tab, 4).get_attribute("aria-pressed") == "true" and big(tab) == shown(lens, second, late)
    tab.click(".clear")
    assert big(tab) == shown(lens) and tab.locator(".cuts li").count() == 0
    token(tab, 5).click()
    tab.check("[data-name=role][value=targets]")
    token(tab, 5).click()
    token(tab, 2).click()
    settled(tab)
    assert "no source stands before a target" in tab.inner_text(".making .note") and big(tab) == shown(lens)


def test_two_models_answer_side_by_side_and_one_that_cannot_says_so(tab: Any, lenses: dict[str, Lens]) -> None:
    write(tab)
    tab.check("[data-name=path][value=main]")
    token(tab, 3).click()
    token(tab, 4).click()
    cut = Cut((3, 4), (5,), every(lenses[MODELS[0]]), "main")
    for model in MODELS:
        assert big(tab, model) == shown(lenses[model], cut)
    tab.check("[data-name=path][value=conv]")
    settled(tab)
    assert "none of the layers has it" in tab.inner_text(f".card[data-model={MODELS[1]}] .note")
    assert big(tab) == shown(lenses[MODELS[0]], Cut((3, 4), (5,), cut.layers, "conv"))


def test_a_heatmaps_cell_and_a_flows_edge_are_cut_by_a_click(
    any_tab: Any, lenses: dict[str, Lens], tmp_path: Path
) -> None:
    tab = any_tab
    lens = lenses[MODELS[0]]
    tab.uncheck(f"[data-name=chosen][value={MODELS[1]}]")
    write(tab)
    tab.fill("[data-name=window]", "10")
    tab.click("[data-reading=heatmap]")
    tab.wait_for_selector(".reading[data-shows=heatmap] .mark")
    fact = Fact(PERU, "Peru", "Lima")
    table = lens.sweep([fact], "each", window=10, paths="both", progress=False).table
    cells = [one.replace("−", "-") for one in tab.locator(".mark > text").all_text_contents()]
    assert len(cells) == len(table) == 18
    by_place = table.sort_values(["position", "window_start"]).change_pct
    assert [float(cell) for cell in cells] == [float(f"{value:.0f}") + 0.0 for value in by_place]
    rows = list(csv.DictReader(saved(tab, "[data-save=csv]", tmp_path).open()))
    assert [float(row["change_pct"]) for row in rows] == by_place.tolist()
    picture = saved(tab, "[data-save=svg]", tmp_path).read_text()
    assert "<script" not in picture and picture.count('class="mark"') == 18
    assert saved(tab, "[data-save=png]", tmp_path).read_bytes()[:4] == b"\x89PNG"
    tab.click(".mark[data-row='4'][data-column='1']")
    cell = Cut((4,), (5,), tuple(range(1, 11)), "both")
    assert big(tab) == shown(lens, cell)
    expect(tab.locator(".reading .note")).to_contain_text("of an earlier state")
    tab.click("[data-reading=flow]")
    tab.wait_for_selector(".reading[data-shows=flow] .edge")
    assert "With the cut above" in tab.inner_text(".reading")
    with lens.hooks.knockout(**cell.knockout):
        strongest = lens.flow([fact], progress=False, certify=20).strongest(40)
    edge, second = (strongest.iloc[i] for i in (0, 1))
    assert tab.locator(".edge").count() == 40
    tab.locator(".edge[data-edge='0'] .hit").click(force=True)
    made = [Cut((int(e.source),), (int(e.target),), (int(e.layer),), e.path) for e in (edge, second)]
    assert big(tab) == shown(lens, cell, made[0])
    tab.click(".reading summary")
    tab.locator(".reading tbody button").nth(1).click()
    assert big(tab) == shown(lens, cell, *made)
    tab.locator(".edge[data-edge='0']").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.dataset.edge") == "1"
    tab.click(".undo")
    tab.keyboard.press("Control+z")
    assert big(tab) == shown(lens, cell)


def saved(tab: Any, button: str, folder: Path) -> Path:
    with tab.expect_download() as download:
        tab.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_layers_contributions_attention_and_routes_say_the_lenss_numbers(
    tab: Any, lenses: dict[str, Lens], tmp_path: Path
) -> None:
    lens, fact = lenses[MODELS[0]], Fact(FAR, "Peru", "Lima")
    tab.uncheck(f"[data-name=chosen][value={MODELS[1]}]")
    write(tab, FAR)
    answer = big(tab)
    tab.click("[data-reading=layers]")
    tab.wait_for_selector(".reading[data-shows=layers] .mark")
    rows = list(csv.DictReader(saved(tab, "[data-save=csv]", tmp_path).open()))
    table = lens.logits_by_layer(fact).table.sort_values(["layer", "position"])
    assert [float(row["prob"]) for row in rows] == table.prob.tolist()
    assert [row["top_token"] for row in rows] == table.top_token.tolist()
    last = len(lens.prompt(fact).ids) - 1
    tab.click(f".mark[data-row='5'][data-column='{last}']")  # behind 7 layers of 12
    tab.wait_for_selector(".reading[data-shows=attention] .mark")
    assert "layer 7 (mamba1)" in tab.inner_text(".reading h3")
    rows = list(csv.DictReader(saved(tab, "[data-save=csv]", tmp_path).open()))
    alpha = lens.hooks.effective_attention(torch.tensor([lens.prompt(fact).ids]), 7, reduce="mean_abs")[0]
    assert {(int(row["target"]), int(row["source"])): float(row["alpha"]) for row in rows} == {
        (t, s): pytest.approx(float(alpha[t, s]), rel=1e-6) for t in range(last + 1) for s in range(t + 1)
    }
    tab.click("[data-reading=contributions]")
    tab.wait_for_selector(".reading[data-shows=contributions] .mark")
    rows = list(csv.DictReader(saved(tab, "[data-save=csv]", tmp_path).open()))
    found = lens.contributions(fact)
    assert sum(float(row["contribution"]) for row in rows) == pytest.approx(found.scores.score[0], rel=1e-4)
    mixer = found.where(part="mixer", layer=7, source=1).table.contribution.sum()
    (row,) = [row for row in rows if (row["layer"], row["part"], row["position"]) == ("7", "mixer", "1")]
    assert float(row["contribution"]) == pytest.approx(mixer, rel=1e-5)
    tab.click("[data-reading=routes]")
    tab.wait_for_selector(".reading[data-shows=routes] table")
    routes = lens.flow([fact], progress=False).routes(k=3, progress=False)
    assert tab.locator(".reading tbody tr").count() == len(routes) > 0
    assert f"{routes.carried_pct[0]:.1f} %" in tab.locator(".reading tbody tr").first.inner_text()
    tab.locator(".reading tbody button").first.click()
    every_edge = [edge for hop in routes.edges[0] for edge in hop]
    assert (
        big(tab)
        == shown(lens, *(Cut((s,), (t,), (layer,), path) for layer, path, s, t in every_edge), prompt=FAR)
        != answer
    )
    tab.click("[data-reading=attention]")
    expect(tab.locator(".reading .caption")).to_contain_text("With the 2 cuts above.")


def test_features_and_what_stands_in_the_place_of_a_cut(tab: Any, lenses: dict[str, Lens]) -> None:
    lens, fact = lenses[MODELS[0]], Fact(PERU, "Peru", "Lima")
    tab.uncheck(f"[data-name=chosen][value={MODELS[1]}]")
    write(tab)
    token(tab, 3).click()
    token(tab, 4).click()
    tab.click(".finer summary")
    tab.select_option("[data-name=group]", "slow")
    assert big(tab) == shown(lens, Cut((3, 4), (5,), every(lens), "both", "slow"))
    tab.select_option("[data-name=group]", "one")
    tab.fill("[data-name=feature]", "7")
    assert big(tab) == shown(lens, Cut((3, 4), (5,), every(lens), "both", "7"))
    tab.select_option("[data-name=group]", "all")
    tab.select_option("[data-name=ablation]", "mean")
    over = Facts([*load_facts("atlas"), ODD]).sample(100)
    says = big(tab)  # the server has answered: the model is this thread's now
    with lens.knockout(fact, layers=range(lens.n_layers), path="both", ablation="mean", over=over):
        assert says.endswith(f"→ {percent(probability(lens, fact))}")
    tab.select_option("[data-name=ablation]", "resample")
    settled(tab)
    assert "type that prompt" in tab.inner_text(".card .note")
    tab.fill("[data-name=other]", "The capital of Kenya is")
    tab.fill("[data-name=other_subject]", "Kenya")
    tab.keyboard.press("Tab")
    other = Fact("The capital of Kenya is", "Kenya", "Lima")
    says = big(tab)
    with lens.knockout(fact, layers=range(lens.n_layers), path="both", ablation="resample", other=other):
        assert says.endswith(f"→ {percent(probability(lens, fact))}")
    link = tab.url.partition("#")[2]
    assert State.of_link(link) == State(PERU, "Peru", "Lima", MODELS[:1], (Cut((3, 4), (5,), every(lens), "both"),), "resample",
                                        "The capital of Kenya is", "Kenya")  # fmt: skip


def probability(lens: Lens, fact: Fact) -> float:
    (batch,) = lens.batches([lens.prompt(fact)])
    return float(lens.last_logits(batch)[0].softmax(-1)[batch.targets[0]])


def test_a_link_and_copied_code_give_the_same_number(tab: Any, lenses: dict[str, Lens], tmp_path: Path) -> None:
    write(tab)
    tab.check("[data-name=path][value=main]")
    token(tab, 3).click()
    token(tab, 4).click()
    tab.click(".another")
    token(tab, 1).click()
    settled(tab)
    cuts = [Cut((3, 4), (5,), every(lenses[MODELS[0]]), "main"), Cut((1,), (5,), every(lenses[MODELS[0]]), "main")]
    expect(tab.locator(".python")).to_contain_text(re.compile(r"range\(.*range\(", re.DOTALL))
    numbers = {model: expected(lenses[model], cuts) for model in MODELS}
    copied = {}
    for what in ("python", "command", "link"):
        tab.click(f"[data-copy={what}]")
        expect(tab.locator(".copied")).to_have_text("Copied.")
        copied[what] = tab.evaluate("navigator.clipboard.readText()")
        expect(tab.locator(".copied")).to_have_text("", timeout=6000)
    beside = Path(sys.executable).parent
    for line in ([sys.executable, "-c", copied["python"]], [beside / "mambalens", *shlex.split(copied["command"])[1:]]):
        printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        rows = [row.split() for row in printed.splitlines()]
        assert [row[0] for row in rows] == list(numbers)
        # Another process may have other threads, which round otherwise.
        for row, pair in zip(rows, numbers.values(), strict=True):
            assert [float(value) for value in row[1:]] == pytest.approx(pair, rel=1e-4)
    watched = [row for row in csv.DictReader(saved(tab, ".csv", tmp_path).open()) if row["watched"] == "true"]
    assert [(row["model"], float(row["base_prob"]), float(row["prob"])) for row in watched] == [
        (m, *numbers[m]) for m in MODELS
    ]
    before = tab.locator(".card .big").all_inner_texts(), tab.locator(".cuts li span").all_inner_texts()
    other = tab.context.new_page()
    other.goto(copied["link"])
    other.wait_for_selector("#explore[data-ready]")
    settled(other)
    assert (other.locator(".card .big").all_inner_texts(), other.locator(".cuts li span").all_inner_texts()) == before
    assert State.of_link(copied["link"].partition("#")[2]) == State(PERU, "Peru", "Lima", MODELS, tuple(cuts))


def test_what_facts_say_never_becomes_html_and_facts_are_found(any_tab: Any) -> None:
    tab = any_tab
    tab.click("summary:text('Find a fact')")
    tab.fill("[data-name=words]", "script odd")
    expect(tab.locator(".facts button")).to_have_count(1)
    tab.click(".facts button")
    tab.wait_for_selector(".token")
    settled(tab)
    assert tab.input_value("[data-name=prompt]") == ODD.prompt and tab.input_value("[data-name=target]") == ODD.target
    assert "".join(tab.locator(".token > span:first-child").all_inner_texts()) == ODD.prompt.replace(" ", "·")
    assert tab.locator("script").count() == 1 and tab.locator("b").count() == 0
    for reading in ("heatmap", "flow", "routes", "contributions", "layers", "attention"):
        tab.click(f"[data-reading={reading}]")
        tab.wait_for_selector(f".reading[data-shows={reading}] h3")
    assert tab.locator("script").count() == 1 and tab.locator("b").count() == 0


def test_the_empty_page_teaches_and_errors_are_sentences(any_tab: Any) -> None:
    tab = any_tab
    assert tab.locator(".examples button").count() == 3
    tab.locator(".examples button").nth(1).click()
    tab.wait_for_selector(".token.source")
    settled(tab)
    assert "→" in big(tab) and tab.locator(".cuts li").count() == 1
    tab.fill("[data-name=subject]", "Chile")
    tab.keyboard.press("Tab")
    tab.wait_for_selector(".card .note")
    assert "The subject 'Chile' is not in the prompt" in tab.inner_text(f".card[data-model={MODELS[0]}] .note")
    tab.fill("[data-name=prompt]", "")
    tab.keyboard.press("Tab")
    tab.wait_for_selector(".examples:not([hidden])")


def test_everything_can_be_done_by_keyboard(tab: Any, lenses: dict[str, Lens]) -> None:
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")  # the first example
    settled(tab)
    assert tab.input_value("[data-name=prompt]") == PERU and tab.locator(".token").count() == 6
    tab.uncheck(f"[data-name=chosen][value={MODELS[1]}]")
    write(tab)
    token(tab, 0).focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    tab.keyboard.press("s")
    assert big(tab) == shown(lenses[MODELS[0]], Cut((3,), (5,), every(lenses[MODELS[0]]), "both"))
    assert tab.evaluate("document.activeElement.className").split()[:2] == ["token", "source"]
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("t")
    assert big(tab) == shown(lenses[MODELS[0]], Cut((3,), (4, 5), every(lenses[MODELS[0]]), "both"))
    reached = set()
    for _ in range(30):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement === document.body"):  # the end of the page
            break
        reached.add(
            tab.evaluate(
                "(e => e.dataset.name || e.dataset.reading || e.dataset.copy || e.className || e.textContent)(document.activeElement)"
            )
        )
        assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert {
        "Remove",
        "another",
        "undo",
        "clear",
        "heatmap",
        "flow",
        "layers",
        "python",
        "command",
        "link",
        "csv",
    } <= reached


def test_a_long_question_says_so_and_can_be_cancelled(tab: Any, lenses: dict[str, Lens]) -> None:
    tab.uncheck(f"[data-name=chosen][value={MODELS[1]}]")
    write(tab)
    handle = lenses[MODELS[0]].hooks.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.4))
    try:
        tab.click("[data-reading=flow]")
        tab.wait_for_selector(".working:not([hidden])")
        assert "Working on flow of atlas-mamba1…" in tab.inner_text(".working")
        tab.click(".cancel")
        tab.wait_for_selector(".working", state="hidden")
        assert tab.locator(".reading h3").count() == 0
    finally:
        handle.remove()
    token(tab, 3).click()
    assert big(tab) == shown(lenses[MODELS[0]], Cut((3,), (5,), every(lenses[MODELS[0]]), "both"))
