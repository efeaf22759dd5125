"""The server behind mambalens explore: its answers are the lens's own, and nobody else may ask."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import shlex
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from mambalens import Fact, Facts, Lens, MambalensError, load_facts
from mambalens.cli.app import app as command_line
from mambalens.explore import answers as answers_module
from mambalens.explore.answers import Answers
from mambalens.explore.line import Line
from mambalens.explore.questions import Questions
from mambalens.explore.security import LARGEST
from mambalens.explore.server import WRONG, Loading, application
from mambalens.explore.state import Cut, Loaded, State

PORT, TOKEN = 4321, "a-token-that-nobody-can-guess"
HOME = f"http://127.0.0.1:{PORT}"
MODELS = ("atlas-mamba1", "atlas-gpt-neox")
PERU = State("The capital of Peru is", "Peru", "Lima", MODELS[:1])
CUTS = (Cut((3, 4), (5,), tuple(range(4, 12)), "both"), Cut((1,), (3, 5), (0, 1, 7), "main"))
ODD = State(
    '<script>alert("x")</script> & <b>Peru</b>: the capital is', "<b>Peru</b>", " Lima</script><script>", MODELS[:1]
)


@pytest.fixture(scope="module")
def lenses() -> dict[str, Lens]:
    return {name: Lens.load(name) for name in MODELS}


def served(lenses: dict[str, Lens], facts: Facts | None = None) -> Any:
    loading = Loading(lambda says: pytest.fail("nothing is loaded here"))
    loading.questions = Questions(Answers(lenses, facts or Facts([])), Loaded({name: name for name in MODELS}))
    return application(loading, TOKEN, PORT)


@pytest.fixture(scope="module")
def server(lenses: dict[str, Lens]) -> Any:
    return served(lenses, load_facts("atlas"))


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[TestClient]:
    with TestClient(server, base_url=HOME, raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, verb: str, **told: Any) -> dict[str, Any]:
    return client.post(f"/{TOKEN}/ask", json={"verb": verb, **told}).json()


def ask(client: TestClient, reading: str, state: State, model: str = MODELS[0], **more: Any) -> dict[str, Any]:
    return post(client, "ask", reading=reading, page="p", model=model, state=state.json, **more)


def probabilities(lens: Lens, state: State) -> tuple[np.ndarray, int]:
    """What the model says of the next token under the state's cuts, and the answer's token."""
    (batch,) = lens.batches([lens.prompt(state.fact)])
    with contextlib.ExitStack() as stack:
        for cut in state.cuts:
            stack.enter_context(
                lens.hooks.knockout(list(cut.sources), list(cut.targets), list(cut.layers), path=cut.path)
            )  # type: ignore[arg-type]
        return lens.last_logits(batch)[0].softmax(-1).numpy(), int(batch.targets[0])


# --- the answers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cuts", [(), CUTS[:1], (replace(CUTS[0], path="main"), CUTS[1])], ids=["none", "one", "two"])
def test_the_prediction_under_cuts_is_the_lenss_own(
    client: TestClient, lenses: dict[str, Lens], model: str, cuts: tuple[Cut, ...]
) -> None:
    if model == "atlas-gpt-neox":
        cuts = tuple(replace(cut, path="main") for cut in cuts)
    state = replace(PERU, cuts=cuts, models=(model,))
    found = ask(client, "predict", state, model)
    base, answer = probabilities(lenses[model], replace(state, cuts=()))
    cut, _ = probabilities(lenses[model], state)
    told = found["answer"]
    assert (told["id"], told["base"], told["prob"]) == (answer, float(base[answer]), float(cut[answer]))
    assert (told["base_rank"], told["rank"]) == tuple(int((p > p[answer]).sum()) + 1 for p in (base, cut))
    assert found["tokens"] == lenses[model].prompt(state.fact).tokens and found["subject"] == [3, 4]
    ids = [row["id"] for row in found["top"]]
    assert set(base.argsort()[-5:]) | set(cut.argsort()[-5:]) | {answer} == set(ids) and len(ids) == len(set(ids))
    assert [(row["base"], row["prob"]) for row in found["top"]] == [(float(base[i]), float(cut[i])) for i in ids]
    if cuts:
        assert not np.allclose(base, cut, atol=1e-4)
    else:
        assert (base == cut).all()


def test_where_no_answer_is_named_the_first_models_own_is_watched(client: TestClient, lenses: dict[str, Lens]) -> None:
    state = State("The capital of Peru is", models=MODELS)
    top = lenses[MODELS[0]].predict(state.prompt, 1)
    for model in MODELS:
        found = ask(client, "predict", state, model)
        assert (found["target"], found["answer"]["id"]) == (top.token[0], top.token_id[0])


@pytest.mark.parametrize("cuts", [(), CUTS[:1]], ids=["whole", "cut"])
def test_heatmap_flow_and_layers_are_the_lenss_own(
    client: TestClient, lenses: dict[str, Lens], cuts: tuple[Cut, ...]
) -> None:
    lens, state = lenses[MODELS[0]], replace(PERU, cuts=cuts)
    heat = ask(client, "heatmap", state, window=10, path="both")
    flow, layers = ask(client, "flow", state), ask(client, "layers", state)
    with contextlib.ExitStack() as stack:
        for cut in cuts:
            stack.enter_context(lens.hooks.knockout(cut.sources, cut.targets, cut.layers, path=cut.path))  # type: ignore[arg-type]
        table = lens.sweep([PERU.fact], "each", window=10, paths="both", progress=False).table
        last = lens.logits_by_layer(PERU.fact).at_last()
        strongest = lens.flow([PERU.fact], progress=False, certify=20).strongest(40)
    assert len(table) == 18 and heat["starts"] == [0, 1, 2] and heat["positions"] == list(range(6))
    for row in table.itertuples():
        assert heat["prob"][row.position][row.window_start] == row.prob
        assert heat["change_pct"][row.position][row.window_start] == row.change_pct
    assert heat["base_prob"] == table.base_prob[0]
    for told, row in zip(flow["edges"], strongest.itertuples(), strict=True):
        assert (told["layer"], told["path"], told["source"], told["target"]) == (
            row.layer,
            row.path,
            row.source,
            row.target,
        )
        assert told["effect"] == pytest.approx(row.effect, rel=1e-5)
        # What the convolution hands over is read by the scan of the same layer.
        rows = (0, 0.5) if row.path == "conv" else (0.5, 1)
        assert (told["begin"] - row.layer, told["end"] - row.layer) == rows
    assert sum(edge["exact"] is not None for edge in flow["edges"]) >= 20 and flow["of"] == 324
    assert [row[-1] for row in layers["prob"]] == last["prob"].tolist() and len(layers["prob"]) == 13
    assert [row[-1] for row in layers["top"]] == last["top_token"].tolist() and {len(row) for row in layers["top"]} == {
        6
    }


@pytest.mark.parametrize("cuts", [(), CUTS[:1]], ids=["whole", "cut"])
def test_an_edge_of_the_flow_that_is_cut_gives_the_flows_exact_number(
    client: TestClient, cuts: tuple[Cut, ...]
) -> None:
    flow = ask(client, "flow", replace(PERU, cuts=cuts))["edges"]
    edge = max((edge for edge in flow if edge["exact"] is not None), key=lambda edge: abs(edge["exact"]))
    cut = Cut((edge["source"],), (edge["target"],), (edge["layer"],), edge["path"])
    answers = [ask(client, "predict", replace(PERU, cuts=made))["answer"] for made in (cuts, (*cuts, cut))]
    log_odds = [float(np.log(answer["prob"]) - np.log1p(-answer["prob"])) for answer in answers]
    assert log_odds[1] - log_odds[0] == pytest.approx(edge["exact"], abs=1e-2) and abs(edge["exact"]) > 0.1


def test_copied_python_and_command_give_the_same_numbers(client: TestClient) -> None:
    slow = (replace(CUTS[0], features="slow"), replace(CUTS[1], features="3"))
    states = [
        replace(PERU, cuts=CUTS),
        PERU,
        replace(ODD, cuts=(Cut((0, 1), (5,), (0, 1, 2)),)),
        replace(PERU, cuts=slow),
        replace(PERU, cuts=CUTS, ablation="mean"),
        replace(PERU, cuts=CUTS, ablation="resample", other="The capital of Kenya is", other_subject="Kenya"),
    ]
    told = []
    for state in states:
        answer = ask(client, "predict", state)["answer"]
        told.append(answer["prob"])
        code = post(client, "code", state=state.json)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code["python"], "copied", "exec"), {})
        line = f"atlas-mamba1 {answer['base']} {answer['prob']}\n"
        assert printed.getvalue() == line
        program, *arguments = shlex.split(code["command"])
        found = CliRunner().invoke(command_line, arguments)
        assert program == "mambalens" and found.exit_code == 0 and found.stdout == line
    assert len(set(told)) == len(states)


def test_a_link_brings_its_state_back(client: TestClient) -> None:
    for state in (PERU, ODD, replace(PERU, cuts=CUTS, models=MODELS), State("é\n&=#+%\t'\"語", cuts=CUTS)):
        assert State.of_link("#" + state.link) == State.read(json.loads(json.dumps(state.json))) == state
        link = post(client, "code", state=state.json)["link"]
        assert post(client, "open", link=link) == {"state": state.json}


def test_code_holds_the_options_that_models_were_loaded_with() -> None:
    loaded = Loaded({"mine": "/a folder/mine.gguf"}, options={"mine": {"dtype": "float64", "tokenizer": "elsewhere"}})
    state = replace(PERU, models=("mine",))
    assert "for name in ['/a folder/mine.gguf']" in loaded.python(state)
    assert "Lens.load(name, dtype='float64', tokenizer='elsewhere')" in loaded.python(state)
    words = shlex.split(loaded.command(state))
    assert words[-2:] == ["--", "/a folder/mine.gguf"] and {"--dtype=float64", "--tokenizer=elsewhere"} < set(words)


def test_facts_are_searched_and_examples_teach(client: TestClient, lenses: dict[str, Lens]) -> None:
    found = post(client, "search", words="capital  PERU")["facts"]
    assert 0 < len(found) <= 20 and all("Peru" in fact["prompt"] for fact in found)
    about = post(client, "about")
    assert [model["name"] for model in about["models"]] == list(MODELS) and len(about["examples"]) == 3
    assert about["models"][0]["paths"] == ["main", "conv", "both"] and about["models"][1]["paths"] == ["main"]
    plain, early, late = (ask(client, "predict", State.read(one["state"]))["answer"] for one in about["examples"])
    assert plain["prob"] == plain["base"] > 0.9 and early["prob"] < 0.1 and late["prob"] > 0.9


def test_models_with_other_tokens_or_layers_say_that_the_cuts_do_not_fit(lenses: dict[str, Lens]) -> None:
    other = Lens(lenses[MODELS[0]].model, _Split(lenses[MODELS[0]].tokenizer), "split")
    with TestClient(served({**lenses, "split": other}), base_url=HOME) as client:
        state = replace(PERU, models=(*MODELS, "split"), cuts=CUTS[1:])
        assert (
            "split has other tokens in this prompt than atlas-mamba1" in ask(client, "predict", state, "split")["error"]
        )
        assert "answer" in ask(client, "predict", state, MODELS[1])


class _Split:
    """A tokenizer that takes the first token for two."""

    def __init__(self, tokenizer: Any) -> None:
        self._own = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __call__(self, text: str, **options: Any) -> Any:
        found = dict(self._own(text, **options))
        found["input_ids"] = [found["input_ids"][0], *found["input_ids"]]
        if "offset_mapping" in found:
            first = found["offset_mapping"][0]
            found["offset_mapping"] = [(first[0], 1), (1, first[1]), *found["offset_mapping"][1:]]
        return found


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (State(" "), "prompt is empty"),
        (replace(PERU, subject="Chile"), "subject 'Chile' is not in the prompt"),
        (replace(PERU, cuts=(Cut((0,), (6,), (0,)),)), "tokens 0 to 5"),
        (replace(PERU, cuts=(Cut((0,), (5,), (12,)),)), "layers 0 to 11"),
        (replace(PERU, cuts=(Cut((0,), (5,), (0,), "erase"),)), "none of the layers has it"),
        (replace(PERU, models=("atlas-mamba7",)), "'atlas-mamba7' is not loaded: did you mean"),
        (State("word " * 700), "at most 512 are read"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(client: TestClient, state: State, says: str) -> None:
    found = ask(client, "predict", state)
    assert set(found) == {"error"} and says in found["error"]


def test_cuts_that_are_none_are_refused() -> None:
    for text in ("", "3", "5>3:0:main", "3>5:0:side", "3>5::main", "3-1>5:0:main", "3>5:0-99999:main", "1,>2:0:main", "١>2:0:main"):  # fmt: skip
        with pytest.raises(MambalensError):
            Cut.parse(text)
    with pytest.raises(MambalensError, match="twice"):
        list(_answered(["atlas-mamba1", "atlas-mamba1"]))


def _answered(models: list[str]) -> Iterator[str]:
    from mambalens.explore.programs import answered

    return answered(models, PERU.json, lambda: Facts([]), Lens.load)


# --- who may ask


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (f"/{TOKEN}/", {"host": "evil.example"}, 403),
        (f"/{TOKEN}/", {"host": f"evil.example:{PORT}"}, 403),
        (f"/{TOKEN}/", {"host": "127.0.0.1:80"}, 403),
        (f"/{TOKEN}/ask", {"origin": "http://evil.example"}, 403),
        (f"/{TOKEN}/ask", {"origin": "null"}, 403),
        (f"/{TOKEN}/ask", {"origin": f"http://localhost:{PORT}"}, 403),
        (f"/{TOKEN}/ask", {"sec-fetch-site": "cross-site"}, 403),
        (f"/{TOKEN}/ask", {"content-type": "text/plain"}, 415),
        ("/ask", {}, 403),
        ("/", {}, 403),
        (f"/{TOKEN}x/ask", {}, 403),
        (f"/{TOKEN[:-1]}/ask", {}, 403),
        (f"//{TOKEN}/ask", {}, 403),
        (f"/{TOKEN}", {}, 404),
        ("/é/ask", {}, 403),
    ],
)
def test_a_foreign_host_origin_or_token_is_refused(
    client: TestClient, path: str, headers: dict[str, str], status: int
) -> None:
    response = client.post(path, content=b"{}", headers={"content-type": "application/json", **headers})
    assert response.status_code == status and "atlas" not in response.text
    assert response.headers["content-security-policy"].startswith("default-src 'none'")


def test_the_page_is_carried_and_has_no_script_or_style_of_its_own(client: TestClient) -> None:
    page = client.get(f"/{TOKEN}/")
    assert page.status_code == 200 and '<script type="module" src="page.js">' in page.text
    assert "style=" not in page.text and page.text.count("<script") == 1 and " on" + "click" not in page.text
    policy = page.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    own = client.get(f"/{TOKEN}/", headers={"origin": HOME})
    assert own.status_code == 200
    for name in ("../state.py", "..%2fstate.py", "%2e%2e/state.py", "__init__.py", "nothing.js", "a/b.js"):
        assert client.get(f"/{TOKEN}/{name}").status_code in (403, 404), name
    scripts = [
        client.get(f"/{TOKEN}/{name}").text
        for name in (
            "explore.js",
            "page.js",
            "dom.js",
            "figures.js",
            "graph.js",
            "readings.js",
            "theme.css",
            "explore.css",
            "page.css",
        )
    ]
    assert all(
        text and "innerHTML" not in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")
        for text in scripts
    )


def test_a_question_of_a_megabyte_is_refused_whether_it_says_so_or_not(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    large = json.dumps({"verb": "code", "state": {"prompt": "x" * 1_000_000}}).encode()
    assert client.post(f"/{TOKEN}/ask", content=large, headers=headers).status_code == 413
    chunks = (large[i : i + 1000] for i in range(0, len(large), 1000))
    assert client.post(f"/{TOKEN}/ask", content=chunks, headers=headers).status_code == 413
    told = post(client, "code", state={"prompt": "x" * (LARGEST // 2)})
    assert "at most 4,000" in told["error"] and len(told["error"]) < 200


def test_five_hundred_odd_questions_are_answered_or_refused_in_a_sentence(client: TestClient) -> None:
    draw = random.Random(7)
    values: list[Any] = [
        None, True, -1, 0, 3, 1.5, 1e308, 10**30, "", "main", "both", "x" * 5000, "\ud800", "\x00", "<script>", [], {}, [[]],
        [0], [3, 4], [5], ["5"], [True], [1.0], list(range(3000)), {"a": 1}, "atlas-mamba1", "predict", "../..", ["atlas-mamba1"],
    ]  # fmt: skip
    for _ in range(500):
        verb = draw.choice(["ask", "ask", "code", "open", "search"])
        state: Any = replace(PERU, cuts=CUTS[: draw.randint(0, 2)]).json
        told: dict[str, Any] = {"verb": verb, "reading": "predict", "page": "fuzz", "model": MODELS[0], "state": state, "words": "peru",
                                "link": PERU.link, "window": 11, "path": "main"}  # fmt: skip
        for _ in range(draw.randint(1, 3)):
            place = draw.choice([told, state, *state["cuts"]] if isinstance(state.get("cuts"), list) else [told, state])
            if isinstance(place, dict):
                place[draw.choice([*place])] = draw.choice(values)
        body = json.dumps(told).encode()
        if draw.random() < 0.1:
            body = body[: draw.randint(0, len(body))] + bytes([draw.randint(128, 255)])
        response = client.post(f"/{TOKEN}/ask", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), (verb, told, response.text)
        found = response.json()
        if "error" in found:
            assert len(found["error"]) < 1000 and "Traceback" not in found["error"]
            assert found["error"].rstrip().endswith((".", ")", "main", "both", "erase", "gpt-neox")), found
    assert ask(client, "predict", PERU)["answer"]["prob"] > 0.9


def test_facts_with_scripts_in_every_field_come_back_as_they_are(lenses: dict[str, Lens]) -> None:
    fact = Fact(ODD.prompt, ODD.subject, ODD.target, "<script>odd</script>", "<script>odd</script>")
    with TestClient(served(lenses, Facts([fact])), base_url=HOME) as client:
        (found,) = post(client, "search", words="script")["facts"]
        assert State.read({**found, "models": [MODELS[0]]}) == ODD
        answer = client.post(
            f"/{TOKEN}/ask",
            json={"verb": "ask", "reading": "predict", "page": "p", "model": MODELS[0], "state": ODD.json},
        )
        assert answer.headers["content-type"] == "application/json"
        assert "".join(answer.json()["tokens"]) == ODD.prompt


def test_a_model_that_raises_gives_a_neutral_sentence_and_the_server_goes_on(
    client: TestClient, lenses: dict[str, Lens], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret of the machine")

    state = replace(PERU, prompt="Peru, that is")
    handle = lenses[MODELS[0]].model.register_forward_pre_hook(broken)
    try:
        response = client.post(
            f"/{TOKEN}/ask",
            json={"verb": "ask", "reading": "predict", "page": "p", "model": MODELS[0], "state": state.json},
        )
    finally:
        handle.remove()
    assert response.status_code == 500 and response.json() == {"error": WRONG}
    assert "secret of the machine" in caplog.text
    assert "answer" in ask(client, "predict", state)


# --- the line


def test_of_a_burst_of_questions_the_first_that_began_and_the_last_are_run(lenses: dict[str, Lens]) -> None:
    lens, ran, arrived, all_here = lenses[MODELS[0]], [], [], threading.Event()

    def begin(*_: Any) -> None:
        ran.append(1)
        assert all_here.wait(20)

    handle = lens.model.register_forward_pre_hook(begin)

    async def burst() -> list[dict[str, Any]]:
        server = served(lenses)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url=HOME) as client:

            async def one(number: int) -> dict[str, Any]:
                state = replace(PERU, prompt=f"Peru {number}: the capital of Peru is")
                told = {"verb": "ask", "reading": "predict", "page": "p", "model": MODELS[0], "state": state.json}
                sent = asyncio.ensure_future(client.post(f"/{TOKEN}/ask", json=told))
                arrived.append(number)
                if len(arrived) == 200:
                    asyncio.get_running_loop().call_later(1, all_here.set)
                return (await sent).json()

            return await asyncio.gather(*(one(number) for number in range(200)))

    try:
        found = asyncio.run(burst())
    finally:
        handle.remove()
    answered = [number for number, one in enumerate(found) if "answer" in one]
    assert answered == [199] and "".join(found[199]["tokens"]).startswith("Peru 199")
    assert all(one == {"dropped": True} for one in found[:199]) and len(ran) == 2  # the first had begun


def test_one_question_runs_at_a_time_and_those_of_other_pages_wait() -> None:
    running, most, order = 0, 0, []

    def work(number: int) -> Any:
        def run(gone: threading.Event) -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.01)
            order.append(number)
            running -= 1
            return number

        return run

    async def all_of_them() -> list[Any]:
        line = Line()
        found = await asyncio.gather(
            *(line.ask(number, work(number), _stays) for number in range(70)), return_exceptions=True
        )
        line.close()
        return found

    found = asyncio.run(all_of_them())
    assert found[:64] == list(range(64)) == order and most == 1
    assert all(isinstance(one, MambalensError) for one in found[64:])


async def _stays() -> bool:
    return False


def test_a_long_run_ends_between_layers_when_nobody_waits_and_leaves_the_model_as_it_was(
    lenses: dict[str, Lens],
) -> None:
    lens = lenses[MODELS[0]]
    found = Answers(lenses, Facts([]))
    for reading in ("predict", "heatmap", "flow", "layers"):
        gone, called = threading.Event(), 0

        def count(*_: Any) -> None:
            nonlocal called
            called += 1
            if called == 3:
                gone.set()  # noqa: B023

        handle = lens.hooks.layers[2].register_forward_pre_hook(count)
        asked = answers_module.Question(replace(PERU, cuts=CUTS), MODELS[0], gone)
        more = {"window": 2, "path": "main"} if reading == "heatmap" else {}
        try:
            if reading in ("predict", "layers"):
                gone.set()
            with pytest.raises(answers_module.Dropped):
                answers_module.READINGS[reading](found, asked, **more)
        finally:
            handle.remove()
        assert not lens.hooks.cutting and called <= 4
        assert not any(len(module._forward_pre_hooks) for module in lens.hooks.layers)


def test_a_closed_tab_ends_its_run(lenses: dict[str, Lens]) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(gone: threading.Event) -> None:
        begun.set()
        assert gone.wait(5)
        ended.set()
        raise answers_module.Dropped

    async def left() -> bool:
        return begun.is_set()

    async def closed() -> None:
        line = Line()
        with pytest.raises(answers_module.Dropped):
            await line.ask("p", work, left)
        line.close()

    asyncio.run(closed())
    assert ended.is_set()
