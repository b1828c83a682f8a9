"""Circumstances of a question: cells as they would be, had a field another value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrocell.data import Cells, Schema
from pyrocell.errors import QueryError, list_some

if TYPE_CHECKING:
    from pyrocell.models.core import ModelCore

__all__ = ["as_list", "circumstances_of", "counterfactual"]

Change = Callable[[Cells], Cells]


def counterfactual(model: ModelCore, name: str, value: Any) -> Change:
    """Return the function that sets one field in a block of cells.

    Parameters
    ----------
    model
        The model asked.
    name
        A field (``"batch"``), or a column that the set-up names (``"lane"``, ``"donor"``, ``"age"``).
    value
        A category by name, or a number in the column's own unit.

    Raises
    ------
    QueryError
        If there is no such field or category.
    """
    field, column = _place(model, name)
    code = _code(model.data, field, column, value)

    def change(cells: Cells) -> Cells:
        after = getattr(cells, field).clone()
        (after if column is None else after[:, column]).fill_(code)
        return cells.replace(**{field: after})

    return change


def _place(model: ModelCore, name: str) -> tuple[str, int | None]:
    """Find a field, and the column within it, by the field's name or the column's."""
    schema = model.data
    for field, record in schema.fields.items():
        columns = record["names"] if "levels" in record or "means" in record else []
        if name in columns:
            return field, columns.index(name)
        if (
            record["given"]
            and not columns
            and name in (field, schema.setup.get(model.fields[field].argument))
        ):
            return field, None
    measured = set(model.observed_sites.values())
    settable = [field for field, record in schema.fields.items() if record["given"] and field not in measured]
    raise QueryError(
        f"The model was set up without a field {name!r}, so it cannot be given another value; it has "
        f"{list_some(settable, 20) or 'none'}. Set up the data with it (such as batch_key=) and train again."
    )


def _code(schema: Schema, field: str, column: int | None, value: Any) -> float:
    record = schema.record(field)
    if "means" in record and column is not None:
        return (_number(record["names"][column], value) - record["means"][column]) / record["sds"][column]
    if column is None:
        return (
            schema.code(field, value) if record["cells"][field]["dtype"] == "int64" else _number(field, value)
        )
    levels = record["levels"][column]
    if str(value) not in levels:
        raise QueryError(
            f"{record['names'][column]}={value!r}: the model knows no such category; it knows {levels}."
        )
    return levels.index(str(value))


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise QueryError(f"{name}={value!r} is no number; {name!r} is a continuous covariate.") from None


def circumstances_of(model: ModelCore, given: Mapping[str, Any]) -> Iterator[Change]:
    """Yield one change of the cells for every combination of the values given.

    Parameters
    ----------
    model
        The model asked.
    given
        Value, or list of values, for each field or column to set.
    """
    options = [
        [counterfactual(model, name, value) for value in as_list(name, values)]
        for name, values in given.items()
    ]
    for changes in product(*options):
        yield partial(_apply, changes)


def _apply(changes: Sequence[Change], cells: Cells) -> Cells:
    for change in changes:  # one after the other: two may set columns of the same field
        cells = change(cells)
    return cells


def as_list(name: str, values: Any) -> list[Any]:
    """Return one or several values as a list.

    Parameters
    ----------
    name
        What is given, for the message.
    values
        A value, or several.
    """
    if not isinstance(values, list | tuple | np.ndarray | pd.Index):
        return [values]
    if len(values) == 0:
        raise QueryError(f"given[{name!r}] is an empty list; give at least one value, or leave it out.")
    return list(values)
