"""The counts that both sides are run on: simulated, or real files brought to one form."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

__all__ = [
    "COARSE",
    "REAL_CASES",
    "Case",
    "RealFile",
    "data_folder",
    "most_variable",
    "read_real",
    "simulate",
    "write_case",
    "write_split",
]


@dataclass(frozen=True)
class RealFile:
    """A real data set: where it lies, its columns, and the training of its quality run.

    Parameters
    ----------
    path
        File name (looked for in the data folder) or path of an h5ad with raw counts in ``X``.
    batch_key, group_key
        Columns of ``obs``; ``None`` for one batch, or for groups cut from the library size.
    top_genes
        Keep this many most variable genes; ``None`` keeps all.
    epochs
        Epochs of the quality run; the KL warms up over the first half.
    """

    path: str
    batch_key: str | None = None
    group_key: str | None = None
    top_genes: int | None = None
    epochs: int = 100


REAL_CASES = {
    "kang": RealFile("kang_8donors_12261.h5ad", "donor", "cell_type", None, epochs=60),
    "pbmc_sorted": RealFile("pbmc_facs_sorted_zheng.h5ad", None, "cell_type", 2000, epochs=120),
}


COARSE = {
    "memoryt": "CD4 T",
    "regulatoryt": "CD4 T",
    "thelper": "CD4 T",
    "naivet": "CD4 T",
    "cytotoxict": "CD8 T",
    "naivecytotoxic": "CD8 T",
}
"""Sorted T cells whose types overlap by nature."""


@dataclass(frozen=True)
class Case:
    """Counts written for the workers, with what a reader of the table needs to know about them."""

    name: str
    path: str
    n_cells: int
    n_genes: int
    n_batches: int
    n_groups: int
    density: float

    def as_json(self) -> dict[str, Any]:
        """Describe the counts, without the temporary path."""
        return {key: value for key, value in asdict(self).items() if key != "path"}

    def describe(self) -> str:
        """Describe the counts in one line."""
        size = f"{self.n_cells:,} cells x {self.n_genes:,} genes, {self.density:.1%} non-zero"
        return f"{self.name}: {size}, {self.n_batches} batches, {self.n_groups} groups"


def data_folder() -> Path | None:
    """Folder with the real data sets: ``$PYROCELL_DATA``, else ``shared/data`` beside the project."""
    named = os.environ.get("PYROCELL_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if folder.is_dir() else None


def _library_for_density(rates: np.ndarray, depth: np.ndarray, theta: np.ndarray, density: float) -> float:
    """Scale of the library at which the expected share of non-zero counts is the one asked for."""
    low, high = 1.0, 1e6
    for _ in range(40):
        middle = float(np.sqrt(low * high))
        zero = (theta / (theta + middle * depth[:, None] * rates)) ** theta
        low, high = (middle, high) if 1 - zero.mean() < density else (low, middle)
    return middle


def simulate(
    n_cells: int = 10_000, n_genes: int = 2_000, *, density: float = 0.08, seed: int = 0
) -> anndata.AnnData:
    """Draw negative-binomial counts with two batches and eight groups of unequal size.

    A tenth of the genes differs in each group (log fold change of sd 1), the second batch shifts 30 % of the
    genes by 0.5 up or down, libraries are log-normal (sd 0.4) and inverse dispersions log-normal around 2.
    """
    rng = np.random.default_rng(seed)
    log_base = rng.normal(0.0, 1.5, n_genes)
    log_fold = rng.normal(0.0, 1.0, (8, n_genes)) * (rng.random((8, n_genes)) < 0.1)
    shift = rng.choice([-0.5, 0.5], n_genes) * (rng.random(n_genes) < 0.3)
    theta = rng.lognormal(np.log(2.0), 0.5, n_genes)
    depth = rng.lognormal(0.0, 0.4, n_cells)
    group = rng.choice(8, n_cells, p=np.array([30, 20, 15, 12, 9, 7, 4, 3]) / 100)
    batch = rng.choice(2, n_cells)
    profiles = np.exp(log_base + log_fold[:, None, :] + np.arange(2)[None, :, None] * shift)
    profiles /= profiles.sum(-1, keepdims=True)
    some = slice(0, 1000)
    scale = _library_for_density(profiles[group[some], batch[some]], depth[some], theta, density)
    blocks = []
    for start in range(0, n_cells, 1000):
        rows = slice(start, start + 1000)
        mean = scale * depth[rows, None] * profiles[group[rows], batch[rows]]
        blocks.append(sparse.csr_matrix(rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float32)))
    obs = {"batch": [f"batch{b}" for b in batch], "group": [f"group{g}" for g in group]}
    return _tidy(sparse.vstack(blocks), pd.DataFrame(obs), [f"gene{g}" for g in range(n_genes)])


def _tidy(counts: Any, obs: pd.DataFrame, genes: list[str]) -> anndata.AnnData:
    """Make counts float32 CSR, which both sides read best, and drop cells without a single count."""
    counts = sparse.csr_matrix(counts, dtype=np.float32)
    kept = np.flatnonzero(np.asarray(counts.sum(1)).ravel() > 0)
    obs = obs.iloc[kept].astype("category").reset_index(drop=True)
    obs.index = pd.Index([f"cell{row}" for row in kept])
    return anndata.AnnData(counts[kept], obs=obs, var=pd.DataFrame(index=pd.Index(genes)))


def most_variable(counts: Any, n_genes: int) -> np.ndarray:
    """Positions of the genes that vary most, as log1p of counts per 10,000, in their own order."""
    scaled = sparse.csr_matrix(counts, dtype=np.float64)
    scaled = (sparse.diags(1e4 / np.asarray(scaled.sum(1)).ravel()) @ scaled).tocsr().log1p()
    mean = np.asarray(scaled.mean(0)).ravel()
    variance: np.ndarray = np.asarray(scaled.multiply(scaled).mean(0)).ravel() - mean**2
    chosen: np.ndarray = np.sort(np.argsort(-variance, kind="stable")[:n_genes])
    return chosen


def _groups(adata: anndata.AnnData, key: str | None) -> np.ndarray:
    if key is not None:
        named: np.ndarray = adata.obs[key].astype(str).to_numpy()
        return named
    library = np.asarray(adata.X.sum(1)).ravel()
    return np.array([f"depth{q}" for q in pd.qcut(library, 8, labels=False, duplicates="drop")])


def read_real(source: RealFile) -> anndata.AnnData:
    """Read a real file and bring it to the form of the simulated counts."""
    path = Path(source.path)
    folder = data_folder()
    adata = anndata.read_h5ad(path if path.exists() or folder is None else folder / path)
    for key in (source.batch_key, source.group_key):
        if key is not None and key not in adata.obs:
            raise SystemExit(f"{path.name} has no column {key!r} in obs; it has {list(adata.obs.columns)}")
    batch = (
        np.full(adata.n_obs, "all") if source.batch_key is None else adata.obs[source.batch_key].astype(str)
    )
    obs = pd.DataFrame({"batch": np.asarray(batch), "group": _groups(adata, source.group_key)})
    genes = np.arange(adata.n_vars)
    if source.top_genes is not None and source.top_genes < adata.n_vars:
        genes = most_variable(adata.X, source.top_genes)
    return _tidy(sparse.csr_matrix(adata.X)[:, genes], obs, list(adata.var_names[genes]))


def write_case(name: str, adata: anndata.AnnData, folder: Path) -> Case:
    """Write the counts where the workers find them."""
    path = folder / f"{name}.h5ad"
    adata.write_h5ad(path)
    density = adata.X.nnz / (adata.n_obs * adata.n_vars)
    levels = {key: adata.obs[key].nunique() for key in ("batch", "group")}
    return Case(name, str(path), adata.n_obs, adata.n_vars, levels["batch"], levels["group"], density)


def write_split(case: Case, seed: int, folder: Path, *, train_size: float = 0.9) -> Path:
    """Write one random split of the cells, the same for both sides."""
    order = np.random.default_rng(seed).permutation(case.n_cells)
    n_train = int(np.ceil(train_size * case.n_cells))
    path = folder / f"{case.name}-split{seed}.npz"
    np.savez(path, train=order[:n_train], validation=order[n_train:])
    return path
