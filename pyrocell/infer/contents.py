"""What a latent holds besides what is meant: the size of cells, and their batch."""

from __future__ import annotations

import numpy as np

from pyrocell.infer.diagnosis import Finding

__all__ = ["batch_finding", "size_finding"]

_SIZE_TOLD, _BATCH_TOLD = 0.5, 0.3
_N_NEAREST, _N_FOLDS = 30, 5
_FEWEST_CELLS, _FEWEST_OF_A_BATCH = 50, 30


def size_finding(latents: np.ndarray, totals: np.ndarray, *, size_is_given: bool = False) -> Finding:
    """Say how well the total count of a cell can be read off its latent.

    Parameters
    ----------
    latents
        Shape (n_cells, n_latent); dead dimensions left out, perhaps all of them.
    totals
        Total of each cell, shape (n_cells,). Cells without counts are left out.
    size_is_given
        Whether the model was set up with a size of each cell, rather than left to read it.
    """
    check, measure = "library size in the latent", "share of the variance of log totals that the latent tells"
    latents, sizes = latents[totals > 0], np.log(totals[totals > 0])
    if len(sizes) < max(_FEWEST_CELLS, 5 * latents.shape[1]) or sizes.std() < 1e-6:
        why = f"These {len(sizes)} cells are too few, or too equal in size, to tell; give more."
        return Finding(check, float("nan"), _SIZE_TOLD, measure, is_flagged=False, advice=why)
    share = max(_foretold(latents.astype(np.float64), sizes), 0.0)
    told = share > _SIZE_TOLD
    remedy = "let the model read it (leave size_factor_key out), or " if size_is_given else ""
    advice = (
        f"The latent holds the size of cells; unless kinds of cells differ in size, {remedy}remove low-quality cells."
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


def batch_finding(latents: np.ndarray, batch: np.ndarray, name: str, *, is_known: bool = False) -> Finding:
    """Say how well the batch of a cell can be told from the cells around it in the latent space.

    Parameters
    ----------
    latents
        Shape (n_cells, n_latent); dead dimensions left out, perhaps all of them.
    batch
        Batch of each cell, whole numbers, shape (n_cells,). Those of fewer than 30 cells are left out.
    name
        Name of the column that says the batch.
    is_known
        Whether the model was set up with that column, and has had the chance to correct for it.
    """
    check, measure = (
        "batch in the latent",
        "accuracy of telling the batch from the nearest cells, 0 by chance and 1 if always right,",
    )
    enough = np.bincount(batch)[batch] >= _FEWEST_OF_A_BATCH
    latents, batch = latents[enough], batch[enough]
    if len(np.unique(batch)) < 2:
        why = (
            f"Fewer than two values of {name!r} have {_FEWEST_OF_A_BATCH} cells, too few to tell; give more."
        )
        return Finding(check, float("nan"), _BATCH_TOLD, measure, is_flagged=False, advice=why)
    excess = max(_told_by_neighbours(latents, batch), 0.0) if latents.size else 0.0
    limit = _BATCH_TOLD + 1.5 / np.sqrt(len(batch))  # few cells come near the other by chance
    told = excess > limit
    remedy = (
        "train for longer, or choose features that vary within it"
        if is_known
        else "set up the model with it as batch_key"
    )
    advice = (
        f"Cells of one value of {name!r} lie together; unless their kinds of cells differ, {remedy}."
        if told
        else f"Values of {name!r} are mixed; there is nothing to do."
    )
    return Finding(check, excess, limit, measure, told, advice)


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
