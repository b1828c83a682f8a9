"""Differences of abundance between replicates: shares of cell types, and densities at cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pyrocell.errors import QueryError
from pyrocell.infer.decisions import check_targets, expected_fdr_calls
from pyrocell.infer.levels import PRIOR_COUNT, Levels, Scale
from pyrocell.infer.replicates import ReplicateEvidence, linear_evidence, replicate_evidence
from pyrocell.infer.shrinkage import shrunken_effects

__all__ = ["density_effects", "share_effects"]

_LEAST_SHARE = 0.05
"""Variance of log densities within a replicate, over the median variance between replicates, that is taken as given."""


def share_effects(
    counts: np.ndarray,
    names: Sequence[str],
    samples1: Sequence[int],
    samples2: Sequence[int],
    *,
    fdr_target: float = 0.05,
    min_counts: float = 10.0,
) -> pd.DataFrame:
    """Compare the shares of cell types between two sets of samples.

    The number of cells of a type in a sample is Poisson, with the number of all its cells as exposure, and a spread
    between samples that is learned from all types. A prior worth half a cell, at the share of the type in all samples,
    is added to each set.

    Parameters
    ----------
    counts
        Cells of each type in each sample, shape ``(n_samples, n_types)``.
    names
        Names of the types.
    samples1, samples2
        Rows of the two sets, at least two each.
    fdr_target
        Expected proportion of false calls.
    min_counts
        Cells of a type in both sets together below which it is not tested.

    Returns
    -------
    DataFrame
        One row for each type, the surest first: ``proba_da``, ``lfsr``, ``lfc_mean`` (log2 ratio of shares, positive
        where the first set has more) with ``lfc_std``, ``lfc_low`` and ``lfc_high`` (90 %), ``lfc_estimate`` and
        ``lfc_error`` before the prior, mean shares ``share1`` and ``share2``, ``n_cells1``, ``n_cells2``,
        ``n_replicates1``, ``n_replicates2``, ``tested``, and ``is_da_fdr_<fdr_target>``. Effects of types that were
        not tested are missing.

    Raises
    ------
    QueryError
        Fewer than two samples in a set, or one in both.
    """
    check_targets(0.0, fdr_target)
    design = _two_sets(samples1, samples2)
    counts = np.asarray(counts, dtype=np.float64)
    rows = counts[[*samples1, *samples2]]
    sizes = (len(samples1), len(samples2))
    tested = (rows.sum(axis=0) > 0) & (rows.sum(axis=0) >= min_counts)
    found = _effects_of_shares(_share_levels(rows, sizes), design, tested)
    proba = 1.0 - found["lfsr"]
    sides = [rows[: sizes[0]], rows[sizes[0] :]]
    shares = [(side / np.maximum(side.sum(axis=1, keepdims=True), 1)).mean(axis=0) for side in sides]
    table = {
        "proba_da": proba,
        **found,
        **{f"share{i + 1}": shares[i] for i in (0, 1)},
        **{f"n_cells{i + 1}": sides[i].sum(axis=0).astype(int) for i in (0, 1)},
        **{f"n_replicates{i + 1}": np.full(rows.shape[1], sizes[i]) for i in (0, 1)},
        "tested": tested,
        f"is_da_fdr_{fdr_target}": expected_fdr_calls(proba, fdr_target) & tested,
    }
    return pd.DataFrame(table, index=list(names)).sort_values("proba_da", ascending=False, kind="stable")


def _share_levels(rows: np.ndarray, sizes: tuple[int, int]) -> Levels:
    """Shares in each sample, with a prior at the share of the type in all samples, shared by the samples of a set."""
    total = rows.sum(axis=1, keepdims=True)
    usual = np.maximum(rows.sum(axis=0), PRIOR_COUNT) / np.maximum(total.sum(), 1.0)
    prior = PRIOR_COUNT / np.repeat(sizes, sizes)[:, None]
    counted, exposure = rows + prior, total + prior / usual
    share, one = counted / exposure, np.ones_like(rows)
    return Levels(share, share, share**2 / counted, counted, exposure, one, rows)


def _effects_of_shares(levels: Levels, design: np.ndarray, tested: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the effects, missing where a type was not tested."""
    names = ("lfsr", "lfc_mean", "lfc_std", "lfc_low", "lfc_high", "lfc_estimate", "lfc_error")
    columns = {name: np.full(len(tested), 1.0 if name == "lfsr" else np.nan) for name in names}
    if not tested.any():
        return columns
    evidence = replicate_evidence(levels.among(tested), Scale("log2_ratio"), design, np.array([0.0, 1.0]))
    found = shrunken_effects(evidence, delta=0.0, mass=0.9)
    values = (found.lfsr, found.mean, found.std, found.low, found.high, evidence.centre, evidence.error)
    for name, value in zip(names, values, strict=True):
        columns[name][tested] = value
    return columns


def density_effects(
    log_densities: np.ndarray, samples1: Sequence[int], samples2: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare the log densities of two sets of samples at each cell, samples being the replicates.

    The prior is learned from all cells as if they were independent. They are not: what sets the samples apart in one
    place does so at all cells nearby. So ``lfsr`` is about one cell that was chosen beforehand, and ranks cells; it is
    no error rate over cells. Where nothing differs but samples, whole regions may have a small one by chance.

    Parameters
    ----------
    log_densities
        Shape ``(n_cells, n_samples)``, natural log.
    samples1, samples2
        Columns of the two sets, at least two each.

    Returns
    -------
    effect, error, lfsr
        Posterior mean of the difference of mean log densities, standard error before the prior, and local false sign
        rate, shape ``(n_cells,)`` each.

    Raises
    ------
    QueryError
        Fewer than two samples in a set, or one in both.
    """
    design = _two_sets(samples1, samples2)
    response = log_densities[:, [*samples1, *samples2]].T
    rest = response - design @ np.linalg.lstsq(design, response, rcond=None)[0]
    between = (rest**2).sum(axis=0) / (design.shape[0] - 2)
    within = np.full_like(response, max(_LEAST_SHARE * float(np.median(between)), 1e-12))
    evidence: ReplicateEvidence = linear_evidence(response, within, design, np.array([0.0, 1.0]))
    found = shrunken_effects(evidence, delta=0.0, mass=0.9)
    return found.mean, evidence.error, found.lfsr


def _two_sets(samples1: Sequence[int], samples2: Sequence[int]) -> np.ndarray:
    """Design of two sets of samples."""
    if set(samples1) & set(samples2):
        raise QueryError(
            "A sample is in both samples1 and samples2; expected two sets without common samples."
        )
    if min(len(samples1), len(samples2)) < 2:
        raise QueryError(
            f"samples1 has {len(samples1)} samples and samples2 {len(samples2)}; expected two or more in each, since "
            "samples are the replicates. Without them, differences of individuals and of conditions are the same."
        )
    first = np.repeat([1.0, 0.0], [len(samples1), len(samples2)])
    return np.stack([np.ones_like(first), first], axis=1)
