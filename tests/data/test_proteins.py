"""The field of proteins: values, names, and what was measured."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyrocell.data import Category, Counts, Dataset, Proteins, Schema, prototype_cells, synthetic_iid
from pyrocell.data.registration import make_setup_anndata
from pyrocell.errors import DataError, SetupError

FIELDS = {"counts": Counts(), "proteins": Proteins()}
FRAME = {"protein_expression_obsm_key": "proteins"}
ARRAY = {"protein_expression_obsm_key": "protein_expression", "protein_names_uns_key": "protein_names"}
MASKED = FRAME | {"protein_mask_obsm_key": "measured"}
N_CELLS, N_PROTEINS = 40, 6


@pytest.fixture
def adata():
    adata = synthetic_iid(N_CELLS, 15, n_proteins=N_PROTEINS, n_regions=0)
    values = adata.obsm["protein_expression"]
    values[3, 2] = 0
    names = adata.uns["protein_names"]
    adata.obsm["proteins"] = pd.DataFrame(values, index=adata.obs_names, columns=names)
    mask = np.random.default_rng(0).random((N_CELLS, N_PROTEINS)) < 0.7
    mask[5] = False
    adata.obsm["measured"] = pd.DataFrame(mask, index=adata.obs_names, columns=names)
    return adata


def open_data(adata, setup, fields=None):
    fields = fields or FIELDS
    return Dataset(adata, Schema.freeze(adata, fields, setup), fields)


def read(adata, setup, rows=None):
    cells = open_data(adata, setup).cells(np.arange(adata.n_obs) if rows is None else np.array(rows))
    return cells.proteins, cells.proteins_mask


def test_values_without_a_mask_are_all_measured(adata):
    values, mask = read(adata, FRAME, [7, 3, 3])
    assert values.dtype == torch.float32 and mask.dtype == torch.bool
    assert np.array_equal(values.numpy(), adata.obsm["proteins"].to_numpy()[[7, 3, 3]])
    assert mask.all() and mask.shape == (3, N_PROTEINS)  # also the zero of cell 3


def test_the_mask_hides_values(adata):
    values, mask = read(adata, MASKED)
    expected = adata.obsm["measured"].to_numpy()
    assert np.array_equal(mask.numpy(), expected)
    assert np.array_equal(values.numpy(), np.where(expected, adata.obsm["proteins"].to_numpy(), 0))


def test_what_lies_behind_the_mask_does_not_matter(adata):
    before = read(adata, MASKED)
    behind = ~adata.obsm["measured"].to_numpy()
    for value in (np.nan, -3.0, 0.5, np.inf):
        adata.obsm["proteins"] = adata.obsm["proteins"].mask(behind, value)
        for one, two in zip(before, read(adata, MASKED), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_matrix, sp.csc_array, np.asfortranarray])
@pytest.mark.parametrize("dtype", ["float64", "int32", "uint16"])
def test_containers_agree(adata, convert, dtype):
    expected = read(adata, MASKED)
    adata.obsm["protein_expression"] = convert(adata.obsm["protein_expression"].astype(dtype))
    adata.obsm["measured"] = convert(adata.obsm["measured"].to_numpy())
    for one, two in zip(expected, read(adata, ARRAY | {"protein_mask_obsm_key": "measured"}), strict=True):
        assert torch.equal(one, two)


def test_a_backed_file_and_a_view_agree(adata, tmp_path):
    expected = read(adata, MASKED)
    adata.write_h5ad(tmp_path / "data.h5ad")
    backed = anndata.read_h5ad(tmp_path / "data.h5ad", backed="r")
    for setup in (MASKED, ARRAY | {"protein_mask_obsm_key": "measured"}):
        assert all(map(torch.equal, expected, read(backed, setup)))
    backed.file.close()
    some = [value[10:20] for value in expected]
    assert all(map(torch.equal, some, read(adata[10:20], MASKED)))


def test_the_schema_and_cells_made_up(adata):
    schema = Schema.freeze(adata, FIELDS, MASKED)
    assert schema.names("proteins") == [f"protein_{i}" for i in range(N_PROTEINS)]
    assert schema.size("proteins") == N_PROTEINS and schema.has("proteins")
    assert Schema.from_json(schema.to_json()) == schema
    cells = prototype_cells(schema)
    assert cells.proteins.shape == (2, N_PROTEINS) and cells.proteins_mask.dtype == torch.bool
    assert cells.proteins_mask.all()


def test_an_optional_field_left_out_has_no_proteins(adata):
    fields = {"counts": Counts(), "proteins": Proteins(optional=True)}
    dataset = open_data(adata, {}, fields)
    assert not dataset.schema.has("proteins")
    for cells in (dataset.cells(np.arange(3)), prototype_cells(dataset.schema, 3)):
        assert cells.proteins.shape == cells.proteins_mask.shape == (3, 0)
        assert cells.proteins_mask.dtype == torch.bool


# new data


def test_new_data_are_aligned_by_name(adata):
    schema = Schema.freeze(adata, FIELDS, MASKED)
    order = [4, 0, 2, 5, 1, 3]
    new = adata.copy()
    new.obsm["proteins"] = adata.obsm["proteins"].iloc[:, order].assign(further=1.5)
    new.obsm["measured"] = adata.obsm["measured"].iloc[:, order[::-1]].assign(further=True)
    rows = np.arange(N_CELLS)
    one, two = (Dataset(data, schema, FIELDS).cells(rows) for data in (adata, new))
    assert torch.equal(one.proteins, two.proteins) and torch.equal(one.proteins_mask, two.proteins_mask)


def test_an_array_is_aligned_by_the_names_beside_it(adata):
    schema = Schema.freeze(adata, FIELDS, ARRAY)
    new = adata.copy()
    new.obsm["protein_expression"] = adata.obsm["protein_expression"][:, ::-1]
    new.uns["protein_names"] = adata.uns["protein_names"][::-1]
    one, two = (Dataset(data, schema, FIELDS).cells(np.arange(9)).proteins for data in (adata, new))
    assert torch.equal(one, two)


def test_missing_proteins_are_named(adata):
    schema = Schema.freeze(adata, FIELDS, FRAME)
    adata.obsm["proteins"] = adata.obsm["proteins"].drop(columns=["protein_2", "protein_5"])
    with pytest.raises(
        DataError, match=r"2 of the 6 .* not in adata.obsm\['proteins'\]: 'protein_2', 'protein_5'"
    ):
        Dataset(adata, schema, FIELDS)


def test_a_query_may_lack_proteins(adata):
    """Where a query is mapped onto a reference, what it lacks was not measured."""
    schema = Schema.freeze(adata, FIELDS, FRAME)
    full = Dataset(adata, schema, FIELDS).cells(np.arange(5))
    adata.obsm["proteins"] = adata.obsm["proteins"][["protein_4", "protein_0"]]
    extended = schema.extend(adata, FIELDS)
    assert extended.names("proteins") == schema.names("proteins")
    cells = Dataset(adata, extended, FIELDS).cells(np.arange(5))
    there = torch.tensor([True, False, False, False, True, False])
    assert torch.equal(cells.proteins_mask, there.expand(5, -1))
    assert torch.equal(cells.proteins, full.proteins * there)
    adata.obsm["proteins"].columns = ["CD3", "CD4"]
    with pytest.raises(DataError, match="none of the 6 proteins.*'CD3', 'CD4'"):
        schema.extend(adata, FIELDS)


def test_new_data_may_be_unmeasured(adata):
    schema = Schema.freeze(adata, FIELDS, MASKED)
    adata.obsm["measured"].loc[:, :] = False
    cells = Dataset(adata, schema, FIELDS).cells(np.arange(4))
    assert not cells.proteins_mask.any() and not cells.proteins.any()


# bad input


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            np.nan,
            r"adata.obsm\['proteins'\] has 1 values that are NaN.*cell_4.*protein_1.*protein_mask_obsm_key",
        ),
        (np.inf, "infinite: inf .*cell_4.*protein_1"),
        (-1.0, "has 1 negative values: -1 .*cell_4.*protein_1"),
        (2.5, "1 values that are not whole.*2.5 .*cell_4.*protein_1"),
    ],
)
def test_wrong_values_are_named(adata, value, message):
    adata.obsm["proteins"].iloc[4, 1] = value
    with pytest.raises(DataError, match=message):
        Schema.freeze(adata, FIELDS, FRAME)
    schema = Schema.freeze(adata[10:].copy(), FIELDS, FRAME)
    with pytest.raises(DataError, match=message):
        Dataset(adata, schema, FIELDS)
    if value == 2.5:
        Schema.freeze(adata, FIELDS, FRAME | {"allow_noninteger": True})


def test_zeros_of_a_whole_batch_are_data(adata):
    batch = adata.obs["batch"] == "batch_0"
    adata.obsm["proteins"].loc[batch] = 0
    values, mask = read(adata, FRAME)
    assert mask.all() and not values[batch.to_numpy()].any()


def test_one_protein_is_enough(adata):
    adata.obsm["proteins"] = adata.obsm["proteins"][["protein_3"]]
    assert read(adata, FRAME)[0].shape == (N_CELLS, 1)


def test_a_mask_that_hides_everything(adata):
    adata.obsm["measured"].loc[:, :] = False
    with pytest.raises(
        DataError, match=r"adata.obsm\['measured'\]\) says that no protein was measured in any cell"
    ):
        Schema.freeze(adata, FIELDS, MASKED)


def test_a_protein_measured_in_no_cell(adata):
    adata.obsm["measured"][["protein_1", "protein_4"]] = False
    with pytest.raises(DataError, match="'protein_1', 'protein_4' were measured in no cell"):
        Schema.freeze(adata, FIELDS, MASKED)


def test_a_panel_without_a_measured_cell(adata):
    fields = FIELDS | {"panel": Category(optional=True, groups_of="proteins")}
    adata.obs["kit"] = np.where(np.arange(N_CELLS) < 30, "TotalSeq-A", "none")
    setup = MASKED | {"panel_key": "kit"}
    Schema.freeze(adata, fields, setup)
    adata.obsm["measured"].iloc[30:] = False
    with pytest.raises(DataError, match="'kit' names the panels 'none', but no cell"):
        Schema.freeze(adata, fields, setup)
    Schema.freeze(adata, fields, MASKED)  # without a panel, cells to be imputed may be a batch of their own


@pytest.mark.parametrize(
    ("spoil", "setup", "error", "message"),
    [
        (
            lambda a: None,
            ARRAY | {"protein_names_uns_key": None},
            SetupError,
            "no names.*Give protein_names_uns_key=",
        ),
        (
            lambda a: a.uns.update(protein_names=["a"]),
            ARRAY,
            DataError,
            r"has 1 names, but .* shape \(40, 6\)",
        ),
        (lambda a: a.uns.pop("protein_names"), ARRAY, SetupError, "adata.uns has no such entry"),
        (
            lambda a: None,
            FRAME | {"protein_expression_obsm_key": "protein"},
            SetupError,
            "Did you mean 'proteins'",
        ),
        (
            lambda a: None,
            FRAME | {"protein_expression_obsm_key": 3},
            SetupError,
            "is 3; expected the name of an entry",
        ),
        (
            lambda a: None,
            FRAME | {"protein_mask_obsm_key": "mask"},
            SetupError,
            "adata.obsm has no such entry",
        ),
        (
            lambda a: _rename(a, "proteins", ["x"] * N_PROTEINS),
            FRAME,
            DataError,
            "1 protein names occur more than once: 'x'",
        ),
        (lambda a: _rename(a, "measured", list("abcdef")), MASKED, DataError, "no columns 'protein_0'"),
        (
            lambda a: a.obsm.update(measured=np.ones((N_CELLS, 5), bool)),
            MASKED,
            DataError,
            r"shape \(40, 5\).*\(40, 6\)",
        ),
        (
            lambda a: a.obsm.update(measured=np.full((N_CELLS, 6), 2)),
            MASKED,
            DataError,
            "other than true and false, such as 2",
        ),
        (
            lambda a: a.obsm.update(measured=np.full((N_CELLS, 6), np.nan)),
            MASKED,
            DataError,
            "other than true and false",
        ),
        (
            lambda a: a.obsm.update(proteins=a.obsm["proteins"].astype(str)),
            FRAME,
            DataError,
            "expected numbers",
        ),
        (
            lambda a: a.obsm.update(proteins=a.obsm["proteins"].iloc[:, :0]),
            FRAME,
            DataError,
            "has no proteins",
        ),
    ],
)
def test_bad_set_ups_are_named(adata, spoil, setup, error, message):
    spoil(adata)
    with pytest.raises(error, match=message):
        Schema.freeze(adata, FIELDS, setup)


def _rename(adata, key, names):
    adata.obsm[key].columns = names


def test_the_set_up_asks_for_the_proteins(adata):
    setup = make_setup_anndata(FIELDS, "Model")
    with pytest.raises(TypeError, match="protein_expression_obsm_key"):
        setup(adata)
    setup(adata, **MASKED)
    assert "True where it was measured" in setup.__doc__
