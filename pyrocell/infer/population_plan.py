"""Which cells a comparison of populations needs, cut into strata that all comparisons share, and their replicates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pyrocell.errors import PyrocellWarning, QueryError
from pyrocell.infer.comparison import Comparison, digest, partition
from pyrocell.infer.scale_sampler import generator

__all__ = ["PopulationContrast", "PopulationPlan", "Unit", "plan_population"]


@dataclass(frozen=True)
class Unit:
    """The cells of one replicate on one side of a comparison."""

    sample: str
    side: int
    strata: list[int]


@dataclass(frozen=True)
class PopulationContrast:
    """A comparison in terms of strata, turned so that swapping the groups gives the same contrast.

    Parameters
    ----------
    comparison
        As asked.
    sides
        Strata of both sides; the first is group 2 where ``flipped``.
    units
        Replicates of both sides in order, none without a column of samples.
    flipped
        Whether every effect changes sign in the end.
    """

    comparison: Comparison
    sides: tuple[list[int], list[int]]
    units: list[Unit]
    flipped: bool

    def samples(self, side: int) -> list[str]:
        """Names of the replicates on one side."""
        return [unit.sample for unit in self.units if unit.side == side]

    def group(self, side: int) -> str:
        """Name of the group on one side."""
        return self.comparison.group1 if (side == 0) != self.flipped else self.comparison.group2


@dataclass(frozen=True)
class PopulationPlan:
    """Cells to look at, and what they are looked at for.

    Parameters
    ----------
    rows
        Positions of the cells, in order, shape ``(n_rows,)``.
    codes
        Stratum of each, shape ``(n_rows,)``.
    n_strata
        How many there are.
    weights
        How many cells of its stratum each of these stands for, shape ``(n_strata,)``.
    contrasts
        The comparisons.
    """

    rows: np.ndarray
    codes: np.ndarray
    n_strata: int
    weights: np.ndarray
    contrasts: list[PopulationContrast]


def plan_population(
    comparisons: Sequence[Comparison],
    *,
    samples: pd.Series | None = None,
    cells_per_stratum: int,
    seed: int = 0,
) -> PopulationPlan:
    """Cut the cells of all comparisons into disjoint strata: pieces that sides are made of, by replicate.

    Parameters
    ----------
    comparisons
        At least one.
    samples
        Replicate of each cell, shape ``(n_cells,)``, or None. Cells without one are left out.
    cells_per_stratum
        Of larger strata, so many cells chosen at random stand for all.
    seed
        Of that choice.

    Returns
    -------
    PopulationPlan

    Raises
    ------
    QueryError
        No comparison, sides that share cells, or a side whose cells have no replicate.
    """
    if not comparisons:
        raise QueryError("No comparison was given; expected at least one. Name two groups.")
    for one in comparisons:
        _require_apart(one)
    parts = partition(rows for one in comparisons for rows in (one.rows1, one.rows2))
    names, sample_of = _sample_codes(samples, parts.pieces)
    strata: dict[tuple[int, int], np.ndarray] = {}
    for piece, rows in enumerate(parts.pieces):
        codes = sample_of[rows] if samples is not None else np.zeros(len(rows), np.int64)
        strata |= {(piece, int(code)): rows[codes == code] for code in np.unique(codes[codes >= 0])}
    position = {key: index for index, key in enumerate(strata)}
    chosen = [_some(rows, cells_per_stratum, seed) for rows in strata.values()]
    rows = np.concatenate(chosen)
    codes = np.repeat(np.arange(len(chosen)), [len(part) for part in chosen])
    order = np.argsort(rows, kind="stable")
    contrasts = [_contrast(one, parts.made_of, position, names) for one in comparisons]
    weights = np.array(
        [len(all_rows) / len(part) for all_rows, part in zip(strata.values(), chosen, strict=True)]
    )
    return PopulationPlan(rows[order], codes[order], len(strata), weights, contrasts)


def _require_apart(comparison: Comparison) -> None:
    shared = np.intersect1d(comparison.rows1, comparison.rows2)
    if len(shared):
        raise QueryError(
            f"{len(shared)} cells are on both sides of comparison {comparison.name!r}; expected two sets without cells "
            "in common. Take them out of one, or use mode='change'."
        )


def _sample_codes(samples: pd.Series | None, pieces: Sequence[np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Names of the replicates, and the replicate of each cell, -1 for none."""
    if samples is None:
        return [""], np.zeros(0, dtype=np.int64)
    categories = pd.Categorical(samples.astype(str).where(samples.notna().to_numpy()))
    codes = np.asarray(categories.codes, dtype=np.int64)
    lost = sum(int((codes[rows] < 0).sum()) for rows in pieces)
    if lost:
        warnings.warn(
            f"{lost} of the cells compared have no value in {samples.name!r}; they are left out. Fill the column in to "
            "keep them.",
            PyrocellWarning,
            stacklevel=5,
        )
    return [str(name) for name in categories.categories], codes


def _some(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Choose cells that stand for a large stratum."""
    if len(rows) <= most:
        return rows
    return np.sort(generator(seed, b"stratum", digest(rows)).choice(rows, most, replace=False))


def _contrast(
    comparison: Comparison,
    made_of: dict[bytes, list[int]],
    position: dict[tuple[int, int], int],
    names: list[str],
) -> PopulationContrast:
    """Express one comparison in strata, in the direction that the contents of the groups choose."""
    keys = [digest(comparison.rows1), digest(comparison.rows2)]
    flipped = keys[0] > keys[1]
    units: list[Unit] = []
    for side, key in enumerate(keys[::-1] if flipped else keys):
        pieces = made_of[key]
        for code, name in enumerate(names):
            strata = [position[piece, code] for piece in pieces if (piece, code) in position]
            if strata:
                units.append(Unit(name, side, strata))
    sides = tuple([index for unit in units if unit.side == side for index in unit.strata] for side in (0, 1))
    found = PopulationContrast(comparison, (sides[0], sides[1]), units, flipped)
    for side in (0, 1):
        if not sides[side]:
            raise QueryError(
                f"No cell of group {found.group(side)!r} has a replicate; expected at least one. Fill the column of "
                "replicates in, or leave sample_key out."
            )
    return found if names != [""] else PopulationContrast(comparison, found.sides, [], flipped)
