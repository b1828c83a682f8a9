"""What is compared with what: two sets of cells each, and the disjoint pieces they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pyrocell.errors import QueryError, list_some

__all__ = ["Comparison", "Partition", "compare_groups", "digest", "partition"]

REST = "rest"


@dataclass(frozen=True)
class Comparison:
    """Two named sets of cells; a positive effect means higher in the first one.

    Parameters
    ----------
    name
        Shown in the column ``comparison``.
    group1, group2
        Names of the two sides, shown in the columns of the same names.
    rows1, rows2
        Positions of the cells of each side. Order and repeats do not matter: a side is a set.
    within
        Group that the cells of both sides belong to, if they were chosen inside one.

    Raises
    ------
    QueryError
        A side has no cells, is a boolean mask, or holds negative positions.
    """

    name: str
    group1: str
    group2: str
    rows1: np.ndarray = field(repr=False)
    rows2: np.ndarray = field(repr=False)
    within: str = ""

    def __post_init__(self) -> None:
        for group, attribute in ((self.group1, "rows1"), (self.group2, "rows2")):
            object.__setattr__(self, attribute, _cell_set(getattr(self, attribute), group, self.name))

    def swapped(self) -> Comparison:
        """Return the same question asked the other way round."""
        return Comparison(
            f"{self.group2} vs {self.group1}", self.group2, self.group1, self.rows2, self.rows1, self.within
        )


def _cell_set(rows: np.ndarray, group: str, name: str) -> np.ndarray:
    """Sort a side's positions and drop repeats, after checking them."""
    rows = np.asarray(rows)
    if rows.dtype == bool:
        raise QueryError(
            f"Group {group!r} of comparison {name!r} was given as a boolean mask; expected integer positions. "
            "Use numpy.flatnonzero(mask)."
        )
    if rows.size == 0:
        raise QueryError(
            f"Group {group!r} of comparison {name!r} has no cells; expected at least one. "
            "Check the spelling of the group and the filters that made it."
        )
    if rows.dtype.kind not in "iu" or rows.min() < 0:
        raise QueryError(
            f"Group {group!r} of comparison {name!r} holds {rows.dtype} positions from {rows.min()}; "
            "expected integers of at least 0. Use the positions of the cells in the data."
        )
    return np.unique(rows.astype(np.int64))


def digest(rows: np.ndarray) -> bytes:
    """Fingerprint a set of cells by content, so that seeds do not depend on names or order."""
    return hashlib.blake2b(np.ascontiguousarray(rows, dtype="<i8").tobytes(), digest_size=16).digest()


# ------------------------------------------------------------------------------------------------ from labels


def compare_groups(
    labels: Sequence[object] | np.ndarray | pd.Series | pd.Categorical,
    *,
    group1: object | Sequence[object] | None = None,
    group2: object | None = None,
) -> list[Comparison]:
    """Turn one label per cell into comparisons.

    Parameters
    ----------
    labels
        One label per cell, shape ``(n_cells,)``. Cells whose label is missing belong to no group and not to the rest.
    group1
        One group, a list of groups, or None for every group that has cells.
    group2
        The group to compare with, or None for the rest: all other labelled cells.

    Returns
    -------
    list of Comparison
        One for each group in ``group1``, named ``"<group1> vs <group2>"``.

    Raises
    ------
    QueryError
        A group does not exist or has no cells, or fewer than two groups have cells.
    """
    codes, names = _encode(labels)
    sizes = np.bincount(codes[codes >= 0], minlength=len(names))
    wanted = _wanted(group1, [name for name, size in zip(names, sizes, strict=True) if size], group2)
    for name in [*wanted, *([] if group2 is None else [str(group2)])]:
        _require_group(name, names, sizes)
    return [_one_comparison(codes, names, name, None if group2 is None else str(group2)) for name in wanted]


def _encode(
    labels: Sequence[object] | np.ndarray | pd.Series | pd.Categorical,
) -> tuple[np.ndarray, list[str]]:
    """Integer code of each cell (-1 where the label is missing) and the names of the groups."""
    labels = pd.Categorical(pd.Series(labels))
    return np.asarray(labels.codes, dtype=np.int64), [str(name) for name in labels.categories]


def _wanted(group1: object, present: list[str], group2: object) -> list[str]:
    """Names of the groups to put on the first side."""
    if group1 is None:
        wanted = [name for name in present if group2 is None or name != str(group2)]
        if len(present) < 2:
            raise QueryError(
                f"Only {len(present)} group has cells ({list_some(present)}); expected at least two to compare. "
                "Choose a column with more groups, or give the two sets of cells."
            )
        return wanted
    many = isinstance(group1, (list, tuple, np.ndarray, pd.Index))
    return [str(name) for name in group1] if many else [str(group1)]  # type: ignore[attr-defined]


def _require_group(name: str, names: list[str], sizes: np.ndarray) -> None:
    """Raise unless a group exists and has cells."""
    if name not in names:
        raise QueryError(
            f"Group {name!r} does not exist; expected one of {list_some(names)}. Check the spelling or the column."
        )
    if sizes[names.index(name)] == 0:
        raise QueryError(
            f"Group {name!r} has no cells; expected at least one. Drop it, or use data that contain it."
        )


def _one_comparison(codes: np.ndarray, names: list[str], group1: str, group2: str | None) -> Comparison:
    """One group against another group or against all other labelled cells."""
    rows1 = np.flatnonzero(codes == names.index(group1))
    if group2 is None:
        rows2 = np.flatnonzero((codes >= 0) & (codes != names.index(group1)))
    else:
        rows2 = np.flatnonzero(codes == names.index(group2))
    return Comparison(f"{group1} vs {group2 or REST}", group1, group2 or REST, rows1, rows2)


# ------------------------------------------------------------------------------------------------ shared pieces


@dataclass(frozen=True)
class Partition:
    """Disjoint pieces of cells, and of which pieces each set of cells is made.

    Pieces are ordered by content, so that the order of the comparisons does not matter.
    """

    pieces: list[np.ndarray]
    made_of: dict[bytes, list[int]]
    """Fingerprint of a set of cells -> positions in ``pieces``."""


def partition(sets: Iterable[np.ndarray]) -> Partition:
    """Cut sets of cells into the coarsest disjoint pieces from which each set can be put together.

    For K groups against the rest the pieces are the K groups themselves: the rest of one is the union of the others.
    """
    distinct = {digest(rows): rows for rows in sets}
    # each set has a random-looking 64-bit key; the exclusive or of the keys tells in which sets a cell lies
    signature = np.zeros(max(int(rows[-1]) for rows in distinct.values()) + 1, dtype=np.uint64)
    for key, rows in distinct.items():
        signature[rows] ^= np.frombuffer(key[:8], dtype="<u8")[0]
    members = np.unique(np.concatenate(list(distinct.values())))
    values, codes = np.unique(signature[members], return_inverse=True)
    order = np.argsort(codes, kind="stable")
    pieces = np.split(members[order], np.cumsum(np.bincount(codes))[:-1])
    position = {int(value): index for index, value in enumerate(values)}
    made_of = {
        key: sorted(position[int(value)] for value in np.unique(signature[rows]))
        for key, rows in distinct.items()
    }
    return Partition(pieces, made_of)
