"""Real data with something hidden, and the scores of what a model says of it: labels, proteins, open regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from _cases import COARSE, data_folder, most_variable
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

from pyrocell.infer.calibration import calibration_error

__all__ = ["TASKS", "Task"]

UNKNOWN = "unknown"
LINEAGES = {
    "01_HSC": "progenitor",
    "05_CMP.LMPP": "progenitor",
    "07_GMP": "myeloid progenitor",
    "06_CLP.1": "lymphoid progenitor",
    "15_CLP.2": "lymphoid progenitor",
    "16_Pre.B": "pre-B",
    "17_B": "B",
    "25_NK": "NK",
} | {f"{code}_CD14.Mono.{n}": "monocyte" for n, code in ((1, 11), (2, 12))}
"""Types of the bone marrow by lineage; the rest are T cells."""
Scores = dict[str, float]


@dataclass(frozen=True)
class Task:
    """One question about hidden data.

    Parameters
    ----------
    model
        Model that answers it, of the same name on both sides.
    hide
        Makes, for a seed and a number of cells, what the models see and what is hidden from them.
    score
        Scores of one side's answer, given what ``hide`` made.
    baseline
        Scores of the simple methods.
    """

    model: str
    hide: Callable[[int, int], tuple[anndata.AnnData, dict[str, Any]]]
    score: Callable[[anndata.AnnData, dict[str, Any], dict[str, np.ndarray]], Scores]
    baseline: Callable[[anndata.AnnData, dict[str, Any]], dict[str, Scores]]


def _read(name: str) -> anndata.AnnData:
    folder = data_folder()
    if folder is None:
        raise SystemExit("The data folder was not found; name it in PYROCELL_DATA.")
    return anndata.read_h5ad(folder / Path(name))


def _some(adata: anndata.AnnData, n_cells: int) -> anndata.AnnData:
    rows = np.random.default_rng(0).choice(adata.n_obs, min(n_cells, adata.n_obs), replace=False)
    return adata[np.sort(rows)].copy()


def _log_pca(adata: anndata.AnnData, n_components: int = 50) -> np.ndarray:
    counts = sparse.csr_matrix(adata.X, dtype=np.float64)
    scaled = sparse.diags(1e4 / np.asarray(counts.sum(1)).ravel()) @ counts
    return PCA(n_components, random_state=0).fit_transform(scaled.log1p().toarray())


# Labels: nine in ten are hidden.


def _hide_labels(adata: anndata.AnnData, seed: int) -> tuple[anndata.AnnData, dict[str, Any]]:
    rng, types = np.random.default_rng(seed), adata.obs["type"].to_numpy()
    labeled = np.zeros(adata.n_obs, dtype=bool)
    for name in np.unique(types):
        rows = np.flatnonzero(types == name)
        labeled[rng.choice(rows, max(1, round(0.1 * len(rows))), replace=False)] = True
    adata.obs["label"] = np.where(labeled, types, UNKNOWN)
    return adata, {"types": types, "labeled": labeled}


def hide_labels_of_sorted_cells(seed: int, n_cells: int) -> tuple[anndata.AnnData, dict[str, Any]]:
    """Sorted PBMC, 5 types, the 2,000 most variable genes, one batch."""
    adata = _some(_read("pbmc_facs_sorted_zheng.h5ad"), n_cells)
    adata = adata[:, most_variable(adata.X, 2000)].copy()
    adata.obs["type"] = adata.obs["cell_type"].astype(str).replace(COARSE)
    adata.obs["batch"] = "all"
    return _hide_labels(adata, seed)


def hide_labels_of_donors(seed: int, n_cells: int) -> tuple[anndata.AnnData, dict[str, Any]]:
    """PBMC of eight donors, 8 types, the donor as batch."""
    adata = _some(_read("kang_8donors_12261.h5ad"), n_cells)
    adata.obs["type"] = adata.obs["cell_type"].astype(str)
    adata.obs["batch"] = adata.obs["donor"].astype(str)
    return _hide_labels(adata, seed)


def _label_scores(probabilities: np.ndarray, names: np.ndarray, types: np.ndarray) -> Scores:
    codes = pd.Index(names).get_indexer(types)
    predicted = names[probabilities.argmax(1)]
    return {
        "accuracy": float((predicted == types).mean()),
        "macro F1": float(f1_score(types, predicted, average="macro")),
        "calibration error": calibration_error(probabilities, codes),
    }


def score_labels(adata: anndata.AnnData, truth: dict[str, Any], answer: dict[str, np.ndarray]) -> Scores:
    """Score the probabilities of hidden labels, and the vote of labelled neighbours in SCVI's latent."""
    hidden, types = ~truth["labeled"], truth["types"]
    vote = KNeighborsClassifier(15).fit(answer["scvi_latent"][~hidden], types[~hidden])
    names = answer["labels"].astype(str)
    voted = _label_scores(vote.predict_proba(answer["scvi_latent"][hidden]), vote.classes_, types[hidden])
    own = _label_scores(answer["probabilities"][hidden], names, types[hidden])
    return own | {f"vote in SCVI's latent: {name}": value for name, value in voted.items()}


def label_baseline(adata: anndata.AnnData, truth: dict[str, Any]) -> dict[str, Scores]:
    """Score logistic regression on principal components of log counts."""
    hidden, types, z = ~truth["labeled"], truth["types"], _log_pca(adata)
    fitted = LogisticRegression(max_iter=2000).fit(z[~hidden], types[~hidden])
    scores = _label_scores(fitted.predict_proba(z[hidden]), fitted.classes_, types[hidden])
    return {"regression on PCA": scores}


# Proteins: those of a random half of the cells are hidden.


def hide_proteins(seed: int, n_cells: int) -> tuple[anndata.AnnData, dict[str, Any]]:
    """PBMC with 14 proteins (10k), the 2,000 most variable genes; half of the cells are a batch without proteins."""
    adata = _read("citeseq_pbmc10k_5k.h5ad")
    adata = _some(adata[adata.obs["protein_measured"].astype(bool)].copy(), n_cells)
    adata = adata[:, most_variable(adata.X, 2000)].copy()
    hidden = np.random.default_rng(seed).random(adata.n_obs) < 0.5
    truth = {"proteins": np.asarray(adata.obsm["protein_counts"], dtype=np.float32), "hidden": hidden}
    truth["types"] = adata.obs["cell_type"].astype(str).to_numpy()
    seen = np.where(hidden[:, None], 0, truth["proteins"]).astype(np.float32)
    names = [f"protein{t}" for t in range(seen.shape[1])]
    adata.obsm["protein_expression"] = pd.DataFrame(seen, index=adata.obs_names, columns=names)
    mask = np.repeat(~hidden[:, None], seen.shape[1], axis=1)
    adata.obsm["measured"] = pd.DataFrame(mask, index=adata.obs_names, columns=names)
    adata.obs["batch"] = np.where(hidden, "hidden", "seen")
    return adata, truth


def _protein_correlation(log_predicted: np.ndarray, truth: dict[str, Any]) -> Scores:
    log_true = np.log1p(truth["proteins"][truth["hidden"]])
    pairs = zip(log_predicted.T, log_true.T, strict=True)
    found = [float(np.corrcoef(one, other)[0, 1]) for one, other in pairs]
    return {"hidden proteins, median r": float(np.median(found)), "mean r": float(np.mean(found))}


def score_proteins(adata: anndata.AnnData, truth: dict[str, Any], answer: dict[str, np.ndarray]) -> Scores:
    """Score predictions of hidden proteins, and cell types in the latent."""
    scores = _protein_correlation(answer["log_proteins"][truth["hidden"]], truth)
    known = truth["types"] != "unlabelled"
    return scores | _type_scores(answer["latent"][known], truth["types"][known])


def protein_baseline(adata: anndata.AnnData, truth: dict[str, Any]) -> dict[str, Scores]:
    """Score the mean of 20 neighbours in the principal components of RNA."""
    z, hidden = _log_pca(adata), truth["hidden"]
    near = KNeighborsRegressor(20).fit(z[~hidden], np.log1p(truth["proteins"][~hidden]))
    known = truth["types"] != "unlabelled"
    scores = _protein_correlation(near.predict(z[hidden]), truth) | _type_scores(
        z[known], truth["types"][known]
    )
    return {"20 neighbours in PCA": scores}


# Open regions: one in ten ones is hidden.


def hide_regions(seed: int, n_cells: int) -> tuple[anndata.AnnData, dict[str, Any]]:
    """Bone marrow, cells of at least 150 open regions, the regions open in at least 1 % of them."""
    adata = _read("scatac_hematopoiesis_granja.h5ad")
    adata = _some(adata[np.asarray((adata.X > 0).sum(1)).ravel() >= 150].copy(), n_cells)
    seen = (sparse.csr_matrix(adata.X) > 0).astype(np.float32)
    adata.X = seen
    adata = adata[:, np.asarray(seen.mean(0)).ravel() >= 0.01].copy()
    rng, ones = np.random.default_rng(seed), adata.X.tocoo()
    hidden = rng.random(ones.nnz) < 0.1
    zeros_row = rng.integers(adata.n_obs, size=hidden.sum() * 2)
    zeros_col = rng.integers(adata.n_vars, size=hidden.sum() * 2)
    zero = np.asarray(adata.X[zeros_row, zeros_col]).ravel() == 0
    n = int(min(hidden.sum(), zero.sum()))
    kept = sparse.coo_matrix((ones.data[~hidden], (ones.row[~hidden], ones.col[~hidden])), ones.shape)
    truth = {
        "types": adata.obs["cell_type"].astype(str).to_numpy(),
        "row": np.concatenate([ones.row[hidden][:n], zeros_row[zero][:n]]),
        "column": np.concatenate([ones.col[hidden][:n], zeros_col[zero][:n]]),
        "open": np.repeat([1, 0], n),
    }
    adata.X = kept.tocsr()
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    return adata[np.asarray(adata.X.sum(1)).ravel() > 0].copy(), truth


def score_regions(adata: anndata.AnnData, truth: dict[str, Any], answer: dict[str, np.ndarray]) -> Scores:
    """Score hidden entries, and cell types in the latent."""
    told = answer["seen_probability"][truth["row"], truth["column"]]
    auroc = float(roc_auc_score(truth["open"], told))
    return {"hidden entries, AUROC": auroc} | _region_types(answer["latent"], truth)


def region_baseline(adata: anndata.AnnData, truth: dict[str, Any]) -> dict[str, Scores]:
    """Score latent semantic indexing: TF-IDF, then a singular value decomposition without its first component."""
    x = sparse.csr_matrix(adata.X, dtype=np.float64)
    share = sparse.diags(1 / np.asarray(x.sum(1)).ravel()) @ x
    weighted = share @ sparse.diags(np.log1p(x.shape[0] / np.maximum(np.asarray(x.sum(0)).ravel(), 1)))
    svd = TruncatedSVD(11, random_state=0).fit((weighted * 1e4).log1p())
    z = svd.transform((weighted * 1e4).log1p())[:, 1:]
    z = z / z.std(0)
    # Means of the 50 nearest cells, times depth: what LSI says of single entries.
    near = KNeighborsRegressor(50).fit(z, x.toarray()).predict(z) * np.asarray(x.sum(1))
    auroc = float(roc_auc_score(truth["open"], near[truth["row"], truth["column"]]))
    return {"LSI": {"hidden entries, AUROC": auroc} | _region_types(z, truth)}


def _region_types(latent: np.ndarray, truth: dict[str, Any]) -> Scores:
    lineages = np.array([LINEAGES.get(name, "T") for name in truth["types"]])
    fine = _type_scores(latent, truth["types"])
    return _type_scores(latent, lineages) | {"vote, 16 types": fine["vote"]}


def _type_scores(latent: np.ndarray, types: np.ndarray) -> Scores:
    """Vote of 15 neighbours from other cells, share of neighbours of the same type, and agreement of clusters."""
    fitted = KNeighborsClassifier(16).fit(latent, types)
    near = fitted.kneighbors(latent, return_distance=False)[:, 1:]
    codes, names = pd.factorize(types)
    votes = np.apply_along_axis(np.bincount, 1, codes[near], minlength=len(names)).argmax(1)
    clusters = KMeans(len(names), n_init=10, random_state=0).fit_predict(latent)
    return {
        "vote": float((votes == codes).mean()),
        "alike": float((codes[near] == codes[:, None]).mean()),
        "clusters, ARI": float(adjusted_rand_score(codes, clusters)),
    }


TASKS = {
    "labels-sorted": Task("SCANVI", hide_labels_of_sorted_cells, score_labels, label_baseline),
    "labels-donors": Task("SCANVI", hide_labels_of_donors, score_labels, label_baseline),
    "proteins": Task("TOTALVI", hide_proteins, score_proteins, protein_baseline),
    "regions": Task("PEAKVI", hide_regions, score_regions, region_baseline),
}
