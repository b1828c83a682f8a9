"""Networks of accessibility models: what enters, what comes out, which regions are computed."""

from __future__ import annotations

import torch

from pyrocell.nn import (
    Covariates,
    DepthEncoder,
    GaussianEncoder,
    RegionDecoder,
    RegionEncoder,
    select_features,
)


def test_variance_of_the_encoder_has_a_low_floor_and_no_relu():
    torch.manual_seed(0)
    encoder = RegionEncoder(30, 3, 8, n_layers=2, batch_norm=False, layer_norm=True, transform=None)
    with torch.no_grad():
        encoder.log_variance.weight.zero_()
        encoder.log_variance.bias.fill_(-11.0)
    posterior = encoder(torch.ones(4, 30)).base_dist
    torch.testing.assert_close(
        posterior.scale.square(), torch.full((4, 3), torch.exp(torch.tensor(-11.0)) + 1e-6)
    )
    assert [type(part).__name__ for part in encoder.mlp.layers[0].after[:2]] == ["LayerNorm", "LeakyReLU"]
    assert (GaussianEncoder.smallest_variance, GaussianEncoder.activation) == (1e-4, torch.nn.ReLU)


def test_decoder_reads_covariates_and_computes_chosen_regions():
    torch.manual_seed(0)
    covariates = Covariates(sizes=(2, 3), n_continuous=1, inject=False)
    decoder = RegionDecoder(3, 20, 8, covariates=covariates)
    z, batch, other = torch.randn(5, 4, 3), torch.tensor([0, 1, 0, 1]), torch.tensor([[0], [1], [2], [0]])
    age = torch.randn(4, 1)
    logits = decoder(z, batch, other, age)
    assert logits.shape == (5, 4, 20)
    for changed in ((1 - batch, other, age), (batch, (other + 1) % 3, age), (batch, other, age + 1)):
        assert not torch.allclose(decoder(z, *changed), logits)
    with select_features(decoder, [7, 2], "accessibility"):
        torch.testing.assert_close(decoder(z, batch, other, age), logits[..., [7, 2]])
    with select_features(decoder, [7, 2], "counts"):
        assert decoder(z, batch, other, age).shape == (5, 4, 20)


def test_depth_is_one_number_a_cell():
    torch.manual_seed(0)
    encoder = DepthEncoder(30, 8, covariates=Covariates(sizes=(2,)))
    x, batch = torch.randint(0, 2, (4, 30)).float(), torch.tensor([0, 1, 0, 1])
    assert encoder(x, batch).shape == (4, 1)
    assert not torch.allclose(encoder(x, batch), encoder(x, 1 - batch))
    assert DepthEncoder(30, 8)(x).shape == (4, 1)
