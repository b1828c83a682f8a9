"""Every public model, and models that users write, keep the contract."""

from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy import sparse

import pyrocell
from pyrocell import settings
from pyrocell.data import Dataset, synthetic_iid
from pyrocell.distributions import Poisson, StandardNormal
from pyrocell.models.labels import ClassifierOptions
from pyrocell.testing import CHECKS, ModelCase, check_model, run_check
from tests.models import test_velovi
from tests.models.zoo import BatchVAE, NoLatent, PoissonFactors

N_GENES = 30


def small_data():
    return synthetic_iid(n_cells=160, n_genes=N_GENES, label_effect=0.5, seed=0)


def masked_proteins():
    """Twelve proteins, four of which batch_1 lacks."""
    adata = synthetic_iid(n_cells=160, n_genes=N_GENES, label_effect=0.5, n_proteins=12, seed=0)
    mask = np.ones(adata.obsm["protein_expression"].shape, dtype=bool)
    mask[np.asarray(adata.obs["batch"] == "batch_1"), :4] = False
    adata.obsm["mask"] = mask
    return adata


def small_regions():
    """Regions of three cell types: of fragments, 0 to 3 in a cell."""
    generator = np.random.default_rng(0)
    chance = generator.beta(1, 4, (3, N_GENES))
    fragments = generator.poisson(
        2 * chance[generator.integers(3, size=160)] * generator.beta(5, 2, (160, 1))
    )
    fragments[:, 0] = 1
    adata = anndata.AnnData(sparse.csr_matrix(fragments.astype(np.float32)))
    adata.var_names = [f"chr1:{1000 * j}-{1000 * j + 500}" for j in range(N_GENES)]
    adata.obs = small_data().obs.set_axis(adata.obs_names.astype(str))
    return adata


def small_kinetics():
    """Genes that are switched on, then off, at times of their own, in cells along one time axis."""
    return test_velovi.simulate(n_cells=160, n_genes=N_GENES)[0]


def small_peaks():
    """Peaks with DNA, open or not in each of 30 cells."""
    generator = np.random.default_rng(0)
    open_ = generator.random((N_GENES, 160)) < 0.4
    open_[0], open_[:, 0] = True, True
    adata = anndata.AnnData(sparse.csr_matrix(open_.astype(np.float32)))
    adata.obs = small_data().obs.iloc[:N_GENES].set_axis(adata.obs_names.astype(str))
    adata.varm["dna_code"] = generator.integers(5, size=(160, 48), dtype=np.uint8)
    return adata


def markers(n_markers=12):
    """Three types with markers in turn; genes of no type among them."""
    is_marker = {f"type{c}": [int(i % 4 == c) for i in range(n_markers)] for c in range(3)}
    return pd.DataFrame(is_marker, index=small_data().var_names[:n_markers])


def profiles_of_types():
    """Profiles of three types, as a reference gives them, for the genes of ``small_data``."""
    generator = np.random.default_rng(0)
    genes = list(small_data().var_names)
    profiles = pd.DataFrame(generator.lognormal(0, 1, (3, N_GENES)), list("ABC"), genes)
    return {"profiles": profiles, "logits": pd.Series(generator.normal(0, 0.5, N_GENES), genes)}


def partly_labelled():
    """Two of three cells without a label."""
    adata = small_data()
    adata.obs["type"] = np.where(np.arange(160) % 3 == 0, adata.obs["label"].astype(str), "Unknown")
    return adata


def small_spots():
    """Eight spots with most of the genes, and one that the cells lack."""
    table = synthetic_iid(n_cells=8, n_genes=N_GENES - 4, label_effect=0.5, seed=1).to_df()
    return table.assign(another=1.0).set_axis([f"spot{v}" for v in range(8)])


SMALL = {"n_hidden": 16, "n_latent": 4}
LABELS = {"labels_key": "type", "unlabeled_category": "Unknown"}
SITES = {"z": (4,), "rho": (N_GENES,), "mu": (N_GENES,), "size": (1,), "x": (N_GENES,)}
LABEL_SITES = SITES | {"u": (4,), "y": (), "label": ()}
PROTEINS = {
    "protein_expression_obsm_key": "protein_expression",
    "protein_names_uns_key": "protein_names",
    "protein_mask_obsm_key": "mask",
}
PROTEIN_SITES = dict.fromkeys(
    ["log_beta", "background", "foreground_probability", "protein", "protein_total_sampled", "y"], (12,)
)
SITES_OF_KINETICS = {"z": (4,), "pi": (N_GENES, 4)} | dict.fromkeys(
    ["velocity", "velocity_max", "velocity_unspliced", "latent_time", "fit_spliced", "s", "u"], (N_GENES,)
)
SMALL_TOWER = {"n_filters_init": 6, "n_repeat_blocks_tower": 2, "n_filters_pre_bottleneck": 6}
SITES_OF_PEAKS = {"peak_embedding": (4,), "accessibility": (N_GENES,), "x": (N_GENES,)}
SITES_OF_REGIONS = {"z": (4,), "accessibility": (N_GENES,), "depth": (1,), "x": (N_GENES,)}
COVARIATES = {
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
}

CASES = {
    "SCVI": ModelCase(pyrocell.SCVI, small_data, {"batch_key": "batch"}, SMALL, SITES),
    "SCVI-nb-covariates": ModelCase(
        pyrocell.SCVI,
        small_data,
        COVARIATES,
        SMALL
        | {"gene_likelihood": "nb", "encode_covariates": True, "n_layers": 2, "dispersion": "gene-batch"},
        SITES,
    ),
    "SCVI-latent-library": ModelCase(
        pyrocell.SCVI,
        small_data,
        {"batch_key": "batch"},
        SMALL | {"gene_likelihood": "nb", "use_observed_lib_size": False, "dispersion": "gene-cell"},
        SITES | {"library": (1,)},
    ),
    "SCVI-logistic-normal": ModelCase(
        pyrocell.SCVI,
        small_data,
        {"labels_key": "label", "batch_key": "batch"},
        SMALL
        | {"latent_distribution": "ln", "dispersion": "gene-label", "batch_representation": "embedding"},
        SITES | {"w": (4,)},
    ),
    "SCVI-poisson-size-factor": ModelCase(
        pyrocell.SCVI,
        small_data,
        {"size_factor_key": "size_factor"},
        SMALL | {"gene_likelihood": "poisson"},
        SITES,
    ),
    "SCVI-normal": ModelCase(pyrocell.SCVI, small_data, {}, SMALL | {"gene_likelihood": "normal"}, SITES),
    "TOTALVI": ModelCase(
        pyrocell.TOTALVI,
        masked_proteins,
        {"batch_key": "batch"} | PROTEINS,
        SMALL | {"empirical_protein_background_prior": False},
        SITES | PROTEIN_SITES,
    ),
    "TOTALVI-zinb-covariates": ModelCase(
        pyrocell.TOTALVI,
        masked_proteins,
        COVARIATES
        | PROTEINS
        | {"panel_key": "label", "labels_key": "label", "size_factor_key": "size_factor"},
        SMALL
        | {"gene_likelihood": "zinb", "gene_dispersion": "gene-batch", "protein_dispersion": "protein-label"}
        | {"adversarial": False, "empirical_protein_background_prior": False},
        SITES | PROTEIN_SITES,
    ),
    "PEAKVI": ModelCase(pyrocell.PEAKVI, small_regions, {"batch_key": "batch"}, SMALL, SITES_OF_REGIONS),
    "PEAKVI-logistic-normal": ModelCase(
        pyrocell.PEAKVI,
        small_regions,
        COVARIATES,
        SMALL
        | {"latent_distribution": "ln", "encode_covariates": True, "model_depth": False}
        | {"region_factors": False, "kl_weight": 0.1},
        SITES_OF_REGIONS | {"w": (4,)},
    ),
    "VELOVI": ModelCase(
        pyrocell.VELOVI,
        small_kinetics,
        test_velovi.LAYERS,
        SMALL,
        SITES_OF_KINETICS,
        arguments={"get_permutation_scores": {"labels_key": "stage", "n_samples": 2}},
    ),
    "VELOVI-linear-separate": ModelCase(
        pyrocell.VELOVI,
        small_kinetics,
        test_velovi.LAYERS,
        SMALL | {"linear_decoder": True, "state_coupling": "separate", "time_dependent_transcription": True},
        SITES_OF_KINETICS,
        arguments={"get_permutation_scores": {"labels_key": "stage", "n_samples": 2}},
    ),
    "Tangram": ModelCase(
        pyrocell.Tangram,
        small_data,
        {"labels_key": "label"},
        {"spatial": small_spots()},
        {"mapping": (8,), "weight": (), "scale": (1,)},
    ),
    "Tangram-constrained": ModelCase(
        pyrocell.Tangram,
        small_data,
        {},
        {
            "spatial": small_spots(),
            "mode": "constrained",
            "target_count": 100,
            "density": [1 / 8] * 8,
            "weights": pyrocell.TangramWeights(lambda_g2=0.5, lambda_r=0.01),
            "block_size": 50,
        },
        {"mapping": (8,), "weight": (), "scale": (1,)},
        max_epochs=60,  # the filter takes some steps before it decides
        arguments={"project_cell_annotations": {"labels": "label"}},
    ),
    "Tangram-clusters": ModelCase(
        pyrocell.Tangram,
        small_data,
        {"labels_key": "label"},
        {"spatial": small_spots(), "mode": "clusters", "scale_clusters": False, "density": None},
        {"mapping": (8,), "weight": (), "scale": (1,)},
    ),
    "SCBASSET": ModelCase(
        pyrocell.SCBASSET, small_peaks, {}, SMALL_TOWER | {"n_bottleneck_layer": 4}, SITES_OF_PEAKS
    ),
    "SCBASSET-batch-penalty": ModelCase(
        pyrocell.SCBASSET,
        small_peaks,
        {"batch_key": "batch"},
        SMALL_TOWER | {"n_bottleneck_layer": 4, "l2_reg_cell_embedding": 1e-3},
        SITES_OF_PEAKS,
    ),
    "RNAStereoscope": ModelCase(
        pyrocell.RNAStereoscope,
        small_data,
        {"labels_key": "label"},
        sites={"rho": (N_GENES,), "mu": (N_GENES,), "x": (N_GENES,)},
    ),
    "SpatialStereoscope": ModelCase(
        pyrocell.SpatialStereoscope,
        small_data,
        options=profiles_of_types(),
        sites={"log_abundance": (4,), "abundance": (3,), "proportions": (3,)}
        | dict.fromkeys(["mu", "x"], (N_GENES,)),
        arguments={"get_scale_for_ct": {"y": "A"}},
    ),
    "SCANVI": ModelCase(
        pyrocell.SCANVI, partly_labelled, LABELS | {"batch_key": "batch"}, SMALL, LABEL_SITES
    ),
    "SCANVI-gene-label-balanced": ModelCase(
        pyrocell.SCANVI,
        partly_labelled,
        LABELS | COVARIATES,
        SMALL
        | {
            "dispersion": "gene-label",
            "gene_likelihood": "nb",
            "use_observed_lib_size": False,
            "classifier": ClassifierOptions(class_weights="balanced", n_layers=0, encoder_gradient=1.0),
        },
        LABEL_SITES | {"library": (1,)},
    ),
    "CellAssign": ModelCase(
        pyrocell.CellAssign,
        small_data,
        {"batch_key": "batch"},
        {"cell_type_markers": markers()},
        {"z": (), "mu": (12,), "x": (12,)},
    ),
    "CellAssign-unassigned-mean-covariates": ModelCase(
        pyrocell.CellAssign,
        small_data,
        COVARIATES | {"size_factor_key": "size_factor"},
        {"cell_type_markers": markers(), "unassigned": True, "dispersion": "mean", "min_log_fold": 0.5},
        {"z": (), "mu": (12,), "x": (12,)},
    ),
    "BatchVAE": ModelCase(
        BatchVAE, small_data, {"batch_key": "batch"}, SMALL, {"z": (4,), "rho": (N_GENES,)}
    ),
    "PoissonFactors": ModelCase(PoissonFactors, small_data, {}, {}, {"z": (3,), "rho": (N_GENES,)}),
    "NoLatent": ModelCase(NoLatent, small_data),
}


TAKES_SECONDS = {
    "a whole life leaves nothing behind",
    "models trained in turn equal each alone",
    "steps from a tape are the plain ones to the bit",
}
"""Checks that are made by default for one row of each model, and for its other rows among the slow tests."""


def rows():
    for name in CASES:
        for check in CHECKS:
            is_slow = "-" in name and check in TAKES_SECONDS
            yield pytest.param(name, check, marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize(("name", "check"), list(rows()))
def test_contract(name, check, caplog):
    with caplog.at_level(logging.INFO, logger=settings.logger.name):
        run_check(check, CASES[name])
    if "tape" in check:  # plain steps would agree with themselves
        assert "not replayed" not in caplog.text


def test_every_public_model_has_a_row():
    models = {value for value in map(pyrocell.__dict__.get, dir(pyrocell)) if isinstance(value, type)}
    models |= {
        getattr(pyrocell, name) for name in pyrocell.__all__ if isinstance(getattr(pyrocell, name), type)
    }
    public = {m for m in models if issubclass(m, pyrocell.CellModel) and m is not pyrocell.CellModel}
    assert public <= {case.model_class for case in CASES.values()}


def test_roles_decide_verbs():
    assert not hasattr(NoLatent, "get_latent_representation")
    assert not hasattr(NoLatent, "differential_expression")
    assert hasattr(BatchVAE, "differential_expression") and not hasattr(BatchVAE, "get_latent_library_size")
    with pytest.raises(AttributeError, match="declares no latent_site"):
        _ = NoLatent.get_latent_representation


class _Broken(BatchVAE):
    """Names a site that does not exist."""

    latent_site = "w"


def test_a_broken_model_fails_and_the_message_names_the_promise():
    case = ModelCase(_Broken, small_data, {"batch_key": "batch"}, SMALL)
    with pytest.raises(
        AssertionError, match=r"_Broken breaks the contract 'sites exist.*\['w'\] do not exist"
    ):
        run_check("sites exist with their shapes", case)


def test_a_whole_check_in_one_call():
    check_model(CASES["NoLatent"])


def test_rows_that_come_sorted_are_noticed(monkeypatch):
    """The rows of a file are read in order, and nobody puts them back."""
    case = CASES["NoLatent"]
    assert case.trained.is_trained
    straight = Dataset.minibatches
    monkeypatch.setattr(
        Dataset, "minibatches", lambda self, rows, *a, **k: straight(self, np.sort(rows), *a, **k)
    )
    with pytest.raises(AssertionError, match="breaks the contract 'rows come in the order asked for'"):
        run_check("rows come in the order asked for", case)


def test_probabilities_that_do_not_sum_to_one_are_noticed(monkeypatch):
    case = CASES["SpatialStereoscope"]
    right = case.trained.get_proportions()
    monkeypatch.setattr(case.trained, "get_proportions", lambda: 1.01 * right)
    with pytest.raises(AssertionError, match="get_proportions does not sum to one"):
        run_check("probabilities sum to one", case)


class _HalfPrecision(BatchVAE):
    """Computes its likelihood in the precision of its networks."""

    def model(self, cells):
        with self.plate(cells):
            z = pyro.sample("z", StandardNormal(self.encoder.n_latent))
            rho = pyro.deterministic("rho", self.decoder(z, cells.batch), event_dim=1)
            mean = (cells.library * rho @ torch.eye(N_GENES)).clamp_min(1e-6)  # a product: bfloat16
            x = torch.distributions.Poisson(mean, validate_args=False)
            pyro.factor("x_term", x.log_prob(cells.counts.to(mean.dtype)).sum(-1))
            pyro.sample("x", Poisson(mean).to_event(1), obs=cells.counts)


def test_a_likelihood_in_half_precision_is_noticed():
    case = ModelCase(_HalfPrecision, small_data, {"batch_key": "batch"}, SMALL)
    with pytest.raises(AssertionError, match="is torch.bfloat16 under autocast|is not finite under autocast"):
        run_check("likelihoods stay float32 in half precision", case)
