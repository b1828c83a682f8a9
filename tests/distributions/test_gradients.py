"""Closed-form gradients against autograd, finite differences and extremes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pyrocell.distributions import BetaBinomial, NegativeBinomial, Poisson, log_rising
from tests.distributions.families import CASES, Case, parameters_of, sparse_counts

THETA_SHAPES = [(200,), (64, 200), (1,), (64, 1), ()]


def gradients(log_prob: Tensor, parameters: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((log_prob * weights).sum(), parameters)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("theta_shape", THETA_SHAPES, ids=str)
def test_closed_form_equals_autograd(case: Case, theta_shape: tuple[int, ...]) -> None:
    x = sparse_counts(torch.float64)
    parameters = parameters_of(case, torch.float64, theta_shape)
    weights = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = gradients(case.dense(x, *parameters).sum(-1), parameters, weights)
    got = gradients(case.build(parameters).to_event(1).log_prob(x), parameters, weights)
    for one, other, parameter in zip(got, expected, parameters, strict=True):
        assert one.shape == parameter.shape
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_finite_differences(case: Case) -> None:
    x = torch.tensor([[0.0, 1.0, 3.0], [4.0, 5.0, 60.0]], dtype=torch.float64)
    shapes = {"log_theta": (3,)}
    generator = torch.Generator().manual_seed(2)
    parameters = [
        torch.randn(shapes.get(name, (2, 3)), generator=generator, dtype=torch.float64, requires_grad=True)
        for name in case.names
    ]
    for rows in (False, True):

        def score(*values: Tensor, rows: bool = rows) -> Tensor:
            distribution = case.build(list(values))
            return distribution.to_event(1).log_prob(x) if rows else distribution.log_prob(x)

        assert torch.autograd.gradcheck(score, parameters)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_overflows_at_the_extremes(case: Case, dtype: torch.dtype) -> None:
    axes = {"log_mean": [-40.0, 0.0, 20.0], "log_theta": [-20.0, 0.0, 40.0]}
    values = [axes.get(name, [-60.0, -40.0, 0.0, 40.0, 60.0]) for name in case.names]
    points = torch.tensor(list(itertools.product(*values, [0.0, 1.0, 9.0, 1e6])), dtype=dtype).T
    parameters = [point.clone().requires_grad_() for point in points[:-1]]
    log_prob = case.build(parameters).log_prob(points[-1])
    assert log_prob.isfinite().all()
    assert (log_prob <= 0).all()
    for gradient in gradients(log_prob, parameters, torch.ones_like(log_prob)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("log_ratio", [-40.0, 40.0])
def test_clamps_pass_gradients_straight_through(log_ratio: float) -> None:
    log_theta = torch.tensor([30.0], requires_grad=True)  # beyond the range of log theta
    log_mean = (log_theta + log_ratio).detach().requires_grad_()
    for x in (0.0, 3.0):
        log_prob = NegativeBinomial(log_mean=log_mean, log_theta=log_theta).log_prob(torch.tensor([x]))
        slopes = gradients(log_prob, [log_mean, log_theta], torch.ones(1))
        assert all(slope.isfinite().all() for slope in slopes)
        assert slopes[0].abs() > 0


def test_a_mean_of_zero_gives_no_nan() -> None:
    for x in (0.0, 2.0):
        mean = torch.tensor([0.0, 1.0], requires_grad=True)
        theta = torch.tensor([0.5, 0.5], requires_grad=True)
        log_prob = NegativeBinomial(mean, theta).log_prob(torch.tensor([x, x]))
        assert log_prob.isfinite().all()
        assert all(
            gradient.isfinite().all() for gradient in torch.autograd.grad(log_prob.sum(), [mean, theta])
        )
    rate = torch.zeros(2, requires_grad=True)
    log_prob = Poisson(rate).log_prob(torch.tensor([0.0, 2.0]))
    assert log_prob[0].item() == pytest.approx(0.0, abs=1e-6)
    assert torch.autograd.grad(log_prob.sum(), rate)[0].isfinite().all()


def test_only_the_asked_gradients_are_kept() -> None:
    x, case = sparse_counts(), CASES["zinb"]
    log_mean, log_theta, zi_logits = parameters_of(case, torch.float32)
    both = torch.autograd.grad(
        case.build([log_mean, log_theta, zi_logits]).to_event(1).log_prob(x).sum(), [log_mean, zi_logits]
    )
    some = torch.autograd.grad(
        case.build([log_mean, log_theta.detach(), zi_logits]).to_event(1).log_prob(x).sum(),
        [log_mean, zi_logits],
    )
    assert all(torch.equal(one, other) for one, other in zip(both, some, strict=True))
    with torch.no_grad():
        assert not case.build([log_mean, log_theta, zi_logits]).log_prob(x).requires_grad


def test_log_rising_and_beta_binomial_by_finite_differences() -> None:
    theta = torch.tensor([0.02, 1.0, 30.0, 4000.0], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.0], [1.0], [7.0], [900.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: log_rising(x, t), theta)
    mean = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    dispersion = torch.tensor([0.001, 0.2, 0.7], dtype=torch.float64, requires_grad=True)
    n, k = torch.tensor([[0, 5, 20]]), torch.tensor([[0.0, 2.0, 20.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda m, g: BetaBinomial(n, mean=m, dispersion=g).log_prob(k), (mean, dispersion)
    )
