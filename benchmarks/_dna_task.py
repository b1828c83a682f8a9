"""SCBASSET: motifs planted in the sequences of real peaks; the counts are simulated, so that the truth is known."""

from __future__ import annotations

import re
from collections.abc import Sequence

import anndata
import numpy as np
import pandas as pd
from _special_task import OWN, PEER, Answer, Contender, Scores, SpecialTask, Truth, data_path
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from pyrocell.data import encode_dna, read_fasta, shuffle_dna

__all__ = ["TASKS"]

SITES = {"AP-1": "TGACTCAT", "ETS": "ACCGGAAGT", "GATA": "AGATAAGG", "CTCF": "CCACCAGGGGG"}
N_CELLS, N_HELD_OUT, N_BACKGROUND, LENGTH = 200, 150, 200, 336
MOST_SITES = 3
WORD = 6
PENALTIES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)


def _turned(site: str) -> str:
    return site.translate(str.maketrans("ACGT", "TGCA"))[::-1]


def _count(sequence: str, site: str) -> int:
    """Sites on either strand; more than three count as three."""
    ways = {site, _turned(site)}
    return min(MOST_SITES, sum(len(re.findall(f"(?={way})", sequence)) for way in ways))


def _plant(sequence: str, rng: np.random.Generator) -> str:
    """Put one to three sites of each motif into a third of the sequences."""
    bases = list(sequence)
    for site in SITES.values():
        if rng.random() < 1 / 3:
            for _ in range(rng.integers(1, MOST_SITES + 1)):
                way = site if rng.random() < 0.5 else _turned(site)
                start = rng.integers(0, len(bases) - len(way))
                bases[start : start + len(way)] = way
    return "".join(bases)


def planted(seed: int) -> tuple[anndata.AnnData, Truth]:
    """Make the middle of 1,000 peaks with planted sites, and 200 cells that answer to them."""
    rng = np.random.default_rng(seed)
    records = [
        letters.decode().upper()
        for _, letters in read_fasta(data_path("atac_example_peaks_1000x1344bp.fasta.gz"))
    ]
    low = (len(records[0]) - LENGTH) // 2
    sequences = [_plant(letters[low : low + LENGTH], rng) for letters in records]
    sites = np.array([[_count(sequence, site) for site in SITES.values()] for sequence in sequences])
    kind, activity = rng.integers(3, size=N_CELLS), np.zeros((N_CELLS, len(SITES)))
    activity[np.arange(N_CELLS), kind] = 2.0
    activity[:, 3] = rng.uniform(0, 2, N_CELLS)
    logit = sites @ activity.T - 2.1 + rng.normal(0, 0.5, N_CELLS)
    chance = 1 / (1 + np.exp(-logit))
    is_open = rng.random(chance.shape) < chance
    kept = np.flatnonzero(is_open.sum(1) > 0)
    cells = [f"cell{n}" for n in range(N_CELLS)]
    adata = anndata.AnnData(
        sparse.csr_matrix(is_open[kept].T.astype(np.float32)),
        obs=pd.DataFrame(index=cells),
        var=pd.DataFrame(index=[f"peak{i}" for i in kept]),
    )
    codes = encode_dna([sequences[i] for i in kept])
    adata.varm["dna_code"] = codes
    held_out = np.zeros(len(kept), dtype=bool)
    held_out[rng.permutation(len(kept))[:N_HELD_OUT]] = True
    adata.var["held_out"] = held_out
    adata.uns["background"] = shuffle_dna(codes[rng.choice(len(kept), N_BACKGROUND, replace=False)], rng)
    adata.uns["sites"] = np.array(list(SITES.values()))  # a mapping would be read back in another order
    truth = {"chance": chance[kept], "kind": kind, "activity": activity, "log_odds": logit[kept].mean(0)}
    return adata, truth | {"sites": sites[kept], "seen": is_open[kept].astype(float), "held_out": held_out}


def _correlation(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.corrcoef(one, two)[0, 1])


def _prediction_scores(chance: np.ndarray, truth: Truth) -> Scores:
    seen = truth["seen"][truth["held_out"]]
    within = [roc_auc_score(seen[:, n], chance[:, n]) for n in range(N_CELLS) if 0 < seen[:, n].mean() < 1]
    return {"AUROC of held-out peaks": float(roc_auc_score(seen.ravel(), chance.ravel())),
            "the same within cells": float(np.mean(within))}  # fmt: skip


def score(adata: anndata.AnnData, truth: Truth, answer: Answer) -> Scores:
    """Predictions of held-out peaks, types of cells, biases and activities."""
    found = _prediction_scores(answer["chance"], truth)
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict(answer["latent"])
    found["three types, ARI"] = float(adjusted_rand_score(truth["kind"], clusters))
    if "bias" in answer:
        found["bias, r"] = _correlation(answer["bias"], truth["log_odds"])
    for m, name in enumerate(SITES):
        found[f"activity of {name}, r"] = _correlation(answer["activity"][:, m], truth["activity"][:, m])
    return found


def _words(codes: np.ndarray) -> np.ndarray:
    """Count all words of six bases, both strands as one, shape (n_peaks, n_words)."""
    powers = 4 ** np.arange(WORD)[::-1]
    windows = np.lib.stride_tricks.sliding_window_view(codes.astype(int), WORD, axis=1)
    digits = np.arange(4**WORD)[:, None] // powers % 4
    turned = ((3 - digits)[:, ::-1] * powers).sum(1)
    _, word = np.unique(np.minimum(np.arange(4**WORD), turned), return_inverse=True)
    known = (windows < 4).all(-1)
    rows = [
        np.bincount(word[(w[k]) @ powers], minlength=word.max() + 1)
        for w, k in zip(windows, known, strict=True)
    ]
    return np.array(rows, dtype=np.float32)


def _log_odds(share: np.ndarray) -> np.ndarray:
    odds: np.ndarray = np.log(share / (1 - share))
    return odds


def _of_words(adata: anndata.AnnData, truth: Truth, penalty: float, clusters: np.ndarray) -> np.ndarray:
    """Regress each cluster's share of open peaks on words, and add the depth of each cell."""
    held = truth["held_out"]
    words = _words(adata.varm["dna_code"])
    words = (words - words[~held].mean(0)) / (words[~held].std(0) + 1e-6)
    told = np.zeros((held.sum(), N_CELLS))
    for cluster in range(3):
        cells = np.flatnonzero(clusters == cluster)
        seen = truth["seen"][~held][:, cells]
        share, both = seen.mean(1), np.repeat([1, 0], (~held).sum())
        weight = np.concatenate([share, 1 - share]) * len(cells)
        fitted = LogisticRegression(C=penalty, max_iter=300)
        fitted.fit(np.tile(words[~held], (2, 1)), both, sample_weight=weight)
        depth = _log_odds(seen.mean(0))
        told[:, cells] = fitted.decision_function(words[held])[:, None] + depth - depth.mean()
    return 1 / (1 + np.exp(-told))


def baseline(adata: anndata.AnnData, truth: Truth) -> dict[str, Scores]:
    """Score the true probabilities, regression on the planted motifs, and regression on words of six bases."""
    held, seen = truth["held_out"], truth["seen"]
    told, slope = np.zeros((held.sum(), N_CELLS)), np.zeros((N_CELLS, len(SITES)))
    for n in range(N_CELLS):
        fitted = LogisticRegression().fit(truth["sites"][~held], seen[~held][:, n])
        told[:, n], slope[n] = fitted.predict_proba(truth["sites"][held])[:, 1], fitted.coef_[0]
    answers = {"chance": told, "latent": slope, "activity": slope}
    open_cells = seen[~held].T
    weighted = open_cells / open_cells.sum(1, keepdims=True) * np.log1p(N_CELLS / (1 + open_cells.sum(0)))
    left, size, _ = np.linalg.svd(weighted, full_matrices=False)
    clusters = KMeans(3, n_init=10, random_state=0).fit_predict((left * size)[:, 1:11])
    by_words: Sequence[Scores] = [
        _prediction_scores(_of_words(adata, truth, c, clusters), truth) for c in PENALTIES
    ]
    best = max(by_words, key=lambda scores: scores["AUROC of held-out peaks"])
    return {
        "true probabilities": _prediction_scores(truth["chance"][held], truth),
        "regression on the motifs": score(adata, truth, answers),
        "regression on 6-mers": best
        | {"three types, ARI": float(adjusted_rand_score(truth["kind"], clusters))},
    }


_CONTENDERS = {
    "SCBASSET": Contender(OWN, {"epochs": 60}),
    "SCBASSET, 180 epochs": Contender(OWN, {"epochs": 180}),
    "scvi-tools": Contender(PEER, {"epochs": 60}),
    "scvi-tools, 180 epochs": Contender(PEER, {"epochs": 180}),
}
TASKS = {"dna": SpecialTask("SCBASSET", _CONTENDERS, planted, score, baseline)}
