"""Models made from MuData are those made from AnnData, and keep the contract."""

from __future__ import annotations

import re
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam

from pyrocell import SCVI, TOTALVI, CellModel, settings
from pyrocell.data import Category, Counts, Proteins
from pyrocell.distributions import NegativeBinomial, Poisson, StandardNormal
from pyrocell.errors import DataError, QueryError, SetupError
from pyrocell.nn import GaussianEncoder, ProfileDecoder
from pyrocell.testing import CHECKS, ModelCase, run_check
from pyrocell.testing.asking import answers, assert_same, state_of
from tests.models.zoo import BatchVAE, NoLatent, PoissonFactors
from tests.multimodal import (
    MODALITIES,
    N_CELLS,
    N_GENES,
    WITH_PROTEINS,
    as_mudata,
    make_adata,
    mudata_of,
    nothing_pulled,  # noqa: F401
    real_data,
)

pytestmark = pytest.mark.usefixtures("nothing_pulled")
RNA = {"modalities": {"counts": "rna"}, "layer": "counts"}
SMALL = {"n_latent": 4, "n_hidden": 16}


class WithProteins(CellModel):
    """Genes and proteins from one latent; proteins that were not measured say nothing."""

    counts = Counts()
    proteins = Proteins()
    batch = Category(optional=True)

    latent_site = "z"
    expression_site = "rho"

    def __init__(self, adata, n_latent=4):
        super().__init__(adata)
        n_genes, n_proteins = self.data.size("counts"), self.data.size("proteins")
        self.encoder = GaussianEncoder(n_genes, n_latent, 16)
        self.decoder = ProfileDecoder(n_latent, n_genes, 16, self.data.size("batch"))
        self.rates = ProfileDecoder(n_latent, n_proteins, 16, self.data.size("batch"))
        self.theta = PyroParam(torch.ones(n_genes), constraints.positive)

    def model(self, cells):
        with self.plate(cells):
            z = pyro.sample("z", StandardNormal(self.encoder.n_latent))
            rho = pyro.deterministic("rho", self.decoder(z, cells.batch), event_dim=1)
            pyro.sample("x", NegativeBinomial(cells.library * rho, self.theta).to_event(1), obs=cells.counts)
            rates = Poisson(100.0 * self.rates(z, cells.batch)).mask(cells.proteins_mask)
            pyro.sample("y", rates.to_event(1), obs=cells.proteins)

    def guide(self, cells):
        with self.plate(cells):
            pyro.sample("z", self.encoder(cells.counts))


def fit(model_class, data, options=None, epochs=3):
    settings.seed = 0
    model = model_class(data, **(options or {}))
    model.train(epochs, batch_size=64, device="cpu")
    return model


@pytest.fixture(autouse=True)
def quiet():
    before = settings.progress, settings.seed
    settings.progress = False
    yield
    settings.progress, settings.seed = before


PAIRS = {
    "SCVI": (SCVI, {"layer": "counts", "batch_key": "batch"}, RNA | {"batch_key": "batch"}, SMALL),
    "BatchVAE": (
        BatchVAE,
        {"batch_key": "batch"},
        {"modalities": {"counts": "rna"}, "batch_key": "batch"},
        SMALL,
    ),
    "PoissonFactors": (PoissonFactors, {}, {"modalities": {"counts": "rna"}}, {}),
    "NoLatent": (NoLatent, {}, {"modalities": {"counts": "rna"}}, {}),
    "TOTALVI": (
        TOTALVI,
        {"batch_key": "batch", **WITH_PROTEINS},
        {"modalities": MODALITIES, "batch_key": "batch", "protein_mask_layer": "measured"},
        SMALL,
    ),
    "WithProteins": (
        WithProteins,
        {"batch_key": "batch", **WITH_PROTEINS},
        {"modalities": MODALITIES, "batch_key": "batch", "protein_mask_layer": "measured"},
        {},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_bit_identical_models_either_way(name):
    model_class, one, many, options = PAIRS[name]
    adata, mdata = make_adata(), as_mudata(make_adata(), seed=1)
    model_class.setup_anndata(adata, **one)
    model_class.setup_mudata(mdata, **many)
    models = [fit(model_class, data, options) for data in (adata, mdata)]
    states = [state_of(model) for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(value, states[1][key]) for key, value in states[0].items())
    pd.testing.assert_frame_equal(
        *(model.history.drop(columns="seconds", errors="ignore") for model in models)
    )
    assert_same(answers(models[0]), answers(models[1]))
    # each also reads the other kind of data, where that was set up
    assert_same(answers(models[0], adata=mdata), answers(models[1], adata=adata))


def mudata_case(model_class, many, options, **more):
    return ModelCase(model_class, lambda: as_mudata(make_adata(), seed=1), many, options, **more)


CASES = {name: mudata_case(PAIRS[name][0], *PAIRS[name][2:]) for name in ("SCVI", "WithProteins")}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, check):
    run_check(check, CASES[name])


@pytest.fixture(scope="module")
def fitted():
    with mudata.set_options(pull_on_update=False):
        mdata = as_mudata(make_adata(), seed=1)
    WithProteins.setup_mudata(mdata, **PAIRS["WithProteins"][2])
    progress, settings.progress = settings.progress, False
    model = fit(WithProteins, mdata)
    settings.progress = progress
    return model


def test_the_order_of_modalities_and_cells_does_not_matter(fitted):
    names = fitted.dataset.obs_names
    other = as_mudata(make_adata(), seed=5, swapped=True)
    latent = fitted.get_latent_representation(other)
    there = other.obs_names.get_indexer(names)
    assert not np.array_equal(there, np.arange(N_CELLS))
    # matrix products of other minibatches differ in the last digits
    np.testing.assert_allclose(latent[there], fitted.get_latent_representation(), rtol=1e-5, atol=1e-6)


def test_the_same_order_of_cells_gives_the_same_model_whatever_that_of_modalities():
    states = []
    for swapped in (False, True):
        adata = make_adata()
        adata.obsm["measured"].iloc[::8, 0] = True  # every cell is in both modalities
        mdata = as_mudata(adata, swapped=swapped)
        WithProteins.setup_mudata(mdata, **PAIRS["WithProteins"][2])
        states.append(state_of(fit(WithProteins, mdata)))
    assert all(np.array_equal(value, states[1][key]) for key, value in states[0].items())


def test_proteins_of_cells_without_them_do_not_matter():
    """What lies where nothing was measured changes nothing, neither in the loss nor in the answers."""
    states = []
    for value in (0, 1000):
        adata = make_adata()
        adata.obsm["proteins"] = adata.obsm["proteins"].where(adata.obsm["measured"], value)
        WithProteins.setup_anndata(adata, batch_key="batch", **WITH_PROTEINS)
        states.append(state_of(fit(WithProteins, adata, epochs=2)))
    assert all(np.array_equal(value, states[1][key]) for key, value in states[0].items())
    adata.obsm["measured"].loc[:, :] = True  # and the mask has an effect
    changed = state_of(fit(WithProteins, adata, epochs=2))
    assert any(not np.array_equal(value, changed[key]) for key, value in states[0].items())


def test_saved_with_its_data(fitted, tmp_path):
    fitted.save(tmp_path, save_anndata=True)
    assert (tmp_path / "mdata.h5mu").is_file() and not (tmp_path / "adata.h5ad").exists()
    again = WithProteins.load(tmp_path)
    assert set(again.dataset.adata.mod) == {"rna", "protein"}
    assert list(again.dataset.adata.obs) == list(fitted.dataset.adata.obs)
    assert_same(answers(fitted), answers(again))
    bare = WithProteins.load(tmp_path, as_mudata(make_adata(), seed=7))
    assert_same(answers(fitted), answers(bare))


def test_saved_over_a_model_with_other_data(fitted, tmp_path):
    adata = make_adata()
    WithProteins.setup_anndata(adata, batch_key="batch", **WITH_PROTEINS)
    fit(WithProteins, adata, epochs=1).save(tmp_path, save_anndata=True)
    fitted.save(tmp_path, save_anndata=True, overwrite=True)
    assert set(WithProteins.load(tmp_path).dataset.adata.mod) == {"rna", "protein"}
    fitted.save(tmp_path, overwrite=True)
    assert WithProteins.load(tmp_path).dataset is None


def test_a_new_mudata(fitted):
    new = as_mudata(make_adata(seed=3))
    latent = fitted.get_latent_representation(new)
    some = new[new.obs_names[20:40]].copy()
    np.testing.assert_allclose(fitted.get_latent_representation(some), latent[20:40], rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"not in mdata.mod\['rna'\].var_names: 'gene_7'"):
        parts = {
            "rna": new.mod["rna"][:, new.mod["rna"].var_names != "gene_7"].copy(),
            "protein": new.mod["protein"],
        }
        fitted.get_latent_representation(mudata_of(parts, new.obs))
    with pytest.raises(SetupError, match="no modality 'protein'"):
        fitted.get_latent_representation(mudata_of({"rna": new.mod["rna"]}, new.obs))
    with pytest.raises(SetupError, match=r"WithProteins.setup_anndata\(adata"):
        fitted.get_latent_representation(make_adata())


def test_groups_are_columns_of_the_whole_or_of_one_modality(fitted):
    table = fitted.differential_expression(groupby="label", group1="label_1")
    assert len(table) == N_GENES
    mdata = as_mudata(make_adata(), seed=1)
    mdata.mod["rna"].obs["type"] = mdata.obs["label"].astype(str).to_numpy()
    again = fitted.differential_expression(mdata, groupby="type", group1="label_1")
    pd.testing.assert_frame_equal(table, again)
    third = fitted.differential_expression(idx1="label == 'label_1'")
    np.testing.assert_allclose(third.sort_index()["lfc_mean"], table.sort_index()["lfc_mean"], atol=0.2)
    with pytest.raises(QueryError, match="'kind' is no column"):
        fitted.differential_expression(mdata, groupby="kind")


def test_data_that_changed_under_the_model_are_noticed():
    mdata = as_mudata(make_adata())
    SCVI.setup_mudata(mdata, **RNA)
    model = fit(SCVI, mdata, SMALL, epochs=1)
    mdata.mod["rna"].layers["counts"].data *= 2
    with pytest.raises(DataError, match="has changed since"):
        model.get_latent_representation()


def test_every_model_class_has_both_set_ups():
    for model_class in (SCVI, WithProteins, NoLatent):
        assert "modalities" in model_class.setup_mudata.__signature__.parameters
        assert "modalities" not in model_class.setup_anndata.__signature__.parameters
    with pytest.raises(SetupError, match=r"SCVI.setup_mudata\(mdata, modalities="):
        SCVI(as_mudata(make_adata()))


def test_the_code_on_the_page_runs():
    text = (Path(__file__).resolve().parents[2] / "docs/user_guide/mudata.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace("model.train()", "model.train(max_epochs=2)"), "page", "exec"), names)
    assert names["latent"].shape == (200, 20) and np.isfinite(names["latent"]).all()
    hidden = ~TOTALVI(names["adata"]).dataset.cells(np.arange(200)).proteins_mask.numpy()
    assert hidden.any() and not np.delete(hidden, 3, axis=1).any()
    assert np.array_equal(hidden[:, 3], names["adata"].obs["batch"] == "batch_1")


def test_real_multiome():
    """RNA of the multiome, through the whole and through its AnnData: the same model."""
    mdata = mudata.read_h5mu(real_data("multiome_scicar_a549.h5mu"))
    mdata = mdata[mdata.obs_names[::5]].copy()
    adata = mdata.mod["rna"].copy()
    SCVI.setup_anndata(adata, batch_key="time_h")
    SCVI.setup_mudata(mdata, modalities={"counts": "rna"}, batch_key="time_h")
    latents = [fit(SCVI, data, SMALL, epochs=2).get_latent_representation() for data in (adata, mdata)]
    assert np.array_equal(*latents)
