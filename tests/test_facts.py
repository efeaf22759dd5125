"""Facts files: what is read, and what a broken one gets said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from mambalens import Fact, Facts, MambalensError, load_facts
from mambalens.data import ATLAS_FACTS
from mambalens.data.wordings import WORDINGS

RECORDS = [
    {"prompt": "The capital of Peru is", "subject": "Peru", "target": "Lima", "relation": "capital", "note": "a"},
    {"prompt": "The capital of Mali is", "subject": "Mali", "target": "Bamako", "relation": "capital", "note": "b"},
]


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"mine{suffix}"
    table = pd.DataFrame(RECORDS)
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n\n")
    elif suffix == ".json":
        path.write_text(json.dumps(RECORDS))
    elif suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_facts(tmp_path: Path, suffix: str) -> None:
    facts = load_facts(write(tmp_path, suffix))
    assert list(facts) == [
        Fact(r["prompt"], r["subject"], r["target"], "capital", str(i)) for i, r in enumerate(RECORDS)
    ]
    assert facts.table.columns.tolist() == ["fact_id", "prompt", "subject", "target", "relation", "note"]
    assert facts.where(note="b")[0].subject == "Mali"
    assert facts[:1].table.note.tolist() == ["a"]


def test_the_known_1000_format_is_read(tmp_path: Path) -> None:
    record = {
        "known_id": 0, "subject": "Vinson Massif", "attribute": "Antarctica", "template": "{} is located in the continent",
        "prediction": " of Antarctica. It", "prompt": "Vinson Massif is located in the continent of", "relation_id": "P30",
    }  # fmt: skip
    path = tmp_path / "known_1000.json"
    path.write_text(json.dumps([record]))
    (fact,) = load_facts(path)
    assert fact == Fact(record["prompt"], "Vinson Massif", "Antarctica", "P30", "0")
    assert fact.continuation == " Antarctica"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", '{"prompt": "p", "subject": "p", "target": "t"}\n{"prompt": \n', r"a\.jsonl, line 2, column \d+: not JSON"),
        ("a.jsonl", '{"prompt": "p", "subject": "p"}\n', r"line 1: the field 'target' is missing"),
        ("a.jsonl", '{"prompt": "p", "subject": " ", "target": "t"}\n', r"line 1: the field 'subject' is empty"),
        ("a.jsonl", "3\n", r"line 1: expected an object .* found 3"),
        ("a.jsonl", "[" * 100_000 + "\n", r"line 1: nested too deeply"),
        ("a.json", '[\n{"prompt": "p",}\n]', r"a\.json, line 2"),
        ("a.json", "{}", "expected a list of objects, found dict"),
        ("a.csv", "prompt,subject,target\np,p\n", r"a\.csv, line 2: fewer fields than the 3 columns"),
        ("a.csv", "prompt,subject,target\np,p,t\np,p,t,u\n", r"a\.csv, line 3: more fields"),
        ("a.jsonl", '{"prompt": "p \\udc00", "subject": "p", "target": "t"}\n', r"line 1: .*udc00' in a text is no character"),
        ("a.csv", "prompt,subject\np,p\n", r"line 2: the field 'target' is missing"),
        ("a.csv", "prompt,subject,target\n", "has no facts in it"),
        ("a.parquet", "nonsense", "not a parquet file"),
        ("a.csv", "id,prompt,subject,target\n1,p,p,t\n1,p,p,t\n", "'1' occurs twice"),
    ],
)  # fmt: skip
def test_a_broken_file_is_quoted_with_its_line(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(MambalensError, match=sentence):
        load_facts(tmp_path / name)


def test_bytes_that_are_no_text_are_found_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,subject,target\np,\xff,t\n")
    with pytest.raises(MambalensError, match="line 2: not UTF-8"):
        load_facts(tmp_path / "a.csv")


def test_unknown_names_get_the_near_matches() -> None:
    with pytest.raises(MambalensError, match="'atals' is no facts file .* did you mean 'atlas'"):
        load_facts("atals")
    with pytest.raises(MambalensError, match="does not exist"):
        load_facts("no/such.csv")
    with pytest.raises(MambalensError, match="no column 'wordign'.*did you mean 'wording'"):
        load_facts("atlas").where(wordign="near")


def test_facts_are_a_sequence_that_keeps_its_columns() -> None:
    facts = load_facts("atlas")
    assert isinstance(facts[3], Fact)
    assert isinstance(facts[:5], Facts)
    assert len(facts[:5]) == 5
    assert facts.where(relation="capital", wording="far").table.wording.eq("far").all()
    assert list(facts.sample(10, seed=1)) == list(facts.sample(10, seed=1))
    assert facts.where(relation=["capital", "symbol"]).table.relation.nunique() == 2


def test_the_atlas_is_what_its_card_says() -> None:
    table = load_facts("atlas").table
    triples = table.fact_id.str.rsplit(":", n=1).str[0]
    assert 1500 <= triples.nunique() <= 2500
    assert len(table) == 2 * triples.nunique()
    assert set(table.relation) == {"capital", "continent", "currency", "language", "country", "symbol"}
    assert set(table.wording) == {"near", "far"}
    assert all(subject in prompt for subject, prompt in zip(table.subject, table.prompt, strict=True))
    assert not any(
        target in prompt for target, prompt in zip(table.target, table.prompt, strict=True) if len(target) > 5
    )
    far = table[table.wording == "far"]
    assert all(prompt.startswith(subject) for subject, prompt in zip(far.subject, far.prompt, strict=True))
    card = (ATLAS_FACTS.parent / "README.md").read_text()
    counts = dict(re.findall(r"^\| (\w+) \| (\d+) \|", card, re.MULTILINE))
    assert {name: int(n) for name, n in counts.items() if name in set(table.relation)} == (
        table[table.wording == "near"].relation.value_counts().to_dict()
    )
    for fact_id, country, capital in (("capital:PE", "Peru", " Lima"), ("capital:KZ", "Kazakhstan", " Astana")):
        row = table[table.fact_id == f"{fact_id}:near"].iloc[0]
        assert (row.subject, row.target) == (country, capital)


def test_far_wordings_keep_the_subject_away_from_the_end() -> None:
    for relation, templates in WORDINGS["far"].items():
        assert all(t.startswith("{subject}, {filler}: ") for t in templates), relation
        assert all(len(t.split(": ")[1].split()) <= 5 for t in templates), relation


def test_a_target_is_joined_with_a_space_where_a_word_follows() -> None:
    assert Fact("The capital of Peru is", "Peru", "Lima").continuation == " Lima"
    assert Fact("The capital of Peru is", "Peru", " Lima").continuation == " Lima"
    assert Fact("The capital of Peru is ", "Peru", "Lima").continuation == "Lima"
    assert Fact("秘鲁的首都是", "秘鲁", "利马").continuation == "利马"


TRACING = {"relation": "The mother tongue of {} is", "relation_prefix": "The mother tongue of", "prompt": "The mother tongue of X is",
           "relation_id": "P103", "target_false": " English", "target_true": " French", "subject": "X"}  # fmt: skip
ROME = {"case_id": 7, "pararel_idx": 1, "requested_rewrite": {
    "prompt": "The mother tongue of {} is", "relation_id": "P103", "subject": "X",
    "target_new": {"str": "English", "id": "Q1860"}, "target_true": {"str": "French", "id": "Q150"}},
    "paraphrase_prompts": ["a"]}  # fmt: skip


def test_counterfact_is_read_in_both_of_its_formats(tmp_path: Path) -> None:
    (tmp_path / "counterfact.json").write_text(json.dumps([ROME]))
    fact = load_facts(tmp_path / "counterfact.json")[0]
    assert fact == Fact("The mother tongue of X is", "X", "French", "P103", "7")
    assert fact.continuation == " French"
    import pandas as pd

    pd.DataFrame([TRACING]).to_parquet(tmp_path / "counterfact.parquet")
    facts = load_facts(tmp_path / "counterfact.parquet")
    assert facts[0] == Fact("The mother tongue of X is", "X", " French", "P103", "0")
    assert facts.table.template[0] == "The mother tongue of {} is" and facts.table.target_false[0] == " English"
    del ROME["requested_rewrite"]["subject"]
    (tmp_path / "broken.json").write_text(json.dumps([ROME]))
    with pytest.raises(MambalensError, match=r"broken\.json, record 1: requested_rewrite lacks 'subject'"):
        load_facts(tmp_path / "broken.json")


def test_a_data_set_is_fetched_once_and_its_digest_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mambalens.facts import fetching

    asked = []

    def fetch(path: Path) -> None:
        asked.append(path)
        path.write_text(json.dumps([{"prompt": "P is", "subject": "P", "target": "q"}]))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fetching.SOURCES, "known_1000", fetching.Source("a copy", "known_1000.json", fetch))
    assert load_facts("known_1000")[0].subject == "P"
    assert len(load_facts("known_1000")) == 1 and len(asked) == 1
    (kept,) = tmp_path.glob("**/known_1000.json")
    kept.write_text("[]")
    with pytest.raises(MambalensError, match="is not what was fetched"):
        load_facts("known_1000")
    monkeypatch.setitem(fetching.SOURCES, "known_1000", fetching.Source("a copy", "other.json", lambda path: 1 / 0))
    with pytest.raises(
        MambalensError, match=r"'known_1000' could not be fetched \(division by zero\): give the path of a copy"
    ):
        load_facts("known_1000")
    assert not list(tmp_path.glob("**/other.json*"))
