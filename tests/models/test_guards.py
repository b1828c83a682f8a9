"""Defects that once gave wrong numbers without a word, each with the test that would have seen it."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import scanpy as sc
import torch
from pyro.distributions import Delta, Gamma, Normal, Poisson
from pyro.nn import PyroSample

import pyrocell
from pyrocell import SCVI, CellModel
from pyrocell.data import Counts, synthetic_iid
from pyrocell.errors import DataError, QueryError, SetupError, TrainingError
from pyrocell.infer.elbo import Elbo
from tests.infer.toys import plate, toy_cells
from tests.models.zoo import PoissonFactors


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)


@pytest.fixture
def adata():
    return synthetic_iid(n_cells=120, n_genes=20, label_effect=1.0, seed=5)


def fit(adata, model_class=SCVI, setup=None, epochs=3, **options):
    model_class.setup_anndata(adata, **(setup or {}))
    model = model_class(adata, **options)
    model.train(epochs)
    return model


def test_all_genes_in_another_order_keep_their_names(adata):
    model = fit(adata)
    names = list(adata.var_names)
    straight, reverse = (model.get_normalized_expression(gene_list=order) for order in (names, names[::-1]))
    np.testing.assert_allclose(reverse[names], straight, rtol=1e-5)


def test_features_of_a_site_without_features_are_refused(adata):
    model = fit(adata, n_latent=5)
    with pytest.raises(QueryError, match="'z' has no features"):
        model.posterior("z", features=list(adata.var_names[:5]))


def test_two_covariates_of_one_field_are_both_set(adata):
    adata.obs["score"] = np.random.default_rng(0).normal(size=adata.n_obs)
    model = fit(adata, setup={"continuous_covariate_keys": ["age", "score"]})
    both, last = (model.posterior("rho", given=given) for given in ({"age": 80, "score": 2}, {"score": 2}))
    assert not np.allclose(both, last)
    np.testing.assert_array_equal(both, model.posterior("rho", given={"score": 2, "age": 80}))


def test_bound_of_an_automatic_guide_is_its_loss(adata):
    model = fit(adata, PoissonFactors)
    cells = model.dataset.cells(np.arange(50))
    with model.asking():
        terms = model.elbo()(cells)
    assert terms.elbo.item() == pytest.approx(terms.loss.item(), rel=1e-5)
    whole, blocks = (model.get_elbo(batch_size=size) for size in (119, 10))
    assert blocks == pytest.approx(whole, rel=0.05)  # draws differ; counting a global term B times gave 70 %


def test_automatic_guide_of_a_positive_latent_keeps_the_jacobian():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))

    def model(cells):
        w = pyro.sample("w", Gamma(2.0, 1.0))
        with plate(cells):
            pyro.sample("x", Normal(w, 1.0), obs=cells.x)

    def guide(cells):  # what AutoNormal does: a Gaussian on the log scale, and its transform
        u = pyro.sample("u", Normal(1.1, 0.1), infer={"is_auxiliary": True})
        pyro.sample("w", Delta(u.exp(), log_density=-u))

    torch.manual_seed(0)
    ours = Elbo(model, guide)(toy_cells(x)).loss.item() * len(x)
    torch.manual_seed(0)
    assert ours == pytest.approx(pyro.infer.Trace_ELBO().loss(model, guide, toy_cells(x)), rel=1e-5)


def test_penalty_in_the_guide_counts():
    x = torch.zeros(4)

    def model(cells):
        with plate(cells):
            z = pyro.sample("z", Normal(0.0, 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=cells.x)

    def guide(penalty):
        def run(cells):
            with plate(cells):
                pyro.sample("z", Normal(torch.zeros(4), 1.0))
                pyro.factor("penalty", torch.full((4,), penalty), has_rsample=True)

        return run

    losses = []
    for penalty in (0.0, 3.0):
        torch.manual_seed(0)
        losses.append(Elbo(model, guide(penalty))(toy_cells(x)).loss.item())
    assert losses[1] - losses[0] == pytest.approx(3.0, rel=1e-5)


def test_data_changed_under_the_model_are_noticed(adata):
    model = fit(adata)
    adata._inplace_subset_obs(np.arange(50, 120))
    with pytest.raises(DataError, match="has changed since the model was made"):
        model.differential_expression(groupby="label")


def test_counts_normalised_in_place_are_noticed(adata):
    model = fit(adata)
    sc.pp.normalize_total(adata, target_sum=1e4)
    with pytest.raises(DataError, match="normalised in place"):
        model.get_elbo()


def test_parameters_of_cells_are_not_given_to_other_cells(adata):
    model = fit(adata, PoissonFactors)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    with pytest.raises(QueryError, match="these cells in their order"):
        model.posterior("z", adata[order].copy())
    np.testing.assert_allclose(
        model.posterior("z", indices=order, n_samples=400),
        model.posterior("z", n_samples=400)[order],
        atol=0.2,
    )


def test_all_draws_of_a_global_site_are_given(adata):
    model = fit(adata, PoissonFactors)
    draws = model.posterior("loadings", n_samples=5000, return_mean=False)
    assert draws.shape == (5000, 3, 20)
    assert len(np.unique(draws[:, 0, 0])) > 4900


def test_latent_library_is_a_mean_not_a_draw(adata):
    model = fit(adata, gene_likelihood="nb", use_observed_lib_size=False)
    draws = model.posterior("size", n_samples=3000, return_mean=True)
    np.testing.assert_allclose(model.get_latent_library_size(), draws, rtol=0.1)


def test_mean_of_the_normal_likelihood_is_mu(adata):
    model = fit(adata, gene_likelihood="normal")
    mean = model.get_likelihood_parameters()["mean"]
    np.testing.assert_allclose(mean, model.posterior("mu"), rtol=1e-5)
    with pytest.raises(QueryError, match="library_size"):
        model.get_normalized_expression(library_size=1e4)


def test_every_target_batch_counts_whatever_the_list_is(adata):
    model = fit(adata, setup={"batch_key": "batch"})
    names = ["batch_0", "batch_1"]
    lists = [
        model.get_feature_correlation_matrix(transform_batch=kind(names)) for kind in (list, tuple, np.array)
    ]
    assert all(table.equals(lists[0]) for table in lists)
    assert not lists[0].equals(model.get_feature_correlation_matrix(transform_batch="batch_0"))


def test_impossible_sizes_are_named(adata):
    with pytest.raises(SetupError, match="n_hidden is 0"):
        fit(adata, n_hidden=0)
    with pytest.raises(SetupError, match="drop one of the two"):
        fit(adata, setup={"size_factor_key": "size_factor"}, use_observed_lib_size=False)
    with pytest.raises(TypeError, match=r"SCVI: .*'n_latnt'.*It takes adata, n_hidden, n_latent"):
        SCVI(adata, n_latnt=3)


def test_text_in_place_of_data_gets_a_hint(adata):
    with pytest.raises(QueryError, match="groupby='label'"):
        fit(adata).differential_expression("label")


class Clash(CellModel):
    """Gives a part the name of a field."""

    counts = Counts()

    def __init__(self, adata):
        super().__init__(adata)
        self.counts = PyroSample(Poisson(1.0))


def test_a_part_with_the_name_of_a_field_is_refused(adata):
    Clash.setup_anndata(adata)
    with pytest.raises(TypeError, match="'counts' is a field of Clash"):
        Clash(adata)


def test_bound_lies_below_the_likelihood(adata):
    """Sees a KL term that is halved, which no comparison of the model with itself can see."""
    model = fit(adata, epochs=40, n_latent=2)
    elbo, marginal = model.get_elbo(), model.get_marginal_ll(n_samples=2000)
    reconstruction = -model.get_reconstruction_error()
    assert elbo < marginal
    mean, variance = model.get_latent_representation(return_dist=True)
    kl = 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(1).mean()
    assert reconstruction - elbo == pytest.approx(kl, rel=1e-3)


def test_a_refused_training_leaves_the_split_as_it_was(adata):
    model = fit(adata)
    before = model.train_indices, model.validation_indices
    with pytest.raises(TrainingError, match="max_epochs is 0"):
        model.train(0, train_size=0.5)
    assert all(
        np.array_equal(*pair)
        for pair in zip(before, (model.train_indices, model.validation_indices), strict=True)
    )
