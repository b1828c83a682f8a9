"""The mixture of background and foreground counts."""

from __future__ import annotations

import itertools

import mpmath as mp
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyrocell.distributions import NegativeBinomial, NegativeBinomialMixture
from tests.distributions.references import exactly, log_nb, worst_relative_error

NAMES = ("log_background", "log_foreground", "log_theta", "background_logits")


def build(parameters: list[Tensor]) -> NegativeBinomialMixture:
    return NegativeBinomialMixture(**dict(zip(NAMES, parameters, strict=True)))


def grid(*axes: list[float], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.tensor(list(itertools.product(*axes)), dtype=dtype).T.contiguous())


def reference(x: float, first: mp.mpf, second: mp.mpf, phi: mp.mpf, logit: mp.mpf) -> mp.mpf:
    weight = 1 / (1 + mp.exp(-logit))
    parts = [mp.exp(log_nb(x, mp.exp(mean), mp.exp(phi))) for mean in (first, second)]
    return mp.log(weight * parts[0] + parts[1] / (1 + mp.exp(logit)))


def test_float32_over_the_extreme_grid() -> None:
    points = grid([-16, -3, 2, 9], [-10, 0.5, 6, 14], [-12, 0.7, 12], [-60, -4, 0, 5, 60], [0, 1, 8, 900])
    *parameters, x = points
    exact = [exactly(parameter) for parameter in parameters]
    expected = [reference(*point) for point in zip(x.tolist(), *exact, strict=True)]
    got = build(parameters).log_prob(x)
    assert got.dtype == torch.float32
    assert worst_relative_error(got, expected) <= 4e-6


@pytest.mark.parametrize(
    ("first", "second", "theta", "logit", "x"), [(5, 50, 3, 0, 0), (5, 50, 3, 0, 20), (5, 50, 3, 4, 60)]
)
def test_worked_values_against_scipy(first: float, second: float, theta: float, logit: float, x: int) -> None:
    values = torch.tensor([first, second, theta], dtype=torch.float64)
    distribution = NegativeBinomialMixture(*values, background_logits=logit)
    parts = [scipy.stats.nbinom.pmf(x, theta, theta / (theta + mean)) for mean in (first, second)]
    weight = 1 / (1 + mp.exp(-logit))
    expected = float(mp.log(weight * parts[0] + (1 - weight) * parts[1]))
    assert float(distribution.log_prob(torch.tensor(float(x)))) == pytest.approx(expected, rel=1e-12)
    responsibility = float((1 - weight) * parts[1] / mp.exp(expected))
    found = distribution.foreground_responsibility(torch.tensor(float(x)))
    assert float(found) == pytest.approx(responsibility, rel=1e-10)


@pytest.mark.parametrize("logit", [-2.0, 0.0, 3.0])
def test_probabilities_sum_to_one(logit: float) -> None:
    distribution = NegativeBinomialMixture(
        *torch.tensor([0.5, 40.0, 1.5], dtype=torch.float64), background_logits=logit
    )
    x = torch.arange(2000, dtype=torch.float64)
    assert float(distribution.log_prob(x).exp().sum()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("logit", "mean"), [(80.0, 3.0), (-80.0, 30.0)])
def test_a_certain_component_is_a_negative_binomial(logit: float, mean: float) -> None:
    x = torch.tensor([0.0, 1.0, 7.0, 30.0])
    got = NegativeBinomialMixture(3.0, 30.0, torch.tensor(2.0), background_logits=logit).log_prob(x)
    torch.testing.assert_close(got, NegativeBinomial(mean, torch.tensor(2.0)).log_prob(x))


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.tensor([[0.0, 1.0, 30.0], [4.0, 5.0, 600.0]], dtype=torch.float64)
    shapes = [(2, 3), (2, 3), (3,), (2, 3)]
    parameters = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]
    assert torch.autograd.gradcheck(lambda *values: build(list(values)).to_event(1).log_prob(x), parameters)


def test_the_gradient_of_the_logit_is_responsibility_minus_probability() -> None:
    logits = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64, requires_grad=True)
    distribution = NegativeBinomialMixture(5.0, 60.0, 3.0, background_logits=logits)
    x = torch.tensor([12.0, 30.0, 2.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad(distribution.log_prob(x).sum(), logits)
    expected = 1 - distribution.foreground_responsibility(x) - torch.sigmoid(logits)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_overflows_at_the_extremes(dtype: torch.dtype) -> None:
    axes = [[-40.0, 0.0, 20.0], [-40.0, 0.0, 20.0], [-20.0, 0.0, 40.0], [-60.0, 0.0, 60.0], [0.0, 9.0, 1e6]]
    *points, x = grid(*axes, dtype=dtype)
    parameters = [point.clone().requires_grad_() for point in points]
    log_prob = build(parameters).log_prob(x)
    assert log_prob.isfinite().all()
    assert (log_prob <= 0).all()
    for gradient in torch.autograd.grad(log_prob.sum(), parameters):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_moments_and_draws() -> None:
    distribution = NegativeBinomialMixture(
        torch.tensor([4.0, 2.0]), torch.tensor([50.0, 2.5]), 3.0, background_logits=torch.tensor([0.5, -1.0])
    )
    n = 500_000
    with torch.random.fork_rng():
        torch.manual_seed(5)
        draws = distribution.sample((n,)).double()
    assert (draws == draws.floor()).all()
    mean, variance = distribution.mean.double(), distribution.variance.double()
    centred = draws - mean
    assert (centred.mean(0).abs() < 4 * (variance / n).sqrt()).all()
    error = ((centred.pow(4).mean(0) - variance.square()) / n).sqrt()
    assert ((centred.square().mean(0) - variance).abs() < 4 * error).all()
    assert set(distribution.parameters_table) == {
        "mean",
        "theta",
        "background",
        "foreground",
        "background_probability",
    }


def test_entries_that_are_masked_count_for_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.randn(4, 3, generator=generator, requires_grad=True) for _ in NAMES]
    x, mask = torch.full((4, 3), 7.0), torch.tensor([True, False, True])
    rows = build(parameters).mask(mask).to_event(1).log_prob(x)
    torch.testing.assert_close(rows, build(parameters).log_prob(x)[:, mask].sum(-1))
    for gradient in torch.autograd.grad(rows.sum(), parameters):
        assert not gradient[:, 1].any()
        assert gradient[:, 0].all()


def test_parameters_are_given_once() -> None:
    with pytest.raises(ValueError, match="foreground and log_foreground of foreground, log_foreground"):
        NegativeBinomialMixture(1.0, 2.0, 1.0, log_foreground=0.0, background_logits=0.0)
    with pytest.raises(ValueError, match="none of theta, log_theta"):
        NegativeBinomialMixture(1.0, 2.0, background_logits=0.0)
    with pytest.raises(ValueError, match=r"[Ee]xpected"):
        NegativeBinomialMixture(1.0, float("nan"), 1.0, background_logits=0.0, validate_args=True)
