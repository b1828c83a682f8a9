"""Pictures of what a model did and found; each function draws into one matplotlib ``Axes`` and returns it."""

from __future__ import annotations

from pyrocell.plotting.diagnosis import diagnosis
from pyrocell.plotting.effects import calls, effects
from pyrocell.plotting.figures import latent, predictive_check, training_curves, volcano

__all__ = ["calls", "diagnosis", "effects", "latent", "predictive_check", "training_curves", "volcano"]
