"""Counts above zero, of every kind that is scored in a way of its own; and the elementary functions that serve them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrocell.distributions import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial, elementary
from pyrocell.distributions.compiled import BLOCK, LANES, add_up, total_of
from pyrocell.distributions.kernels import negative_binomial, poisson

KINDS = [*range(1, 41), 127, 255, 511, 512, 513, 1000, 100_000, 0.25, 0.5, 1.5, 2.5, 3.5, 4.25, 23.5, 511.5]


def grid(log_means: Tensor, log_thetas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, log_mean, log_theta = torch.meshgrid(torch.tensor(KINDS), log_means, log_thetas, indexing="ij")
    return x.reshape(1, -1), log_mean.reshape(1, -1).contiguous(), log_theta.reshape(1, -1).contiguous()


@pytest.mark.parametrize("reach", [(-18.0, 16.0, -14.0, 18.5), (-80.0, 80.0, -16.0, 20.0)], ids=str)
def test_negative_binomial(reach: tuple[float, float, float, float]) -> None:
    """Log means and log thetas from end to end, the ratio's bounds of e^+-40 among them."""
    x, log_mean, log_theta = grid(torch.linspace(*reach[:2], 23), torch.linspace(*reach[2:], 21))
    parameters = [log_mean.requires_grad_(), log_theta.requires_grad_()]
    value = NegativeBinomial(log_mean=log_mean, log_theta=log_theta).log_prob(x)
    slopes = torch.autograd.grad(value.sum(), parameters)
    inputs = [p.detach().unsqueeze(0) for p in parameters]
    exact, *exact_slopes = (one[0] for one in negative_binomial.everywhere(x.unsqueeze(0), inputs))
    # Up to four, log P(0) in float32 is a summand: measured, 1.6e-6 at most.
    torch.testing.assert_close(value.detach().double(), exact, rtol=3e-6, atol=0)
    assert ((value - exact) / exact)[x > 4].abs().max() < 2e-7
    ratio = (log_mean - log_theta).detach().double().clamp(-40.0, 40.0)
    terms = 1.0 + x.double() + (log_theta.detach().double() + ratio).exp()
    for slope, other in zip(slopes, exact_slopes, strict=True):
        assert ((slope.double() - other).abs() <= 1e-6 * (terms + other.abs())).all()


def test_poisson() -> None:
    x, log_rate, _ = grid(torch.linspace(-18.0, 16.0, 101), torch.zeros(1))
    log_rate.requires_grad_()
    value = Poisson(log_rate=log_rate).log_prob(x)
    slope = torch.autograd.grad(value.sum(), log_rate)[0]
    exact, exact_slope = poisson.everywhere(x.unsqueeze(0), [log_rate.detach().unsqueeze(0)])
    torch.testing.assert_close(value.detach().double(), exact[0], rtol=2e-6, atol=0)
    terms = 1.0 + x.double() + log_rate.detach().double().exp()
    assert ((slope.double() - exact_slope[0]).abs() <= 1e-6 * terms).all()


def test_logits_of_zero_inflation_that_no_cell_has() -> None:
    """One logit below -70 sends its block of genes another way: the numbers are the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((5, 3 * BLOCK), 0.1), generator=generator)
    common = [torch.randn(5, 3 * BLOCK, generator=generator) * 3.0 for _ in range(3)]
    rare = [*common[:2], common[2].clone()]
    rare[2][:, BLOCK + 7] = -1000.0
    values, slopes = [], []
    for parameters in (common, rare):
        leaves = [p.clone().requires_grad_() for p in parameters]
        names = ("log_mean", "log_theta", "zi_logits")
        value = ZeroInflatedNegativeBinomial(**dict(zip(names, leaves, strict=True))).log_prob(x)
        values.append(value)
        slopes.append(torch.autograd.grad(value.sum(), leaves))
    rest = torch.arange(3 * BLOCK) != BLOCK + 7
    torch.testing.assert_close(values[0][:, rest], values[1][:, rest], rtol=1e-6, atol=0)
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one[:, rest], other[:, rest], rtol=1e-6, atol=3e-7)
    base = NegativeBinomial(log_mean=common[0], log_theta=common[1]).log_prob(x)
    torch.testing.assert_close(values[1][:, BLOCK + 7], base[:, BLOCK + 7], rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 1000, BLOCK])
def test_sums_of_a_block(n: int) -> None:
    row, lanes = np.random.default_rng(n).gamma(0.1, size=n).astype(np.float32), np.zeros(LANES)
    add_up(row, lanes)
    add_up(row, lanes)
    np.testing.assert_allclose(total_of(lanes), 2 * row.sum(dtype=np.float64), rtol=2e-7)
    assert not lanes.any()


@pytest.mark.parametrize("n", [1, 3, 70])
def test_smallest_and_largest(n: int) -> None:
    row = (np.random.default_rng(n).normal(size=n) * 1e3).astype(np.float32)
    assert elementary.ends_of(row) == (row.min(), row.max())
    assert elementary.ends_of(-abs(row)) == (-abs(row).max(), -abs(row).min())
    row[n // 2] = np.inf
    assert elementary.ends_of(row)[1] == np.inf
    assert elementary.ends_of(-row)[0] == -np.inf
    for nan in (np.nan, -np.nan):
        row[0] = nan
        assert np.isnan(elementary.ends_of(row)).any()


def test_logarithm_and_complement_of_the_exponential() -> None:
    y = np.logspace(-37, 38, 3001).astype(np.float32)
    near = np.linspace(0.5, 2.0, 3001, dtype=np.float32)
    for values in (y, near):
        found = [elementary.log(v) for v in values]
        np.testing.assert_allclose(found, np.log(values.astype(float)), rtol=2e-7, atol=1e-12)
    x = -np.concatenate([np.logspace(-30, 0, 300), np.linspace(1, 86, 300)]).astype(np.float32)
    power, rest = np.array([elementary.exp_and_rest(v) for v in x]).T
    np.testing.assert_allclose(power, np.exp(x.astype(float)), rtol=2e-7)
    np.testing.assert_allclose(rest, -np.expm1(x.astype(float)), rtol=2e-7)
    assert elementary.exp_and_rest(np.float32(-np.inf)) == (0.0, 1.0)
    assert np.isnan(elementary.exp_and_rest(np.float32(np.nan))).all()
