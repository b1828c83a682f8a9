"""Effects on the means of groups: estimates with their errors, a prior learned from all features, and calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pyrocell.infer.decisions import (
    LEAST_PROBABILITY,
    check_targets,
    expected_fdr_calls,
    learned_delta,
    least_effect,
)
from pyrocell.infer.designs import Design, replicate_design
from pyrocell.infer.levels import PRIOR_COUNT, Correction, Levels, Scale, corrected_levels
from pyrocell.infer.moments import StratumMoments
from pyrocell.infer.population_plan import PopulationPlan
from pyrocell.infer.raw_summary import RawSummary
from pyrocell.infer.replicates import replicate_evidence
from pyrocell.infer.scale_sampler import DifferentialOptions
from pyrocell.infer.shrinkage import (
    CountEvidence,
    Evidence,
    NormalEvidence,
    common_centre,
    shrunken_effects,
)

__all__ = ["PopulationData", "population_differential"]

FEWEST_FOR_CENTRE = 50
"""Tested features below which most of them may differ: effects are then taken as they are."""

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class PopulationData:
    """What the engine knows of the cells.

    Parameters
    ----------
    feature_names
        Names of the features.
    plan
        Strata of the comparisons.
    moments
        Sums over the cells of each stratum.
    raw
        Sums of the observed values of both sides of each comparison.
    correct
        ``"ratio"`` for values of at least 0, ``"excess"`` for a part of what is counted, ``"shift"`` for others.
    bound
        Largest value that the quantity can have.
    obs
        Table of the cells, which a formula reads.
    group_key
        Column of the groups.
    """

    feature_names: Sequence[str]
    plan: PopulationPlan
    moments: StratumMoments
    raw: Sequence[tuple[RawSummary, RawSummary]]
    correct: Correction = "ratio"
    bound: float = np.inf
    obs: pd.DataFrame | None = None
    group_key: str = "group"


def population_differential(
    data: PopulationData,
    scale: Scale,
    *,
    delta: float | None = 0.0,
    fdr_target: float = 0.05,
    options: DifferentialOptions | None = None,
) -> pd.DataFrame:
    """Compare the means of groups of cells, feature by feature.

    Parameters
    ----------
    data
        Cells, strata, sums.
    scale
        Log2 ratio or difference.
    delta
        Smallest effect of interest: 0 asks for the sign alone; None learns it from the estimates.
    fdr_target
        Expected proportion of false calls.
    options
        Replicates, design, floor, test, multiplicity, interval.

    Returns
    -------
    DataFrame
        One row for each feature and comparison; the columns are defined in the user guide, "Differential expression".

    Raises
    ------
    QueryError
        See `replicate_design`.
    """
    options = options or DifferentialOptions()
    check_targets(delta, fdr_target)
    parts = [_one(data, index, scale, delta, options) for index in range(len(data.plan.contrasts))]
    columns = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    columns[f"is_de_fdr_{fdr_target}"] = _calls(columns["proba_de"], fdr_target, options) & columns["tested"]
    effect = "lfc_mean" if scale.effect == "log2_ratio" else "effect_mean"
    return _table(data, columns, effect, options.contrast)


def _one(
    data: PopulationData, index: int, scale: Scale, delta: float | None, options: DifferentialOptions
) -> Columns:
    """All columns of one comparison, each of shape ``(n_features,)``."""
    contrast = data.plan.contrasts[index]
    pooled = corrected_levels(data.moments, contrast.sides, by=data.correct, bound=data.bound)
    design = replicate_design(contrast, data.plan, data.obs, options, group_key=data.group_key)
    tested = pooled.total.sum(axis=0) >= options.min_counts if data.correct != "shift" else _varies(pooled)
    if not data.moments.sums[:2].any():
        tested = _varies(pooled)  # a model without a likelihood has no counts to go by
    sign = -1.0 if contrast.flipped else 1.0
    prefix = "lfc" if scale.effect == "log2_ratio" else "effect"
    found = _no_effects(len(tested))
    if tested.any():
        evidence = _evidence(data, pooled, design, scale, tested)
        found = _effects(evidence, tested, sign, _offset(evidence, scale, options), delta, options)
    order = [1, 0] if contrast.flipped else [0, 1]
    sizes = [np.rint(data.moments.n[list(contrast.sides[side])].sum()) for side in order]
    entering = [] if design is None else design.units
    replicates = [len({unit.sample for unit in entering if unit.side == side}) for side in order]
    model, level = scale.of(pooled.model), pooled.level[order]
    apart = {
        f"{prefix}_model": sign * (model[0] - model[1]),
        **_counted_effects(data.raw[index], scale, prefix),
    }
    if options.contrast is not None:  # they are about the groups, and the effect is not
        apart = {name: np.full(len(tested), np.nan) for name in apart}
    decision = {name: found.pop(name) for name in ("proba_de", "lfsr", "delta")}
    return {
        **decision,
        **{f"{prefix}_{name}": values for name, values in found.items()},
        **apart,
        **{f"scale{i + 1}": level[i] for i in (0, 1)},
        **_raw_columns(data.raw[index]),
        "tested": tested,
        **{f"n_cells{i + 1}": np.full(len(tested), int(sizes[i])) for i in (0, 1)},
        **{f"n_replicates{i + 1}": np.full(len(tested), replicates[i]) for i in (0, 1)},
    }


def _varies(levels: Levels) -> np.ndarray:
    return np.asarray((levels.variance > 0).any(axis=0))


# ------------------------------------------------------------------------------------------------ evidence


def _evidence(
    data: PopulationData, pooled: Levels, design: Design | None, scale: Scale, tested: np.ndarray
) -> Evidence:
    """Likelihood of the effect of each tested feature, first side of the contrast against the second."""
    if design is not None:
        sides = np.array([unit.side for unit in design.units])
        levels = corrected_levels(
            data.moments,
            [unit.strata for unit in design.units],
            by=data.correct,
            prior=PRIOR_COUNT / np.bincount(sides)[sides],
            bound=data.bound,
        )
        return replicate_evidence(levels.among(tested), scale, design.matrix, design.contrast)
    levels = pooled.among(tested)
    if scale.is_bare_ratio and data.correct == "ratio":
        counts, exposures = levels.counted / levels.dispersion, levels.exposure / levels.dispersion
        return CountEvidence(counts[0], counts[1], exposures[0], exposures[1])
    value = scale.of(levels.level)
    error = np.sqrt((levels.variance * scale.slope(levels.level) ** 2).sum(axis=0))
    return NormalEvidence(value[0] - value[1], np.maximum(error, 1e-6 * np.median(error) + 1e-100))


def _offset(evidence: Evidence, scale: Scale, options: DifferentialOptions) -> float:
    """Where most features lie, if effects are asked for relative to that."""
    is_share = scale.is_bare_ratio and options.relative_to == "majority"
    if not is_share or len(evidence.centre) < FEWEST_FOR_CENTRE:
        return 0.0
    return common_centre(evidence.centre, evidence.error)


def _effects(
    evidence: Evidence,
    tested: np.ndarray,
    sign: float,
    offset: float,
    delta: float | None,
    options: DifferentialOptions,
) -> Columns:
    """Posterior of the effects, and the decision; features that were not tested have none."""
    evidence = evidence.moved(offset)
    delta = learned_delta(evidence.centre) if delta is None else delta
    mass = 0.9 if options.credible_interval is None else options.credible_interval
    found = shrunken_effects(evidence, delta=delta, mass=mass)
    low, high = (found.low, found.high) if sign > 0 else (-found.high, -found.low)
    up, down = (found.above, found.below) if sign > 0 else (found.below, found.above)
    proba = {"three": np.maximum(up, down), "two": up + down, "one": up}[options.test]
    columns = _no_effects(len(tested))
    for name, values in (
        ("proba_de", proba),
        ("lfsr", found.lfsr),
        ("mean", sign * found.mean),
        ("std", found.std),
        ("low", low),
        ("high", high),
        ("estimate", sign * evidence.centre),
        ("error", evidence.error),
        ("offset", np.full(len(proba), sign * offset)),
    ):
        columns[name][tested] = values + 0.0  # no negative zeros
    columns["delta"][:] = delta
    return columns


def _no_effects(n_features: int) -> Columns:
    """Columns of features of which nothing is said."""
    empty = {
        name: np.full(n_features, np.nan)
        for name in ("mean", "std", "low", "high", "estimate", "error", "offset")
    }
    return {
        "proba_de": np.zeros(n_features),
        "lfsr": np.ones(n_features),
        "delta": np.zeros(n_features),
        **empty,
    }


def _calls(proba: np.ndarray, fdr_target: float, options: DifferentialOptions) -> np.ndarray:
    """Call within each comparison, or over the whole table; nothing that is likelier wrong than right."""
    likely = proba >= LEAST_PROBABILITY
    if options.multiplicity == "table":
        return expected_fdr_calls(proba.ravel(), fdr_target).reshape(proba.shape) & likely
    return np.stack([expected_fdr_calls(row, fdr_target) for row in proba]) & likely


# ------------------------------------------------------------------------------------------------ table


def _counted_effects(raw: tuple[RawSummary, RawSummary], scale: Scale, prefix: str) -> Columns:
    """Effects by the counts alone: of cells scaled to one size each, and of all counts of a group together."""
    if scale.effect == "difference":
        return {f"{prefix}_raw": raw[0].mean - raw[1].mean}
    per_cell = [np.log2(side.normalised_mean + 1e-3) for side in raw]
    pseudobulk = [np.log2(side.total + 0.5) - np.log2(side.total.sum() + 1.0) for side in raw]
    return {
        f"{prefix}_raw": per_cell[0] - per_cell[1],
        f"{prefix}_pseudobulk": pseudobulk[0] - pseudobulk[1],
    }


def _raw_columns(raw: tuple[RawSummary, RawSummary]) -> Columns:
    return {
        f"{name}{which + 1}": quantity[which]
        for name, quantity in (
            ("raw_mean", [side.mean for side in raw]),
            ("non_zeros_proportion", [side.non_zeros_proportion for side in raw]),
            ("raw_normalized_mean", [side.normalised_mean for side in raw]),
        )
        for which in (0, 1)
    }


def _table(data: PopulationData, columns: Columns, effect: str, coefficient: str | None) -> pd.DataFrame:
    """Stack the comparisons, the clearest features of each first; those not tested come last."""
    ends = (columns[effect.replace("mean", name)] for name in ("low", "high"))
    order = np.lexsort([-columns["proba_de"], -least_effect(*ends), ~columns["tested"]], axis=-1)
    n_features = order.shape[1]
    comparisons = [contrast.comparison for contrast in data.plan.contrasts]
    what = "" if coefficient is None else f"{coefficient} among "
    names = {"comparison": [what + one.name for one in comparisons]}
    if any(one.within for one in comparisons):
        names["within"] = [one.within for one in comparisons]
    if coefficient is not None:
        names["contrast"] = [coefficient] * len(comparisons)
    names |= {"group1": [one.group1 for one in comparisons], "group2": [one.group2 for one in comparisons]}
    frame: dict[str, object] = {
        name: np.repeat(np.asarray(values, dtype=object), n_features) for name, values in names.items()
    }
    frame |= {name: np.take_along_axis(table, order, axis=1).ravel() for name, table in columns.items()}
    return pd.DataFrame(frame, index=np.asarray(list(data.feature_names), dtype=object)[order.ravel()])
