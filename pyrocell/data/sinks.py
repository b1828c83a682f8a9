"""Where an answer about cells goes, block by block: a new array, one of the user's, a layer or key of the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pyrocell.data.overlap import overlaps_itself, place_of_array
from pyrocell.data.slots import is_mudata
from pyrocell.errors import QueryError, list_some

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["Asked", "GivenArray", "Layer", "NewArray", "Obsm", "Sink", "Where"]

Where = tuple[slice, ...]


@dataclass(frozen=True)
class Asked:
    """What a sink has to know of a question, before any work.

    Parameters
    ----------
    adata
        The data asked about.
    rows
        Cells asked for, shape (n_cells,).
    n_total
        Cells that the data have.
    features
        Names of the features asked for, in the order of the columns of the answer.
    n_draws
        Number of draws that are kept side by side; None for one value, or an average.
    inputs
        Keys of the data that the model reads.
    own
        The model's own data, where others are asked about, too; None for a model that was loaded without.
    """

    adata: AnnData | MuData
    rows: np.ndarray
    n_total: int
    features: Sequence[str]
    n_draws: int | None
    inputs: Collection[str] = ()
    own: AnnData | MuData | None = None


class _Array:
    """An array in memory, or one of the user's, that is being filled."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def write(self, where: Where, values: np.ndarray) -> None:
        self.array[where] = values

    def close(self) -> Any:
        return self.array

    def abandon(self) -> None:
        """Leave it: what has no values yet is NaN, or belongs to nobody."""


class _Kept(_Array):
    """A new array that is put into the data once it is complete."""

    def __init__(self, array: np.ndarray, sink: _OfAnnData, asked: Asked) -> None:
        super().__init__(array)
        self.sink, self.asked = sink, asked
        self.columns: np.ndarray | None = None

    def write(self, where: Where, values: np.ndarray) -> None:
        if self.columns is None:
            super().write(where, values)
        else:
            self.array[where[0], self.columns] = values

    def close(self) -> Any:
        try:
            self.sink.check_free(self.asked)
        except QueryError as error:
            raise QueryError(
                f"{self.sink.key!r} was added to the data while the question was answered; it is left as it is, and "
                f"the answer is not kept. {error}"
            ) from error
        self.sink.slot(self.asked)[self.sink.key] = self.array
        return self.array


class Sink(ABC):
    """A place for the answer to a question, which comes block by block."""

    @abstractmethod
    def check(self, asked: Asked) -> None:
        """Refuse, before any work, what cannot go here; changes nothing."""

    @abstractmethod
    def open(self, asked: Asked, shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
        """Make ready for an answer of this shape, float32, that comes in blocks of at most this shape."""


class NewArray(Sink):
    """The sink of a question without one: a new array."""

    def check(self, asked: Asked) -> None:
        """Refuse nothing."""

    def open(self, asked: Asked, shape: tuple[int, ...], block: tuple[int, ...]) -> _Array:
        """Make the array."""
        return _Array(np.empty(shape, dtype=np.float32))


class GivenArray(Sink):
    """An array of the user's, in memory or mapped from a file.

    Parameters
    ----------
    array
        float32 or float64, apart from the memory of the data. It is filled with NaN first: whatever interrupts us, old
        values do not pass for new ones.
    """

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def check(self, asked: Asked) -> None:
        """Refuse an array that cannot hold the numbers, and one of the data, which filling would destroy."""
        if self.array.dtype.kind != "f" or not np.can_cast(np.float32, self.array.dtype):
            raise QueryError(
                f"The array given as out has type {self.array.dtype}; expected float32 or float64."
            )
        if not self.array.flags.writeable:
            raise QueryError(
                "The array given as out cannot be written to; give one that can (np.memmap with mode='r+' or 'w+')."
            )
        if overlaps_itself(self.array):
            raise QueryError(
                f"Entries of the array given as out, of shape {self.array.shape} and strides {self.array.strides}, lie "
                "at the same place in memory; give one whose entries are apart, such as a copy()."
            )
        for data in (asked.adata, asked.own):
            place = None if data is None else place_of_array(self.array, data)
            if place is not None:
                raise QueryError(
                    f"The array given as out has its memory or its file in common with {place} of the data, which "
                    "would be lost; give an array of its own."
                )

    def open(self, asked: Asked, shape: tuple[int, ...], block: tuple[int, ...]) -> _Array:
        """Refuse another shape, and empty the array."""
        if self.array.shape != shape:
            raise QueryError(f"The array given as out has shape {self.array.shape}; expected {shape}.")
        self.array.fill(np.nan)
        return _Array(self.array)


@dataclass(frozen=True)
class _OfAnnData(Sink):
    """What `Layer` and `Obsm` share: all cells, in memory, put into the data when it is complete."""

    key: str
    overwrite: bool = False

    @abstractmethod
    def slot(self, asked: Asked) -> Any:
        """Return the mapping of the data that the answer goes into."""

    def check(self, asked: Asked) -> None:
        if not self.key or not isinstance(self.key, str):
            raise QueryError(
                f"{self} has no key; expected a text, such as {type(self).__name__}('denoised')."
            )
        if getattr(asked.adata, "is_view", False):
            raise QueryError(
                f"The AnnData is a view of another one, to which {self} cannot be added; copy() it."
            )
        if asked.n_draws is not None:
            raise QueryError(
                f"{self} holds one value for each cell and feature, and {asked.n_draws} draws were asked for; use "
                "return_mean=True, or a path or an array as out."
            )
        if not np.array_equal(asked.rows, np.arange(asked.n_total)):
            raise QueryError(
                f"{self} holds all {asked.n_total} cells in their order, and {len(asked.rows)} were chosen by indices; "
                "leave indices out, ask about adata[indices].copy(), or use a path or an array as out."
            )
        if self.key in asked.inputs:
            raise QueryError(
                f"The model reads {self.key!r}, so {self} would change its data; use another key."
            )
        self.check_free(asked)

    def check_free(self, asked: Asked) -> None:
        """Refuse a key that is taken; asked again at the end, when another may have taken it."""
        if self.key in self.slot(asked) and not self.overwrite:
            raise QueryError(
                f"The data already have {self.key!r} there; use another key, or {type(self).__name__}({self.key!r}, "
                "overwrite=True) to replace it."
            )

    def open(self, asked: Asked, shape: tuple[int, ...], block: tuple[int, ...]) -> _Kept:
        self.check_shape(asked, shape)
        return _Kept(np.empty(shape, dtype=np.float32), self, asked)

    def check_shape(self, asked: Asked, shape: tuple[int, ...]) -> None:
        """Refuse an answer that is no matrix with a row for each cell."""
        if len(shape) != 2 or shape[0] != asked.n_total:
            raise QueryError(
                f"The answer has shape {shape}, which {self} cannot hold: expected one row for each of "
                f"{asked.n_total} cells; use a path or an array as out."
            )


@dataclass(frozen=True)
class Layer(_OfAnnData):
    """Put an answer into ``adata.layers[key]`` of the data asked about: ``out=Layer("denoised")``.

    The layer is added when it is complete; an interruption leaves the data as they were. It is an array in memory, also
    where the data are backed by a file.

    Parameters
    ----------
    key
        Name of the layer.
    overwrite
        Whether a layer of this name may be replaced. One that was added during the question is not, either.

    Notes
    -----
    A layer holds all cells and all features of the data. Questions about some of either (``indices=``, ``gene_list=``,
    a model that reads fewer genes) are refused, and so are several draws of a cell. Features are put into the order of
    ``adata.var_names``.
    """

    def slot(self, asked: Asked) -> Any:
        """Return ``layers``."""
        return asked.adata.layers

    def check(self, asked: Asked) -> None:
        """Refuse other features than those of the data."""
        if is_mudata(asked.adata):
            raise QueryError(
                f"A MuData has no layers, so {self} has no place; use Obsm({self.key!r}), or a path."
            )
        super().check(asked)
        there = {str(name) for name in asked.adata.var_names}
        missing = sorted(there.difference(asked.features))
        foreign = [name for name in asked.features if name not in there]
        if missing or foreign or len(asked.features) != len(there):
            which = (
                f"lacks {list_some(missing)}" if missing else f"has {list_some(foreign or asked.features)}"
            )
            raise QueryError(
                f"{self} holds the {len(there)} features of adata.var_names, each once, and the answer is over "
                f"{len(asked.features)}: it {which}. Use Obsm({self.key!r}), or a path or an array as out."
            )

    def open(self, asked: Asked, shape: tuple[int, ...], block: tuple[int, ...]) -> _Kept:
        """Make room for the layer."""
        kept = super().open(asked, shape, block)
        if shape[1] != len(asked.features):
            raise QueryError(
                f"The answer has {shape[1]} columns, and {self} holds {len(asked.features)} features."
            )
        names = list(asked.adata.var_names)
        if names != list(asked.features):
            where = {name: i for i, name in enumerate(names)}
            kept.columns = np.array([where[name] for name in asked.features])
        return kept


@dataclass(frozen=True)
class Obsm(_OfAnnData):
    """Put an answer into ``adata.obsm[key]`` of the data asked about: ``out=Obsm("X_pyrocell")``.

    It is added when it is complete, as an array in memory without names. All cells must be asked for, and one value of
    each feature; any number of features will do.

    Parameters
    ----------
    key
        Name in ``adata.obsm``, or in ``mdata.obsm`` of a MuData.
    overwrite
        Whether what has this name may be replaced.
    """

    def slot(self, asked: Asked) -> Any:
        """Return ``obsm``."""
        return asked.adata.obsm

    def check_free(self, asked: Asked) -> None:
        """Refuse also the names of modalities, under which a MuData says which cells each of them has."""
        if is_mudata(asked.adata) and self.key in cast("MuData", asked.adata).mod:
            raise QueryError(
                f"{self.key!r} is a modality, and mdata.obsm[{self.key!r}] says which cells it has; use another key."
            )
        super().check_free(asked)
