"""Comparisons of means by fitted models: every way to ask, what is refused, and what is found."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import pyrocell
from pyrocell import PEAKVI, SCVI, TOTALVI, DifferentialOptions
from pyrocell.data import synthetic_iid
from pyrocell.errors import DataError, PyrocellWarning, QueryError
from pyrocell.infer.moments import MomentSums
from tests.models.zoo import PoissonFactors
from tests.multimodal import real_data

CALLED = "is_de_fdr_0.05"


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def fit(adata, max_epochs=40, setup=None, **options):
    SCVI.setup_anndata(adata, **(setup or {}))
    model = SCVI(adata, **({"gene_likelihood": "nb", "n_hidden": 32, "n_latent": 4} | options))
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        model.train(max_epochs)
    finally:
        pyrocell.settings.progress = before
    return model


def planted(n_cells=900, n_genes=200, seed=0):
    """Two cell types; in the first, treated cells have a tenth of the genes thinned to a third."""
    rng = np.random.default_rng(seed)
    kind, donor = rng.integers(2, size=n_cells), rng.integers(6, size=n_cells)
    treated = donor % 2 == 0
    profile = rng.lognormal(0.0, 1.0, (2, n_genes))[kind] * rng.lognormal(0, 0.1, (6, n_genes))[donor]
    lfc = np.where(np.arange(n_genes) < 20, -np.log2(3), 0.0)
    mean = rng.lognormal(0.0, 0.3, (n_cells, 1)) * profile
    mean = mean * np.where((treated & (kind == 0))[:, None], 2.0**lfc, 1.0)
    counts = rng.poisson(rng.gamma(3.0, mean / 3.0)).astype(np.float32)
    obs = pd.DataFrame(
        {
            "kind": np.where(kind == 0, "T", "B"),
            "stim": np.where(treated, "yes", "no"),
            "donor": [f"d{i}" for i in donor],
            "lane": np.where(treated, "l1", "l2"),
            "sex": np.where(donor < 3, "F", "M"),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame({"lfc": lfc}, index=[f"g{i}" for i in range(n_genes)])
    return AnnData(sp.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture(scope="module")
def fitted():
    return fit(planted(), 20)


def ask(model, **keywords):
    options = {
        key: keywords.pop(key) for key in list(keywords) if key in DifferentialOptions.__dataclass_fields__
    }
    return model.differential_expression(**keywords, options=DifferentialOptions(**options))


# ------------------------------------------------------------------------------------------------ what is found


@pytest.mark.parametrize("sample_key", [None, "donor"])
def test_what_was_planted_inside_one_type_is_found_there(fitted, sample_key):
    table = ask(fitted, groupby="kind", group1="yes", group2="no", condition="stim", sample_key=sample_key)
    assert list(table.columns[:4]) == ["comparison", "within", "group1", "group2"]
    assert set(table["comparison"]) == {"yes vs no in B", "yes vs no in T"}
    truth = fitted.dataset.adata.var["lfc"]
    inside = {name: part.loc[truth.index] for name, part in table.groupby("within")}
    if sample_key is not None:
        assert inside["T"][CALLED][truth != 0].mean() >= 0.8
        assert inside["T"][CALLED][truth == 0].sum() <= 3 and inside["B"][CALLED].sum() <= 2
        assert (inside["T"]["n_replicates1"] == 3).all()
    slope = np.median(inside["T"]["lfc_estimate"][truth != 0]) / -np.log2(3)
    assert 0.85 <= slope <= 1.1
    assert np.abs(inside["B"]["lfc_mean"]).median() < 0.1


def test_a_model_that_did_not_learn_the_effect_does_not_shrink_it(fitted):
    """The decoder's fold change falls short, the counts put it right."""
    adata = fitted.dataset.adata
    poor = fit(adata.copy(), 1)
    table = ask(poor, idx1="kind == 'T' and stim == 'yes'", idx2="kind == 'T' and stim == 'no'")
    changed = table.loc[adata.var_names][(adata.var["lfc"] != 0).to_numpy()]
    assert np.abs(changed["lfc_model"].median()) < 0.5
    assert changed["lfc_mean"].median() == pytest.approx(-np.log2(3), abs=0.25)


@pytest.mark.slow
def test_structural_zeros_count_as_less(fitted):
    """A likelihood that explains missing counts by structural zeros gives the same answer."""
    adata = fitted.dataset.adata
    zinb = fit(adata.copy(), gene_likelihood="zinb")
    sides = {"idx1": "kind == 'T' and stim == 'yes'", "idx2": "kind == 'T' and stim == 'no'"}
    one, two = (ask(model, **sides).loc[adata.var_names]["lfc_estimate"] for model in (fitted, zinb))
    assert np.corrcoef(one, two)[0, 1] > 0.97 and np.abs(one - two).median() < 0.05


def test_values_that_may_be_negative_are_compared_by_differences():
    adata = synthetic_iid(n_cells=200, n_genes=10, n_proteins=0, n_regions=0)
    table = fit(adata, 5, gene_likelihood="normal").differential_expression(groupby="label")
    assert "effect_mean" in table and not [name for name in table if name.startswith("lfc")]
    tested = table[table["tested"]]
    np.testing.assert_allclose(tested["effect_estimate"], tested["effect_raw"], atol=0.05)


def test_ratios_of_values_that_may_be_negative_are_refused():
    model = fit(planted(100, 20), 1, gene_likelihood="normal")
    for sample_key in (None, "donor"):
        with pytest.raises(DataError, match='may be negative.*Use effect="difference"'):
            ask(model, groupby="stim", group1="yes", effect="log2_ratio", sample_key=sample_key)


def open_regions(seed, n_cells=500, n_regions=150):
    """A fifth of the regions open or close in treated cells, which have 1.67 times the depth of the others."""
    rng = np.random.default_rng(seed)
    treated = rng.random(n_cells) < 0.5
    share = np.where(np.arange(n_regions) % 5 == 1, 0.97, rng.uniform(0.15, 0.6, n_regions))
    effect = np.where(np.arange(n_regions) % 5 == 0, rng.choice([-0.25, 0.3], n_regions), 0.0)
    first, second = np.clip(share + effect, 0.03, 0.97), share
    effect = first - second
    depth = rng.beta(30, 10, n_cells) * np.where(treated, 1.0, 0.6)
    seen = rng.random((n_cells, n_regions)) < np.where(treated[:, None], first, second) * depth[:, None]
    obs = pd.DataFrame({"stim": np.where(treated, "yes", "no")}, index=[f"c{i}" for i in range(n_cells)])
    var = pd.DataFrame({"effect": effect}, index=[f"r{i}" for i in range(n_regions)])
    return AnnData(sp.csr_matrix(seen.astype(np.float32)), obs=obs, var=var)


def test_regions_that_open_are_found_and_probabilities_are_such():
    n_called = n_false = 0
    for seed in range(2):
        adata = open_regions(seed)
        PEAKVI.setup_anndata(adata)
        model = PEAKVI(adata, n_hidden=32, n_latent=4)
        model.train(30)
        table = model.differential_accessibility(groupby="stim", group1="yes", group2="no")
        table = table.loc[adata.var_names]
        truth = adata.var["effect"]
        assert table[["est_prob1", "est_prob2"]].stack().between(0, 1).all()
        called, changed = table["is_da_fdr_0.05"], truth != 0
        n_called, n_false = n_called + called.sum(), n_false + (called & ~changed).sum()
        assert called[changed].mean() >= 0.8
        size = np.polyfit(truth[changed], table["effect_estimate"][changed], 1)[0]
        assert 1.0 <= size <= 1.6, (
            size
        )  # up to 1 / 0.6: depth and accessibility are told apart up to a factor
    assert n_false <= 0.15 * n_called, (n_false, n_called)


def stained(seed, n_cells=400, n_genes=30, n_proteins=12):
    """Proteins over a background of 30; three of them have 20 more counts in treated cells."""
    rng = np.random.default_rng(seed)
    treated = rng.random(n_cells) < 0.5
    counts = rng.poisson(rng.lognormal(0.5, 1.0, n_genes), (n_cells, n_genes)).astype(np.float32)
    signal = 15.0 + np.where(treated[:, None] & (np.arange(n_proteins) < 3), 20.0, 0.0)
    mean = 30.0 + signal
    proteins = rng.poisson(rng.gamma(10.0, mean / 10.0)).astype(np.float32)
    obs = pd.DataFrame({"stim": np.where(treated, "yes", "no")}, index=[f"c{i}" for i in range(n_cells)])
    adata = AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))
    adata.obsm["proteins"] = pd.DataFrame(
        proteins, index=adata.obs_names, columns=[f"p{i}" for i in range(n_proteins)]
    )
    return adata


def test_proteins_differ_by_what_was_counted_beyond_the_background():
    """A model of one epoch knows nothing of the effect; the ratio would scale the signal alone."""
    for max_epochs in (1, 25):
        adata = stained(0)
        TOTALVI.setup_anndata(adata, protein_expression_obsm_key="proteins")
        model = TOTALVI(adata, n_hidden=32, n_latent=4)
        model.train(max_epochs)
        table = model.differential_expression(groupby="stim", group1="yes", group2="no")
        table = table[table["modality"] == "proteins"].loc[adata.obsm["proteins"].columns]
        difference = (table["scale1"] - table["scale2"]).iloc[:3]
        assert difference.mean() == pytest.approx(20.0, rel=0.25), (max_epochs, difference)
        assert table[CALLED].iloc[:3].all() and table[CALLED].iloc[3:].sum() <= 1


@pytest.mark.slow
def test_batches_are_taken_out_where_asked():
    adata = planted()
    shift = np.where(np.arange(200) % 2 == 0, 2.0, 1.0)
    half = np.random.default_rng(1).random(adata.n_obs) < np.where(adata.obs["kind"] == "T", 0.7, 0.3)
    counts = adata.X.toarray()
    counts[half] = np.random.default_rng(2).poisson(counts[half] * shift)
    adata.X, adata.obs["run"] = sp.csr_matrix(counts), np.where(half, "r1", "r2")
    model = fit(adata, setup={"batch_key": "run"})
    sides = {"idx1": "kind == 'T' and stim == 'no'", "idx2": "kind == 'B' and stim == 'no'"}
    plain = ask(model, **sides).loc[adata.var_names]
    corrected = model.differential_expression(**sides, batch_correction=True).loc[adata.var_names]
    clean = fit(planted()).differential_expression(**sides).loc[adata.var_names]
    errors = [(table["lfc_estimate"] - clean["lfc_estimate"])[shift == 2] for table in (plain, corrected)]
    assert np.abs(errors[1].median()) < 0.5 * np.abs(errors[0].median())


# ------------------------------------------------------------------------------------------------ ways to ask


def test_each_pair_of_groups_is_compared_once(fitted):
    adata = fitted.dataset.adata.copy()
    adata.obs["three"] = adata.obs["donor"].map(lambda name: f"k{int(name[1]) % 3}")
    table = ask(fitted, adata=adata, groupby="three", all_pairs=True)
    assert list(table["comparison"].unique()) == ["k0 vs k1", "k0 vs k2", "k1 vs k2"]
    some = ask(fitted, adata=adata, groupby="three", group1=["k1", "k2"], all_pairs=True)
    assert list(some["comparison"].unique()) == ["k1 vs k2"]
    with pytest.raises(QueryError, match="leave group2 out"):
        ask(fitted, adata=adata, groupby="three", group2="k0", all_pairs=True)
    with pytest.raises(QueryError, match="expected two groups"):
        ask(fitted, adata=adata, groupby="three", group1="k0", all_pairs=True)


@pytest.mark.parametrize("mode", ["change", "vanilla"])
def test_conditions_inside_groups_are_named_in_every_mode(fitted, mode):
    keywords = {"groupby": "kind", "group1": "yes", "group2": "no", "mode": mode}
    table = ask(fitted, **keywords, condition="stim", n_samples=500)
    assert list(table.columns[:4]) == ["comparison", "within", "group1", "group2"]
    assert set(table["within"]) == {"B", "T"}
    assert "within" not in ask(fitted, **keywords | {"groupby": "stim"}, n_samples=500)


def test_one_group_against_the_rest_pairs_donors(fitted):
    table = ask(fitted, groupby="kind", group1="T", sample_key="donor")
    assert (table["n_replicates1"] == 6).all() and (table["n_replicates2"] == 6).all()
    assert table[CALLED].mean() > 0.4


def test_a_formula_reads_columns_of_the_cells(fitted):
    keywords = {"groupby": "stim", "group1": "yes", "group2": "no", "sample_key": "donor"}
    one, two = (ask(fitted, **keywords, design=design) for design in (None, "~ stim"))
    two = two.loc[one.index]
    np.testing.assert_allclose(one["lfc_mean"], two["lfc_mean"], atol=1e-6)
    sex = ask(fitted, **keywords, design="~ stim + sex", contrast="sex[T.M]")
    assert sex[CALLED].sum() <= 5
    with pytest.raises(QueryError, match=r"'lane\[T.l2\]'.*cannot be told apart"):
        ask(fitted, **keywords, design="~ stim + lane")


def test_groups_without_both_conditions_are_named(fitted):
    adata = fitted.dataset.adata.copy()
    adata.obs["kind"] = np.where(
        (adata.obs["kind"] == "B") & (adata.obs["stim"] == "yes"), "X", adata.obs["kind"]
    )
    with pytest.warns(PyrocellWarning, match="'B', 'X' of 'kind' have no cells of one side"):
        table = ask(fitted, adata=adata, groupby="kind", group1="yes", group2="no", condition="stim")
    assert set(table["within"]) == {"T"}
    with pytest.raises(QueryError, match="'maybe' does not exist"):
        ask(fitted, groupby="kind", group1="maybe", group2="no", condition="stim")
    with pytest.raises(QueryError, match="condition='drug' is no column"):
        ask(fitted, groupby="kind", condition="drug")
    with pytest.raises(QueryError, match="No group of 'stim' has cells of both sides"):
        ask(fitted, groupby="stim", group1="l1", group2="l2", condition="lane")


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"design": "~ stim + sex", "contrast": "sex[T.X]"}, r"no coefficient 'sex\[T.X\]'"),
        ({"design": "~ stim + lane"}, "not of full rank"),
        ({"design": "~ stim + age"}, "reads 'age'"),
        ({"paired": True}, "no replicate is in both groups"),
        ({"condition": "stim", "groupby": "kind", "design": "~ stim + lane"}, "not of full rank"),
    ],
    ids=str,
)
def test_a_design_is_refused_before_anything_is_drawn(fitted, choices, said, monkeypatch):
    monkeypatch.setattr("pyrocell.models.populations.population_moments", None)
    with pytest.raises(QueryError, match=said):
        ask(fitted, **{"groupby": "stim", "group1": "yes", "group2": "no", "sample_key": "donor"} | choices)


def test_groups_whose_design_does_not_work_are_left_out(fitted):
    """In B, one sex only; and in another call no treated cell that has a donor."""
    obs = fitted.dataset.adata.obs
    keywords = {"groupby": "kind", "group1": "yes", "group2": "no", "condition": "stim"}
    one_sex = fitted.dataset.adata[(obs["kind"] == "T") | (obs["sex"] == "F")].copy()
    choices = keywords | {"sample_key": "donor", "design": "~ stim + sex", "contrast": "sex[T.M]"}
    with pytest.warns(PyrocellWarning, match=r"'yes vs no in B' is left out. There is no coefficient"):
        table = ask(fitted, adata=one_sex, **choices)
    assert set(table["within"]) == {"T"} and table["lfc_mean"].notna().any()
    nameless = fitted.dataset.adata.copy()
    lost = (obs["kind"] == "B") & (obs["stim"] == "yes")
    nameless.obs["donor"] = obs["donor"].astype(str).where(~lost)
    with pytest.warns(PyrocellWarning, match=r"'yes vs no in B' is left out. No cell of group 'yes'"):
        table = ask(fitted, adata=nameless, **keywords, sample_key="donor")
    assert set(table["within"]) == {"T"}


def test_a_condition_that_is_a_batch_is_warned_about():
    model = fit(planted(300, 20), 1, {"batch_key": "lane"})
    with pytest.warns(PyrocellWarning, match="'yes vs no' share no batch"):
        ask(model, groupby="stim", group1="yes", group2="no")
    with pytest.warns(PyrocellWarning, match="correcting for batches may take it away"):
        model.differential_expression(groupby="stim", group1="yes", group2="no", batch_correction=True)
    ask(model, groupby="kind", group1="T")  # both types are in both batches
    ask(model, groupby="lane", group1="l1")  # the batches themselves
    by_donor = fit(planted(300, 20), 1, {"batch_key": "donor"})
    ask(by_donor, groupby="stim", group1="yes", group2="no", sample_key="donor")
    with pytest.warns(PyrocellWarning, match="share no batch"):
        ask(by_donor, groupby="stim", group1="yes", group2="no")


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"groupby": "kind", "sample_key": "mouse"}, r"sample_key='mouse' is no column.*'donor'"),
        (
            {"groupby": "kind", "sample_key": "donor", "mode": "change"},
            "sample_key='donor'.*use mode='population'",
        ),
        ({"groupby": "kind", "weights": "importance"}, "weights='importance'.*use mode='change'"),
        ({"groupby": "kind", "filter_outlier_cells": True}, "filter_outlier_cells=True"),
        ({"groupby": "kind", "batches1": [{"batch": "x"}]}, "batches1="),
        ({"groupby": "kind", "batches2": [{"batch": "x"}]}, "batches2="),
        ({"groupby": "kind", "n_samples": 100}, "n_samples=100 was given with mode='population'.*5000"),
        ({"groupby": "kind", "n_pairs": 100}, "n_pairs=100"),
        ({"groupby": "kind", "truncate_weights": True}, "truncate_weights=True"),
        ({"groupby": "kind", "mode": "change", "multiplicity": "table"}, "multiplicity='table'"),
        ({"groupby": "kind", "mode": "vanilla", "relative_to": "total"}, "relative_to='total'"),
        ({"groupby": "kind", "mode": "change", "min_counts": 0}, "min_counts=0 .*cells with cells"),
        ({"groupby": "kind", "mode": "change", "cells_per_stratum": 9}, "cells_per_stratum=9"),
        ({"idx1": [1, 2], "condition": "stim"}, "give groupby="),
        ({"idx1": [1, 2], "idx2": [2, 3]}, "1 cells are on both sides"),
        ({"groupby": "kind", "delta": "none"}, "delta is 'none'"),
        ({"groupby": "kind", "delta": -1.0}, "delta is -1.0"),
        ({"groupby": "kind", "fdr_target": 5}, "fdr_target is 5"),
        ({"groupby": "kind", "mode": "t-test"}, "mode is 't-test'"),
    ],
    ids=str,
)
def test_questions_that_make_no_sense(fitted, question, said):
    with pytest.raises(QueryError, match=said):
        ask(fitted, **question)


# ------------------------------------------------------------------------------------------------ the pass


def test_no_more_than_a_block_of_cells_is_ever_decoded(fitted, monkeypatch):
    """Every comparison of a call shares one pass, whose tables are those of strata."""
    seen = []

    def watched(self, codes, values):
        seen.append((len(codes), self.products.shape))
        return plain(self, codes, values)

    plain = MomentSums.update
    monkeypatch.setattr(MomentSums, "update", watched)
    monkeypatch.setattr("pyrocell.models.populations._NUMBERS", 200 * 50)
    table = ask(fitted, groupby="donor", all_pairs=True)
    assert table["comparison"].nunique() == 15
    assert max(size for size, _ in seen) <= 50 and sum(size for size, _ in seen) == fitted.dataset.n_cells
    assert {shape for _, shape in seen} == {(6, 6, 200)}


def test_the_same_question_has_the_same_answer_and_leaves_the_data_alone(fitted):
    adata = fitted.dataset.adata
    before = adata.X.copy(), adata.obs.copy()
    one, two = (ask(fitted, groupby="kind", sample_key="donor") for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    assert (before[0] != adata.X).nnz == 0
    pd.testing.assert_frame_equal(adata.obs, before[1])
    other = ask(fitted, groupby="kind", sample_key="donor", seed=3)
    assert not np.array_equal(one["lfc_mean"], other["lfc_mean"])


def test_models_of_few_lines_compare_means():
    adata = planted(200, 20)
    PoissonFactors.setup_anndata(adata)
    model = PoissonFactors(adata)
    model.train(3)
    table = model.differential_expression(groupby="kind", group1="T")
    assert np.isfinite(table["lfc_mean"][table["tested"]]).all()


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.slow
def test_genes_of_the_interferon_response_rise_in_every_cell_type():
    adata = anndata.read_h5ad(real_data("kang_2donor_muscat.h5ad"))
    model = fit(adata, 30, n_hidden=128, n_latent=10)
    known = ["ISG15", "IFIT1", "IFIT3", "IFI6", "ISG20", "MX1", "LY6E", "IFIT2"]
    for sample_key in ("donor", None):
        table = ask(
            model,
            groupby="cell_type",
            group1="stim",
            group2="ctrl",
            condition="condition",
            sample_key=sample_key,
        )
        for name, part in table.groupby("within"):
            assert (part.loc[known, "lfc_mean"] > 0).all(), name
            # two donors leave one degree of freedom
            assert part.loc[known, CALLED].mean() >= (0.5 if sample_key else 0.75), name
            place = part.index.get_indexer(known)
            assert np.sort(place)[3] < 40, (name, place)  # half of them on top


@pytest.mark.slow
def test_donors_of_one_condition_do_not_differ():
    adata = anndata.read_h5ad(real_data("kang_8donors_12261.h5ad"))
    adata = adata[adata.obs["cell_type"] == "CD14+ Monocytes"].copy()
    model = fit(adata, 30, n_hidden=128, n_latent=10)
    calls, with_cells = [], []
    donors = np.array(sorted(adata.obs["donor"].unique()))
    for seed in range(6):
        some = list(np.random.default_rng(seed).permutation(donors)[:4])
        first = adata.obs["donor"].isin(some).to_numpy()
        calls.append(ask(model, idx1=first, idx2=~first, sample_key="donor")[CALLED].mean())
        with_cells.append(ask(model, idx1=first, idx2=~first)[CALLED].mean())
    assert np.mean(calls) <= 0.005, calls
    assert np.mean(with_cells) > 0.05
