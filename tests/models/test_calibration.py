"""90 % intervals hold the truth nine times in ten, on data simulated from the prior of each model.

Two models whose posteriors are known to be near normal, so that what is tested is the machinery and no approximation:
rates that belong to all cells (their posterior is a gamma, of hundreds of counts), and a state of each cell with known
loadings. Training is by minibatches, as ever: a plate that is scaled wrongly gives intervals that are too wide or too
narrow by the square root of that.
"""

from __future__ import annotations

import anndata
import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import Gamma, Normal
from pyro.nn import PyroSample
from scipy import stats

import pyrocell
from pyrocell import CellModel, TrainingPlan
from pyrocell.data import Counts
from pyrocell.distributions import Poisson

N_DRAWS = 1000
# Of 1,200 truths a calibrated interval holds 90 % within 1.7 points, at two standard errors.
LEAST, MOST = 0.87, 0.93


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


class GeneRates(CellModel):
    """Counts of each gene are Poisson with one rate for all cells, which has a gamma prior: conjugate."""

    counts = Counts()
    population_share = 1.0

    def __init__(self, adata):
        super().__init__(adata)
        self.rate = PyroSample(Gamma(2.0, 1.0).expand([self.data.size("counts")]).to_event(1))

    def model(self, cells):
        rate = self.rate
        with self.plate(cells):
            fn = Poisson(rate).to_event(1)
            with pyro.poutine.scale(scale=self.population_share):
                pyro.sample("x", fn, obs=cells.counts)


class StateOfCells(CellModel):
    """Each cell has a state that raises some genes and lowers others, by loadings that are known."""

    counts = Counts()
    latent_site = "z"
    prior_sd = 1.0

    def __init__(self, adata, loadings):
        super().__init__(adata)
        self.loadings = torch.tensor(loadings, dtype=torch.float32)

    def model(self, cells):
        with self.plate(cells):
            z = pyro.sample("z", Normal(torch.zeros(1), self.prior_sd).to_event(1))
            pyro.sample("x", Poisson(log_rate=1.5 + z * self.loadings).to_event(1), obs=cells.counts)


def anndata_of(counts):
    adata = anndata.AnnData(counts.astype(np.float32))
    adata.obs_names = [f"c{i}" for i in range(adata.n_obs)]
    adata.var_names = [f"g{i}" for i in range(adata.n_vars)]
    return adata


def fit(model, **options):
    """Train to rest: with large steps first, then with small ones; the widths of a guide come to rest last."""
    for lr, n_epochs in ((0.05, 60), (0.02, 150), (0.005, 50), (0.001, 50)):
        plan = TrainingPlan(eps=1e-8, weight_decay=0.0)
        model.train(n_epochs, lr=lr, n_epochs_kl_warmup=0, plan=plan, **options)
    return model


def rates_and_draws(seed, model_class=GeneRates):
    rng = np.random.default_rng(seed)
    rate = rng.gamma(2.0, 1.0, 300)
    counts = rng.poisson(rate, (200, 300))
    counts[counts.sum(1) == 0, 0] = 1
    pyrocell.settings.seed = seed
    adata = anndata_of(counts)
    model_class.setup_anndata(adata)
    model = fit(model_class(adata), batch_size=100, train_size=1.0)
    draws = model.posterior("rate", n_samples=N_DRAWS, return_mean=False)
    return rate, draws, counts


def states_and_draws(seed, model_class=StateOfCells):
    rng = np.random.default_rng(seed)
    loadings = rng.normal(0, 0.5, 30)
    z = rng.normal(0, 1, 300)
    counts = rng.poisson(np.exp(1.5 + z[:, None] * loadings))
    pyrocell.settings.seed = seed
    adata = anndata_of(counts)
    model_class.setup_anndata(adata)
    model = fit(model_class(adata, loadings=loadings), batch_size=150)
    return z, model.posterior("z", n_samples=N_DRAWS, return_mean=False)[..., 0], counts


def coverage(simulate, model_class, seeds):
    inside = []
    for seed in seeds:
        truth, draws, _ = simulate(seed, model_class)
        lower, upper = np.quantile(draws, [0.05, 0.95], axis=0)
        inside.append((lower <= truth) & (truth <= upper))
    return float(np.concatenate(inside).mean())


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "seed", 0)


@pytest.mark.slow
def test_the_posterior_of_rates_is_the_conjugate_one():
    _, draws, counts = rates_and_draws(0)
    exact = stats.gamma(2 + counts.sum(0), scale=1 / (1 + len(counts)))
    assert np.abs((draws.mean(0) - exact.mean()) / exact.std()).max() < 0.5
    np.testing.assert_allclose((draws.std(0) / exact.std()).mean(), 1, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("simulate", "model_class"), [(rates_and_draws, GeneRates), (states_and_draws, StateOfCells)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(simulate, model_class):
    assert LEAST <= coverage(simulate, model_class, range(4)) <= MOST


class SharesOfRates(GeneRates):
    """A defect: a cell counts as one of a minibatch of 50, not of 200."""

    population_share = 0.25


class NarrowPrior(StateOfCells):
    """A defect: states vary less than they do."""

    prior_sd = 0.1


class DoubleCounting(GeneRates):
    """A defect: every count is seen twice."""

    population_share = 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("simulate", "broken"),
    [(rates_and_draws, SharesOfRates), (rates_and_draws, DoubleCounting), (states_and_draws, NarrowPrior)],
)
def test_defects_are_noticed(simulate, broken):
    assert not LEAST <= coverage(simulate, broken, range(1)) <= MOST
