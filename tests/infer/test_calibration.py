"""Calibration error of probabilities whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from pyrocell.errors import QueryError
from pyrocell.infer.calibration import calibration_error


def drawn(n=40_000):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), n)
    label = (rng.random(n)[:, None] > probabilities.cumsum(1)).sum(1)
    return probabilities, label


def test_probabilities_that_are_meant_have_none():
    assert calibration_error(*drawn()) < 0.01


def test_overconfidence_is_measured():
    certain = np.eye(2)[[0] * 100]
    assert calibration_error(certain, np.array([0] * 70 + [1] * 30)) == pytest.approx(0.3)
    assert calibration_error(np.array([[0.6, 0.4]] * 10), np.zeros(10)) == pytest.approx(0.4)


def test_over_and_under_confidence_do_not_cancel_between_bins():
    probabilities = np.array([[0.95, 0.05]] * 10 + [[0.55, 0.45]] * 10)
    label = np.array([0] * 5 + [1] * 5 + [0] * 10)
    assert calibration_error(probabilities, label) == pytest.approx(0.45)


def test_shapes_must_fit():
    with pytest.raises(QueryError, match=r"shape \(3, 2\) and labels \(2,\)"):
        calibration_error(np.ones((3, 2)) / 2, np.zeros(2))
