"""Motifs of transcription factors: from MEME and FASTA files, as probabilities of bases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pyrocell.data.dna import encode_dna, read_fasta
from pyrocell.errors import DataError

__all__ = ["read_motifs"]

Motif = str | np.ndarray
# Rows: what each letter of IUPAC may be, A, C, G, T.
_BASES = {
    "A": "A", "C": "C", "G": "G", "T": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT",
}  # fmt: skip


def read_motifs(source: str | Path | Mapping[str, Motif]) -> dict[str, np.ndarray]:
    """Return motifs by name, each as the probabilities of A, C, G, T at each place, shape (width, 4).

    Parameters
    ----------
    source
        A MEME file (minimal format: matrices of letter probabilities), or a FASTA file, plain or gzip. In a FASTA
        file each record is a binding site, in the letters of IUPAC; records of one name are sites of one motif, and
        are counted together. Or a mapping from names to such texts or to matrices.

    Raises
    ------
    DataError
        If the file is neither, a matrix is damaged, or sites of one motif have unequal lengths.
    """
    if isinstance(source, Mapping):
        return {str(name): _from_value(str(name), value) for name, value in source.items()}
    path = Path(source)
    if not path.is_file():
        raise DataError(f"There is no file {str(path)!r}; give the path of a MEME or FASTA file of motifs.")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith((b">", b"\x1f\x8b")):
        return _from_fasta(path)
    if start.startswith(b"MEME version"):
        return _from_meme(path.read_text(encoding="utf-8").splitlines(), path)
    raise DataError(
        f"{path} is neither a MEME file (it would start with 'MEME version') nor a FASTA file ('>'): it starts with "
        f"{start[:20]!r}."
    )


def _from_value(name: str, value: Motif) -> np.ndarray:
    if isinstance(value, str):
        return _probabilities([value], name)
    return _checked(np.asarray(value, dtype=float), name, "The motif")


def _probabilities(sites: list[str], name: str) -> np.ndarray:
    """Count the bases of the sites of one motif, a letter for several bases as a part of each."""
    encode_dna(sites, where=f"The sites of motif {name!r}")  # refuses other letters, and unequal lengths
    rows = {letter: np.isin(list("ACGT"), list(bases)) / len(bases) for letter, bases in _BASES.items()}
    return np.mean([[rows[letter] for letter in site.upper()] for site in sites], axis=0)


def _from_fasta(path: Path) -> dict[str, np.ndarray]:
    sites: dict[str, list[str]] = {}
    for name, sequence in read_fasta(path):
        sites.setdefault(name, []).append(sequence.decode("ascii", errors="replace"))
    return {name: _probabilities(found, name) for name, found in sites.items()}


def _from_meme(lines: list[str], path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    rest = iter(lines)
    name = ""
    for line in rest:
        if line.startswith("ALPHABET") and "ACGT" not in line:
            raise DataError(f"{path} has the alphabet {line.partition('=')[2].strip()!r}; expected ACGT.")
        if line.startswith("MOTIF"):
            name = line.split()[1] if len(line.split()) > 1 else ""
        elif line.startswith("letter-probability matrix") and name:
            found[name] = _checked(_matrix(rest, _width(line)), name, str(path))
    if not found:
        raise DataError(f"{path} has no motif: no 'MOTIF name' with a 'letter-probability matrix' after it.")
    return found


def _width(line: str) -> int | None:
    """Return what is said of the number of rows, if anything."""
    words = line.replace("=", "= ").split()
    return int(words[words.index("w=") + 1]) if "w=" in words else None


def _matrix(lines: Iterator[str], width: int | None) -> np.ndarray:
    """Read the rows of numbers that come next: as many as said, or up to a line of something else."""
    rows: list[list[float]] = []
    while len(rows) != width and (words := next(lines, "").split()):
        try:
            rows.append([float(word) for word in words])
        except ValueError:
            break
    same = len({len(row) for row in rows}) == 1 and width in (None, len(rows))
    return np.array(rows if same else [], dtype=float)


def _checked(matrix: np.ndarray, name: str, where: str) -> np.ndarray:
    """Require probabilities of four bases, and bring rounded ones to the sum of one."""
    legal = matrix.ndim == 2 and matrix.shape[1:] == (4,) and len(matrix) and (matrix >= 0).all()
    if not legal or np.abs(matrix.sum(1) - 1).max() > 0.01:
        raise DataError(
            f"{where}: {name!r} is no matrix of probabilities: its shape is {matrix.shape}. Expected a row for each "
            "place, with the probabilities of A, C, G, T, which sum to one."
        )
    return matrix / matrix.sum(1, keepdims=True)
