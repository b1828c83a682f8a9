"""The kinetics of splicing against an integrator, also where rates are equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from pyrocell.nn import KineticDecoder, Rates, divided_difference, induction, repression

SETS = [
    (2.0, 0.7, 0.3),
    (2.0, 0.3, 0.7),
    (1.0, 0.5, 0.5),
    (1.0, 0.5, 0.5 + 1e-6),
    (3.0, 40.0, 0.01),
    (3.0, 0.01, 40.0),
]


def tensors(*values, dtype=torch.float64):
    return Rates(*(torch.tensor([value], dtype=dtype) for value in values))


def integrated(transcription, beta, gamma, start, time):
    def change(t, x):
        return [transcription(t) - beta * x[0], beta * x[0] - gamma * x[1]]

    return solve_ivp(change, (0, time), start, method="LSODA", rtol=1e-10, atol=1e-12).y[:, -1]


@pytest.mark.parametrize("values", SETS, ids=str)
@pytest.mark.parametrize("time", [1e-3, 0.4, 5.0, 20.0])
def test_induction_and_repression_solve_the_equations(values, time):
    rates, at = tensors(*values), torch.tensor([time], dtype=torch.float64)
    u, s = induction(rates, at)
    expected = integrated(lambda t: values[0], *values[1:], [0, 0], time)
    np.testing.assert_allclose([u.item(), s.item()], expected, rtol=1e-7, atol=1e-9)
    u, s = repression((u, s), rates, at)
    expected = integrated(lambda t: 0.0, *values[1:], expected, time)
    np.testing.assert_allclose([u.item(), s.item()], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kappa", [0.2, 0.7, 0.3, 5.0])
def test_transcription_that_changes(kappa):
    rates = tensors(3.0, 0.7, 0.3, 1.0, kappa)
    u, s = induction(rates, torch.tensor([4.0], dtype=torch.float64))
    expected = integrated(lambda t: 3 - 2 * np.exp(-kappa * t), 0.7, 0.3, [0, 0], 4.0)
    near = 1e-3 if kappa == 0.7 else 1e-7  # the rates are kept apart
    np.testing.assert_allclose([u.item(), s.item()], expected, rtol=near)


def test_single_precision_and_gradients_hold_where_rates_meet():
    beta, time = torch.full((5,), 0.5), torch.tensor([1e-4, 0.1, 1.0, 10.0, 20.0])
    gamma = torch.tensor([0.5, 0.5 + 1e-6, 0.5 - 1e-4, 0.51, 50.0], requires_grad=True)
    value = divided_difference(beta, gamma, time)
    double = gamma.detach().double().requires_grad_()
    exact = divided_difference(beta.double(), double, time.double())
    np.testing.assert_allclose(value.detach(), exact.detach(), rtol=2e-6)
    slopes = [torch.autograd.grad(x.sum(), by)[0] for x, by in ((value, gamma), (exact, double))]
    moved = [divided_difference(beta.double(), double.detach() + h, time.double()) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(slopes[1][3:], ((moved[0] - moved[1]) / 2e-5)[3:], rtol=1e-3)
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-4, atol=1e-7)
    assert torch.isfinite(slopes[0]).all()


@pytest.mark.parametrize("linear", [False, True])
def test_decoder_gives_fractions_and_concentrations(linear):
    decoder = KineticDecoder(3, 5, 8, linear=linear)
    for z in (torch.randn(4, 3), torch.randn(2, 4, 3), torch.randn(1, 3)):
        up, down = decoder(z)
        assert up.shape == down.shape == (*z.shape[:-1], 5)
        assert ((up > 0) & (up < 1) & (down > 0) & (down < 1)).all()
        c = decoder.concentration(z)
        assert c.shape == (*z.shape[:-1], 5, 4) and (c >= 1e-3).all()


def test_linear_repression_runs_against_induction():
    decoder = KineticDecoder(1, 3, 8, linear=True).eval()
    with torch.no_grad():
        decoder.weights.weight.fill_(1.0)
        up, down = decoder(torch.linspace(-2, 2, 7)[:, None])
    assert (up.diff(dim=0) > 0).all() and (down.diff(dim=0) < 0).all()
