"""How facts, prompts, lenses, predictions and results show themselves in a notebook."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from models import tiny
from transformers import AutoTokenizer

from mambalens import Fact, Facts, Lens
from mambalens.data import checkpoints

FOLDER = next(iter(checkpoints().values()))
FACTS = Facts(
    [
        Fact("The capital of Peru is", "Peru", "Lima", "capital", "a"),
        Fact("<i>Chad</i> & co.: the capital of <i>Chad</i> is", "<i>Chad</i>", "N'Djamena", None, "b"),
    ]
)


@pytest.fixture(scope="module")
def lens() -> Lens:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return Lens(tiny("mamba1", vocabulary=len(tokenizer)), tokenizer, "tiny")


def marked(html: str, role: str) -> list[str]:
    return re.findall(rf'<span[^>]* title="{role}">([^<]*)</span>', html)


def test_a_fact_marks_every_subject_and_escapes_what_it_shows() -> None:
    assert marked(FACTS[0]._repr_html_(), "subject") == ["Peru"]
    html = FACTS[1]._repr_html_()
    assert marked(html, "subject") == ["&lt;i&gt;Chad&lt;/i&gt;"] * 2
    assert "<i>" not in html and "&amp; co." in html
    assert "mathjax_ignore" in html  # '$' in a prompt starts no formula


def test_facts_show_the_first_and_count_the_rest() -> None:
    many = Facts([Fact("The capital of Peru is", "Peru", "Lima", id=str(i)) for i in range(8)], name="mine")
    html = many._repr_html_()
    assert "8 facts of mine" in html and "and 3 more" in html and html.count("→") == 5


def test_a_prompt_shows_every_token_with_its_role(lens: Lens) -> None:
    prompt = lens.prompt(FACTS[0])
    html = prompt._repr_html_()
    subject = [prompt.tokens[i].replace(" ", "·") for i in prompt.positions("subject")]
    assert marked(html, "subject") == [*subject, "subject"]  # and the legend
    assert marked(html, "last") == [prompt.tokens[-1].replace(" ", "·"), "last"]
    assert marked(html, "relation") == [
        prompt.tokens[i].replace(" ", "·") for i in prompt.positions("relation_minus_last")
    ]


def test_a_lens_shows_its_mixers(lens: Lens) -> None:
    html = lens._repr_html_()
    features = lens.hooks.mixers[0].n_features
    assert f"<td>mamba1</td><td>{lens.n_layers}</td><td>{features} channels</td><td>main, conv, both</td>" in html


def test_predictions_are_a_table_that_marks_the_scored_token_alone(lens: Lens) -> None:
    every = lens.predict(FACTS[0], k=len(lens.tokenizer))
    assert isinstance(every, pd.DataFrame) and type(every[every.prob > 0.5]) is pd.DataFrame
    assert list(every.columns) == ["token", "prob", "token_id"]
    assert every._repr_html_().count("✓") == 1
    scored = lens.prompt(FACTS[0]).target_id
    assert lens.tokenizer.decode([scored]).replace(" ", "·") + "</b> ✓" in every._repr_html_()
    text = lens.predict("A price of $5 or $6", k=3)._repr_html_()
    assert "✓" not in text and "A price of $5 or $6" in text


def test_a_result_shows_the_dearest_window_of_every_source(lens: Lens) -> None:
    result = lens.sweep(FACTS[:1], ("subject", "each"), window=1, features=("all", "slow"), progress=False)
    html = result._repr_html_()
    best = result.roles().summary().sort_values("mean").groupby("features").head(1).set_index("features")
    for features in ("all", "slow"):
        row = best.loc[features]
        assert f"<td>{row.window_start}–{row.window_start}</td><td>{row['mean']:+z.1f} %</td>" in html
    assert ".heatmap(fact_id)" in html
