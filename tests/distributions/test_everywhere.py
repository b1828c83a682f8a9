"""The formulas of float64 and other devices, which score every entry alike, give the numbers of the compiled loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyrocell.distributions.accessibility import _score_block, _Seen
from pyrocell.distributions.counts import NonZeros
from pyrocell.distributions.kernels import negative_binomial
from tests.distributions.families import CASES, Case, sparse_counts

EXTREMES = {
    "log_mean": (-18.0, 16.0),
    "log_rate": (-18.0, 16.0),
    "log_theta": (-14.0, 18.5),
    "zi_logits": (-60.0, 60.0),
}


def extreme(case: Case) -> tuple[Tensor, list[Tensor]]:
    """Counts up to a million under parameters from end to end of their ranges."""
    generator = torch.Generator().manual_seed(1)
    x = sparse_counts()
    x[0, :6] = torch.tensor([1e6, 2.5, 0.5, 4.0, 5.0, 1e4])
    parameters = [
        low + (high - low) * torch.rand(x.shape, generator=generator)
        for low, high in (EXTREMES[name] for name in case.names)
    ]
    return x, [parameter.requires_grad_() for parameter in parameters]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_counts(case: Case) -> None:
    x, parameters = extreme(case)
    value = case.build(parameters).log_prob(x)
    slopes = torch.autograd.grad(value.sum(), parameters)
    found = case.make.family.everywhere(x.unsqueeze(0), [p.detach().unsqueeze(0) for p in parameters])
    assert all(one.isfinite().all() for one in found)
    torch.testing.assert_close(value.detach().double(), found[0][0], rtol=1e-6, atol=1e-6)
    # A slope is a difference of terms as large as count and mean, and rounds as they do.
    terms = 1.0 + x.double() + parameters[0].detach().double().exp()
    for exact, slope in zip(found[1:], slopes, strict=True):
        assert ((slope - exact[0]).abs() <= 1e-6 * (terms + exact[0].abs())).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_not_a_number_is_not_hidden(case: Case) -> None:
    x, parameters = extreme(case)
    for i in range(len(parameters)):
        for column in (0, 199):  # a large count, and most likely a zero
            spoilt = [p.detach().clone() for p in parameters]
            spoilt[i][0, column] = torch.nan
            values = case.build(spoilt).log_prob(x)
            assert values[0, column].isnan()
            assert values.isnan().sum() == 1


@pytest.mark.parametrize("log_ratio", [-torch.inf, -89.0, -69.0, -41.0, 41.0, 69.0, 89.0, torch.inf])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_beyond_the_bounds(case: Case, log_ratio: float) -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 4.0, 5.0, 2.5]])
    axes = {"log_theta": 0.0, "zi_logits": 1.0}
    parameters = [torch.full_like(x, axes.get(name, log_ratio)).requires_grad_() for name in case.names]
    value = case.build(parameters).log_prob(x)
    exact = case.make.family.everywhere(x.unsqueeze(0), [p.detach().unsqueeze(0) for p in parameters])[0][0]
    if (
        "log_theta" in case.names or log_ratio < 80
    ):  # rates beyond float32 are infinite in one and not in the other
        torch.testing.assert_close(value.detach().double(), exact, rtol=2e-6, atol=1e-6, equal_nan=True)
    if log_ratio == torch.inf or (case.names == ("log_rate",) and log_ratio > 88):
        # a zero is impossible, unless it is a structural one
        assert value[0, 0] == -torch.inf if "zi_logits" not in case.names else value[0, 0].isfinite()


def test_a_mean_of_zero_gives_no_count_for_sure() -> None:
    x, log_mean = torch.zeros(1, 1, 2), torch.full((1, 1, 2), -torch.inf)
    assert not negative_binomial.everywhere(x, [log_mean, torch.zeros(1, 1, 2)])[0].any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_dispersion_for_each_gene_stays_one(case: Case) -> None:
    x, parameters = extreme(case)
    thin = [
        (p.detach()[:1] if name == "log_theta" else p.detach()).unsqueeze(0)
        for name, p in zip(case.names, parameters, strict=True)
    ]
    whole = case.build([p[0].expand(x.shape) for p in thin]).log_prob(x)
    torch.testing.assert_close(
        case.make.family.everywhere(x.unsqueeze(0), thin)[0][0].float(), whole, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("n_factors", [0, 1, 2])
def test_regions(n_factors: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 20 * torch.randn(6, 50, generator=generator)
    factors = [10 * torch.randn(shape, generator=generator) for shape in ((6, 1), (1, 50))][:n_factors]
    x = (torch.rand(6, 50, generator=generator) < 0.2).float()
    index = NonZeros.of(x)
    results = []
    for seen in (_Seen(index.flat, index.rows, index.cols), x != 0):
        slopes = [torch.empty_like(logits) for _ in range(2)]
        results.append([_score_block(logits, factors, seen, slopes), *slopes])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
