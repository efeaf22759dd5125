"""What is reckoned from tables, against plain loops."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mambalens.evaluation import accuracy_of_models
from mambalens.runs.data import dearest_rows


def test_the_dearest_row_is_the_first_with_the_lowest_value_and_never_one_without_a_number() -> None:
    rows = pd.DataFrame(
        {"model": list("bbaabbcc"), "start": [0, 1, 0, 1, 2, 3, 0, 1],
         "mean": [-1.0, -5.0, np.nan, 3.0, -5.0, -2.0, np.nan, np.nan]},
        index=range(10, 18),
    )  # fmt: skip
    found = dearest_rows(rows, ["model"])
    assert found.index.tolist() == [11, 13, 16]
    assert np.isnan(found["mean"].iloc[-1])
    generator = np.random.default_rng(0)
    table = pd.DataFrame({"a": generator.integers(0, 3, 60), "b": generator.integers(0, 3, 60),
                          "cost": generator.normal(size=60)})  # fmt: skip
    for row in dearest_rows(table, ["a", "b"], "cost").itertuples():
        assert row.cost == min(other.cost for other in table.itertuples() if (other.a, other.b) == (row.a, row.b))
    assert not len(dearest_rows(rows[:0], ["model"]))


def test_accuracy_of_models_is_counted_by_relation_over_the_facts_that_can_be_asked() -> None:
    rows = [
        ("y", "1", "capital", True, ""), ("y", "2", "capital", False, ""), ("y", "3", None, True, ""),
        ("y", "4", "odd", False, "why"),
        ("x", "1", "capital", True, ""), ("x", "2", "capital", False, "why"), ("x", "3", None, False, ""),
        ("x", "4", "odd", False, "why"),
    ]  # fmt: skip
    evaluated = pd.DataFrame(rows, columns=["model", "fact_id", "relation", "correct", "skipped"]).assign(
        target_prob=0.5
    )
    table = accuracy_of_models(evaluated)
    assert table.columns.tolist() == ["facts", "x", "y"] and table.columns.name == "model"
    assert table.to_dict("index") == {
        "(none)": {"facts": 1, "x": 0.0, "y": 1.0}, "capital": {"facts": 2, "x": 1.0, "y": 0.5},
        "all": {"facts": 3, "x": 0.5, "y": 2 / 3},
    }  # fmt: skip
