"""Differential expression and abundance of a fitted model: truth, null, symmetry, cost, and every way to ask."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData, read_h5ad
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

import pyrocell
from pyrocell import SCVI, DifferentialOptions
from pyrocell.data import pbmc68k, simulate_scvi, synthetic_iid
from pyrocell.errors import PyrocellWarning, QueryError
from tests.models.zoo import PoissonFactors

CALLED = "is_de_fdr_0.05"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def fit(adata, max_epochs=100, setup=None, **options):
    SCVI.setup_anndata(adata, **(setup or {}))
    model = SCVI(adata, **({"gene_likelihood": "nb"} | options))
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        model.train(max_epochs)
    finally:
        pyrocell.settings.progress = before
    return model


@pytest.fixture(scope="module")
def fitted():
    adata = synthetic_iid(
        n_cells=300, n_genes=40, n_batches=3, n_proteins=0, n_regions=0, label_effect=2.0, seed=4
    )
    adata.obs["some"] = adata.obs["label"].astype(str).where(np.arange(300) % 3 > 0, np.nan)
    return fit(adata, 60, {"batch_key": "batch"}, n_hidden=32, n_latent=4)


def change(model, *args, **keywords):
    """Compare cells with cells, unless another mode is asked for."""
    return model.differential_expression(*args, **({"mode": "change"} | keywords))


def by_gene(table):
    """Rows in one order, whatever the evidence."""
    return table.sort_index()


def assert_same_numbers(one, two):
    one, two = by_gene(one), by_gene(two)
    numbers = one.select_dtypes("number").columns
    assert list(one.columns) == list(two.columns)
    pd.testing.assert_frame_equal(one[numbers], two[numbers])
    np.testing.assert_array_equal(one[CALLED], two[CALLED])


# ------------------------------------------------------------------------------------------------ truth


def two_groups(effects, *, n_cells=2000, n_genes=300, spread=1.0, seed=0):
    """Counts of two groups of cells with known log fold changes of the fractions, in ``var["lfc"]``.

    ``"pairs"``: a tenth of the genes changes by 1 to 3, in pairs of genes that swap their levels, so that the others
    change by exactly 0. ``"all"``: every gene changes, by a standard Normal.
    """
    rng = np.random.default_rng(seed)
    profile = np.tile(np.exp(rng.normal(0.0, spread, n_genes)), (2, 1))
    if effects == "pairs":
        pairs = rng.permutation(n_genes)[: n_genes // 20 * 2].reshape(2, -1)
        fold = 2 ** rng.uniform(1, 3, pairs.shape[1])
        profile[:, pairs[1]] = profile[:, pairs[0]]
        profile[0, pairs[0]] *= fold
        profile[1, pairs[1]] *= fold
    else:
        profile[1] *= 2 ** rng.normal(0.0, 1.0, n_genes)
    rho = profile / profile.sum(axis=1, keepdims=True)
    group = rng.integers(2, size=n_cells)
    mean = rng.lognormal(8.0, 0.3, (n_cells, 1)) * rho[group]
    theta = rng.lognormal(0.7, 0.8, n_genes)
    counts = rng.poisson(rng.gamma(np.broadcast_to(theta, mean.shape), mean / theta)).astype(np.float32)
    lfc = np.log2(rho[0] / rho[1])
    lfc[np.abs(lfc) < 1e-12] = 0.0
    return AnnData(
        sp.csr_matrix(counts),
        obs=pd.DataFrame(
            {"group": pd.Categorical(np.array(["one", "two"])[group])},
            index=[f"c{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame({"lfc": lfc, "mean": counts.mean(0)}, index=[f"g{i}" for i in range(n_genes)]),
    )


def ask(model, **options):
    """Compare the two groups: the table in the order of the genes."""
    table = change(model, groupby="group", group1="one", group2="two", options=DifferentialOptions(**options))
    return table.loc[model.dataset.adata.var_names]


@pytest.mark.slow
@pytest.mark.parametrize(("spread", "power"), [(1.0, 0.95), (2.5, 0.55)], ids=["frequent", "with rare genes"])
def test_calls_are_true_and_found(spread, power):
    """Realised false discoveries at a target of 5 %, and the share of true genes found, over three data sets."""
    n_called = n_false = n_true = 0
    for seed in range(3):
        adata = two_groups("pairs", spread=spread, seed=seed)
        assert (adata.var["lfc"] != 0).sum() == 30
        called, true = ask(fit(adata, 60))[CALLED].to_numpy(), (adata.var["lfc"] != 0).to_numpy()
        n_called, n_false = n_called + called.sum(), n_false + (called & ~true).sum()
        n_true += true.sum()
    assert n_false / n_called <= 0.10
    assert (n_called - n_false) / n_true >= power


@pytest.mark.slow
def test_fold_changes_are_those_of_the_decoder():
    adata = two_groups("all")
    model = fit(adata, 60)
    frequent = (adata.var["mean"] >= 0.1).to_numpy()
    table, truth = ask(model)[frequent], adata.var["lfc"][frequent]
    assert spearmanr(truth, table["lfc_mean"]).statistic >= 0.95
    assert np.abs(table["lfc_mean"] - truth).median() <= 0.15
    assert spearmanr(truth, ask(model, pseudocount=1e-4)["lfc_mean"][frequent]).statistic >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["simulated", "real"])
def test_random_halves_of_one_population_do_not_differ(kind):
    if kind == "simulated":
        adata = simulate_scvi(n_cells=1000, n_clusters=1, n_batches=1, seed=0)
    else:
        adata = pbmc68k()
        adata = adata[adata.obs["cell_type"] == "Dendritic"].copy()
    model = fit(adata, setup={"layer": "counts"})
    n_calls = []
    for seed in range(20):
        half = np.random.default_rng(seed).permutation(adata.n_obs)[: adata.n_obs // 2]
        n_calls.append(change(model, idx1=half)[CALLED].sum())
    assert np.mean(n_calls) <= 0.001 * adata.n_vars


@pytest.mark.slow
def test_a_pure_batch_effect_is_no_expression():
    adata = simulate_scvi(n_cells=1000, n_genes=100, n_clusters=1, batch_shift=1.0, seed=0)
    model = fit(adata, 60, {"batch_key": "batch"})
    plain = change(model, groupby="batch", group1="batch_1")
    shifted = adata.uns["truth"]["batch_shift"][1] != 0
    assert plain.loc[adata.var_names, CALLED][shifted].mean() > 0.5  # what is to be corrected is there
    corrected = change(model, groupby="batch", group1="batch_1", batch_correction=True)
    assert corrected[CALLED].sum() == 0


@pytest.mark.slow
def test_eight_groups_cost_at_most_twice_one():
    adata = synthetic_iid(n_cells=2000, n_genes=500, n_labels=8, n_proteins=0, n_regions=0, label_effect=1.0)
    model = fit(adata, 2)

    def seconds(**groups):
        used = []
        for _ in range(5):
            begin = time.process_time()
            change(model, groupby="label", **groups)
            used.append(time.process_time() - begin)
        return min(used)

    one, eight = seconds(group1="label_3"), seconds()
    assert eight <= 2.5 * one, f"{eight:.2f} s for eight groups, {one:.2f} s for one"


# ------------------------------------------------------------------------------------------------ the table


def test_columns_and_order(fitted):
    table = change(fitted, groupby="label")
    assert list(table.columns) == [
        "comparison",
        "group1",
        "group2",
        "proba_de",
        "proba_not_de",
        "bayes_factor",
        "scale1",
        "scale2",
        "pseudocounts",
        "delta",
        *(f"lfc_{name}" for name in ("mean", "median", "std", "min", "max")),
        *(f"lfc_raw_{name}" for name in ("mean", "median", "std", "min", "max")),
        *(
            f"{name}{i}"
            for name in ("raw_mean", "non_zeros_proportion", "raw_normalized_mean")
            for i in (1, 2)
        ),
        CALLED,
        "ess1",
        "ess2",
        "n_draws",
    ]
    assert list(table["comparison"].unique()) == [f"label_{i} vs rest" for i in range(3)]
    for _, part in table.groupby("comparison"):
        assert sorted(part.index) == sorted(fitted.dataset.adata.var_names)
        assert part["proba_de"].is_monotonic_decreasing
        assert (part["lfc_min"] <= part["lfc_mean"]).all() and (part["lfc_mean"] <= part["lfc_max"]).all()
    assert (table["delta"] == 0.25).all() and table["proba_de"].between(0, 1).all()
    np.testing.assert_allclose(table["proba_de"] + table["proba_not_de"], 1.0)


def test_raw_columns_are_averages_of_the_counts(fitted):
    adata = fitted.dataset.adata
    table = change(fitted, groupby="label", group1="label_1", group2="label_0")
    table = table.loc[adata.var_names]
    counts = adata.X.toarray()
    scaled = counts / counts.sum(1, keepdims=True) * 1e4
    for i, group in ((1, "label_1"), (2, "label_0")):
        cells = (adata.obs["label"] == group).to_numpy()
        np.testing.assert_allclose(table[f"raw_mean{i}"], counts[cells].mean(0), rtol=1e-6)
        np.testing.assert_allclose(table[f"non_zeros_proportion{i}"], (counts[cells] > 0).mean(0), rtol=1e-6)
        np.testing.assert_allclose(table[f"raw_normalized_mean{i}"], scaled[cells].mean(0), rtol=1e-5)


def test_effects_by_brute_force(fitted):
    """Scales, fold changes and probabilities again, from draws of the site and random pairs of them."""
    adata = fitted.dataset.adata
    table = change(fitted, groupby="label", group1="label_1").loc[adata.var_names]
    draws = fitted.posterior("rho", n_samples=40, return_mean=False, seed=9)
    mine = (adata.obs["label"] == "label_1").to_numpy()
    sides = [draws[:, cells].reshape(-1, adata.n_vars) for cells in (mine, ~mine)]
    rng, c = np.random.default_rng(0), table["pseudocounts"].iloc[0]
    first, second = (np.log2(side + c)[rng.integers(len(side), size=40_000)] for side in sides)
    effects = first - second
    for i, side in enumerate(sides, 1):
        np.testing.assert_allclose(table[f"scale{i}"], side.mean(0), rtol=0.15)
    error = table["lfc_std"].to_numpy() * np.sqrt(2 / 5000 + 2 / 4000)
    assert (np.abs(table["lfc_mean"] - effects.mean(0)) < 5 * error).all()
    assert (np.abs(table["lfc_median"] - np.median(effects, axis=0)) < 10 * error).all()
    np.testing.assert_allclose(table["lfc_std"], effects.std(0), rtol=0.1)
    proba = np.maximum((effects >= 0.25).mean(0), (effects <= -0.25).mean(0))
    np.testing.assert_allclose(table["proba_de"], proba, atol=0.05)


def test_vanilla(fitted):
    table = change(fitted, groupby="label", group1="label_1", mode="vanilla")
    assert {"proba_m1", "proba_m2", "bayes_factor", "scale1", "scale2", "raw_mean1"} <= set(table.columns)
    assert not {"proba_de", "lfc_mean", "delta", "pseudocounts", CALLED} & set(table.columns)
    np.testing.assert_allclose(table["proba_m1"] + table["proba_m2"], 1.0)
    np.testing.assert_allclose(
        table["bayes_factor"], np.log(table["proba_m1"] + 1e-8) - np.log(table["proba_m2"] + 1e-8)
    )
    assert table["bayes_factor"].is_monotonic_decreasing


def test_credible_intervals(fitted):
    table = change(
        fitted, groupby="label", group1="label_1", options=DifferentialOptions(credible_interval=0.9)
    )
    low, high = table["lfc_hdi_low"], table["lfc_hdi_high"]
    assert (table["lfc_min"] <= low).all() and (low < high).all() and (high <= table["lfc_max"]).all()
    assert table["lfc_median"].between(low, high).all()
    # about 1.645 standard deviations on each side, were it Normal
    np.testing.assert_allclose((high - low).median(), 3.29 * table["lfc_std"].median(), rtol=0.2)
    assert not any("hdi" in name for name in change(fitted, groupby="label"))


def test_learned_delta_and_two_sided_test(fitted):
    learned = change(fitted, groupby="label", group1="label_1", delta=None)
    assert learned["delta"].nunique() == 1 and learned["delta"].iloc[0] >= 0.1
    three, two = (
        by_gene(change(fitted, groupby="label", group1="label_1", options=DifferentialOptions(test=test)))
        for test in ("three", "two")
    )
    assert (two["proba_de"] >= three["proba_de"]).all() and (two["proba_de"] > three["proba_de"]).any()


def test_the_fdr_target_names_its_column(fitted):
    strict, loose = (
        change(fitted, groupby="label", group1="label_1", fdr_target=target) for target in (0.01, 0.2)
    )
    assert strict["is_de_fdr_0.01"].sum() < loose["is_de_fdr_0.2"].sum()
    assert (loose["is_de_fdr_0.2"] | ~strict.loc[loose.index, "is_de_fdr_0.01"]).all()


def test_a_normal_likelihood_is_compared_by_differences():
    adata = synthetic_iid(n_cells=100, n_genes=10, n_proteins=0, n_regions=0)
    table = fit(adata, 1, gene_likelihood="normal").differential_expression(groupby="label")
    assert "effect_mean" in table and not {"lfc_mean", "pseudocounts"} & set(table.columns)


# ------------------------------------------------------------------------------------------------ symmetry


@pytest.mark.parametrize("how", ["groups", "cells", "batches", "interval"])
def test_swapping_the_groups_flips_every_sign(fitted, how):
    labels = fitted.dataset.adata.obs["label"]
    options = DifferentialOptions(credible_interval=0.9 if how == "interval" else None)
    names = ["label_0", "label_2"]
    sides = [{"groupby": "label", "group1": a, "group2": b} for a, b in (names, names[::-1])]
    if how == "cells":
        cells = [np.flatnonzero(labels == name) for name in names]
        sides = [{"idx1": cells[0], "idx2": cells[1]}, {"idx1": cells[1], "idx2": cells[0]}]
    one, two = (
        by_gene(change(fitted, **side, batch_correction=how == "batches", options=options)) for side in sides
    )
    for name in ("lfc_mean", "lfc_median", "lfc_raw_mean", "lfc_raw_median"):
        np.testing.assert_array_equal(one[name], -two[name])
        assert (one[name] != 0).all()
    swapped = [("scale1", "scale2"), ("raw_mean1", "raw_mean2"), ("ess1", "ess2")]
    for first, second in swapped:
        np.testing.assert_array_equal(one[first], two[second])
        np.testing.assert_array_equal(one[second], two[first])
    ends = [("lfc_min", "lfc_max")] + [("lfc_hdi_low", "lfc_hdi_high")] * (how == "interval")
    for low, high in ends:
        np.testing.assert_array_equal(one[low], -two[high])
    for name in ("proba_de", "bayes_factor", "lfc_std", "pseudocounts", CALLED):
        np.testing.assert_array_equal(one[name], two[name])


def test_swapping_flips_vanilla(fitted):
    one, two = (
        by_gene(change(fitted, groupby="label", group1=a, group2=b, mode="vanilla"))
        for a, b in (("label_0", "label_2"), ("label_2", "label_0"))
    )
    np.testing.assert_array_equal(one["proba_m1"], two["proba_m2"])
    np.testing.assert_array_equal(one["bayes_factor"], -two["bayes_factor"])


def test_the_order_of_cells_does_not_matter_in_law(fitted):
    adata = fitted.dataset.adata
    other = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    one, two = (
        by_gene(change(fitted, data, "label", group1="label_1", group2="label_0")) for data in (adata, other)
    )
    np.testing.assert_allclose(one["raw_mean1"], two["raw_mean1"])
    error = np.sqrt(2 * 2 / 5000) * one["lfc_std"]  # of a difference of two differences of 5000 draws
    assert (np.abs(one["lfc_mean"] - two["lfc_mean"]) < 5 * error).all()
    assert np.abs(one["proba_de"] - two["proba_de"]).max() < 0.06
    assert not np.array_equal(one["lfc_mean"], two["lfc_mean"])  # other draws: a law, not a copy


def test_the_same_question_has_the_same_answer(fitted):
    one, two = (change(fitted, groupby="label") for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    other = change(fitted, groupby="label", options=DifferentialOptions(seed=1))
    assert not np.array_equal(by_gene(one)["lfc_mean"], by_gene(other)["lfc_mean"])


def test_shuffled_genes_and_files_on_disk_give_the_same_table(fitted, tmp_path):
    adata = fitted.dataset.adata
    table = change(fitted, groupby="label", group1="label_1")
    order = np.random.default_rng(0).permutation(adata.n_vars)
    shuffled = adata[:, order].copy()
    pd.testing.assert_frame_equal(table, change(fitted, shuffled, groupby="label", group1="label_1"))
    adata.write_h5ad(tmp_path / "data.h5ad")
    backed = read_h5ad(tmp_path / "data.h5ad", backed="r")
    try:
        found = change(fitted, backed, groupby="label", group1="label_1")
    finally:
        backed.file.close()
    pd.testing.assert_frame_equal(table, found)


# ------------------------------------------------------------------------------------------------ who is compared


def test_positions_masks_queries_and_groups_agree(fitted):
    obs = fitted.dataset.adata.obs
    masks = [(obs["label"] == name).to_numpy() for name in ("label_0", "label_2")]
    by_group = change(fitted, groupby="label", group1="label_0", group2="label_2")
    for sides in (
        masks,
        [np.flatnonzero(mask) for mask in masks],
        [list(np.flatnonzero(mask)[::-1]) for mask in masks],
        ["label == 'label_0'", "label == 'label_2'"],
    ):
        table = change(fitted, idx1=sides[0], idx2=sides[1])
        assert set(table["comparison"]) == {"idx1 vs idx2"}
        assert_same_numbers(by_group, table)
    rest = change(fitted, idx1="label == 'label_0'")
    assert set(rest["group2"]) == {"rest"}
    assert_same_numbers(rest, change(fitted, groupby="label", group1="label_0"))


def test_queries_join_columns(fitted):
    obs = fitted.dataset.adata.obs
    chosen = (obs["label"] == "label_0") & (obs["age"] > 50)
    one = change(fitted, idx1="label == 'label_0' and age > 50")
    assert_same_numbers(one, change(fitted, idx1=chosen.to_numpy()))


def test_several_groups_and_a_reference(fitted):
    table = change(fitted, groupby="label", group1=["label_2", "label_0"])
    assert list(table["comparison"].unique()) == ["label_2 vs rest", "label_0 vs rest"]
    table = change(fitted, groupby="label", group2="label_0")
    assert list(table["comparison"].unique()) == ["label_1 vs label_0", "label_2 vs label_0"]


def test_cells_without_a_group_are_in_none(fitted):
    adata = fitted.dataset.adata
    known = adata.obs["some"].notna().to_numpy()
    mine = (adata.obs["some"] == "label_0").to_numpy()
    assert_same_numbers(
        change(fitted, groupby="some", group1="label_0"),
        change(fitted, idx1=mine, idx2=known & ~mine),
    )


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"groupby": "celltype"}, r"groupby='celltype' is no column.*'label'"),
        ({"groupby": "label", "group1": "B cell"}, r"'B cell' does not exist; expected one of 'label_0'"),
        ({"groupby": "label", "group1": ["label_0", "B cell"]}, r"'B cell' does not exist"),
        ({"groupby": "label", "group1": "label_0", "group2": "B cell"}, r"'B cell' does not exist"),
        ({"groupby": "label", "group1": "label_0", "group2": "label_0"}, "same .* cells"),
        ({}, "Give either groupby="),
        ({"group1": "label_0"}, "groupby"),
        ({"idx2": [1, 2]}, "idx1="),
        ({"groupby": "label", "idx1": [1, 2]}, "not both"),
        ({"groupby": "label", "idx2": [1, 2]}, "not both"),
        ({"idx1": [1, 2], "group1": "label_0"}, "not both"),
        ({"idx1": []}, "no cells"),
        ({"idx1": [300]}, "300"),
        ({"idx1": np.zeros(300, dtype=bool)}, "no cells"),
        ({"idx1": np.ones(300, dtype=bool)}, "rest.*no cells"),
        ({"idx1": np.ones(3, dtype=bool)}, "mask of shape"),
        ({"idx1": ["cell_1"]}, "positions"),
        ({"idx1": "label == 'B cell'"}, "idx1.*no cells"),
        ({"idx1": "cell_type == 'B'"}, "cell_type"),
        ({"idx1": "label =="}, "no query"),
        ({"idx1": "label = 'label_0'"}, "label = 'label_0'"),
        ({"idx1": "age"}, "idx1='age'"),
        ({"groupby": "label", "mode": "t-test"}, "mode is 't-test'"),
        ({"groupby": "label", "delta": -1.0}, "delta is -1.0"),
        ({"groupby": "label", "fdr_target": 5}, "fdr_target is 5"),
    ],
    ids=str,
)
def test_questions_that_make_no_sense(fitted, question, said):
    with pytest.raises(QueryError, match=said):
        change(fitted, **question)


def test_a_group_without_cells(fitted):
    adata = fitted.dataset.adata.copy()
    adata.obs["label"] = adata.obs["label"].cat.add_categories(["gone"])
    with pytest.raises(QueryError, match="'gone' has no cells"):
        change(fitted, adata, groupby="label", group1="gone")
    assert set(change(fitted, adata, groupby="label")["group1"]) == {
        "label_0",
        "label_1",
        "label_2",
    }


def test_one_group_is_not_enough(fitted):
    adata = fitted.dataset.adata[fitted.dataset.adata.obs["label"] == "label_0"].copy()
    with pytest.raises(QueryError, match=r"Only 1 group has cells \('label_0'\)"):
        change(fitted, adata, groupby="label")


# ------------------------------------------------------------------------------------------------ options


def test_importance_weights_report_their_size(fitted):
    options = DifferentialOptions(weights="importance", n_samples=300)
    plain = change(
        fitted,
        groupby="label",
        group1="label_1",
        group2="label_0",
        options=DifferentialOptions(n_samples=300),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyrocellWarning)  # few effective draws: hardly trained
        table = change(fitted, groupby="label", group1="label_1", group2="label_0", options=options)
    assert (plain["ess1"] == 300).all() and (plain["n_draws"] == 600).all()
    assert table["ess1"].between(1, 299).all() and table["ess2"].between(1, 299).all()
    assert not np.array_equal(by_gene(plain)["lfc_mean"], by_gene(table)["lfc_mean"])
    with pytest.raises(QueryError, match="importance.*batches"):
        change(fitted, groupby="label", batch_correction=True, options=options)


def test_batches_of_each_side(fitted):
    one, two = [{"batch": "batch_0"}], [{"batch": "batch_1"}]
    table = change(
        fitted, groupby="label", group1="label_1", options=DifferentialOptions(batches1=one, batches2=two)
    )
    both = change(fitted, groupby="label", group1="label_1", batch_correction=True)
    assert not np.array_equal(by_gene(table)["lfc_mean"], by_gene(both)["lfc_mean"])
    with pytest.raises(QueryError, match="batch='lane9'"):
        change(fitted, groupby="label", options=DifferentialOptions(batches1=[{"batch": "lane9"}]))


def test_batch_correction_without_batches_says_what_is_missing():
    adata = synthetic_iid(n_cells=60, n_genes=8, n_proteins=0, n_regions=0)
    model = fit(adata, 1, n_hidden=8)
    with pytest.raises(QueryError, match="batch_correction.*batch_key"):
        change(model, groupby="label", batch_correction=True)
    PoissonFactors.setup_anndata(adata)
    other = PoissonFactors(adata)
    other.train(1)
    with pytest.raises(QueryError, match="batch_correction"):
        other.differential_expression(groupby="label", batch_correction=True)


def test_outlier_cells_may_be_left_out(fitted):
    table = change(
        fitted, groupby="label", group1="label_1", options=DifferentialOptions(filter_outlier_cells=True)
    )
    plain = change(fitted, groupby="label", group1="label_1")
    assert not np.array_equal(by_gene(table)["lfc_mean"], by_gene(plain)["lfc_mean"])
    np.testing.assert_array_equal(by_gene(table)["raw_mean1"], by_gene(plain)["raw_mean1"])


# ------------------------------------------------------------------------------------------------ abundance


def test_a_planted_difference_of_abundance_is_found():
    adata = simulate_scvi(n_cells=800, n_genes=60, n_clusters=2, n_batches=1, seed=2)
    rng = np.random.default_rng(0)
    first = (adata.obs["cluster"] == "cluster_0").to_numpy()
    treated = rng.random(adata.n_obs) < np.where(first, 0.8, 0.2)
    adata.obs["mouse"] = [f"{'t' if is_treated else 'c'}{i % 2}" for i, is_treated in enumerate(treated)]
    model = fit(adata, 40, n_latent=4)
    for kernel in ("normal", "student"):
        table = model.differential_abundance(
            sample_key="mouse", samples1=["t0", "t1"], samples2=["c0", "c1"], kernel=kernel
        )
        assert list(table.columns[:5]) == ["c0", "c1", "t0", "t1", "log_ratio"]
        assert list(table.columns[5:]) == ["effect", "effect_error", "lfsr"]
        assert np.corrcoef(table["effect"], table["log_ratio"])[0, 1] > 0.9
        assert list(table.index) == list(adata.obs_names)
        assert roc_auc_score(first, table["log_ratio"]) >= 0.95
        # the ratio of cells is 4 to 1 in one cluster and 1 to 4 in the other
        assert table["log_ratio"][first].median() == pytest.approx(np.log(4), abs=0.5)
        assert table["log_ratio"][~first].median() == pytest.approx(-np.log(4), abs=0.5)


def test_shares_of_groups_are_compared_between_samples(fitted):
    adata = fitted.dataset.adata.copy()
    rng = np.random.default_rng(0)
    more = (adata.obs["label"] == "label_0").to_numpy()
    side = np.where(rng.random(adata.n_obs) < np.where(more, 0.8, 0.35), "t", "c")
    adata.obs["mouse"] = [f"{name}{i % 3}" for i, name in enumerate(side)]
    sets = {"samples1": ["t0", "t1", "t2"], "samples2": ["c0", "c1", "c2"]}
    table = fitted.differential_abundance(adata, sample_key="mouse", groupby="label", **sets)
    assert table.index[0] == "label_0" and table.loc["label_0", "lfc_mean"] > 0.3
    assert (table["n_replicates1"] == 3).all()
    np.testing.assert_array_equal(
        table["n_cells1"] + table["n_cells2"], adata.obs["label"].value_counts()[table.index]
    )
    with pytest.raises(QueryError, match="groupby='type' is no column"):
        fitted.differential_abundance(adata, sample_key="mouse", groupby="type", **sets)
    with pytest.raises(QueryError, match="samples1 has 0 samples"):
        fitted.differential_abundance(adata, sample_key="mouse", groupby="label")


def test_abundance_swaps_and_keeps_the_cells_asked_for(fitted):
    one, two = (
        fitted.differential_abundance(sample_key="label", samples1=a, samples2=b, indices=range(99, 0, -1))
        for a, b in ((["label_0"], ["label_2"]), (["label_2"], ["label_0"]))
    )
    np.testing.assert_allclose(one["log_ratio"], -two["log_ratio"])
    assert list(one.index) == list(fitted.dataset.adata.obs_names[np.arange(99, 0, -1)])
    np.testing.assert_allclose(one["log_ratio"], one["label_0"] - one["label_2"])


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"sample_key": "mouse"}, r"sample_key='mouse' is no column.*'label'"),
        ({"sample_key": "label", "samples1": ["x"], "samples2": ["label_0"]}, "no samples 'x'.*'label_0'"),
        ({"sample_key": "label", "samples1": ["label_0"]}, "samples2"),
        ({"sample_key": "label", "samples1": "label_0", "samples2": "label_1"}, "single string|list"),
        ({"sample_key": "label", "samples1": [], "samples2": ["label_1"]}, "empty|at least one"),
        ({"sample_key": "label", "kernel": "box"}, "kernel is 'box'"),
    ],
    ids=str,
)
def test_questions_of_abundance_that_make_no_sense(fitted, question, said):
    with pytest.raises(QueryError, match=said):
        fitted.differential_abundance(**question)


def test_cells_without_a_sample_are_no_sample(fitted):
    table = fitted.differential_abundance(sample_key="some")
    assert list(table.columns) == ["label_0", "label_1", "label_2"] and len(table) == 300
