"""The Dirichlet of states and the mixture of normals, against SciPy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats
from scipy.integrate import quad

from pyrocell.distributions import Dirichlet, NormalMixture
from pyrocell.distributions.dirichlet import _gamma_functions, _LogGammaDraw


def test_gamma_functions_against_scipy():
    x = np.logspace(-3, 5, 400)
    exact = special.gammaln(x), special.digamma(x), special.polygamma(1, x)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 4e-6)):
        for got, wanted in zip(_gamma_functions(torch.tensor(x, dtype=dtype)), exact, strict=True):
            np.testing.assert_allclose(got.numpy(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 3, 4), (20_000, 4)])
def test_divergence_and_its_slope(shape):
    torch.manual_seed(0)
    c = (torch.rand(shape, dtype=torch.float64) * 3 + 1e-3).requires_grad_()
    for prior in (torch.full((4,), 0.25), torch.rand(shape) + 0.1):
        prior = prior.double()
        got = torch.distributions.kl_divergence(Dirichlet(c), Dirichlet(prior.expand(shape)))
        wanted = torch.distributions.kl_divergence(
            *(torch.distributions.Dirichlet(p) for p in (c, prior.expand(shape)))
        )
        assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-8)
        slopes = [torch.autograd.grad(kl.sum(), c)[0] for kl in (got, wanted)]
        assert torch.allclose(*slopes, rtol=1e-7, atol=1e-8)


def test_divergence_from_a_prior_that_is_learned():
    c, prior = torch.rand(3, 4) + 0.1, (torch.rand(4) + 0.1).requires_grad_()
    torch.distributions.kl_divergence(Dirichlet(c), Dirichlet(prior.expand(3, 4))).sum().backward()
    assert torch.isfinite(prior.grad).all()


@pytest.mark.parametrize("concentration", [0.05, 0.5, 3.0, 200.0])
def test_draws_of_the_gamma_and_their_mean_slopes(concentration):
    torch.manual_seed(1)
    c = torch.full((40_000,), concentration, dtype=torch.float64, requires_grad=True)
    log_gamma = _LogGammaDraw.apply(c)
    assert stats.kstest(log_gamma.detach().numpy(), stats.loggamma(concentration).cdf).pvalue > 1e-3
    # d/dc of E[log Gamma] is the trigamma function
    [slope] = torch.autograd.grad(log_gamma.mean(), c)
    exact = special.polygamma(1, concentration)
    np.testing.assert_allclose(slope.sum(), exact, rtol=0.05)


def test_draws_of_the_dirichlet():
    torch.manual_seed(2)
    c = torch.tensor([1e-3, 0.3, 2.0, 5.0])
    draws = Dirichlet(c, validate_args=False).rsample((20_000,))
    assert (draws > 0).all() and torch.allclose(draws.sum(-1), torch.ones(20_000), atol=1e-5)
    exact = stats.dirichlet(c.double().numpy())
    np.testing.assert_allclose(draws.mean(0), exact.mean(), atol=0.01)
    np.testing.assert_allclose(draws.var(0), exact.var(), atol=0.005)
    assert torch.isfinite(Dirichlet(c, validate_args=False).log_prob(draws)).all()


def mixture():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    return NormalMixture(
        [w.log().expand(4, 2) for w in weights],
        [
            torch.zeros(2, dtype=torch.float64),
            torch.ones(4, 2, dtype=torch.float64),
            torch.tensor(-2.0).double(),
        ],
        [torch.tensor(s, dtype=torch.float64) for s in (0.5, 0.1, 2.0)],
    )


def test_mixture_against_its_density():
    weights, means, sds = (0.2, 0.5, 0.3), (0.0, 1.0, -2.0), (0.5, 0.1, 2.0)

    def density(x):
        return sum(w * stats.norm.pdf(x, m, s) for w, m, s in zip(weights, means, sds, strict=True))

    fn = mixture()
    assert fn.batch_shape == (4, 2) and fn.expand((3, 4, 2)).batch_shape == (3, 4, 2)
    x = torch.linspace(-3, 2, 8, dtype=torch.float64).view(4, 2)
    np.testing.assert_allclose(fn.log_prob(x), np.log(density(x.numpy())), rtol=1e-10)
    np.testing.assert_allclose(fn.to_event(1).log_prob(x), np.log(density(x.numpy())).sum(1), rtol=1e-10)
    mean = quad(lambda v: v * density(v), -30, 30, points=[0, 1], limit=200)[0]
    variance = quad(lambda v: (v - mean) ** 2 * density(v), -30, 30, points=[0, 1], limit=200)[0]
    np.testing.assert_allclose(fn.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(fn.variance, variance, rtol=1e-6)
    given = torch.stack(fn.log_weights_given(x)).exp()
    np.testing.assert_allclose(given.sum(0), 1, rtol=1e-10)
    np.testing.assert_allclose(given[1], 0.5 * stats.norm.pdf(x, 1, 0.1) / density(x.numpy()), rtol=1e-8)


def test_draws_of_the_mixture():
    torch.manual_seed(3)
    draws, fn = mixture().sample((20_000,)), mixture()
    assert draws.shape == (20_000, 4, 2)
    np.testing.assert_allclose(draws.mean(0), fn.mean, atol=0.05)
    np.testing.assert_allclose(draws.var(0), fn.variance, rtol=0.05)
