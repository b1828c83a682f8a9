"""Models: the base that every model stands on, and one file for each model."""

from __future__ import annotations

from pyrocell.models.base import CellModel
from pyrocell.models.labels import ClassifierOptions
from pyrocell.models.peakvi import PEAKVI
from pyrocell.models.rna_stereoscope import RNAStereoscope
from pyrocell.models.scanvi import SCANVI
from pyrocell.models.scvi import SCVI
from pyrocell.models.spatial_stereoscope import SpatialStereoscope
from pyrocell.models.totalvi import TOTALVI

__all__ = [
    "PEAKVI",
    "SCANVI",
    "SCVI",
    "TOTALVI",
    "CellModel",
    "ClassifierOptions",
    "RNAStereoscope",
    "SpatialStereoscope",
]
