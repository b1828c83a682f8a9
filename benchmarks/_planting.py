"""Real counts with fold changes planted by thinning, or with none: what `de.py` asks about, and the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import anndata
import numpy as np
from _cases import data_folder, most_variable
from scipy import sparse

__all__ = ["TASKS", "Study", "make_study"]

FEWEST_COUNTS = 50
"""Counts in the cells compared above which a gene may be given a fold change."""

TASKS = {
    "kang cells": "one cell type split at random, fold changes planted",
    "kang donors": "the same between 4 donors and 4 donors",
    "sorted cells": "sorted NK cells split at random, fold changes planted",
    "null": "one cell type split at random 20 times, and 4 donors against 4 in 20 ways; nothing planted",
    "ifnb": "interferon against control inside each cell type, all donors together",
    "muscat": "interferon against control inside each cell type, 2 donors in pairs",
    "simulated every": "simulated cells, every gene with an effect (normal, of one doubling): do intervals cover?",
    "simulated tenth": "the same with effects in a tenth of the genes",
}


@dataclass
class Study:
    """Counts, the questions about them, and what is true.

    Parameters
    ----------
    adata
        Counts; each question is a column of ``obs`` with the groups A and B.
    questions
        Column of the groups, and column of the replicates or None, by name.
    truth
        Planted log2 fold change of each gene, A against B.
    """

    adata: anndata.AnnData
    questions: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    truth: np.ndarray | None = None


def make_study(task: str, seed: int) -> Study:
    """Read the counts of a task, and plant what it plants."""
    rng = np.random.default_rng(seed)
    if task.startswith("simulated"):
        return _simulated(task, rng, share=1.0 if task == "simulated every" else 0.1)
    folder = data_folder()
    if folder is None:
        raise SystemExit(f"the task {task!r} needs the real data: set PYROCELL_DATA to their folder")
    if task in ("ifnb", "muscat"):
        return _stimulation(folder / {"ifnb": "kang_ifnb_2800", "muscat": "kang_2donor_muscat"}[task], task)
    if task == "sorted cells":
        adata = anndata.read_h5ad(folder / "pbmc_facs_sorted_zheng.h5ad")
        adata = adata[:, most_variable(adata.X, 2000)].copy()
        adata.obs["type"] = adata.obs["cell_type"].astype(str)
        chosen = "nk"
    else:
        adata = anndata.read_h5ad(folder / "kang_8donors_12261.h5ad")
        adata.obs["type"] = adata.obs["cell_type"].astype(str)
        chosen = "CD14+ Monocytes"
        adata = adata[adata.obs["type"].isin([chosen, "B cells"])].copy()
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    rows = np.flatnonzero((adata.obs["type"] == chosen).to_numpy())
    if task == "null":
        return _nulls(adata, rows, rng)
    by_donor = task == "kang donors"
    first = _donors(adata, rows, rng) if by_donor else _half(rows, rng)
    adata.obs["group"] = _groups(adata.n_obs, rows, first)
    truth = _plant(adata, rng)
    return Study(adata, {task: ("group", "donor" if by_donor else None)}, truth)


def _simulated(task: str, rng: np.random.Generator, *, share: float, n_cells: int = 800) -> Study:
    """Draw negative binomial counts of two groups whose effects are known."""
    n_genes = 1000
    truth = np.where(rng.random(n_genes) < share, rng.normal(0.0, 1.0, n_genes), 0.0)
    group = rng.permutation(np.arange(n_cells) % 2)
    profile = rng.lognormal(0.0, 1.0, n_genes) * 2.0 ** np.where(group[:, None] == 0, truth, 0.0)
    mean = rng.lognormal(0.0, 0.3, (n_cells, 1)) * profile
    counts = rng.poisson(rng.gamma(2.0, mean / 2.0)).astype(np.float32)
    adata = anndata.AnnData(sparse.csr_matrix(counts))
    adata.obs["group"] = np.where(group == 0, "A", "B")
    return Study(adata, {task: ("group", None)}, truth)


def _half(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(rows)[: len(rows) // 2]


def _donors(adata: Any, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    donors = adata.obs["donor"].astype(str).to_numpy()
    return rows[np.isin(donors[rows], rng.permutation(np.unique(donors))[:4])]


def _groups(n_cells: int, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
    groups = np.full(n_cells, "other", dtype=object)
    groups[rows], groups[first] = "B", "A"
    return groups


def _plant(adata: Any, rng: np.random.Generator) -> np.ndarray:
    """Thin a tenth of the frequent genes in one of the groups: counts stay real counts."""
    group = adata.obs["group"].to_numpy()
    counts = adata.X.toarray().astype(np.int64)
    frequent = np.flatnonzero(counts[group != "other"].sum(0) >= FEWEST_COUNTS)
    truth = np.zeros(adata.n_vars)
    chosen = rng.choice(frequent, len(frequent) // 10, replace=False)
    truth[chosen] = rng.uniform(0.5, 2.0, len(chosen)) * rng.choice([-1.0, 1.0], len(chosen))
    for gene in chosen:
        thinned = np.flatnonzero(group == ("B" if truth[gene] > 0 else "A"))
        counts[thinned, gene] = rng.binomial(counts[thinned, gene], 2.0 ** -abs(truth[gene]))
    adata.X = sparse.csr_matrix(counts.astype(np.float32))
    return truth


def _nulls(adata: Any, rows: np.ndarray, rng: np.random.Generator) -> Study:
    study = Study(adata)
    for i in range(20):
        adata.obs[f"cells{i}"] = _groups(adata.n_obs, rows, _half(rows, rng))
        adata.obs[f"donors{i}"] = _groups(adata.n_obs, rows, _donors(adata, rows, rng))
        study.questions[f"cells{i}"] = (f"cells{i}", None)
        study.questions[f"donors{i}"] = (f"donors{i}", "donor")
    return study


def _stimulation(path: Any, task: str) -> Study:
    """Each cell type with 20 cells of either condition, and of either donor where there are donors."""
    adata = anndata.read_h5ad(path.with_suffix(".h5ad"))
    if adata.n_vars > 3000:
        adata = adata[:, most_variable(adata.X, 3000)].copy()
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    study = Study(adata)
    stimulated = adata.obs["condition"].astype(str).str.lower().str.startswith("stim").to_numpy()
    types = adata.obs["cell_type"].astype(str).to_numpy()
    for number, name in enumerate(sorted(set(types))):
        inside = np.flatnonzero(types == name)
        sizes = [stimulated[inside].sum(), (~stimulated[inside]).sum()]
        if min(sizes) < 20:
            continue
        adata.obs[f"type{number}"] = _groups(adata.n_obs, inside, inside[stimulated[inside]])
        study.questions[name] = (f"type{number}", "donor" if task == "muscat" else None)
    return study
