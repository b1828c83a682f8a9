"""What a question of ``special.py`` is made of, and measures that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from _cases import data_folder

__all__ = [
    "OWN",
    "PEER",
    "Answer",
    "Contender",
    "Scores",
    "SpecialTask",
    "proportion_scores",
    "read_answer",
    "read_data",
]

OWN, PEER = "pyrocell", "scvi-tools"

Answer = dict[str, np.ndarray]
Scores = dict[str, float]
Truth = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """One way to use a model: its side, and the options that its worker reads."""

    side: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SpecialTask:
    """One question with a known answer.

    Parameters
    ----------
    model
        Model that answers it; the workers know how.
    contenders
        Who answers, by the name that the table has.
    make
        Makes, for a seed, the data that the models see, and the truth.
    score
        Scores of an answer.
    baseline
        Scores of simpler methods.
    """

    model: str
    contenders: dict[str, Contender]
    make: Callable[[int], tuple[anndata.AnnData, Truth]]
    score: Callable[[anndata.AnnData, Truth, Answer], Scores]
    baseline: Callable[[anndata.AnnData, Truth], dict[str, Scores]]


def read_data(name: str) -> anndata.AnnData:
    """Read a file of the data folder."""
    return anndata.read_h5ad(data_path(name))


def data_path(name: str) -> Path:
    """Tell where a file of the data folder lies."""
    folder = data_folder()
    if folder is None:
        raise SystemExit("The data folder was not found; name it in PYROCELL_DATA.")
    return folder / name


def read_answer(path: Path) -> Answer:
    """Read what a worker wrote."""
    with np.load(path) as answer:
        return dict(answer)


def proportion_scores(told: np.ndarray, true: np.ndarray) -> Scores:
    """Compare proportions of spots by types: root mean square error, Jensen-Shannon divergence (bits), correlation."""
    told = np.maximum(told, 0) + 1e-12
    told = told / told.sum(1, keepdims=True)
    middle = (told + true) / 2

    def divergence(p: np.ndarray) -> np.ndarray:
        ratio = np.maximum(p, 1e-30) / np.maximum(middle, 1e-30)
        return np.where(p > 0, p * np.log2(ratio), 0.0).sum(1)

    found = np.flatnonzero((told.std(0) > 0) & (true.std(0) > 0))
    by_type = [np.corrcoef(told[:, k], true[:, k])[0, 1] for k in found]
    return {
        "error": float(np.sqrt(((told - true) ** 2).mean())),
        "JS": float(((divergence(true) + divergence(told)) / 2).mean()),
        "r": float(np.corrcoef(told.ravel(), true.ravel())[0, 1]),
        "r of types": float(np.mean(by_type)),
    }
