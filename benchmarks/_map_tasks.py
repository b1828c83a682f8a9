"""Tangram: genes that were hidden from the map, and the types of cells that spots are made of."""

from __future__ import annotations

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
from _spot_tasks import type_means
from scipy import sparse
from scipy.optimize import nnls

__all__ = ["TASKS"]

N_CELLS, N_HIDDEN, N_SPOTS = 2000, 100, 300
NEAREST = (10, 30, 100)


def _reference() -> anndata.AnnData:
    adata = read_data("pair_mop_reference_x500.h5ad")
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    obs = pd.DataFrame({"cell_type": adata.obs["cell_type"].astype(str)})
    return anndata.AnnData(adata.X, obs=obs, var=pd.DataFrame(index=adata.var_names))


def _seen(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts.sum(0)).ravel() > 0


def hidden_genes(seed: int) -> tuple[anndata.AnnData, Truth]:
    """2,000 cells of the reference and 361 spots of MERFISH cells; 100 of the genes are not shown."""
    rng, cells = np.random.default_rng(seed), _reference()
    cells = cells[np.sort(rng.choice(cells.n_obs, N_CELLS, replace=False))].copy()
    spots = read_data("pair_mop_multicell_spots_361x500.h5ad").to_df()[list(cells.var_names)]
    both = _seen(cells.X) & _seen(spots.to_numpy())
    cells, spots = cells[:, both].copy(), spots.loc[:, both].astype(np.float32)
    hidden = np.zeros(cells.n_vars, dtype=bool)
    hidden[rng.permutation(cells.n_vars)[:N_HIDDEN]] = True
    cells.uns["spots"] = spots.loc[:, ~hidden]
    return cells, {"hidden": hidden, "spots": spots.to_numpy(np.float64)}


def known_cells(seed: int) -> tuple[anndata.AnnData, Truth]:
    """2,000 cells of one half of the reference, 300 spots of 5 to 15 cells of the other half, thinned and distorted."""
    rng, adata = np.random.default_rng(seed), _reference()
    types = adata.obs["cell_type"].to_numpy()
    names, half = np.unique(types), rng.random(adata.n_obs) < 0.5
    shown = np.sort(rng.choice(np.flatnonzero(half), N_CELLS, replace=False))
    pool = {name: np.flatnonzero(~half & (types == name)) for name in names}
    frequency = np.array([len(pool[name]) for name in names]) / (~half).sum()
    sums, shares = [], []
    for _ in range(N_SPOTS):
        own, n = rng.dirichlet(frequency * 8), rng.integers(5, 16)
        chosen = rng.choice(len(names), n, p=own)
        sums.append(np.asarray(adata.X[[rng.choice(pool[names[k]]) for k in chosen]].sum(0)).ravel())
        shares.append(np.bincount(chosen, minlength=len(names)) / n)
    factor = np.exp(rng.normal(0, 0.4, adata.n_vars))
    spots = rng.poisson(rng.binomial(np.array(sums).astype(int), 0.5) * factor).astype(np.float32)
    cells, both = adata[shown].copy(), _seen(adata[shown].X) & (spots.sum(0) > 0)
    cells, spots = cells[:, both].copy(), spots[:, both]
    index = [f"spot{s}" for s in range(N_SPOTS)]
    cells.uns["spots"] = pd.DataFrame(spots, index=index, columns=list(cells.var_names))
    return cells, {"names": names, "shares": np.array(shares)}


def _cosine(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(one, axis=0) * np.linalg.norm(two, axis=0)
    return (one * two).sum(0) / np.maximum(lengths, 1e-12)


def _gene_scores(told: np.ndarray, truth: Truth) -> Scores:
    told, true = told[:, truth["hidden"]], truth["spots"][:, truth["hidden"]]
    centred = _cosine(told - told.mean(0), true - true.mean(0))
    return {"hidden genes, cosine": float(_cosine(told, true).mean()), "correlation": float(centred.mean())}


def score_genes(adata: anndata.AnnData, truth: Truth, answer: Answer) -> Scores:
    """Compare hidden genes over the spots."""
    return _gene_scores(answer["genes"], truth)


def _type_scores(told: np.ndarray, names: np.ndarray, truth: Truth) -> Scores:
    """Proportions; types that the cells shown do not have get none."""
    table = pd.DataFrame(told, columns=names).reindex(columns=truth["names"], fill_value=0.0)
    scores = proportion_scores(table.to_numpy(), truth["shares"])
    scores["JS"] *= float(np.log(2))  # in nats
    return scores


def score_types(adata: anndata.AnnData, truth: Truth, answer: Answer) -> Scores:
    """Compare shares of the types of cells."""
    return _type_scores(answer["cell_types"], answer["names"].astype(str), truth)


def _to_one_depth(counts: np.ndarray) -> np.ndarray:
    totals = counts.sum(1, keepdims=True)
    return counts / np.maximum(totals, 1) * totals.mean()


def _nearest(cells: np.ndarray, spots: np.ndarray) -> np.ndarray:
    """Rank the cells for each spot by the correlation of log counts, best first, shape (n_cells, n_spots)."""
    logs = [np.log1p(_to_one_depth(counts)) for counts in (cells, spots)]
    together = np.corrcoef(*logs)[: len(cells), len(cells) :]
    return np.argsort(-together, axis=0, kind="stable")


def _parts(adata: anndata.AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cells at one depth, spots, the columns of the cells that spots have, and types of the cells."""
    cells, spots = _to_one_depth(adata.X.toarray().astype(np.float64)), adata.uns["spots"]
    columns = adata.var_names.get_indexer(spots.columns)
    return cells, spots.to_numpy(np.float64), columns, adata.obs["cell_type"].astype(str).to_numpy()


def gene_baseline(adata: anndata.AnnData, truth: Truth) -> dict[str, Scores]:
    """Mean of the nearest cells, and least squares without negative numbers on the means of types."""
    cells, spots, columns, types = _parts(adata)
    ranked, found = _nearest(cells[:, columns], spots), {}
    for k in NEAREST:
        near = np.stack([cells[ranked[:k, v]].mean(0) for v in range(len(spots))])
        found[f"nearest {k} cells"] = _gene_scores(near * spots.sum(1, keepdims=True), truth)
    means = type_means(cells, types, np.unique(types))
    weights = np.stack([nnls(means[:, columns].T, spot)[0] for spot in spots])
    return found | {"least squares on types": _gene_scores(weights @ means, truth)}


def type_baseline(adata: anndata.AnnData, truth: Truth) -> dict[str, Scores]:
    """Types of the nearest cells, least squares without negative numbers, and shares of the cells shown."""
    cells, spots, columns, types = _parts(adata)
    names = np.unique(types)
    is_of = (types[:, None] == names).astype(float)
    ranked = _nearest(cells[:, columns], spots)
    told = {f"nearest {k} cells": is_of[ranked[:k]].mean(0) for k in NEAREST}
    means = type_means(cells, types, names)[:, columns]
    told["least squares on types"] = np.stack([nnls(means.T, spot)[0] for spot in spots])
    told["shares of the cells shown"] = np.tile(is_of.mean(0), (len(spots), 1))
    return {way: _type_scores(values, names, truth) for way, values in told.items()}


_TUNED = {"eps": 1e-8, "weight_decay": 0.0, "lr": 0.1}
_CONTENDERS = {
    "Tangram": Contender(OWN, {"epochs": 300}),
    "Tangram, 50 steps": Contender(OWN, {"epochs": 50}),
    "Tangram, lambda_g2=1": Contender(OWN, {"epochs": 300, "weights": {"lambda_g2": 1.0}}),
    "Tangram, clusters": Contender(OWN, {"epochs": 300, "mode": "clusters"}),
    "Tangram, 1,000 steps": Contender(OWN, {"epochs": 1000}),
    "scvi-tools, its defaults": Contender(PEER, {"epochs": 300}),
    "scvi-tools, epsilon 1e-8 and learning rate 0.1": Contender(PEER, {"epochs": 300, "plan": _TUNED}),
    "the same, 50 steps": Contender(PEER, {"epochs": 50, "plan": _TUNED}),
}
TASKS = {
    "map-genes": SpecialTask("Tangram", _CONTENDERS, hidden_genes, score_genes, gene_baseline),
    "map-types": SpecialTask("Tangram", _CONTENDERS, known_cells, score_types, type_baseline),
}
