"""Cells as tensors: minibatches of data seen through a frozen schema."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrocell.data import preflight
from pyrocell.data.base import Field, Reader, named_fields
from pyrocell.data.content import content_hash
from pyrocell.data.schema import Schema
from pyrocell.data.slots import open_slots
from pyrocell.data.turned import as_read
from pyrocell.distributions import NonZeros
from pyrocell.errors import QueryError, list_some

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["Cells", "Dataset", "prototype_cells"]


class Cells:
    """Some cells as tensors: one attribute for each field of the model.

    Parameters
    ----------
    values
        Tensor of each attribute, first dimension n_cells, or the index of its non-zeros, which becomes a dense tensor
        when somebody asks for it; None for a size factor that was left out.
    rows
        Row of each cell in its data set, int64, shape (n_cells,).
    n_total
        Number of cells that these stand for: the size of the plate.

    Attributes
    ----------
    counts : Tensor
        float32, shape (n_cells, n_features), with the index of its non-zeros attached.
    library : Tensor
        Total count of each cell over the model's features, float32, shape (n_cells, 1).
    batch, label : Tensor
        int64, shape (n_cells,).
    size_factor : Tensor or None
        float32, shape (n_cells, 1).
    categorical_covariates : Tensor
        int64, shape (n_cells, n_covariates).
    continuous_covariates : Tensor
        Standardised, float32, shape (n_cells, n_covariates).
    proteins : Tensor
        Counts, 0 where not measured, float32, shape (n_cells, n_proteins).
    proteins_mask : Tensor
        True where measured, bool, shape (n_cells, n_proteins).
    """

    counts: Tensor
    library: Tensor
    batch: Tensor
    label: Tensor
    size_factor: Tensor | None
    categorical_covariates: Tensor
    continuous_covariates: Tensor
    proteins: Tensor
    proteins_mask: Tensor
    rows: Tensor
    n_total: int

    def __init__(self, values: Mapping[str, Tensor | NonZeros | None], rows: Tensor, n_total: int) -> None:
        self._names = list(values)
        self._sparse = {name: value for name, value in values.items() if isinstance(value, NonZeros)}
        self._dense: dict[str, Tensor] = {}
        self.__dict__.update({name: value for name, value in values.items() if name not in self._sparse})
        self.rows, self.n_total = rows, n_total

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_sparse", ()):
            if name not in self._dense:
                self._dense[name] = self._sparse[name].dense()
            return self._dense[name]
        if name.startswith("__"):  # copy and pickle look for methods
            raise AttributeError(name)
        raise AttributeError(
            f"These cells have no {name!r}; they have {', '.join(self.names())}. Declare it as a field of the model."
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        shown = {name: self.as_read(name) for name in (*self._names, "rows", "n_total")}
        shapes = [
            f"{name} {'x'.join(map(str, value.shape))}"
            if isinstance(value, Tensor | NonZeros)
            else f"{name} {value}"
            for name, value in shown.items()
        ]
        return f"Cells({', '.join(shapes)})"

    def load(self) -> Cells:
        """Return the cells themselves: a `Selection` of cells on a device has to be put together first."""
        return self

    def names(self) -> list[str]:
        """Return the names of the attributes that hold data."""
        return list(self._names)

    def as_read(self, name: str) -> Any:
        """Return an attribute without making it dense: the index of its non-zeros, where it was read as such."""
        if name not in self._sparse or name in self.__dict__:
            return getattr(self, name)
        dense = self._dense.get(name)
        if dense is not None and (dense.requires_grad or NonZeros.known(dense) is None):
            return dense  # somebody has written to it, or wants its gradient
        return self._sparse[name]

    def as_input(self, name: str, network: Any) -> Any:
        """Return what a network reads fastest: the index of an attribute's non-zeros where these are few, else all.

        Parameters
        ----------
        name
            Name of the attribute.
        network
            Who reads it; an index only if it has a true attribute ``reads_nonzeros``.
        """
        value = self.as_read(name)
        is_index = isinstance(value, NonZeros) and value.are_few and getattr(network, "reads_nonzeros", False)
        return value if is_index and not torch.is_autocast_enabled("cpu") else getattr(self, name)

    def parts(self) -> tuple[Hashable, list[Tensor]]:
        """Return all tensors, those of indices of non-zeros among them, and what else there is to know: their kind.

        Cells of one kind differ in the values of these tensors, and in the number of non-zeros.
        """
        kind: list[Hashable] = [len(self), self.n_total]
        tensors = [self.rows]
        for name in self._names:
            value = self.as_read(name)
            if isinstance(value, NonZeros):
                kind.append((name, "non-zeros", value.n_columns, value.values.dtype, value.are_few))
                tensors += value.parts()
            elif value is None:
                kind.append((name, None))
            else:
                kind.append((name, *value.shape, value.dtype))
                tensors.append(value)
        return tuple(kind), tensors

    def of_parts(self, tensors: Sequence[Tensor]) -> Cells:
        """Return cells of the same kind that consist of other tensors, given in the order of `parts`."""
        rows, *rest = tensors
        values: dict[str, Tensor | NonZeros | None] = {}
        for name in self._names:
            value = self.as_read(name)
            if isinstance(value, NonZeros):
                own, rest = rest[: len(value.parts())], rest[len(value.parts()) :]
                values[name] = NonZeros.of_parts(own, value.n_columns, are_few=value.are_few)
            else:
                values[name] = None if value is None else rest.pop(0)
        return Cells(values, rows, self.n_total)

    def replace(self, **changes: Any) -> Cells:
        """Return a copy with some attributes changed: what a counterfactual question asks about."""
        unknown = sorted(set(changes) - {*self._names, "rows", "n_total"})
        if unknown:
            raise QueryError(
                f"These cells have no {list_some(unknown)}; they have {', '.join((*self._names, 'rows', 'n_total'))}."
            )
        values = {name: self.as_read(name) for name in self._names} | changes
        rows, n_total = values.pop("rows", self.rows), values.pop("n_total", self.n_total)
        changed = Cells(values, rows, n_total)
        if not self._sparse.keys() & changes.keys():
            changed._dense = self._dense  # whoever needs them first makes them for all
        return changed

    def to(self, device: str | torch.device) -> Cells:
        """Return the cells on a device; counts travel as their non-zeros and become dense there."""
        if torch.device(device) == self.rows.device:
            return self
        values = {name: self.as_read(name) for name in (*self._names, "rows")}
        return self.replace(
            **{name: _moved(value, device) for name, value in values.items() if value is not None}
        )


def _moved(values: Tensor | NonZeros, device: str | torch.device) -> Tensor:
    return _sent(values, device) if isinstance(values, Tensor) else _dense_on(device, values)


def _dense_on(device: str | torch.device, nonzeros: NonZeros) -> Tensor:
    dense = torch.zeros(nonzeros.n_rows, nonzeros.n_columns, dtype=torch.float32, device=device)
    values = nonzeros.values.to(dense.dtype)
    dense.view(-1).scatter_(0, _sent(nonzeros.flat, device), _sent(values, device))
    return dense


def _sent(values: Tensor, device: str | torch.device) -> Tensor:
    """Send values to a device; to CUDA through pinned memory, so that the host need not wait."""
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Dataset:
    """AnnData or MuData seen through a frozen schema: aligned by name, ready for minibatches, never changed.

    Parameters
    ----------
    adata
        Data of the kind that the schema was frozen from. Features may be in another order, and there may be more.
    schema
        What the model knows.
    fields
        The fields of the model, by name.
    check
        Whether to check every count; not needed for the data that the schema was just frozen from.
    setup
        Where the data are, if elsewhere than those that the schema was frozen from: `setup_of` tells.

    Attributes
    ----------
    adata : AnnData or MuData
        The data as given.
    schema : Schema
        As given.
    n_cells : int
        Number of cells; of features, where these are the rows that the model reads.
    obs_names : Index
        Their names.

    Raises
    ------
    DataError
        If features are missing, categories unknown, or values not what they should be; the message names them.
    SetupError
        If a layer or column that the set-up names is not there.
    """

    def __init__(
        self,
        adata: AnnData | MuData,
        schema: Schema,
        fields: Mapping[str, Field],
        *,
        check: bool = True,
        setup: Mapping[str, Any] | None = None,
    ) -> None:
        places = schema.setup if setup is None else setup
        slots = as_read(open_slots(adata, places.get("modalities")), fields)
        preflight.check_row_names(slots)
        self.adata, self.schema = adata, schema
        self.n_cells = slots.n_cells
        self.obs_names: pd.Index = slots.cell_names
        self._slots = slots
        self._readers: list[Reader] = []
        for name, item in named_fields(fields).items():
            record = schema.record(name)
            if check:
                item.check_values(slots.of(name), places, record)
            self._readers.append(item.open(slots.of(name), places, record))

    def __len__(self) -> int:
        return self.n_cells

    @property
    def shared(self) -> frozenset[str]:
        """Attributes of `Cells` that are the same in every minibatch, whichever its rows."""
        likes = [item for record in self.schema.fields.values() for item in record["cells"].items()]
        return frozenset(name for name, like in likes if like is not None and like.get("shared"))

    @property
    def content_hash(self) -> str:
        """SHA-256 of all that the model reads of the data, as they are now; read anew each time."""
        return content_hash(self)

    @property
    def names_now(self) -> pd.Index:
        """Names of the cells as they are now; ``obs_names`` are those when the data were opened."""
        return self._slots.cell_names

    @property
    def obs(self) -> pd.DataFrame:
        """Columns about the rows: ``adata.obs``, or ``mdata.obs`` with the columns that one modality alone has."""
        return self._slots.obs

    def features(self, field: str) -> list[str]:
        """Return the names of all features that the data have for a field, also of those that the model ignores."""
        return [str(name) for name in self._slots.of(field).feature_names]

    def __repr__(self) -> str:
        return f"Dataset of {self.n_cells} cells\n{self.schema}"

    def cells(self, rows: np.ndarray, *, n_total: int | None = None) -> Cells:
        """Return some cells, in the order asked for.

        Parameters
        ----------
        rows
            Whole numbers from 0 to ``n_cells - 1``; they may repeat and need no order.
        n_total
            Number of cells that these stand for; by default all of the data set.

        Raises
        ------
        QueryError
            If a row is not in the data.
        """
        rows = self._checked(rows)
        values: dict[str, Tensor | NonZeros | None] = {}
        for read in self._readers:
            values.update(read(rows))
        return Cells(values, torch.from_numpy(rows), self.n_cells if n_total is None else n_total)

    def minibatches(
        self,
        rows: np.ndarray | None,
        batch_size: int,
        *,
        rng: np.random.Generator | None = None,
        device: str | torch.device = "cpu",
        n_total: int | None = None,
    ) -> Iterator[Cells]:
        """Yield cells in minibatches; the last one may be smaller.

        Parameters
        ----------
        rows
            Rows to go through once; None means all.
        batch_size
            Cells in a minibatch.
        rng
            Generator that shuffles the rows; without one they keep their order.
        device
            Where the tensors are wanted.
        n_total
            Number of cells that all rows stand for; by default their number.
        """
        order = np.arange(self.n_cells) if rows is None else self._checked(rows)
        if batch_size < 1:
            raise QueryError(f"batch_size is {batch_size}; expected at least 1.")
        if rng is not None:
            order = rng.permutation(order)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            yield self.cells(chosen, n_total=len(order) if n_total is None else n_total).to(device)

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        rows = np.asarray(rows)
        if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
            raise QueryError(
                f"Rows have shape {rows.shape} and type {rows.dtype}; expected a list of whole numbers."
            )
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.n_cells):
            wrong = rows[(rows < 0) | (rows >= self.n_cells)]
            raise QueryError(
                f"There are no rows {list_some(wrong.tolist())}: the data have {self.n_cells} cells."
            )
        return rows


def prototype_cells(schema: Schema, n: int = 2) -> Cells:
    """Make up cells of the right shapes, to run a model without data.

    Parameters
    ----------
    schema
        What the model knows.
    n
        Number of cells; no more than the data have, whose parameters may belong to single cells.
    """
    n = min(n, schema.n_cells)
    values: dict[str, Tensor | None] = {}
    for record in schema.fields.values():
        for name, like in record["cells"].items():
            values[name] = None if like is None else _like(like, n)
    return Cells(values, torch.arange(n), schema.n_cells)


def _like(like: Mapping[str, Any], n: int) -> Tensor:
    shape = like["shape"] if like.get("shared") else (n, *like["shape"])
    return torch.full(tuple(shape), like["fill"], dtype=getattr(torch, like["dtype"]))
