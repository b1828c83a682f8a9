"""Data and fields that the tests of this folder share."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from pyrocell.data import Categories, Category, Continuous, Counts, Dataset, Schema, SizeFactor

FIELDS = {
    "counts": Counts(),
    "batch": Category(optional=True),
    "label": Category(optional=True),
    "size_factor": SizeFactor(),
    "categorical_covariates": Categories(),
    "continuous_covariates": Continuous(),
}
SETUP = {
    "batch_key": "lane",
    "labels_key": "type",
    "size_factor_key": "size",
    "categorical_covariate_keys": ["donor", "kit"],
    "continuous_covariate_keys": ["age", "score"],
}


def make_counts(n_cells: int = 30, n_genes: int = 12, seed: int = 0) -> np.ndarray:
    """Counts with about half zeros and no empty cell, below 128 so that they fit any type."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 4.0, (n_cells, n_genes)))
    counts[:, 0] += 1
    return np.minimum(counts, 120).astype(np.float32)


def make_adata(counts: object = None, seed: int = 0) -> anndata.AnnData:
    """AnnData with a column for every field; nothing is confounded."""
    rng = np.random.default_rng(seed)
    counts = make_counts(seed=seed) if counts is None else counts
    n_cells, n_genes = counts.shape
    obs = pd.DataFrame(
        {
            "lane": rng.permutation(np.arange(n_cells) % 2).astype(str),
            "type": pd.Categorical(rng.choice(["T", "B", "NK"], n_cells), categories=["T", "B", "NK"]),
            "donor": rng.integers(3, size=n_cells),
            "kit": rng.random(n_cells) < 0.5,
            "age": rng.uniform(20, 80, n_cells),
            "score": rng.integers(10, size=n_cells),
            "size": rng.lognormal(size=n_cells),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


def freeze(adata, fields=None, **setup) -> Schema:
    return Schema.freeze(adata, FIELDS if fields is None else fields, setup)


def open_data(adata, fields=None, **setup) -> Dataset:
    fields = FIELDS if fields is None else fields
    return Dataset(adata, Schema.freeze(adata, fields, setup), fields)


def assert_same_cells(one, other) -> None:
    """Same attributes, bit for bit, and the same index of non-zeros."""
    assert one.names() == other.names()
    assert one.n_total == other.n_total
    assert torch.equal(one.rows, other.rows)
    for name in one.names():
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
    for part in ("flat", "rows", "cols", "values"):
        assert torch.equal(getattr(one.counts._nonzeros, part), getattr(other.counts._nonzeros, part)), part


CONTAINERS = {
    "dense": lambda x: x,
    "fortran": np.asfortranarray,
    "csr_matrix": sp.csr_matrix,
    "csr_array": sp.csr_array,
    "csc_matrix": sp.csc_matrix,
    "csc_array": sp.csc_array,
}
DTYPES = [
    "float64",
    "float32",
    "float16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
]
# SciPy has no sparse float16.
COMBINATIONS = [
    (kind, dtype)
    for kind in CONTAINERS
    for dtype in DTYPES
    if dtype != "float16" or kind in ("dense", "fortran")
]
