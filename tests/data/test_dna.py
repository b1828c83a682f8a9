"""DNA of regions from FASTA files, its codes, shuffled sequences, and motifs."""

from __future__ import annotations

import gzip
import logging
import re

import anndata
import numpy as np
import pandas as pd
import pytest

from pyrocell.data import add_dna_sequence, encode_dna, read_fasta, read_motifs, shuffle_dna
from pyrocell.errors import DataError, SetupError

ONE = "ACGTACGTNNACGTTTGGCCAACCGGTTAA"
TWO = "ttgacatgcaTTTTTGGGGGCCCCCAAAAA"
FASTA = f">chr1 the first\n{ONE[:17]}\n{ONE[17:]}\n\n>chr2\r\n{TWO}\r\n"


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "genome.fa"
    path.write_bytes(FASTA.encode())
    return path


def regions(table=(("chr1", 8, 12), ("chr2", 11, 17), ("chr1", 20, 25))):
    adata = anndata.AnnData(np.ones((3, len(table)), dtype=np.float32))
    adata.var_names = [f"peak{i}" for i in range(len(table))]
    for column, values in zip(("chr", "start", "end"), zip(*table, strict=True), strict=True):
        adata.var[column] = list(values)
    return adata


# -------------------------------------------------------------------------------------------- the sequences


def test_sequences_lie_around_the_middle(fasta):
    adata = regions()
    add_dna_sequence(adata, fasta, seq_len=6, max_unknown=0.5)
    codes = adata.varm["dna_code"]
    assert codes.dtype == np.uint8 and codes.shape == (3, 6)
    expected = [ONE[7:13], TWO[11:17], ONE[19:25]]  # middles are 10, 14, 22
    assert ["".join("ACGTN"[code] for code in row) for row in codes] == expected
    add_dna_sequence(adata, fasta, seq_len=5, code_varm_key="odd", max_unknown=0.5)
    assert ["".join("ACGTN"[code] for code in row) for row in adata.varm["odd"]] == [
        ONE[8:13], TWO[12:17], ONE[20:25],
    ]  # fmt: skip


def test_gzip_and_names_with_coordinates(fasta, tmp_path):
    packed = tmp_path / "genome.fa.gz"
    packed.write_bytes(gzip.compress(FASTA.encode()))
    assert (
        list(read_fasta(packed))
        == list(read_fasta(fasta))
        == [("chr1", ONE.encode()), ("chr2", TWO.encode())]
    )
    plain, named = regions(), regions()
    add_dna_sequence(plain, fasta, seq_len=6, max_unknown=0.5)
    named.var_names = ["chr1:8-12", "chr2-11-17", "chr1_20_25"]
    named.var = named.var[[]]
    add_dna_sequence(named, packed, seq_len=6, max_unknown=0.5)
    np.testing.assert_array_equal(named.varm["dna_code"], plain.varm["dna_code"])
    renamed = regions()
    renamed.var.columns = ["contig", "from", "to"]
    keys = {"chr_var_key": "contig", "start_var_key": "from", "end_var_key": "to"}
    add_dna_sequence(renamed, fasta, seq_len=6, max_unknown=0.5, **keys)
    np.testing.assert_array_equal(renamed.varm["dna_code"], plain.varm["dna_code"])


def test_unknown_bases_are_counted(fasta, caplog):
    with caplog.at_level(logging.INFO, "pyrocell"):
        add_dna_sequence(regions(), fasta, seq_len=6, max_unknown=0.5)
    assert "2 bases of 1 regions are unknown" in caplog.text
    with pytest.raises(
        DataError, match=r"More than 10% of the bases of 1 regions are unknown \(N\): 'peak0'"
    ):
        add_dna_sequence(regions(), fasta, seq_len=6, max_unknown=0.1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([("chr1", 8, 12), ("chr1", 20, 31)], "1 regions lie outside the chromosome 'chr1', which has 30.*'peak1'"),
        ([("chr2", 0, 3), ("chr1", 8, 12)], "The 6 bases around the middle of 1 regions leave.*'chr2' of 30.*'peak0'"),
        ([("chr1", 8, 12), ("chr2", 26, 30)], "The 6 bases around the middle of 1 regions leave.*'peak1'"),
        ([("chr1", 8, 12), ("chrX", 8, 12)], "no record 'chrX', which 1 regions lie on: 'peak1'. It has 'chr1'"),
        ([("chr1", 12, 8), ("chr1", 8, 12)], "1 regions have no legal coordinates: 'peak0'"),
        ([("chr1", -1, 8), ("chr1", 8, "x")], "2 regions have no legal coordinates: 'peak0', 'peak1'"),
    ],
)  # fmt: skip
def test_regions_that_cannot_be_read_are_named(fasta, table, message):
    adata = regions(table)
    with pytest.raises(DataError, match=message):
        add_dna_sequence(adata, fasta, seq_len=6, max_unknown=0.5)
    assert not len(adata.varm)


def test_coordinates_that_are_not_there(fasta):
    adata = regions()
    with pytest.raises(SetupError, match="adata.var has 'start', 'end' of the columns"):
        add_dna_sequence(adata, fasta, seq_len=6, chr_var_key="chrom")
    adata.var = adata.var[[]]
    with pytest.raises(SetupError, match="3 names of regions are not like 'chr1:100-600': 'peak0'"):
        add_dna_sequence(adata, fasta, seq_len=6)
    with pytest.raises(SetupError, match="seq_len is 0"):
        add_dna_sequence(regions(), fasta, seq_len=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ACGT\n", "no FASTA file: it starts with b'ACGT'"),
        (b">chr1\n>chr2\nACGT\n", "The record 'chr1' of .* has no sequence"),
        (b"> \nACGT\n", "a record without a name"),
        (gzip.compress(b">chr1\n" + bytes(range(65, 91)) * 99)[:60], "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "damaged.fa"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_fasta(path))
    with pytest.raises(DataError, match="There is no file"):
        list(read_fasta(tmp_path / "absent.fa"))


def test_codes_of_letters():
    np.testing.assert_array_equal(encode_dna(["ACGTN", "acgtr"]), [[0, 1, 2, 3, 4]] * 2)
    with pytest.raises(DataError, match=r"unequal lengths: most have 3 bases, 1 have not: 'two \(2\)'"):
        encode_dna(["ACG", "AC", "GGG"], ["one", "two", "three"])
    with pytest.raises(
        DataError, match="letters that stand for no base: '-', 'U', in 2 of them: 'one', 'three'"
    ):
        encode_dna(["AUG", "ACC", "GG-"], ["one", "two", "three"])
    with pytest.raises(DataError, match="expected bases in each"):
        encode_dna(["", ""])


def test_letters_of_a_genome_that_are_no_bases(tmp_path):
    path = tmp_path / "genome.fa"
    path.write_text(FASTA.replace("CCAACC", "C*AACC"))
    with pytest.raises(
        DataError, match=r"regions on 'chr1' have letters that stand for no base: '\*', .*'peak2'"
    ):
        add_dna_sequence(regions(), path, seq_len=12, max_unknown=0.5)


# ------------------------------------------------------------------------------------------------ shuffling


def pairs(codes):
    return np.array([np.bincount(row[:-1] * 5 + row[1:], minlength=25) for row in codes.astype(int)])


def test_shuffling_keeps_pairs_of_neighbours():
    rng = np.random.default_rng(0)
    codes = rng.integers(5, size=(40, 60)).astype(np.uint8)
    codes[0], codes[1, 1:] = 2, 3  # one base alone; one base and then another
    shuffled = shuffle_dna(codes, np.random.default_rng(1))
    np.testing.assert_array_equal(pairs(shuffled), pairs(codes))
    assert (shuffled[2:] != codes[2:]).any(1).all()
    np.testing.assert_array_equal(shuffled, shuffle_dna(codes, np.random.default_rng(1)))


def test_every_shuffle_is_as_likely():
    """Of a short sequence all orders with the same pairs are known: each comes up equally often."""
    codes = np.array([[0, 1, 0, 2, 0, 1, 0, 3, 0]], dtype=np.uint8)
    rng = np.random.default_rng(0)
    found = pd.Series(["".join(map(str, shuffle_dna(codes, rng)[0])) for _ in range(1200)]).value_counts()
    assert len(found) == 12  # orders of two 1, a 2 and a 3
    assert np.abs(found - 100).max() < 5 * np.sqrt(100)


# --------------------------------------------------------------------------------------------------- motifs

MEME = """MEME version 4

ALPHABET= ACGT

strands: + -

MOTIF MA0001.1 FIRST
letter-probability matrix: alength= 4 w= 3 nsites= 20 E= 0
 0.9 0.05 0.03 0.02
 0.0 1.0 0.0 0.0
 0.25 0.25 0.25 0.249
URL http://example.org

MOTIF second
letter-probability matrix: alength=4 w=2
0 0 0 1
0 0 1 0
"""


def test_motifs_of_a_meme_file(tmp_path):
    path = tmp_path / "motifs.meme"
    path.write_text(MEME)
    found = read_motifs(path)
    assert list(found) == ["MA0001.1", "second"] and found["MA0001.1"].shape == (3, 4)
    np.testing.assert_allclose(found["MA0001.1"][0], [0.9, 0.05, 0.03, 0.02])
    np.testing.assert_allclose(found["MA0001.1"].sum(1), 1)
    np.testing.assert_array_equal(found["second"], [[0, 0, 0, 1], [0, 0, 1, 0]])


def test_motifs_of_a_fasta_file_and_of_a_mapping(tmp_path):
    path = tmp_path / "sites.fa"
    path.write_text(">a\nACG\n>b one\nRN\n>a\nATG\n")
    found = read_motifs(path)
    np.testing.assert_allclose(found["a"], [[1, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 1, 0]])
    np.testing.assert_allclose(found["b"], [[0.5, 0, 0.5, 0], [0.25] * 4])
    given = read_motifs({"b": "rn", "a": found["a"]})
    np.testing.assert_array_equal(given["a"], found["a"])
    np.testing.assert_array_equal(given["b"], found["b"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "neither a MEME file .* nor a FASTA file"),
        ("MEME version 4\nALPHABET= ACDEFGHIKLMNPQRSTVWY\n", "has the alphabet 'ACDEF.*expected ACGT"),
        ("MEME version 4\nALPHABET= ACGT\n", "has no motif"),
        (MEME.replace("0.9 0.05", "0.9 0.5"), "'MA0001.1' is no matrix of probabilities"),
        (MEME.replace("w= 3", "w= 4"), "'MA0001.1' is no matrix of probabilities"),
        (">a\nACG\n>a\nAC\n", "The sites of motif 'a' have unequal lengths"),
        (">a\nAXG\n", "The sites of motif 'a' have letters that stand for no base: 'X'"),
    ],
)
def test_damaged_motifs(tmp_path, text, message):
    path = tmp_path / "motifs"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_motifs(path)
    with pytest.raises(DataError, match="There is no file"):
        read_motifs(tmp_path / "absent")
    with pytest.raises(DataError, match=re.escape("'m' is no matrix of probabilities: its shape is (2, 3)")):
        read_motifs({"m": np.ones((2, 3)) / 3})
