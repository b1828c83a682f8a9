"""SCVI: options, numerics, and recovery of a simulated truth."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import cross_val_predict

import pyrocell
from pyrocell import SCANVI, SCVI
from pyrocell.data import simulate_scvi, synthetic_iid
from pyrocell.errors import QueryError, SetupError
from pyrocell.infer.effects import Warmup
from pyrocell.nn import DecoderOutput

LABELS = {"batch_key": "batch", "labels_key": "label", "unlabeled_category": "label_0"}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)


def make(adata, model_class=SCVI, setup=None, **options):
    model_class.setup_anndata(adata, **({"batch_key": "batch"} if setup is None else setup))
    return model_class(adata, **options)


@pytest.fixture(scope="module")
def small():
    return synthetic_iid(n_cells=200, n_genes=40, label_effect=1.0, seed=3)


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dispersion", "cell"),
        ("gene_likelihood", "gauss"),
        ("latent_distribution", "x"),
        ("batch_representation", "y"),
    ],
)
def test_unknown_options_are_named(small, option, value):
    with pytest.raises(SetupError, match=f"{option} is '{value}'; expected one of"):
        make(small, **{option: value})


def test_label_dispersion_needs_labels(small):
    with pytest.raises(SetupError, match="labels_key"):
        make(small, dispersion="gene-label")


@pytest.mark.parametrize(
    ("dispersion", "shape"),
    [("gene", (40,)), ("gene-batch", (2, 40)), ("gene-label", (3, 40)), ("gene-cell", None)],
)
def test_dispersions(small, dispersion, shape):
    model = make(small, setup={"batch_key": "batch", "labels_key": "label"}, dispersion=dispersion)
    found = dict(model.module.named_parameters()).get("log_theta")
    assert (None if found is None else tuple(found.shape)) == shape
    model.train(1)
    theta = model.get_likelihood_parameters()["theta"]
    of_group = {"gene-batch": "batch", "gene-label": "label"}.get(dispersion)
    if of_group:
        first = [theta[small.obs[of_group] == level][0] for level in small.obs[of_group].cat.categories[:2]]
        assert not np.allclose(*first)
        assert all(
            len(np.unique(theta[small.obs[of_group] == g][:, 0])) == 1 for g in small.obs[of_group].unique()
        )
    elif dispersion == "gene":
        assert (theta == theta[0]).all()
    else:
        assert len(np.unique(theta[:, 0])) > 100


def test_target_batch_uses_its_own_dispersion(small):
    model = make(small, dispersion="gene-batch", gene_likelihood="nb")
    model.train(1)
    rows = np.flatnonzero(small.obs["batch"] == "batch_0")[:2]
    with model.asking():
        cells = model.dataset.cells(rows)
        [draws] = model.drawer().block(
            cells, ["x"], counterfactuals=[cells.replace(batch=torch.ones(2, dtype=torch.int64))]
        )
    assert torch.allclose(draws["x"].fn.parameters_table["theta"][0, 0], model.log_theta[1].exp())


def test_only_the_heads_in_use_are_built(small):
    assert make(small, gene_likelihood="nb").decoder.zero_inflation is None
    assert make(small, gene_likelihood="nb").decoder.dispersion is None
    assert make(small, gene_likelihood="zinb").decoder.zero_inflation is not None


def test_library_kl_is_never_warmed_up(small):
    model = make(small, use_observed_lib_size=False)
    cells = model.dataset.cells(np.arange(8))
    with model.running(), Warmup(0.25):
        trace = pyro.poutine.trace(model.guide).get_trace(cells)
    scale = {name: float(trace.nodes[name]["scale"]) * 8 / cells.n_total for name in ("z", "library")}
    assert scale == pytest.approx({"z": 0.25, "library": 1.0})


def test_elbo_terms_against_float64(small):
    """Reconstruction and KL recomputed with NumPy and scipy in float64, from the same draw of z."""
    model = make(small, gene_likelihood="zinb")
    model.train(2)
    cells = model.dataset.cells(np.arange(16))
    with model.asking(seed=5):
        terms = model.elbo()(cells)
    with model.asking(seed=5):
        posterior = model.drawer().guide_latents(cells)["z"]
    with model.asking(seed=5):
        z = posterior.sample()
        out = model.decoder.heads(z, cells.batch, cells.categorical_covariates, cells.continuous_covariates)
    rho = np.exp(out.log_rho.double().numpy())
    mu, theta = rho * cells.library.double().numpy(), np.exp(model.log_theta.detach().double().numpy())
    pi = 1 / (1 + np.exp(-out.zi_logits.double().numpy()))
    x = cells.counts.double().numpy()
    nb = stats.nbinom.pmf(x, theta, theta / (theta + mu))
    expected = -np.log(np.where(x == 0, pi + (1 - pi) * nb, (1 - pi) * nb)).sum(1)
    np.testing.assert_allclose(terms.reconstruction.numpy(), expected, rtol=2e-5)
    mean, sd = posterior.mean.double().numpy(), posterior.variance.double().numpy() ** 0.5
    kl = (0.5 * (sd**2 + mean**2 - 1) - np.log(sd)).sum(1)
    np.testing.assert_allclose(terms.kl_local.numpy(), kl, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gene_likelihood": "nb"},
        {"gene_likelihood": "zinb", "dispersion": "gene-batch"},
        {"gene_likelihood": "poisson", "use_observed_lib_size": False},
        {"gene_likelihood": "nb", "dispersion": "gene-cell"},
        {"model_class": SCANVI, "dispersion": "gene-label", "setup": LABELS},
    ],
    ids=str,
)
def test_the_loop_over_logits_gives_the_step_of_log_means(small, options, monkeypatch):
    model = make(small, **options)
    cells = model.dataset.cells(np.arange(40))

    def step():
        pyro.set_rng_seed(3)
        with model.running():
            terms = model.elbo()(cells)
        parameters = dict(model.module.named_parameters())
        slopes = torch.autograd.grad(terms.loss, list(parameters.values()), allow_unused=True)
        drawn = torch.rand(3)  # what comes next
        return terms, {name: v for name, v in zip(parameters, slopes, strict=True) if v is not None}, drawn

    one, slopes, drawn = step()
    monkeypatch.setattr(DecoderOutput, "log_mean", lambda self, log_size: self.log_rho + log_size)
    other, expected, drawn_then = step()
    assert torch.equal(drawn, drawn_then)
    torch.testing.assert_close(one.reconstruction, other.reconstruction, rtol=1e-6, atol=0)
    assert torch.equal(one.kl_local, other.kl_local)
    assert slopes.keys() == expected.keys()
    assert {"decoder.scale.weight", "encoder.mean.weight"} < slopes.keys()
    for name, slope in slopes.items():
        assert (slope - expected[name]).abs().max() <= 2e-5 * expected[name].abs().max() + 1e-5, name


# ------------------------------------------------------------------------------------------------ questions


@pytest.fixture(scope="module")
def fitted():
    adata = synthetic_iid(n_cells=300, n_genes=50, label_effect=1.0, seed=4)
    pyrocell.settings.progress = False
    model = make(
        adata,
        setup={
            "batch_key": "batch",
            "categorical_covariate_keys": ["donor"],
            "continuous_covariate_keys": ["age"],
        },
    )
    model.train(5)
    return model


def test_expression_has_names_order_and_scale(fitted):
    table = fitted.get_normalized_expression(indices=[5, 2, 9], library_size=1e4)
    adata = fitted.dataset.adata
    assert list(table.index) == list(adata.obs_names[[5, 2, 9]]) and list(table.columns) == list(
        adata.var_names
    )
    np.testing.assert_allclose(table.sum(1), 1e4, rtol=1e-5)
    mask = np.zeros(adata.n_obs, dtype=bool)
    mask[[2, 5, 9]] = True
    assert set(fitted.get_normalized_expression(indices=mask).index) == set(table.index)


def test_latent_scale_gives_expected_counts(fitted):
    table = fitted.get_normalized_expression(library_size="latent")
    totals = np.asarray(fitted.dataset.adata.X.sum(1)).ravel()
    np.testing.assert_allclose(table.sum(1), totals, rtol=1e-4)
    np.testing.assert_array_equal(fitted.get_latent_library_size().ravel(), totals)


def test_some_genes_equal_the_same_of_all(fitted):
    genes = list(fitted.dataset.adata.var_names[[7, 3, 20]])
    some = fitted.get_normalized_expression(gene_list=genes, batch_size=50, n_samples=3)
    everything = fitted.get_normalized_expression(batch_size=50, n_samples=3)
    np.testing.assert_allclose(some, everything[genes], rtol=2e-5)
    counts = fitted.posterior_predictive_sample(gene_list=genes, n_samples=2, batch_size=50)
    np.testing.assert_array_equal(
        counts, fitted.posterior_predictive_sample(n_samples=2, batch_size=50)[..., [7, 3, 20]]
    )


def test_unknown_names_are_refused_with_what_is_meant(fitted):
    with pytest.raises(QueryError, match=r"no features 'gene_x'"):
        fitted.get_normalized_expression(gene_list=["gene_x"])
    with pytest.raises(QueryError, match=r"single string"):
        fitted.get_normalized_expression(gene_list="gene_1")
    with pytest.raises(QueryError, match=r"no site 'rhoo'.*Did you mean 'rho'"):
        fitted.posterior("rhoo")
    with pytest.raises(QueryError, match=r"batch='lane9'"):
        fitted.get_normalized_expression(transform_batch="lane9")
    with pytest.raises(QueryError, match=r"without a field 'lane'"):
        fitted.posterior("rho", given={"lane": "a"})
    with pytest.raises(QueryError, match=r"indices has 300"):
        fitted.get_elbo(indices=[300])
    with pytest.raises(QueryError, match=r"indices is a mask"):
        fitted.get_elbo(indices=np.ones(3, dtype=bool))
    with pytest.raises(QueryError, match=r"positions \(integers\)"):
        fitted.get_elbo(indices=["cell_1"])


def test_several_target_batches_are_the_mean_after_decoding_and_encode_once(fitted, monkeypatch):
    each = [fitted.posterior("rho", given={"batch": b}, batch_size=100) for b in ("batch_0", "batch_1")]
    calls = []
    encode = fitted.encoder.forward
    monkeypatch.setattr(fitted.encoder, "forward", lambda *a: calls.append(1) or encode(*a))
    both = fitted.get_normalized_expression(
        transform_batch=["batch_0", "batch_1"], batch_size=100, return_numpy=True
    )
    assert len(calls) == 3
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, rtol=1e-5)
    assert not np.allclose(each[0], each[1])


def test_any_covariate_can_be_given(fitted):
    donor = fitted.posterior("rho", given={"donor": fitted.data.levels("categorical_covariates")[0][0]})
    old, young = (fitted.posterior("rho", given={"age": age}) for age in (80, 20))
    assert not np.allclose(old, young) and donor.shape == old.shape
    other = fitted.posterior("rho", given={"batch": "batch_1", "age": [20, 80]})
    assert other.shape == old.shape


def test_guide_sees_the_cell_as_measured(fitted):
    plain, moved = (fitted.posterior("z", given=given) for given in (None, {"batch": "batch_1"}))
    np.testing.assert_array_equal(plain, moved)


def test_draws_and_their_mean(fitted):
    draws = fitted.posterior("rho", n_samples=7, return_mean=False, batch_size=64)
    assert draws.shape == (7, 300, 50)
    np.testing.assert_allclose(fitted.posterior("rho", n_samples=7, batch_size=64), draws.mean(0), rtol=1e-5)
    assert not np.allclose(draws[0], draws[1])
    assert np.array_equal(draws, fitted.posterior("rho", n_samples=7, return_mean=False, batch_size=64))
    other = fitted.posterior("rho", n_samples=7, return_mean=False, batch_size=64, seed=1)
    assert not np.array_equal(draws, other)


def test_latent_moments_are_those_of_the_draws(fitted):
    mean, variance = fitted.get_latent_representation(return_dist=True)
    draws = fitted.posterior("z", n_samples=2000, return_mean=False, indices=[0, 1])
    np.testing.assert_allclose(draws.mean(0), mean[:2], atol=5 * np.sqrt(variance[:2].max() / 2000))
    np.testing.assert_allclose(draws.var(0), variance[:2], rtol=0.3)


def test_marginal_likelihood_grows_with_draws_and_beats_the_bound(fitted):
    elbo = fitted.get_elbo(return_mean=False)
    one, many = (fitted.get_marginal_ll(n_samples=m, indices=np.arange(100)) for m in (1, 200))
    assert many > one and many > elbo[:100].mean()
    assert fitted.get_reconstruction_error() < -fitted.get_elbo()


def test_correlation_matrix(fitted):
    table = fitted.get_feature_correlation_matrix(n_samples=3)
    assert table.shape == (50, 50) and list(table.index) == list(fitted.dataset.adata.var_names)
    np.testing.assert_allclose(np.diag(table), 1.0)
    np.testing.assert_allclose(table, table.T)
    pearson = fitted.get_feature_correlation_matrix(correlation_type="pearson", n_samples=3)
    assert not np.allclose(table, pearson)


def test_predictive_check_is_calibrated_after_fitting():
    model = make(simulate_scvi(n_cells=500, n_genes=60, seed=1), gene_likelihood="nb")
    model.train(60)
    check = model.posterior_predictive_check(n_samples=20)
    assert check.summary["pearson_log_mean"] > 0.98
    assert check.summary["coverage_90"] == pytest.approx(0.9, abs=0.06)


# ------------------------------------------------------------------------------------------------ recovery

THRESHOLDS = {
    "correlation of log rho": (0.95, 1),
    "median error of log theta": (0.2, -1),
    "R2 of true z": (0.85, 1),
    "batch accuracy": (0.6, -1),  # a correct model has up to 0.55, one blind to the batch 0.99
    "held-out likelihood": (0.01, -1),
}


def recovery(model, adata):
    """Measure what spec 5.1 (i) asks for."""
    frequent = np.asarray(adata.X.mean(0)).ravel() >= 0.5
    expression = model.get_normalized_expression(n_samples=10, return_numpy=True)
    log_hat, log_true = np.log(expression[:, frequent]), np.log(adata.layers["rho"][:, frequent])
    z = model.get_latent_representation()
    batch = cross_val_predict(LogisticRegression(max_iter=500), z, adata.obs["batch"], cv=5)
    held_out = model.validation_indices
    x = adata.X[held_out].toarray()
    mu = adata.layers["rho"][held_out] * x.sum(1, keepdims=True)
    theta = adata.var["theta"].to_numpy()
    oracle = stats.nbinom.logpmf(x, theta, theta / (theta + mu)).sum(1).mean()
    log_theta = model.log_theta.detach().numpy() if hasattr(model, "log_theta") else np.zeros(adata.n_vars)
    return {
        "correlation of log rho": np.mean(
            [np.corrcoef(a, b)[0, 1] for a, b in zip(log_hat, log_true, strict=True)]
        ),
        "median error of log theta": np.median(np.abs(log_theta - np.log(theta))[frequent]),
        "R2 of true z": LinearRegression().fit(z, adata.obsm["z"]).score(z, adata.obsm["z"]),
        "batch accuracy": balanced_accuracy_score(adata.obs["batch"], batch),
        "held-out likelihood": (oracle + model.get_reconstruction_error(indices=held_out)) / abs(oracle),
    }


def failures(found):
    return [name for name, (limit, sign) in THRESHOLDS.items() if not sign * found[name] >= sign * limit]


class BlindToBatch(SCVI):
    """Defect: the decoder is not told the batch."""

    def model(self, cells):
        super().model(cells.replace(batch=torch.zeros_like(cells.batch)))


class NoLibrary(SCVI):
    """Defect: every cell is taken to have the same size."""

    def _log_size(self, cells):
        return cells.library.log().mean().expand(len(cells), 1)


def fit(adata, model_class=SCVI, **options):
    pyrocell.settings.seed = options.pop("seed", 0)
    try:
        model = make(adata, model_class, **({"gene_likelihood": "nb"} | options))
    finally:
        pyrocell.settings.seed = 0
    model.train(200)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recovery(seed):
    adata = simulate_scvi(seed=seed)
    found = recovery(fit(adata, seed=seed), adata)
    assert not failures(found), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "caught_by"),
    [(BlindToBatch, "batch accuracy"), (NoLibrary, "held-out likelihood")],
)
def test_defects_are_caught(defect, caught_by):
    adata = simulate_scvi(seed=0)
    assert caught_by in failures(recovery(fit(adata, defect), adata))


@pytest.mark.slow
def test_latent_library_is_recovered():
    adata = simulate_scvi(seed=0)
    model = fit(adata, use_observed_lib_size=False)
    error = np.log(model.get_latent_library_size().ravel()) - np.log(adata.obs["library"])
    assert np.abs(error).mean() <= 0.1


class NegatedInflation(SCVI):
    """Defect: the logit of dropping out is taken for that of not dropping out."""

    def _likelihood(self, cells, out, log_size):
        out.zi_logits = -out.zi_logits
        return super()._likelihood(cells, out, log_size)


def inflation_auc(model, adata):
    frequent = np.asarray(adata.X.mean(0)).ravel() >= 2
    with model.asking():
        cells = model.dataset.cells(np.arange(1000))
        z = model.drawer().guide_latents(cells)["z"].mean
        pi = model.decoder.heads(z, cells.batch).zi_logits.sigmoid().mean(0).numpy()
    return roc_auc_score(adata.var["pi"][frequent] > 0, pi[frequent])


@pytest.mark.slow
def test_zero_inflation_is_found_and_its_sign_matters():
    adata = simulate_scvi(seed=0, zero_inflation=0.2)
    assert inflation_auc(fit(adata, gene_likelihood="zinb"), adata) >= 0.9
    assert inflation_auc(fit(adata, NegatedInflation, gene_likelihood="zinb"), adata) < 0.5
