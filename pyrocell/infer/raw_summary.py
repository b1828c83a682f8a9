"""Plain averages of the observed counts of sets of cells, summed in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from pyrocell.errors import QueryError
from pyrocell.infer.comparison import Comparison, digest, partition

__all__ = ["RawSummary", "summarise_comparisons", "summarise_counts"]


@dataclass(frozen=True)
class RawSummary:
    """Sums of the observed counts over one set of cells; sets without common cells add up.

    Parameters
    ----------
    n
        Number of cells; where not all features were measured in all cells, that of each feature, shape
        ``(n_features,)``.
    total
        Sum of the counts, shape ``(n_features,)``.
    non_zeros
        Number of cells with a count above zero, shape ``(n_features,)``.
    normalised_total
        Sum of the counts scaled to 10,000 per cell, shape ``(n_features,)``.
    """

    n: int | np.ndarray
    total: np.ndarray
    non_zeros: np.ndarray
    normalised_total: np.ndarray

    @classmethod
    def empty(cls, n_features: int) -> RawSummary:
        """Summary of no cells."""
        return cls(0, *(np.zeros(n_features) for _ in range(3)))

    def __add__(self, other: RawSummary) -> RawSummary:
        return RawSummary(
            self.n + other.n,
            self.total + other.total,
            self.non_zeros + other.non_zeros,
            self.normalised_total + other.normalised_total,
        )

    def __sub__(self, other: RawSummary) -> RawSummary:
        return RawSummary(
            self.n - other.n,
            self.total - other.total,
            self.non_zeros - other.non_zeros,
            self.normalised_total - other.normalised_total,
        )

    @property
    def mean(self) -> np.ndarray:
        """Mean count, shape ``(n_features,)``."""
        return self.total / np.maximum(self.n, 1)

    @property
    def non_zeros_proportion(self) -> np.ndarray:
        """Share of the cells with a count above zero, shape ``(n_features,)``."""
        return self.non_zeros / np.maximum(self.n, 1)

    @property
    def normalised_mean(self) -> np.ndarray:
        """Mean of the counts scaled to 10,000 per cell, shape ``(n_features,)``."""
        return self.normalised_total / np.maximum(self.n, 1)


CountBlock = tuple[np.ndarray, object, "np.ndarray | None"]
"""Positions of the cells ``(B,)``, their counts ``(B, n_features)`` and their library sizes ``(B,)`` or None."""


def summarise_counts(
    blocks: Iterable[CountBlock], group_codes: np.ndarray, *, n_groups: int | None = None
) -> list[RawSummary]:
    """Sum the counts of every group in one pass over the data.

    Parameters
    ----------
    blocks
        Blocks of cells: positions ``(B,)``, counts ``(B, n_features)`` as a numpy array, tensor or scipy sparse matrix,
        and library sizes ``(B,)``. Library None means the row sums; give it when the counts are only some features.
    group_codes
        Group of each cell, shape ``(n_cells,)``; -1 for cells in no group.
    n_groups
        Number of groups; None for the largest code plus one.

    Returns
    -------
    list of RawSummary
        One for each group; the summary of the rest of a group is the sum of all minus the group's.
    """
    n_groups = int(group_codes.max()) + 1 if n_groups is None else n_groups
    sums: list[np.ndarray] | None = None
    sizes = np.zeros(n_groups, dtype=np.int64)
    for rows, counts, library in blocks:
        codes = np.asarray(group_codes)[np.asarray(rows)]
        sizes += np.bincount(codes[codes >= 0], minlength=n_groups)
        part = _block_sums(counts, library, codes, n_groups)
        sums = part if sums is None else [old + new for old, new in zip(sums, part, strict=True)]
    if sums is None:
        raise QueryError("No block of counts was given; expected at least one. Pass the cells of the groups.")
    return [RawSummary(int(sizes[k]), *(table[k] for table in sums)) for k in range(n_groups)]


def _block_sums(
    counts: object, library: np.ndarray | None, codes: np.ndarray, n_groups: int
) -> list[np.ndarray]:
    """Per-group sums of counts, non-zeros and normalised counts of one block, each ``(n_groups, n_features)``."""
    dense_or_sparse: Any = counts if sp.issparse(counts) else np.asarray(counts)
    matrix: Any = sp.csr_matrix(dense_or_sparse, dtype=np.float64)
    size = np.asarray(matrix.sum(axis=1) if library is None else library, dtype=np.float64).reshape(-1)
    kept = np.flatnonzero(codes >= 0)
    shape = (n_groups, matrix.shape[0])
    chooser: Any = sp.csr_matrix((np.ones(len(kept)), (codes[kept], kept)), shape=shape)
    scaler: Any = sp.csr_matrix((1e4 / np.maximum(size[kept], 1e-12), (codes[kept], kept)), shape=shape)
    present = matrix.copy()
    present.data = (matrix.data > 0).astype(np.float64)
    return [product.toarray() for product in (chooser @ matrix, chooser @ present, scaler @ matrix)]


def summarise_comparisons(
    blocks: Iterable[CountBlock], comparisons: Sequence[Comparison]
) -> list[tuple[RawSummary, RawSummary]]:
    """Sum the counts of both sides of every comparison in one pass, whatever cells the sides share.

    Parameters
    ----------
    blocks
        As in :func:`summarise_counts`; cells in no comparison are ignored.
    comparisons
        The comparisons; their cells are cut into disjoint pieces, summed once, and put together.

    Returns
    -------
    list of (RawSummary, RawSummary)
        First and second side of each comparison: the argument ``raw`` of ``differential``.
    """
    parts = partition(rows for comparison in comparisons for rows in (comparison.rows1, comparison.rows2))
    codes = np.full(max(int(piece.max()) for piece in parts.pieces) + 1, -1, dtype=np.int64)
    for index, piece in enumerate(parts.pieces):
        codes[piece] = index
    summaries = summarise_counts(_known_cells(blocks, len(codes)), codes, n_groups=len(parts.pieces))
    return [
        (_union(summaries, parts.made_of, one.rows1), _union(summaries, parts.made_of, one.rows2))
        for one in comparisons
    ]


def _known_cells(blocks: Iterable[CountBlock], n_known: int) -> Iterable[CountBlock]:
    """Drop cells beyond the last one that any comparison uses."""
    for rows, counts, library in blocks:
        keep = np.flatnonzero(np.asarray(rows) < n_known)
        if len(keep) == len(rows):
            yield rows, counts, library
        elif len(keep):
            subset = counts[keep]  # type: ignore[index]
            yield (
                np.asarray(rows)[keep],
                subset,
                None if library is None else np.asarray(library).reshape(-1)[keep],
            )


def _union(summaries: list[RawSummary], made_of: Mapping[bytes, list[int]], rows: np.ndarray) -> RawSummary:
    """Add the summaries of the pieces of one set of cells."""
    pieces = [summaries[index] for index in made_of[digest(rows)]]
    return sum(pieces[1:], pieces[0])
