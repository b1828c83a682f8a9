"""Models: the base that every model stands on, and one file for each model."""

from __future__ import annotations

from pyrocell.models.base import CellModel
from pyrocell.models.scvi import SCVI

__all__ = ["SCVI", "CellModel"]
