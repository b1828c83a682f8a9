"""Statistics of effects between populations, from shared draws, in blocks of features that fit in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pyrocell.errors import DataError, list_some
from pyrocell.infer.decisions import highest_density_interval, learned_delta
from pyrocell.infer.draw_plan import Contrast, Side
from pyrocell.infer.draw_pool import DrawPool, Pairs

__all__ = ["EffectTask", "StratumSummary", "effect_statistics", "superiority"]

MEDIAN_STRIDE = 5
"""Medians are exact over every so many pairs, or over more where that would leave few."""

FEWEST_MEDIAN_PAIRS = 1000

RAW_SHRINK = 1e-3
"""The second fold change uses so much of the pseudocount."""

Columns = dict[str, np.ndarray]


# ------------------------------------------------------------------------------------------------ strata


@dataclass(frozen=True)
class StratumSummary:
    """Mean, smallest and largest value in each stratum, shape ``(n_strata, n_features)`` each."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, pool: DrawPool, feature_names: Sequence[str]) -> StratumSummary:
        """Summarise all draws once; raise if some are not finite."""
        parts = [pool.values[stratum.start : stratum.stop] for stratum in pool.strata]
        tables = [torch.stack([reduce(part) for part in parts]) for reduce in (_mean, _lowest, _highest)]
        summary = cls(*(_exact(table) for table in tables))
        bad = ~np.isfinite(summary.mean).all(axis=0)
        if bad.any():
            names = [name for name, is_bad in zip(feature_names, bad, strict=True) if is_bad]
            raise DataError(
                f"Posterior draws of {len(names)} features are not finite: {list_some(names)}; expected finite values. "
                "Check that training did not diverge."
            )
        return summary

    def side_mean(self, side: Side) -> np.ndarray:
        """Mean over a mixture of strata, shape ``(n_features,)``."""
        return side.mass @ self.mean[side.strata]


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean(0)


def _lowest(values: torch.Tensor) -> torch.Tensor:
    return values.amin(0)


def _highest(values: torch.Tensor) -> torch.Tensor:
    return values.amax(0)


# ------------------------------------------------------------------------------------------------ effects


@dataclass(frozen=True)
class Measure:
    """How draws of two sides make an effect: the difference of ``values``, or of their log2 after a pseudocount."""

    prefix: str
    pseudocount: float | None

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Put values on the scale on which effects are differences."""
        return values if self.pseudocount is None else (values + self.pseudocount).log2_()


def measures_of(pseudocount: float | None) -> list[Measure]:
    """Return the measures of a run, the tested one first."""
    if pseudocount is None:
        return [Measure("effect", None)]
    return [Measure("lfc", pseudocount), Measure("lfc_raw", RAW_SHRINK * pseudocount)]


@dataclass
class EffectTask:
    """Everything that the statistics of one run need.

    Parameters
    ----------
    pool, contrasts, pairs
        The draws and which of them are compared.
    summary
        Mean, smallest and largest value in each stratum.
    pseudocount
        Of the log2 ratio, or None for a difference.
    delta
        Smallest effect of interest, or None to learn one for each contrast.
    credible_interval
        Mass of the interval, or None.
    """

    pool: DrawPool
    contrasts: list[Contrast]
    pairs: list[Pairs]
    summary: StratumSummary
    pseudocount: float | None
    delta: float | None
    credible_interval: float | None
    measures: list[Measure] = field(init=False)

    def __post_init__(self) -> None:
        self.measures = measures_of(self.pseudocount)

    def blocks(self) -> Iterator[slice]:
        """Ranges of features that are worked on together."""
        width = 512 if self.pool.values.device.type == "cpu" else 4096
        for start in range(0, self.pool.values.shape[1], width):
            yield slice(start, min(start + width, self.pool.values.shape[1]))


def effect_statistics(task: EffectTask) -> Columns:
    """Probabilities and summaries of the effect of every contrast.

    Parameters
    ----------
    task
        Draws, pairs and choices.

    Returns
    -------
    dict of ndarray
        ``up``, ``down`` and ``<prefix>_mean`` and so on, shape ``(n_contrasts, n_features)``; ``delta``, shape
        ``(n_contrasts, 1)``. Positive means higher in group 1.

    Notes
    -----
    Mean, standard deviation, smallest and largest effect are exact over all pairs of draws and come from one pass over
    the draws, whatever the number of contrasts. Probabilities and intervals use the sampled pairs, medians every fifth.
    """
    deltas = _deltas(task)
    n_features = task.pool.values.shape[1]
    columns: Columns = {"delta": np.asarray(deltas)[:, None]}
    for block in task.blocks():
        for name, table in _block_statistics(task, block, deltas).items():
            whole = columns.setdefault(name, np.empty((len(task.contrasts), n_features)))
            whole[:, block] = table
    for index, contrast in enumerate(task.contrasts):
        if contrast.flipped:
            _flip(columns, index, [measure.prefix for measure in task.measures])
    return columns


def _deltas(task: EffectTask) -> list[float]:
    """Thresholds of all contrasts: the given one, or one learned from the mean effects of each."""
    if task.delta is not None:
        return [task.delta] * len(task.contrasts)
    means = np.concatenate(
        [
            _all_pairs(task, *_moments(task, task.measures[0].of(task.pool.values[:, block])))[0]
            for block in task.blocks()
        ],
        axis=1,
    )
    return [learned_delta(row) for row in means]


def _block_statistics(task: EffectTask, block: slice, deltas: list[float]) -> Columns:
    """All columns of one block of features, before contrasts are turned."""
    tables: Columns = {}
    for rank, measure in enumerate(task.measures):
        scaled = measure.of(task.pool.values[:, block])
        tables[f"{measure.prefix}_mean"], tables[f"{measure.prefix}_std"] = _all_pairs(
            task, *_moments(task, scaled)
        )
        tables[f"{measure.prefix}_min"], tables[f"{measure.prefix}_max"] = _extremes(task, measure, block)
        tables[f"{measure.prefix}_median"] = np.stack([_median(scaled, pairs) for pairs in task.pairs])
        if rank == 0:
            counts = [_exceed(scaled, pairs, delta) for pairs, delta in zip(task.pairs, deltas, strict=True)]
            tables["up"], tables["down"] = (np.stack(part) for part in zip(*counts, strict=True))
            tables |= _intervals(task, measure, scaled)
    return tables


def _moments(task: EffectTask, scaled: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance in each stratum, shape ``(n_strata, width)`` each."""
    means, variances = [], []
    for stratum in task.pool.strata:
        part = scaled[stratum.start : stratum.stop]
        mean = part.mean(0)
        means.append(mean)
        # centred first: float32 cannot take E[x^2] - E[x]^2
        variances.append((part - mean).square_().mean(0))
    return _exact(torch.stack(means)), _exact(torch.stack(variances))


def _exact(table: torch.Tensor) -> np.ndarray:
    """Copy to float64, on the CPU first: some devices have no float64."""
    return table.cpu().double().numpy()


def _mix(side: Side, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a mixture of strata."""
    centre = side.mass @ mean[side.strata]
    return centre, side.mass @ (variance[side.strata] + (mean[side.strata] - centre) ** 2)


def _all_pairs(task: EffectTask, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the effect over all pairs of draws, shape ``(n_contrasts, width)`` each."""
    centres, spreads = [], []
    for contrast in task.contrasts:
        within = [(_mix(one, mean, variance), _mix(two, mean, variance)) for one, two in contrast.matched]
        effect = np.stack([one[0] - two[0] for one, two in within])
        spread = np.stack([one[1] + two[1] for one, two in within])
        centres.append(effect.mean(axis=0))
        spreads.append(np.sqrt(spread.mean(axis=0) + effect.var(axis=0)))
    return np.stack(centres), np.stack(spreads)


def _extremes(task: EffectTask, measure: Measure, block: slice) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest effect over all pairs, from the extremes of the strata: the scale is monotone."""
    low = measure.of(torch.from_numpy(task.summary.low[:, block])).numpy()
    high = measure.of(torch.from_numpy(task.summary.high[:, block])).numpy()

    def reach(contrast: Contrast) -> tuple[np.ndarray, np.ndarray]:
        smallest = [
            low[one.strata].min(axis=0) - high[two.strata].max(axis=0) for one, two in contrast.matched
        ]
        largest = [
            high[one.strata].max(axis=0) - low[two.strata].min(axis=0) for one, two in contrast.matched
        ]
        return np.min(smallest, axis=0), np.max(largest, axis=0)

    smallest, largest = zip(*(reach(contrast) for contrast in task.contrasts), strict=True)
    return np.stack(smallest), np.stack(largest)


def _median(scaled: torch.Tensor, pairs: Pairs) -> np.ndarray:
    """Median effect over up to every fifth pair, and over at least a thousand pairs where there are so many."""
    stride = min(MEDIAN_STRIDE, max(1, len(pairs.first) // FEWEST_MEDIAN_PAIRS))
    first, second = pairs.first[::stride], pairs.second[::stride]
    odd = len(first) - 1 + len(first) % 2  # one middle effect: selecting two is many times slower
    effects = scaled.index_select(0, first[:odd]).sub_(scaled.index_select(0, second[:odd]))
    return np.partition(_feature_rows(effects), odd // 2, axis=1)[:, odd // 2].astype(np.float64)


def _feature_rows(effects: torch.Tensor) -> np.ndarray:
    """Turn ``(pairs, features)`` into contiguous ``(features, pairs)``: numpy selects along rows quickly."""
    return effects.T.contiguous().cpu().numpy()


def _intervals(task: EffectTask, measure: Measure, scaled: torch.Tensor) -> Columns:
    """Highest-density interval of the effect over all pairs, if asked for."""
    if task.credible_interval is None:
        return {}
    ends = []
    for pairs in task.pairs:
        effects = scaled.index_select(0, pairs.first).sub_(scaled.index_select(0, pairs.second))
        ends.append(highest_density_interval(_feature_rows(effects), task.credible_interval))
    low, high = (np.stack(part) for part in zip(*ends, strict=True))
    return {f"{measure.prefix}_hdi_low": low, f"{measure.prefix}_hdi_high": high}


def _exceed(scaled: torch.Tensor, pairs: Pairs, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """Share of the pairs with an effect of at least delta, up and down."""
    n_pairs, step = len(pairs.first), 1024 if scaled.device.type == "cpu" else 16384
    counts = scaled.new_zeros((2, scaled.shape[1]))
    for start in range(0, n_pairs, step):
        effects = scaled.index_select(0, pairs.first[start : start + step])
        effects.sub_(scaled.index_select(0, pairs.second[start : start + step]))
        flags = torch.empty_like(effects)  # float flags add up several times faster than booleans
        counts[0] += torch.ge(effects, delta, out=flags).sum(0)
        counts[1] += torch.le(effects, -delta, out=flags).sum(0)
    up, down = _exact(counts) / n_pairs
    return up, down


def _flip(columns: Columns, index: int, prefixes: list[str]) -> None:
    """Turn one contrast round: ups become downs, effects change sign."""
    columns["up"][index], columns["down"][index] = columns["down"][index].copy(), columns["up"][index].copy()
    for prefix in prefixes:
        for name in ("mean", "median"):
            columns[f"{prefix}_{name}"][index] *= -1
        for low, high in (("min", "max"), ("hdi_low", "hdi_high")):
            if f"{prefix}_{low}" in columns:
                lows, highs = columns[f"{prefix}_{low}"], columns[f"{prefix}_{high}"]
                lows[index], highs[index] = -highs[index], -lows[index]


def superiority(pool: DrawPool, contrasts: list[Contrast], pairs: list[Pairs]) -> np.ndarray:
    """Probability that group 1 is higher, a tie counting half.

    Parameters
    ----------
    pool, contrasts, pairs
        The draws and which of them are compared.

    Returns
    -------
    ndarray
        Shape ``(n_contrasts, 2, n_features)``: that group 1 is higher, that group 2 is higher.
    """
    tables = []
    for contrast, chosen in zip(contrasts, pairs, strict=True):
        first, second = _exceed(pool.values, chosen, 0.0)
        ties = first + second - 1.0  # counted by both
        both = np.stack([first - ties / 2, second - ties / 2])
        tables.append(both[::-1] if contrast.flipped else both)
    return np.stack(tables)
