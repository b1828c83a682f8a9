"""Beta-binomial log-probabilities."""

from __future__ import annotations

import itertools

import pytest
import scipy.stats
import torch

from pyrocell.distributions import BetaBinomial
from tests.distributions.references import exactly, log_beta_binomial, worst_relative_error

COUNTS = [(1, 0), (1, 1), (7, 3), (50, 50), (1000, 10), (20_000, 9000)]


def test_against_high_precision() -> None:
    points = [(*nk, a, b) for nk, a, b in itertools.product(COUNTS, [1e-3, 0.5, 30, 1e5], [1e-3, 2, 1e3])]
    n, k, alpha, beta = torch.tensor(points, dtype=torch.float32).T.contiguous()
    values = zip(k.tolist(), n.tolist(), exactly(alpha), exactly(beta), strict=True)
    expected = [log_beta_binomial(*point) for point in values]
    assert worst_relative_error(BetaBinomial(n, alpha, beta).log_prob(k), expected) <= 4e-6


@pytest.mark.parametrize("dispersion", [1e-8, 1e-5, 1e-2, 0.9])
def test_no_cancellation_at_small_dispersion(dispersion: float) -> None:
    m, g = torch.tensor([0.3, dispersion], dtype=torch.float64)
    n, k = torch.tensor(COUNTS).T
    strength = (1 - exactly(g[None])[0]) / exactly(g[None])[0]
    mean = exactly(m[None])[0]
    alpha, beta = mean * strength, (1 - mean) * strength
    expected = [log_beta_binomial(j, i, alpha, beta) for i, j in COUNTS]
    got = BetaBinomial(n, mean=m, dispersion=g).log_prob(k)
    assert worst_relative_error(got, expected) <= 1e-9


def test_it_tends_to_the_binomial() -> None:
    n, k = torch.tensor(COUNTS).T
    got = BetaBinomial(n, mean=torch.tensor(0.3, dtype=torch.float64), dispersion=1e-12).log_prob(k)
    expected = torch.from_numpy(scipy.stats.binom.logpmf(k, n, 0.3))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_agreement_with_scipy_and_sum_to_one() -> None:
    k = torch.arange(41, dtype=torch.float64)
    log_p = BetaBinomial(40, torch.tensor(0.7, dtype=torch.float64), 2.5).log_prob(k)
    expected = torch.from_numpy(scipy.stats.betabinom.logpmf(k, 40, 0.7, 2.5))
    torch.testing.assert_close(log_p, expected, rtol=1e-9, atol=0)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-10)


def test_entries_without_trials_contribute_nothing() -> None:
    alpha = torch.tensor([float("nan"), 2.0], requires_grad=True)
    log_p = BetaBinomial(torch.tensor([0, 3]), alpha, 1.0).log_prob(torch.tensor([0.0, 1.0]))
    assert log_p[0] == 0
    log_p.sum().backward()
    assert alpha.grad is not None
    assert alpha.grad[0] == 0
    assert alpha.grad[1] != 0


def test_moments_and_table() -> None:
    m, g, n = torch.tensor(0.2), torch.tensor(0.1), torch.tensor(12)
    distribution = BetaBinomial(n, mean=m, dispersion=g)
    torch.testing.assert_close(distribution.mean, n * m)
    torch.testing.assert_close(distribution.variance, n * m * (1 - m) * (1 + 11 * g))
    torch.testing.assert_close(distribution.parameters_table["mean"], m)
    torch.testing.assert_close(distribution.parameters_table["dispersion"], g)


@pytest.mark.parametrize("extreme", [0.0, 1.0])
def test_extreme_means_and_dispersions_stay_finite(extreme: float) -> None:
    m = torch.full((3,), extreme, requires_grad=True)
    g = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    log_p = BetaBinomial(5, mean=m, dispersion=g).log_prob(torch.tensor(2.0))
    log_p.sum().backward()
    assert log_p.isfinite().all()
    assert m.grad is not None
    assert g.grad is not None
    assert m.grad.isfinite().all()
    assert g.grad.isfinite().all()


def test_checks_on_request_and_mixed_parameterisations() -> None:
    with pytest.raises(ValueError, match="within the support"):
        BetaBinomial(5, 1.0, 1.0, validate_args=True).log_prob(torch.tensor(6.0))
    with pytest.raises(ValueError, match="give alpha and beta, or mean and dispersion"):
        BetaBinomial(5, 1.0, dispersion=0.1)
    with pytest.raises(ValueError, match="give exactly one"):
        BetaBinomial(5, mean=0.5)
