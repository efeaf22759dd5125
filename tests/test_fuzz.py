"""Whatever stands in a file of facts: facts come out, or the project's own error with a sentence."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mambalens import MambalensError, Selection, load_facts

KEYS = st.sampled_from(["prompt", "subject", "target", "relation", "id", "fact_id", "attribute", "relation_id", "target_true",
                        "requested_rewrite", "known_id", "case_id", "", "wording"]) | st.text(max_size=4)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=6
)
NEARLY = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1, max_size=20), "subject": st.text(min_size=1, max_size=6), "target": st.text(min_size=1, max_size=6)},
    optional={"id": LEAVES, "relation": LEAVES, "requested_rewrite": VALUES, "target_true": VALUES, "attribute": VALUES},
)  # fmt: skip
RECORDS = st.lists(NEARLY | st.dictionaries(KEYS, VALUES, max_size=6) | VALUES, max_size=4)
FUZZ = settings(max_examples=350, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path) -> None:
    """Facts, or a sentence about this file."""
    try:
        facts = load_facts(path)
    except MambalensError as error:
        text = str(error)
        assert text.endswith((".", ")")) and len(text) < 2000, text
        return
    assert len(facts) == len(facts.table) > 0
    assert all(fact.prompt and fact.subject and fact.target for fact in facts)
    assert len({fact.id for fact in facts}) == len(facts)
    facts.sample(1), facts.where(relation=["x"])


@FUZZ
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]))
def test_any_bytes(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"facts{suffix}"
    path.write_bytes(content)
    read(path)


@FUZZ
@given(records=RECORDS, lines=st.booleans(), noise=st.text(max_size=5), at=st.integers(0, 300))
def test_any_json(records: list, lines: bool, noise: str, at: int, tmp_path: Path) -> None:
    text = "\n".join(json.dumps(r) for r in records) if lines else json.dumps(records)
    path = tmp_path / ("facts.jsonl" if lines else "facts.json")
    for version in (text, text[:at] + noise + text[at:]):
        path.write_text(version, encoding="utf-8", errors="surrogatepass")
        read(path)


@FUZZ
@given(header=st.lists(KEYS, max_size=5), rows=st.lists(st.lists(st.text(max_size=8), max_size=6), max_size=5))
def test_any_csv(header: list[str], rows: list[list[str]], tmp_path: Path) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["prompt", "subject", "target", *header], *rows])
    path = tmp_path / "facts.csv"
    path.write_text(buffer.getvalue(), encoding="utf-8", errors="replace")
    read(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(NEARLY, min_size=1, max_size=4))
def test_any_parquet(records: list, tmp_path: Path) -> None:
    path = tmp_path / "facts.parquet"
    try:
        pd.DataFrame(records).to_parquet(path)
    except Exception:  # what arrow cannot write nobody can hand over
        return
    read(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.text(max_size=60) | st.lists(st.tuples(*[st.integers(-3, 9)] * 3), max_size=6))
def test_any_selection(content: object, tmp_path: Path) -> None:
    path = tmp_path / "selection.csv"
    lines = content if isinstance(content, str) else "\n".join(",".join(map(str, row)) for row in content)  # type: ignore[attr-defined]
    path.write_text(f"layer,feature,selected\n{lines}", encoding="utf-8", errors="replace")
    try:
        chosen = Selection.load(path)
    except MambalensError as error:
        assert "selection.csv" in str(error)
        return
    assert all(len(mask) for mask in chosen.values())
    if not isinstance(content, str):
        plain = {(layer, feature): selected != 0 for layer, feature, selected in content}  # type: ignore[attr-defined]
        assert plain == {(k, f): on for k, mask in chosen.items() for f, on in enumerate(mask.tolist())}


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(MambalensError, match=r"deep\.json"):
        load_facts(path)
