"""What is reckoned from tables, against plain loops."""

from __future__ import annotations

import numpy as np
import pandas as pd

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
