"""Data: what models read of an AnnData, checks before training, minibatches, and data to try things on."""

from __future__ import annotations

from pyrocell.data.abundances import Abundances
from pyrocell.data.accessibility import Accessibility
from pyrocell.data.base import Argument, Field, Frozen, Reader, column_reader, tensor_like
from pyrocell.data.categories import Categories, Category
from pyrocell.data.columns import Continuous, SizeFactor
from pyrocell.data.datasets import pbmc68k
from pyrocell.data.dna import add_dna_sequence, encode_dna, read_fasta, shuffle_dna
from pyrocell.data.fields import Counts
from pyrocell.data.minibatch import Cells, Dataset, prototype_cells
from pyrocell.data.motifs import read_motifs
from pyrocell.data.proteins import Proteins
from pyrocell.data.registration import make_setup_anndata, make_setup_mudata, read_setup, setup_of
from pyrocell.data.schema import Schema
from pyrocell.data.sequences import CellCategory, DnaSequence
from pyrocell.data.simulate import simulate_scvi, synthetic_iid
from pyrocell.data.sinks import Layer, Obsm
from pyrocell.data.slots import Slots
from pyrocell.data.velocity import filter_velocity_genes, smooth_velocity_layers
from pyrocell.data.zarr_sink import Zarr

# Data to start from, fields, how data are read, and what a new kind of field is made of.
__all__ = [  # noqa: RUF022
    "pbmc68k",
    "synthetic_iid",
    "simulate_scvi",
    "smooth_velocity_layers",
    "filter_velocity_genes",
    "add_dna_sequence",
    "read_fasta",
    "encode_dna",
    "shuffle_dna",
    "read_motifs",
    "Layer",
    "Obsm",
    "Zarr",
    "Counts",
    "Accessibility",
    "Abundances",
    "Category",
    "Categories",
    "Continuous",
    "SizeFactor",
    "Proteins",
    "DnaSequence",
    "CellCategory",
    "make_setup_anndata",
    "make_setup_mudata",
    "read_setup",
    "setup_of",
    "Schema",
    "Dataset",
    "Cells",
    "prototype_cells",
    "Field",
    "Argument",
    "Frozen",
    "Slots",
    "Reader",
    "column_reader",
    "tensor_like",
]
