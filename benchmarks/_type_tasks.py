"""CellAssign: sorted blood cells, typed by published lists of markers."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
from _special_task import OWN, PEER, Answer, Contender, Scores, SpecialTask, Truth, data_path, read_data
from scipy import sparse

from pyrocell.infer.calibration import calibration_error

__all__ = ["TASKS"]

LISTS = {"B": "B cells", "T": "T cells", "cytotoxic": "Cytotoxic T cells", "monocyte": "Monocyte/Macrophage"}
SORTED = {
    "bcells": "B",
    "monocytes": "monocyte",
    "memoryt": "T",
    "regulatoryt": "T",
    "thelper": "T",
    "naivet": "T",
    "cytotoxict": "cytotoxic",
    "naivecytotoxic": "cytotoxic",
    "nk": "NK",
}
KILLERS = ("GZMA", "PRF1", "NKG7", "FCGR3A", "PTPRC")
"""Markers of natural killer cells among the genes of the other lists."""


def _sorted_cells(seed: int, *, with_killers: bool) -> tuple[anndata.AnnData, Truth]:
    adata = read_data("pbmc_facs_sorted_zheng.h5ad")
    lists = json.loads(data_path("cellassign_tme_markers.json").read_text())["symbol"]
    genes = [
        g for g in dict.fromkeys(g for name in LISTS.values() for g in lists[name]) if g in adata.var_names
    ]
    markers = pd.DataFrame({t: [int(g in lists[n]) for g in genes] for t, n in LISTS.items()}, index=genes)
    types = adata.obs["cell_type"].astype(str).map(SORTED).to_numpy()
    seen = np.asarray(adata[:, genes].X.sum(1)).ravel() > 0
    kept = seen if with_killers else seen & (types != "NK")
    adata = adata[kept].copy()
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    total = np.asarray(adata.X.sum(1)).ravel()
    adata.obs["size"] = total / total.mean()
    adata.uns["markers"] = markers
    adata.uns["markers_with_killers"] = markers.assign(NK=[int(g in KILLERS) for g in genes])
    return adata, {"types": types[kept]}


def four_types(seed: int) -> tuple[anndata.AnnData, Truth]:
    """Take the cells of the four types that have a list."""
    return _sorted_cells(seed, with_killers=False)


def with_unlisted(seed: int) -> tuple[anndata.AnnData, Truth]:
    """Add 769 natural killer cells, which have no list; cytotoxic is the answer that fits them best."""
    return _sorted_cells(seed, with_killers=True)


def score(adata: anndata.AnnData, truth: Truth, answer: Answer) -> Scores:
    """Accuracy and calibration over all cells, and over those of the four types alone."""
    names = answer["types"].astype(str)
    found = _scores(answer["probabilities"], names, truth["types"])
    if "effects" in answer:  # T cells and cytotoxic ones have both of these, natural killer cells neither
        effects = pd.DataFrame(answer["effects"], answer["genes"].astype(str), names)
        for gene in ("CD3D", "CD8A"):
            found[f"log fold change of {gene}, cytotoxic"] = float(effects.loc[gene, "cytotoxic"])
        found["log fold change of CD3D, T"] = float(effects.loc["CD3D", "T"])
    return found


def _scores(probabilities: np.ndarray, names: np.ndarray, types: np.ndarray) -> Scores:
    true = types if "NK" in names else np.where(types == "NK", "cytotoxic", types)
    code = pd.Index(names).get_indexer(true)
    right, listed = probabilities.argmax(1) == code, types != "NK"
    sure = probabilities.max(1) >= 0.9
    found = {
        "accuracy": float(right.mean()),
        "ECE": calibration_error(probabilities, code),
        "share with 0.9 or more": float(sure.mean()),
        "accuracy of these": float(right[sure].mean()) if sure.any() else float("nan"),
    }
    if not listed.all():
        found["accuracy, cells of the four types"] = float(right[listed].mean())
    return found


def baseline(adata: anndata.AnnData, truth: Truth) -> dict[str, Scores]:
    """Take the type whose markers have the highest mean, of counts or of log1p of counts per 10,000."""
    markers = adata.uns["markers"]
    counts = np.asarray(adata[:, markers.index].X.todense(), dtype=np.float64)
    total = np.asarray(adata.X.sum(1)).ravel()[:, None]
    ways = {"mean of markers": counts, "mean of log markers": np.log1p(counts / total * 1e4)}
    of_type = markers.to_numpy() / markers.to_numpy().sum(0)
    types = np.where(truth["types"] == "NK", "cytotoxic", truth["types"])
    told = {way: np.array(markers.columns)[(values @ of_type).argmax(1)] for way, values in ways.items()}
    return {way: {"accuracy": float((labels == types).mean())} for way, labels in told.items()}


_CONTENDERS = {
    "CellAssign": Contender(OWN),
    'CellAssign, dispersion="mean"': Contender(OWN, {"dispersion": "mean"}),
    "CellAssign, unassigned": Contender(OWN, {"unassigned": True}),
    "scvi-tools, sizes of mean 1": Contender(PEER, {"mean_size": 1.0}),
}
_SCALES = {
    "CellAssign, sizes of mean 3": Contender(OWN, {"mean_size": 3.0}),
    "scvi-tools, sizes of mean 3": Contender(PEER, {"mean_size": 3.0}),
    "scvi-tools, total counts": Contender(PEER, {"mean_size": 3700.0}),
}
_KILLERS = {
    "CellAssign, NK in the table": Contender(OWN, {"markers": "markers_with_killers"}),
    "scvi-tools, NK in the table": Contender(PEER, {"markers": "markers_with_killers", "mean_size": 1.0}),
}
TASKS = {
    "types": SpecialTask("CellAssign", _CONTENDERS | _SCALES, four_types, score, baseline),
    "types-unlisted": SpecialTask("CellAssign", _CONTENDERS | _KILLERS, with_unlisted, score, baseline),
}
