"""Inputs that are odd or wrong, as changes to good data: what the preflight suite draws from."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from pyrocell import settings
from pyrocell.errors import PyrocellError
from pyrocell.infer.plan import TrainingPlan
from pyrocell.testing import ModelCase
from pyrocell.testing.containers import read_backed, write
from tests.models.test_contract import CASES

N_CELLS, N_EPOCHS = 48, 20
MODELS = (
    "SCVI",
    "SCVI-nb-covariates",
    "SCVI-latent-library",
    "SCVI-normal",
    "SCANVI",
    "TOTALVI",
    "PEAKVI",
    "VELOVI",
    "Tangram",
    "SCBASSET",
    "CellAssign",
    "RNAStereoscope",
    "SpatialStereoscope",
)
LAYERS = {"VELOVI": ("Ms", "Mu")}


@cache
def _good(name: str) -> anndata.AnnData:
    return CASES[name].make_data()[:N_CELLS].copy()


def good(name: str) -> anndata.AnnData:
    """Small good data for a model: at least one cell of each category that its set-up names."""
    return _good(name).copy()


def matrices(adata: anndata.AnnData, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the matrices that a model reads, as dense float64."""
    layers = LAYERS.get(CASES[name].model_class.__name__)
    for layer in layers or (None,):
        values = adata.X if layer is None else adata.layers[layer]
        dense = values.toarray() if sparse.issparse(values) else np.asarray(values)
        dense = change(dense.astype(np.float64))
        if layer is None:
            adata.X = dense
        else:
            adata.layers[layer] = dense


def put(
    value: float, row: object = 3, column: object = 2
) -> Callable[[anndata.AnnData, str], anndata.AnnData]:
    """Give an oddity that puts a value in some places."""

    def change(adata: anndata.AnnData, name: str) -> anndata.AnnData:
        def values(x: np.ndarray) -> np.ndarray:
            where = [
                at if isinstance(at, slice) else min(at, n - 1)
                for at, n in zip((row, column), x.shape, strict=True)
            ]
            x[tuple(where)] = value
            return x

        matrices(adata, name, values)
        return adata

    return change


def one_count(adata: anndata.AnnData, name: str) -> anndata.AnnData:
    return put(1.0, 3, 0)(put(0.0, 3, slice(None))(adata, name), name)


def log_normalised(adata: anndata.AnnData, name: str) -> anndata.AnnData:
    matrices(adata, name, lambda x: np.log1p(1e4 * x / np.maximum(x.sum(1, keepdims=True), 1)))
    return adata


def same_cell_names(adata: anndata.AnnData, name: str) -> anndata.AnnData:
    names = adata.obs_names.to_numpy(object, copy=True)
    names[:2] = "twin"
    adata.obs_names = names
    return adata


def same_gene_names(adata: anndata.AnnData, name: str) -> anndata.AnnData:
    names = adata.var_names.to_numpy(object, copy=True)
    names[-2:] = names[-1]
    adata.var_names = names
    return adata


def keys_of(name: str) -> list[str]:
    """Columns that the set-up of a model names."""
    setup = CASES[name].setup
    named = [value for key, value in setup.items() if key.endswith(("_key", "_keys"))]
    flat = [key for value in named for key in ([value] if isinstance(value, str) else value)]
    return [key for key in flat if key in _good(name).obs]


def lonely_batch(adata: anndata.AnnData, name: str) -> anndata.AnnData:
    for key in {"batch", "label"} & set(adata.obs):
        values = adata.obs[key].astype(str)
        values.iloc[0] = "alone"
        adata.obs[key] = values
    return adata


def unused_categories(adata: anndata.AnnData, name: str) -> anndata.AnnData:
    for key in keys_of(name):
        if adata.obs[key].dtype.kind not in "fi":
            adata.obs[key] = pd.Categorical(adata.obs[key].astype(str)).add_categories(
                ["nobody", "nobody else"]
            )
    return adata


def missing_covariate(adata: anndata.AnnData, name: str) -> anndata.AnnData:
    for key in keys_of(name)[-1:]:
        adata.obs[key] = adata.obs[key].astype(float if adata.obs[key].dtype.kind == "f" else object)
        adata.obs.loc[adata.obs_names[min(5, adata.n_obs - 1)], key] = np.nan
    return adata


def few_cells(n: int) -> Callable[[anndata.AnnData, str], anndata.AnnData]:
    return lambda adata, name: adata[:n].copy()


def one_protein(adata: anndata.AnnData, name: str) -> anndata.AnnData:
    if "protein_expression" in adata.obsm:
        for key in {"protein_expression", "mask"} & set(adata.obsm):
            adata.obsm[key] = np.asarray(adata.obsm[key])[:, :1]
        adata.uns["protein_names"] = adata.uns["protein_names"][:1]
    return adata


@dataclass(frozen=True)
class Oddity:
    """A change to good data; ``said`` is what a refusal must name, ``must`` whether there has to be one."""

    change: Callable[[anndata.AnnData, str], anndata.AnnData]
    said: tuple[str, ...] = ()
    refuses: Callable[[str], bool] = lambda name: False
    may_refuse: Callable[[str], bool] = lambda name: False


def always(name: str) -> bool:
    return True


def needs_counts(name: str) -> bool:
    """Whether a model wants whole numbers: VELOVI reads smoothed layers, and of open chromatin any value is a one."""
    return name not in ("VELOVI", "PEAKVI", "SCBASSET")


def has_columns(name: str) -> bool:
    return bool(keys_of(name))


_CELL, _GENE = ("cell_3", "'3'", "cell3", "cell_0", "'0'", "cell0"), ("gene_2", "gene2", "'2'")
_MISSING = ("cell_5", "'5'", "cell5", "cell_0", "'0'", "cell0")
# What few cells have in common; words that only such a refusal has.
_ALIKE = ("has 1 category", "has the same value in all cells", "no spliced RNA that varies")
# In the order in which they are applied: what is there, good values, bad values, names; so that none hides another.
ODDITIES = {
    "one feature": Oddity(
        lambda adata, name: adata[:, :1].copy(),
        ("have no counts over the 1 features", "features that the model is to read are not in"),
        may_refuse=always,
    ),
    "six cells": Oddity(few_cells(6), _ALIKE, may_refuse=always),
    "one cell": Oddity(few_cells(1), _ALIKE, may_refuse=always),
    "one protein": Oddity(one_protein),
    "every gene constant": Oddity(
        put(2.0, slice(None), slice(None)), _ALIKE[-1:], may_refuse=lambda name: name == "VELOVI"
    ),
    "a gene without counts": Oddity(put(0.0, slice(None), 2), _GENE, may_refuse=always),
    "a constant gene": Oddity(put(3.0, slice(None), 2), _GENE, may_refuse=lambda name: name == "VELOVI"),
    "a cell without counts": Oddity(put(0.0, 3, slice(None)), _CELL, may_refuse=always),
    "a cell with one count": Oddity(one_count, _CELL, may_refuse=always),
    "a cell with a million counts": Oddity(put(1e6), _CELL),
    "log-normalised": Oddity(log_normalised, ("log-normalised", "not whole"), needs_counts),
    "a fraction": Oddity(put(0.5), _CELL, needs_counts),
    "a negative value": Oddity(put(-1.0), _CELL, always),
    "infinity": Oddity(put(np.inf), _CELL, always),
    "NaN": Oddity(put(np.nan), _CELL, always),
    "cells of one name": Oddity(same_cell_names, ("twin",), always),
    "genes of one name": Oddity(same_gene_names, ("occur more than once",), always),
    "a batch and a label of one cell": Oddity(lonely_batch),
    "unused categories": Oddity(unused_categories),
    "a missing covariate": Oddity(missing_covariate, _MISSING, has_columns),
}

# One alone has no twin.
_MOOT = {"cells of one name": "one cell", "genes of one name": "one feature"}

CONTAINERS = {
    "dense": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "csr_matrix": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "csc_array": sparse.csc_array,
}
DTYPES = ("int8", "uint8", "int16", "int32", "int64", "float32", "float64")


def stored(adata: anndata.AnnData, name: str, container: str, dtype: str) -> anndata.AnnData:
    """Keep the matrices in a container and a type of numbers, where that holds their values."""
    layers = LAYERS.get(CASES[name].model_class.__name__) or (None,)
    for layer in layers:
        values = adata.X if layer is None else adata.layers[layer]
        dense = values.toarray() if sparse.issparse(values) else np.asarray(values)
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cast = dense.astype(dtype)
            fits = dtype.startswith("float") or np.array_equal(cast.astype(float), dense)
        kept = CONTAINERS[container](cast if fits else dense.astype("float32"))
        if layer is None:
            adata.X = kept
        else:
            adata.layers[layer] = kept
    return adata


@dataclass
class Outcome:
    """What became of an input."""

    trained: bool
    message: str = ""


def attempt(
    name: str,
    oddities: tuple[str, ...],
    *,
    container: str = "csr_matrix",
    dtype: str = "float32",
    seed: int = 0,
    how: str = "memory",
) -> Outcome:
    """Set up, make and train a model on odd data, in memory, as a view, or on disk in any order."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        # Names that repeat, and advice about odd data, are what is meant here.
        warnings.simplefilter("ignore", UserWarning)
        adata = good(name)
        for oddity in sorted(oddities, key=list(ODDITIES).index):
            adata = ODDITIES[oddity].change(adata, name)
        adata = stored(adata, name, container, dtype)
        if how == "view":
            adata = adata[np.random.default_rng(seed).permutation(adata.n_obs)]
        if how != "backed":
            return _train(CASES[name], adata, name, seed, how)
        backed = read_backed(write(adata, folder))
        try:
            return _train(CASES[name], backed, name, seed, how)
        finally:
            backed.file.close()


def _train(case: ModelCase, adata: anndata.AnnData, name: str, seed: int, how: str) -> Outcome:
    """Train with a last minibatch of one cell; tell a refusal before the first step from everything else."""
    before = settings.seed, settings.progress
    settings.seed, settings.progress = seed, False
    model = None
    try:
        case.model_class.setup_anndata(adata, **case.setup)
        model = case.model_class(adata, **case.options)
        model.train(N_EPOCHS, device="cpu", **_options(model, seed, how))
    except PyrocellError as error:
        refusal = str(error)
    else:
        refusal = ""
    finally:
        settings.seed, settings.progress = before
    if refusal:
        assert model is None or len(model.history) == 0, f"{name} was refused after training began: {refusal}"
        return Outcome(trained=False, message=refusal)
    assert np.isfinite(model.history["elbo_train"]).all(), f"{name}: the loss is not finite"
    assert model.history["skipped_steps"].sum() == 0, f"{name}: steps were skipped"
    broken = [key for key, value in model.module.state_dict().items() if not value.isfinite().all()]
    assert not broken, f"{name}: {broken} are not finite"
    return Outcome(trained=True)


def _options(model: object, seed: int, how: str) -> dict[str, object]:
    if model.full_batch:
        return {}
    n_rows = model.require_data(None).n_cells
    size = max(1, n_rows - 1)
    if model.has_local_parameters:
        return {"batch_size": size}
    rows = np.random.default_rng(seed).permutation(n_rows) if how == "backed" else np.arange(n_rows)
    return {"batch_size": size, "plan": TrainingPlan(train_indices=rows)}


def judge(name: str, oddities: tuple[str, ...], outcome: Outcome) -> None:
    """Raise unless what had to be refused was, by an error that names something of it, and nothing else was."""
    chosen = [ODDITIES[oddity] for oddity in oddities if _MOOT.get(oddity) not in oddities]
    if any(oddity.refuses(name) for oddity in chosen):
        assert not outcome.trained, f"{name} trained on {oddities}"
    if outcome.trained:
        return
    reasons = [oddity for oddity in chosen if oddity.refuses(name) or oddity.may_refuse(name)]
    assert reasons, f"{name} refuses {oddities}: {outcome.message}"
    said = [word for oddity in reasons for word in oddity.said]
    assert any(word in outcome.message for word in said), f"{name}, {oddities}: {outcome.message}"
    assert outcome.message.endswith((".", "?", ")"))
