"""Probabilistic models for single-cell omics, built on Pyro.

The names below are loaded on first use, so that ``import pyrocell`` costs nothing by itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyrocell import data, distributions, errors, infer, models, nn, plotting, report, settings, testing
    from pyrocell.infer import DifferentialOptions, TrainingPlan
    from pyrocell.models import (
        PEAKVI,
        SCANVI,
        SCBASSET,
        SCVI,
        TOTALVI,
        VELOVI,
        CellAssign,
        CellModel,
        RNAStereoscope,
        SpatialStereoscope,
        Tangram,
        TangramWeights,
    )

__version__ = "0.1.0"

# Public name -> the module that defines it.
_OBJECTS = {
    "SCVI": "pyrocell.models",
    "SCANVI": "pyrocell.models",
    "TOTALVI": "pyrocell.models",
    "PEAKVI": "pyrocell.models",
    "VELOVI": "pyrocell.models",
    "Tangram": "pyrocell.models",
    "SCBASSET": "pyrocell.models",
    "CellAssign": "pyrocell.models",
    "RNAStereoscope": "pyrocell.models",
    "SpatialStereoscope": "pyrocell.models",
    "CellModel": "pyrocell.models",
    "ClassifierOptions": "pyrocell.models",
    "TangramWeights": "pyrocell.models",
    "TrainingPlan": "pyrocell.infer",
    "DifferentialOptions": "pyrocell.infer",
}
_MODULES = (
    "data",
    "settings",
    "errors",
    "distributions",
    "nn",
    "infer",
    "models",
    "plotting",
    "report",
    "testing",
)

# In reading order: the models, what one writes a model from, options, then the folders from the ground up.
__all__ = [  # noqa: RUF022
    "SCVI",
    "SCANVI",
    "TOTALVI",
    "PEAKVI",
    "VELOVI",
    "Tangram",
    "SCBASSET",
    "CellAssign",
    "RNAStereoscope",
    "SpatialStereoscope",
    "CellModel",
    "ClassifierOptions",
    "TangramWeights",
    "TrainingPlan",
    "DifferentialOptions",
    "data",
    "settings",
    "errors",
    "distributions",
    "nn",
    "infer",
    "models",
    "plotting",
    "report",
    "testing",
]


def __getattr__(name: str) -> object:
    if name in _OBJECTS:
        value = getattr(import_module(_OBJECTS[name]), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
