"""Distributions of counts with exact float32 log-probabilities and a fast path for zeros; the latent prior."""

from __future__ import annotations

from pyrocell.distributions.accessibility import ScaledBernoulli
from pyrocell.distributions.base import CountDistribution
from pyrocell.distributions.beta_binomial import BetaBinomial
from pyrocell.distributions.counts import NonZeros, attach_nonzeros, log1p_counts
from pyrocell.distributions.dirichlet import Dirichlet
from pyrocell.distributions.gamma import log_rising
from pyrocell.distributions.nb_mixture import NegativeBinomialMixture
from pyrocell.distributions.negative_binomial import NegativeBinomial, ZeroInflatedNegativeBinomial
from pyrocell.distributions.normal_mixture import NormalMixture
from pyrocell.distributions.poisson import Poisson, ZeroInflatedPoisson
from pyrocell.distributions.softmax_mean import SoftmaxMean
from pyrocell.distributions.standard_normal import StandardNormal

__all__ = [
    "BetaBinomial",
    "CountDistribution",
    "Dirichlet",
    "NegativeBinomial",
    "NegativeBinomialMixture",
    "NonZeros",
    "NormalMixture",
    "Poisson",
    "ScaledBernoulli",
    "SoftmaxMean",
    "StandardNormal",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
    "attach_nonzeros",
    "log1p_counts",
    "log_rising",
]
