"""Bad input gets an error before training that names the offenders and the remedy."""

from __future__ import annotations

import re
import tracemalloc
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyrocell.data import Category, Counts, matrices
from pyrocell.data.preflight import category_levels, warn_confounded
from pyrocell.errors import DataError, PyrocellWarning, SetupError
from tests.data.helpers import FIELDS, freeze, make_adata, make_counts, open_data

KINDS = {"dense": lambda x: x, "csr": sp.csr_matrix, "csc": sp.csc_array}


def with_values(*values, kind="dense", **kwargs):
    """AnnData with ``values`` put into gene g2 of cells c3, c4, ..."""
    counts = make_counts().astype(np.float64)
    counts[3 : 3 + len(values), 2] = values
    return make_adata(KINDS[kind](counts), **kwargs)


# counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"adata.X has 1 values that are NaN or infinite: nan \(cell 'c3', feature 'g2'\). Remove"),
        (np.inf, r"NaN or infinite: inf \(cell 'c3', feature 'g2'\)"),
        (-np.inf, r"NaN or infinite: -inf"),
        (1e300, r"NaN or infinite: inf \(cell 'c3'"),
        (
            -1,
            r"1 negative values: -1 \(cell 'c3', feature 'g2'\). Counts are 0, 1, 2, ... Read the raw counts again",
        ),
        (
            0.5,
            r"has 1 values that are not whole, up to \d+: 0.5 \(cell 'c3', feature 'g2'\). This model needs raw counts",
        ),
    ],
)
def test_bad_counts_are_refused(kind, value, message):
    with pytest.raises(DataError, match=message):
        freeze(with_values(value, kind=kind))


def test_up_to_five_offenders_are_named(monkeypatch):
    monkeypatch.setattr(matrices, "_BLOCK", 12 * 4)  # offenders in two blocks
    with pytest.raises(DataError) as error:
        freeze(with_values(*[-1.0] * 7))
    text = str(error.value)
    assert re.findall(r"cell '(c\d+)'", text) == ["c3", "c4", "c5", "c6", "c7"]
    assert "7 negative values" in text
    assert "and 2 more" in text


def test_a_layer_is_named():
    adata = make_adata()
    adata.layers["soup"] = -make_counts()
    with pytest.raises(DataError, match=re.escape("adata.layers['soup'] has")):
        freeze(adata, layer="soup")


def test_a_backed_file_is_checked_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "_BLOCK", 12 * 4)
    with_values(2, 2, 2, 2, 2, -3, kind="csr").write_h5ad(tmp_path / "x.h5ad")
    adata = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    with pytest.raises(DataError, match=r"-3 \(cell 'c8', feature 'g2'\)"):
        freeze(adata)
    adata.file.close()


def test_the_check_holds_one_block_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "_BLOCK", 400 * 50)
    counts = np.ones((3000, 400), np.float32)
    make_adata(counts).write_h5ad(tmp_path / "x.h5ad")
    adata = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    tracemalloc.start()
    freeze(adata, {"counts": Counts()})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    adata.file.close()
    assert peak < counts.nbytes / 2


def test_fractions_are_accepted_on_demand():
    adata = with_values(0.25, 7.5)
    cells = open_data(adata, allow_noninteger=True).cells(np.array([3, 4]))
    assert cells.counts[:, 2].tolist() == [0.25, 7.5]
    np.testing.assert_allclose(cells.library[:, 0], adata.X[3:5].sum(1))


@pytest.mark.parametrize(("value", "message"), [(-1, "negative"), (np.nan, "NaN"), (np.inf, "infinite")])
def test_what_is_never_accepted(value, message):
    with pytest.raises(DataError, match=message):
        freeze(with_values(value, 0.5), allow_noninteger=True)


def log_normalised():
    counts = make_counts()
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)


def test_log_normalised_data_are_recognised():
    adata = make_adata(log_normalised())
    with pytest.raises(
        DataError, match=r"adata.X looks log-normalised: it has .* up to [789].* allow_noninteger=True"
    ):
        freeze(adata)
    adata.layers["counts"] = make_counts()
    adata.raw = adata
    with pytest.raises(
        DataError, match=r"set up with layer= \(there are: 'counts'\). If adata.raw holds them"
    ):
        freeze(adata)
    freeze(adata, layer="counts")


def test_normalised_but_not_logged_and_scaled():
    with pytest.raises(DataError, match=r"adata.X has \d+ values that are not whole"):
        freeze(make_adata(np.expm1(log_normalised())))
    with pytest.raises(DataError, match="The data look scaled or batch-corrected"):
        freeze(make_adata(log_normalised() - 1))


def test_cells_without_counts():
    counts = make_counts()
    counts[[2, 5, 6, 9, 10, 11, 20]] = 0
    for kind in KINDS.values():
        with pytest.raises(
            DataError, match=r"7 cells have no counts over the 12 features.*'c2', 'c5', .* and 2 more"
        ) as e:
            freeze(make_adata(kind(counts)))
        assert "scanpy.pp.filter_cells" in str(e.value)


def test_no_cells_or_features():
    for shape in ((0, 5), (5, 0)):
        with pytest.raises(DataError, match=f"{shape[0]} cells and {shape[1]} features"):
            freeze(anndata.AnnData(np.zeros(shape, np.float32)), {"counts": Counts()})


def test_one_cell_and_one_gene_are_enough():
    assert open_data(make_adata(np.ones((1, 1)))).cells(np.array([0])).library.item() == 1


# names


@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
def test_names_that_repeat():
    adata = make_adata()
    adata.var_names = ["g0", "g1", "g1", *(f"g{i}" for i in range(3, 11)), "g0"]
    with pytest.raises(DataError, match=r"2 feature names .*: 'g1', 'g0'.*var_names_make_unique"):
        freeze(adata)
    adata = make_adata()
    adata.obs_names = ["a", *("a" * 29)]
    with pytest.raises(DataError, match=r"1 cell names .*: 'a'.*obs_names_make_unique"):
        freeze(adata)


# categories


def test_missing_category():
    adata = make_adata()
    for column, values in (("lane", adata.obs["lane"]), ("type", adata.obs["type"])):
        adata.obs[column] = values
        adata.obs.loc[["c1", "c8"], column] = np.nan
        with pytest.raises(DataError, match=rf"'{column}'\] is missing \(NaN\) for 2 cells: 'c1', 'c8'"):
            freeze(adata, batch_key=column)
    with pytest.raises(DataError, match=r"categorical_covariate_keys: adata.obs"):
        freeze(adata, categorical_covariate_keys=["kit", "lane"])


def test_one_level_where_two_are_needed():
    adata = make_adata()
    adata.obs["one"] = "x"
    fields = {"counts": Counts(), "batch": Category(min_levels=2)}
    with pytest.raises(
        DataError, match=r"batch_key='one' has 1 category \('x'\); this model needs at least 2"
    ):
        freeze(adata, fields, batch_key="one")
    assert freeze(adata, fields, batch_key="lane").size("batch") == 2
    assert freeze(adata, batch_key="one").size("batch") == 1


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 9, 10], ["9", "10"]),
        ([1.0, 2.5, 1.0], ["1", "2.5"]),
        ([True, False, True], ["False", "True"]),
        (pd.Categorical(["b", "a", "b"], categories=["c", "b", "a"]), ["b", "a"]),
        (pd.Categorical([10, 9, 10], categories=[10, 9]), ["10", "9"]),
        (pd.array(["b", "a", "b"], dtype="string"), ["a", "b"]),
        (pd.array([3, 2, 3], dtype="Int64"), ["2", "3"]),
        (pd.Series(["b", 1, "b"], dtype=object), ["1", "b"]),
    ],
)
def test_columns_of_every_type(values, names):
    column = pd.Series(values, name="x")
    found, codes = category_levels(column, "x")
    assert found == names
    assert codes.dtype == np.int64
    assert [names[code] for code in codes] == [
        n if n not in ("1.0", "10.0") else n[:-2] for n in map(str, column)
    ]


def test_categories_that_look_alike():
    with pytest.raises(DataError, match="same name as text: '1'"):
        category_levels(pd.Series([1, "1"], dtype=object, name="x"), "x")


# numbers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.nan, r"adata.obs\['age'\] is NaN or infinite for 2 cells: 'c1', 'c8'"),
        (np.inf, r"is NaN or infinite for 2 cells"),
    ],
)
@pytest.mark.parametrize(
    "setup", [{"continuous_covariate_keys": ["score", "age"]}, {"size_factor_key": "age"}]
)
def test_numbers_that_are_missing(values, message, setup):
    adata = make_adata()
    adata.obs.loc[["c1", "c8"], "age"] = values
    with pytest.raises(DataError, match=message):
        freeze(adata, **setup)


def test_nullable_numbers():
    adata = make_adata()
    adata.obs["age"] = pd.array([1, None, *range(28)], dtype="Int64")
    with pytest.raises(DataError, match="for 1 cells: 'c1'"):
        freeze(adata, continuous_covariate_keys=["age"])


def test_text_is_no_number():
    adata = make_adata()
    adata.obs["age"] = "31y"
    for setup in ({"continuous_covariate_keys": ["age"]}, {"size_factor_key": "age"}):
        with pytest.raises(DataError, match=r"'age'\] is not numeric .* '31y'.*pandas.to_numeric"):
            freeze(adata, **setup)
    with pytest.raises(DataError, match="not numeric but category"):
        freeze(adata, continuous_covariate_keys=["type"])


@pytest.mark.parametrize("value", [3, 0.1])
def test_constant_covariates(value):
    adata = make_adata()
    adata.obs["same"] = value
    with pytest.raises(DataError, match="'same' has the same value in all cells"):
        freeze(adata, continuous_covariate_keys=["age", "same"])


@pytest.mark.parametrize("value", [0, -1.5])
def test_size_factors_are_positive(value):
    adata = make_adata()
    adata.obs.loc["c4", "size"] = value
    with pytest.raises(
        DataError, match=r"size_factor_key: adata.obs\['size'\] is not positive for 1 cells: 'c4'"
    ):
        freeze(adata, size_factor_key="size")


# confounding


def confounded(column, **setup):
    adata = make_adata()
    lane = np.arange(30) % 3
    adata.obs["lane"] = lane.astype(str)
    values = {
        "condition": np.array(["ctrl", "ctrl", "stim"])[lane],  # lanes within conditions
        "flowcell": [f"{i}{j % 2}" for j, i in enumerate(lane)],  # flowcells within lanes
        "day": lane * 2.0,
        "same": ["x"] * 30,
        "mixed": (np.arange(30) // 3 % 2).astype(str),
        "number": np.arange(30.0),
    }
    adata.obs[column] = values[column]
    return adata


@pytest.mark.parametrize(
    ("column", "argument", "how"),
    [
        ("condition", "categorical_covariate_keys", "one value in each batch"),
        ("flowcell", "categorical_covariate_keys", "occurs in one batch only"),
        ("day", "continuous_covariate_keys", "one value in each batch"),
    ],
)
def test_confounding_warns_and_names_both(column, argument, how):
    with pytest.warns(
        PyrocellWarning, match=f"covariate '{column}' is confounded with the batch 'lane': .*{how}"
    ):
        freeze(confounded(column), batch_key="lane", **{argument: [column]})


@pytest.mark.parametrize(
    ("column", "argument"),
    [
        ("same", "categorical_covariate_keys"),
        ("mixed", "categorical_covariate_keys"),
        ("number", "continuous_covariate_keys"),
    ],
)
def test_no_warning_without_confounding(column, argument):
    freeze(confounded(column), batch_key="lane", **{argument: [column]})


def test_no_warning_without_batches():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_confounded("lane", np.zeros(4, int), codes={"a": np.array([0, 1, 0, 1])}, numbers={})
        freeze(confounded("condition"), categorical_covariate_keys=["condition"])


# keys


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (
            {"batch_key": "lanes"},
            r"batch_key='lanes': adata.obs has no such column. Did you mean 'lane'\?.*'donor'",
        ),
        ({"batch_key": "LANE"}, "Did you mean 'lane'"),
        ({"size_factor_key": "zzz"}, "Available: 'lane', 'type'"),
        ({"continuous_covariate_keys": ["age", "height"]}, "continuous_covariate_keys='height'"),
        ({"categorical_covariate_keys": ["kit", "kit"]}, "names a column twice"),
        ({"categorical_covariate_keys": 3}, "expected a list of names"),
        ({"categorical_covariate_keys": ["kit", 3]}, "expected a list of names"),
        ({"batch_key": ["lane", "kit"]}, "expected the name of a column"),
        ({"layer": "count"}, r"layer='count': adata.layers has no such layer. Available: none"),
        ({"nonsense": 1}, "unknown arguments"),
    ],
)
def test_what_is_not_there(setup, message):
    with pytest.raises(SetupError, match=message):
        freeze(make_adata(), FIELDS, **setup)


def test_one_covariate_needs_no_list():
    schema = freeze(make_adata(), continuous_covariate_keys="age", categorical_covariate_keys="kit")
    assert schema.names("continuous_covariates") == ["age"]
    assert schema.names("categorical_covariates") == ["kit"]


def test_layers_that_are_there():
    adata = make_adata()
    adata.layers["counts"] = adata.X
    with pytest.raises(SetupError, match=r"Did you mean 'counts'\? Available: 'counts'"):
        freeze(adata, layer="count")
    adata.X = None
    with pytest.raises(SetupError, match=r"adata.X is empty; give layer=, one of: 'counts'"):
        freeze(adata)


def test_a_column_twice():
    adata = make_adata()
    adata.obs = pd.concat([adata.obs, adata.obs[["lane"]]], axis=1)
    with pytest.raises(SetupError, match="has 2 columns of this name"):
        freeze(adata, batch_key="lane")
