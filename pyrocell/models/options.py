"""Constructor arguments that models share: their checks, and what a kind of dispersion means."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, get_args

from torch import Tensor
from torch.nn import functional

from pyrocell.data import Cells
from pyrocell.errors import SetupError

__all__ = ["check_choices", "check_sizes", "of_group"]


def check_choices(options: Mapping[str, Any], choices: Mapping[str, object]) -> None:
    """Refuse a value that is none of those that an option has.

    Parameters
    ----------
    options
        Constructor arguments by name.
    choices
        For each option to look at, a ``Literal`` of its values.

    Raises
    ------
    SetupError
        It names the option, what was given and what there is.
    """
    for name, literal in choices.items():
        if name in options and options[name] not in get_args(literal):
            expected = ", ".join(map(repr, get_args(literal)))
            raise SetupError(f"{name} is {options[name]!r}; expected one of {expected}.")


def check_sizes(options: Mapping[str, Any]) -> None:
    """Refuse impossible sizes of networks (``n_...``; None for a default) and rates of dropout.

    Parameters
    ----------
    options
        Constructor arguments by name.

    Raises
    ------
    SetupError
        It names the option, what was given and what was expected.
    """
    for name, value in options.items():
        if name.startswith("n_") and value is not None:
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if not whole or value < 1:
                raise SetupError(f"{name} is {value!r}; expected a whole number of at least 1.")
        if name == "dropout_rate" and not (isinstance(value, int | float) and 0 <= value < 1):
            raise SetupError(f"{name} is {value!r}; expected a fraction below 1.")


def of_group(table: Tensor, dispersion: str, cells: Cells) -> Tensor:
    """Return the row of each cell's group, or the one row of all.

    Parameters
    ----------
    table
        Shape (n_groups, n_features), or (n_features,).
    dispersion
        Such as ``"gene"``, ``"gene-batch"`` or ``"protein-label"``: what stands behind the hyphen is the field.
    cells
        The cells.
    """
    _, _, group = dispersion.partition("-")
    return functional.embedding(getattr(cells, group), table) if group else table
