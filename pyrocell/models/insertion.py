"""What changes when DNA is changed: motifs put into sequences, and bases replaced one by one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrocell.data import encode_dna, read_fasta, read_motifs, shuffle_dna
from pyrocell.errors import DataError, PyrocellWarning, QueryError, list_some

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrocell.models.core import ModelCore

__all__ = ["backgrounds", "motif_effects", "mutation_effects", "wanted_motifs"]


def wanted_motifs(
    motifs: str | Path | Mapping[str, Any], tf: str | Sequence[str] | None, length: int
) -> dict[str, np.ndarray]:
    """Return the motifs asked for; see `read_motifs`.

    Parameters
    ----------
    motifs, tf
        Where they are, and the names of those wanted.
    length
        Bases in a sequence of the model.
    """
    known = read_motifs(motifs)
    names = list(known) if tf is None else [tf] if isinstance(tf, str) else list(tf)
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise QueryError(
            f"There are no motifs {list_some(missing) or '(none was asked for)'}; there are {list_some(known, 20)}."
        )
    long = [f"{name} ({len(known[name])})" for name in names if len(known[name]) > length]
    if long:
        raise QueryError(
            f"The motifs {list_some(long)} are longer than the sequences of the model, {length}."
        )
    return {name: known[name] for name in names}


def backgrounds(
    model: ModelCore, adata: AnnData | None, path: str | Path | None, n: int, rng: np.random.Generator
) -> np.ndarray:
    """Return sequences to put motifs into, as codes: of a FASTA file, or shuffled regions.

    Parameters
    ----------
    model
        The model asked.
    adata
        Data with regions; by default the model's own.
    path
        FASTA file; its sequences are cut to the middle.
    n
        How many regions to shuffle.
    rng
        Random numbers.
    """
    length = model.data.record("dna")["length"]
    if path is not None:
        return _from_fasta(path, length)
    if n < 1:
        raise QueryError(f"n_background is {n}; expected at least 1.")
    dataset = model.require_data(adata)
    rows = rng.choice(dataset.n_cells, n, replace=n > dataset.n_cells)
    return shuffle_dna(dataset.cells(np.sort(rows)).dna.numpy(), rng)


def _from_fasta(path: str | Path, length: int) -> np.ndarray:
    records = dict(read_fasta(path))
    short = [f"{name} ({len(text)})" for name, text in records.items() if len(text) < length]
    if short:
        raise DataError(
            f"{len(short)} sequences of {path} are shorter than those of the model, {length} bases: "
            f"{list_some(short)}. Take longer ones from the genome."
        )
    long = [name for name, text in records.items() if len(text) > length]
    if long:
        warnings.warn(
            f"{len(long)} sequences of {path} are longer than those of the model; the {length} bases in their middle "
            "are taken.",
            PyrocellWarning,
            stacklevel=4,
        )
    starts = {name: (len(text) - length) // 2 for name, text in records.items()}
    cut = [text[starts[name] : starts[name] + length] for name, text in records.items()]
    return encode_dna(cut, list(records), where=f"The sequences of {path}")


def motif_effects(
    model: Any,
    motifs: Mapping[str, np.ndarray],
    sequences: np.ndarray,
    *,
    rng: np.random.Generator | None,
) -> torch.Tensor:
    """Return the mean change of the embedding of sequences when a motif is put into their middle.

    Logits are linear in the embedding, so that the change of a cell's mean logit is a product with this.

    Parameters
    ----------
    model
        A model with a ``tower``.
    motifs
        Probabilities of bases at each place.
    sequences
        Codes, shape (n_sequences, length).
    rng
        Draws a site for each sequence; without one, all get the likeliest.

    Returns
    -------
    Tensor
        Shape (n_motifs, n_dimensions).
    """

    def mean_embedding(codes: np.ndarray) -> torch.Tensor:
        mean: torch.Tensor = model.tower(torch.from_numpy(codes).to(model.device)).mean(0)
        return mean

    before = mean_embedding(sequences)
    return torch.stack([mean_embedding(_with_motif(sequences, m, rng)) - before for m in motifs.values()])


def mutation_effects(model: Any, sequence: np.ndarray, response: torch.Tensor) -> np.ndarray:
    """Return the change of the log odds of a cell when each base of a sequence is replaced by each other.

    Parameters
    ----------
    model
        A model with a ``tower``.
    sequence
        Codes, shape (length,).
    response
        What the embedding is multiplied with, shape (n_dimensions,).

    Returns
    -------
    ndarray
        Shape (length, 4); 0 where the base is the one that is there.
    """
    length = len(sequence)
    places, bases = np.arange(length)[:, None], np.arange(4)
    mutants = np.tile(sequence, (length, 4, 1))
    mutants[places, bases, places] = bases
    codes = torch.from_numpy(np.concatenate([sequence[None], mutants.reshape(-1, length)]))
    scores = (model.tower(codes.to(model.device)) @ response).cpu().numpy()
    return (scores[1:] - scores[0]).reshape(length, 4)


def _with_motif(sequences: np.ndarray, motif: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    start = (sequences.shape[1] - len(motif)) // 2
    site: np.ndarray = motif.argmax(1)
    if rng is not None:
        drawn = rng.random((len(sequences), len(motif), 1))
        site = (drawn > motif.cumsum(1)[:, :3]).sum(-1)
    changed = sequences.copy()
    window = changed[:, start : start + len(motif)]
    # Of the likeliest site, a place at which the motif prefers nothing keeps the base of the background.
    window[:] = site if rng is not None else np.where(motif.max(1) > motif.min(1), site, window)
    return changed
