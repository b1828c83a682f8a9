"""The command: what it writes, what it passes on, and how it speaks of mistakes."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import pyrocell
from pyrocell import settings
from pyrocell.cli import main
from pyrocell.errors import DataError, PyrocellWarning
from pyrocell.infer.criticism import check_predictions
from pyrocell.infer.plan import TrainingPlan

N_CELLS, N_GENES = 80, 12


class FakeModel:
    """A model of two clusters that fits nothing and remembers what it was asked."""

    made: FakeModel
    setup: dict
    default_plan, default_early_stopping = TrainingPlan(weight_decay=0.5), False

    @staticmethod
    def setup_anndata(adata, *, layer=None, batch_key=None, labels_key=None):
        FakeModel.setup = {"layer": layer, "batch_key": batch_key, "labels_key": labels_key}
        adata.uns["fake"] = "set up"

    def __init__(self, adata, n_latent=2, gene_likelihood="zinb"):
        FakeModel.made = self
        self.adata, self.seed = adata, settings.seed
        self.constructor = {"n_latent": n_latent, "gene_likelihood": gene_likelihood}

    def train(self, max_epochs=None, *, batch_size=128, early_stopping=False, device=None, plan=None):
        warnings.warn("lane and donor are confounded", PyrocellWarning, stacklevel=2)
        warnings.warn("noise of another package", FutureWarning, stacklevel=2)
        self.training = {"max_epochs": max_epochs, "batch_size": batch_size, "early_stopping": early_stopping}
        self.plan = plan
        self.history = pd.DataFrame({"elbo_train": np.linspace(100, 50, max_epochs or 5)})

    def get_latent_representation(self):
        rng = np.random.default_rng(0)
        return rng.normal(size=(self.adata.n_obs, 2)) + 8 * (np.arange(self.adata.n_obs) % 2)[:, None]

    def differential_expression(self, *, groupby):
        self.groupby = groupby
        groups = self.adata.obs[groupby].astype(str).unique()
        lfc = np.linspace(-2, 2, self.adata.n_vars)
        tables = [
            pd.DataFrame(
                {
                    "lfc_mean": lfc,
                    "proba_de": np.abs(lfc) / 2,
                    "is_de_fdr_0.05": np.abs(lfc) > 1.5,
                    "group1": g,
                },
                index=self.adata.var_names,
            ).assign(group2="rest", comparison=f"{g} vs rest")
            for g in groups
        ]
        return pd.concat(tables)

    def posterior_predictive_check(self, *, indices):
        self.checked = indices
        counts = torch.from_numpy(self.adata.layers["counts"].toarray()[indices])
        return check_predictions(
            [(counts, counts.expand(3, -1, -1))], feature_names=list(self.adata.var_names)
        )

    def save(self, folder, *, overwrite):
        assert overwrite
        folder.mkdir(exist_ok=True)
        (folder / "model.json").write_text("{}")


class Picky(FakeModel):
    """Refuses all data, at some length."""

    @staticmethod
    def setup_anndata(adata, *, layer=None):
        raise DataError("the counts are negative in 3 cells:\n  " + ", ".join(f"cell{i}" for i in range(30)))


MODELS = {"SCVI": FakeModel, "Picky": Picky}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(2.0, (N_CELLS, N_GENES)).astype(np.float32))
    obs = pd.DataFrame(
        {
            "lane": np.where(np.arange(N_CELLS) % 2, "a", "b"),
            "kind": np.where(np.arange(N_CELLS) % 3, "T", "B"),
            "constant": "same",
            "barcode": [str(i) for i in range(N_CELLS)],
        },
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)])
    adata = anndata.AnnData(counts.copy(), obs=obs, var=var, layers={"counts": counts})
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    words = (
        f"fit {data} --batch-key lane --labels-key kind --set n_latent=3 --set gene_likelihood=nb --seed 7"
    )
    before = settings.seed, settings.progress
    status = main(
        [*words.split(), "--max-epochs", "9", "--batch-size", "16", "--out", str(out)], models=MODELS
    )
    assert (settings.seed, settings.progress) == before
    return status, out, FakeModel.made, FakeModel.setup


def complaint(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def test_all_files_are_written(fitted):
    status, out, _, _ = fitted
    assert status == 0
    assert {p.name for p in out.iterdir()} == {
        "adata.h5ad",
        "differential_expression.csv",
        "model",
        "report.html",
    }
    adata = anndata.read_h5ad(out / "adata.h5ad")
    assert adata.obsm["X_pyrocell"].shape == (N_CELLS, 2)
    assert adata.obsm["X_umap"].shape == (N_CELLS, 2)
    clusters = adata.obs["pyrocell_clusters"]
    assert (
        (pd.crosstab(clusters, np.arange(N_CELLS) % 2) > 0).sum(axis=1).eq(1).all()
    )  # the two halves, not mixed
    table = pd.read_csv(out / "differential_expression.csv", index_col="feature")
    assert len(table) == 2 * N_GENES
    assert set(table["group1"]) == {"T", "B"}


def test_choices_reach_the_model(fitted):
    _, _, model, setup = fitted
    assert setup == {"layer": "counts", "batch_key": "lane", "labels_key": "kind"}
    assert model.constructor == {"n_latent": 3, "gene_likelihood": "nb"}
    assert model.training == {"max_epochs": 9, "batch_size": 16, "early_stopping": False}
    assert model.seed == 7
    assert model.plan == TrainingPlan(weight_decay=0.5, validate_every=5)
    assert model.groupby == "kind"
    np.testing.assert_array_equal(model.checked, np.arange(N_CELLS))


def test_report_tells_of_the_run(fitted):
    text = (fitted[1] / "report.html").read_text(encoding="utf-8")
    assert text.count("<img") == 1 + 3 + 1 + 3  # kind, lane and clusters
    for words in ("SCVI on cells.h5ad", "lane and donor are confounded", "n_latent=3", "seconds, training"):
        assert words in text
    assert "noise of another package" not in text


def test_results_are_not_overwritten_unasked(fitted, data, capsys):
    report = fitted[1] / "report.html"
    before = report.stat().st_mtime_ns
    assert main(["fit", str(data), "--out", str(fitted[1])], models=MODELS) == 2
    assert "give --overwrite" in complaint(capsys)
    assert report.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--model SVCI", "there is no model 'SVCI'. Models are: 'SCVI', 'Picky'."),
        ("--groupby typ", "there is no column 'typ' in obs. It has 'lane', 'kind', 'constant', 'barcode'."),
        ("--groupby constant", "'constant' has 1 different values"),
        ("--size-factor-key lane", "SCVI has no use for '--size-factor-key'"),
        ("--set n_layers=2", "no option 'n_layers'. It has 'n_latent', 'gene_likelihood'."),
        ("--set n_latent", "Write --set NAME=VALUE"),
        ("--device tpu9", "the device 'tpu9' cannot be used here"),
    ],
)
def test_mistakes_are_told_in_a_paragraph(data, tmp_path, capsys, words, expected):
    status = main(["fit", str(data), "--out", str(tmp_path / "out"), *words.split()], models=MODELS)
    assert status == 2
    assert expected in complaint(capsys)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["CellAssign", "SCBASSET", "Tangram"])
def test_models_that_lack_what_the_command_asks_are_told_so(data, tmp_path, capsys, name):
    assert main(["fit", str(data), "--model", name, "--out", str(tmp_path)]) == 2
    text = complaint(capsys)
    assert f"cannot fit {name}, which has no" in text and "use it in Python" in text and "'SCVI'" in text
    assert "'CellModel'" not in text


def test_errors_of_the_library_are_wrapped(data, tmp_path, capsys):
    assert main(["fit", str(data), "--model", "Picky", "--out", str(tmp_path)], models=MODELS) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("pyrocell: the counts are negative in 3 cells: cell0, cell1")
    assert len(lines) > 1
    assert all(len(line) <= 98 for line in lines)


@pytest.mark.parametrize("content", [None, b"not hdf5"])
def test_files_that_cannot_be_read(tmp_path, capsys, content):
    path = tmp_path / "x.h5ad"
    if content:
        path.write_bytes(content)
    assert main(["fit", str(path), "--out", str(tmp_path / "out")], models=MODELS) == 2
    expected = "cannot be read as an .h5ad file" if content else "there is no file"
    assert expected in complaint(capsys)


def test_folder_that_cannot_be_written(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["fit", str(data), "--out", str(tmp_path / "file")], models=MODELS) == 2
    assert "cannot read or write a file" in complaint(capsys)


def test_interruption_ends_quietly(data, tmp_path, capsys):
    class Slow(FakeModel):
        def train(self, max_epochs=None, **_):
            raise KeyboardInterrupt

    assert main(["fit", str(data), "--out", str(tmp_path)], models={"SCVI": Slow}) == 130
    assert "interrupted" in complaint(capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fit x.h5ad", "--out"),
        ("fit x.h5ad --out o --max-epochs 0", "at least 1"),
        ("", "COMMAND"),
    ],
)
def test_wrong_arguments_end_with_usage(capsys, words, expected):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert expected in complaint(capsys)


@pytest.mark.parametrize("command", ["demo", "fit"])
def test_help_has_examples_and_files(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("examples:", f"pyrocell {command} ", "report.html", "adata.h5ad", "--batch-key", "--seed"):
        assert words in text
    assert "(default: None)" not in text


def test_version_and_help_are_quick():
    program = "import sys; from pyrocell.cli import main; main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"pyrocell {pyrocell.__version__}"
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "scanpy", "matplotlib", "pyro", "anndata"}


def test_most_variable_genes_are_fitted_and_all_are_kept(data, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrocell.cli.work._embed", lambda adata, seed, run: None)
    words = ["fit", str(data), "--n-top-genes", "5", "--groupby", "kind", "--out", str(tmp_path)]
    assert main(words, models=MODELS) == 0
    assert FakeModel.made.adata.n_vars == 5
    assert anndata.read_h5ad(tmp_path / "adata.h5ad").n_vars == N_GENES


def test_predictive_check_is_of_a_sample_of_many_cells(data, tmp_path, monkeypatch):
    monkeypatch.setattr("pyrocell.cli.work._embed", lambda adata, seed, run: None)
    monkeypatch.setattr("pyrocell.cli.work._MOST_CELLS_CHECKED", 10)
    assert main(["fit", str(data), "--groupby", "kind", "--out", str(tmp_path)], models=MODELS) == 0
    checked = FakeModel.made.checked
    assert len(np.unique(checked)) == 10
    assert (np.diff(checked) > 0).all()


def test_one_group_is_a_warning_and_not_the_end(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pyrocell.cli.work._embed", lambda adata, seed, run: None)
    assert main(["fit", str(data), "--out", str(tmp_path)], models=MODELS) == 0
    assert "fewer than two groups" in complaint(capsys)
    assert not (tmp_path / "differential_expression.csv").exists()
    assert "fewer than two groups" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_missing_igraph_costs_only_the_clusters(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "igraph", None)
    monkeypatch.setattr("scanpy.tl.umap", lambda adata, random_state: None)
    assert main(["fit", str(data), "--groupby", "kind", "--out", str(tmp_path)], models=MODELS) == 0
    assert "pip install 'pyrocell[report]'" in complaint(capsys)
    assert "pyrocell_clusters" not in anndata.read_h5ad(tmp_path / "adata.h5ad").obs


@pytest.mark.slow
def test_demo_of_the_example_data_takes_under_three_minutes(tmp_path, capsys):
    start = time.perf_counter()
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert time.perf_counter() - start < 180
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in ("coloured by cell_type", "coloured by phase", "Volcano plot", "Predictive check"):
        assert words in text
    adata = anndata.read_h5ad(tmp_path / "adata.h5ad")
    assert adata.n_obs == 700
    table = pd.read_csv(tmp_path / "differential_expression.csv", index_col="feature")
    assert table["group1"].nunique() == adata.obs["cell_type"].nunique() == 10
    b_cells = table[table["group1"].str.contains("CD19")]
    assert {"CD79A", "CD79B", "MS4A1"} & set(b_cells[b_cells["lfc_mean"] > 1].head(10).index)
    model = pyrocell.SCVI.load(tmp_path / "model", adata)
    np.testing.assert_array_equal(model.get_latent_representation(), adata.obsm["X_pyrocell"])


@pytest.mark.slow
def test_fit_of_a_file_with_the_real_model(data, tmp_path):
    words = f"fit {data} --batch-key lane --set n_latent=2 --set n_hidden=8 --max-epochs 2 --groupby kind"
    assert main([*words.split(), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert not list(tmp_path.rglob("*.pkl"))


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--batch-key batch", "--layer raw", "--set gene_likelihood=gauss"])
def test_mistakes_with_the_real_model_are_told(data, tmp_path, capsys, words):
    assert main(["fit", str(data), "--out", str(tmp_path / "out"), *words.split()]) == 2
    text = complaint(capsys)
    assert words.replace("=", " ").split()[-1] in text
