"""Draws against the moments that the distributions state."""

from __future__ import annotations

import pytest
import torch

from pyrocell.distributions import (
    BetaBinomial,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)

CASES = [
    NegativeBinomial(torch.tensor([0.05, 4.0]), torch.tensor([2.0, 0.5])),
    NegativeBinomial(torch.tensor([1e3, 10.0]), torch.tensor([1e4, 5.0])),
    ZeroInflatedNegativeBinomial(torch.tensor([6.0, 1.0]), 2.0, zi_logits=torch.tensor([-1.0, 1.0])),
    Poisson(torch.tensor([0.3, 50.0])),
    ZeroInflatedPoisson(torch.tensor([0.3, 50.0]), zi_logits=0.5),
    BetaBinomial(torch.tensor([10, 30]), mean=torch.tensor([0.3, 0.8]), dispersion=torch.tensor([0.2, 0.01])),
]


@pytest.mark.parametrize("distribution", CASES, ids=lambda d: type(d).__name__)
def test_mean_and_variance_of_draws(distribution: torch.distributions.Distribution) -> None:
    n = 500_000
    with torch.random.fork_rng():
        torch.manual_seed(5)
        draws = distribution.sample((n,)).double()
    assert (draws == draws.floor()).all()
    centred = draws - distribution.mean.double()
    variance = distribution.variance.double()
    mean_error = (variance / n).sqrt()
    variance_error = ((centred.pow(4).mean(0) - variance.square()) / n).sqrt()
    assert (centred.mean(0).abs() < 4 * mean_error).all()
    assert ((centred.square().mean(0) - variance).abs() < 4 * variance_error).all()


def test_a_mean_of_zero_draws_zero() -> None:
    for distribution in (
        NegativeBinomial(torch.zeros(100), 0.1),
        ZeroInflatedNegativeBinomial(torch.zeros(100), 3.0, zi_logits=-5.0),
        Poisson(torch.zeros(100)),
    ):
        assert (distribution.sample() == 0).all()


def test_rates_are_lowered_to_a_hundred_million() -> None:
    for distribution in (
        Poisson(1e12),
        NegativeBinomial(1e12, 1e6),
        NegativeBinomial(log_mean=200.0, theta=10.0),
    ):
        assert 0.99e8 < float(distribution.sample()) < 1.01e8


def test_draws_are_detached() -> None:
    mean = torch.ones(3, requires_grad=True)
    assert not NegativeBinomial(mean, 1.0).sample().requires_grad


def test_tiny_shapes_draw_all_or_nothing() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = BetaBinomial(7, 1e-8, 1e-8).expand((2000,)).sample()
    assert set(draws.tolist()) == {0.0, 7.0}
    assert 2.8 < float(draws.mean()) < 4.2
