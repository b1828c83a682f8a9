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
    "batch_finding",
    "convergence",
    "explained_shares",
    "fit_of_features",
    "latent_findings",
    "size_finding",
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
_SIZE_TOLD, _BATCH_TOLD = 0.5, 0.3
_N_WORST, _N_NEAREST, _N_FOLDS = 10, 30, 5
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
        within the posterior of a cell, and ``is_dead``. None where the model has no latent.
    features
        For each feature, worst first: ``ks_pit``, the distance between what was predicted and observed (0 to 1), and
        ``is_misfit``; then mean, variance and zero fraction, observed and predicted. None without a likelihood.
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
        For each dimension ``explained``, from 0 (the posterior is the same in all cells) to 1, and ``is_dead``.
    """
    within = variance.mean(0, dtype=np.float64)
    between = mean.var(0, dtype=np.float64)
    if n_samples is not None:  # the mean of some draws varies more than the mean
        between = np.maximum(between - within / n_samples, 0)
    explained = between / np.maximum(between + within, np.finfo(np.float32).tiny)
    index = pd.RangeIndex(len(explained), name="dimension")
    return pd.DataFrame({"explained": explained, "is_dead": explained < _DEAD}, index=index)


def latent_findings(dimensions: pd.DataFrame) -> list[Finding]:
    """Say whether the latent tells cells apart at all, and whether it has many more dimensions than it uses.

    Parameters
    ----------
    dimensions
        Result of `explained_shares`.
    """
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
    measure = "unexplained share of the variance of the best dimension"
    return [
        Finding("posterior collapse", best, _COLLAPSED, measure, collapsed, collapse),
        Finding("dead dimensions", n_dead / n_latent, _MANY_DEAD, "share of dead dimensions", many, dead),
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
    columns = [f"{side}_{what}" for what in _STATISTICS for side in ("observed", "predicted")]
    misfit = (features["ks_pit"] > limit).rename("is_misfit")
    ranked = pd.concat([features["ks_pit"], misfit, features[columns]], axis=1)
    ranked = ranked.sort_values("ks_pit", ascending=False, kind="stable", na_position="last")
    measured = ranked["ks_pit"].notna()
    share = float(ranked["is_misfit"].sum() / max(measured.sum(), 1))
    worst = list_some(ranked.index[:_N_WORST], limit=_N_WORST)
    advice = (
        f"The worst are {worst}; look at them in Diagnosis.features, and try another likelihood or dispersion."
        if share > _MANY_MISFITS
        else f"Predictions are like the data; the worst are {worst}."
    )
    measure = "share of features that are badly predicted"
    return ranked, Finding("predictive fit", share, _MANY_MISFITS, measure, share > _MANY_MISFITS, advice)


def size_finding(latents: np.ndarray, totals: np.ndarray) -> Finding:
    """Say how well the total count of a cell can be read off its latent.

    Parameters
    ----------
    latents
        Shape (n_cells, n_latent); dead dimensions left out, perhaps all of them.
    totals
        Total of each cell, shape (n_cells,).
    """
    check, measure = "library size in the latent", "share of the variance of log totals that the latent tells"
    sizes = np.log(np.maximum(totals, np.finfo(np.float32).tiny))
    if len(sizes) < max(_FEWEST_CELLS, 5 * latents.shape[1]) or sizes.std() < 1e-6:
        why = f"These {len(sizes)} cells are too few, or too equal in size, to tell; give more."
        return Finding(check, float("nan"), _SIZE_TOLD, measure, is_flagged=False, advice=why)
    share = max(_foretold(latents.astype(np.float64), sizes), 0.0)
    told = share > _SIZE_TOLD
    advice = (
        "The latent holds the size of cells; unless kinds of cells differ in size, let the model read it "
        "(leave size_factor_key out), or remove low-quality cells."
        if told
        else "The latent does not hold the size of cells; there is nothing to do."
    )
    return Finding(check, share, _SIZE_TOLD, measure, told, advice)


def _foretold(x: np.ndarray, y: np.ndarray) -> float:
    """Share of the variance of y that a linear regression on x foretells in cells that it was not fitted to."""
    fold = np.random.default_rng(0).permutation(len(y)) % _N_FOLDS
    x = np.column_stack([np.ones(len(y)), (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)])
    guess = np.empty_like(y)
    for i in range(_N_FOLDS):
        ridge = 1e-3 * (fold != i).sum() * np.eye(x.shape[1])
        train = x[fold != i]
        guess[fold == i] = x[fold == i] @ np.linalg.solve(train.T @ train + ridge, train.T @ y[fold != i])
    return float(1 - ((y - guess) ** 2).mean() / y.var())


def batch_finding(latents: np.ndarray, batch: np.ndarray, name: str) -> Finding:
    """Say how well the batch of a cell can be told from the cells around it in the latent space.

    Parameters
    ----------
    latents
        Shape (n_cells, n_latent); dead dimensions left out, perhaps all of them.
    batch
        Batch of each cell, whole numbers, shape (n_cells,).
    name
        Name of the column that says the batch.
    """
    check, measure = (
        "batch in the latent",
        "accuracy above chance of telling the batch from the nearest cells",
    )
    sizes = np.bincount(batch)
    sizes = sizes[sizes > 0]
    if len(batch) < _FEWEST_CELLS or len(sizes) < 2 or sizes.min() < 5:
        why = f"There are too few cells of some value of {name!r} to tell; give more."
        return Finding(check, float("nan"), _BATCH_TOLD, measure, is_flagged=False, advice=why)
    excess = max(_told_by_neighbours(latents, batch), 0.0) if latents.size else 0.0
    told = excess > _BATCH_TOLD
    advice = (
        f"Cells of one value of {name!r} lie together; unless their kinds of cells differ, set up the model with it "
        "as batch_key, or train for longer."
        if told
        else f"Values of {name!r} are mixed; there is nothing to do."
    )
    return Finding(check, excess, _BATCH_TOLD, measure, told, advice)


def _told_by_neighbours(latents: np.ndarray, batch: np.ndarray) -> float:
    """Balanced accuracy of the batch most frequent among neighbours, from 0 (chance) to 1.

    Neighbours of one half of the cells are looked for in the other half: among all, a cell would have one neighbour
    less of its own batch to meet. They are weighted such that batches of few cells count as much as others.
    """
    _, codes = np.unique(batch, return_inverse=True)
    rng, z = np.random.default_rng(0), latents.astype(np.float64)
    half = np.empty(len(codes), dtype=np.int64)
    for b in range(codes.max() + 1):  # half of each batch
        rows = rng.permutation(np.flatnonzero(codes == b))
        half[rows] = np.arange(len(rows)) % 2
    right = np.zeros(codes.max() + 1)
    for side in (0, 1):
        asked, known = np.flatnonzero(half == side), np.flatnonzero(half != side)
        sizes = np.bincount(codes[known])
        n_near = min(_N_NEAREST, max(3, len(known) // 10))
        for rows in np.array_split(asked, len(asked) // 500 + 1):
            distance = (z[known] ** 2).sum(1) - 2 * z[rows] @ z[known].T
            near = codes[known][np.argpartition(distance, n_near - 1, axis=1)[:, :n_near]]
            votes = np.stack([(near == b).sum(1) / size for b, size in enumerate(sizes)], axis=1)
            guess = (votes + 1e-9 * rng.random(votes.shape)).argmax(1)  # a tie is nobody's
            right += np.bincount(codes[rows], guess == codes[rows], minlength=len(right))
    accuracy, chance = (right / np.bincount(codes)).mean(), 1 / len(right)
    return float((accuracy - chance) / (1 - chance))
