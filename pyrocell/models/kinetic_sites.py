"""The four phases of a gene's expression, and the quantities of a cell that follow from them, as named sites."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrocell.data import Dataset
from pyrocell.infer.effects import lazy_deterministic
from pyrocell.nn import Rates, induction, repression

__all__ = ["STATES", "Phases", "corners", "name_kinetics"]

STATES = ["induction", "induction_steady", "repression", "repression_steady"]

_HIGHEST = 0.01
_MOST_CELLS = 5000


class Phases(NamedTuple):
    """Abundances, velocities and times in each of the four states; tensors that broadcast to (..., B, n_genes)."""

    unspliced: Sequence[Tensor]
    spliced: Sequence[Tensor]
    velocity_unspliced: Sequence[Tensor]
    velocity: Sequence[Tensor]
    time: Sequence[Tensor]
    end: Tensor

    @classmethod
    def at(cls, rates: Rates, switch_time: Tensor, t_max: float, progress: tuple[Tensor, Tensor]) -> Phases:
        """Solve the kinetics.

        Parameters
        ----------
        rates
            Rates of each gene.
        switch_time
            When transcription stops, shape (n_genes,).
        t_max
            When time ends.
        progress
            How far a gene is through induction, and through repression, as fractions.
        """
        alpha, beta, gamma = rates[:3]
        zero = torch.zeros_like(alpha)
        up, down = progress[0] * switch_time, progress[1] * (t_max - switch_time)
        on, off = induction(rates, up), repression(induction(rates, switch_time), rates, down)
        pairs = [on, (alpha / beta, alpha / gamma), off, (zero, zero)]
        transcription = alpha
        if rates.alpha_start is not None and rates.kappa is not None:
            transcription = alpha - (alpha - rates.alpha_start) * torch.exp(-rates.kappa * up)
        return cls(
            unspliced=[u for u, _ in pairs],
            spliced=[s for _, s in pairs],
            velocity_unspliced=[transcription - beta * on[0], zero, -beta * off[0], zero],
            velocity=[beta * on[0] - gamma * on[1], zero, beta * off[0] - gamma * off[1], zero],
            time=[up, switch_time, switch_time + down, zero],
            end=torch.full_like(zero, t_max),
        )


def name_kinetics(phases: Phases, pi: Tensor) -> None:
    """Name what follows from the states of the genes, averaged over the states or that of the likeliest.

    Parameters
    ----------
    phases
        The four phases.
    pi
        Probability of each state, shape (..., B, n_genes, 4).
    """
    values = {
        "velocity": phases.velocity,
        "velocity_unspliced": phases.velocity_unspliced,
        "latent_time": phases.time,
        "fit_spliced": phases.spliced,
        "fit_unspliced": phases.unspliced,
    }
    # Nothing tells whether a gene that is off has not begun, or is over.
    values["latent_time_end"] = [*phases.time[:3], phases.end]
    for name, parts in values.items():
        lazy_deterministic(name, partial(_average, parts, pi), event_dim=1)
        lazy_deterministic(f"{name}_max", partial(_likeliest, parts, pi), event_dim=1)


def _average(parts: Sequence[Tensor], pi: Tensor) -> Tensor:
    return sum((weight * part for weight, part in zip(pi.unbind(-1), parts, strict=True)), torch.zeros(()))


def _likeliest(parts: Sequence[Tensor], pi: Tensor) -> Tensor:
    return _average(parts, torch.nn.functional.one_hot(pi.argmax(-1), len(STATES)).to(pi))


def corners(dataset: Dataset | None, n_genes: int) -> Tensor:
    """Return the median of unspliced and of spliced RNA over the 1 % of cells with most unspliced RNA of each gene.

    Parameters
    ----------
    dataset
        The data, of which at most 5,000 cells are looked at; without any, only the shape is right.
    n_genes
        Number of genes.

    Returns
    -------
    Tensor
        Shape (2, n_genes).
    """
    if dataset is None:
        return torch.ones(2, n_genes)
    rows = np.unique(np.linspace(0, dataset.n_cells - 1, min(dataset.n_cells, _MOST_CELLS)).astype(np.int64))
    cells = dataset.cells(rows)
    highest = cells.unspliced.topk(max(1, round(_HIGHEST * len(rows))), dim=0).indices
    return torch.stack(
        [part.gather(0, highest).median(0).values for part in (cells.unspliced, cells.spliced)]
    )
