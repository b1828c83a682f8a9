"""Sums over discrete sites against sums written out, and against exact evidences."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Categorical, MixtureSameFamily, Normal
from torch import nn

from pyrocell.errors import TrainingError
from pyrocell.infer.draws import Drawer
from pyrocell.infer.effects import Warmup, kl_weighted
from pyrocell.infer.elbo import Elbo
from pyrocell.infer.likelihood import log_importance, log_marginal
from tests.infer.toys import plate, toy_cells

CLASSES = SimpleNamespace(
    prior=torch.tensor([0.5, 0.3, 0.2]).log(),
    mean=torch.tensor([-2.0, 0.0, 3.0]),
    slope=torch.tensor([1.0, -0.5, 0.2]),
)
ENUMERATE = {"enumerate": "parallel"}


@pytest.fixture
def x() -> torch.Tensor:
    return 2 * torch.randn(12, generator=torch.Generator().manual_seed(0))


class Labels(nn.Module):
    """y -> u -> z -> x in the model, z -> y -> u in the guide, and a decoder that counts what it is asked."""

    def __init__(self, infer=ENUMERATE):
        super().__init__()
        self.infer, self.decoded = infer, []
        self.scale = nn.Parameter(torch.tensor(0.7))

    def decode(self, z):
        self.decoded.append(tuple(z.shape))
        return torch.tanh(z)

    def prior(self, u, y):
        return Normal(CLASSES.mean[y] + CLASSES.slope[y] * u, 0.8)

    def classes(self, z):
        return Categorical(logits=torch.stack([-0.5 * z, 0.1 + 0 * z, z], dim=-1))

    def within(self, z, y):
        return Normal(CLASSES.slope[y] * z, 0.5 + 0.1 * y)

    def model(self, cells):
        with plate(cells):
            y = pyro.sample("y", Categorical(logits=CLASSES.prior))
            u = pyro.sample("u", Normal(0.0, 1.0))
            z = pyro.sample("z", self.prior(u, y))
            pyro.sample("x", Normal(self.decode(z), 1.0), obs=cells.x)

    def guide(self, cells):
        with plate(cells):
            z = pyro.sample("z", Normal(0.4 * cells.x, self.scale))
            y = pyro.sample("y", self.classes(z), infer=self.infer)
            pyro.sample("u", self.within(z, y))

    def explicit(self, cells, weight, weight_y):
        """Loss of each cell, class by class, at the draws that the present random state leads to."""
        trace = poutine.trace(poutine.enum(self.guide, first_available_dim=-2)).get_trace(cells)
        z, u = trace.nodes["z"]["value"], trace.nodes["u"]["value"]
        q = self.classes(z).logits.softmax(-1)
        loss = -Normal(self.decode(z), 1.0).log_prob(cells.x)
        loss = loss + weight * Normal(0.4 * cells.x, self.scale).log_prob(z)
        for c in range(3):
            label = torch.tensor(c)
            kl_u = torch.distributions.kl_divergence(
                self.within(z, label), torch.distributions.Normal(0.0, 1.0)
            )
            log_prior_z = self.prior(u[c], label).log_prob(z)
            loss = loss + q[:, c] * (
                weight * (kl_u - log_prior_z) + weight_y * (q[:, c].log() - CLASSES.prior[c])
            )
        return loss


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("opts_in", [False, True])
def test_guide_classes_are_summed_explicitly(x, weight, opts_in):
    """Also with a class-dependent prior of z; only an enumerated site that asks for it warms up."""
    toy = Labels(ENUMERATE | {"warmup": True} if opts_in else ENUMERATE)
    elbo = Elbo(toy.model, toy.guide)
    for rows in (range(12), range(4)):
        cells = toy_cells(x, rows)
        torch.manual_seed(3)
        terms = elbo(cells, weight)
        torch.manual_seed(3)
        exact = toy.explicit(cells, weight, weight if opts_in else 1.0)
        assert terms.loss.item() == pytest.approx(exact.mean().item(), rel=1e-5)
        torch.manual_seed(3)
        plain = toy.explicit(cells, 1.0, 1.0)
        assert torch.allclose(terms.reconstruction + terms.kl_local, plain.detach(), rtol=1e-5)
        assert terms.reconstruction.shape == terms.kl_local.shape == (len(cells),)
    assert set(terms.sites) == {"x", "y", "u", "z"}


def test_gradients_are_those_of_the_explicit_sum(x):
    toy = Labels()
    cells = toy_cells(x)
    torch.manual_seed(3)
    Elbo(toy.model, toy.guide)(cells, 0.3).loss.backward()
    ours, toy.scale.grad = toy.scale.grad, None
    torch.manual_seed(3)
    toy.explicit(cells, 0.3, 1.0).mean().backward()
    assert torch.allclose(ours, toy.scale.grad, rtol=1e-5)


def test_what_does_not_depend_on_the_class_is_computed_once(x):
    toy = Labels()
    Elbo(toy.model, toy.guide)(toy_cells(x))
    assert toy.decoded == [(12,)]


class Exact(nn.Module):
    """y ~ Categorical, z ~ Normal(m_y, 1), x ~ Normal(z, 1), with the exact posterior as guide: y, then z."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.0))

    def model(self, cells):
        with plate(cells):
            y = pyro.sample("y", Categorical(logits=CLASSES.prior))
            z = pyro.sample("z", Normal(CLASSES.mean[y] + self.shift, 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=cells.x)

    def joint(self, x):
        return CLASSES.prior + Normal(CLASSES.mean, 2**0.5).log_prob(x.unsqueeze(-1))

    def guide(self, cells):
        with plate(cells):
            y = pyro.sample("y", Categorical(logits=self.joint(cells.x)), infer=ENUMERATE)
            pyro.sample("z", Normal((CLASSES.mean[y] + cells.x) / 2, 0.5**0.5))


def test_the_exact_posterior_gives_the_log_evidence(x):
    toy = Exact()
    cells = toy_cells(x.repeat(4000))
    torch.manual_seed(0)
    loss = Elbo(toy.model, toy.guide)(cells).loss.item()
    assert loss == pytest.approx(-toy.joint(x).logsumexp(-1).mean().item(), abs=0.015)


def test_a_latent_whose_prior_the_model_mixes(x):
    """The class is in the model alone: its sum is the density of the mixture, also half way through the warm-up."""

    class Mixed(nn.Module):
        def __init__(self, mixture):
            super().__init__()
            self.mixture, self.scale = mixture, nn.Parameter(torch.tensor(0.7))

        def model(self, cells):
            with plate(cells):
                if self.mixture:
                    components = Normal(CLASSES.mean, 0.8)
                    z = pyro.sample("z", MixtureSameFamily(Categorical(logits=CLASSES.prior), components))
                else:
                    k = pyro.sample("k", Categorical(logits=CLASSES.prior), infer=ENUMERATE)
                    z = pyro.sample("z", Normal(CLASSES.mean[k], 0.8))
                pyro.sample("x", Normal(z, 1.0), obs=cells.x)

        def guide(self, cells):
            with plate(cells):
                pyro.sample("z", Normal(0.4 * cells.x, self.scale))

    found = []
    for mixture in (True, False):
        toy = Mixed(mixture)
        torch.manual_seed(3)
        terms = Elbo(toy.model, toy.guide)(toy_cells(x, range(5)))
        terms.loss.backward()
        found.append((terms.loss.item(), terms.kl_local, terms.reconstruction, toy.scale.grad))
    for summed, written in zip(*found, strict=True):
        assert torch.allclose(torch.as_tensor(summed), torch.as_tensor(written), rtol=1e-5)


def test_a_class_of_all_cells_is_refused(x):
    def model(cells):
        k = pyro.sample("k", Categorical(logits=CLASSES.prior), infer=ENUMERATE)
        with plate(cells):
            pyro.sample("x", Normal(CLASSES.mean[k], 1.0), obs=cells.x)

    with pytest.raises(TrainingError, match="'k'.*outside the plate"):
        Elbo(model, lambda cells: None)(toy_cells(x))


def test_warm_up_skips_a_class_unless_it_asks(x):
    def program(cells):
        with plate(cells):
            pyro.sample("k", Categorical(torch.ones(2)), infer=ENUMERATE)
            pyro.sample("y", Categorical(torch.ones(2)), infer=ENUMERATE | {"warmup": True})

    with Warmup(0.5):
        trace = poutine.trace(program).get_trace(toy_cells(x))
    assert {name: float(trace.nodes[name]["scale"]) for name in "ky"} == {"k": 1.0, "y": 0.5}


# ------------------------------------------------------------------------------------------------ draws, likelihood


def test_draws_take_one_class_each():
    toy = Exact()
    cells = toy_cells(torch.tensor([-1.0, 1.4]))
    torch.manual_seed(0)
    [draws] = Drawer(toy.model, toy.guide).block(cells, ["y", "z"], n_samples=20_000)
    assert draws["y"].value.shape == (20_000, 2)
    frequency = torch.stack([(draws["y"].value == c).float().mean(0) for c in range(3)], -1)
    assert torch.allclose(frequency, toy.joint(cells.x).softmax(-1), atol=0.015)
    of_class = draws["z"].value[:, 1][draws["y"].value[:, 1] == 2]
    assert of_class.mean().item() == pytest.approx((3.0 + 1.4) / 2, abs=0.03)


def test_marginal_likelihood_with_classes_drawn_by_the_guide(x):
    toy = Labels()
    toy.scale.data.fill_(3.0)  # importance sampling wants a guide wider than the posterior
    toy.within = lambda z, y: Normal(0.0 * z + 0.0 * y, 1.2)
    torch.manual_seed(0)
    found = log_marginal(Drawer(toy.model, toy.guide), toy_cells(x), n_samples=20_000)
    grid = torch.linspace(-15, 15, 3001)
    # u is integrated out by hand: z | y ~ Normal(mean, sqrt(0.8^2 + slope^2))
    components = Normal(CLASSES.mean, (0.64 + CLASSES.slope**2).sqrt())
    prior = MixtureSameFamily(Categorical(logits=CLASSES.prior), components).log_prob(grid)
    joint = prior + Normal(torch.tanh(grid), 1.0).log_prob(x[:, None])
    exact = joint.logsumexp(-1) + math.log(0.01)
    assert torch.allclose(found, exact, atol=0.05)


def test_marginal_likelihood_with_classes_of_the_model_alone(x):
    toy = Exact()

    def model(cells):
        with plate(cells):
            k = pyro.sample("k", Categorical(logits=CLASSES.prior), infer=ENUMERATE)
            z = pyro.sample("z", Normal(CLASSES.mean[k], 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=cells.x)

    def guide(cells):
        with plate(cells):
            pyro.sample("z", Normal(cells.x / 2, 1.5))

    torch.manual_seed(0)
    found = log_marginal(Drawer(model, guide), toy_cells(x), n_samples=40_000)
    assert torch.allclose(found, toy.joint(x).logsumexp(-1), atol=0.05)


def test_importance_weights_follow_the_guide_from_draw_to_draw():
    """q(u | z, y) is asked at the draw's own z and y: with the exact posterior all weights are alike."""
    toy = Exact()
    drawer = Drawer(toy.model, toy.guide)
    cells = toy_cells(torch.tensor([0.3, -1.2]))
    torch.manual_seed(0)
    [draws] = drawer.block(cells, ["y", "z"], n_samples=300)
    latents = {name: site.value.flatten() for name, site in draws.items()}
    anchors = [
        (toy_cells(cells.x[i : i + 1]), toy.joint(cells.x[i : i + 1]).logsumexp(-1).squeeze()) for i in (0, 1)
    ]
    weights = log_importance(drawer, latents, anchors, [cells])
    assert torch.allclose(weights, weights[0].expand(600), atol=1e-4)


def test_classes_of_the_model_alone_are_drawn_given_all_else():
    """Not from their prior: p(k | z) of a mixture, whose observation does not depend on k given z."""
    x = torch.tensor([-1.0, 1.4])

    def model(cells):
        with plate(cells):
            k = pyro.sample("k", Categorical(logits=CLASSES.prior), infer=ENUMERATE)
            j = pyro.sample("j", Categorical(torch.tensor([0.3, 0.7])), infer=ENUMERATE)
            z = pyro.sample("z", Normal(CLASSES.mean[k] + 2.0 * j, 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=cells.x)

    def guide(cells):
        with plate(cells):
            pyro.sample("z", Normal(cells.x, 1e-4))

    drawer = Drawer(model, guide, classes_of_model_alone=True)
    torch.manual_seed(0)
    [draws] = drawer.block(toy_cells(x), ["k", "j", "z"], n_samples=20_000)
    log_p = CLASSES.prior[:, None] + torch.tensor([0.3, 0.7]).log()
    log_p = log_p + Normal(CLASSES.mean[:, None] + torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None, None])
    exact = log_p.flatten(1).softmax(-1).reshape(2, 3, 2)
    for k in range(3):
        for j in range(2):
            found = ((draws["k"].value == k) & (draws["j"].value == j)).float().mean(0)
            assert torch.allclose(found, exact[:, k, j], atol=0.015)
    assert draws["z"].value.shape == (20_000, 2)


def test_a_latent_that_does_not_see_the_class_beside_a_prior_that_does(x):
    """The ordinary mixture autoencoder: y, then z whatever y; the closed form of its KL has the classes in it."""

    class Factorised(Exact):
        def guide(self, cells):
            with plate(cells):
                pyro.sample(
                    "y",
                    Categorical(logits=torch.stack([-cells.x, 0 * cells.x, cells.x], -1)),
                    infer=ENUMERATE,
                )
                pyro.sample("z", Normal(0.6 * cells.x, 0.7))

    toy, cells = Factorised(), toy_cells(x)
    torch.manual_seed(0)
    found = Elbo(toy.model, toy.guide)(toy_cells(x.repeat(3000))).loss.item()
    q = torch.stack([-x, 0 * x, x], -1).log_softmax(-1)
    posterior = Normal(0.6 * x, 0.7)
    kl_z = torch.stack(
        [torch.distributions.kl_divergence(posterior, Normal(m, 1.0)) for m in CLASSES.mean], -1
    )
    expected = -Normal(0.6 * x, 1.0).log_prob(x) + 0.5 * 0.7**2
    exact = expected + (q.exp() * (kl_z + q - CLASSES.prior)).sum(-1)
    assert found == pytest.approx(exact.mean().item(), abs=0.02)
    assert len(cells) == 12


def test_a_weight_of_the_kl_holds_where_nothing_warms_up(x):
    losses = []
    for weight in (1.0, 0.0):
        toy = Labels(ENUMERATE | kl_weighted(weight))
        torch.manual_seed(3)
        losses.append(Elbo(toy.model, toy.guide)(toy_cells(x)).loss.item())
    torch.manual_seed(3)
    toy = Labels()
    assert losses[1] == pytest.approx(toy.explicit(toy_cells(x), 1.0, 0.0).mean().item(), rel=1e-5)
    assert losses[0] != pytest.approx(losses[1])


def test_importance_weights_look_through_masks():
    """Half of the cells lack a latent's data: its density at a draw counts in them all the same."""
    generator = torch.Generator().manual_seed(1)
    x, seen = torch.randn(8, generator=generator), torch.arange(8) % 2 == 0

    class Masked(nn.Module):
        def __init__(self, masked):
            super().__init__()
            self.masked = masked

        def hide(self, fn, cells):
            return fn.mask(seen[cells.rows]) if self.masked else fn

        def model(self, cells):
            with plate(cells):
                z = pyro.sample("z", Normal(torch.zeros(()), 1.0))
                b = pyro.sample("b", self.hide(Normal(z, 1.0), cells))
                pyro.sample("x", Normal(z + 0 * b, 1.0), obs=cells.x)

        def guide(self, cells):
            with plate(cells):
                z = pyro.sample("z", Normal(0.5 * cells.x + 0.5, 0.8))
                pyro.sample("b", self.hide(Normal(z, 1.0), cells))

    found = []
    for masked in (True, False):
        toy = Masked(masked)
        latents = {name: torch.randn(50, generator=torch.Generator().manual_seed(2)) for name in ("z", "b")}
        anchors = [(toy_cells(x, [i]), torch.zeros(())) for i in range(8)]
        found.append(log_importance(Drawer(toy.model, toy.guide), latents, anchors, [toy_cells(x)]))
    torch.testing.assert_close(*found)


def test_posterior_of_classes_of_the_model_alone():
    """Exact marginals of each of two classes; draws of all else alike are draws of their own."""
    x = torch.tensor([-1.0, 1.4])

    def model(cells):
        with plate(cells):
            k = pyro.sample("k", Categorical(logits=CLASSES.prior), infer=ENUMERATE)
            j = pyro.sample("j", Categorical(torch.tensor([0.3, 0.7])), infer=ENUMERATE)
            pyro.sample("x", Normal(CLASSES.mean[k] + 2.0 * j, 1.0), obs=cells.x)

    drawer = Drawer(model, lambda cells: None, classes_of_model_alone=True)
    log_p = CLASSES.prior[:, None] + torch.tensor([0.3, 0.7]).log()
    log_p = log_p + Normal(CLASSES.mean[:, None] + torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None, None])
    exact = log_p.flatten(1).softmax(-1).reshape(2, 3, 2)
    for n_samples in (1, 5):
        found = drawer.class_probabilities(toy_cells(x), n_samples=n_samples)
        assert torch.allclose(found["k"], exact.sum(2), atol=1e-6)
        assert torch.allclose(found["j"], exact.sum(1), atol=1e-6)
    torch.manual_seed(0)
    [draws] = drawer.block(toy_cells(x), ["k"], n_samples=20_000)
    frequency = torch.stack([(draws["k"].value == k).float().mean(0) for k in range(3)], -1)
    assert torch.allclose(frequency, exact.sum(2), atol=0.015)
