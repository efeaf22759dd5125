"""The widget of lens.explore without a browser: messages in, messages out, and whose turn it is."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mambalens import Fact, Facts, Lens, MambalensError, load_facts
from mambalens.data import checkpoints
from mambalens.explore.line import Dropped
from mambalens.explore.queue import Queue
from mambalens.explore.state import Cut, State
from mambalens.explore.turns import Turns
from mambalens.loading.origin import Origin

widget_module = pytest.importorskip("mambalens.explore.widget")
NAMES = ("atlas-mamba1", "atlas-gpt-neox")
PERU = Fact("The capital of Peru is", "Peru", "Lima")
ROOT = Path(__file__).parent.parent
CUT = Cut((3, 4), (5,), tuple(range(4, 12)), "both")


@pytest.fixture(scope="module")
def lenses() -> dict[str, Lens]:
    return {name: Lens.load(name) for name in NAMES}


@pytest.fixture
def widget(lenses: dict[str, Lens]) -> Any:
    return heard(lenses[NAMES[0]].explore(PERU))


def heard(made: Any) -> Any:
    made.said = []
    made.send = lambda content, buffers=None: made.said.append(content)
    return made


def say(widget: Any, number: int = 1, view: str = "v", **content: Any) -> Any:
    """What the widget answers to a message."""
    widget._hear(widget, {"view": view, "number": number, **content}, [])
    found = [one["answer"] for one in widget.said if (one["view"], one["number"]) == (view, number)]
    return found[-1] if found else None


def ask(widget: Any, state: State, model: str = NAMES[0], **more: Any) -> Any:
    question = {"verb": "ask", "reading": "predict", "model": model, "state": state.json}
    return say(widget, question=question, **more)


def probability(lens: Lens, knockouts: list[dict[str, Any]]) -> float:
    from contextlib import ExitStack

    (batch,) = lens.batches([lens.prompt(PERU)])
    with ExitStack() as stack:
        for one in knockouts:
            stack.enter_context(lens.hooks.knockout(**one))
        return float(lens.last_logits(batch)[0].softmax(-1)[batch.targets[0]])


def test_what_the_page_shows_is_read_from_python(widget: Any, lenses: dict[str, Lens]) -> None:
    lens = lenses[NAMES[0]]
    assert widget.fact == PERU and widget.knockouts == [] and widget.result is None
    widget._link = replace(widget.state, cuts=(CUT,)).link  # as the front end sets it
    found = ask(widget, widget.state)
    (row,) = widget.result.to_dict("records")
    assert widget.knockouts == [CUT.knockout] and row["error"] == ""
    assert row["prob"] == found["answer"]["prob"] == probability(lens, widget.knockouts)
    assert row["base_prob"] == probability(lens, []) > 0.9 > 0.5 > row["prob"]


def test_a_state_set_from_python_is_the_states_link(widget: Any) -> None:
    widget.state = replace(widget.state, cuts=(CUT,))
    assert State.of_link(widget._link).cuts == (CUT,)
    widget.show("http://127.0.0.1:1/token/#prompt=A+text")
    assert (widget.state.prompt, widget.knockouts) == ("A text", [])
    with pytest.raises(MambalensError, match="is not a cut"):
        widget.show("prompt=a&cut=none")


def test_cuts_are_set_from_python(widget: Any) -> None:
    widget.cuts = [CUT]
    assert State.of_link(widget._link).cuts == widget.cuts == (CUT,)
    widget.cuts = [CUT.text, "0>1:2:main"]
    assert widget.cuts == (CUT, Cut((0,), (1,), (2,), "main"))
    with pytest.raises(MambalensError, match="is not a cut"):
        widget.cuts = ["none"]
    assert len(widget.cuts) == 2
    widget.cuts = []
    assert widget.knockouts == []
    widget.state = replace(widget.state, prompt="")
    with pytest.raises(MambalensError, match="no prompt to cut in"):
        widget.cuts = [CUT]


def test_errors_are_sentences_and_stand_in_the_result(widget: Any) -> None:
    state = replace(widget.state, subject="Chile")
    widget.state = state
    assert "subject 'Chile' is not in the prompt" in ask(widget, state)["error"]
    assert "subject 'Chile' is not in the prompt" in widget.result.error[0]
    for question in (None, [], {}, {"verb": "x"}, {"verb": "ask", "state": 3}, {"verb": "code", "state": {"prompt": "x" * 300_000}}):  # fmt: skip
        assert len(say(widget, question=question)["error"]) < 200
    for content in (None, "x", [], {"number": True}, {"number": 1, "view": 3}, {"number": 1, "view": "v" * 65}):
        widget.said.clear()
        widget._hear(widget, content, [])
        assert widget.said == []


def test_several_widgets_and_views_know_nothing_of_each_other(lenses: dict[str, Lens]) -> None:
    one, two = (heard(lenses[NAMES[0]].explore(PERU, others=[lenses[NAMES[1]]])) for _ in range(2))
    ask(one, one.state, view="a")
    ask(one, one.state, NAMES[1], view="b")
    assert [answer["view"] for answer in one.said] == ["a", "b"] and two.said == []
    assert one.result.model.tolist() == list(NAMES) and two.result is None


def test_an_open_block_of_the_notebook_is_refused(widget: Any, lenses: dict[str, Lens]) -> None:
    with lenses[NAMES[0]].hooks.knockout([3], [5]):
        assert "is open in the notebook" in ask(widget, widget.state)["error"]
    assert "answer" in ask(widget, widget.state)


def test_another_thread_cannot_run_the_model_meanwhile(widget: Any, lenses: dict[str, Lens]) -> None:
    lens, found = lenses[NAMES[0]], []

    def other() -> None:
        try:
            lens.predict("The")
        except MambalensError as error:
            found.append(str(error))

    with widget._alone(NAMES[0], ()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "in another thread" in found[0] and not lens.hooks.layers[0]._forward_pre_hooks


def test_a_question_waits_for_cells_and_a_cell_ends_it_at_its_next_layer() -> None:
    turns, log = Turns(), []
    queue, begun, answered = Queue(True, turns), threading.Event(), threading.Event()

    def work(gone: threading.Event) -> str:
        log.append("begins")
        begun.set()
        if log.count("begins") == 1:
            assert gone.wait(20)
            log.append("ends")
            raise Dropped
        return "answer"

    turns.cell_begins()
    queue.put("p", work, lambda found: (log.append(found), answered.set()))
    time.sleep(0.05)
    assert log == []
    turns.cell_ends()
    assert begun.wait(20)
    turns.cell_begins()
    log.append("cell")
    time.sleep(0.05)
    assert log == ["begins", "ends", "cell"]
    turns.cell_ends()
    assert answered.wait(20) and log[3:] == ["begins", "answer"]
    queue.close()


def test_a_newer_question_drops_the_older_one() -> None:
    queue, found, begun, last = Queue(True, Turns()), [], threading.Event(), threading.Event()

    def old(gone: threading.Event) -> None:
        begun.set()
        assert gone.wait(20)
        raise Dropped

    queue.put("p", old, found.append)
    assert begun.wait(20)
    for number in range(5):
        queue.put("p", lambda gone, number=number: number, found.append)
    queue.put("q", lambda gone: last.set(), found.append)
    assert last.wait(20)
    queue.close()
    assert [one for one in found if not isinstance(one, Dropped | type(None))] == [4]


def test_numbers_are_right_while_cells_and_questions_compete(lenses: dict[str, Lens]) -> None:
    lens, turns, answers = lenses[NAMES[0]], Turns(), []
    queue = Queue(True, turns)
    knockouts = [CUT.knockout, Cut((1,), (5,), (2, 3), "main").knockout]
    expected = [probability(lens, [one]) for one in knockouts]
    for number in range(20):
        queue.put(number, lambda gone: probability(lens, knockouts[:1]), answers.append)
    for _ in range(20):
        turns.cell_begins()
        assert probability(lens, knockouts[1:]) == expected[1]
        turns.cell_ends()
        time.sleep(0.005)
    end = time.monotonic() + 60
    while len(answers) < 20 and time.monotonic() < end:
        time.sleep(0.01)
    queue.close()
    assert answers == [expected[0]] * 20 and expected[0] != expected[1]


def test_without_anywidget_a_sentence_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['anywidget'] = None\nfrom mambalens import Lens\n"
        "try: Lens.load('atlas-mamba1').explore()\nexcept Exception as error: print(type(error).__name__, error)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert found.stdout.startswith("MambalensError") and "pip install 'mambalens[jupyter]'" in found.stdout


def test_two_lenses_of_one_name_and_odd_facts_are_refused(lenses: dict[str, Lens]) -> None:
    lens = lenses[NAMES[0]]
    with pytest.raises(MambalensError, match="same name"):
        lens.explore(others=[lens])
    with pytest.raises(MambalensError, match="at most 4,000"):
        lens.explore("x" * 5000)
    assert lens.explore("A text").state.prompt == "A text" and lens.explore(facts=Facts([PERU])).fact is None


def test_a_stored_notebook_shows_a_sentence(widget: Any) -> None:
    shown, _ = widget._repr_mimebundle_()
    assert shown["text/plain"] == "mambalens explore: atlas-mamba1; a widget, shown where a kernel runs"


def printed(program: str) -> list[tuple[str, float, float]]:
    """What a program prints that runs in a process of its own: names and numbers."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    return [(name, float(before), float(after)) for name, before, after in lines]


def code(widget: Any) -> Any:
    return say(widget, number=99, question={"verb": "code", "state": widget.state.json, "watched": "Lima"})


def test_a_copied_program_loads_what_the_lenses_were_loaded_from(
    lenses: dict[str, Lens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoints()[NAMES[0]], tmp_path / "a copy")
    facts = tmp_path / "mine.csv"
    Facts([PERU, Fact("The capital of Chile is", "Chile", "Santiago")]).table.to_csv(facts, index=False)
    monkeypatch.chdir(tmp_path)
    exact = Lens.load("./a copy", dtype=torch.float64, device=torch.device("cpu"), tokenizer="a copy")
    exact.name = "exact"
    widget = heard(exact.explore(PERU, others=[lenses[NAMES[1]]], facts="mine.csv"))
    told = set()
    for ablation in ("zero", "mean"):
        widget.state = replace(widget.state, cuts=(CUT,), ablation=ablation)
        answers = [ask(widget, widget.state, name)["answer"] for name in ("exact", NAMES[1])]
        found = code(widget)
        assert "float64" in found["python"] and f"'tokenizer': {str(tmp_path / 'a copy')!r}" in found["python"]
        expected = [(name, answer["base"], answer["prob"]) for name, answer in zip((str(tmp_path / "a copy"), NAMES[1]), answers, strict=True)]  # fmt: skip
        assert printed(found["python"]) == expected
        told.add(answers[0]["prob"])
        # One dtype and tokenizer for all is what a command line has.
        *comments, command = found["command"].splitlines()
        assert command.startswith("mambalens explore --print ") and "--dtype" not in command
        assert all(comment.startswith("# 'exact' was loaded with ") for comment in comments) and len(comments) == 3
        widget.state = replace(widget.state, models=("exact",))
        alone = code(widget)
        assert f"Lens.load(name, dtype='float64', device='cpu', tokenizer={str(tmp_path / 'a copy')!r})" in alone["python"]  # fmt: skip
        assert printed(alone["python"]) == expected[:1]
        assert "--dtype=float64" in alone["command"] and alone["command"].count("# ") == 1
        widget.state = replace(widget.state, models=("exact", NAMES[1]))
    assert len(told) == 2


def test_what_a_copied_program_cannot_repeat_it_says_in_a_line(lenses: dict[str, Lens]) -> None:
    lens = lenses[NAMES[0]]
    mine = Lens(lens.model, lens.tokenizer, "mine\nimport os")
    widget = heard(mine.explore(PERU, facts=Facts([PERU, Fact("The capital of Chile is", "Chile", "Santiago")])))
    widget.state = replace(widget.state, cuts=(CUT,), ablation="mean")
    program = code(widget)["python"]
    note = "# 'mine\\nimport os' was made of a model object: put its lens in the place of Lens.load."
    means = "# Means are over facts that were an object: put them in the place of load_facts."
    assert [line for line in program.splitlines() if line.startswith("#")] == [note, means]
    assert code(widget)["command"].startswith(f"{note}\n{means}\nmambalens explore ")
    compile(program, "copied", "exec")
    cast = Lens.load(NAMES[1], attn_implementation="eager")
    cast.model.double()
    cast.origin = cast.origin._replace(left_out=("config",)) if cast.origin else None
    program = code(heard(cast.explore(PERU)))["python"]
    assert "Lens.load(name, attn_implementation='eager')" in program
    assert (
        f"# {NAMES[1]!r}: config= of Lens.load is an object and left out here; it was cast from float32 to float64 since: "
        "lens.model.to(torch.float64) does so here.\n" in program
    )


def test_where_a_lens_comes_from_is_written_down_as_python_reads_it(tmp_path: Path) -> None:
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "revision": "main", "config": object(),
               "device_map": {"": "cpu"}, "tokenizer": tmp_path}  # fmt: skip
    origin = Origin.of("org/model", options, torch.float32, torch.device("cpu"))
    written = {"dtype": "bfloat16", "device": "cpu", "revision": "main", "device_map": {"": "cpu"}, "tokenizer": str(tmp_path)}  # fmt: skip
    assert origin == ("org/model", written, ("config",), "float32", "cpu")
    assert ast.literal_eval(repr(origin.options)) == written
    assert Origin.of(str(tmp_path / "x" / ".."), {}, "float32", "cpu").name == str(tmp_path / "x" / "..")
    (tmp_path / "x").mkdir()
    assert Origin.of(str(tmp_path / "x" / ".."), {}, "float32", "cpu").name == str(tmp_path)
    assert Origin.of(NAMES[0], {}, "float32", "cpu").name == NAMES[0]


@pytest.mark.parametrize("ablation", ["mean", "resample"])
def test_knockouts_carry_what_stands_in_the_place_of_the_cuts(ablation: str, lenses: dict[str, Lens]) -> None:
    widget = heard(lenses[NAMES[0]].explore(PERU, others=[lenses[NAMES[1]]]))
    second = Cut((0, 2), (3,), (2, 3), "both")
    plain = [CUT.knockout, second.knockout]
    widget.state = replace(widget.state, cuts=(CUT, second), ablation=ablation,
                           other="The capital of Kenya is", other_subject="Kenya")  # fmt: skip
    for name in NAMES:
        lens, knockouts = lenses[name], widget.knockouts_of(name)
        assert [{**one, "instead": None} for one in knockouts] == [{**one, "instead": None} for one in plain]
        found = ask(widget, widget.state, name)["answer"]
        assert found["prob"] == probability(lens, knockouts)
        assert abs(found["prob"] - probability(lens, plain)) > 1e-6
        # By roles, from the lens itself: the same values at the same places.
        asked = {"mean": {"over": load_facts("atlas").sample(100)},
                 "resample": {"other": Fact("The capital of Kenya is", "Kenya", "Lima")}}[ablation]  # fmt: skip
        widget.cuts = [Cut(tuple(lens.prompt(PERU).positions("subject")), (5,), tuple(range(4, 12)), "both")]
        with lens.knockout(PERU, "subject", "last", range(4, 12), path="both", ablation=ablation, **asked):
            expected = probability(lens, [])
        assert probability(lens, widget.knockouts_of(name)) == pytest.approx(expected, rel=1e-6)
        widget.cuts = [CUT, second]
    assert [one["instead"] is not None for one in widget.knockouts] == [True, True]
    assert probability(lenses[NAMES[0]], widget.knockouts) == probability(lenses[NAMES[0]], widget.knockouts_of(NAMES[0]))  # fmt: skip


def test_knockouts_with_values_are_refused_where_they_would_be_wrong(widget: Any, lenses: dict[str, Lens]) -> None:
    widget.state = replace(widget.state, cuts=(CUT,), ablation="resample")
    with pytest.raises(MambalensError, match="type that prompt"):
        _ = widget.knockouts
    widget.state = replace(widget.state, ablation="mean")
    with lenses[NAMES[0]].hooks.knockout([3], [5]), pytest.raises(MambalensError, match="is open in the notebook"):
        _ = widget.knockouts
    with pytest.raises(MambalensError, match="'atlas-mamba' is no model of this widget: .*atlas-mamba1"):
        widget.knockouts_of("atlas-mamba")
    assert widget.knockouts[0]["instead"] is not None
    widget.cuts = []
    assert widget.knockouts == []


def test_a_cell_reads_the_state_that_was_asked_last_before_its_answer_is_in(widget: Any) -> None:
    clicked = replace(widget.state, cuts=(CUT,))
    dropped = widget._questions.understand(
        {"verb": "ask", "reading": "predict", "model": NAMES[0], "state": clicked.json}
    )
    run = widget._questions.understand

    def ended(told: Any) -> Any:  # a cell took the question's turn, and it waits behind the cell
        asking = run(told)
        return asking._replace(run=lambda gone: Dropped()) if told["verb"] == "ask" else asking

    assert dropped.reading == "predict"
    widget._questions.understand = ended
    ask(widget, clicked)
    assert widget.state == clicked and widget.knockouts == [CUT.knockout] and widget.result is None
    assert State.of_link(widget._link).cuts == ()  # the page says its link behind the answer
    # Another reading of an older state moves nothing; what is asked next, or said, does.
    say(widget, question={"verb": "ask", "reading": "layers", "model": NAMES[0], "state": replace(clicked, cuts=()).json})  # fmt: skip
    assert widget.cuts == (CUT,)
    ask(widget, replace(clicked, cuts=()))
    assert widget.cuts == ()
    ask(widget, clicked)
    say(widget, drop=True, key=f"v predict {NAMES[0]}")  # undone, and nothing is asked anew
    assert widget.cuts == ()
    widget.cuts = [CUT]
    ask(widget, replace(clicked, cuts=()))
    widget._link = ""
    assert widget.state.prompt == ""
