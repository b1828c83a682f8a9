"""DNA as numbers: the sequence of each region from a FASTA file, and sequences to compare with."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrocell import settings
from pyrocell.errors import DataError, SetupError, list_some

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["N_CODES", "UNKNOWN", "add_dna_sequence", "encode_dna", "read_fasta", "shuffle_dna"]

N_CODES = 5
UNKNOWN = 4
"""Code of a base that is not known; networks see it as a quarter of each."""
_AMBIGUOUS = "NRYSWKMBDHV"
_NO_CODE = 255
_CODES = np.full(256, _NO_CODE, dtype=np.uint8)
for _code, _letters in enumerate(("Aa", "Cc", "Gg", "Tt", _AMBIGUOUS + _AMBIGUOUS.lower())):
    _CODES[[ord(letter) for letter in _letters]] = _code
_NAME = r"^(?P<chr>.+?)[:_-](?P<start>\d+)[-_](?P<end>\d+)$"


def read_fasta(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name (up to the first blank) and the letters of each record of a FASTA file, one in memory at a time.

    Parameters
    ----------
    path
        The file, plain or compressed with gzip.

    Raises
    ------
    DataError
        If the file is no FASTA, or a record is empty.
    """
    path = Path(path)
    name, lines = "", list[bytes]()
    for line in _lines(path):
        if line.startswith(b">"):
            if name:
                yield name, _joined(lines, name, path)
            name, lines = line[1:].decode(errors="replace").partition(" ")[0].partition("\t")[0], []
            if not name:
                raise DataError(f"{path} has a record without a name; write one right after each '>'.")
        elif not name:
            raise DataError(
                f"{path} is no FASTA file: it starts with {line[:20]!r}, not with '>' and a name."
            )
        else:
            lines.append(line)
    if not name:
        raise DataError(f"{path} is empty; expected a FASTA file.")
    yield name, _joined(lines, name, path)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines that are not blank, whether compressed or not."""
    if not path.is_file():
        raise DataError(f"There is no file {str(path)!r}; give the path of a FASTA file, plain or .gz.")
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            yield from filter(None, map(bytes.strip, file))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again.") from error


def _joined(lines: list[bytes], name: str, path: Path) -> bytes:
    if not lines:
        raise DataError(f"The record {name!r} of {path} has no sequence.")
    return b"".join(lines)


def encode_dna(
    sequences: Sequence[str | bytes], names: Sequence[object] | None = None, *, where: str = "The sequences"
) -> np.ndarray:
    """Turn sequences of equal length into codes: 0 to 3 for A, C, G, T (or a, c, g, t), 4 for N and the like.

    Parameters
    ----------
    sequences
        One or more, all of one length.
    names
        Their names, for messages; by default their positions.
    where
        What messages call them.

    Returns
    -------
    ndarray
        uint8, shape (n_sequences, length).

    Raises
    ------
    DataError
        If lengths differ, or a letter stands for no base.
    """
    names = range(len(sequences)) if names is None else names
    letters = [text.encode() if isinstance(text, str) else text for text in sequences]
    lengths = np.array([len(text) for text in letters])
    if len(letters) == 0 or lengths.min() == 0:
        raise DataError(f"{where} are {len(letters)}, some of them perhaps empty; expected bases in each.")
    usual = int(np.bincount(lengths).argmax())
    odd = [f"{name} ({n})" for name, n in zip(names, lengths, strict=True) if n != usual]
    if odd:
        raise DataError(
            f"{where} have unequal lengths: most have {usual} bases, {len(odd)} have not: {list_some(odd)}. Cut all to "
            "the same length, around the middle of each region."
        )
    codes = _CODES[np.frombuffer(b"".join(letters), dtype=np.uint8)].reshape(len(letters), usual)
    _refuse_letters(codes, letters, names, where)
    return codes


def _refuse_letters(codes: np.ndarray, letters: list[bytes], names: Sequence[object], where: str) -> None:
    rows, columns = np.nonzero(codes == _NO_CODE)
    if len(rows):
        found = sorted({chr(letters[row][column]) for row, column in zip(rows, columns, strict=True)})
        owners = [names[row] for row in np.unique(rows)]
        raise DataError(
            f"{where} have letters that stand for no base: {list_some(found)}, in {len(owners)} of them: "
            f"{list_some(owners)}. Expected A, C, G, T, and N or another code of IUPAC for an unknown base."
        )


def add_dna_sequence(
    adata: AnnData,
    fasta: str | Path,
    *,
    seq_len: int = 1344,
    chr_var_key: str = "chr",
    start_var_key: str = "start",
    end_var_key: str = "end",
    code_varm_key: str = "dna_code",
    max_unknown: float = 0.05,
) -> None:
    """Write the DNA around the middle of each region into ``adata.varm``, as codes of bases.

    The codes are those of `encode_dna`. The file is read once, one chromosome in memory at a time. Nothing is
    downloaded.

    Parameters
    ----------
    adata
        Cells by regions; ``adata.varm[code_varm_key]`` is added, uint8, shape (n_regions, seq_len).
    fasta
        FASTA file of the genome that the regions were called on, plain or compressed with gzip. One record is one
        chromosome.
    seq_len
        Number of bases: half of them before the middle, (start + end) // 2, half from there on.
    chr_var_key, start_var_key, end_var_key
        Columns of ``adata.var`` with the chromosome, as the FASTA names it, and the first base, counted from 0, and
        the end of each region. Where none of them is there, names such as ``chr1:100-600`` are read.
    code_varm_key
        Entry of ``adata.varm`` to write.
    max_unknown
        Largest fraction of unknown bases (N) in one sequence.

    Raises
    ------
    SetupError
        If the coordinates are not there.
    DataError
        If the FASTA lacks a chromosome, a region or its sequence leaves the chromosome, or too many bases are unknown.
        The message names the regions.
    """
    if seq_len < 1 or not 0 <= max_unknown <= 1:
        raise SetupError(
            f"seq_len is {seq_len} and max_unknown is {max_unknown}; expected at least one base, and a fraction."
        )
    regions = _coordinates(adata, (chr_var_key, start_var_key, end_var_key))
    first = (regions["start"] + regions["end"]) // 2 - seq_len // 2
    codes = np.full((len(regions), seq_len), UNKNOWN, dtype=np.uint8)
    wanted, there = regions.groupby("chr", sort=False).indices, list[str]()
    for name, sequence in read_fasta(fasta):
        there.append(name)
        if name in wanted:
            rows = wanted.pop(name)
            starts = first.to_numpy()[rows]
            _require_inside(regions.iloc[rows], starts, len(sequence), seq_len)
            windows = [sequence[start : start + seq_len] for start in starts]
            codes[rows] = encode_dna(
                windows, list(regions.index[rows]), where=f"The sequences of regions on {name!r}"
            )
    if wanted:
        lost = regions.index[regions["chr"].isin(list(wanted))]
        raise DataError(
            f"{fasta} has no record {list_some(wanted)}, which {len(lost)} regions lie on: {list_some(lost)}. It has "
            f"{list_some(there)}. Give the FASTA of the same genome, with chromosomes of the same names, or remove the "
            "regions."
        )
    _tell_unknown((codes == UNKNOWN).sum(1), regions.index, seq_len, max_unknown)
    adata.varm[code_varm_key] = codes


def _coordinates(adata: AnnData, keys: tuple[str, str, str]) -> pd.DataFrame:
    """Return chr, start and end of each region, checked."""
    here = [key for key in keys if key in adata.var]
    if here and len(here) < 3:
        raise SetupError(
            f"adata.var has {list_some(here)} of the columns {list_some(keys)}; expected all three, or none and names "
            f"such as 'chr1:100-600'. It has {list_some(adata.var.columns, 20)}."
        )
    if here:
        table = adata.var[list(keys)].set_axis(["chr", "start", "end"], axis=1)
    else:
        table = adata.var_names.astype(str).str.extract(_NAME).set_axis(adata.var_names, axis=0)
        if table.isna().any(axis=None):
            odd = table.index[table.isna().any(axis=1)]
            raise SetupError(
                f"adata.var has no columns {list_some(keys)}, and {len(odd)} names of regions are not like "
                f"'chr1:100-600': {list_some(odd)}. Name the columns: chr_var_key=, start_var_key=, end_var_key=."
            )
    numbers = table[["start", "end"]].apply(pd.to_numeric, errors="coerce")
    wrong = numbers.isna().any(axis=1) | (numbers["start"] < 0) | (numbers["end"] <= numbers["start"])
    wrong |= table["chr"].isna()
    if wrong.any():
        raise DataError(
            f"{wrong.sum()} regions have no legal coordinates: {list_some(table.index[wrong])}. Expected a chromosome "
            "and 0 <= start < end."
        )
    return numbers.astype(np.int64).assign(chr=table["chr"].astype(str))


def _require_inside(regions: pd.DataFrame, first: np.ndarray, length: int, seq_len: int) -> None:
    """Raise a DataError if a region, or the sequence around its middle, leaves its chromosome."""
    name = regions["chr"].iloc[0]
    outside = regions.index[regions["end"] > length]
    if len(outside):
        raise DataError(
            f"{len(outside)} regions lie outside the chromosome {name!r}, which has {length} bases in the FASTA: "
            f"{list_some(outside)}. Is the FASTA that of the genome build on which the regions were called?"
        )
    over = regions.index[(first < 0) | (first + seq_len > length)]
    if len(over):
        raise DataError(
            f"The {seq_len} bases around the middle of {len(over)} regions leave the chromosome {name!r} of {length} "
            f"bases: {list_some(over)}. Remove these regions, or take a smaller seq_len."
        )


def _tell_unknown(n_unknown: np.ndarray, names: pd.Index, seq_len: int, max_unknown: float) -> None:
    many = n_unknown > max_unknown * seq_len
    if many.any():
        raise DataError(
            f"More than {max_unknown:.0%} of the bases of {many.sum()} regions are unknown (N): "
            f"{list_some(names[many])}. Remove these regions, or allow more with max_unknown=."
        )
    if n_unknown.any():
        settings.logger.info(
            "%d bases of %d regions are unknown (N); the model sees a quarter of each base there.",
            n_unknown.sum(),
            (n_unknown > 0).sum(),
        )


def shuffle_dna(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffle each sequence, keeping how often each pair of neighbouring bases occurs.

    Parameters
    ----------
    codes
        As of `encode_dna`, shape (n_sequences, length).
    rng
        Random numbers.

    Returns
    -------
    ndarray
        Shape as given; first and last base of each sequence stay.

    References
    ----------
    S. F. Altschul, B. W. Erickson. Significance of nucleotide sequence alignments: a method for random sequence
    permutation that preserves dinucleotide and codon usage. Molecular Biology and Evolution 2, 526-538 (1985).
    """
    return np.array([_shuffled(row, rng) for row in codes], dtype=np.uint8).reshape(codes.shape)


def _shuffled(row: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Walk every edge of the graph of neighbouring bases once, in a random order."""
    followers = {int(base): row[1:][row[:-1] == base] for base in np.unique(row[:-1])}
    last = int(row[-1])
    exits = _exits(followers, last, rng)
    ways: dict[int, Iterator[int]] = {}
    for base, after in followers.items():
        rest = after.tolist()
        if base in exits:
            rest.remove(exits[base])
        ways[base] = iter(
            [*rng.permutation(rest).astype(int).tolist(), *([exits[base]] if base in exits else [])]
        )
    walk = [int(row[0])]
    while len(walk) < len(row):
        walk.append(next(ways[walk[-1]]))
    return walk


def _exits(followers: dict[int, np.ndarray], last: int, rng: np.random.Generator) -> dict[int, int]:
    """Choose the edge by which each base is left for good, such that all ways end at the last base."""
    while True:
        exits = {base: int(rng.choice(after)) for base, after in followers.items() if base != last}
        if all(_arrives(base, exits, last) for base in exits):
            return exits


def _arrives(base: int, exits: dict[int, int], last: int) -> bool:
    for _ in range(len(exits) + 1):
        if base == last:
            return True
        base = exits[base]
    return False
