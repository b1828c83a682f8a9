"""VELOVI: cells of the pancreas, and the order that they are known to go in."""

from __future__ import annotations

import warnings
from functools import cache

import anndata
import numpy as np
import scanpy as sc
from _special_task import OWN, PEER, Answer, Contender, Scores, SpecialTask, Truth, read_data
from scipy.stats import spearmanr

import pyrocell

__all__ = ["TASKS"]

STAGES = {"Ductal": 0, "Ngn3 low EP": 1, "Ngn3 high EP": 1, "Pre-endocrine": 2} | dict.fromkeys(
    ("Alpha", "Beta", "Delta", "Epsilon"), 3
)
"""The known order: ductal, progenitor, precursor, endocrine."""
FEWEST_SHARED = 20
LEAST_R2 = 0.5
SHORT = {"epochs": 60, "n_samples": 25}


@cache
def _prepared() -> anndata.AnnData:
    """Smoothed as the page says, and the genes whose steady-state line explains more than half."""
    adata = read_data("velocity_pancreas_3696x2000.h5ad")
    for name in list(adata.layers):
        adata.layers[name] = adata.layers[name].astype(np.float32)
    spliced, unspliced = adata.layers["spliced"], adata.layers["unspliced"]
    both = (spliced > 0).multiply(unspliced > 0).multiply(spliced + unspliced)
    adata = adata[:, np.asarray(both.sum(0)).ravel() >= FEWEST_SHARED].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.X = adata.layers["spliced"].copy()
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        sc.pp.pca(adata, n_comps=30, random_state=0)
        sc.pp.neighbors(adata, n_neighbors=30, n_pcs=30, random_state=0)
    pyrocell.data.smooth_velocity_layers(adata)
    pyrocell.data.filter_velocity_genes(adata, min_r2=LEAST_R2, subset=True)
    for name in ("Ms", "Mu"):
        low, high = adata.layers[name].min(0), adata.layers[name].max(0)
        adata.layers[f"{name}_scaled"] = (adata.layers[name] - low) / (high - low)
    return adata


def known_order(seed: int) -> tuple[anndata.AnnData, Truth]:
    """Take the same cells and genes for every seed: it is that of the training alone."""
    adata = _prepared()
    return adata, {"stage": adata.obs["cell_type"].astype(str).map(STAGES).to_numpy()}


def _points_along(adata: anndata.AnnData, stage: np.ndarray, velocity: np.ndarray, layer: str) -> Scores:
    """Share of cells whose velocity is nearer to the ways to neighbours of later stages than to the other ways."""
    graph, where = adata.obsp["connectivities"].tocsr(), np.asarray(adata.layers[layer], dtype=np.float64)
    right, ahead, stages = [], [], []
    for n in range(adata.n_obs):
        near = graph.indices[graph.indptr[n] : graph.indptr[n + 1]]
        later = stage[near] > stage[n]
        if later.all() or not later.any():
            continue
        way = where[near] - where[n]
        lengths = np.linalg.norm(way, axis=1) * np.linalg.norm(velocity[n])
        cosine = way @ velocity[n] / np.maximum(lengths, 1e-12)
        ahead.append(cosine[later].mean())
        right.append(ahead[-1] > cosine[~later].mean())
        stages.append(stage[n])
    share, of = np.array(right), np.array(stages)
    names = ("ductal", "progenitor", "precursor")
    by_stage = {name: float(share[of == k].mean()) for k, name in enumerate(names)}
    return {"points along": float(share.mean()), "cosine": float(np.mean(ahead))} | by_stage


def _both_units(adata: anndata.AnnData, stage: np.ndarray, scaled: np.ndarray) -> Scores:
    """Score velocities of scaled abundances in the unit of the layers, and on the scale from 0 to 1."""
    span = np.ptp(adata.layers["Ms"], axis=0)
    found = {}
    for unit, velocity, layer in (("layers", scaled * span, "Ms"), ("0 to 1", scaled, "Ms_scaled")):
        scores = _points_along(adata, stage, velocity, layer)
        found |= {f"{name}, unit {unit}": value for name, value in scores.items()}
    return found


def score(adata: anndata.AnnData, truth: Truth, answer: Answer) -> Scores:
    """Direction, time, permutation scores and fit."""
    found = _both_units(adata, truth["stage"], answer["velocity"].astype(np.float64))
    largest = answer["permutation"].max(1)
    fits = {name: np.abs(answer[f"fit_{name}"] - adata.layers[f"{layer}_scaled"]).mean()
            for name, layer in (("spliced", "Ms"), ("unspliced", "Mu"))}  # fmt: skip
    return found | {
        "time and order": float(spearmanr(answer["time"].mean(1), truth["stage"])[0]),
        "largest permutation score, median": float(np.median(largest)),
        "genes whose largest score is above 2": float((largest > 2).mean()),
        "fit of spliced RNA": float(fits["spliced"]),
        "fit of unspliced RNA": float(fits["unspliced"]),
    }


def baseline(adata: anndata.AnnData, truth: Truth) -> dict[str, Scores]:
    """Steady-state velocity, u - gamma s."""
    spliced, unspliced = (adata.layers[name] - adata.layers[name].min(0) for name in ("Ms", "Mu"))
    velocity = unspliced - adata.var["velocity_gamma"].to_numpy() * spliced
    span = np.ptp(adata.layers["Ms"], axis=0)
    return {"steady state": _both_units(adata, truth["stage"], velocity / span)}


_CONTENDERS = {
    "VELOVI": Contender(OWN, SHORT),
    "VELOVI, joint states": Contender(OWN, SHORT | {"state_coupling": "joint"}),
    "scvi-tools": Contender(PEER, SHORT),
}
TASKS = {"velocity": SpecialTask("VELOVI", _CONTENDERS, known_order, score, baseline)}
