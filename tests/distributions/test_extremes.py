"""Every likelihood in float32 against 50-digit references, over the whole range that counts and parameters can have.

Means from 1e-8 to 1e7, inverse dispersions from 1e-6 to 1e8, counts from 0 to 1e6, mixture and zero-inflation logits
from -60 to 60. Half of the counts lie near their mean, where the logarithm is smallest and its terms cancel most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mpmath as mp
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyrocell.distributions import (
    BetaBinomial,
    Dirichlet,
    NegativeBinomial,
    NegativeBinomialMixture,
    NormalMixture,
    Poisson,
    ScaledBernoulli,
    StandardNormal,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from tests.distributions.references import exactly, inflate, log_nb, log_poisson

N_POINTS = 300
LOG_MEAN, LOG_THETA = (math.log(1e-8), math.log(1e7)), (math.log(1e-6), math.log(1e8))
LOGITS = (-60.0, 60.0)
MOST = 1e6
# Below this a float32 keeps fewer digits, and then none.
SMALLEST = 1e-37


@dataclass(frozen=True)
class Family:
    """A distribution, the ranges of its parameters, and its log-probability in 50 digits."""

    build: Callable[..., object]
    ranges: tuple[tuple[float, float], ...]
    reference: Callable[..., mp.mpf]
    centre: Callable[..., Tensor] | None = None
    natural: tuple[int, ...] = ()
    """Parameters that are given as they are, not as the logarithm that is drawn."""


def sigmoid(logit: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-logit))


def log_mixture(x: float, background: mp.mpf, foreground: mp.mpf, phi: mp.mpf, logit: mp.mpf) -> mp.mpf:
    parts = [mp.exp(log_nb(x, mp.exp(mean), mp.exp(phi))) for mean in (background, foreground)]
    return mp.log(sigmoid(logit) * parts[0] + sigmoid(-logit) * parts[1])


def log_product_of_chances(x: float, *logits: mp.mpf) -> mp.mpf:
    p = mp.fprod(sigmoid(logit) for logit in logits)
    return mp.log(p) if x else mp.log1p(-p)


FAMILIES = {
    "NegativeBinomial": Family(
        lambda mean, theta: NegativeBinomial(log_mean=mean, log_theta=theta),
        (LOG_MEAN, LOG_THETA),
        lambda x, mean, theta: log_nb(x, mp.exp(mean), mp.exp(theta)),
        lambda mean, theta: mean.exp(),
    ),
    "NegativeBinomial, natural": Family(
        NegativeBinomial, (LOG_MEAN, LOG_THETA), log_nb, lambda mean, theta: mean, natural=(0, 1)
    ),
    "ZeroInflatedNegativeBinomial": Family(
        lambda mean, theta, zi: ZeroInflatedNegativeBinomial(log_mean=mean, log_theta=theta, zi_logits=zi),
        (LOG_MEAN, LOG_THETA, LOGITS),
        lambda x, mean, theta, zi: inflate(x, log_nb(x, mp.exp(mean), mp.exp(theta)), zi),
        lambda mean, theta, zi: mean.exp(),
    ),
    "Poisson": Family(
        lambda rate: Poisson(log_rate=rate),
        (LOG_MEAN,),
        lambda x, rate: log_poisson(x, mp.exp(rate)),
        lambda rate: rate.exp(),
    ),
    "Poisson, natural": Family(Poisson, (LOG_MEAN,), log_poisson, lambda rate: rate, natural=(0,)),
    "ZeroInflatedPoisson": Family(
        lambda rate, zi: ZeroInflatedPoisson(log_rate=rate, zi_logits=zi),
        (LOG_MEAN, LOGITS),
        lambda x, rate, zi: inflate(x, log_poisson(x, mp.exp(rate)), zi),
        lambda rate, zi: rate.exp(),
    ),
    "NegativeBinomialMixture": Family(
        lambda background, foreground, theta, logits: NegativeBinomialMixture(
            log_background=background, log_foreground=foreground, log_theta=theta, background_logits=logits
        ),
        (LOG_MEAN, LOG_MEAN, LOG_THETA, LOGITS),
        log_mixture,
        lambda background, foreground, theta, logits: foreground.exp(),
    ),
    "ScaledBernoulli": Family(
        lambda logits, depth, region: ScaledBernoulli(logits, depth_logits=depth, region_logits=region),
        (LOGITS, LOGITS, LOGITS),
        log_product_of_chances,
    ),
}
# Measured on 3,000 points: at most 1e-5 where a mean is given as it is, which float32 rounds once more on its way to
# the logarithm, and 2.1e-6 elsewhere. 1e-4 is what is promised.
TOLERANCES = {"NegativeBinomial, natural": 3e-5, "Poisson, natural": 3e-5}


@cache
def points(name: str) -> tuple[Tensor, list[Tensor]]:
    """Counts, and parameters from end to end of their ranges; the ends themselves are among them."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> Tensor:
        drawn = low + (high - low) * torch.rand(N_POINTS, generator=generator)
        drawn[torch.rand(N_POINTS, generator=generator) < 0.05] = low
        drawn[torch.rand(N_POINTS, generator=generator) < 0.05] = high
        return drawn

    parameters = [uniform(*limits) for limits in family.ranges]
    parameters = [p.exp() if i in family.natural else p for i, p in enumerate(parameters)]
    if family.centre is None:
        return (torch.rand(N_POINTS, generator=generator) < 0.5).float(), parameters
    x = uniform(-1.0, math.log(MOST)).exp().floor().clamp(max=MOST)
    mean = family.centre(*parameters)
    near = (mean + 3 * mean.sqrt() * torch.randn(N_POINTS, generator=generator)).round().clamp(0, MOST).abs()
    x = torch.where(torch.rand(N_POINTS, generator=generator) < 0.5, x, near)
    x[:60] = torch.arange(60) % 6  # every count that has a formula of its own
    return x, parameters


def worst(got: Tensor, expected: list[mp.mpf]) -> float:
    """Largest relative error; what float32 cannot hold must be as good as zero."""
    errors = [0.0]
    for value, exact in zip(got.tolist(), expected, strict=True):
        if abs(exact) < SMALLEST:
            assert abs(value) < 2 * SMALLEST
        else:
            errors.append(float(abs((mp.mpf(value) - exact) / exact)))
    return max(errors)


@cache
def exact_values(name: str) -> list[mp.mpf]:
    x, parameters = points(name)
    with mp.workdps(50):
        return [
            FAMILIES[name].reference(*point)
            for point in zip(x.tolist(), *map(exactly, parameters), strict=True)
        ]


@pytest.mark.parametrize("name", FAMILIES)
def test_values(name: str) -> None:
    x, parameters = points(name)
    got = FAMILIES[name].build(*parameters).log_prob(x)
    assert got.dtype == torch.float32
    assert worst(got, exact_values(name)) <= TOLERANCES.get(name, 5e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_finite(name: str) -> None:
    x, parameters = points(name)
    leaves = [p.clone().requires_grad_() for p in parameters]
    value = FAMILIES[name].build(*leaves).log_prob(x)
    for gradient in torch.autograd.grad(value.sum(), leaves):
        assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_row_sums_are_finite_and_those_of_the_values(name: str) -> None:
    x, parameters = points(name)
    fn = FAMILIES[name].build(*(p.view(30, 10) for p in parameters))
    rows = fn.to_event(1).log_prob(x.view(30, 10))
    torch.testing.assert_close(rows, fn.log_prob(x.view(30, 10)).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_autocast_changes_nothing(name: str) -> None:
    """Under bfloat16 autocast the likelihood is the float32 one, to the bit, and so are its gradients."""
    x, parameters = points(name)

    def score() -> list[Tensor]:
        leaves = [p.clone().requires_grad_() for p in parameters]
        value = FAMILIES[name].build(*leaves).log_prob(x)
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    plain = score()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = score()
    for one, other in zip(plain, cast, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_in_half_precision_are_scored_in_float32(name: str) -> None:
    """What a network gives under autocast is bfloat16: its value is then exact for the parameters as they came."""
    x, parameters = points(name)
    x, halves = x[:80], [p[:80].bfloat16() for p in parameters]
    got = FAMILIES[name].build(*halves).log_prob(x)
    assert got.dtype == torch.float32
    with mp.workdps(50):
        rows = zip(x.tolist(), *(exactly(p.float()) for p in halves), strict=True)
        expected = [FAMILIES[name].reference(*row) for row in rows]
    assert worst(got, expected) <= TOLERANCES.get(name, 5e-6)


# beta-binomial, whose counts have a known number of trials


def log_beta_binomial(k: float, n: float, alpha: mp.mpf, beta: mp.mpf) -> mp.mpf:
    def log_beta(a: mp.mpf, b: mp.mpf) -> mp.mpf:
        return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)

    choose = mp.loggamma(mp.mpf(n) + 1) - mp.loggamma(mp.mpf(k) + 1) - mp.loggamma(mp.mpf(n) - k + 1)
    return choose + log_beta(k + alpha, n - k + beta) - log_beta(alpha, beta)


@cache
def trials() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def log_uniform(low: float, high: float) -> Tensor:
        span = math.log(high) - math.log(low)
        return (math.log(low) + span * torch.rand(N_POINTS, generator=generator)).exp()

    n, alpha, beta = log_uniform(1, MOST).floor(), log_uniform(1e-6, 1e8), log_uniform(1e-6, 1e8)
    share = torch.rand(N_POINTS, generator=generator)
    k = torch.where(share < 0.5, (n * alpha / (alpha + beta)).round(), (n * share).floor()).clamp(max=n)
    k[:50], k[50:100] = 0.0, n[50:100]
    return k, n, alpha, beta


def test_beta_binomial_values_and_gradients() -> None:
    k, n, alpha, beta = trials()
    alpha, beta = alpha.clone().requires_grad_(), beta.clone().requires_grad_()
    got = BetaBinomial(n, alpha, beta).log_prob(k)
    assert got.dtype == torch.float32
    with mp.workdps(50):
        points = zip(k.tolist(), n.tolist(), exactly(alpha.detach()), exactly(beta.detach()), strict=True)
        expected = [log_beta_binomial(*point) for point in points]
    assert worst(got, expected) <= 1e-6
    for gradient in torch.autograd.grad(got.sum(), (alpha, beta)):
        assert gradient.isfinite().all() and gradient.any()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(BetaBinomial(n, alpha, beta).log_prob(k), got)


def test_all_but_sure_trials_keep_their_digits() -> None:
    """None of n trials succeeds, where that is sure to ten digits: P = 1 - 1e-10 in float64 has six left."""
    n = torch.tensor([1.0, 100.0, 1e6, 1.0, 1e6])
    rare, sure = torch.tensor([1e-6, 1e-4, 1e-6, 1e-8, 1e-2]), torch.tensor([1e8, 1e8, 1e6, 1.0, 1e8])
    with mp.workdps(50):
        points = zip(n.tolist(), exactly(rare), exactly(sure), strict=True)
        expected = [log_beta_binomial(0.0, *point) for point in points]
    none, all_of_them = (
        BetaBinomial(n, rare, sure).log_prob(torch.zeros(5)),
        BetaBinomial(n, sure, rare).log_prob(n),
    )
    assert worst(none, expected) <= 1e-6 and worst(all_of_them, expected) <= 1e-6


@pytest.mark.parametrize("dispersion", [1e-8, 1e-4, 0.1, 0.99])
def test_beta_binomial_by_mean_and_dispersion(dispersion: float) -> None:
    k, n, *_ = trials()
    mean = torch.rand(N_POINTS, generator=torch.Generator().manual_seed(2)).clamp(1e-6, 1 - 1e-6)
    k = torch.where(torch.arange(N_POINTS) % 2 == 0, (n * mean).round(), k)
    mean, spread = mean.requires_grad_(), torch.full((N_POINTS,), dispersion).requires_grad_()
    got = BetaBinomial(n, mean=mean, dispersion=spread).log_prob(k)
    g = exactly(spread.detach())[0]
    with mp.workdps(50):
        points = zip(k.tolist(), n.tolist(), exactly(mean.detach()), strict=True)
        expected = [log_beta_binomial(a, b, m * (1 - g) / g, (1 - m) * (1 - g) / g) for a, b, m in points]
    assert worst(got, expected) <= 3e-5
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(got.sum(), (mean, spread)))


# limits


def test_the_negative_binomial_tends_to_the_poisson_at_its_rate() -> None:
    """The difference is ((x - m)^2 - x) / (2 theta) to first order: it halves when theta doubles."""
    mean, x = torch.tensor([0.3, 5.0, 900.0], dtype=torch.float64), torch.tensor([2.0, 9.0, 870.0]).double()
    poisson = Poisson(mean).log_prob(x)
    for theta in (1e6, 1e7, 1e8):
        gap = NegativeBinomial(mean, torch.tensor(theta, dtype=torch.float64)).log_prob(x) - poisson
        torch.testing.assert_close(gap, ((x - mean) ** 2 - x) / (2 * theta), rtol=2e-2, atol=1e-9)


def test_the_beta_binomial_tends_to_the_binomial_at_its_rate() -> None:
    k, n, p = (torch.tensor(v, dtype=torch.float64) for v in ([0, 3, 40], [12, 12, 90], [0.2, 0.2, 0.5]))
    binomial = torch.from_numpy(scipy.stats.binom.logpmf(k, n, p))
    gaps = [
        BetaBinomial(n, mean=p, dispersion=torch.tensor(g, dtype=torch.float64)).log_prob(k) - binomial
        for g in (1e-5, 1e-6)
    ]
    torch.testing.assert_close(gaps[0], 10 * gaps[1], rtol=1e-2, atol=1e-8)
    assert (gaps[1].abs() < 1e-3).all() and gaps[1].any()


@pytest.mark.parametrize("logit", [-60.0, 60.0])
def test_the_limits_of_zero_inflation(logit: float) -> None:
    x, mean, theta = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 3.0]), torch.tensor(2.0)
    inflated = ZeroInflatedNegativeBinomial(mean, theta, zi_logits=logit).log_prob(x)
    plain = NegativeBinomial(mean, theta).log_prob(x)
    expected = plain if logit < 0 else torch.stack([torch.zeros(()), plain[1] - 60])
    torch.testing.assert_close(inflated, expected, rtol=1e-6, atol=1e-7)


# latents


def test_normal_mixtures_with_all_but_certain_components() -> None:
    generator = torch.Generator().manual_seed(3)
    logit = LOGITS[0] + 120 * torch.rand(N_POINTS, generator=generator)
    mean = [10 * torch.randn(N_POINTS, generator=generator) for _ in range(2)]
    sd = [(4 * torch.randn(N_POINTS, generator=generator)).exp() for _ in range(2)]
    x = mean[0] + sd[0] * torch.randn(N_POINTS, generator=generator)
    weights = [torch.nn.functional.logsigmoid(sign * logit) for sign in (1, -1)]
    leaves = [part.clone().requires_grad_() for part in (*weights, *mean, *sd)]
    value = NormalMixture(leaves[:2], leaves[2:4], leaves[4:]).log_prob(x)
    with mp.workdps(50):
        rows = zip(*(exactly(part) for part in (x, *weights, *mean, *sd)), strict=True)
        expected = [
            mp.log(
                mp.exp(w0) * mp.npdf(v, m0, s0) + mp.exp(w1) * mp.npdf(v, m1, s1),
            )
            for v, w0, w1, m0, m1, s0, s1 in rows
        ]
    # Sums near 0 keep the digits of their largest term.
    errors = [
        abs(got - float(exact)) / max(1, abs(float(exact)))
        for got, exact in zip(value.tolist(), expected, strict=True)
    ]
    assert max(errors) <= 1e-4
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(value.sum(), leaves))


def test_standard_normal() -> None:
    z = torch.tensor([[0.0], [1e-8], [3.0], [1e4]], requires_grad=True)
    value = StandardNormal(1).log_prob(z)
    with mp.workdps(50):
        expected = [mp.log(mp.npdf(v)) for v in exactly(z.detach().flatten())]
    assert worst(value, expected) <= 1e-6
    assert torch.autograd.grad(value.sum(), z)[0].isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(StandardNormal(1).log_prob(z), value)


def test_dirichlet() -> None:
    generator = torch.Generator().manual_seed(4)
    c = (torch.rand((100, 4), generator=generator) * 14 - 7).exp()
    shares = torch.softmax(5 * torch.randn((100, 4), generator=generator), -1)
    leaf = c.clone().requires_grad_()
    value = Dirichlet(leaf, validate_args=False).log_prob(shares)
    rows = [(exactly(a), exactly(b)) for a, b in zip(c, shares, strict=True)]
    with mp.workdps(50):
        terms = [
            [mp.loggamma(sum(a)), *(-mp.loggamma(v) for v in a)]
            + [(v - 1) * mp.log(s) for v, s in zip(a, b, strict=True)]
            for a, b in rows
        ]
        expected = [(float(sum(row)), float(max(map(abs, row)))) for row in terms]
    for got, (exact, largest) in zip(value.tolist(), expected, strict=True):
        assert abs(got - exact) <= 2e-6 * max(largest, 1)  # a difference keeps the digits of its largest term
    assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()
