"""Network blocks in plain torch: the one MLP, encoders, decoders, and how covariates enter them."""

from __future__ import annotations

from pyrocell.nn.accessibility import DepthEncoder, RegionDecoder, RegionEncoder
from pyrocell.nn.adversary import Adversary, reverse_gradient
from pyrocell.nn.classifier import Classifier
from pyrocell.nn.covariates import Covariates, InjectedLinear, indicators
from pyrocell.nn.decoders import DecoderOutput, ProfileDecoder
from pyrocell.nn.dna import DnaTower
from pyrocell.nn.effects import LinearEffects
from pyrocell.nn.encoders import GaussianEncoder
from pyrocell.nn.features import FeatureLinear, select_features
from pyrocell.nn.kinetics import KineticDecoder, Rates, divided_difference, induction, repression
from pyrocell.nn.mlp import MLP
from pyrocell.nn.proteins import ProteinDecoder, ProteinOutput, SkipDecoder

__all__ = [
    "MLP",
    "Adversary",
    "Classifier",
    "Covariates",
    "DecoderOutput",
    "DepthEncoder",
    "DnaTower",
    "FeatureLinear",
    "GaussianEncoder",
    "InjectedLinear",
    "KineticDecoder",
    "LinearEffects",
    "ProfileDecoder",
    "ProteinDecoder",
    "ProteinOutput",
    "Rates",
    "RegionDecoder",
    "RegionEncoder",
    "SkipDecoder",
    "divided_difference",
    "indicators",
    "induction",
    "repression",
    "reverse_gradient",
    "select_features",
]
