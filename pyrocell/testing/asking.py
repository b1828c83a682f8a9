"""Ask a model everything, and compare answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrocell.errors import QueryError
from pyrocell.infer.effects import AtMean
from pyrocell.infer.elbo import ElboTerms

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrocell.models.base import CellModel

__all__ = ["answers", "assert_same", "has_gaussian_posterior", "loss_at_mean", "state_of", "terms_at_mean"]


def loss_at_mean(model: CellModel, rows: np.ndarray) -> torch.Tensor:
    """Return the loss of a minibatch, draws at their means, networks in evaluation mode."""
    return terms_at_mean(model, rows).loss


def terms_at_mean(model: CellModel, rows: np.ndarray) -> ElboTerms:
    """Return the bound of a minibatch, draws at their means, networks in evaluation mode."""
    dataset = model.require_data(None)
    cells = next(iter(dataset.minibatches(rows, len(rows), n_total=dataset.n_cells)))
    model.module.eval()
    with model.running(), AtMean():
        return model.elbo()(cells)


def answers(model: CellModel, adata: AnnData | None = None, indices: Any = None) -> dict[str, np.ndarray]:
    """Ask everything that a model can be asked about cells."""
    found: dict[str, np.ndarray] = {}
    per_cell: dict[str, dict[str, Any]] = {
        "get_latent_representation": {},
        "get_normalized_expression": {"n_samples": 2, "return_numpy": True},
        "get_latent_library_size": {},
        "get_normalized_accessibility": {
            "normalize_cells": True,
            "normalize_regions": True,
            "return_numpy": True,
        },
        "get_library_size_factors": {},
        "get_cell_bias": {},
        "get_tf_activity": {"motifs": {"one": "TGACTCA"}, "n_background": 4},
        "get_protein_expression": {"sample_protein_mixing": True, "return_mean": False, "n_samples": 2},
        "get_protein_foreground_probability": {},
        "get_protein_background_mean": {},
        "get_velocity": {"n_samples": 2, "return_numpy": True},
        "get_latent_time": {"return_numpy": True},
        "posterior_predictive_sample": {},
        "get_elbo": {"return_mean": False},
        "get_reconstruction_error": {"return_mean": False},
        "get_marginal_ll": {"return_mean": False, "n_samples": 5},
    }
    for verb, options in per_cell.items():
        if hasattr(model, verb):
            answer = _ask(getattr(model, verb), {"adata": adata, "indices": indices, **options})
            several = answer if isinstance(answer, tuple) else (answer,)  # such as RNA and proteins
            found |= {f"{verb}/{i}" if i else verb: np.asarray(part) for i, part in enumerate(several)}
    if hasattr(model, "project_genes"):
        genes = model.data.names(model.feature_field)
        found["project_genes"] = np.asarray(model.project_genes(adata, gene_list=genes))
        found["mapping"] = model.posterior(str(model.mapping_site), adata, indices=indices)
    if hasattr(model, "get_likelihood_parameters"):
        parameters = model.get_likelihood_parameters(adata, indices=indices)
        found |= {f"get_likelihood_parameters/{name}": value for name, value in parameters.items()}
    return found


def _ask(verb: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a verb with those of the arguments that it takes."""
    known = inspect.signature(verb).parameters
    return verb(**{name: value for name, value in arguments.items() if name in known})


def assert_same(one: Mapping[str, np.ndarray], two: Mapping[str, np.ndarray], tolerance: float = 0.0) -> None:
    """Raise unless two sets of answers are equal, to a tolerance or to the bit."""
    assert one.keys() == two.keys(), f"different answers: {sorted(one)} and {sorted(two)}"
    for name, value in one.items():
        other = two[name]
        assert value.shape == other.shape, f"{name}: shapes {value.shape} and {other.shape}"
        if tolerance == 0:
            assert np.array_equal(value, other), f"{name} differs"
        else:
            np.testing.assert_allclose(value, other, rtol=tolerance, atol=tolerance, err_msg=name)


def state_of(model: CellModel) -> dict[str, np.ndarray]:
    """Return a copy of every parameter and buffer."""
    return {name: value.detach().cpu().numpy().copy() for name, value in model.module.state_dict().items()}


def has_gaussian_posterior(model: CellModel) -> bool:
    """Say whether the latent's posterior has a mean and a variance in closed form."""
    if model.latent_site is None:
        return False
    try:
        model.get_latent_representation(indices=[0], return_dist=True)
    except QueryError:  # a latent known by its draws only
        return False
    return True
