"""Log-probabilities in float32 against 80-digit references."""

from __future__ import annotations

import itertools

import mpmath as mp
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyrocell.distributions import (
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
    log_rising,
)
from tests.distributions.references import exactly, inflate, log_nb, log_poisson, worst_relative_error


def grid(*axes: list[float]) -> list[Tensor]:
    return list(torch.tensor(list(itertools.product(*axes)), dtype=torch.float32).T.contiguous())


def powers(low: int, high: int, step: int = 1) -> list[float]:
    return [10.0**k for k in range(low, high + 1, step)]


@pytest.mark.parametrize("logarithms", [False, True])
def test_small_counts_to_four_millionths(logarithms: bool) -> None:
    mean, theta, x = grid(powers(-6, 5), powers(-3, 6), [0, 1, 3, 8])
    means, thetas = exactly(mean), exactly(theta)
    distribution = NegativeBinomial(mean, theta)
    if logarithms:
        distribution = NegativeBinomial(log_mean=mean.log(), log_theta=theta.log())
        means, thetas = ([mp.exp(v) for v in exactly(tensor.log())] for tensor in (mean, theta))
    expected = [log_nb(*point) for point in zip(x.tolist(), means, thetas, strict=True)]
    assert worst_relative_error(distribution.log_prob(x), expected) <= 4e-6


def test_large_counts_within_four_units_of_the_largest_summand() -> None:
    mean, theta, x = grid(powers(-6, 5), powers(-3, 6), [100, 10_000])
    log_mean, log_theta = mean.log(), theta.log()
    got = NegativeBinomial(log_mean=log_mean, log_theta=log_theta).log_prob(x)
    logs = zip(x.tolist(), exactly(log_mean), exactly(log_theta), got.tolist(), strict=True)
    for count, eta, phi, value in logs:
        m, t = mp.exp(eta), mp.exp(phi)
        gammas = mp.loggamma(count + t) - mp.loggamma(t) - mp.loggamma(count + 1)
        largest = max(abs(gammas), t * mp.log1p(m / t), count * mp.log1p(t / m))
        unit = float(mp.mpf(2) ** (mp.floor(mp.log(largest, 2)) - 23))
        assert abs(value - float(log_nb(count, m, t))) <= 4 * unit


def test_negative_binomial_over_the_extreme_grid() -> None:
    mean, theta, x = grid(powers(-8, 7), powers(-6, 8, 2), [0, 1, 2, 5, 9, 1000, 1_000_000])
    expected = [log_nb(*point) for point in zip(x.tolist(), exactly(mean), exactly(theta), strict=True)]
    assert worst_relative_error(NegativeBinomial(mean, theta).log_prob(x), expected) <= 1e-5


def test_zero_inflated_over_the_extreme_grid() -> None:
    eta, phi, x, zi = grid([-18, -7, 0.3, 6, 16], [-13, -4, 1, 9, 18], [0, 1, 8, 1000], [-60, -6, 0, 6, 60])
    means, thetas = ([mp.exp(v) for v in exactly(tensor)] for tensor in (eta, phi))
    base = (log_nb(*point) for point in zip(x.tolist(), means, thetas, strict=True))
    expected = [inflate(*point) for point in zip(x.tolist(), base, zi.tolist(), strict=True)]
    got = ZeroInflatedNegativeBinomial(log_mean=eta, log_theta=phi, zi_logits=zi).log_prob(x)
    assert worst_relative_error(got, expected) <= 4e-6


@pytest.mark.parametrize("inflated", [False, True])
def test_poisson_over_the_extreme_grid(inflated: bool) -> None:
    eta, x, zi = grid([-18, -7, 0.3, 6, 16], [0, 1, 8, 1000, 1_000_000], [-60, -6, 0, 6, 60])
    base = [log_poisson(n, mp.exp(v)) for n, v in zip(x.tolist(), exactly(eta), strict=True)]
    if inflated:
        expected = [inflate(*point) for point in zip(x.tolist(), base, zi.tolist(), strict=True)]
        got = ZeroInflatedPoisson(log_rate=eta, zi_logits=zi).log_prob(x)
    else:
        expected, got = base, Poisson(log_rate=eta).log_prob(x)
    assert worst_relative_error(got, expected) <= 4e-6


def test_worked_values_agree_with_scipy() -> None:
    mean, theta, x = torch.tensor(
        [(0.001, 0.01, 0), (0.5, 1, 0), (0.5, 1, 2), (10, 2, 0), (10, 2, 37), (1e3, 1e4, 990)],
        dtype=torch.float64,
    ).T
    expected = torch.from_numpy(scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mean)))
    torch.testing.assert_close(NegativeBinomial(mean, theta).log_prob(x), expected, rtol=1e-9, atol=0)
    for zi in (-6.0, 0.0, 6.0):
        got = ZeroInflatedNegativeBinomial(mean, theta, zi_logits=zi).log_prob(x)
        points = zip(x.tolist(), exactly(mean), exactly(theta), strict=True)
        inflated = [inflate(point[0], log_nb(*point), zi) for point in points]
        assert worst_relative_error(got, inflated) < 1e-10


@pytest.mark.parametrize("mean", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("theta", [1e-2, 1.0, 1e4])
def test_probabilities_sum_to_one(mean: float, theta: float) -> None:
    top = int(scipy.stats.nbinom.isf(1e-9, theta, theta / (theta + mean))) + 2
    x = torch.arange(top + 1, dtype=torch.float64)
    mu, th = torch.tensor([mean, theta], dtype=torch.float64)
    distributions = [NegativeBinomial(mu, th)]
    logits = torch.logit(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64))
    distributions += [ZeroInflatedNegativeBinomial(mu, th, zi_logits=zi) for zi in logits]
    for distribution in distributions:
        assert float(distribution.log_prob(x).exp().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e3])
def test_poisson_probabilities_sum_to_one(rate: float) -> None:
    x = torch.arange(int(scipy.stats.poisson.isf(1e-9, rate)) + 3, dtype=torch.float64)
    mu = torch.tensor(rate, dtype=torch.float64)
    for distribution in [Poisson(mu), *(ZeroInflatedPoisson(mu, zi_logits=zi) for zi in (-4.6, 0.0, 4.6))]:
        assert float(distribution.log_prob(x).exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_negative_binomial_tends_to_poisson() -> None:
    mean, x = grid(powers(-3, 3), [0, 1, 10, 1000])
    torch.testing.assert_close(
        NegativeBinomial(mean, 1e30).log_prob(x), Poisson(mean).log_prob(x), rtol=2e-4, atol=1e-3
    )


def test_counts_that_are_not_whole_follow_the_gamma_function() -> None:
    x = torch.tensor([0.25, 1.5, 3.75, 9.5, 120.5, 2.0], dtype=torch.float64)
    mean, theta = torch.tensor(2.5, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    expected = [log_nb(value, mp.mpf(2.5), exactly(theta[None])[0]) for value in x.tolist()]
    assert worst_relative_error(NegativeBinomial(mean, theta).log_prob(x), expected) < 1e-10


def test_log_rising_keeps_its_digits_at_any_theta() -> None:
    theta, x = grid(powers(-8, 10), [1, 2, 7, 9, 300.5, 1e6])
    expected = [mp.loggamma(n + t) - mp.loggamma(t) for n, t in zip(x.tolist(), exactly(theta), strict=True)]
    got = log_rising(x.double(), theta.double())
    # one factor theta near 1 makes the logarithm itself tend to 0: measure against 1 there
    errors = [
        abs(v - float(e)) / max(1.0, abs(float(e))) for v, e in zip(got.tolist(), expected, strict=True)
    ]
    assert max(errors) < 1e-11
