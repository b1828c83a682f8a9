"""Network blocks in plain torch: the one MLP, encoders, decoders, and how covariates enter them."""

from __future__ import annotations

from pyrocell.nn.covariates import Covariates, InjectedLinear
from pyrocell.nn.decoders import DecoderOutput, ProfileDecoder
from pyrocell.nn.encoders import GaussianEncoder
from pyrocell.nn.features import FeatureLinear, select_features
from pyrocell.nn.mlp import MLP

__all__ = [
    "MLP",
    "Covariates",
    "DecoderOutput",
    "FeatureLinear",
    "GaussianEncoder",
    "InjectedLinear",
    "ProfileDecoder",
    "select_features",
]
