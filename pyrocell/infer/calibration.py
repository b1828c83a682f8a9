"""Whether probabilities of labels are right as often as they say."""

from __future__ import annotations

import numpy as np

from pyrocell.errors import QueryError

__all__ = ["calibration_error"]


def calibration_error(probabilities: np.ndarray, label: np.ndarray, *, n_bins: int = 15) -> float:
    """Tell how far the confidence of predictions lies from the share of them that is right.

    The expected calibration error: cells are binned by the probability of their likeliest label, and the error is the
    mean over cells of the distance between mean confidence and accuracy in their bin (Naeini et al., AAAI 2015).

    Parameters
    ----------
    probabilities
        Probability of each label, shape ``(n_cells, n_labels)``.
    label
        Code of the true label, shape ``(n_cells,)``.
    n_bins
        Number of bins of equal width.

    Returns
    -------
    float
        Between 0 and 1; 0 is perfect.

    Raises
    ------
    QueryError
        If the shapes do not fit.
    """
    probabilities, label = np.asarray(probabilities), np.asarray(label)
    if probabilities.ndim != 2 or label.shape != probabilities.shape[:1] or not len(label):
        raise QueryError(
            f"probabilities have shape {probabilities.shape} and labels {label.shape}; expected (n_cells, n_labels) "
            "and (n_cells,), of at least one cell."
        )
    confidence, right = probabilities.max(1), probabilities.argmax(1) == label
    place = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    distance = np.bincount(place, weights=confidence - right, minlength=n_bins)
    return float(np.abs(distance).sum() / len(label))
