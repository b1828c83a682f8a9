"""The normaliser of a softmax over all features, where some are asked for: exact, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pyrocell.distributions.elementary import exp_of_negative
from pyrocell.nn import FeatureLinear, ProfileDecoder, select_features
from pyrocell.nn.normaliser import largest_and_sum


def log_sum_exp(x):
    largest, total = largest_and_sum(x)
    return largest + total.log()


def test_the_exponential_is_right_to_single_precision():
    x = np.linspace(-87, 0, 20_001, dtype=np.float32)
    found = np.array([exp_of_negative(value) for value in x], dtype=np.float64)
    np.testing.assert_allclose(found, np.exp(x.astype(np.float64)), rtol=3e-7)
    assert exp_of_negative(np.float32(-1e30)) < 2e-38
    assert np.isnan(exp_of_negative(np.float32(np.nan)))


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000, 8000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 1e4])
def test_values_of_any_size_and_number(n, spread):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n)) * spread + 3 * spread
    largest, total = largest_and_sum(x)
    assert torch.equal(largest, x.amax(-1, keepdim=True))
    wanted = logsumexp(x.double().numpy(), axis=-1, keepdims=True)
    np.testing.assert_allclose(total, np.exp(wanted - largest.double().numpy()), rtol=5e-7)
    np.testing.assert_allclose(log_sum_exp(x), wanted, rtol=1.2e-7, atol=2e-7)


def test_extremes():
    huge = torch.tensor([[3e38, 1.0, -3e38], [-3e38, -3e38, -3e38], [0.0, -1e4, -1e4]])
    np.testing.assert_allclose(log_sum_exp(huge)[:, 0].numpy(), [3e38, -3e38, 0.0])
    assert torch.isnan(log_sum_exp(torch.tensor([[0.0, torch.nan, 1.0]]))).all()
    assert log_sum_exp(torch.zeros(0, 5)).shape == (0, 1)


def test_gradients_and_other_precisions_take_the_plain_way():
    x = torch.randn(3, 70, dtype=torch.float64)
    assert torch.allclose(log_sum_exp(x)[:, 0], x.logsumexp(-1), rtol=1e-12)
    x = torch.randn(3, 70, requires_grad=True)
    log_sum_exp(x).sum().backward()
    assert torch.allclose(x.grad, x.detach().softmax(-1), atol=1e-6)
    turned = torch.randn(70, 3).T  # not contiguous
    torch.testing.assert_close(
        log_sum_exp(turned)[:, 0].double(), turned.double().logsumexp(-1), rtol=2e-7, atol=2e-7
    )


def test_the_default_type_is_not_looked_at():
    x = torch.randn(4, 70, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    wanted = largest_and_sum(x)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = largest_and_sum(x)
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("n_genes", [50, 2500])
def test_chosen_features_are_those_of_all(n_genes):
    torch.manual_seed(0)
    decoder = ProfileDecoder(6, n_genes, 32).eval()
    z = 3 * torch.randn(2, 900, 6)
    chosen = [n_genes - 1, 0, 7]
    with torch.no_grad():
        whole = decoder(z)[..., chosen]
        with select_features(decoder, chosen):
            some, log_some = decoder(z), decoder.log_profile(z)
        exact = decoder.scale(decoder.hidden(z)).double().softmax(-1)[..., chosen]
    assert some.shape == (2, 900, 3)
    torch.testing.assert_close(some, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_some, whole.log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(some.double(), exact, rtol=1e-6, atol=0)


def test_the_products_are_never_whole(monkeypatch):
    """Cells by genes are never stored: at most 2^20 numbers at once."""
    seen = []

    def watched(x):
        seen.append(x.numel())
        return largest_and_sum(x)

    monkeypatch.setattr("pyrocell.nn.features.largest_and_sum", watched)
    layer = FeatureLinear(4, 5000)
    with torch.no_grad(), select_features(layer, [3]):
        layer.softmax(torch.randn(1000, 4))
    assert len(seen) > 1
    assert max(seen) <= 2**20
