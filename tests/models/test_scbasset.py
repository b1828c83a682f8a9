"""SCBASSET: its likelihood, its verbs, bad input, and what it recovers."""

from __future__ import annotations

from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, roc_auc_score

import pyrocell
from pyrocell import SCBASSET, TrainingPlan
from pyrocell.errors import (
    DataError,
    NotTrainedError,
    PyrocellWarning,
    QueryError,
    SetupError,
    TrainingError,
)
from tests.nn.test_dna import in_float64

MOTIFS = {"one": "TGACTCAG", "two": "CCGGAAGT", "three": "GATAAGGC"}
TOWER = {"n_filters_init": 8, "n_repeat_blocks_tower": 2, "n_filters_pre_bottleneck": 8}
N_CELLS, N_PEAKS, LENGTH = 24, 90, 60


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def simulate(seed=0, n_peaks=N_PEAKS, n_cells=N_CELLS, length=LENGTH):
    """Three motifs planted in random DNA, each of which opens chromatin in one of three types of cells."""
    draw = np.random.default_rng(seed)
    gc = 0.5 + draw.uniform(-0.05, 0.05, (n_peaks, 1))
    strong, first = draw.random((n_peaks, length)) < gc, draw.random((n_peaks, length)) < 0.5
    codes = np.where(strong, np.where(first, 1, 2), np.where(first, 0, 3)).astype(np.uint8)
    n_sites = draw.integers(1, 4, (n_peaks, 3)) * (draw.random((n_peaks, 3)) < 1 / 3)
    for m, site in enumerate(MOTIFS.values()):
        letters = ["ACGT".index(letter) for letter in site]
        for peak in np.flatnonzero(n_sites[:, m]):
            for start in draw.integers(0, length - 7, n_sites[peak, m]):
                codes[peak, start : start + 8] = letters
    group, bias = draw.integers(3, size=n_cells), draw.normal(0, 0.5, n_cells)
    probability = 1 / (1 + np.exp(-(2.0 * n_sites[:, group] - 1.5 + bias)))
    seen = draw.random(probability.shape) < probability
    seen[np.arange(n_peaks), draw.integers(n_cells, size=n_peaks)] = True  # no peak is open nowhere
    adata = anndata.AnnData(sparse.csr_matrix(seen.T.astype(np.float32)))
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.var_names = [f"chr1:{1000 * i}-{1000 * i + 500}" for i in range(n_peaks)]
    adata.obs["group"], adata.obs["batch"] = group.astype(str), draw.integers(2, size=n_cells).astype(str)
    adata.varm["dna_code"] = codes
    return adata, {"probability": probability, "group": group, "bias": bias}


def make(adata=None, *, batch_key=None, train=True, **options):
    adata = simulate()[0] if adata is None else adata
    SCBASSET.setup_anndata(adata, batch_key=batch_key)
    model = SCBASSET(adata, 4, **(TOWER | options))
    if train:
        model.train(3, batch_size=32, early_stopping=False)
    return model


@pytest.fixture(scope="module")
def fitted():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        model = make(batch_key="batch")
    finally:
        pyrocell.settings.progress = before
    return model


# --------------------------------------------------------------------------------------------- the model


def test_likelihood_in_float64(fitted):
    rows = np.arange(7)
    peaks = fitted.dataset.cells(rows)
    embedding = in_float64(fitted.tower, peaks.dna)
    state = {name: value.numpy().astype(np.float64) for name, value in fitted.module.state_dict().items()}
    batch = fitted.dataset.adata.obs["batch"].astype(int).to_numpy()
    cells = state["cell_embedding"]
    cells = cells - np.array([cells[batch == 0].mean(0), cells[batch == 1].mean(0)])[batch]
    np.testing.assert_allclose(fitted.get_latent_representation(), cells, atol=1e-5)
    responses = cells + state["batch_embedding"][batch]
    assert np.abs(state["batch_embedding"]).max() > 0.01
    p = 1 / (1 + np.exp(-(embedding @ responses.T + state["cell_bias"])))
    x = fitted.dataset.adata.X.toarray().T[rows]
    expected = -(x * np.log(p) + (1 - x) * np.log1p(-p)).sum(1)
    np.testing.assert_allclose(
        fitted.get_reconstruction_error(indices=rows, return_mean=False), expected, rtol=1e-4
    )
    np.testing.assert_allclose(fitted.posterior("accessibility", indices=rows), p, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        fitted.posterior("peak_embedding", indices=rows), embedding, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(fitted.get_elbo(indices=rows, return_mean=False), -expected, rtol=1e-4)
    np.testing.assert_allclose(
        fitted.get_marginal_ll(indices=rows, return_mean=False, n_samples=2), -expected, rtol=1e-4
    )


def test_the_penalty_is_a_weight_in_the_mean_over_entries():
    model = make(l2_reg_cell_embedding=0.3, train=False)
    peaks = model.dataset.cells(np.arange(N_PEAKS))
    with model.running():
        terms = model.elbo()(peaks)
    expected = terms.reconstruction.mean() / N_CELLS + 0.3 * model.cell_embedding.square().mean()
    torch.testing.assert_close(terms.loss / N_CELLS, expected)


def test_biases_start_at_the_log_odds():
    model = make(train=False)
    n_open = model.dataset.adata.X.toarray().sum(1)
    expected = np.log((n_open + 0.5) / (N_PEAKS - n_open + 0.5))
    np.testing.assert_allclose(model.cell_bias.detach().numpy(), expected, rtol=1e-5)


def test_half_precision_of_the_tower_alone():
    model = make(train=False)
    plan = replace(model.default_plan, precision="bfloat16")
    model.train(1, batch_size=32, early_stopping=False, plan=plan)
    assert np.isfinite(model.history["elbo_train"]).all() and model.history["skipped_steps"].sum() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        peaks = model.dataset.cells(np.arange(3))
        embedding = model.tower(peaks.dna)
        assert model._logits(embedding, peaks.batch, model.cell_bias).dtype == torch.float32


def test_rates_of_adam_are_options():
    assert TrainingPlan(betas=(0.5, 0.9)).decisive()["betas"] == [0.5, 0.9]
    model = make(train=False)
    optimizer = model.default_plan.make_optimizer(model.module.named_parameters(), 0.01)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.95, 0.9995)}
    with pytest.raises(TrainingError, match=r"betas is \(0.9, 1.0\)"):
        TrainingPlan(betas=(0.9, 1.0))


# --------------------------------------------------------------------------------------------- the verbs


def test_embeddings_and_biases_of_cells(fitted):
    z, bias = fitted.get_latent_representation(), fitted.get_cell_bias()
    assert z.shape == (N_CELLS, 4) and bias.shape == (N_CELLS,)
    np.testing.assert_array_equal(fitted.get_latent_representation(indices=[5, 2]), z[[5, 2]])
    np.testing.assert_array_equal(fitted.get_cell_bias(indices=bias > 0), bias[bias > 0])
    np.testing.assert_array_equal(fitted.posterior("cell_embedding"), z)
    np.testing.assert_array_equal(fitted.posterior("cell_bias"), bias)
    with pytest.raises(QueryError, match="24"):
        fitted.get_cell_bias(indices=[24])


def test_accessibility_is_cells_by_peaks(fitted):
    table = fitted.get_normalized_accessibility(normalize_cells=True)
    adata = fitted.dataset.adata
    assert list(table.index) == list(adata.obs_names) and list(table.columns) == list(adata.var_names)
    np.testing.assert_allclose(table.to_numpy().T, fitted.posterior("accessibility"), rtol=1e-5)
    peaks = [adata.var_names[7], adata.var_names[3]]
    part = fitted.get_normalized_accessibility(
        indices=[4, 1], region_list=peaks, normalize_cells=True, batch_size=1
    )
    pd.testing.assert_frame_equal(part, table.iloc[[4, 1]][peaks], rtol=1e-4)
    flat = fitted.get_normalized_accessibility(return_numpy=True)
    change = np.log(flat / (1 - flat)) - np.log(table / (1 - table)).to_numpy()
    bias = fitted.get_cell_bias()
    np.testing.assert_allclose(
        change, np.broadcast_to((bias.mean() - bias)[:, None], change.shape), atol=1e-3
    )
    with pytest.raises(QueryError, match="chr9"):
        fitted.get_normalized_accessibility(region_list=["chr9:1-2"])


def test_as_if_of_one_batch(fitted):
    one, two = (fitted.get_normalized_accessibility(transform_batch=b, normalize_cells=True) for b in "01")
    own = fitted.get_normalized_accessibility(normalize_cells=True)
    first = (fitted.dataset.adata.obs["batch"] == "0").to_numpy()
    pd.testing.assert_frame_equal(own[first], one[first])
    pd.testing.assert_frame_equal(own[~first], two[~first])
    assert np.abs(one - two).to_numpy().max() > 1e-4
    drawn = fitted.posterior("accessibility", given={"batch": "0"})
    np.testing.assert_allclose(drawn.T, one, rtol=1e-5)


def test_other_peaks_of_the_same_cells(fitted):
    other, _ = simulate(seed=5, n_peaks=12)
    other.obs["batch"] = fitted.dataset.adata.obs["batch"].to_numpy()
    table = fitted.get_normalized_accessibility(other)
    assert table.shape == (N_CELLS, 12)
    with pytest.raises(
        DataError, match=r"1 of the 24 cells of the model are not in adata.obs_names: 'cell0'"
    ):
        fitted.get_normalized_accessibility(other[1:].copy())
    other.varm["dna_code"] = other.varm["dna_code"][:, :50]
    with pytest.raises(DataError, match="sequences of 50 bases; the model was made with 60"):
        fitted.get_normalized_accessibility(other)


def test_what_has_no_meaning_is_absent(fitted):
    for verb in ("load_query_data", "get_novelty", "differential_abundance", "differential_accessibility",
                 "get_normalized_expression", "get_region_factors"):  # fmt: skip
        assert not hasattr(fitted, verb) and verb not in dir(fitted)


def test_nothing_is_told_before_training():
    model = make(train=False)
    for ask in (
        model.get_latent_representation, model.get_cell_bias, model.get_normalized_accessibility,
        lambda: model.get_tf_activity(MOTIFS), lambda: model.get_mutation_effects("chr1:0-500"),
    ):  # fmt: skip
        with pytest.raises(NotTrainedError):
            ask()


def test_mudata_gives_the_same_model():
    mudata = pytest.importorskip("mudata")
    adata, _ = simulate()
    one = make(adata.copy(), batch_key="batch")
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData(
            {"atac": adata, "rna": anndata.AnnData(np.ones((N_CELLS, 2)), obs=adata.obs[[]])}
        )
    SCBASSET.setup_mudata(mdata, modalities={"accessibility": "atac"}, batch_key="batch")
    two = SCBASSET(mdata, 4, **TOWER)
    two.train(3, batch_size=32, early_stopping=False)
    np.testing.assert_array_equal(one.get_latent_representation(), two.get_latent_representation())
    rna = anndata.AnnData(np.ones((N_CELLS, 2)), obs=adata.obs[[]])
    with mudata.set_options(pull_on_update=False):
        part = mudata.MuData({"atac": adata[:20].copy(), "rna": rna})
    with pytest.raises(DataError, match="4 cells have no 'atac'"):
        two.get_normalized_accessibility(part)


# ------------------------------------------------------------------------------------- activity of motifs


def by_hand(model, site, start, sequences):
    """Mean change of the logits, asked through data that hold the sequences."""
    adata = model.dataset.adata
    logits = []
    for insert in (False, True):
        other = anndata.AnnData(np.ones((N_CELLS, len(sequences)), dtype=np.float32), obs=adata.obs.copy())
        codes = sequences.copy()
        if insert:
            codes[:, start : start + len(site)] = ["ACGT".index(letter) for letter in site]
        other.varm["dna_code"] = codes
        p = model.get_normalized_accessibility(other, return_numpy=True).astype(np.float64)
        logits.append(np.log(p / (1 - p)).mean(1))
    return logits[1] - logits[0]


def test_activity_is_the_mean_change_of_the_logits(fitted, tmp_path):
    rng = np.random.default_rng(0)
    sequences = rng.integers(4, size=(6, LENGTH)).astype(np.uint8)
    path = tmp_path / "background.fa"
    path.write_text("".join(f">s{i}\n{''.join('ACGT'[c] for c in row)}\n" for i, row in enumerate(sequences)))
    found = fitted.get_tf_activity(MOTIFS, "one", background=path, standardize=False)
    assert list(found.columns) == ["one"] and list(found.index) == list(fitted.dataset.adata.obs_names)
    expected = by_hand(fitted, "TGACTCAG", 26, sequences)
    np.testing.assert_allclose(found["one"], expected, atol=2e-4)
    assert np.abs(expected).max() > 1e-3


def test_a_place_without_preference_keeps_the_background(fitted, tmp_path):
    path = tmp_path / "background.fa"
    path.write_text(">s\n" + "CGTA" * (LENGTH // 4) + "\n")
    scores = fitted.get_tf_activity(
        {"bare": "TGACTCAG", "framed": "NNNTGACTCAGNNN"}, background=path, standardize=False
    )
    np.testing.assert_allclose(scores["bare"], scores["framed"], atol=1e-6)


def test_effects_of_single_bases(fitted):
    adata = fitted.dataset.adata
    region = adata.var_names[3]
    assert (
        np.abs(fitted.get_mutation_effects(region)).max(axis=None) > 1e-4
    )  # of all cells: their batch counts too
    cells = np.arange(0, N_CELLS, 2)
    table = fitted.get_mutation_effects(region, indices=cells)
    assert table.shape == (LENGTH, 4) and list(table.columns) == list("ACGT")
    there = adata.varm["dna_code"][3]
    np.testing.assert_array_equal(np.take_along_axis(table.to_numpy(), there[:, None].astype(int), 1), 0)
    other = adata[:, [3, 4]].copy()
    other.varm["dna_code"][1] = there
    other.varm["dna_code"][1, 17] = (there[17] + 1) % 4
    p = fitted.get_normalized_accessibility(other, return_numpy=True)[cells].astype(np.float64)
    change = np.diff(np.log(p / (1 - p)), axis=1).mean()
    assert table.iloc[17, (there[17] + 1) % 4] == pytest.approx(change, rel=2e-2, abs=2e-6)
    with pytest.raises(QueryError, match="chr9"):
        fitted.get_mutation_effects("chr9:1-2")


def test_motifs_from_files_and_options(fitted, tmp_path):
    rows = {"A": "1 0 0 0", "C": "0 1 0 0", "G": "0 0 1 0", "T": "0 0 0 1"}
    meme = "MEME version 4\n\nALPHABET= ACGT\n\n"
    for name, site in MOTIFS.items():
        matrix = "\n".join(rows[letter] for letter in site)
        meme += f"MOTIF {name}\nletter-probability matrix: alength= 4 w= 8\n{matrix}\n\n"
    (tmp_path / "motifs.meme").write_text(meme)
    (tmp_path / "motifs.fa").write_text("".join(f">{name}\n{site}\n" for name, site in MOTIFS.items()))
    given = fitted.get_tf_activity(MOTIFS, n_background=5)
    np.testing.assert_allclose(given.mean(), 0, atol=1e-5)
    np.testing.assert_allclose(given.std(ddof=0), 1, rtol=1e-4)
    for path in ("motifs.meme", "motifs.fa"):
        pd.testing.assert_frame_equal(fitted.get_tf_activity(tmp_path / path, n_background=5), given)
    # A site drawn from a motif that leaves no choice is the motif.
    pd.testing.assert_frame_equal(fitted.get_tf_activity(MOTIFS, n_background=5, sample_sites=True), given)
    free = fitted.get_tf_activity({"any": np.full((8, 4), 0.25)}, n_background=5, sample_sites=True, seed=1)
    assert not np.allclose(
        free, fitted.get_tf_activity({"any": np.full((8, 4), 0.25)}, n_background=5, seed=1)
    )
    assert not np.allclose(fitted.get_tf_activity(MOTIFS, n_background=5, seed=9), given)


def test_wrong_motifs_and_backgrounds_are_named(fitted, tmp_path):
    with pytest.raises(QueryError, match="There are no motifs 'four'; there are 'one', 'two', 'three'"):
        fitted.get_tf_activity(MOTIFS, ["one", "four"])
    with pytest.raises(QueryError, match=r"'long \(61\)' are longer than the sequences of the model, 60"):
        fitted.get_tf_activity({"long": "A" * 61})
    with pytest.raises(QueryError, match="n_background is 0"):
        fitted.get_tf_activity(MOTIFS, n_background=0)
    path = tmp_path / "background.fa"
    path.write_text(f">short\n{'ACGT' * 10}\n>long\n{'ACGT' * 20}\n")
    with pytest.raises(
        DataError, match=r"1 sequences of .* are shorter than those of the model, 60 .*'short \(40\)'"
    ):
        fitted.get_tf_activity(MOTIFS, background=path)
    path.write_text(f">long\n{'ACGT' * 20}\n")
    with pytest.warns(
        PyrocellWarning, match="1 sequences of .* are longer .* the 60 bases in their middle are taken"
    ):
        cut = fitted.get_tf_activity(MOTIFS, background=path)
    path.write_text(f">middle\n{('ACGT' * 20)[10:70]}\n")
    pd.testing.assert_frame_equal(cut, fitted.get_tf_activity(MOTIFS, background=path))


# ------------------------------------------------------------------------------------------- bad input


def test_impossible_options():
    with pytest.raises(
        SetupError, match="60 bases are enough for 4 blocks, not for 6: lower n_repeat_blocks_tower"
    ):
        make(n_repeat_blocks_tower=6, train=False)
    with pytest.raises(SetupError, match="l2_reg_cell_embedding is -1"):
        make(l2_reg_cell_embedding=-1, train=False)


def test_data_without_dna_or_the_wrong_way_round():
    adata, _ = simulate()
    codes = adata.varm.pop("dna_code")
    with pytest.raises(
        SetupError, match="dna_code_key='dna_code': adata.varm has no such entry.*add_dna_sequence"
    ):
        SCBASSET.setup_anndata(adata)
    turned = adata.transpose()
    turned.obsm["dna_code"] = codes
    with pytest.raises(SetupError, match="regions lie in rows"):
        SCBASSET.setup_anndata(turned)


# ------------------------------------------------------------------------------------------- the recovery


def recovery(model_class=SCBASSET, seed=0, max_epochs=30):
    adata, truth = simulate(seed, n_peaks=1200, n_cells=60, length=96)
    model_class.setup_anndata(adata)
    options = {
        "n_filters_init": 32,
        "n_repeat_blocks_tower": 3,
        "filters_mult": 1.0,
        "n_filters_pre_bottleneck": 32,
    }
    model = model_class(adata, 8, **options)
    model.train(max_epochs, batch_size=64, early_stopping=False)
    held_out = model.validation_indices
    seen = adata.X.toarray().T[held_out]
    found, best = (
        roc_auc_score(seen.ravel(), p.ravel())
        for p in (model.posterior("accessibility", indices=held_out), truth["probability"][held_out])
    )
    z = model.get_latent_representation()
    activity = model.get_tf_activity(MOTIFS, n_background=200)
    return {
        "held-out peaks": found / best,
        "bias": np.corrcoef(model.get_cell_bias(), truth["bias"])[0, 1],
        "types": adjusted_rand_score(truth["group"], KMeans(3, n_init=5, random_state=0).fit_predict(z)),
        "motifs": min(roc_auc_score(truth["group"] == m, activity[name]) for m, name in enumerate(MOTIFS)),
    }


GATES = {"held-out peaks": 0.9, "bias": 0.9, "types": 0.9, "motifs": 0.95}


def failures(scores):
    return {name for name, least in GATES.items() if not scores[name] >= least}


@pytest.mark.slow
def test_recovers_what_was_simulated():
    scores = recovery()
    assert not failures(scores), scores


class Misaligned(SCBASSET):
    """Defect: each peak reads the DNA of its neighbour in the minibatch."""

    def model(self, peaks):
        super().model(peaks.replace(dna=peaks.dna.roll(1, 0)) if self.module.training else peaks)


class BiasOfAnother(SCBASSET):
    """Defect: the bias that is told of a cell is that of the next one."""

    def get_cell_bias(self, *, indices=None):
        return np.roll(super().get_cell_bias(indices=indices), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "broken"), [(Misaligned, "held-out peaks"), (BiasOfAnother, "bias")], ids=["dna", "bias"]
)
def test_the_recovery_fails_on_a_defect(defect, broken):
    scores = recovery(defect, max_epochs=15)
    assert broken in failures(scores), scores
