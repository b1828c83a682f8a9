"""The standard normal prior."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.kl import kl_divergence

from pyrocell.distributions import StandardNormal


def test_it_is_a_normal_vector() -> None:
    prior = StandardNormal(4)
    reference = dist.Normal(torch.zeros(4), torch.ones(4)).to_event(1)
    assert prior.event_shape == (4,)
    assert prior.batch_shape == ()
    assert prior.has_rsample
    z = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prior.log_prob(z), reference.log_prob(z))
    wide = prior.expand((7,))
    assert wide.sample().shape == (7, 4)
    torch.testing.assert_close(wide.log_prob(z), reference.log_prob(z))
    assert wide.mean.shape == wide.variance.shape == (7, 4)


def test_divergence_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    loc, scale = torch.randn(7, 4, generator=generator), torch.rand(7, 4, generator=generator) + 0.1
    posterior = dist.Normal(loc, scale).to_event(1)
    reference = kl_divergence(posterior, dist.Normal(torch.zeros(7, 4), torch.ones(7, 4)).to_event(1))
    torch.testing.assert_close(kl_divergence(posterior, StandardNormal(4).expand((7,))), reference)
    torch.testing.assert_close(kl_divergence(posterior, StandardNormal(4)), reference)


def test_values_of_any_type_are_scored() -> None:
    z = torch.zeros(2, 4, dtype=torch.float64, device="cpu")
    assert StandardNormal(4).log_prob(z).dtype == torch.float64
    assert StandardNormal(4).log_prob(torch.empty(2, 4, device="meta")).device.type == "meta"
    assert StandardNormal(4, device="cpu").sample().shape == (4,)
