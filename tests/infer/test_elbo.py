"""The objective against closed forms."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal
from torch import nn

from pyrocell.errors import TrainingError
from pyrocell.infer.effects import Warmup
from pyrocell.infer.elbo import Elbo
from tests.infer.toys import Conjugate, plate, toy_cells


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(12, generator=torch.Generator().manual_seed(0))


def test_exact_posterior_gives_the_log_evidence(x):
    toy = Conjugate(0.3)
    values = [Elbo(toy.model, toy.guide)(toy_cells(x)).loss.item() for _ in range(1000)]
    error = 4 * torch.tensor(values).std().item() / math.sqrt(len(values))
    assert abs(sum(values) / len(values) + toy.log_evidence(x).mean().item()) < error + 1e-6


def test_minibatches_are_unbiased_for_all_cells(x):
    toy = Conjugate(0.3, exact=False)
    whole, parts = [], []
    for _ in range(600):
        whole.append(Elbo(toy.model, toy.guide)(toy_cells(x)).loss.item())
        losses = [
            Elbo(toy.model, toy.guide)(toy_cells(x, rows)).loss.item() for rows in (range(6), range(6, 12))
        ]
        parts.append(sum(losses) / 2)
    assert sum(whole) / 600 == pytest.approx(sum(parts) / 600, abs=0.06)


def test_loss_is_per_cell_whatever_the_number_of_cells(x):
    toy = Conjugate(0.3, exact=False)
    torch.manual_seed(1)
    once = Elbo(toy.model, toy.guide)(toy_cells(x)).kl_local.mean()
    twice = Elbo(toy.model, toy.guide)(toy_cells(torch.cat([x, x]))).kl_local.mean()
    assert once.item() == pytest.approx(twice.item(), rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_warmup_weighs_the_kl_and_nothing_else(x, weight):
    toy = Conjugate(0.3, exact=False)
    torch.manual_seed(1)
    terms = Elbo(toy.model, toy.guide)(toy_cells(x), weight)
    expected = terms.reconstruction.mean() + weight * terms.kl_local.mean()
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert terms.kl_local.mean() > 0


def test_warmup_on_one_side_only_is_wrong_without_a_closed_form(x):
    """The trap that the effect on both sides avoids: with a mixture prior there is no analytic KL."""
    prior = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.tensor([-1.0, 1.0]), torch.ones(2)))

    def model(cells):
        with plate(cells):
            z = pyro.sample("z", prior)
            pyro.sample("x", Normal(z, 1.0), obs=cells.x)

    toy = Conjugate()
    torch.manual_seed(1)
    terms = Elbo(model, toy.guide)(toy_cells(x), 0.1)
    assert terms.loss.item() == pytest.approx(
        (terms.reconstruction.mean() + 0.1 * terms.kl_local.mean()).item(), rel=1e-5
    )


def test_site_may_opt_out_of_warmup(x):
    def model(cells):
        with plate(cells):
            z = pyro.sample("z", Normal(0.0, 1.0), infer={"warmup": False})
            pyro.sample("x", Normal(z, 1.0), obs=cells.x)

    def guide(cells):
        with plate(cells):
            pyro.sample("z", Normal(cells.x, 1.0), infer={"warmup": False})

    terms = Elbo(model, guide)(toy_cells(x), 0.0)
    assert terms.loss.item() == pytest.approx(terms.elbo.item(), rel=1e-6)


def test_prior_on_a_latent_that_the_guide_draws_later_is_not_analytic(x):
    """Model u -> z, guide z -> u: the analytic KL of z given one draw of u would be biased."""

    def model(cells):
        with plate(cells):
            u = pyro.sample("u", Normal(0.0, 1.0))
            z = pyro.sample("z", Normal(u, 0.5))
            pyro.sample("x", Normal(z, 1.0), obs=cells.x)

    def guide(cells):
        with plate(cells):
            z = pyro.sample("z", Normal(cells.x / 2, 0.7))
            pyro.sample("u", Normal(1.5 * z, 0.6))

    n = 200_000
    cells = toy_cells(torch.full((n,), 0.4))
    torch.manual_seed(0)
    mean = Elbo(model, guide)(cells).loss.item()
    # E_q over the linear Gaussian pair, term by term in closed form.
    m, v = 0.2, 0.49
    e_x = -0.5 * math.log(2 * math.pi) - 0.5 * ((0.4 - m) ** 2 + v)
    u_mean, u_var = 1.5 * m, 1.5**2 * v + 0.36
    e_u = -0.5 * math.log(2 * math.pi) - 0.5 * (u_mean**2 + u_var)
    difference_mean, difference_var = -0.5 * m, 0.25 * v + 0.36
    e_z = -0.5 * math.log(2 * math.pi * 0.25) - (difference_mean**2 + difference_var) / 0.5
    entropy = 0.5 * math.log(2 * math.pi * math.e * v) + 0.5 * math.log(2 * math.pi * math.e * 0.36)
    assert mean == pytest.approx(-(e_x + e_u + e_z + entropy), abs=0.02)


def test_enumerated_site_gives_the_exact_marginal(x):
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.3, -0.2]))

        def model(self, cells):
            with plate(cells):
                k = pyro.sample("k", Categorical(logits=self.logits), infer={"enumerate": "parallel"})
                pyro.sample("x", Normal(torch.tensor([-2.0, 1.0])[k], 1.0), obs=cells.x)

        def guide(self, cells):
            pass

    mixture = Mixture()
    loss = Elbo(mixture.model, mixture.guide)(toy_cells(x)).loss
    components = torch.distributions.Normal(torch.tensor([-2.0, 1.0]), 1.0).log_prob(x[:, None])
    exact = (components + mixture.logits.log_softmax(0)).logsumexp(1).mean()
    assert loss.item() == pytest.approx(-exact.item(), rel=1e-5)


def test_global_latents_count_once_for_all_cells(x):
    def model(cells):
        w = pyro.sample("w", Normal(0.0, 1.0))
        with plate(cells):
            pyro.sample("x", Normal(w, 1.0), obs=cells.x)

    def guide(cells):
        pyro.sample("w", Normal(0.7, 0.5))

    terms = Elbo(model, guide)(toy_cells(x, range(4)))
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.7, 0.5), torch.distributions.Normal(0.0, 1.0)
    )
    assert terms.kl_global.item() == pytest.approx(kl.item() / 12, rel=1e-6)
    assert terms.loss.item() == pytest.approx((terms.reconstruction.mean() + kl / 12).item(), rel=1e-6)


def test_no_host_synchronisation(x, monkeypatch):
    """The estimator is free of .item(), so that a device never waits for the host."""
    toy = Conjugate()
    elbo = Elbo(toy.model, toy.guide)
    elbo(toy_cells(x))  # the first call inspects the pair

    def refuse(*_):
        raise AssertionError("a tensor was read by the host")

    with pyro.validation_enabled(False):
        monkeypatch.setattr(torch.Tensor, "item", refuse)
        monkeypatch.setattr(torch.Tensor, "__bool__", refuse)
        monkeypatch.setattr(torch.Tensor, "__float__", refuse)
        elbo(toy_cells(x)).loss.backward()


def test_missing_latent_is_named(x):
    toy = Conjugate()
    with pytest.raises(TrainingError, match="'z'.*guide does not"):
        Elbo(toy.model, lambda cells: None)(toy_cells(x))


def test_extra_latent_is_named(x):
    toy = Conjugate()

    def guide(cells):
        toy.guide(cells)
        pyro.sample("extra", Normal(0.0, 1.0))

    with pytest.raises(TrainingError, match="'extra'.*model does not"):
        Elbo(toy.model, guide)(toy_cells(x))


def test_guide_with_rows_of_its_own_is_refused(x):
    toy = Conjugate()

    def guide(cells):
        with pyro.plate("cells", cells.n_total, subsample_size=len(cells), dim=-1):
            pyro.sample("z", Normal(torch.zeros(len(cells)), 1.0))

    torch.manual_seed(0)
    with pytest.raises(TrainingError, match="different cells"):
        Elbo(toy.model, guide)(toy_cells(x, range(4)))


def test_draws_without_gradient_are_refused(x):
    def model(cells):
        with plate(cells):
            k = pyro.sample("k", Categorical(torch.ones(2)))
            pyro.sample("x", Normal(k.float(), 1.0), obs=cells.x)

    def guide(cells):
        with plate(cells):
            pyro.sample("k", Categorical(torch.ones(2)))

    with pytest.raises(TrainingError, match="'k'.*no rsample"):
        Elbo(model, guide)(toy_cells(x))


def test_warmup_leaves_global_and_enumerated_sites_alone(x):
    weights = {}

    def program(cells):
        pyro.sample("w", Normal(0.0, 1.0))
        with plate(cells):
            pyro.sample("k", Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("z", Normal(0.0, 1.0))

    with Warmup(0.5):
        trace = pyro.poutine.trace(program).get_trace(toy_cells(x))
    for name in ("w", "k", "z"):
        weights[name] = float(trace.nodes[name]["scale"])
    assert weights == {"w": 1.0, "k": 1.0, "z": 0.5}
