"""Simulated data: small ones for tests and documentation, and one with known truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["simulate_scvi", "synthetic_iid"]


def synthetic_iid(
    n_cells: int = 400,
    n_genes: int = 100,
    *,
    n_batches: int = 2,
    n_labels: int = 3,
    n_proteins: int = 10,
    n_regions: int = 50,
    label_effect: float = 0.0,
    seed: int = 0,
) -> AnnData:
    """Simulate counts that are independent and identically distributed, for tests and examples.

    Genes follow a negative binomial with mean log-normal around 1 and inverse dispersion 2; with ``label_effect`` the
    means differ between labels, otherwise between nothing at all.

    Parameters
    ----------
    n_cells, n_genes
        Size of the data.
    n_batches, n_labels
        Number of batches and labels, drawn independently of each other.
    n_proteins, n_regions
        Number of proteins and of accessible regions; 0 for none.
    label_effect
        Standard deviation over genes of the log fold change of each label.
    seed
        Seed of everything random.

    Returns
    -------
    AnnData
        ``X`` and ``layers["counts"]``: counts (CSR, float32), at least one in each cell. ``obs``: ``batch``, ``label``,
        ``donor`` (categories), ``age`` (years), ``size_factor``. ``obsm["protein_expression"]``: counts of the proteins
        in ``uns["protein_names"]``. ``obsm["accessibility"]``: fragments (CSR) in the regions of
        ``uns["region_names"]``.
    """
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    label = rng.integers(n_labels, size=n_cells)
    log_means = rng.normal(0.0, 1.0, n_genes) + label_effect * rng.normal(size=(n_labels, n_genes))
    counts = _negative_binomial(rng, np.exp(log_means)[label], 2.0)
    obs = pd.DataFrame(
        {
            "batch": _categories("batch", rng.integers(n_batches, size=n_cells), n_batches),
            "label": _categories("label", label, n_labels),
            "donor": _categories("donor", rng.integers(4, size=n_cells), 4),
            "age": rng.uniform(20, 80, n_cells),
            "size_factor": rng.lognormal(0.0, 0.3, n_cells),
        },
        index=_names("cell", n_cells),
    )
    adata = _anndata(AnnData, counts, obs)
    if n_proteins:
        adata.obsm["protein_expression"] = _negative_binomial(rng, np.full((n_cells, n_proteins), 20.0), 3.0)
        adata.uns["protein_names"] = list(_names("protein", n_proteins))
    if n_regions:
        fragments = rng.poisson(0.2, (n_cells, n_regions)).astype(np.float32)
        adata.obsm["accessibility"] = sp.csr_matrix(fragments)
        adata.uns["region_names"] = list(_names("region", n_regions))
    return adata


def simulate_scvi(
    n_cells: int = 4000,
    n_genes: int = 300,
    *,
    n_latent: int = 4,
    n_clusters: int = 4,
    n_batches: int = 2,
    batch_shift: float = 0.5,
    zero_inflation: float = 0.0,
    log_library: tuple[float, float] = (8.0, 0.3),
    log_theta: tuple[float, float] = (0.7, 0.8),
    seed: int = 0,
) -> AnnData:
    """Simulate counts from the generative process of SCVI, with the truth kept.

    Cell ``n`` of cluster ``c`` in batch ``b``, gene ``g``::

        z_n   ~ Normal(centre_c, I)
        rho_n = softmax(intercept + W2 tanh(W1 z_n) + shift_b)
        l_n   ~ LogNormal(log_library)
        theta ~ LogNormal(log_theta)
        x_ng  ~ NegativeBinomial(mean = l_n rho_ng, inverse dispersion = theta_g), or 0 with probability pi_g

    Clusters and batches are independent of each other: all batches have the same composition. Batch 0 has no shift;
    each other one shifts 30 % of the genes.

    Parameters
    ----------
    n_cells, n_genes
        Size of the data.
    n_latent, n_clusters, n_batches
        Dimension of the latent space, number of cluster centres and of batches.
    batch_shift
        Size of the shift of the log expression, up or down.
    zero_inflation
        Probability ``pi`` that a count is replaced by 0, for half of the genes; 0 for the others.
    log_library, log_theta
        Mean and standard deviation of the log library size of cells, and of the log inverse dispersion of genes.
    seed
        Seed of everything random.

    Returns
    -------
    AnnData
        ``X`` and ``layers["counts"]``: counts (CSR, float32). Truth: ``obsm["z"]``, ``layers["rho"]`` (fractions),
        ``obs["library"]``, ``obs["cluster"]``, ``obs["batch"]``, ``var["theta"]``, ``var["pi"]``; ``uns["truth"]``
        has ``W1``, ``W2``, ``intercept``, ``batch_shift`` (n_batches, n_genes), ``centres``, ``zero_inflation`` and
        ``seed``.
    """
    from anndata import AnnData

    rng = np.random.default_rng(seed)
    cluster, batch = rng.integers(n_clusters, size=n_cells), rng.integers(n_batches, size=n_cells)
    centres = rng.normal(0.0, 2.0, (n_clusters, n_latent))
    z = centres[cluster] + rng.normal(size=(n_cells, n_latent))
    n_hidden = 4 * n_latent
    decoder = {
        "W1": rng.normal(0.0, n_latent**-0.5, (n_latent, n_hidden)),
        "W2": rng.normal(0.0, n_hidden**-0.5, (n_hidden, n_genes)),
        "intercept": rng.normal(0.0, 1.0, n_genes),
        "batch_shift": _batch_shifts(rng, n_batches, n_genes, batch_shift),
    }
    rho = _decode(decoder, z, batch)
    library = rng.lognormal(*log_library, size=n_cells)
    theta = rng.lognormal(*log_theta, size=n_genes)
    pi = np.where(rng.permutation(n_genes) < n_genes // 2, zero_inflation, 0.0)
    counts = _negative_binomial(rng, library[:, None] * rho, theta)
    counts[rng.random(counts.shape) < pi] = 0
    obs = pd.DataFrame(
        {
            "batch": _categories("batch", batch, n_batches),
            "cluster": _categories("cluster", cluster, n_clusters),
            "library": library,
        },
        index=_names("cell", n_cells),
    )
    adata = _anndata(AnnData, counts, obs)
    adata.var["theta"], adata.var["pi"] = theta, pi
    adata.obsm["z"], adata.layers["rho"] = z, rho.astype(np.float32)
    adata.uns["truth"] = {**decoder, "centres": centres, "zero_inflation": zero_inflation, "seed": seed}
    return adata


def _decode(decoder: dict[str, np.ndarray], z: np.ndarray, batch: np.ndarray) -> np.ndarray:
    logits = np.tanh(z @ decoder["W1"]) @ decoder["W2"] + decoder["intercept"] + decoder["batch_shift"][batch]
    unscaled = np.exp(logits - logits.max(axis=1, keepdims=True))
    return unscaled / unscaled.sum(axis=1, keepdims=True)


def _batch_shifts(rng: np.random.Generator, n_batches: int, n_genes: int, size: float) -> np.ndarray:
    shifts = np.zeros((n_batches, n_genes))
    for batch in range(1, n_batches):
        shifted = rng.permutation(n_genes)[: round(0.3 * n_genes)]
        shifts[batch, shifted] = rng.choice([-size, size], len(shifted))
    return shifts


def _negative_binomial(rng: np.random.Generator, mean: np.ndarray, theta: float | np.ndarray) -> np.ndarray:
    rate = rng.gamma(np.broadcast_to(theta, mean.shape), mean / theta)
    return rng.poisson(rate).astype(np.float32)


def _anndata(make: type[AnnData], counts: np.ndarray, obs: pd.DataFrame) -> AnnData:
    # No model accepts cells without counts; with sizes of practical interest there are none.
    counts[counts.sum(axis=1) == 0, 0] = 1
    matrix = sp.csr_matrix(counts)
    var = pd.DataFrame(index=_names("gene", counts.shape[1]))
    return make(X=matrix, obs=obs, var=var, layers={"counts": matrix.copy()})


def _names(kind: str, n: int) -> pd.Index:
    return pd.Index([f"{kind}_{i}" for i in range(n)])


def _categories(kind: str, codes: np.ndarray, n: int) -> pd.Categorical:
    return pd.Categorical.from_codes(codes.astype(np.int64), categories=_names(kind, n))
