"""Which posterior draws a set of comparisons needs, each made once and shared by all that use it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pyrocell.errors import PyrocellWarning, QueryError
from pyrocell.infer.comparison import Comparison, Partition, digest, partition
from pyrocell.infer.scale_sampler import DifferentialOptions, Given

__all__ = ["Contrast", "DrawPlan", "Side", "Stratum", "given_key", "plan_draws"]

FEWEST_DRAWS = 250
"""Draws of one piece of cells when many pieces share the budget."""


@dataclass(frozen=True)
class Stratum:
    """Draws of one piece of cells under one substitution: rows ``start`` to ``stop`` of the pool."""

    cells: np.ndarray
    given: Given
    label: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of draws."""
        return self.stop - self.start


@dataclass(frozen=True)
class Side:
    """A mixture of strata: positions in the plan and their masses, which sum to one."""

    strata: list[int]
    mass: np.ndarray


@dataclass(frozen=True)
class Contrast:
    """A comparison in terms of strata, turned so that swapping the groups gives the same contrast.

    ``matched`` holds the pairs of sides within which draws are paired: one for each batch, or one in all.
    ``flipped`` says that the first side is group 2, so that every effect changes sign in the end.
    """

    comparison: Comparison
    matched: list[tuple[Side, Side]]
    flipped: bool
    entropy: bytes

    def sides(self) -> list[Side]:
        """Both sides over all batches, group 1 first."""
        sides = [
            Side(
                [index for pair in self.matched for index in pair[which].strata],
                np.concatenate([pair[which].mass for pair in self.matched]) / len(self.matched),
            )
            for which in (0, 1)
        ]
        return sides[::-1] if self.flipped else sides


@dataclass(frozen=True)
class DrawPlan:
    """Which draws to make, and which of them each comparison uses."""

    strata: list[Stratum]
    contrasts: list[Contrast]


@dataclass(frozen=True)
class _Group:
    """One side of a comparison before it is planned."""

    name: str
    cells: np.ndarray
    givens: Mapping[str, Given]

    @property
    def key(self) -> bytes:
        return digest(self.cells) + repr(sorted(self.givens)).encode()


def plan_draws(
    comparisons: Sequence[Comparison],
    *,
    batches: Sequence[Mapping[str, object]] | None = None,
    options: DifferentialOptions,
    latent_means: np.ndarray | None = None,
) -> DrawPlan:
    """Decide which draws to make, so that comparisons share all they can.

    Parameters
    ----------
    comparisons
        At least one; the two sides of each must differ in cells or in batches.
    batches
        Substitutions to average over on both sides, or None.
    options
        Numbers of draws, one-sided batches, outlier filter, seed.
    latent_means
        Latent mean of each cell, shape ``(n_cells, n_latent)``, for the outlier filter.

    Returns
    -------
    DrawPlan
        Strata in an order that depends on contents only, never on the order or direction of the comparisons.
    """
    if not comparisons:
        raise QueryError(
            "No comparison was given; expected at least one. Name two groups, or one against the rest."
        )
    groups = [_groups(one, batches, options) for one in comparisons]
    if options.filter_outlier_cells:
        groups = _without_outliers(groups, latent_means)
    parts = _shared_pieces(groups)
    strata, position = _strata(groups, parts, options.n_samples)
    contrasts = [_contrast(one, pair, parts, position) for one, pair in zip(comparisons, groups, strict=True)]
    return DrawPlan(strata, contrasts)


def _groups(
    comparison: Comparison, batches: Sequence[Mapping[str, object]] | None, options: DifferentialOptions
) -> tuple[_Group, _Group]:
    """Both sides of a comparison with their substitutions."""
    if options.weights == "importance" and not (
        batches is None and options.batches1 is options.batches2 is None
    ):
        raise QueryError(
            "weights='importance' was asked together with an average over batches; expected one or the other, because "
            "the weights are defined for each cell's own batch. Drop the batches, or use weights='uniform'."
        )
    sides = (
        _Group(comparison.group1, comparison.rows1, _by_key(options.batches1 or batches)),
        _Group(comparison.group2, comparison.rows2, _by_key(options.batches2 or batches)),
    )
    if sides[0].key == sides[1].key:
        raise QueryError(
            f"Both sides of comparison {comparison.name!r} are the same {len(sides[0].cells)} cells; expected two sets "
            "that differ in cells or in batches. Check the two groups."
        )
    shared = set(sides[0].givens) & set(sides[1].givens)
    if shared and set(sides[0].givens) != set(sides[1].givens):
        warnings.warn(
            f"The batches of the two sides of comparison {comparison.name!r} overlap in part: "
            f"{sorted(sides[0].givens)} against {sorted(sides[1].givens)}. Draws are paired over all batches, so a "
            "difference between batches counts as an effect. Give both sides the same batches.",
            PyrocellWarning,
            stacklevel=4,
        )
    return sides


def _by_key(batches: Sequence[Mapping[str, object]] | None) -> dict[str, Given]:
    """Substitutions by a text that identifies them."""
    if batches is None:
        return {given_key(None): None}
    if len(batches) == 0:
        raise QueryError(
            "batches is an empty list; expected at least one batch, or None for each cell's own."
        )
    return {given_key(one): one for one in batches}


def given_key(given: Given) -> str:
    """Return a text that identifies a substitution."""
    return "" if given is None else repr(sorted((str(name), str(value)) for name, value in given.items()))


def _without_outliers(
    groups: list[tuple[_Group, _Group]], latent_means: np.ndarray | None
) -> list[tuple[_Group, _Group]]:
    """Keep the cells of each side that look like the rest of it; each distinct set is fitted once."""
    if latent_means is None:
        raise QueryError(
            "filter_outlier_cells=True needs latent means, which were not given; expected an array of shape "
            "(n_cells, n_latent). Pass latent_means."
        )
    kept: dict[bytes, np.ndarray] = {}
    for group in (side for pair in groups for side in pair):
        if digest(group.cells) not in kept:
            kept[digest(group.cells)] = _inliers(group, np.asarray(latent_means))
    return [
        (
            _Group(one.name, kept[digest(one.cells)], one.givens),
            _Group(two.name, kept[digest(two.cells)], two.givens),
        )
        for one, two in groups
    ]


def _inliers(group: _Group, latent_means: np.ndarray) -> np.ndarray:
    """Fit a robust Gaussian with a tenth of outliers; keep all cells when it cannot be fitted."""
    from sklearn.covariance import EllipticEnvelope  # slow to import, and only needed here

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a singular covariance is only warned about
            envelope = EllipticEnvelope(contamination=0.1, random_state=0)
            inside = envelope.fit_predict(latent_means[group.cells]) == 1
    except (ValueError, UserWarning) as problem:
        reason = str(problem).rstrip(".")
        warnings.warn(
            f"Outlier cells of group {group.name!r} ({len(group.cells)} cells) could not be found: {reason}. All "
            "its cells are kept. Give more cells, or filter_outlier_cells=False.",
            PyrocellWarning,
            stacklevel=6,
        )
        return group.cells
    return group.cells[inside]


def _shared_pieces(groups: list[tuple[_Group, _Group]]) -> Partition:
    """Cut the sides into disjoint pieces if that saves draws, or leave every side whole.

    Sides that have cells in common stay whole: a draw must not be compared with itself.
    """
    sets = {digest(side.cells): side.cells for pair in groups for side in pair}
    parts = partition(sets.values())
    disjoint = all(
        not set(parts.made_of[digest(one.cells)]) & set(parts.made_of[digest(two.cells)])
        for one, two in groups
    )
    if disjoint and len(parts.pieces) <= len(sets):
        return parts
    keys = sorted(sets)
    return Partition([sets[key] for key in keys], {key: [index] for index, key in enumerate(keys)})


def _strata(
    groups: list[tuple[_Group, _Group]], parts: Partition, n_samples: int
) -> tuple[list[Stratum], dict[tuple[str, int], int]]:
    """List the strata with their number of draws, and the position of each (substitution, piece)."""
    share = min(n_samples, max(2 * n_samples // len(parts.pieces), min(n_samples, FEWEST_DRAWS)))
    wanted: dict[tuple[str, int], tuple[int, Given, str]] = {}
    for side in sorted(
        (side for pair in groups for side in pair), key=lambda side: (-len(side.cells), side.key)
    ):
        n_draws = max(2, math.ceil(share / len(side.givens)))
        for key, given in side.givens.items():
            for piece in parts.made_of[digest(side.cells)]:
                before = wanted.get((key, piece), (0, None, ""))[0]
                # smaller sides come later: a piece carries the name of the smallest group that has it
                wanted[key, piece] = (max(before, n_draws), given, side.name)
    strata: list[Stratum] = []
    position: dict[tuple[str, int], int] = {}
    for key, piece in sorted(wanted):
        n_draws, given, label = wanted[key, piece]
        start = strata[-1].stop if strata else 0
        position[key, piece] = len(strata)
        strata.append(Stratum(parts.pieces[piece], given, label, start, start + n_draws))
    return strata, position


def _contrast(
    comparison: Comparison,
    groups: tuple[_Group, _Group],
    parts: Partition,
    position: Mapping[tuple[str, int], int],
) -> Contrast:
    """Express one comparison in strata, in the direction that the contents of the groups choose."""
    flipped = groups[0].key > groups[1].key
    first, second = groups[::-1] if flipped else groups
    if set(first.givens) == set(second.givens):
        within = [[key] for key in sorted(first.givens)]
        matched = [
            (_side(first, key, parts, position), _side(second, key, parts, position)) for key in within
        ]
    else:
        matched = [
            (
                _side(first, sorted(first.givens), parts, position),
                _side(second, sorted(second.givens), parts, position),
            )
        ]
    return Contrast(comparison, matched, flipped, first.key + second.key)


def _side(group: _Group, keys: list[str], parts: Partition, position: Mapping[tuple[str, int], int]) -> Side:
    """Mix the pieces of a group by their numbers of cells, and substitutions equally."""
    pieces = parts.made_of[digest(group.cells)]
    sizes = np.array([len(parts.pieces[piece]) for piece in pieces], dtype=np.float64)
    return Side(
        [position[key, piece] for key in keys for piece in pieces],
        np.tile(sizes / sizes.sum() / len(keys), len(keys)),
    )
