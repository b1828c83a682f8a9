"""Encoder and decoder: laws, heads, numerics, and computing only some features."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.nn import PyroModule
from torch.nn import functional

from pyrocell.distributions import NonZeros, SoftmaxMean, log1p_counts
from pyrocell.nn import Covariates, FeatureLinear, GaussianEncoder, ProfileDecoder, select_features


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_encoder_returns_a_normal_whose_variance_is_exp_plus_floor():
    encoder = GaussianEncoder(12, 3, 8).eval()
    x = torch.randint(0, 20, (5, 12)).float()
    posterior = encoder(x)
    assert encoder.n_latent == 3
    assert (posterior.batch_shape, posterior.event_shape) == ((5,), (3,))
    hidden = encoder.mlp(torch.log1p(x))
    torch.testing.assert_close(posterior.mean, encoder.mean(hidden))
    torch.testing.assert_close(posterior.variance, encoder.log_variance(hidden).exp() + 1e-4)


@pytest.mark.parametrize(("bias", "log_variance"), [(1e6, 12.0), (-1e6, -12.0)])
def test_encoder_survives_extreme_log_variances(bias, log_variance):
    encoder = GaussianEncoder(12, 3, 8)
    encoder.log_variance.bias.data.fill_(bias)
    posterior = encoder(torch.ones(5, 12))
    expected = torch.tensor(log_variance).exp() + 1e-4
    torch.testing.assert_close(posterior.variance, expected.expand(5, 3))
    posterior.rsample().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_encoder_takes_covariates_and_another_transform():
    encoder = GaussianEncoder(
        4, 2, 8, n_batch=3, covariates=Covariates((2,), 1), transform=None, batch_norm=False, layer_norm=True
    ).eval()
    batch, categorical = torch.tensor([0, 1, 2]), torch.tensor([[0], [1], [1]])
    x = torch.randn(1, 4).expand(3, 4)
    means = encoder(x, batch, categorical, torch.zeros(3, 1)).mean
    assert not torch.allclose(means[0], means[1])
    assert encoder(torch.randn(6, 3, 4), batch, categorical, torch.zeros(3, 1)).batch_shape == (6, 3)
    plain = GaussianEncoder(4, 2, 8).eval()
    squared = GaussianEncoder(4, 2, 8, transform=torch.square).eval()
    squared.load_state_dict(plain.state_dict())
    x = torch.rand(3, 4)
    torch.testing.assert_close(squared(x.log1p().sqrt()).mean, plain(x).mean)


@pytest.mark.parametrize(
    "transform", [None, log1p_counts, torch.log1p, lambda x: x / x.sum(-1, keepdim=True)]
)
def test_an_encoder_reads_an_index_as_it_reads_the_counts(transform):
    encoder = GaussianEncoder(12, 3, 8, transform=transform).eval()
    x = torch.eye(4, 12)
    index = NonZeros.of(x)
    index.are_few = True
    torch.testing.assert_close(encoder(index).mean, encoder(x).mean)


def test_encoder_in_half_precision_gives_a_float32_posterior():
    encoder = GaussianEncoder(4, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(torch.ones(3, 4)).mean.dtype == torch.float32


def test_softmax_profile_sums_to_one_and_depends_on_the_batch():
    decoder = ProfileDecoder(3, 2500, 8, 2).eval()
    z = torch.randn(4, 6, 3)
    rho = decoder(z, torch.zeros(6, dtype=torch.int64))
    assert rho.shape == (4, 6, 2500)
    torch.testing.assert_close(rho.sum(-1), torch.ones(4, 6))
    other = decoder(z, torch.ones(6, dtype=torch.int64))
    assert not torch.allclose(rho, other)
    torch.testing.assert_close(decoder.log_profile(z, torch.ones(6, dtype=torch.int64)).exp(), other)


def test_log_profile_is_exact_where_the_fraction_underflows():
    decoder = ProfileDecoder(3, 4, 8)
    decoder.scale.weight.data.zero_()
    decoder.scale.bias.data = torch.tensor([0.0, -200.0, -300.0, 0.0])
    log_rho = decoder.log_profile(torch.randn(2, 3))[0].double()
    expected = torch.log_softmax(decoder.scale.bias.detach().double(), dim=0)
    torch.testing.assert_close(log_rho, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [-300.0, -15.001, -14.999, 0.0, 50.0, 1e4])
def test_softplus_profile_keeps_log_and_gradient_over_extreme_ranges(value):
    decoder = ProfileDecoder(3, 2, 8, profile="softplus")
    decoder.scale.weight.data.zero_()
    decoder.scale.bias.data.fill_(value)
    log_rho = decoder.log_profile(torch.randn(2, 3))
    exact = torch.nn.functional.softplus(torch.tensor(value, dtype=torch.float64), threshold=700).log()
    assert abs(log_rho[0, 0].item() - exact.item()) <= 1e-6 * max(1.0, abs(exact.item()))
    log_rho.sum().backward()
    assert decoder.scale.bias.grad.isfinite().all()
    slope = (
        torch.tensor(value, dtype=torch.float64).sigmoid() / exact.exp() if value > -100 else exact * 0 + 1
    )
    torch.testing.assert_close(decoder.scale.bias.grad[0].double() / 2, slope.double(), rtol=1e-4, atol=0)


def test_only_the_heads_asked_for_are_built():
    plain = ProfileDecoder(3, 5, 8)
    z = torch.randn(4, 3)
    out = plain.heads(z)
    assert out.log_theta is None
    assert out.zi_logits is None
    assert sum(isinstance(m, FeatureLinear) for m in plain.modules()) == 1
    full = ProfileDecoder(3, 5, 8, heads=("dispersion", "zero_inflation")).eval()
    out = full.heads(z)
    hidden = full.hidden(z)
    torch.testing.assert_close(out.log_rho, full.log_profile(z))
    torch.testing.assert_close(out.log_theta, full.dispersion(hidden))
    torch.testing.assert_close(out.zi_logits, full.zero_inflation(hidden))


@pytest.mark.parametrize("profile", ["softmax", "softplus", "identity"])
def test_log_means_of_counts(profile, monkeypatch):
    decoder = ProfileDecoder(3, 50, 8, profile=profile).eval()
    z, log_size = torch.randn(2, 4, 3), torch.randn(4, 1) + 7
    asked = []
    log_softmax = functional.log_softmax
    monkeypatch.setattr(functional, "log_softmax", lambda *a, **b: asked.append(1) or log_softmax(*a, **b))
    out = decoder.heads(z)
    mean = out.log_mean(log_size)
    assert not asked
    if profile == "softmax":
        assert isinstance(mean, SoftmaxMean)
        assert mean.shape == (2, 4, 50)
        mean = mean.log_mean
    assert torch.equal(mean, out.log_rho + log_size)
    assert torch.equal(out.log_rho, decoder.log_profile(z))
    assert len(asked) == (2 if profile == "softmax" else 0)  # once for all of them, once for log_profile
    with select_features(decoder, [3, 1]):
        some = decoder.heads(z)
    assert torch.equal(some.log_mean(log_size), some.log_rho + log_size)
    assert some.log_rho.shape == (2, 4, 2)


def test_identity_profile_is_unconstrained():
    decoder = ProfileDecoder(3, 5, 8, profile="identity").eval()
    z = torch.randn(4, 3)
    torch.testing.assert_close(decoder(z), decoder.scale(decoder.hidden(z)))
    torch.testing.assert_close(decoder.heads(z).log_rho, decoder(z))


def test_decoder_takes_all_covariates_and_embedded_batches():
    decoder = ProfileDecoder(3, 5, 8, 4, n_layers=2, covariates=Covariates((2, 3), 1, embedding_dim=5)).eval()
    assert decoder.mlp.embedding.shape == (4, 5)
    n = 6
    given = [torch.randn(2, n, 3), torch.randint(4, (n,)), torch.randint(2, (n, 2)), torch.randn(n, 1)]
    rho = decoder(*given)
    assert rho.shape == (2, n, 5)
    decoder.mlp.embedding.data.mul_(3)
    assert not torch.allclose(rho, decoder(*given))
    for i in (1, 2, 3):
        changed = given.copy()
        changed[i] = 1 - changed[i].clamp(max=1)
        assert not torch.allclose(decoder(*given), decoder(*changed))


@pytest.mark.parametrize("profile", ["softmax", "softplus", "identity"])
@pytest.mark.parametrize("index", [[3], [7, 2, 2999, 7], list(range(3000))])
def test_chosen_features_equal_the_full_computation(profile, index):
    decoder = ProfileDecoder(3, 3000, 8, 2, profile=profile, heads=("dispersion", "zero_inflation")).eval()
    decoder.scale.bias.data.mul_(10)
    z, batch = torch.randn(2, 4, 3), torch.tensor([0, 1, 1, 0])
    full, rho = decoder.heads(z, batch), decoder(z, batch)
    with select_features(decoder, index), torch.no_grad():
        some, some_rho = decoder.heads(z, batch), decoder(z, batch)
    torch.testing.assert_close(some_rho, rho[..., index], rtol=1e-6, atol=1e-6)
    for name in ("log_rho", "log_theta", "zi_logits"):
        part, whole = getattr(some, name), getattr(full, name)
        torch.testing.assert_close(part, whole[..., index], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(decoder(z, batch), rho)


def test_selection_nests_and_is_restored_after_an_error():
    layer = FeatureLinear(2, 6)
    h = torch.randn(3, 2)
    with select_features(layer, [0, 1, 2]):
        with select_features(layer, torch.tensor([5])):
            assert layer(h).shape == (3, 1)
            torch.testing.assert_close(layer(h), (h @ layer.weight + layer.bias)[:, [5]])
            with select_features(layer, None):
                assert layer(h).shape == (3, 6)
        assert layer(h).shape == (3, 3)
        with pytest.raises(RuntimeError, match="stop"), select_features(layer, [1]):
            raise RuntimeError("stop")
        assert layer(h).shape == (3, 3)
    assert layer.selected is None
    with pytest.raises(ValueError, match="from 0 to 5"), select_features(layer, [6]):
        pass
    assert layer.selected is None


def test_selected_features_store_no_full_matrix():
    decoder = ProfileDecoder(3, 5000, 8).eval()
    shapes: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.append(out.shape)
            return out

    with torch.no_grad(), select_features(decoder, [1, 2]), Watch():
        decoder(torch.randn(1000, 3))
    assert (1000, 2) in shapes
    assert max(math.prod(shape) for shape in shapes) <= 2**20 < 1000 * 5000


def test_blocks_work_inside_a_pyro_module():
    class Holder(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = GaussianEncoder(5, 2, 4)
            self.decoder = ProfileDecoder(2, 5, 4)

        def forward(self, x):
            z = pyro.sample("z", self.encoder(x))
            with select_features(self, [0, 1]):
                return self.decoder(z)

    pyro.nn.module.to_pyro_module_(holder := Holder())
    assert holder(torch.ones(3, 5)).shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "match"), [({"profile": "exp"}, "profile"), ({"heads": ("scale",)}, "heads")]
)
def test_unknown_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ProfileDecoder(2, 5, **options)
