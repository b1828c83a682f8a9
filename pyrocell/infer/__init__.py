"""Inference over tensors: the objective, the training loop, posterior draws, comparisons, criticism."""

from __future__ import annotations

from pyrocell.infer.criticism import PredictiveCheck, check_predictions
from pyrocell.infer.diagnosis import Diagnosis
from pyrocell.infer.differential import differential
from pyrocell.infer.draws import Drawer, SiteDraws
from pyrocell.infer.effects import Record, Until, Warmup, lazy_deterministic
from pyrocell.infer.elbo import Elbo, ElboTerms
from pyrocell.infer.plan import TrainingPlan
from pyrocell.infer.scale_sampler import DifferentialOptions
from pyrocell.infer.trainer import Trainer

__all__ = [
    "Diagnosis",
    "DifferentialOptions",
    "Drawer",
    "Elbo",
    "ElboTerms",
    "PredictiveCheck",
    "Record",
    "SiteDraws",
    "Trainer",
    "TrainingPlan",
    "Until",
    "Warmup",
    "check_predictions",
    "differential",
    "lazy_deterministic",
]
