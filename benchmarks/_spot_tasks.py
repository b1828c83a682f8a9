"""Stereoscope: spots made of cells that the reference does not have."""

from __future__ import annotations

from functools import partial

import anndata
import numpy as np
import pandas as pd
from _special_task import (
    OWN,
    PEER,
    Answer,
    Contender,
    Scores,
    SpecialTask,
    Truth,
    proportion_scores,
    read_data,
)
from scipy import sparse
from scipy.optimize import nnls

__all__ = ["TASKS", "type_means"]

N_SPOTS = 500


def _halves(types: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mark half of the cells of each type."""
    held = np.zeros(len(types), dtype=bool)
    for name in np.unique(types):
        rows = np.flatnonzero(types == name)
        held[rng.permutation(rows)[: len(rows) // 2]] = True
    return held


def mixtures(seed: int, *, sd_of_factors: float) -> tuple[anndata.AnnData, Truth]:
    """Make a reference, and 500 spots of 10 to 30 held-out cells of 1 to 8 types, half of the molecules lost.

    ``sd_of_factors`` is the standard deviation of the logarithm of how well each gene is kept.
    """
    rng, adata = np.random.default_rng(seed), read_data("pair_mop_reference_x500.h5ad")
    counts = sparse.csr_matrix(adata.X).astype(np.int64).toarray()
    types = adata.obs["cell_type"].astype(str).to_numpy()
    names, held = np.unique(types), _halves(types, rng)
    kept = np.minimum(0.5 * np.exp(rng.normal(0, sd_of_factors, counts.shape[1])), 1)
    pool = {name: np.flatnonzero((types == name) & held) for name in names}
    spots, shares = np.zeros((N_SPOTS, counts.shape[1])), np.zeros((N_SPOTS, len(names)))
    for s in range(N_SPOTS):
        chosen = rng.choice(len(names), rng.integers(1, 9), replace=False)
        of_type = rng.multinomial(rng.integers(10, 31), rng.dirichlet(np.ones(len(chosen))))
        for k, n in zip(chosen, of_type, strict=True):
            cells = rng.choice(pool[names[k]], n, replace=bool(n > len(pool[names[k]])))
            spots[s] += rng.binomial(counts[cells].sum(0), kept)
            shares[s, k] = n
    reference = anndata.AnnData(
        sparse.csr_matrix(counts[~held].astype(np.float32)),
        obs=pd.DataFrame({"cell_type": types[~held]}, index=adata.obs_names[~held]),
        var=pd.DataFrame(index=adata.var_names),
    )
    index = [f"spot{s}" for s in range(N_SPOTS)]
    reference.uns["spots"] = pd.DataFrame(
        spots.astype(np.float32), index=index, columns=list(adata.var_names)
    )
    return reference, {"shares": shares / shares.sum(1, keepdims=True), "names": names}


def score(adata: anndata.AnnData, truth: Truth, answer: Answer) -> Scores:
    """Compare proportions; where the answer has them, also those of transcripts."""
    order = pd.Index(answer["types"].astype(str)).get_indexer(truth["names"])
    scores = proportion_scores(answer["proportions"][:, order], truth["shares"])
    if "of_transcripts" in answer:
        of_transcripts = proportion_scores(answer["of_transcripts"][:, order], truth["shares"])
        scores["error, shares of transcripts"] = of_transcripts["error"]
    return scores


def type_means(counts: np.ndarray, types: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Mean counts of the cells of each type, zeros for a type without cells."""
    return np.stack([counts[types == n].mean(0) if (types == n).any() else counts[0] * 0 for n in names])


def baseline(adata: anndata.AnnData, truth: Truth) -> dict[str, Scores]:
    """Least squares without negative numbers, of each spot on the mean counts of the types."""
    types = adata.obs["cell_type"].astype(str).to_numpy()
    means = type_means(adata.X.toarray().astype(np.float64), types, truth["names"])
    told = np.stack([nnls(means.T, spot)[0] for spot in adata.uns["spots"].to_numpy(np.float64)])
    return {"least squares": proportion_scores(told, truth["shares"])}


_CONTENDERS = {
    "Stereoscope": Contender(OWN, {"reference_epochs": 50, "epochs": 400}),
    "scvi-tools, its defaults": Contender(PEER, {"reference_epochs": 400, "epochs": 400}),
    "scvi-tools, learning rate 0.1": Contender(
        PEER, {"reference_epochs": 30, "reference_lr": 0.05, "epochs": 400, "lr": 0.1}
    ),
}
TASKS = {
    name: SpecialTask("SpatialStereoscope", _CONTENDERS, partial(mixtures, sd_of_factors=sd), score, baseline)
    for name, sd in (("spots", 0.0), ("spots-factors", 0.4))
}
