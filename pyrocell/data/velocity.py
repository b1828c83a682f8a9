"""Preparation of spliced and unspliced counts for RNA velocity: smoothing over neighbours, and a choice of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from pyrocell.data.slots import what_there_is
from pyrocell.errors import DataError, SetupError, list_some

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["filter_velocity_genes", "neighbor_graph", "smooth_velocity_layers"]

_EXTREME = 0.05
"""Share of the cells at either end that the steady-state line is fitted on."""

_GENES_AT_ONCE = 512


def smooth_velocity_layers(
    adata: AnnData,
    *,
    spliced_layer: str = "spliced",
    unspliced_layer: str = "unspliced",
    neighbors_key: str | None = None,
) -> None:
    """Normalise spliced and unspliced counts, and average them over the neighbours of each cell.

    Each layer is brought to the same total in every cell (the median over cells). Then each cell gets the plain mean of
    itself and its neighbours in the graph that ``scanpy.pp.neighbors`` made. These are the "first moments" of scvelo,
    under its names.

    Parameters
    ----------
    adata
        Cells by genes, with a graph of neighbours. The layers ``Ms`` (spliced) and ``Mu`` (unspliced) are added, dense
        float32.
    spliced_layer, unspliced_layer
        Layers with raw counts.
    neighbors_key
        As in ``scanpy.pp.neighbors`` (its ``key_added``).

    Raises
    ------
    SetupError
        If a layer or the graph is not there.
    DataError
        If counts are negative, missing or infinite, or a cell has none.
    """
    graph = _averaging(neighbor_graph(adata, neighbors_key))
    for key, name in ((spliced_layer, "Ms"), (unspliced_layer, "Mu")):
        counts = sparse.csr_matrix(_layer(adata, key), dtype=np.float32)
        _check_counts(counts, key)
        totals = np.asarray(counts.sum(1)).ravel()
        if (totals == 0).any():
            empty = adata.obs_names[totals == 0]
            raise DataError(
                f"{len(empty)} cells have no counts in adata.layers[{key!r}]: {list_some(empty)}. Remove them, and "
                "call scanpy.pp.neighbors again."
            )
        scaled = sparse.diags(np.median(totals) / totals) @ counts
        adata.layers[name] = np.asarray((graph @ scaled).todense(), dtype=np.float32)


def filter_velocity_genes(
    adata: AnnData,
    *,
    spliced_layer: str = "Ms",
    unspliced_layer: str = "Mu",
    min_r2: float = 0.01,
    subset: bool = False,
) -> None:
    """Mark the genes whose unspliced RNA goes with their spliced RNA, as kinetics say it must.

    In steady state unspliced is gamma times spliced. The line is fitted on the cells at either extreme, and judged by
    the share of the variance of unspliced RNA, over all cells, that it explains. Both layers are taken from their
    smallest value on.

    Parameters
    ----------
    adata
        Cells by genes. Columns are added to ``adata.var``: ``velocity_gamma`` (slope), ``velocity_r2`` (explained
        share) and ``velocity_genes`` (slope positive and share above ``min_r2``), the names that scvelo gives them.
    spliced_layer, unspliced_layer
        Smoothed layers, see `smooth_velocity_layers`.
    min_r2
        Smallest share explained.
    subset
        Keep only these genes in ``adata``.

    Raises
    ------
    SetupError
        If a layer is not there.
    DataError
        If no gene passes.
    """
    spliced, unspliced = _layer(adata, spliced_layer), _layer(adata, unspliced_layer)
    parts = [
        _steady_state(_dense(spliced[:, start:stop]), _dense(unspliced[:, start:stop]))
        for start in range(0, adata.n_vars, _GENES_AT_ONCE)
        for stop in [start + _GENES_AT_ONCE]
    ]
    gamma, r2 = (np.concatenate(values) for values in zip(*parts, strict=True))
    adata.var["velocity_gamma"], adata.var["velocity_r2"] = gamma, r2
    passed = (gamma > 0) & (r2 > min_r2)
    adata.var["velocity_genes"] = passed
    if not passed.any():
        raise DataError(
            f"No gene has a positive slope and a share explained above min_r2={min_r2}; the best has "
            f"{np.max(r2, initial=-np.inf):.3g}. Are adata.layers[{unspliced_layer!r}] unspliced counts, smoothed with "
            "smooth_velocity_layers?"
        )
    if subset:
        adata._inplace_subset_var(passed)


def _steady_state(spliced: np.ndarray, unspliced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit unspliced = gamma spliced on the extreme cells of each gene; return gamma and the share it explains."""
    spliced, unspliced = spliced - spliced.min(0), unspliced - unspliced.min(0)
    rank = spliced / _or_one(spliced.max(0)) + unspliced / _or_one(unspliced.max(0))
    low, high = np.quantile(rank, [_EXTREME, 1 - _EXTREME], axis=0)
    chosen = (rank <= low) | (rank >= high)
    gamma = (chosen * spliced * unspliced).sum(0) / _or_one((chosen * spliced**2).sum(0))
    left = ((unspliced - gamma * spliced) ** 2).sum(0)
    total = ((unspliced - unspliced.mean(0)) ** 2).sum(0)
    return gamma, np.where(total > 0, 1 - left / _or_one(total), 0.0)


def _or_one(values: np.ndarray) -> np.ndarray:
    """Let a gene without any variation divide by one: its slope is then 0, and it is left out."""
    return np.where(values > 0, values, 1.0)


def _layer(adata: AnnData, key: str) -> Any:
    if key not in adata.layers:
        raise SetupError(f"adata.layers has no {key!r}.{what_there_is(key, adata.layers)}")
    return adata.layers[key]


def neighbor_graph(adata: AnnData, neighbors_key: str | None = None) -> sparse.csr_matrix:
    """Return which cells are neighbours, as ``scanpy.pp.neighbors`` found them; no cell is its own.

    Parameters
    ----------
    adata
        Cells with a graph in ``obsp``.
    neighbors_key
        As in ``scanpy.pp.neighbors`` (its ``key_added``).

    Raises
    ------
    SetupError
        If the graph is not there.
    """
    name = "neighbors" if neighbors_key is None else neighbors_key
    key = adata.uns.get(name, {}).get("connectivities_key", "connectivities")
    if key not in adata.obsp:
        raise SetupError(
            f"adata.obsp has no {key!r}; expected the graph of scanpy.pp.neighbors. Call scanpy.pp.pca and "
            f"scanpy.pp.neighbors first.{what_there_is(key, adata.obsp)}"
        )
    near = sparse.csr_matrix(adata.obsp[key]) > 0
    near.setdiag(False)
    near.eliminate_zeros()
    return near


def _averaging(near: sparse.csr_matrix) -> Any:
    """Return the weights that average over a cell and its neighbours, all alike."""
    joined = (
        near.astype(np.float32) + sparse.identity(near.shape[0], dtype=np.float32, format="csr")
    ).tocsr()
    return sparse.diags(1 / np.asarray(joined.sum(1)).ravel()) @ joined


def _check_counts(counts: sparse.csr_matrix, key: str) -> None:
    wrong = int((~np.isfinite(counts.data)).sum()), int((counts.data < 0).sum())
    if any(wrong):
        raise DataError(
            f"adata.layers[{key!r}] has {wrong[0]} values that are NaN or infinite and {wrong[1]} negative ones; "
            "expected raw counts, 0, 1, 2, ... Read the counts again, and keep them in a layer before normalising."
        )


def _dense(block: Any) -> np.ndarray:
    to_array = getattr(block, "toarray", None)  # of any sparse matrix or array
    return np.asarray(block if to_array is None else to_array(), dtype=np.float64)
