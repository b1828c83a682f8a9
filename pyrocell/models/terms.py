"""Weights of the terms of losses that are no likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyrocell.errors import SetupError

__all__ = ["TangramWeights"]


@dataclass(frozen=True)
class TangramWeights:
    """Weights of the terms of Tangram's loss.

    Attributes
    ----------
    lambda_g1
        Of the mean cosine similarity of genes, each over the spots.
    lambda_g2
        Of the mean cosine similarity of spots, each over the genes.
    lambda_d
        Of the divergence from the expected density, where one is given.
    lambda_r
        Of the entropy of the mapping: above 0, each cell goes to fewer spots.
    lambda_count, lambda_f_reg
        Of the distance of the number of cells in use from ``target_count``, and of undecided cells; both with a filter.

    Raises
    ------
    SetupError
        If a weight is negative or infinite.
    """

    lambda_g1: float = 1.0
    lambda_g2: float = 0.0
    lambda_d: float = 1.0
    lambda_r: float = 0.0
    lambda_count: float = 1.0
    lambda_f_reg: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise SetupError(f"TangramWeights: {name} is {value!r}; expected a number of at least 0.")
