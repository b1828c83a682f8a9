"""Answers into sinks are those that are returned, to the bit, and take no more memory than a block."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from pyro.distributions import Normal
from scipy import sparse

import pyrocell
from pyrocell import PEAKVI, SCVI, TOTALVI, VELOVI
from pyrocell.data import Layer, Obsm, Zarr, synthetic_iid
from pyrocell.distributions import NonZeros
from pyrocell.errors import QueryError
from pyrocell.models import asking
from tests.models import peak_memory

pytestmark = pytest.mark.skipif(find_spec("zarr") is None, reason="zarr is not installed")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    yield
    pyrocell.settings.progress = before


@pytest.fixture(scope="module")
def fitted():
    adata = synthetic_iid(n_cells=150, n_genes=40, seed=1)
    SCVI.setup_anndata(adata, layer="counts", batch_key="batch")
    model = SCVI(adata, gene_likelihood="nb")
    model.train(1)
    return model


@pytest.mark.parametrize("kind", [SCVI, TOTALVI, PEAKVI, VELOVI])
def test_verbs_with_a_sink_say_what_they_return(kind):
    """By default an array, or a table: not anything at all."""
    told = {
        name: eval(verb.__annotations__["return"], verb.__globals__)
        for name, verb in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and "out" in inspect.signature(verb).parameters
    }
    assert {"posterior", "get_latent_representation"} < set(told)
    for name, kinds in told.items():
        table = name not in ("posterior", "get_latent_representation")
        assert np.ndarray in typing.get_args(kinds), name
        assert (pd.DataFrame in typing.get_args(kinds)) == table, name


def in_all_sinks(ask, tmp_path, adata=None):
    """Compare what a verb returns with what it writes, to the bit."""
    plain = np.asarray(ask(out=None))
    assert plain.dtype == np.float32
    given = np.zeros(plain.shape, dtype=np.float32)
    assert ask(out=given) is given
    assert given.tobytes() == plain.tobytes()
    stored = ask(out=tmp_path / "a.zarr")
    assert stored[:].tobytes() == plain.tobytes()
    if adata is not None:
        assert ask(out=Obsm("answer")) is adata.obsm["answer"]
        assert adata.obsm["answer"].tobytes() == plain.tobytes()
        del adata.obsm["answer"]
    return plain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 32, "library_size": 1e4},
        {"batch_size": 32, "library_size": "latent", "n_samples": 3},
        {"transform_batch": ["batch_0", "batch_1"], "n_samples": 3},
        {"gene_list": ["gene_3", "gene_1"], "transform_batch": "batch_1"},
    ],
)
def test_expression_goes_into_any_sink(fitted, tmp_path, options):
    def ask(out):
        return fitted.get_normalized_expression(out=out, **options)

    assert isinstance(ask(None), pd.DataFrame)
    in_all_sinks(ask, tmp_path, fitted.dataset.adata)


def test_an_average_over_batches_and_blocks_of_draws_is_right(fitted, tmp_path, monkeypatch):
    """Draws that come in several blocks are added up before they are written, with each batch counting the same."""
    monkeypatch.setattr("pyrocell.models.asking._BLOCK_NUMBERS", 2 * 16 * fitted.data.size("counts"))
    given = {"batch": ["batch_0", "batch_1"]}
    parts = [
        fitted.posterior("rho", given={"batch": one}, n_samples=5, return_mean=False)
        for one in given["batch"]
    ]
    assert parts[0].shape == (5, 150, 40)
    found = fitted.posterior("rho", given=given, n_samples=5, out=tmp_path / "mean.zarr")[:]
    np.testing.assert_allclose(found, np.mean(parts, axis=(0, 1)), rtol=1e-5)
    kept = fitted.posterior("rho", given=given, n_samples=5, return_mean=False, out=tmp_path / "draws.zarr")
    np.testing.assert_allclose(kept[:], np.mean(parts, axis=0), rtol=1e-6)
    in_all_sinks(lambda out: fitted.posterior("rho", given=given, n_samples=5, out=out), tmp_path)


def test_each_block_is_written_once(fitted, monkeypatch):
    written = np.zeros((150, 40))

    class Counting(np.ndarray):
        def __setitem__(self, where, values):
            written[where] += 1
            super().__setitem__(where, values)

    given = np.zeros((150, 40), dtype=np.float32).view(Counting)
    monkeypatch.setattr("pyrocell.models.asking._BLOCK_NUMBERS", 2 * 16 * fitted.data.size("counts"))
    fitted.posterior("rho", given={"batch": ["batch_0", "batch_1"]}, n_samples=5, out=given)
    assert (written == 1).all()


@pytest.mark.parametrize("site", ["z", "mu", "x"])
@pytest.mark.parametrize("n_samples", [1, 4])
def test_draws_of_any_site_go_into_any_sink(fitted, tmp_path, site, n_samples):
    def ask(out):
        return fitted.posterior(site, n_samples=n_samples, return_mean=False, batch_size=40, out=out)

    found = in_all_sinks(ask, tmp_path)
    assert found.ndim == (2 if n_samples == 1 else 3)


@pytest.mark.parametrize(
    ("kind", "ask"),
    [
        (SCVI, lambda model: model.get_normalized_expression(gene_list=["gene_1"])),
        (PEAKVI, lambda model: model.get_normalized_accessibility(region_list=["gene_1"])),
    ],
    ids=["SCVI", "PEAKVI"],
)
def test_queries_make_no_dense_array_of_few_counts(kind, ask, monkeypatch):
    adata = synthetic_iid(n_cells=200, n_genes=40, seed=1)
    adata.X = sparse.csr_matrix((np.add.outer(np.arange(200), np.arange(40)) % 8 == 0).astype(np.float32))
    kind.setup_anndata(adata)
    model = kind(adata)
    model.train(1)
    n_dense, plain = [], NonZeros.dense

    def dense(self, *dtype):
        n_dense.append(self.n_rows)
        return plain(self, *dtype)

    monkeypatch.setattr(NonZeros, "dense", dense)
    for question in (kind.get_latent_representation, ask):
        n_dense.clear()
        assert np.isfinite(np.asarray(question(model))).all()
        assert sum(n_dense) <= 64, "a few cells are looked at, to see whether they are those of before"


def test_an_encoder_that_knows_tensors_alone_gets_the_counts():
    class Encoder(torch.nn.Module):
        n_latent = 10

        def __init__(self):
            super().__init__()
            self.norm, self.mean = torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 10)

        def forward(self, counts):
            share = counts / counts.sum(-1, keepdim=True)
            return Normal(self.mean(self.norm(share)), torch.ones(len(counts), 10)).to_event(1)

    adata = synthetic_iid(n_cells=60, n_genes=40, seed=1)
    adata.X = sparse.csr_matrix((np.add.outer(np.arange(60), np.arange(40)) % 8 == 0).astype(np.float32))
    SCVI.setup_anndata(adata)
    model = SCVI(adata)
    model.encoder = Encoder()
    model.train(1)
    assert model.get_latent_representation().shape == (60, 10)


def test_some_cells_in_another_order(fitted, tmp_path):
    rows = np.array([7, 3, 149, 3])
    in_all_sinks(lambda out: fitted.get_normalized_expression(indices=rows, batch_size=3, out=out), tmp_path)


def test_latents_go_into_any_sink(fitted, tmp_path):
    in_all_sinks(
        lambda out: fitted.get_latent_representation(batch_size=40, out=out), tmp_path, fitted.dataset.adata
    )
    (tmp_path / "draw").mkdir()
    in_all_sinks(lambda out: fitted.get_latent_representation(give_mean=False, out=out), tmp_path / "draw")
    with pytest.raises(QueryError, match="return_dist"):
        fitted.get_latent_representation(return_dist=True, out=tmp_path / "b.zarr")


def test_a_latent_without_closed_form(tmp_path):
    adata = synthetic_iid(n_cells=60, n_genes=20)
    SCVI.setup_anndata(adata, layer="counts")
    model = SCVI(adata, latent_distribution="ln")
    model.train(1)
    in_all_sinks(lambda out: model.get_latent_representation(n_samples=5, out=out), tmp_path, adata)


def test_a_layer_of_the_data_asked_about(fitted):
    other = fitted.dataset.adata.copy()[:, ::-1].copy()
    wanted = fitted.get_normalized_expression(other)
    assert list(wanted.columns) == list(other.var_names)[::-1]
    found = fitted.get_normalized_expression(other, out=Layer("denoised"))
    assert found is other.layers["denoised"]
    assert np.array_equal(found, wanted[other.var_names].to_numpy())
    assert "denoised" not in fitted.dataset.adata.layers
    wider = AnnData(sparse.csr_matrix((150, 41), dtype=np.float32), obs=other.obs)
    wider.var_names = [*other.var_names, "more"]
    wider.layers["counts"] = sparse.hstack([other.layers["counts"], np.ones((150, 1))], format="csr")
    with pytest.raises(QueryError, match="lacks 'more'"):
        fitted.get_normalized_expression(wider, out=Layer("denoised"))


def test_a_layer_that_the_model_reads_is_no_place_for_answers(fitted):
    with pytest.raises(QueryError, match="The model reads 'counts'"):
        fitted.get_normalized_expression(out=Layer("counts", overwrite=True))
    with pytest.raises(QueryError, match="lacks"):
        fitted.get_normalized_expression(gene_list=["gene_1"], out=Layer("some"))
    with pytest.raises(QueryError, match="4 draws"):
        fitted.posterior("rho", n_samples=4, return_mean=False, out=Layer("draws"))
    with pytest.raises(QueryError, match="10 columns"):
        fitted.posterior("z", out=Layer("z"))
    assert set(fitted.dataset.adata.layers) == {"counts"}


@pytest.mark.parametrize("place", ["counts", "X"])
def test_the_data_that_a_model_reads_are_no_place_for_answers(place):
    """They would be NaN before the second block is read."""
    adata = synthetic_iid(n_cells=60, n_genes=20)
    counts = adata.layers["counts"].toarray().astype(np.float32)
    adata.X, adata.layers["counts"] = counts.copy(), counts.copy()
    SCVI.setup_anndata(adata, layer="counts")
    model = SCVI(adata)
    model.train(1)
    given = adata.X if place == "X" else adata.layers[place]
    for other in (None, adata.copy()):
        with pytest.raises(QueryError, match="in common with"):
            model.posterior("rho", other, out=given, batch_size=20)
        with pytest.raises(QueryError, match="in common with"):
            model.get_normalized_expression(other, out=given)
    assert np.array_equal(given, counts)


def test_refusals_come_before_work(fitted, tmp_path, monkeypatch):
    (tmp_path / "mine.zarr").mkdir()

    def work(*_, **__):
        raise AssertionError("work has begun")

    monkeypatch.setattr(type(fitted), "drawer", work)
    for out in (
        tmp_path / "mine.zarr",
        Zarr(tmp_path / "mine.zarr", overwrite=True),
        tmp_path / "no" / "a.zarr",
        np.zeros((150, 40), dtype=int),
        Layer("counts"),
        Obsm("protein_expression"),
        3,
    ):
        with pytest.raises(QueryError):
            fitted.get_normalized_expression(out=out)


def test_an_unknown_site_leaves_nothing(fitted, tmp_path):
    given = np.zeros((150, 40), dtype=np.float32)
    for out in (given, tmp_path / "a.zarr"):
        with pytest.raises(QueryError, match="no site 'roh'"):
            fitted.posterior("roh", out=out)
    assert not given.any()
    assert list(tmp_path.iterdir()) == []


def exact_profile(model, z):
    """Decode given latents in float64, over all genes."""
    decoder, cells = model.decoder.double(), model.dataset.cells(np.arange(model.dataset.n_cells))
    try:
        with torch.no_grad():
            hidden = decoder.hidden(torch.from_numpy(z).double(), cells.batch, cells.categorical_covariates)
            return (hidden @ decoder.scale.weight + decoder.scale.bias).softmax(-1).numpy()
    finally:
        decoder.float()


@pytest.mark.parametrize("seed", [0, 2])
def test_some_genes_are_those_of_all(seed):
    """The shortcut for ten genes is within 1e-6 of float64, and of the plain path but for its rounding.

    log(rho) is about -7 here, a float32 whose neighbours are 5e-7 away: over five seeds, both paths were up to 6.7e-7
    away from float64, and 1.02e-6 from each other.
    """
    adata = synthetic_iid(n_cells=200, n_genes=800, seed=seed)
    SCVI.setup_anndata(adata, layer="counts", batch_key="batch")
    model = SCVI(adata, gene_likelihood="nb")
    model.train(1)
    genes = np.arange(0, 800, 80)
    whole = model.get_normalized_expression(batch_size=80, return_numpy=True)[:, genes]
    names = list(adata.var_names[genes])
    some = model.get_normalized_expression(batch_size=80, gene_list=names, return_numpy=True)
    exact = exact_profile(model, model.posterior("z", batch_size=80))[:, genes]
    np.testing.assert_allclose(some, exact, rtol=1e-6)
    np.testing.assert_allclose(some, whole, rtol=1.5e-6)
    np.testing.assert_allclose(np.log(some), np.log(whole), rtol=2e-7)


# ------------------------------------------------------------------------------------------------ other models


def test_regions_go_into_any_sink(tmp_path):
    adata = synthetic_iid(n_cells=80, n_genes=20)
    regions = AnnData(adata.obsm["accessibility"].copy(), obs=adata.obs.copy())
    PEAKVI.setup_anndata(regions, batch_key="batch")
    model = PEAKVI(regions)
    model.train(1)

    def ask(out):
        return model.get_normalized_accessibility(
            batch_size=30, normalize_cells=True, normalize_regions=True, out=out
        )

    plain = in_all_sinks(ask, tmp_path, regions)
    assert np.array_equal(ask(Layer("open")), plain)
    with pytest.raises(QueryError, match="threshold"):
        model.get_normalized_accessibility(threshold=0.5, out=tmp_path / "b.zarr")


def test_proteins_go_into_any_sink(tmp_path):
    adata = synthetic_iid(n_cells=80, n_genes=20)
    keys = {"protein_expression_obsm_key": "protein_expression", "protein_names_uns_key": "protein_names"}
    TOTALVI.setup_anndata(adata, batch_key="batch", **keys)
    model = TOTALVI(adata)
    model.train(1)
    for i, verb in enumerate(
        ("get_protein_expression", "get_protein_foreground_probability", "get_protein_background_mean")
    ):
        (tmp_path / str(i)).mkdir()
        in_all_sinks(
            lambda out, verb=verb: getattr(model, verb)(n_samples=2, batch_size=30, out=out),
            tmp_path / str(i),
            adata,
        )
    rna, proteins = model.get_normalized_expression()
    assert np.array_equal(model.posterior("rho", out=tmp_path / "rna.zarr")[:], rna.to_numpy())
    stored = model.get_protein_expression(out=tmp_path / "proteins.zarr")
    assert np.array_equal(stored[:], proteins.to_numpy())
    with pytest.raises(QueryError, match="The model reads 'protein_expression'"):
        model.get_protein_expression(out=Obsm("protein_expression", overwrite=True))


@pytest.mark.parametrize("clip", [True, False])
def test_velocities_go_into_any_sink(tmp_path, clip):
    rng = np.random.default_rng(0)
    adata = AnnData(np.zeros((60, 8), dtype=np.float32))
    adata.layers["Ms"], adata.layers["Mu"] = (rng.gamma(2.0, 1.0, (60, 8)).astype("f4") for _ in range(2))
    VELOVI.setup_anndata(adata, spliced_layer="Ms", unspliced_layer="Mu")
    model = VELOVI(adata)
    model.train(1)

    def ask(out):
        return model.get_velocity(batch_size=25, clip=clip, n_samples=3, out=out)

    plain = in_all_sinks(ask, tmp_path, adata)
    low = -adata.layers["Ms"]
    assert (plain >= low - 1e-4 * np.abs(low) - 1e-5).all() or not clip
    assert np.array_equal(ask(Layer("velocity")), plain)
    in_all_sinks(lambda out: model.get_latent_time(batch_size=25, out=out), _made(tmp_path / "time"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ------------------------------------------------------------------------------------------------ memory


def test_the_guide_knows_the_size_of_a_block():
    page = (Path(__file__).parents[2] / "docs/user_guide/large_data.md").read_text(encoding="utf-8")
    assert f"({4 * asking._BLOCK_NUMBERS / 1e6:.0f} MB, or sixteen cells" in page
    assert asking._SMALLEST_BLOCK == 16


def write_cells(path, n_cells, n_genes):
    counts = sparse.random(n_cells, n_genes, density=0.01, format="csr", dtype=np.float32, random_state=0)
    counts.data = np.ceil(counts.data)
    counts = (
        counts + sparse.csr_matrix((np.ones(n_cells), (np.arange(n_cells), np.arange(n_cells) % n_genes)))
    ).tocsr()
    adata = AnnData(counts.astype(np.float32))
    adata.var_names = [f"gene{i}" for i in range(n_genes)]
    adata.write_h5ad(path)
    return path


@pytest.mark.slow
@pytest.mark.skipif(not peak_memory.CLEAR.exists(), reason="peaks of memory are read where Linux tells them")
def test_memory_is_flat_with_a_sink(tmp_path):
    """From 30,000 to 120,000 cells; the answer itself grows by 180 MB, which the table in memory shows."""
    n_genes = 500
    data = {n: write_cells(tmp_path / f"{n}.h5ad", n, n_genes) for n in (500, 30_000, 120_000)}
    small = read_h5ad(data[500])
    SCVI.setup_anndata(small)
    model = SCVI(small, gene_likelihood="nb")
    model.train(1)
    model.save(tmp_path / "model", save_anndata=True)

    def rise(n, out):
        command = [sys.executable, "-m", "tests.models.peak_memory"]
        command += [str(tmp_path / "model"), str(data[n]), str(out)]
        # GNU's allocator keeps what was freed unless it is told to give arrays back: that would count as held.
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        folder = Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=env)
        return int(done.stdout.split()[-1]) / 1e6

    flat = [rise(n, tmp_path / f"{n}.zarr") for n in (30_000, 120_000)]
    whole = [rise(n, "-") for n in (30_000, 120_000)]
    print(f"rise of resident memory, MB: zarr {flat}, table {whole}")
    assert flat[1] - flat[0] < 20
    assert whole[1] - whole[0] > 150, "the measure sees what is held in memory"
