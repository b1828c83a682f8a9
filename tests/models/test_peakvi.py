"""PEAKVI: its likelihood, its switches, its verbs, and what it recovers."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, roc_auc_score, silhouette_score

import pyrocell
from pyrocell import PEAKVI, DifferentialOptions, TrainingPlan
from pyrocell.data import prototype_cells
from pyrocell.distributions import NonZeros, counts
from pyrocell.errors import PyrocellWarning, QueryError, SetupError
from pyrocell.nn import products

N_REGIONS, WIDE = 40, 120


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simulate(seed=0, n_cells=2000, n_regions=400):
    """Four groups of cells in three dimensions, seen through depths, region factors and a shift of each batch."""
    draw = np.random.default_rng(seed)
    group, batch = draw.integers(4, size=n_cells), draw.integers(2, size=n_cells)
    corners = 2.5 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    z = corners[group] + draw.normal(0, 0.5, (n_cells, 3))
    weights, base = draw.normal(size=(3, n_regions)), draw.normal(-0.5, 1, n_regions)
    accessibility = sigmoid(z @ weights + base + draw.normal(0, 0.5, (2, n_regions))[batch])
    depth, region = draw.beta(5, 5, (n_cells, 1)), draw.beta(8, 2, n_regions)
    seen = draw.random((n_cells, n_regions)) < accessibility * depth * region
    adata = anndata.AnnData(sparse.csr_matrix(seen.astype(np.float32)))
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.var_names = [f"chr1:{1000 * j}-{1000 * j + 500}" for j in range(n_regions)]
    adata.obs["batch"], adata.obs["group"] = batch.astype(str), group.astype(str)
    return adata, {"accessibility": accessibility, "depth": depth[:, 0], "region": region, "group": group}


def small(seed=0, n_cells=240, n_regions=N_REGIONS):
    adata, _ = simulate(seed, n_cells, n_regions)
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy()


def make(adata=None, *, model_class=PEAKVI, train=True, **options):
    adata = small() if adata is None else adata
    model_class.setup_anndata(adata, batch_key="batch")
    model = model_class(adata, n_hidden=16, n_latent=3, **options)
    if train:
        model.train(8, lr=1e-2, n_epochs_kl_warmup=2)
    return model


@pytest.fixture(scope="module")
def fitted():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        model = make(small(0, 400, WIDE), train=False, kl_weight=0.2)
        model.train(60, lr=1e-2, n_epochs_kl_warmup=10, early_stopping=False)
    finally:
        pyrocell.settings.progress = before
    return model


# --------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("model_depth", [True, False], ids=["depth", "no depth"])
@pytest.mark.parametrize("region_factors", [True, False], ids=["regions", "no regions"])
def test_likelihood_is_that_of_the_three_factors(model_depth, region_factors):
    model = make(model_depth=model_depth, region_factors=region_factors)
    indices = np.arange(6)
    options = {"indices": indices, "n_samples": 1, "seed": 3}
    parts = [model.posterior(site, **options).astype(np.float64) for site in ("accessibility", "depth")]
    region = model.get_region_factors().astype(np.float64)
    assert (parts[1] == 1).all() != model_depth and (region == 1).all() != region_factors
    p = parts[0] * parts[1] * region
    x = model.dataset.cells(indices).accessibility.numpy()
    expected = -(x * np.log(p) + (1 - x) * np.log1p(-p)).sum(1)
    with model.asking(3):
        cells = model.dataset.cells(indices)
        got = model.drawer().block(cells, ["x"])[0]["x"].fn.log_prob(cells.accessibility)[0]
    np.testing.assert_allclose(-got.numpy(), expected, rtol=2e-5)


def test_default_widths_are_square_roots():
    model = make(train=False)
    assert PEAKVI.__signature__.parameters["n_hidden"].default is None
    adata, _ = simulate(n_cells=300, n_regions=400)
    PEAKVI.setup_anndata(adata)
    model = PEAKVI(adata)
    assert (model.encoder.mean.in_features, model.encoder.n_latent) == (20, 4)
    assert model.decoder.mlp.layers[0].linear.weight.shape == (4, 20)


def test_the_depth_of_a_cell_is_its_own():
    """The batch asked for changes what the decoder sees, not how deep the cell was sequenced."""
    model = make(encode_covariates=False)
    cells = prototype_cells(model.data, 4)
    one = model._depth_logits(cells)
    assert torch.equal(one, model._depth_logits(cells.replace(batch=1 - cells.batch)))
    changed = [
        model.posterior(site, given={"batch": "0"}, n_samples=1) for site in ("depth", "accessibility")
    ]
    plain = [model.posterior(site, given={"batch": "1"}, n_samples=1) for site in ("depth", "accessibility")]
    np.testing.assert_array_equal(changed[0], plain[0])
    assert np.abs(changed[1] - plain[1]).max() > 0


def test_the_first_layers_read_ones_alone(monkeypatch):
    model = make(train=False)
    read = []
    seen = products._nonzeros

    def spy(x, weight):
        found = seen(x, weight)
        read.append((x.n_columns if isinstance(x, NonZeros) else x.shape[-1], found is not None))
        return found

    monkeypatch.setattr(products, "_nonzeros", spy)
    monkeypatch.setattr(counts, "_FEW", 1.0)
    cells = next(model.dataset.minibatches(None, 32))
    assert NonZeros.known(cells.accessibility) is not None
    with model.running():
        model.elbo()(cells)
    assert [found for width, found in read if width == N_REGIONS] == [True, True]  # guide and depth


def test_kl_weight_enters_the_loss_and_not_what_is_reported():
    plain, light = make(train=False, kl_weight=1.0), make(train=False, kl_weight=0.25)
    assert make(train=False).constructor["kl_weight"] == 0.25
    light.module.load_state_dict(plain.module.state_dict())
    cells = plain.dataset.cells(np.arange(50))
    terms = []
    for model in (plain, light):
        with model.running(), torch.no_grad():
            torch.manual_seed(0)
            terms.append(model.elbo()(cells))
    one, quarter = terms
    assert torch.equal(one.elbo, quarter.elbo) and one.kl_local.mean() > 1e-3
    saved = 0.75 * one.kl_local.mean()
    assert quarter.loss.item() == pytest.approx((one.loss - saved).item(), rel=1e-6)
    plain.is_trained = light.is_trained = True
    assert plain.get_elbo() == light.get_elbo()
    assert plain.get_marginal_ll(n_samples=10) == light.get_marginal_ll(n_samples=10)


def test_early_stopping_watches_the_loss_that_is_trained(monkeypatch):
    """With a light KL the bound of weight one gets worse while the loss improves; the training goes on."""
    model = make(train=False, kl_weight=0.0)
    plan = TrainingPlan(optimizer="adamw", eps=1e-8, patience=3)
    model.train(40, lr=1e-2, n_epochs_kl_warmup=0, plan=plan, train_size=0.7)
    history = model.history
    best = int(history["reconstruction_validation"].idxmin())
    assert int(history["elbo_validation"].idxmin()) < best
    assert len(history) in (40, best + 4)


def test_training_habits():
    model = make(train=False)
    model.train(4)
    assert (model.history["lr"] == 1e-3).all() and "elbo_validation" in model.history
    assert model.history["kl_weight"].tolist() == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_weight": -1.0}, "kl_weight is -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight is nan"),
        ({"latent_distribution": "gamma"}, "latent_distribution is 'gamma'"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options, said):
    with pytest.raises(SetupError, match=said):
        make(train=False, **options)


def test_a_peak_that_is_never_open_gives_a_warning_and_a_fit():
    adata = small()
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(N_REGIONS) != 7))
    with pytest.warns(PyrocellWarning, match="1 of 40 regions.*chr1:7000-7500"):
        model = make(adata)
    assert np.isfinite(model.get_normalized_accessibility(return_numpy=True)).all()


# --------------------------------------------------------------------------------------------- the verbs


def test_accessibility_and_its_factors(fitted):
    table = fitted.get_normalized_accessibility()
    assert table.shape == (fitted.dataset.n_cells, WIDE)
    assert list(table.columns) == fitted.data.names("accessibility")
    assert list(table.index) == list(fitted.dataset.obs_names)
    values = table.to_numpy()
    assert ((values > 0) & (values < 1)).all()
    depth, region = fitted.get_library_size_factors(), fitted.get_region_factors()
    assert depth.shape == (fitted.dataset.n_cells,) and region.shape == (WIDE,)
    whole = fitted.get_normalized_accessibility(
        normalize_cells=True, normalize_regions=True, return_numpy=True
    )
    np.testing.assert_allclose(whole, values * depth[:, None] * region, rtol=1e-5)
    seen = fitted.dataset.cells(np.arange(fitted.dataset.n_cells)).accessibility.numpy()
    np.testing.assert_allclose(whole.mean(), seen.mean(), rtol=0.1)
    assert np.corrcoef(depth, seen.sum(1))[0, 1] > 0.8


def test_some_regions_cells_and_batches(fitted):
    names = fitted.data.names("accessibility")
    chosen = [names[31], names[4]]
    every = fitted.get_normalized_accessibility(normalize_regions=True)
    some = fitted.get_normalized_accessibility(indices=[5, 2], region_list=chosen, normalize_regions=True)
    pd.testing.assert_frame_equal(some, every.iloc[[5, 2]][chosen], rtol=1e-5)
    means = [fitted.get_normalized_accessibility(transform_batch=b, return_numpy=True) for b in ("0", "1")]
    both = fitted.get_normalized_accessibility(transform_batch=["0", "1"], return_numpy=True)
    np.testing.assert_allclose(both, sum(means) / 2, rtol=1e-5)
    drawn = fitted.get_normalized_accessibility(n_samples=200, return_numpy=True)
    assert 0 < np.abs(drawn - every.to_numpy() / fitted.get_region_factors()).mean() < 0.1
    with pytest.raises(QueryError, match="chr9"):
        fitted.get_normalized_accessibility(region_list=["chr9"])


def test_a_threshold_gives_a_sparse_table(fitted, monkeypatch):
    dense = fitted.get_normalized_accessibility(return_numpy=True)
    monkeypatch.setattr("pyrocell.models.regions._BLOCK", 7 * WIDE)  # in parts of seven cells
    thin = fitted.get_normalized_accessibility(threshold=0.6, return_numpy=True)
    assert sparse.issparse(thin) and 0 < thin.nnz < dense.size
    np.testing.assert_allclose(thin.toarray(), np.where(dense >= 0.6, dense, 0), rtol=1e-6)
    table = fitted.get_normalized_accessibility(threshold=0.6)
    assert isinstance(table.dtypes.iloc[0], pd.SparseDtype)
    np.testing.assert_array_equal(table.to_numpy(), thin.toarray())
    with pytest.raises(QueryError, match="threshold is 1.5"):
        fitted.get_normalized_accessibility(threshold=1.5)


def test_verbs_of_expression_are_absent(fitted):
    for verb in ("get_normalized_expression", "differential_expression", "get_latent_library_size"):
        assert not hasattr(fitted, verb) and verb not in dir(fitted)


# --------------------------------------------------------------------------- differential accessibility

COLUMNS = [
    "comparison",
    "group1",
    "group2",
    "prob_da",
    "bayes_factor",
    "est_prob1",
    "est_prob2",
    "effect_size",
]
COLUMNS += ["emp_prob1", "emp_prob2", "emp_effect", "is_da_fdr_0.05"]


def test_columns_and_the_sign_group1_minus_group2(fitted):
    table = fitted.differential_accessibility(groupby="group", group1="0", group2="2", mode="change")
    assert set(COLUMNS) <= set(table.columns)
    assert not [name for name in table if name.startswith(("raw", "proba", "scale", "is_de", "lfc"))]
    np.testing.assert_allclose(table["emp_effect"], table["emp_prob1"] - table["emp_prob2"])
    np.testing.assert_allclose(table["effect_size"], table["est_prob1"] - table["est_prob2"], atol=0.03)
    assert table[["effect_size", "emp_effect"]].corr(method="spearman").iloc[0, 1] > 0.8
    seen = (fitted.dataset.adata.X[(fitted.dataset.adata.obs["group"] == "0").to_numpy()] > 0).mean(0)
    seen = pd.Series(np.asarray(seen).ravel(), index=fitted.dataset.adata.var_names)
    np.testing.assert_allclose(table["emp_prob1"], seen[table.index])
    back = fitted.differential_accessibility(groupby="group", group1="2", group2="0", mode="change")
    back = back.loc[table.index]
    np.testing.assert_allclose(back["effect_size"], -table["effect_size"], atol=0.03)


def test_one_sided_asks_for_more_in_group1(fitted):
    two, one = (
        fitted.differential_accessibility(
            groupby="group",
            group1="0",
            group2="2",
            mode="change",
            options=DifferentialOptions(n_samples=2000, test=test),
        ).sort_index()
        for test in ("three", "one")
    )
    closed = one["effect_size"] < -0.2
    assert (
        (one.loc[closed, "prob_da"] < 0.4).all() and (two.loc[closed, "prob_da"] > 0.6).all() and closed.any()
    )
    assert (two["prob_da"] >= one["prob_da"] - 1e-12).all()


def test_a_delta_above_every_effect_calls_nothing(fitted):
    for mode in ("population", "change"):
        table = fitted.differential_accessibility(groupby="group", delta=1.0, mode=mode)
        # Effects on means have normal tails, which pass the bound where groups are small.
        assert (table["prob_da"] < 0.2).all() and not table["is_da_fdr_0.05"].any()
        assert fitted.differential_accessibility(groupby="group", mode=mode)["is_da_fdr_0.05"].any()


def test_means_are_differences_of_probabilities(fitted):
    table = fitted.differential_accessibility(groupby="group", group1="0", group2="2")
    assert table["tested"].mean() > 0.9
    table = table[table["tested"]]
    assert {"prob_da", "lfsr", "effect_size", "effect_low", "effect_high", "is_da_fdr_0.05"} <= set(table)
    assert not [name for name in table if name.startswith(("raw", "proba", "scale", "is_de", "lfc"))]
    np.testing.assert_allclose(table["effect_estimate"], table["est_prob1"] - table["est_prob2"], atol=1e-9)
    assert table[["effect_size", "emp_effect"]].corr(method="spearman").iloc[0, 1] > 0.8
    back = fitted.differential_accessibility(groupby="group", group1="2", group2="0").loc[table.index]
    np.testing.assert_array_equal(back["effect_size"], -table["effect_size"])
    np.testing.assert_array_equal(back["effect_low"], -table["effect_high"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_split_calls_nothing(fitted, seed):
    cells = np.random.default_rng(seed).permutation(fitted.dataset.n_cells)
    half = len(cells) // 2
    for mode in ("population", "change"):
        table = fitted.differential_accessibility(idx1=cells[:half], idx2=cells[half:], mode=mode)
        assert table["is_da_fdr_0.05"].mean() <= 0.001
        assert np.abs(table["effect_size"]).max() < 0.1


def test_the_log2_ratio_is_there_on_request(fitted):
    options = pyrocell.DifferentialOptions(effect="log2_ratio")
    table = fitted.differential_accessibility(
        groupby="group", group1="0", group2="2", delta=0.5, options=options
    )
    assert not [name for name in table if name.startswith("lfc_")]
    table = table[table["tested"]]
    ratio = np.log2(table["est_prob1"] / table["est_prob2"])
    assert np.corrcoef(ratio, table["effect_size"])[0, 1] > 0.9 and np.abs(table["effect_size"]).max() > 1


# ------------------------------------------------------------------------------------------- the recovery


def recovery(model_class=PEAKVI, **training):
    adata, truth = simulate()
    model_class.setup_anndata(adata, batch_key="batch")
    model = model_class(adata, n_hidden=64, n_latent=5)
    model.train(**({"max_epochs": 200, "lr": 1e-3} | training))
    values = model.get_normalized_accessibility(return_numpy=True)
    latent, factors = model.get_latent_representation(), model.get_region_factors()
    clusters = KMeans(4, n_init=5, random_state=0).fit_predict(latent)
    scores = {
        "accessibility": spearmanr(values.ravel(), truth["accessibility"].ravel())[0],
        "depth": spearmanr(model.get_library_size_factors(), truth["depth"])[0],
        "regions": spearmanr(factors * values.mean(0), truth["region"] * truth["accessibility"].mean(0))[0],
        "clusters": adjusted_rand_score(truth["group"], clusters),
        "mixing": -silhouette_score(latent, adata.obs["batch"]),
    }
    return model, truth, scores


GATES = {"accessibility": 0.8, "depth": 0.9, "regions": 0.95, "clusters": 0.8, "mixing": -0.1}


def failures(scores):
    return {name for name, least in GATES.items() if not scores[name] >= least}


@pytest.mark.slow
def test_recovers_what_was_simulated():
    model, truth, scores = recovery()
    assert not failures(scores), scores
    for one, two in (("0", "1"), ("2", "3")):
        means = [truth["accessibility"][truth["group"] == int(name)].mean(0) for name in (one, two)]
        effect = np.abs(means[0] - means[1])
        table = model.differential_accessibility(groupby="group", group1=one, group2=two, mode="change")
        table = table.loc[model.data.names("accessibility")]
        clear = (effect >= 0.3) | (effect < 0.05)
        assert roc_auc_score(effect[clear] >= 0.3, table["prob_da"][clear]) >= 0.95
        called = table["is_da_fdr_0.05"].to_numpy()
        assert called.any() and (effect[called] < 0.05).mean() <= 0.1


@pytest.mark.slow
def test_regions_that_vary_within_both_groups_are_not_called():
    """The sum of both directions would call them: it cannot tell a difference of groups from one of cells."""
    draw = np.random.default_rng(0)
    n_cells, n_regions = 1500, 400
    gradient, group = draw.uniform(-2.2, 2.2, (n_cells, 1)), draw.integers(2, size=(n_cells, 1))
    different = np.arange(n_regions) < 60
    slope = draw.normal(0, 1.2, n_regions) * np.where(different, 0.2, 1)
    shift = different * draw.choice([-1.1, 1.1], n_regions)
    accessibility = sigmoid(gradient * slope + draw.normal(0, 0.7, n_regions) + (2 * group - 1) * shift)
    chance = accessibility * draw.beta(8, 4, (n_cells, 1)) * draw.beta(8, 2, n_regions)
    adata = anndata.AnnData(sparse.csr_matrix((draw.random(chance.shape) < chance).astype(np.float32)))
    adata.obs_names, adata.obs["group"] = [f"cell{i}" for i in range(n_cells)], group[:, 0].astype(str)
    PEAKVI.setup_anndata(adata)
    model = PEAKVI(adata, n_hidden=64, n_latent=5, kl_weight=1.0)
    model.train(120, lr=2e-3, early_stopping=False)
    false, found = {}, {}
    for test in ("three", "two"):
        options = DifferentialOptions(test=test)
        table = model.differential_accessibility(
            groupby="group", group1="1", group2="0", mode="change", options=options
        )
        called = table.loc[adata.var_names, "is_da_fdr_0.05"].to_numpy()
        false[test], found[test] = (called & ~different).sum() / called.sum(), called[different].mean()
    assert false["three"] <= 0.1 and found["three"] >= 0.8, (false, found)
    assert false["two"] > 0.1, (false, found)


class Misaligned(PEAKVI):
    """Defect: the guide sees each cell's neighbour in the minibatch."""

    def guide(self, cells):
        super().guide(cells.replace(accessibility=cells.accessibility.roll(1, 0)))


class DepthOfMissing(PEAKVI):
    """Defect: the factor of the likelihood and the factor that is told are each other's complement."""

    def _depth_logits(self, cells):
        told = super()._depth_logits(cells)
        return -told if self.module.training else told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "broken"), [(Misaligned, "clusters"), (DepthOfMissing, "depth")], ids=["guide", "depth"]
)
def test_the_recovery_fails_on_a_defect(defect, broken):
    _, _, scores = recovery(defect, max_epochs=60, early_stopping=False)
    assert broken in failures(scores), scores
