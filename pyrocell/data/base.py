"""What every kind of field has: arguments of the set-up, checks, a record, and a reader of cells."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyrocell.data.slots import Slots
from pyrocell.distributions import NonZeros

__all__ = [
    "NONINTEGER",
    "Argument",
    "Field",
    "Frozen",
    "Reader",
    "Setup",
    "column_reader",
    "named_fields",
    "tensor_like",
]

Reader = Callable[[np.ndarray], Mapping[str, Tensor | NonZeros | None]]
"""Gives, for rows (int64), the attributes of `Cells` that a field provides."""

Setup = Mapping[str, Any]
"""Arguments of ``setup_anndata``, complete with defaults."""


@dataclass(frozen=True)
class Argument:
    """One argument of ``setup_anndata``.

    Parameters
    ----------
    name
        Name of the argument.
    type
        Type, as text for the signature.
    doc
        What a biologist needs to know to fill it in.
    default
        Value when it is left out.
    required
        Whether it must be given.
    """

    name: str
    type: str
    doc: str
    default: Any = None
    required: bool = False


NONINTEGER = Argument(
    "allow_noninteger",
    "bool",
    "Accept counts that are not whole numbers, such as those corrected for ambient RNA. Negative, missing and infinite "
    "values are refused all the same.",
    default=False,
)
"""Argument that every field of counts adds."""


@dataclass(frozen=True)
class Frozen:
    """What a field found in the data.

    Parameters
    ----------
    record
        What the schema keeps, as JSON values: at least ``given`` (whether the user gave the field), ``names`` (of its
        features, categories or columns), and ``cells`` (name of each tensor in `Cells` to its `tensor_like`).
    totals
        Total count of each cell, if the field has counts; NaN where they were not measured; shape (n_cells,).
    measured
        Whether anything was measured in each cell, if cells may lack the field; bool, shape (n_cells,).
    codes, numbers
        Categorical and continuous values of each cell by name of the column, for checks across fields.
    """

    record: dict[str, Any]
    totals: np.ndarray | None = None
    codes: Mapping[str, np.ndarray] = field(default_factory=dict)
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    measured: np.ndarray | None = None


def tensor_like(dtype: str, *shape: int, fill: float = 0, shared: bool = False) -> dict[str, Any]:
    """Describe a tensor of `Cells` in a schema, so that cells can be made up without data.

    Parameters
    ----------
    dtype
        ``"float32"``, ``"int64"``, ``"uint8"`` or ``"bool"``.
    *shape
        Shape for one cell; none for a scalar.
    fill
        A legal value.
    shared
        Whether ``shape`` is the whole of it: one tensor, the same in every minibatch.
    """
    return {"dtype": dtype, "shape": list(shape), "fill": fill, **({"shared": True} if shared else {})}


def column_reader(name: str, values: np.ndarray) -> Reader:
    """Make the reader of a field that holds one row of values per cell in memory.

    Parameters
    ----------
    name
        Attribute of `Cells`.
    values
        Shape (n_cells, ...); read as bool or int64 if they are such, else as float32.
    """
    dtypes = {"b": torch.bool, "i": torch.int64, "u": torch.int64}
    column = torch.tensor(values, dtype=dtypes.get(values.dtype.kind, torch.float32))
    return lambda rows: {name: column.index_select(0, torch.from_numpy(rows))}


def named_fields(fields: Mapping[str, Field]) -> dict[str, Field]:
    """Return the fields, each knowing its name, also when they were not declared in a class."""
    return {name: item if item.name == name else item.renamed(name) for name, item in fields.items()}


class Field(ABC):
    """One kind of data that a model reads of each cell; its name becomes an attribute of `Cells`.

    A new kind of field says which arguments it adds to ``setup_anndata`` (`arguments`), checks them against the data
    (`check_setup`), checks and records what is in the data (`freeze`), and opens data of the same kind for reading
    (`open`).

    Parameters
    ----------
    optional
        Whether the user may leave the field out.
    argument
        Argument of ``setup_anndata`` that says where the data are; by default made from the field's name.
    doc
        What the documentation of ``setup_anndata`` says about the argument; by default made from the field's name.
    """

    is_covariate: ClassVar[bool] = False
    """Whether to warn when the field is confounded with the batch."""
    has_features: ClassVar[bool] = False
    """Whether the field has features of its own, so that it lies in a modality of a MuData."""
    by_feature: ClassVar[bool] = False
    """Whether it says something of each feature: the rows that the model reads are then features, not cells."""
    name: str = ""

    def __init__(
        self, *, optional: bool = False, argument: str | None = None, doc: str | None = None
    ) -> None:
        self.optional = optional
        self.doc = doc
        self._argument = argument

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = self.name or name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def renamed(self, name: str) -> Field:
        """Return a copy with another name."""
        twin = copy.copy(self)
        twin.name = name
        return twin

    @property
    def argument(self) -> str:
        """Argument of ``setup_anndata`` that says where the data are."""
        return self._argument or self.default_argument()

    def default_argument(self) -> str:
        """Return the name of the argument when the model's author gave none."""
        return f"{self.name}_key"

    @abstractmethod
    def arguments(self) -> list[Argument]:
        """Return what the field adds to the signature of ``setup_anndata``."""

    def mudata_arguments(self) -> list[Argument]:
        """Return what the field adds to the signature of ``setup_mudata``; by default the same."""
        return self.arguments()

    @abstractmethod
    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Raise a SetupError if the set-up names something that the data do not have."""

    @abstractmethod
    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check the data (DataError) and return what to record of them."""

    @abstractmethod
    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align data with a frozen record, and return how to read cells from them.

        Parameters
        ----------
        slots
            The data, perhaps other than those that were frozen.
        setup
            Where they are.
        record
            What `freeze` recorded.

        Raises
        ------
        DataError
            If the data do not fit the record.
        """

    def extend(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Frozen:
        """Check a query, and return the record of the reference with what the query adds to it.

        By default it may add nothing. Parameters and errors as for `open`.
        """
        self.check_setup(slots, setup)
        self.check_values(slots, setup, record)
        return Frozen(dict(record))

    def check_values(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> None:
        """Check what is too costly to check in `open`; by default nothing. Parameters as for `open`."""
        return
