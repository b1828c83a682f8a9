"""Every public model, and models that users write, keep the contract."""

from __future__ import annotations

import pytest

import pyrocell
from pyrocell.data import synthetic_iid
from pyrocell.testing import CHECKS, ModelCase, check_model, run_check
from tests.models.zoo import BatchVAE, NoLatent, PoissonFactors

N_GENES = 30


def small_data():
    return synthetic_iid(n_cells=160, n_genes=N_GENES, label_effect=0.5, seed=0)


SMALL = {"n_hidden": 16, "n_latent": 4}
SITES = {"z": (4,), "rho": (N_GENES,), "mu": (N_GENES,), "size": (1,), "x": (N_GENES,)}
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
    "BatchVAE": ModelCase(
        BatchVAE, small_data, {"batch_key": "batch"}, SMALL, {"z": (4,), "rho": (N_GENES,)}
    ),
    "PoissonFactors": ModelCase(PoissonFactors, small_data, {}, {}, {"z": (3,), "rho": (N_GENES,)}),
    "NoLatent": ModelCase(NoLatent, small_data),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, check):
    run_check(check, CASES[name])


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
