"""What a figure is of, where a table may have several of it."""

from __future__ import annotations

import pandas as pd

from mambalens.hooks.errors import MambalensError, choose


def of_one(table: pd.DataFrame, cannot: str, where: str = "the flow", **asked: str | None) -> pd.DataFrame:
    """The rows with one value in each of some columns.

    Args:
        table: rows.
        cannot: what cannot be done with several, for the message.
        where: what the rows are all of, for the message.
        asked: the value by column; None: the only one.

    Raises:
        MambalensError: if a value is not there, or there are several and none was named.
    """
    for name, given in asked.items():
        values = list(table[name].unique())
        if given is not None and given not in values:
            raise MambalensError(f"{name}={given!r} is not in {where}: {choose(given, values)}.")
        if given is None and len(values) > 1:
            raise MambalensError(
                f"{cannot} several values of {name} ({', '.join(values)}): name one, for example {name}={values[0]!r}."
            )
        table = table if given is None else table[table[name] == given]
    return table
