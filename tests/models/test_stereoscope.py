"""RNAStereoscope and SpatialStereoscope: their likelihood, their verbs, what they refuse, and what they recover."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.optimize import nnls
from scipy.stats import nbinom, norm

import pyrocell
from pyrocell import RNAStereoscope, SpatialStereoscope
from pyrocell.errors import DataError, NotTrainedError, PyrocellWarning, QueryError, SetupError, TrainingError
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.rna_stereoscope import sums_of_cells
from tests.multimodal import real_data

TYPES = ["A", "B", "C", "D", "E", "F"]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def sums(draw, mean, logits):
    """Counts of the model: variance 1 + exp(logits) times the mean."""
    return draw.negative_binomial(mean * np.exp(-logits), 1 / (1 + np.exp(logits)))


def counts_of(values, names, genes):
    adata = anndata.AnnData(sparse.csr_matrix(values.astype(np.float32)))
    adata.obs_names, adata.var_names = [f"{names}{i}" for i in range(len(values))], genes
    return adata


def simulate(seed=0, n_types=6, n_genes=500, n_cells=1200, n_spots=500):
    """Cells of types that differ in size, and spots of 5 to 20 such cells, seen with gene factors and 3 % of noise."""
    draw = np.random.default_rng(seed)
    genes = [f"gene{g}" for g in range(n_genes)]
    rho = draw.lognormal(0, 1, (n_types, n_genes))
    rho /= rho.sum(1, keepdims=True)
    logits, factor = draw.normal(0, 0.5, n_genes), draw.lognormal(0, 0.3, n_genes)
    size = 800 * np.geomspace(0.5, 2, n_types)
    label = draw.permutation(np.arange(n_cells) % n_types)
    library = size[label] * draw.lognormal(-0.02, 0.2, n_cells)
    reference = counts_of(sums(draw, library[:, None] * rho[label], logits), "cell", genes)
    reference.obs["cell_type"] = np.array(TYPES)[label]
    proportions = draw.dirichlet(np.full(n_types, 0.5), n_spots)
    mean = (draw.integers(5, 21, (n_spots, 1)) * proportions * size) @ rho * factor
    noise = draw.lognormal(0, 1, n_genes)
    mean += 0.03 / 0.97 * mean.sum(1, keepdims=True) * noise / noise.sum()
    spots = counts_of(sums(draw, mean, logits), "spot", genes)
    truth = {"proportions": proportions, "factor": factor, "profiles": rho * size[:, None], "logits": logits}
    return reference, spots, truth


def fit_reference(adata, epochs=30):
    RNAStereoscope.setup_anndata(adata, labels_key="cell_type")
    model = RNAStereoscope(adata)
    model.train(epochs)
    return model


def fit(reference, spots, epochs=30, model_class=SpatialStereoscope, **options):
    model_class.setup_anndata(spots)
    model = model_class.from_rna_model(spots, reference, **options)
    if epochs:
        model.train(epochs)
    return model


@pytest.fixture(scope="module")
def small():
    """A fitted reference of 4 types and 40 genes, and 50 spots."""
    reference, spots, _ = simulate(1, 4, 40, 200, 50)
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        model = fit_reference(reference)
    finally:
        pyrocell.settings.progress = before
    return model, spots


@pytest.fixture(scope="module")
def fitted(small):
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        return fit(small[0], small[1].copy())
    finally:
        pyrocell.settings.progress = before


# ---------------------------------------------------------------------------------------------- the models


def log_likelihood(x, mean, logits):
    """Log-probability of each row, in float64, by SciPy."""
    return nbinom.logpmf(x, mean * np.exp(-logits), 1 / (1 + np.exp(logits))).sum(1)


def test_likelihood_of_cells_is_the_negative_binomial_of_their_type(small):
    model, _ = small
    adata = model.dataset.adata
    x, label = adata.X.toarray().astype(np.float64), adata.obs["cell_type"].to_numpy()
    rho = model.get_profiles(unit="transcripts").loc[label].to_numpy(np.float64)
    mean = x.sum(1, keepdims=True) * rho
    expected = log_likelihood(x, mean, model.get_logits().to_numpy(np.float64))
    np.testing.assert_allclose(-model.get_reconstruction_error(return_mean=False), expected, rtol=2e-5)
    np.testing.assert_allclose(model.posterior("mu"), mean, rtol=1e-5)
    # The bound has one pseudo-count a type beside: that of the average cell, scored as Poisson without its factorial.
    average, of_types = x.sum(0) / x.sum(), model.get_profiles(unit="transcripts").to_numpy(np.float64)
    seen = average > 0
    pseudo = (average[seen] * np.log(of_types[:, seen])).sum() - of_types.sum()
    assert model.get_elbo() == pytest.approx(expected.mean() + pseudo / len(x), rel=1e-5)


def test_bound_of_spots_is_that_of_the_mode(small, fitted):
    model = fitted
    x = model.dataset.adata.X.toarray().astype(np.float64)
    log_factor, noise = (model.posterior(site).astype(np.float64) for site in ("log_gene_factor", "noise"))
    part = model.posterior("log_abundance").astype(np.float64)
    profiles = small[0].get_profiles().to_numpy(np.float64)
    average = profiles.mean(0)
    factor = np.exp(log_factor) / (np.exp(log_factor) * average).sum() * average.sum()
    of_noise = np.log1p(np.exp(noise)) / np.log(2) * average.sum() / 40
    abundance = np.exp(part) * x.sum(1, keepdims=True) / average.sum() / 5
    mean = abundance[:, :4] @ profiles * factor + abundance[:, 4:] * of_noise
    expected = log_likelihood(x, mean, small[0].get_logits().to_numpy(np.float64))
    np.testing.assert_allclose(-model.get_reconstruction_error(return_mean=False), expected, rtol=2e-5)
    prior = norm.logpdf(log_factor).sum() + norm.logpdf(noise).sum()
    assert model.get_elbo() == pytest.approx(expected.mean() + prior / len(x), rel=1e-5)
    np.testing.assert_allclose(model.posterior("mu"), mean, rtol=1e-4)
    np.testing.assert_allclose(model.posterior("abundance"), abundance[:, :4], rtol=1e-5)
    np.testing.assert_allclose(model.get_gene_factors(), factor, rtol=1e-4)


def test_counts_of_cells_add_up():
    """Two cells of different types together have the distribution of their means together."""
    logits = torch.tensor([0.7])
    means = [torch.tensor([1.3]), torch.tensor([4.1])]
    x = torch.arange(200.0).unsqueeze(1)

    def probability(mean):
        return sums_of_cells(mean.log(), logits).log_prob(x).double().exp().numpy()

    together = np.convolve(probability(means[0]), probability(means[1]))[:200]
    np.testing.assert_allclose(together, probability(means[0] + means[1]), atol=1e-6)


def test_the_start_is_the_mean_of_the_prior(small):
    model = fit(small[0], small[1].copy(), 0)
    start = dict(model.module.autoguide.named_parameters())
    assert start and not any(value.any() for value in start.values())
    assert all(value.is_contiguous() for value in start.values())


@pytest.mark.parametrize(
    "options",
    [{"train_size": 0.5}, {"early_stopping": True}, {"plan": TrainingPlan(train_indices=[0, 1])}],
    ids=str,
)
def test_no_spot_can_be_held_out(small, options):
    model = fit(small[0], small[1].copy(), 0)
    with pytest.raises(TrainingError, match="each cell has parameters of its own, so none can be held out"):
        model.train(1, **options)


def test_nothing_is_drawn_and_each_spot_has_its_own_parameters(fitted):
    draws = fitted.posterior("proportions", n_samples=3, return_mean=False)
    np.testing.assert_array_equal(draws[0], draws[2])
    assert fitted.has_local_parameters and fitted.module.autoguide.log_abundance.shape == (50, 5)
    assert not hasattr(fitted, "load_query_data")  # there is nothing that infers a new spot


def test_epochs_do_not_shrink_with_the_number_of_spots(fitted, small):
    assert fitted._default_epochs(100_000) == 400
    assert small[0]._default_epochs(100_000) == 20


def test_a_minibatch_is_as_good_as_all_spots(small):
    whole, parts = (fit(small[0], small[1].copy(), 0) for _ in range(2))
    whole.train(60)
    parts.train(60, batch_size=25)
    assert abs(whole.get_elbo() - parts.get_elbo()) < 0.05 * abs(whole.get_elbo())  # twice the steps
    tables = [model.get_proportions().to_numpy().ravel() for model in (whole, parts)]
    assert np.corrcoef(tables)[0, 1] > 0.95


# ----------------------------------------------------------------------------------------------- the verbs


def test_proportions_of_cells(fitted):
    table = fitted.get_proportions()
    assert list(table.columns) == TYPES[:4] and list(table.index) == list(fitted.dataset.obs_names)
    np.testing.assert_allclose(table.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(table, fitted.posterior("proportions"), atol=1e-6)
    pd.testing.assert_frame_equal(fitted.get_proportions(indices=[7, 2]), table.iloc[[7, 2]])
    mask = np.arange(50) % 3 == 0
    pd.testing.assert_frame_equal(fitted.get_proportions(indices=mask, batch_size=5), table[mask])
    noisy = fitted.get_proportions(keep_noise=True)
    assert list(noisy.columns) == [*TYPES[:4], "noise_term"]
    np.testing.assert_allclose(noisy.sum(1), 1, rtol=1e-6)
    rest = noisy[TYPES[:4]]
    np.testing.assert_allclose(rest.div(rest.sum(1), axis=0), table, rtol=1e-6)


def test_proportions_of_transcripts_take_the_expected_counts_apart(fitted):
    table = fitted.get_proportions(unit="transcripts", keep_noise=True)
    of_types = fitted.posterior("abundance") * fitted.get_scale_for_ct(fitted.types).sum(1).to_numpy()
    total = fitted.posterior("mu").sum(1)
    np.testing.assert_allclose(table[TYPES[:4]], of_types / total[:, None], atol=1e-5)
    np.testing.assert_allclose(table["noise_term"], 1 - of_types.sum(1) / total, atol=1e-5)
    assert np.abs(table[TYPES[:4]] - fitted.get_proportions()).to_numpy().max() > 0.05


def test_scale_of_types(fitted, small):
    profiles = small[0].get_profiles()
    table = fitted.get_scale_for_ct(["C", "A", "C"])
    assert list(table.index) == ["C", "A", "C"] and list(table.columns) == fitted.data.names("counts")
    expected = profiles.loc[["C", "A", "C"]] * fitted.get_gene_factors()
    np.testing.assert_allclose(table, expected[table.columns], rtol=1e-5)
    pd.testing.assert_frame_equal(fitted.get_scale_for_ct("C"), table.iloc[:1])
    # An average cell has as many counts in the tissue as in the reference.
    scale = fitted.get_scale_for_ct(TYPES[:4])
    assert scale.to_numpy().sum() == pytest.approx(profiles.to_numpy().sum(), rel=1e-4)


def test_profiles_are_near_the_means_of_the_cells(small):
    model, _ = small
    adata = model.dataset.adata
    means = (
        pd.DataFrame(adata.X.toarray(), columns=adata.var_names)
        .groupby(adata.obs["cell_type"].to_numpy())
        .mean()
    )
    assert (
        np.corrcoef(
            np.log(model.get_profiles() + 0.1).to_numpy().ravel(), np.log(means + 0.1).to_numpy().ravel()
        )[0, 1]
        > 0.99
    )
    np.testing.assert_allclose(model.get_profiles().sum(1), means.sum(1), rtol=0.02)
    np.testing.assert_allclose(model.get_profiles(unit="transcripts").sum(1), 1, rtol=0.02)


def test_the_second_stage_needs_no_reference_to_be_loaded(fitted, tmp_path):
    fitted.save(tmp_path / "spots")
    again = SpatialStereoscope.load(tmp_path / "spots", fitted.dataset.adata)
    pd.testing.assert_frame_equal(
        again.get_proportions(keep_noise=True), fitted.get_proportions(keep_noise=True)
    )
    pd.testing.assert_frame_equal(again.get_scale_for_ct("B"), fitted.get_scale_for_ct("B"))


def test_a_reference_loaded_without_data_gives_the_same_spots(small, fitted, tmp_path):
    small[0].save(tmp_path / "reference")
    model = fit(RNAStereoscope.load(tmp_path / "reference"), small[1].copy())
    pd.testing.assert_frame_equal(model.get_proportions(), fitted.get_proportions())


def test_shared_genes_are_found_by_name(small):
    reference, spots = small
    other = spots[:, ::-1].copy()
    other.var_names = [f"other{i}" if i % 4 == 0 else name for i, name in enumerate(other.var_names)]
    names, values = list(other.var_names), other.X.copy()
    model = fit(reference, other, 2)
    assert model.data.names("counts") == [name for name in names if name.startswith("gene")]
    assert list(other.var_names) == names and (values != other.X).nnz == 0
    again = fit(reference, spots[:, model.data.names("counts")].copy(), 2)
    pd.testing.assert_frame_equal(model.get_proportions(), again.get_proportions())


def test_a_gene_that_the_reference_never_saw_is_left_aside():
    reference, spots, _ = simulate(2, 4, 40, 200, 50)
    counts = reference.X.toarray()
    counts[:, 7] = 0
    reference.X = sparse.csr_matrix(counts)
    model = fit(fit_reference(reference, 2), spots, 2)
    assert "gene7" not in model.data.names("counts") and model.data.size("counts") == 39


def test_profiles_from_elsewhere():
    """Tables of any origin will do: here the truth."""
    _, spots, truth = simulate(3, 4, 60, 200, 40)
    profiles = pd.DataFrame(truth["profiles"], TYPES[:4], spots.var_names)
    SpatialStereoscope.setup_anndata(spots)
    model = SpatialStereoscope(spots, profiles.iloc[:, ::-1], pd.Series(truth["logits"], spots.var_names))
    model.train(100)
    assert np.sqrt(((model.get_proportions().to_numpy() - truth["proportions"]) ** 2).mean()) < 0.08


# -------------------------------------------------------------------------------------------- bad input


def renamed(spots, keep):
    """Spots of which only the first ``keep`` genes have names of the reference."""
    other = spots.copy()
    other.var_names = [name if i < keep else f"ENSG{i}" for i, name in enumerate(other.var_names)]
    return other


@pytest.mark.parametrize("keep", [0, 3])
def test_few_shared_genes_are_refused_and_counted(small, keep):
    others = f"{40 - keep} of the 40"
    said = rf"Only {keep} genes are shared: {others} .*'gene{keep}'.* {others} .*'ENSG{keep}'.*4 cell types.*Rename"
    with pytest.raises(DataError, match=said):
        fit(small[0], renamed(small[1], keep), 0)


def test_less_than_half_of_the_genes_gives_a_warning_with_the_number(small):
    with pytest.warns(PyrocellWarning, match="^12 genes are shared"):
        fit(small[0], renamed(small[1], 12), 0)
    fit(small[0], renamed(small[1], 20), 0)  # no warning


def test_spots_without_counts_are_named(small):
    reference, spots = small
    counts = spots.X.toarray()
    counts[[3, 8]] = 0
    empty = counts_of(counts, "spot", spots.var_names)
    with pytest.raises(
        DataError, match=r"2 cells have no counts over the 40 features.*'spot3', 'spot8'.*Remove"
    ):
        fit(reference, empty, 0)
    counts = spots.X.toarray()
    counts[5, :30] = 0  # it has counts, but none over the shared genes
    empty = renamed(counts_of(counts, "spot", spots.var_names), 30)
    with pytest.raises(DataError, match=r"1 cells have no counts over the 30 features.*'spot5'"):
        fit(reference, empty, 0)


def test_other_refusals(small, fitted):
    reference, spots = small
    SpatialStereoscope.setup_anndata(spots)
    untrained = RNAStereoscope(reference.dataset.adata)
    with pytest.raises(NotTrainedError, match="train"):
        SpatialStereoscope.from_rna_model(spots, untrained)
    with pytest.raises(
        SetupError, match="rna_model is of type SpatialStereoscope; expected a trained RNAStereoscope"
    ):
        SpatialStereoscope.from_rna_model(spots, fitted)
    with pytest.raises(SetupError, match=r"not set up for SpatialStereoscope"):
        SpatialStereoscope.from_rna_model(counts_of(spots.X.toarray(), "spot", spots.var_names), reference)
    with pytest.raises(QueryError, match="no types 'Q'; it has 'A', 'B'"):
        fitted.get_scale_for_ct(["A", "Q"])
    for ask in (fitted.get_proportions, reference.get_profiles):
        with pytest.raises(QueryError, match="unit is 'counts'; expected 'cells' or 'transcripts'"):
            ask(unit="counts")
    with pytest.raises(QueryError, match="parameters for each cell that it was trained on"):
        fitted.get_proportions(fitted.dataset.adata[::-1].copy())
    one = reference.dataset.adata.copy()
    one.obs["cell_type"] = "A"
    with pytest.raises(DataError, match="labels_key='cell_type' has 1 category"):
        fit_reference(one, 1)
    lognormal = spots.copy()
    lognormal.X = lognormal.X.log1p()
    with pytest.raises(DataError, match="looks log-normalised"):
        fit(reference, lognormal, 0)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda p, o: (-p, o), SetupError, "negative, or all zero; types with such profiles: 'A', 'B'"),
        (lambda p, o: (p.T.assign(C=np.nan).T, o), SetupError, "types with such profiles: 'C'"),
        (lambda p, o: (p.set_axis(["A", "B", "C", "B"]), o), SetupError, "named twice.*profiles: 'B'"),
        (
            lambda p, o: (p.drop(columns=["gene3", "gene5"]), o),
            DataError,
            "2 of the 40 genes.*in profiles: 'gene3'",
        ),
        (lambda p, o: (p, o.drop("gene9")), DataError, "1 of the 40 genes.*in logits: 'gene9'"),
    ],
    ids=["negative", "missing", "twice", "profiles", "logits"],
)
def test_impossible_references_are_refused(small, change, kind, said):
    reference, spots = small
    SpatialStereoscope.setup_anndata(spots)
    with pytest.raises(kind, match=said):
        SpatialStereoscope(spots, *change(reference.get_profiles(), reference.get_logits()))


# ------------------------------------------------------------------------------------------- the recovery


def score(model, truth):
    found = model.get_proportions().to_numpy()
    types = [np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, truth["proportions"].T, strict=True)]
    factors = model.get_gene_factors().to_numpy()
    return {
        "rmse": -np.sqrt(((found - truth["proportions"]) ** 2).mean()),
        "types": np.mean(types),
        "factors": np.corrcoef(np.log(factors + 1e-9), np.log(truth["factor"]))[0, 1]
        if factors.std()
        else 0.0,
    }


GATES = {"rmse": -0.06, "types": 0.9, "factors": 0.8}


def failures(scores):
    return {name for name, least in GATES.items() if not scores[name] >= least}


class OfNeighbours(SpatialStereoscope):
    """Defect: each spot of a minibatch is explained by the counts of the next."""

    def model(self, cells):
        super().model(cells.replace(counts=cells.counts.roll(1, 0)))


class WithoutFactors(SpatialStereoscope):
    """Defect: the model takes genes to be seen alike in reference and tissue."""

    def model(self, cells):
        self._factor = torch.ones_like
        try:
            super().model(cells)
        finally:
            del self._factor


@pytest.mark.slow
def test_recovers_what_was_simulated_and_fails_on_defects():
    reference, spots, truth = simulate()
    rna = fit_reference(reference, 60)
    found, true = (
        np.log(p).to_numpy().ravel() for p in (rna.get_profiles(), pd.DataFrame(truth["profiles"]))
    )
    assert np.corrcoef(found, true)[0, 1] >= 0.99
    assert np.corrcoef(rna.get_logits(), truth["logits"])[0, 1] >= 0.9
    scores = score(fit(rna, spots.copy(), 300), truth)
    assert not failures(scores), scores
    for defect, broken in ((OfNeighbours, "rmse"), (WithoutFactors, "factors")):
        scores = score(fit(rna, spots.copy(), 150, defect), truth)
        assert broken in failures(scores), (defect, scores)
    # Third: proportions of transcripts, told as those of cells.
    table = fit(rna, spots.copy(), 150).get_proportions(unit="transcripts")
    assert np.sqrt(((table.to_numpy() - truth["proportions"]) ** 2).mean()) > 0.06


@pytest.mark.slow
def test_held_out_cells_of_motor_cortex():
    """Mixtures of real cells that the reference never saw: better than least squares on the means of types."""
    adata = anndata.read_h5ad(real_data("pair_mop_reference_x500.h5ad"))
    draw = np.random.default_rng(0)
    label, counts = adata.obs["cell_type"].astype(str).to_numpy(), adata.X.toarray().astype(np.int64)
    common = [name for name in np.unique(label) if (label == name).sum() >= 140]
    half = {name: np.array_split(draw.permutation(np.flatnonzero(label == name))[:140], 2) for name in common}
    known = np.concatenate([one for one, _ in half.values()])
    truth, mixed = np.zeros((100, len(common))), np.zeros((100, counts.shape[1]))
    for spot in range(100):
        for kind in draw.choice(len(common), draw.integers(1, 6), replace=False):
            chosen = draw.choice(half[common[kind]][1], draw.integers(1, 8), replace=False)
            truth[spot, kind] = len(chosen)
            mixed[spot] += draw.binomial(counts[chosen].sum(0), 0.5)
    truth /= truth.sum(1, keepdims=True)
    reference = counts_of(counts[known], "cell", adata.var_names)
    reference.obs["cell_type"] = label[known]
    model = fit(fit_reference(reference, 20), counts_of(mixed, "spot", adata.var_names), 300)
    means = np.stack([counts[one].mean(0) for one, _ in half.values()])
    plain = np.stack([nnls(means.T, row)[0] for row in mixed])
    errors = [
        np.sqrt(((found - truth) ** 2).mean())
        for found in (model.get_proportions()[common].to_numpy(), plain / plain.sum(1, keepdims=True))
    ]
    assert errors[0] < 0.05 and errors[0] < 0.9 * errors[1], errors
