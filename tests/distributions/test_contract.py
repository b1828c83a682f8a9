"""Shapes, masks and plates: what Pyro expects of a distribution."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyrocell.distributions import (
    BetaBinomial,
    CountDistribution,
    NegativeBinomial,
    NegativeBinomialMixture,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from tests.distributions.families import CASES, Case, parameters_of, sparse_counts

ALL = [
    NegativeBinomial(torch.rand(4, 3), torch.rand(3)),
    ZeroInflatedNegativeBinomial(torch.rand(4, 3), torch.rand(3), zi_logits=torch.randn(1)),
    Poisson(torch.rand(4, 3)),
    ZeroInflatedPoisson(torch.rand(4, 3), zi_logits=torch.randn(3)),
    BetaBinomial(torch.tensor([5, 0, 9]), torch.rand(4, 3), torch.rand(3)),
    NegativeBinomialMixture(
        torch.rand(4, 3), torch.rand(4, 3) + 5, torch.rand(3), background_logits=torch.randn(4, 3)
    ),
]
each = pytest.mark.parametrize("distribution", ALL, ids=lambda d: type(d).__name__)


@each
def test_shapes(distribution: CountDistribution) -> None:
    assert not distribution.has_rsample
    assert distribution.support.is_discrete
    assert distribution.batch_shape == (4, 3)
    assert distribution.event_shape == ()
    for name in ("mean", "variance"):
        assert getattr(distribution, name).shape == (4, 3)
    assert all(tensor.shape == (4, 3) for tensor in distribution.parameters_table.values())
    assert distribution.sample().shape == (4, 3)
    assert distribution.sample((2,)).shape == (2, 4, 3)
    assert distribution.log_prob(distribution.sample((2,))).shape == (2, 4, 3)


@each
def test_expand(distribution: CountDistribution) -> None:
    wide = distribution.expand((2, 4, 3))
    assert type(wide) is type(distribution)
    assert wide.batch_shape == (2, 4, 3)
    assert distribution.batch_shape == (4, 3)
    assert wide.sample().shape == (2, 4, 3)
    assert wide.mean.shape == (2, 4, 3)
    x = distribution.sample()
    assert wide.log_prob(x).shape == (2, 4, 3)
    torch.testing.assert_close(wide.log_prob(x)[1], distribution.log_prob(x))
    assert distribution.expand_by((5,)).batch_shape == (5, 4, 3)
    with pytest.raises(RuntimeError):
        distribution.expand((4, 7))


@each
def test_to_event(distribution: CountDistribution) -> None:
    x = distribution.sample((2,))
    elements = distribution.log_prob(x)
    for n, total in [(0, elements), (1, elements.sum(-1)), (2, elements.sum((-1, -2)))]:
        event = distribution.to_event(n)
        assert event.batch_shape == (4, 3)[: 2 - n]
        assert event.event_shape == (4, 3)[2 - n :]
        torch.testing.assert_close(event.log_prob(x), total)
        assert event.sample().shape == (4, 3)
    assert distribution.to_event().event_shape == (4, 3)
    assert distribution.to_event(1).to_event(1).event_shape == (4, 3)
    assert distribution.to_event(2).to_event(-1).event_shape == (3,)
    torch.testing.assert_close(distribution.to_event(1).to_event(1).log_prob(x), elements.sum((-1, -2)))
    torch.testing.assert_close(dist.Independent(distribution, 1).log_prob(x), elements.sum(-1))
    with pytest.raises(ValueError, match=r"to_event|Cannot remove"):
        distribution.to_event(-1)


@each
def test_expand_after_to_event(distribution: CountDistribution) -> None:
    rows = distribution.to_event(1)
    wide = rows.expand((2, 4))
    assert type(wide) is type(rows)
    assert wide.event_shape == (3,)
    x = distribution.sample()
    assert wide.log_prob(x).shape == (2, 4)
    torch.testing.assert_close(wide.log_prob(x)[0], rows.log_prob(x))


@each
def test_mask(distribution: CountDistribution) -> None:
    x = distribution.sample()
    mask = torch.tensor([True, False, True, False])
    rows = distribution.to_event(1)
    assert torch.equal(rows.mask(mask).log_prob(x), torch.where(mask, rows.log_prob(x), 0.0))
    assert torch.equal(rows.mask(False).log_prob(x), torch.zeros(4))
    inner = distribution.mask(mask[:, None]).to_event(1).log_prob(x)
    torch.testing.assert_close(inner, torch.where(mask, rows.log_prob(x), 0.0))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_masked_rows_pass_no_gradient(case: Case) -> None:
    x, parameters = sparse_counts(), parameters_of(case, torch.float32)
    mask = torch.arange(64) % 2 == 0
    masked = case.build(parameters).to_event(1).mask(mask).log_prob(x).sum()
    gradient = torch.autograd.grad(masked, parameters[0])[0]
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()


def run_model(case: Case, parameters: list[Tensor], x: Tensor | None, **how: object) -> poutine.Trace:
    def model() -> None:
        with pyro.plate("cells", 64):
            pyro.sample("x", case.build(parameters).to_event(1), obs=x, **how)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_plates_scales_and_masks_of_pyro(case: Case) -> None:
    x, parameters = sparse_counts(), parameters_of(case, torch.float32)
    rows = case.build(parameters).to_event(1).log_prob(x)
    torch.testing.assert_close(run_model(case, parameters, x).nodes["x"]["log_prob"], rows)
    with poutine.scale(scale=0.25):
        torch.testing.assert_close(run_model(case, parameters, x).nodes["x"]["log_prob"], 0.25 * rows)
    mask = torch.arange(64) % 3 == 0
    with poutine.mask(mask=mask):
        got = run_model(case, parameters, x).nodes["x"]["log_prob"]
    torch.testing.assert_close(got, torch.where(mask, rows, 0.0))
    assert run_model(case, parameters, None).nodes["x"]["value"].shape == x.shape


def test_a_partly_observed_site() -> None:
    case, x = CASES["nb"], sparse_counts()
    parameters = parameters_of(case, torch.float32)
    seen = torch.arange(64) % 2 == 0
    trace = run_model(case, parameters, x, obs_mask=seen)
    rows = case.build(parameters).to_event(1).log_prob(x)
    torch.testing.assert_close(trace.nodes["x_observed"]["log_prob"], torch.where(seen, rows, 0.0))
    assert torch.equal(trace.nodes["x"]["value"][seen], x[seen])


def test_parameterisations_agree() -> None:
    mean, theta = torch.tensor([0.3, 4.0], dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    x = torch.tensor([2.0, 0.0], dtype=torch.float64)
    expected = NegativeBinomial(mean, theta).log_prob(x)
    logits = mean.log() - theta.log()
    for other in (
        NegativeBinomial(log_mean=mean.log(), log_theta=theta.log()),
        NegativeBinomial(mean, log_theta=theta.log()),
        NegativeBinomial(total_count=theta, logits=logits),
        dist.NegativeBinomial(theta, logits=logits),
    ):
        torch.testing.assert_close(other.log_prob(x), expected)
        torch.testing.assert_close(other.mean, mean)
    zi = torch.tensor(-0.4, dtype=torch.float64)
    torch.testing.assert_close(
        ZeroInflatedNegativeBinomial(total_count=theta, logits=logits, zi_logits=zi).log_prob(x),
        ZeroInflatedNegativeBinomial(mean, theta, zi_logits=zi).log_prob(x),
    )


def test_moments_of_the_mixtures() -> None:
    mean, theta, zi = torch.tensor(3.0), torch.tensor(2.0), torch.tensor(0.7)
    pi = torch.sigmoid(zi)
    zinb = ZeroInflatedNegativeBinomial(mean, theta, zi_logits=zi)
    torch.testing.assert_close(zinb.mean, (1 - pi) * 3)
    torch.testing.assert_close(zinb.variance, (1 - pi) * 3 * (1 + 3 * (pi + 1 / 2)))
    torch.testing.assert_close(zinb.count_mean, mean)
    torch.testing.assert_close(NegativeBinomial(mean, theta).variance, torch.tensor(3 + 9 / 2))
    torch.testing.assert_close(ZeroInflatedPoisson(mean, zi_logits=zi).variance, (1 - pi) * 3 * (1 + 3 * pi))
    assert set(zinb.parameters_table) == {"mean", "theta", "zi_probs"}
    assert zinb.to_event(0) is zinb


@pytest.mark.parametrize(
    "arguments", [{}, {"mean": 1.0}, {"mean": 1.0, "log_mean": 0.0, "theta": 1.0}], ids=str
)
def test_parameters_given_twice_or_not_at_all(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give exactly one"):
        NegativeBinomial(**arguments)


def test_checks_are_made_on_request() -> None:
    for make in (
        lambda: NegativeBinomial(torch.tensor([1.0, float("nan")]), 1.0, validate_args=True),
        lambda: NegativeBinomial(1.0, 1.0, validate_args=True).log_prob(torch.tensor(1.5)),
        lambda: Poisson(1.0, validate_args=True).to_event(0).log_prob(torch.tensor(-1.0)),
    ):
        with pytest.raises(ValueError, match=r"[Ee]xpected"):
            make()


def test_a_nan_is_never_hidden() -> None:
    log_mean = torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
    rows = NegativeBinomial(log_mean=log_mean, theta=1.0).to_event(1).log_prob(torch.zeros(2, 2))
    assert rows.isnan().tolist() == [True, False]
