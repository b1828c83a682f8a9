"""What may be wrong with a fit: numbers that are large where it is, a limit to each, and one sentence of advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pyrocell.errors import list_some

__all__ = [
    "Diagnosis",
    "Finding",
    "convergence",
    "explained_shares",
    "fit_of_features",
    "latent_findings",
]

_FEWEST_EPOCHS = 20
_FALLING = 0.02
"""Share of the whole fall of the loss that the last fifth of training may still bring."""
_OUTLYING = 0.1
"""Share of the epochs, those of the highest loss, that the whole fall is told without."""
_DEAD = 0.02
"""A dimension of which less is explained by the cell holds nothing: its posterior is the same for all cells."""
_COLLAPSED, _MANY_DEAD = 1 - _DEAD, 0.5
_MISFIT, _MANY_MISFITS = 0.1, 0.1
_WRONG_BY, _CHANCE = 1.5, 2.58
"""By what factor the cells that show a feature may be too many or too few, and beyond how many standard errors."""
_N_WORST = 10
_FEWEST_CELLS = 50
_STATISTICS = ("mean", "variance", "zero_fraction")


@dataclass(frozen=True)
class Finding:
    """One check of a fit.

    Attributes
    ----------
    check
        Its name.
    value, limit
        What was measured, NaN where that could not be told, and above what it is worth a look.
    measure
        What the value is, in words.
    is_flagged
        Whether it is worth a look.
    advice
        One sentence: what to do, or that there is nothing to do.
    """

    check: str
    value: float
    limit: float
    measure: str
    is_flagged: bool
    advice: str


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Result of ``model.diagnose()``.

    Attributes
    ----------
    table
        One row for each check, by name: ``value``, ``limit``, ``is_flagged``, ``measure`` (what the value is) and
        ``advice`` (one sentence). Larger values are worse; those above the limit are flagged.
    history
        Training loss of each epoch, nats per cell.
    dimensions
        For each dimension of the latent: ``explained``, the share of its variance that lies between cells rather than
        within the posterior of a cell, and ``is_dead``; not a number for fewer than 50 cells. None where the model has
        no latent.
    features
        For each feature, misfits first and then the worst: ``ks_pit``, the distance between what was predicted and
        observed (0 to 1), ``is_misfit``, and ``is_told``, whether enough cells show it to tell; then mean, variance and
        zero fraction, observed and predicted. None without a likelihood.
    """

    table: pd.DataFrame
    history: pd.Series
    dimensions: pd.DataFrame | None = field(default=None)
    features: pd.DataFrame | None = field(default=None)

    @classmethod
    def of(
        cls,
        findings: Sequence[Finding],
        history: pd.Series,
        *,
        dimensions: pd.DataFrame | None,
        features: pd.DataFrame | None,
    ) -> Diagnosis:
        """Put findings in a table; parameters as for the class."""
        columns = ["value", "limit", "is_flagged", "measure", "advice"]
        rows = {finding.check: [getattr(finding, name) for name in columns] for finding in findings}
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        return cls(table.rename_axis("check"), history, dimensions, features)

    @property
    def flagged(self) -> list[str]:
        """Names of the checks that are worth a look."""
        return list(self.table.index[self.table["is_flagged"].astype(bool)])

    @property
    def worst_features(self) -> list[str]:
        """Names of the ten features that are predicted worst."""
        return [] if self.features is None else list(self.features.index[:_N_WORST])

    def __repr__(self) -> str:
        lines = [f"Diagnosis: {len(self.flagged)} of {len(self.table)} checks are worth a look"]
        for check, row in self.table.iterrows():
            mark = "!" if row["is_flagged"] else " "
            lines.append(
                f"{mark} {check}: {row['measure']} is {row['value']:.3g} (limit {row['limit']:.3g})."
            )
            lines.append(f"    {row['advice']}")
        return "\n".join(lines)


def convergence(loss: pd.Series, *, kl_weight: pd.Series | None = None, first_epoch: int = 0) -> Finding:
    """Say whether the loss was still moving when training ended.

    Parameters
    ----------
    loss
        Training loss of each epoch, of all trainings.
    kl_weight
        KL weight of each epoch: those before its last change are not looked at. By default it never changed.
    first_epoch
        At which the last training began; those before are not looked at, but for how far the loss has come down.
    """
    measure = "share of the whole fall of the loss in the last fifth of training"
    values, last = loss.to_numpy(float), loss.to_numpy(float)[first_epoch:]
    if n_bad := int((~np.isfinite(last)).sum()):
        advice = f"The loss is not a number in {n_bad} of {len(last)} epochs; train anew with a lower lr."
        return Finding("convergence", float("nan"), _FALLING, measure, is_flagged=True, advice=advice)
    n_settled = (
        _n_at_the_last_value(kl_weight.to_numpy(float)[first_epoch:]) if kl_weight is not None else len(last)
    )
    if n_settled < _FEWEST_EPOCHS:
        whose = "epochs" if n_settled == len(last) else "epochs after warm-up"
        advice = f"{n_settled} {whose} are too few to tell; train for {_FEWEST_EPOCHS} at least, better the default."
        return Finding("convergence", float("nan"), _FALLING, measure, is_flagged=True, advice=advice)
    end = last[-max(n_settled // 5, 5) :]
    fall, error = _fall(end)
    known = values[np.isfinite(values)]
    # The first epochs can be worse than all others by any amount: where the fall began is told without them.
    whole = np.quantile(known, 1 - _OUTLYING, method="lower") - known.min()
    is_sure = abs(fall) > 3 * error
    share = float(abs(fall) / max(whole, np.finfo(np.float32).tiny)) if is_sure else 0.0
    moving = share > _FALLING
    advice = _advice_on_fall(fall, error, len(end), is_moving=moving)
    return Finding("convergence", share, _FALLING, measure, moving, advice)


def _n_at_the_last_value(values: np.ndarray) -> int:
    """Count the epochs, up to the last, in which a number was what it is in the last."""
    changed = np.flatnonzero(values != values[-1:])
    return len(values) - (int(changed[-1]) + 1 if len(changed) else 0)


def _advice_on_fall(fall: float, error: float, n_epochs: int, *, is_moving: bool) -> str:
    when = f"in the last {n_epochs} epochs"
    if not is_moving:
        bound = 1.05 * max(abs(fall) + 3 * error, 1e-3)  # two digits may round down by a twentieth
        return f"The loss fell by less than {bound:.2g} nats per cell {when}; there is nothing to do."
    if fall > 0:
        how = "call train(n_epochs_kl_warmup=0) to go on, as long as elbo_validation falls too"
        return f"The loss fell by {fall:.3g} nats per cell {when}; {how}."
    return f"The loss rose by {-fall:.3g} nats per cell {when}; train anew with a lower lr."


def _fall(values: np.ndarray) -> tuple[float, float]:
    """Fall along the line through some values, and its standard error."""
    time = np.arange(len(values)) - (len(values) - 1) / 2
    slope = time @ values / (time @ time)
    left = values - values.mean() - slope * time
    error = np.sqrt(left @ left / (len(values) - 2) / (time @ time))
    return -slope * (len(values) - 1), error * (len(values) - 1)


def explained_shares(mean: np.ndarray, variance: np.ndarray, *, n_samples: int | None = None) -> pd.DataFrame:
    """Compare how a latent varies between cells with how uncertain it is in one.

    Parameters
    ----------
    mean, variance
        Of the posterior of each cell, shape (n_cells, n_latent).
    n_samples
        Draws that they were estimated from; None where they are exact.

    Returns
    -------
    DataFrame
        For each dimension ``explained``, from 0 (the posterior is the same in all cells) to 1, and ``is_dead``. Of
        fewer than 50 cells nothing can be told: NaN.
    """
    within = variance.mean(0, dtype=np.float64)
    between = mean.var(0, dtype=np.float64)
    if n_samples is not None:  # the mean of some draws varies more than the mean
        between = np.maximum(between - within / n_samples, 0)
    explained = between / np.maximum(between + within, np.finfo(np.float32).tiny)
    if len(mean) < _FEWEST_CELLS:
        explained = np.full_like(explained, np.nan)
    index = pd.RangeIndex(len(explained), name="dimension")
    return pd.DataFrame({"explained": explained, "is_dead": explained < _DEAD}, index=index)


def latent_findings(dimensions: pd.DataFrame) -> list[Finding]:
    """Say whether the latent tells cells apart at all, and whether it has many more dimensions than it uses.

    Parameters
    ----------
    dimensions
        Result of `explained_shares`.
    """
    measure, share = "unexplained share of the variance of the best dimension", "share of dead dimensions"
    if dimensions["explained"].isna().all():
        why = f"There are fewer than {_FEWEST_CELLS} cells, too few to tell; give more."
        checks = {"posterior collapse": (_COLLAPSED, measure), "dead dimensions": (_MANY_DEAD, share)}
        return [
            Finding(name, float("nan"), *told, is_flagged=False, advice=why) for name, told in checks.items()
        ]
    best = 1 - float(dimensions["explained"].max())
    n_dead, n_latent = int(dimensions["is_dead"].sum()), len(dimensions)
    collapsed, many = best > _COLLAPSED, n_dead / n_latent > _MANY_DEAD
    useful = n_latent - n_dead
    collapse = (
        "The latent is the same for all cells; train for longer, or with a lower KL weight "
        "(TrainingPlan(max_kl_weight=0.1))."
        if collapsed
        else "The latent tells cells apart; there is nothing to do."
    )
    dead = (
        f"Only {useful} of {n_latent} dimensions hold anything; n_latent={max(useful, 1)} would do as well, and "
        "distances between cells would be less noisy."
        if many
        else f"{useful} of {n_latent} dimensions are in use; there is nothing to do."
    )
    return [
        Finding("posterior collapse", best, _COLLAPSED, measure, collapsed, collapse),
        Finding("dead dimensions", n_dead / n_latent, _MANY_DEAD, share, many, dead),
    ]


def fit_of_features(features: pd.DataFrame, n_cells: int) -> tuple[pd.DataFrame, Finding]:
    """Rank features by how badly they are predicted.

    Parameters
    ----------
    features
        ``PredictiveCheck.features``.
    n_cells
        Number of cells that were predicted.

    Returns
    -------
    DataFrame, Finding
        The features, worst first, and what they say together.
    """
    # The distance that one in a hundred calibrated features exceeds by chance, on top of what is tolerated.
    limit = _MISFIT + 1.63 / np.sqrt(n_cells)
    wrongly_seen, is_told = _cells_that_show(features, n_cells)
    misfit = is_told & ((features["ks_pit"] > limit) | wrongly_seen)
    columns = [f"{side}_{what}" for what in _STATISTICS for side in ("observed", "predicted")]
    ranked = features[["ks_pit", *columns]].copy()
    ranked.insert(1, "is_misfit", misfit)
    ranked.insert(2, "is_told", is_told)
    ranked = ranked.sort_values(["is_misfit", "ks_pit"], ascending=False, kind="stable", na_position="last")
    n_told = int(is_told.sum())
    share = float(misfit.sum() / n_told) if n_told else float("nan")
    is_flagged, measure = share > _MANY_MISFITS, "share of features that are badly predicted"
    advice = _advice_on_features(ranked, is_flagged=is_flagged)
    return ranked, Finding("predictive fit", share, _MANY_MISFITS, measure, is_flagged, advice)


def _cells_that_show(features: pd.DataFrame, n_cells: int) -> tuple[pd.Series, pd.Series]:
    """Say of which features too many or too few cells are not zero, and of which that could be told.

    The distance of predictions cannot exceed the share of cells that show a feature, so that it is blind to rare ones.
    The number of such cells is at most as uncertain as a Poisson number, whose root (3/8 added) has standard error 1/2.
    """
    observed, predicted = (
        n_cells * (1 - features[f"{side}_zero_fraction"]) for side in ("observed", "predicted")
    )

    def above(more: pd.Series, fewer: pd.Series) -> pd.Series:
        root = np.sqrt(more + 0.375) - np.sqrt(fewer + 0.375)
        return 2 * root > _CHANCE

    wrong = above(observed, predicted * _WRONG_BY) | above(predicted / _WRONG_BY, observed)
    # Would one have been told that is predicted nowhere, or seen nowhere?
    could = above(observed, 0 * observed) | above(predicted / _WRONG_BY, 0 * predicted)
    return wrong, could & features["ks_pit"].notna() & (n_cells >= _FEWEST_CELLS)


def _advice_on_features(ranked: pd.DataFrame, *, is_flagged: bool) -> str:
    n_rare = int((~ranked["is_told"] & ranked["ks_pit"].notna()).sum())
    rare = f"; too few cells show {n_rare} of the {len(ranked)} features to tell." if n_rare else "."
    if not ranked["is_told"].any():
        return "Too few cells show any feature to tell; give more cells."
    worst = list_some(ranked.index[:_N_WORST], limit=_N_WORST)
    if is_flagged:
        remedy = "look at them in Diagnosis.features, and try another likelihood or dispersion"
        return f"The worst are {worst}; {remedy}{rare}"
    return f"Predictions are like the data; the worst are {worst}{rare}"
