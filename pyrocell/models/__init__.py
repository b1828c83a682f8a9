"""Models: the base that every model stands on, and one file for each model."""

from __future__ import annotations

from pyrocell.models.base import CellModel
from pyrocell.models.cellassign import CellAssign
from pyrocell.models.labels import ClassifierOptions
from pyrocell.models.peakvi import PEAKVI
from pyrocell.models.rna_stereoscope import RNAStereoscope
from pyrocell.models.scanvi import SCANVI
from pyrocell.models.scbasset import SCBASSET
from pyrocell.models.scvi import SCVI
from pyrocell.models.spatial_stereoscope import SpatialStereoscope
from pyrocell.models.tangram import Tangram
from pyrocell.models.terms import TangramWeights
from pyrocell.models.totalvi import TOTALVI
from pyrocell.models.velovi import VELOVI

__all__ = [
    "PEAKVI",
    "SCANVI",
    "SCBASSET",
    "SCVI",
    "TOTALVI",
    "VELOVI",
    "CellAssign",
    "CellModel",
    "ClassifierOptions",
    "RNAStereoscope",
    "SpatialStereoscope",
    "Tangram",
    "TangramWeights",
]
