"""Real data that need no download."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pbmc68k"]


def pbmc68k() -> AnnData:
    """Return counts of 700 human blood cells of 10 types, 765 genes; they ship with scanpy.

    A sample of the 68,000 PBMCs of Zheng et al. (Massively parallel digital transcriptional profiling of single cells,
    Nature Communications, 2017, doi:10.1038/ncomms14049). The original counts are recovered exactly from the
    log-normalised values that scanpy distributes. The genes were selected, so the counts of a cell add up to less than
    ``obs["n_counts"]``, its total over all genes.

    Returns
    -------
    AnnData
        ``X`` and ``layers["counts"]``: UMI counts (CSR, whole numbers, float32). ``obs``: ``cell_type`` (by similarity
        to sorted populations), ``louvain`` cluster, ``phase`` of the cell cycle with ``S_score`` and ``G2M_score``,
        ``n_genes``, ``n_counts``, ``percent_mito``.
    """
    from anndata import AnnData

    source = _reduced()
    values = source.raw.X.tocsr().astype(np.float64)
    per_cell = np.repeat(source.obs["n_counts"].to_numpy(dtype=np.float64), np.diff(values.indptr))
    # The values are log1p of counts per 10,000.
    counts = np.rint(np.expm1(values.data) * per_cell / 1e4).astype(np.float32)
    matrix = sp.csr_matrix((counts, values.indices, values.indptr), shape=values.shape)
    matrix.eliminate_zeros()
    obs = source.obs.rename(columns={"bulk_labels": "cell_type"})
    obs = obs[
        ["cell_type", "louvain", "phase", "S_score", "G2M_score", "n_genes", "n_counts", "percent_mito"]
    ]
    obs.index.name = None
    var = source.raw.var[[]].copy()
    var.index.name = None
    return AnnData(X=matrix, obs=obs, var=var, layers={"counts": matrix.copy()})


def _reduced() -> AnnData:
    import scanpy

    with warnings.catch_warnings():
        # The file was written years ago, and scanpy says so.
        warnings.simplefilter("ignore")
        return scanpy.datasets.pbmc68k_reduced()
