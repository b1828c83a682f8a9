"""What a model gives to a differential analysis, and the choices of the analysis."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from pyrocell.errors import QueryError

__all__ = [
    "DifferentialOptions",
    "Given",
    "PopulationDraws",
    "ScaleSampler",
    "generator",
    "refuse_options_of_others",
]

Given = Mapping[str, object] | None
"""Decoder inputs to substitute, for example ``{"batch": "lane1"}``; None leaves each cell its own."""


@dataclass(frozen=True)
class PopulationDraws:
    """Draws of one quantity for a list of cells.

    Parameters
    ----------
    values
        One posterior draw of one cell in each row, float32, shape ``(n_rows, n_features)``.
    log_weights
        Unnormalised log importance weight of each draw, shape ``(n_rows,)``, or None.
    """

    values: torch.Tensor
    log_weights: torch.Tensor | None = None


class ScaleSampler(Protocol):
    """What a model provides: draws of one quantity per feature for any list of cells."""

    @property
    def feature_names(self) -> Sequence[str]:
        """Names of the features, in the order of the columns of the draws."""

    def draw(
        self, rows: np.ndarray, *, given: Given, seed: int, weights_from: np.ndarray | None = None
    ) -> PopulationDraws:
        """Draw one posterior sample for each row; repeated rows are independent samples.

        The result depends on the arguments only. ``given`` changes what the decoder sees, never what the encoder
        sees. With ``weights_from``, log weights against that set of cells are returned as well.
        """


@dataclass(frozen=True)
class DifferentialOptions:
    """Finer choices of a differential analysis.

    Replicates (``sample_key``, ``paired``, ``design``, ``contrast``), ``multiplicity``, ``relative_to``,
    ``min_counts`` and ``cells_per_stratum`` are of mode "population". Draws and pairs of them (``n_samples``,
    ``n_pairs``, ``weights``, ``truncate_weights``, ``filter_outlier_cells``, ``batches1``, ``batches2``) are of modes
    "change" and "vanilla". What is compared (``condition``, ``all_pairs``) and the rest are of all. A mode refuses what
    it would not use.

    Parameters
    ----------
    sample_key
        Column of the replicates (donors), which are then what is sampled, in place of cells.
    paired
        Whether each replicate is in both groups; None to see for itself.
    design
        Formula of the means of the replicates, such as ``"~ condition + sex"``; the column of the groups is part of it.
    contrast
        Name of a coefficient of the design to report in place of group 1 against group 2, such as ``"sex[T.M]"``.
    condition
        Column whose groups are compared inside each group of ``groupby``; ``group1`` and ``group2`` are then of it.
    all_pairs
        Compare each pair of groups, in place of each group with the rest.
    multiplicity
        Count false calls within each comparison, or over the whole ``"table"``.
    relative_to
        ``"majority"`` takes off what most features have in common, since shares of a total rise where a few large ones
        fall; ``"total"`` leaves the shares as they are.
    min_counts
        Counts of both groups together below which a feature is not tested.
    cells_per_stratum
        Of larger groups (of one replicate), so many cells chosen at random stand for all.
    n_samples
        Posterior draws on each side. The budget of a run is twice this; comparisons that share cells share it, each
        disjoint piece of cells getting an equal part, of at least 250.
    n_pairs
        At most so many pairs of draws in each comparison; at most four for each draw of the smaller side.
    pseudocount
        Added to both sides before the ratio, or None to learn it from the features that are hardly observed.
    effect
        ``"log2_ratio"`` or ``"difference"`` of the two sides; None for what the verb says of itself.
    test
        ``"three"``: the probability of the likelier of up and down; ``"two"``: the probability of either; ``"one"``: of
        up, that is, higher in the first group.
    weights
        ``"uniform"`` takes the draws as they are; ``"importance"`` corrects them for the error of the guide.
    truncate_weights
        Cap importance weights at their mean times the square root of the number of draws.
    filter_outlier_cells
        Drop the cells of each side that lie outside a robust Gaussian fitted to their latent means.
    credible_interval
        Mass of the interval of the effect, for example 0.95: equal-tailed in mode "population", where None is 0.9; of
        highest density in mode "change", where None is no interval.
    batches1, batches2
        Substitutions to average over on one side only, instead of the ``batches`` of both sides.
    seed
        Seed of cells, draws and pairs.

    Raises
    ------
    QueryError
        A value is out of range.
    """

    sample_key: str | None = None
    paired: bool | None = None
    design: str | None = None
    contrast: str | None = None
    condition: str | None = None
    all_pairs: bool = False
    multiplicity: Literal["comparison", "table"] = "comparison"
    relative_to: Literal["majority", "total"] = "majority"
    min_counts: float = 10.0
    cells_per_stratum: int = 20_000
    n_samples: int = 5000
    n_pairs: int = 10000
    pseudocount: float | None = None
    effect: Literal["log2_ratio", "difference"] | None = None
    test: Literal["three", "two", "one"] = "three"
    weights: Literal["uniform", "importance"] = "uniform"
    truncate_weights: bool = False
    filter_outlier_cells: bool = False
    credible_interval: float | None = None
    batches1: Sequence[Mapping[str, object]] | None = None
    batches2: Sequence[Mapping[str, object]] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        mass = self.credible_interval
        for name, is_fine, expected in (
            ("multiplicity", self.multiplicity in ("comparison", "table"), "'comparison' or 'table'"),
            ("relative_to", self.relative_to in ("majority", "total"), "'majority' or 'total'"),
            ("min_counts", 0 <= self.min_counts < math.inf, "a number of at least 0"),
            ("cells_per_stratum", self.cells_per_stratum >= 2, "an integer of at least 2"),
            ("n_samples", self.n_samples >= 2, "an integer of at least 2"),
            ("n_pairs", self.n_pairs >= 2, "an integer of at least 2"),
            ("pseudocount", _positive(self.pseudocount), "a positive number, or None to learn it"),
            (
                "effect",
                self.effect in ("log2_ratio", "difference", None),
                "'log2_ratio', 'difference' or None",
            ),
            ("test", self.test in ("three", "two", "one"), "'three', 'two' or 'one'"),
            ("weights", self.weights in ("uniform", "importance"), "'uniform' or 'importance'"),
            ("credible_interval", mass is None or 0 < mass < 1, "a mass below 1, such as 0.95, or None"),
            ("batches1", self.batches1 is None or len(self.batches1) > 0, "a list of batches, or None"),
            ("batches2", self.batches2 is None or len(self.batches2) > 0, "a list of batches, or None"),
            ("seed", self.seed >= 0, "an integer of at least 0"),
        ):
            if not is_fine:
                raise QueryError(f"{name} is {getattr(self, name)!r}; expected {expected}. Change {name!r}.")
        for name, needed in (("paired", "sample_key"), ("design", "sample_key"), ("contrast", "design")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise QueryError(f"{name} was given without {needed}; expected both. Give {needed}= too.")
        if self.paired is not None and self.design is not None:
            raise QueryError(
                "Both paired and design were given; expected one. Name the replicates in the design."
            )


_OF_MEANS = (
    "sample_key",
    "paired",
    "design",
    "contrast",
    "multiplicity",
    "relative_to",
    "min_counts",
    "cells_per_stratum",
)
_OF_DRAWS = (
    "n_samples",
    "n_pairs",
    "weights",
    "truncate_weights",
    "filter_outlier_cells",
    "batches1",
    "batches2",
)


def refuse_options_of_others(options: DifferentialOptions, mode: str) -> None:
    """Refuse what a mode would not use, rather than leave it out without a word.

    Parameters
    ----------
    options
        As given.
    mode
        ``"population"``, or one that compares cells with cells.

    Raises
    ------
    QueryError
        An option of another mode differs from its default.
    """
    why, other = (
        ("has no draws of pairs of cells", "mode='change'")
        if mode == "population"
        else ("compares cells with cells", "mode='population'")
    )
    for name in _OF_DRAWS if mode == "population" else _OF_MEANS:
        value, default = getattr(options, name), getattr(DifferentialOptions, name)
        if value != default:
            raise QueryError(
                f"{name}={value!r} was given with mode={mode!r}, which {why}; expected {default!r}. Leave it out, or "
                f"use {other}."
            )


def _positive(value: float | None) -> bool:
    """Whether a number is absent, or positive and finite."""
    return value is None or 0 < value < math.inf


def generator(seed: int, *content: bytes) -> np.random.Generator:
    """Random numbers that depend on the seed and on contents, not on how often or in what order they are asked for."""
    fingerprint = hashlib.blake2b(b"|".join(content), digest_size=16).digest()
    return np.random.default_rng([seed, *np.frombuffer(fingerprint, dtype="<u4").tolist()])
