"""Bad input gets a clear error before training, which names the offenders and the remedy, and changes nothing."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData, read_h5ad

import pyrocell
from pyrocell import SCVI, CellModel
from pyrocell.data import Category, Counts, synthetic_iid
from pyrocell.errors import (
    DataError,
    NotTrainedError,
    PyrocellError,
    PyrocellWarning,
    QueryError,
    SetupError,
)

N_CELLS, N_GENES = 60, 12
SMALL = {"n_hidden": 8, "n_latent": 2}
KEYS = {
    "layer": "counts",
    "batch_key": "batch",
    "labels_key": "label",
    "size_factor_key": "size_factor",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def data(seed=0) -> AnnData:
    return synthetic_iid(n_cells=N_CELLS, n_genes=N_GENES, n_proteins=0, n_regions=0, seed=seed)


class Snapshot:
    """Everything in an AnnData, to see that nothing of it changed."""

    def __init__(self, adata):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names that repeat are one of the faults
            self.adata, self.before = adata, adata.copy()
        self.x, self.layers = adata.X, dict(adata.layers)

    def assert_unchanged(self):
        now, before = self.adata, self.before
        assert now.X is self.x and all(now.layers[name] is value for name, value in self.layers.items())
        for name in [None, *before.layers]:
            one, two = ((a.X if name is None else a.layers[name]) for a in (now, before))
            one, two = (m.toarray() if sp.issparse(m) else np.asarray(m) for m in (one, two))
            np.testing.assert_array_equal(one, two)
        pd.testing.assert_frame_equal(now.obs, before.obs)
        pd.testing.assert_frame_equal(now.var, before.var)
        for part in ("obsm", "varm", "obsp", "layers"):
            assert list(getattr(now, part)) == list(getattr(before, part))
        assert list(now.uns) == list(before.uns)
        assert now.uns.get("pyrocell") == before.uns.get("pyrocell")


def refused(kind, said, adata, setup=None, **options):
    """Set up and make a model; return the message of the refusal, which comes at one of the two, before training."""
    setup = KEYS if setup is None else setup
    start = Snapshot(adata)
    try:
        SCVI.setup_anndata(adata, **setup)
    except PyrocellError as error:
        caught = error
        start.assert_unchanged()
    else:
        ready = Snapshot(adata)
        with pytest.raises(PyrocellError) as info:
            SCVI(adata, **SMALL, **options)
        caught = info.value
        ready.assert_unchanged()
    message = str(caught)
    assert type(caught) is kind, message
    assert re.search(said, message), message
    assert message.endswith((".", "?")) and len(message) < 1000, message
    return message


def with_values(kind, values, where="counts"):
    """Data with some counts replaced: {(cell, gene): value}; ``kind`` makes the container."""
    adata = data()
    counts = adata.layers["counts"].toarray()
    for place, value in values.items():
        counts[place] = value
    if where == "counts":
        adata.layers["counts"] = kind(counts)
    else:
        adata.X = kind(counts)
    return adata


CONTAINERS = [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array]
SEVEN = [(i, i) for i in range(7)]


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-2.0, r"layers\['counts'\] has 7 negative values: -2 \(cell 'cell_0', feature 'gene_0'\)"),
        (0.5, r"7 values that are not whole"),
        (np.nan, r"7 values that are NaN or infinite"),
        (np.inf, r"7 values that are NaN or infinite"),
        (-np.inf, r"7 values that are NaN or infinite"),
    ],
    ids=["negative", "fraction", "nan", "inf", "-inf"],
)
def test_values_that_are_no_counts(container, value, said):
    message = refused(DataError, said, with_values(container, dict.fromkeys(SEVEN, value)))
    assert all(f"'cell_{i}', feature 'gene_{i}'" in message for i in range(5))
    assert "gene_5" not in message and "and 2 more" in message
    assert re.search(r"set up with layer=|Remove|set the values to 0|allow_noninteger=True", message)


@pytest.mark.parametrize("value", [-2.0, np.nan, np.inf])
def test_the_flag_for_fractions_allows_nothing_else(value):
    setup = KEYS | {"allow_noninteger": True}
    refused(
        DataError, "negative|NaN or infinite", with_values(np.asarray, {(3, 4): value, (3, 5): 0.5}), setup
    )


def test_the_flag_allows_fractions():
    adata = with_values(sp.csr_matrix, {(3, 5): 0.5})
    assert "allow_noninteger=True" in refused(DataError, "not whole", adata)
    SCVI.setup_anndata(adata, **KEYS, allow_noninteger=True)
    model = SCVI(adata, **SMALL)
    model.train(1)
    assert np.isfinite(model.get_elbo())


def test_log_normalised_data_are_recognised():
    adata = data()
    counts = adata.X.toarray()
    adata.X = sp.csr_matrix(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4))
    message = refused(DataError, r"adata\.X looks log-normalised", adata, {})
    assert "layer= (there are: 'counts')" in message and "raw counts" in message


def test_the_remedy_speaks_of_raw_and_of_nothing():
    adata = data()
    adata.raw = adata
    adata.X = np.log1p(adata.X.toarray())
    assert "adata.raw.to_adata()" in refused(DataError, "looks log-normalised", adata, {})
    del adata.layers["counts"]
    adata.raw = None
    assert "Read the raw counts again" in refused(DataError, "looks log-normalised", adata, {})


def test_scaled_data_are_recognised():
    adata = data()
    counts = adata.X.toarray()
    adata.X = (counts - counts.mean(0)) / counts.std(0)
    assert "look scaled" in refused(DataError, "negative values", adata, {})


@pytest.mark.parametrize("container", CONTAINERS)
def test_cells_without_counts(container):
    message = refused(
        DataError,
        rf"7 cells have no counts over the {N_GENES} features of adata.layers\['counts'\]: 'cell_0'",
        with_values(container, {(row, gene): 0 for row in range(7) for gene in range(N_GENES)}),
    )
    assert "'cell_4' and 2 more" in message and "filter_cells" in message


def test_data_without_cells_or_genes():
    refused(DataError, "nothing to learn from", data()[:0].copy(), {"layer": "counts"})
    refused(DataError, "nothing to learn from", data()[:, :0].copy(), {"layer": "counts"})


def test_backed_data_are_checked_too(tmp_path):
    adata = with_values(sp.csr_matrix, {(3, 4): -1}, where="X")
    adata.write_h5ad(tmp_path / "data.h5ad")
    backed = read_h5ad(tmp_path / "data.h5ad", backed="r")
    try:
        SCVI.setup_anndata(backed)
        with pytest.raises(
            DataError, match=r"adata\.X has 1 negative values: -1 \(cell 'cell_3', feature 'gene_4'\)"
        ):
            SCVI(backed)
    finally:
        backed.file.close()


# ------------------------------------------------------------------------------------------------ what is not there


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        ({"layer": "Counts"}, r"layer='Counts'.*no such layer.*Did you mean 'counts'\? Available: 'counts'"),
        (
            {"batch_key": "batches"},
            r"batch_key='batches'.*Did you mean 'batch'\? Available: 'batch', 'label'",
        ),
        ({"labels_key": "celltype"}, r"labels_key='celltype'.*Available: 'batch', 'label'"),
        ({"size_factor_key": "sf"}, r"size_factor_key='sf'.*Available"),
        ({"categorical_covariate_keys": ["donor", "kit"]}, r"categorical_covariate_keys='kit'.*Available"),
        ({"continuous_covariate_keys": ["age", "mito"]}, r"continuous_covariate_keys='mito'.*Available"),
        ({"categorical_covariate_keys": ["donor", "donor"]}, r"names a column twice"),
        ({"batch_key": ["batch"]}, r"batch_key is \['batch'\]; expected the name of a column"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_there_is_named_with_what_is(setup, said):
    refused(SetupError, said, data(), setup)


def test_no_matrix_at_all():
    adata = data()
    adata.X = None
    refused(SetupError, r"adata\.X is empty; give layer=, one of: 'counts'", adata, {})


def test_other_objects_than_anndata():
    mudata = pytest.importorskip("mudata")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = mudata.MuData({"rna": data(), "atac": data(seed=1)})
    for thing in (data().to_df(), "data.h5ad", None):
        with pytest.raises(SetupError, match=rf"Got a {type(thing).__name__}; expected an AnnData"):
            SCVI.setup_anndata(thing)
    with pytest.raises(SetupError, match=r"Got a MuData .*'rna', 'atac'; expected an AnnData"):
        SCVI.setup_anndata(together)


def test_a_model_without_setup():
    adata = data()
    before = Snapshot(adata)
    with pytest.raises(SetupError, match=r"not set up for SCVI.*SCVI\.setup_anndata"):
        SCVI(adata)
    before.assert_unchanged()
    with pytest.raises(SetupError, match=r"needs an AnnData|expected an AnnData"):
        SCVI(None)


def test_what_went_away_after_the_setup():
    adata = data()
    SCVI.setup_anndata(adata, **KEYS)
    del adata.obs["batch"]
    with pytest.raises(SetupError, match="batch_key='batch'.*no such column"):
        SCVI(adata)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"no argument 'batchkey'\. Did you mean 'batch_key'\?"):
        SCVI.setup_anndata(data(), batchkey="batch")


# ------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize("column", ["batch", "label", "donor"])
@pytest.mark.parametrize("as_text", [False, True])
def test_missing_categories(column, as_text):
    adata = data()
    if as_text:
        adata.obs[column] = adata.obs[column].astype(object)
    adata.obs.loc[adata.obs_names[:7], column] = np.nan
    message = refused(DataError, rf"adata\.obs\['{column}'\] is missing \(NaN\) for 7 cells: 'cell_0'", adata)
    assert "'cell_4' and 2 more" in message and "Remove the cells, or give them a category" in message


@pytest.mark.parametrize(("column", "value"), [("age", np.nan), ("age", np.inf), ("size_factor", np.nan)])
def test_missing_numbers(column, value):
    adata = data()
    adata.obs.loc[adata.obs_names[:7], column] = value
    refused(DataError, rf"adata\.obs\['{column}'\] is NaN or infinite for 7 cells: 'cell_0'.*2 more", adata)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_size_factors_are_positive(value):
    adata = data()
    adata.obs.loc[adata.obs_names[:7], "size_factor"] = value
    refused(DataError, "not positive for 7 cells: 'cell_0'.*2 more.*recompute", adata)


def test_text_is_no_number():
    adata = data()
    adata.obs["age"] = "old"
    refused(DataError, r"'age'\] is not numeric.*'old'.*categorical covariate", adata)


def test_constant_covariates():
    adata = data()
    adata.obs["age"] = 3.0
    refused(
        DataError, "continuous_covariate_keys: 'age' has the same value in all cells.*Leave it out", adata
    )


class NeedsTwo(CellModel):
    """A model of the difference between conditions."""

    counts = Counts()
    condition = Category(min_levels=2)

    def __init__(self, adata):
        super().__init__(adata)


def test_one_category_where_two_are_needed():
    adata = data()
    adata.obs["condition"] = "control"
    NeedsTwo.setup_anndata(adata, condition_key="condition")
    before = Snapshot(adata)
    with pytest.raises(
        DataError, match=r"condition_key='condition' has 1 category \('control'\).*at least 2\. Name a"
    ):
        NeedsTwo(adata)
    before.assert_unchanged()


def test_duplicate_names():
    adata = data()
    adata.var_names = ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e", "f", "f"]
    message = refused(
        DataError, "6 feature names occur more than once: 'a', 'b', 'c', 'd', 'e' and 1 more", adata
    )
    assert "adata.var_names_make_unique()" in message
    adata = data()
    adata.obs_names = ["same"] * 3 + [f"c{i}" for i in range(N_CELLS - 3)]
    message = refused(DataError, "1 cell names occur more than once: 'same'", adata)
    assert "adata.obs_names_make_unique()" in message


# ------------------------------------------------------------------------------------------------ confounding


@pytest.mark.parametrize(
    ("column", "argument", "how"),
    [
        ("lane", "categorical_covariate_keys", "one value in each batch"),
        ("well", "categorical_covariate_keys", "in one batch only"),
        ("depth", "continuous_covariate_keys", "one value in each batch"),
    ],
)
def test_confounding_warns_and_names_both(column, argument, how):
    adata = data()
    code = adata.obs["batch"].cat.codes.to_numpy()
    adata.obs["lane"] = code.astype(str)
    adata.obs["well"] = [f"{c}-{i % 3}" for i, c in enumerate(code)]
    adata.obs["depth"] = code * 10.0
    SCVI.setup_anndata(adata, batch_key="batch", **{argument: [column]})
    before = Snapshot(adata)
    said = f"'{column}' is confounded with the batch 'batch': .*{how}.*Leave"
    with pytest.warns(PyrocellWarning, match=said) as seen:
        SCVI(adata, **SMALL)
    assert len(seen) == 1
    before.assert_unchanged()


# ------------------------------------------------------------------------------------------------ untrained, new data

VERBS = {
    "posterior": ("z",),
    "get_latent_representation": (),
    "get_normalized_expression": (),
    "posterior_predictive_sample": (),
    "get_feature_correlation_matrix": (),
    "get_likelihood_parameters": (),
    "get_latent_library_size": (),
    "get_elbo": (),
    "get_reconstruction_error": (),
    "get_marginal_ll": (),
    "posterior_predictive_check": (),
}


def ask(model, verb, adata=None):
    if verb == "differential_expression":
        return model.differential_expression(adata, groupby="label")
    if verb == "differential_abundance":
        return model.differential_abundance(adata, sample_key="label")
    return getattr(model, verb)(*VERBS[verb], adata)


ALL_VERBS = [*VERBS, "differential_expression", "differential_abundance"]


@pytest.fixture(scope="module")
def untrained():
    adata = data()
    SCVI.setup_anndata(adata, **KEYS)
    return SCVI(adata, **SMALL)


@pytest.fixture(scope="module")
def trained():
    adata = data()
    SCVI.setup_anndata(adata, **KEYS)
    model = SCVI(adata, **SMALL)
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    model.train(1)
    pyrocell.settings.progress = before
    return model


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_untrained_models_do_not_answer(untrained, verb):
    with pytest.raises(NotTrainedError, match=r"This SCVI has not been trained; call train\(\) first"):
        ask(untrained, verb)


def spoil_counts(adata):
    adata.layers["counts"] = adata.layers["counts"].toarray()
    adata.layers["counts"][2, 3] = -1
    return DataError, "1 negative values: -1 .*'cell_2'.*'gene_3'"


def spoil_genes(adata):
    adata.var_names = [f"{'x' if i < 7 else ''}{name}" for i, name in enumerate(adata.var_names)]
    return DataError, "7 of the 12 features .*'gene_0', 'gene_1', 'gene_2', 'gene_3', 'gene_4' and 2 more"


def spoil_batch(adata):
    adata.obs["batch"] = ["lane9"] * 3 + adata.obs["batch"].astype(str).tolist()[3:]
    return DataError, r"batch_key.*'lane9' \(3 cells\).*knows 'batch_0', 'batch_1'"


def spoil_column(adata):
    del adata.obs["age"]
    return SetupError, "continuous_covariate_keys='age'.*no such column"


def spoil_layer(adata):
    del adata.layers["counts"]
    return SetupError, "layer='counts'.*no such layer"


def spoil_number(adata):
    adata.obs.loc[adata.obs_names[0], "age"] = np.nan
    return DataError, "NaN or infinite for 1 cells: 'cell_0'"


def spoil_names(adata):
    adata.obs_names = ["same"] * N_CELLS
    return DataError, "cell names occur more than once: 'same'"


def spoil_cell(adata):
    adata.layers["counts"] = adata.layers["counts"].toarray()
    adata.layers["counts"][2] = 0
    return DataError, "1 cells have no counts.*'cell_2'"


SPOILED = [
    spoil_counts,
    spoil_genes,
    spoil_batch,
    spoil_column,
    spoil_layer,
    spoil_number,
    spoil_names,
    spoil_cell,
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_new_data_are_checked_before_they_are_asked_about(trained, spoil):
    adata = data(seed=1)
    kind, said = spoil(adata)
    before = Snapshot(adata)
    for verb in ALL_VERBS:
        with pytest.raises(kind, match=said):
            ask(trained, verb, adata)
    before.assert_unchanged()


def test_good_new_data_are_answered_and_left_alone(trained):
    adata = data(seed=1)
    before = Snapshot(adata)
    for verb in ALL_VERBS:
        ask(trained, verb, adata)
    before.assert_unchanged()
    assert "pyrocell" not in adata.uns


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (lambda m: m.differential_expression(groupby="label", group1="B cell"), "'B cell' does not exist"),
        (lambda m: m.differential_expression(groupby="type"), "groupby='type' is no column"),
        (lambda m: m.differential_expression(idx1="label == 'x'"), "no cells"),
        (
            lambda m: m.get_normalized_expression(transform_batch="lane9"),
            "batch='lane9'.*Available: 'batch_0'",
        ),
        (lambda m: m.get_normalized_expression(gene_list=["gene_1", "CD3E"]), "no features 'CD3E'"),
        (lambda m: m.posterior("rhoo"), "no site 'rhoo'.*Did you mean 'rho'"),
        (lambda m: m.posterior("rho", given={"age": "old"}), "age='old'"),
        (lambda m: m.posterior("rho", given={"donor": "d9"}), "donor='d9'"),
        (lambda m: m.get_elbo(indices=[0, 99]), "indices has 99; the data have 60 cells"),
        (lambda m: m.get_elbo(indices=[]), "at least one|No cells"),
        (lambda m: m.get_latent_representation(indices=[]), "at least one|No cells"),
        (lambda m: m.posterior("z", n_samples=0), "n_samples is 0"),
        (lambda m: m.get_elbo(batch_size=0), "batch_size is 0"),
        (lambda m: m.get_normalized_expression(library_size="big"), "library_size"),
        (lambda m: m.get_normalized_expression(library_size=-1.0), "library_size"),
        (lambda m: m.get_feature_correlation_matrix(correlation_type="kendall"), "kendall"),
    ],
)
def test_questions_that_make_no_sense(trained, question, said):
    before = Snapshot(trained.dataset.adata)
    with pytest.raises(QueryError, match=said):
        question(trained)
    before.assert_unchanged()
