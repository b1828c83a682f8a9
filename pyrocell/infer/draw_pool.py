"""Posterior draws of populations of cells, their weights, and the pairs that are compared."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from pyrocell.errors import DataError, PyrocellWarning, QueryError
from pyrocell.infer.comparison import digest
from pyrocell.infer.draw_plan import Contrast, DrawPlan, Side, Stratum, given_key
from pyrocell.infer.scale_sampler import DifferentialOptions, PopulationDraws, ScaleSampler, generator

__all__ = ["DrawPool", "Pairs", "draw_pool", "normalised_weights", "pair_draws"]

PAIRS_PER_DRAW = 4
"""Uses of each draw of the smaller side; more pairs of the same draws add time, hardly precision."""

LOW_ESS = 0.1
"""Share of the draws under which an effective sample size is worth a warning."""


@dataclass(frozen=True)
class DrawPool:
    """All the draws of a run.

    Parameters
    ----------
    values
        Shape ``(n_draws, n_features)``, on the device of the sampler.
    rows
        Cell of each draw, shape ``(n_draws,)``.
    strata
        Consecutive ranges of rows.
    ess
        Effective sample size of each stratum, shape ``(n_strata,)``; the number of draws where weights are uniform.
    """

    values: torch.Tensor
    rows: np.ndarray
    strata: list[Stratum]
    ess: np.ndarray

    def side_ess(self, side: Side) -> float:
        """Effective number of equally weighted draws in a mixture of strata."""
        return float(1.0 / np.sum(side.mass**2 / self.ess[side.strata]))


def draw_pool(sampler: ScaleSampler, plan: DrawPlan, options: DifferentialOptions) -> DrawPool:
    """Draw cells first, then one latent for each drawn cell, with one call for each substitution.

    Parameters
    ----------
    sampler
        The model's sampler.
    plan
        What to draw.
    options
        Weights and seed.

    Returns
    -------
    DrawPool
        Draws of equal weight: importance weights have been used up by resampling.
    """
    rows = np.concatenate([_draw_cells(stratum, options.seed) for stratum in plan.strata])
    ess = np.array([stratum.size for stratum in plan.strata], dtype=np.float64)
    values: torch.Tensor | None = None
    for members in _calls(plan.strata, apart=options.weights == "importance"):
        first, last = plan.strata[members[0]], plan.strata[members[-1]]
        draws = _one_call(sampler, rows[first.start : last.stop], first, options)
        if options.weights == "importance":
            chosen, ess[members[0]] = _resample(draws, first, options)
            rows[first.start : first.stop] = rows[first.start : first.stop][chosen]
            draws = PopulationDraws(draws.values[torch.as_tensor(chosen, device=draws.values.device)])
        if draws.values.shape[0] == len(rows):
            return DrawPool(draws.values, rows, plan.strata, ess)
        if values is None:
            values = draws.values.new_empty((len(rows), draws.values.shape[1]))
        values[first.start : last.stop] = draws.values
    assert values is not None
    return DrawPool(values, rows, plan.strata, ess)


def _draw_cells(stratum: Stratum, seed: int) -> np.ndarray:
    """Draw cells with replacement; sorted, because data on disk read faster in order and pairs are shuffled anyway."""
    rng = generator(seed, b"cells", digest(stratum.cells), given_key(stratum.given).encode())
    return np.sort(stratum.cells[rng.integers(len(stratum.cells), size=stratum.size)])


def _calls(strata: list[Stratum], *, apart: bool) -> list[list[int]]:
    """Group consecutive strata that one call can draw: those of one substitution."""
    calls: list[list[int]] = []
    for index, stratum in enumerate(strata):
        if calls and not apart and given_key(stratum.given) == given_key(strata[index - 1].given):
            calls[-1].append(index)
        else:
            calls.append([index])
    return calls


def _one_call(
    sampler: ScaleSampler, rows: np.ndarray, first: Stratum, options: DifferentialOptions
) -> PopulationDraws:
    """Call the sampler and check what comes back."""
    weighted = options.weights == "importance"
    own = [digest(first.cells)] if weighted else []
    rng = generator(options.seed, b"latents", given_key(first.given).encode(), *own)
    draws = sampler.draw(
        rows, given=first.given, seed=int(rng.integers(2**62)), weights_from=first.cells if weighted else None
    )
    expected = (len(rows), len(sampler.feature_names))
    if tuple(draws.values.shape) != expected:
        raise DataError(
            f"The sampler returned draws of shape {tuple(draws.values.shape)}; expected {expected}: one row for each "
            "row asked for, one column for each feature name. Correct the sampler."
        )
    return draws


def _resample(
    draws: PopulationDraws, stratum: Stratum, options: DifferentialOptions
) -> tuple[np.ndarray, float]:
    """Turn importance weights into repeats of draws, and measure how many draws they are worth."""
    if draws.log_weights is None:
        raise QueryError(
            "weights='importance' was asked, but the sampler returned no weights; expected one log weight for each "
            "draw. Use weights='uniform' for this quantity."
        )
    log_weights = draws.log_weights.detach().cpu().double().numpy()
    weights = normalised_weights(log_weights, truncate=options.truncate_weights)
    ess = float(1.0 / np.sum(weights**2))
    if ess < LOW_ESS * stratum.size:
        warnings.warn(
            f"Importance weights of group {stratum.label!r} leave {ess:.1f} effective draws of {stratum.size}; "
            f"expected at least {LOW_ESS:.0%}. Probabilities are unreliable: use weights='uniform', "
            "truncate_weights=True, or train longer.",
            PyrocellWarning,
            stacklevel=4,
        )
    rng = generator(options.seed, b"resample", digest(stratum.cells))
    return rng.choice(len(weights), size=len(weights), p=weights), ess


def normalised_weights(log_weights: np.ndarray, *, truncate: bool) -> np.ndarray:
    """Exponentiate log weights safely, cap them from above if asked, and make them sum to one.

    Parameters
    ----------
    log_weights
        Unnormalised, shape ``(n_draws,)``.
    truncate
        Cap at the mean weight times the square root of the number of draws (Ionides 2008).

    Returns
    -------
    ndarray
        Shape ``(n_draws,)``.
    """
    top = log_weights.max()
    if not np.isfinite(top) or np.isnan(log_weights).any():
        raise DataError(
            "Importance weights are all zero, infinite or not a number; expected finite log weights. "
            "Use weights='uniform', or check that the model has been trained."
        )
    weights = np.exp(log_weights - top)
    if truncate:
        weights = np.minimum(weights, weights.mean() * math.sqrt(len(weights)))
    return weights / weights.sum()


# ------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Pairs:
    """Rows of the pool that are compared with each other, shape ``(n_pairs,)`` each, in the contrast's direction."""

    first: torch.Tensor
    second: torch.Tensor


def pair_draws(pool: DrawPool, contrast: Contrast, options: DifferentialOptions) -> Pairs:
    """Pair the draws of both sides at random, within batches where the contrast says so.

    Every draw of a stratum is used equally often, up to one: the law is that of pairs with replacement, the noise less.

    Parameters
    ----------
    pool
        The draws.
    contrast
        Which strata to pair.
    options
        Number of pairs, seed.

    Returns
    -------
    Pairs
        The same number of pairs in every batch.
    """
    rng = generator(options.seed, b"pairs", contrast.entropy)
    firsts, seconds = [], []
    for one, two in contrast.matched:
        available = min(sum(pool.strata[index].size for index in side.strata) for side in (one, two))
        n_pairs = max(1, min(options.n_pairs // len(contrast.matched), PAIRS_PER_DRAW * available))
        firsts.append(_spread(rng, pool, one, n_pairs))
        seconds.append(rng.permutation(_spread(rng, pool, two, n_pairs)))
    device = pool.values.device
    return Pairs(*(torch.as_tensor(np.concatenate(part), device=device) for part in (firsts, seconds)))


def _spread(rng: np.random.Generator, pool: DrawPool, side: Side, n_pairs: int) -> np.ndarray:
    """Choose rows from the strata of a side by mass, each stratum's rows in turn in random order."""
    edges = np.floor(np.append(0.0, np.cumsum(side.mass)) * n_pairs + rng.random())
    edges[-1] = edges[0] + n_pairs  # the masses sum to one up to rounding
    chosen = []
    for index, count in zip(side.strata, np.diff(edges).astype(np.int64), strict=True):
        stratum = pool.strata[index]
        rounds = [rng.permutation(stratum.size) for _ in range(math.ceil(count / stratum.size))]
        chosen.append(stratum.start + np.concatenate([*rounds, np.empty(0, np.int64)])[:count])
    return np.concatenate(chosen).astype(np.int64)
