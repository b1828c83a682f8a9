"""Differential analysis between groups of cells of any positive or bounded quantity that a model can draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from pyrocell.errors import DataError, QueryError, list_some
from pyrocell.infer.comparison import Comparison, compare_groups
from pyrocell.infer.decisions import (
    LEAST_PROBABILITY,
    bayes_factor,
    check_targets,
    expected_fdr_calls,
    least_effect,
)
from pyrocell.infer.draw_plan import Contrast, plan_draws
from pyrocell.infer.draw_pool import DrawPool, Pairs, draw_pool, pair_draws
from pyrocell.infer.effect_statistics import EffectTask, StratumSummary, effect_statistics, superiority
from pyrocell.infer.raw_summary import RawSummary, summarise_comparisons, summarise_counts
from pyrocell.infer.scale_sampler import DifferentialOptions, PopulationDraws, ScaleSampler

__all__ = [
    "Comparison",
    "DifferentialOptions",
    "PopulationDraws",
    "RawSummary",
    "ScaleSampler",
    "compare_groups",
    "differential",
    "joined_tables",
    "summarise_comparisons",
    "summarise_counts",
]

Effect = Literal["log2_ratio", "difference"]
Columns = dict[str, np.ndarray]

HARDLY_OBSERVED = 0.01
"""Counts in a cell, on average, below which a feature cannot be told from one that is absent."""

SMALLEST_PSEUDOCOUNT = 1e-10


def differential(
    sampler: ScaleSampler,
    comparisons: Sequence[Comparison],
    *,
    mode: Literal["change", "vanilla"] = "change",
    effect: Effect = "log2_ratio",
    delta: float | None = 0.25,
    batches: Sequence[Mapping[str, object]] | None = None,
    fdr_target: float = 0.05,
    raw: Sequence[tuple[RawSummary, RawSummary]] | None = None,
    latent_means: np.ndarray | None = None,
    options: DifferentialOptions | None = None,
) -> pd.DataFrame:
    """Compare the posterior of one quantity between sets of cells, feature by feature.

    Parameters
    ----------
    sampler
        Draws of a positive quantity per feature (or of a bounded one, with ``effect="difference"``).
    comparisons
        Pairs of sets of cells, see :func:`compare_groups`. Draws are shared between comparisons that share cells.
    mode
        ``"change"``: the probability that the effect is at least ``delta``; ``"vanilla"``: the probability that a cell
        of one group is higher than a cell of the other.
    effect
        ``"log2_ratio"`` after a pseudocount, or ``"difference"``.
    delta
        Smallest effect of interest in mode ``"change"``; None learns it from the features' mean effects.
    batches
        Substitutions to average over, such as ``[{"batch": "lane1"}, {"batch": "lane2"}]``; draws are compared within
        the same one. None leaves each cell its own.
    fdr_target
        Expected proportion of false calls in the column ``is_de_fdr_<fdr_target>``.
    raw
        Sums of the observed counts of both sides, see :func:`summarise_comparisons`; needed to learn the pseudocount.
    latent_means
        Latent mean of each cell, shape ``(n_cells, n_latent)``; needed to filter outlier cells.
    options
        Finer choices.

    Returns
    -------
    DataFrame
        One row for each feature and comparison, comparisons in the order given, the clearest features first. The
        columns are defined in the user guide, "Differential expression".

    Raises
    ------
    QueryError
        An argument is out of range, or something that a choice needs is missing.
    DataError
        The draws have the wrong shape, or are negative, infinite or not a number.
    """
    options = options or DifferentialOptions()
    _check_choices(mode, effect, delta, fdr_target)
    _check_raw(raw, comparisons, len(sampler.feature_names))
    plan = plan_draws(comparisons, batches=batches, options=options, latent_means=latent_means)
    pool = draw_pool(sampler, plan, options)
    run = _Run(
        sampler.feature_names,
        pool,
        plan.contrasts,
        [pair_draws(pool, contrast, options) for contrast in plan.contrasts],
        StratumSummary.of(pool, sampler.feature_names),
        raw,
        options,
    )
    columns = _MODES[mode](run, effect, delta)
    if mode == "change":
        columns[f"is_de_fdr_{fdr_target}"] = np.stack(
            [expected_fdr_calls(row, fdr_target) for row in columns["proba_de"]]
        )
    return _table(run, columns, sort_by="proba_de" if mode == "change" else "bayes_factor")


@dataclass(frozen=True)
class _Run:
    """The shared draws of one call and what belongs to them: all that a mode needs."""

    feature_names: Sequence[str]
    pool: DrawPool
    contrasts: list[Contrast]
    pairs: list[Pairs]
    summary: StratumSummary
    raw: Sequence[tuple[RawSummary, RawSummary]] | None
    options: DifferentialOptions


# ------------------------------------------------------------------------------------------------ modes


def _vanilla(run: _Run, effect: Effect, delta: float | None) -> Columns:
    """Which group is higher (Lopez et al. 2018)."""
    higher = superiority(run.pool, run.contrasts, run.pairs)
    first, second = higher[:, 0], higher[:, 1]
    return {
        "proba_m1": first,
        "proba_m2": second,
        "bayes_factor": bayes_factor(first, second),
        **_scales(run),
        **_raw_columns(run),
    }


def _change(run: _Run, effect: Effect, delta: float | None) -> Columns:
    """How probable an effect of at least delta is (Boyeau et al. 2019, 2023)."""
    pseudocount = _pseudocount(run) if effect == "log2_ratio" else None
    task = EffectTask(
        run.pool, run.contrasts, run.pairs, run.summary, pseudocount, delta, run.options.credible_interval
    )
    found = effect_statistics(task)
    up, down = found.pop("up"), found.pop("down")
    proba = _TESTS[run.options.test](up, down)
    shape = proba.shape
    return {
        "proba_de": proba,
        "proba_not_de": 1.0 - proba,
        "bayes_factor": bayes_factor(proba, 1.0 - proba),
        **_scales(run),
        **({} if pseudocount is None else {"pseudocounts": np.full(shape, pseudocount)}),
        "delta": np.broadcast_to(found.pop("delta"), shape),
        **{
            f"{measure.prefix}_{name}": found[f"{measure.prefix}_{name}"]
            for measure in task.measures
            for name in ("mean", "median", "std", "min", "max", "hdi_low", "hdi_high")
            if f"{measure.prefix}_{name}" in found
        },
        **_raw_columns(run),
    }


_MODES: dict[str, Callable[[_Run, Effect, float | None], Columns]] = {"change": _change, "vanilla": _vanilla}


_TESTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "three": np.maximum,
    "two": lambda up, down: np.minimum(up + down, 1.0),
    "one": lambda up, down: up,
}


def _scales(run: _Run) -> Columns:
    """Mean quantity on both sides."""
    sides = [contrast.sides() for contrast in run.contrasts]
    return {
        f"scale{which + 1}": np.stack([run.summary.side_mean(pair[which]) for pair in sides])
        for which in (0, 1)
    }


def _raw_columns(run: _Run) -> Columns:
    """Plain averages of the counts on both sides, if the model gave them."""
    if run.raw is None:
        return {}
    quantities: dict[str, Callable[[RawSummary], np.ndarray]] = {
        "raw_mean": lambda side: side.mean,
        "non_zeros_proportion": lambda side: side.non_zeros_proportion,
        "raw_normalized_mean": lambda side: side.normalised_mean,
    }
    return {
        f"{name}{which + 1}": np.stack([quantity(pair[which]) for pair in run.raw])
        for name, quantity in quantities.items()
        for which in (0, 1)
    }


def _pseudocount(run: _Run) -> float:
    """Return the given pseudocount, or the largest that any comparison teaches: one for all comparisons of a call.

    Where all comparisons are between parts of the same cells (each group against the rest), all teach the same.
    """
    lowest = run.summary.low.min(axis=0)
    if (lowest < 0).any():
        names = [name for name, low in zip(run.feature_names, lowest, strict=True) if low < 0]
        raise DataError(
            f"Draws of {len(names)} features are negative: {list_some(names)}; expected positive values for a ratio. "
            'Use effect="difference".'
        )
    if run.options.pseudocount is not None:
        return run.options.pseudocount
    if run.raw is None:
        raise QueryError(
            "The pseudocount cannot be learned because no raw counts were given; expected raw summaries, or a "
            "pseudocount. Pass raw=... or DifferentialOptions(pseudocount=...)."
        )
    return max(
        SMALLEST_PSEUDOCOUNT,
        *(_hardly_observed(run, *pair) for pair in zip(run.contrasts, run.raw, strict=True)),
    )


def _hardly_observed(run: _Run, contrast: Contrast, raw: tuple[RawSummary, RawSummary]) -> float:
    """Return the quantity of a feature that would be counted once in a hundred cells of either side.

    The unit comes from the cells compared: the quantity of all their features for all their counts.
    """
    quantity = sum(
        (side.n * run.summary.side_mean(pair)).sum() for side, pair in zip(raw, contrast.sides(), strict=True)
    )
    counts = sum(float(side.total.sum()) for side in raw)
    return HARDLY_OBSERVED * float(quantity) / counts if counts > 0 else 0.0


# ------------------------------------------------------------------------------------------------ table


def _table(run: _Run, columns: Columns, *, sort_by: str) -> pd.DataFrame:
    """Stack the comparisons, each sorted by the strength of its evidence."""
    effect = next((np.abs(columns[name]) for name in ("lfc_mean", "effect_mean") if name in columns), None)
    keys = [np.zeros_like(columns[sort_by]) if effect is None else -effect, -columns[sort_by]]
    order = np.lexsort(keys, axis=-1)  # ties in the evidence: the larger effect first
    n_features = order.shape[1]
    compared = [contrast.comparison for contrast in run.contrasts]
    within = (("within", "within"),) if any(one.within for one in compared) else ()
    frame: dict[str, object] = {
        name: _repeat([getattr(one, attribute) for one in compared], n_features)
        for name, attribute in (("comparison", "name"), *within, ("group1", "group1"), ("group2", "group2"))
    }
    frame |= {
        name: np.take_along_axis(np.asarray(table), order, axis=1).ravel() for name, table in columns.items()
    }
    frame |= {name: np.repeat(np.asarray(values), n_features) for name, values in _draw_counts(run).items()}
    return pd.DataFrame(frame, index=np.asarray(list(run.feature_names), dtype=object)[order.ravel()])


def joined_tables(
    tables: Mapping[str, pd.DataFrame],
    fdr_target: float,
    *,
    multiplicity: Literal["comparison", "table"] = "comparison",
) -> pd.DataFrame:
    """Put the tables of several kinds of features, of the same comparisons, into one.

    Parameters
    ----------
    tables
        Tables of :func:`differential`, by kind.
    fdr_target
        As in :func:`differential`; false calls are counted over the features of all kinds together.
    multiplicity
        Whether they are counted within each comparison, or over the whole table.

    Returns
    -------
    DataFrame
        A single table as it is; several with the column ``modality``, the clearest features of each comparison first.
    """
    if len(tables) == 1:
        return next(iter(tables.values()))
    table = pd.concat([part.assign(modality=kind) for kind, part in tables.items()])
    strength = _strengths(table)
    rank, _ = pd.factorize(table["comparison"])
    table = table.iloc[np.lexsort(np.stack([*(-values for values in strength), rank]))]
    if "proba_de" in table:
        families = table["comparison"].to_numpy() if multiplicity == "comparison" else np.zeros(len(table))
        called = np.zeros(len(table), dtype=bool)
        for rows in table.reset_index().groupby(families, sort=False).indices.values():
            called[rows] = expected_fdr_calls(table["proba_de"].to_numpy()[rows], fdr_target)
        if "tested" in table:
            called &= (table["tested"] & (table["proba_de"] >= LEAST_PROBABILITY)).to_numpy()
        table = table.assign(**{f"is_de_fdr_{fdr_target}": called})
    return table


def _strengths(table: pd.DataFrame) -> list[np.ndarray]:
    """Return what the rows are sorted by, the most important last."""
    evidence = table["proba_de" if "proba_de" in table else "bayes_factor"].to_numpy()
    effect = next((name for name in ("lfc_mean", "effect_mean") if name in table), None)
    if effect is None:
        return [evidence]
    if "lfsr" not in table:
        return [table[effect].abs().to_numpy(), evidence]
    ends = (table[effect.replace("mean", name)].to_numpy() for name in ("low", "high"))
    return [evidence, least_effect(*ends), table["tested"].to_numpy(float)]


def _repeat(values: list[str], times: int) -> np.ndarray:
    """Repeat each text, as the object column that pandas users expect."""
    return np.repeat(np.asarray(values, dtype=object), times)


def _draw_counts(run: _Run) -> dict[str, list[float] | list[int]]:
    """Effective sample size of both sides and the number of draws behind each comparison."""
    sides = [contrast.sides() for contrast in run.contrasts]
    return {
        "ess1": [run.pool.side_ess(pair[0]) for pair in sides],
        "ess2": [run.pool.side_ess(pair[1]) for pair in sides],
        "n_draws": [
            sum(run.pool.strata[index].size for index in {*pair[0].strata, *pair[1].strata}) for pair in sides
        ],
    }


# ------------------------------------------------------------------------------------------------ checks


def _check_choices(mode: str, effect: str, delta: float | None, fdr_target: float) -> None:
    """Raise on choices that do not exist."""
    if mode not in _MODES:
        raise QueryError(f"mode is {mode!r}; expected one of {list_some(_MODES)}.")
    if effect not in ("log2_ratio", "difference"):
        raise QueryError(f"effect is {effect!r}; expected 'log2_ratio' or 'difference'.")
    check_targets(delta, fdr_target)


def _check_raw(
    raw: Sequence[tuple[RawSummary, RawSummary]] | None, comparisons: Sequence[Comparison], n_features: int
) -> None:
    """Raise unless the raw summaries belong to these comparisons and features."""
    if raw is None:
        return
    if len(raw) != len(comparisons):
        raise QueryError(
            f"raw has {len(raw)} entries for {len(comparisons)} comparisons; expected one pair of summaries for each. "
            "Use summarise_comparisons."
        )
    sizes = {len(side.total) for pair in raw for side in pair}
    if sizes - {n_features}:
        raise QueryError(
            f"raw has summaries of {sorted(sizes)} features; expected {n_features}, as the draws. "
            "Sum the counts of the same features."
        )
