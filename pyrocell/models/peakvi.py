"""PEAKVI: a variational autoencoder of chromatin accessibility in single cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import pyro
import torch
from torch import nn

from pyrocell.data import Accessibility, Categories, Category, Cells, Continuous
from pyrocell.distributions import ScaledBernoulli, StandardNormal
from pyrocell.errors import SetupError
from pyrocell.infer.effects import kl_weighted, lazy_deterministic
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.base import CellModel
from pyrocell.models.options import check_choices, check_sizes
from pyrocell.nn import Covariates, DepthEncoder, RegionDecoder, RegionEncoder

if TYPE_CHECKING:
    from anndata import AnnData
    from pyro.distributions import TorchDistribution

__all__ = ["PEAKVI"]


class PEAKVI(CellModel):
    """Variational autoencoder of open chromatin with a Bernoulli likelihood.

    Per cell n and region j::

        z_n              ~ Normal(0, I)                              or softmax of it ("ln")
        accessibility_nj = sigmoid(f(z_n, batch_n, covariates_n))    probability that the region is open
        depth_n          = sigmoid(g(x_n))                           chance that an open region is seen in the cell
        region_factor_j  = sigmoid(b_j)                              chance that the region is seen where it is open
        x_nj             ~ Bernoulli(accessibility_nj * depth_n * region_factor_j)

    The guide is Normal in z, with mean and variance from a network that sees x. Depth and region factors have no prior:
    depth is a function of the cell's own regions, b a point estimate.

    Parameters
    ----------
    adata
        Cells by regions, set up with ``PEAKVI.setup_anndata``: 0 and 1, or fragment counts, which are read as 0 and 1.
    n_hidden
        Width of every hidden layer; by default the square root of the number of regions.
    n_latent
        Dimension of the latent z; by default the square root of ``n_hidden``.
    n_layers_encoder, n_layers_decoder
        Hidden layers.
    dropout_rate
        Dropout in the encoder.
    model_depth
        Whether cells have a depth factor, else it is 1.
    region_factors
        Whether regions have a factor, else it is 1.
    latent_distribution
        ``"normal"``, or ``"ln"`` for a latent on the simplex (logistic normal).
    kl_weight
        Weight of the KL term in the loss when warm-up is over: 1 is the bound itself and predicts held-out cells best;
        less gives a latent that is pulled less towards the prior, and shows cell types better. Bounds that are reported
        have weight 1.
    encode_covariates
        Whether the encoders see batch and covariates too.

    Raises
    ------
    SetupError
        If an option is impossible.
    DataError
        If the data cannot be used.

    Notes
    -----
    Fields: ``accessibility``, ``batch``, ``categorical_covariates``, ``continuous_covariates``.

    Sites: ``z`` (n_latent, no unit; ``w`` before the softmax of "ln"), ``accessibility`` (n_regions, probability),
    ``depth`` (1, probability), ``region_factor`` (n_regions, probability, the same for all cells), ``x`` (n_regions,
    0 or 1).

    When not to use it: where the number of fragments in a region is of interest, on bulk-like data in which most
    regions are open in most cells, or to read probabilities as absolute: only their product is identified, so compare
    cells and groups, not regions.

    Departures from the original: the KL weight is an option (1/4), not the minibatch size in disguise; the learning
    rate is 0.001; the variance of the guide has a floor of 1e-6; input is 0 and 1; the likelihood never saturates;
    early stopping watches the loss and keeps the best weights; differential accessibility is a difference of
    probabilities, group 1 minus group 2, up and down being two hypotheses.

    References
    ----------
    T. Ashuach, D. A. Reidenbach, A. Gayoso, N. Yosef. PeakVI: A deep generative model for single-cell chromatin
    accessibility analysis. Cell Reports Methods 2, 100182 (2022). https://doi.org/10.1016/j.crmeth.2022.100182
    """

    accessibility = Accessibility()
    batch = Category(optional=True)
    categorical_covariates = Categories()
    continuous_covariates = Continuous()

    latent_site = "z"
    accessibility_site = "accessibility"
    depth_site = "depth"
    region_site = "region_factor"
    observed_site = "x"
    feature_field = "accessibility"

    max_epochs_cap = 500
    kl_warmup_cap = 50
    default_early_stopping = True
    default_plan = TrainingPlan(optimizer="adamw", eps=1e-8, weight_decay=1e-3, patience=50)

    def __init__(
        self,
        adata: AnnData,
        n_hidden: int | None = None,
        n_latent: int | None = None,
        *,
        n_layers_encoder: int = 2,
        n_layers_decoder: int = 2,
        dropout_rate: float = 0.1,
        model_depth: bool = True,
        region_factors: bool = True,
        latent_distribution: Literal["normal", "ln"] = "normal",
        kl_weight: float = 0.25,
        encode_covariates: bool = False,
    ) -> None:
        super().__init__(adata)
        check_choices(self.constructor, {"latent_distribution": Literal["normal", "ln"]})
        check_sizes(self.constructor)
        if not (isinstance(kl_weight, int | float) and 0 <= kl_weight < math.inf):
            raise SetupError(f"kl_weight is {kl_weight!r}; expected a number of at least 0, such as 1.")
        self.latent_distribution, self.encode_covariates = latent_distribution, encode_covariates
        self.kl = kl_weighted(kl_weight)
        n_regions = self.data.size("accessibility")
        n_hidden = max(1, math.isqrt(n_regions)) if n_hidden is None else n_hidden
        n_latent = max(1, math.isqrt(n_hidden)) if n_latent is None else n_latent
        other = Covariates(
            sizes=tuple(self.data.sizes("categorical_covariates")),
            n_continuous=self.data.size("continuous_covariates"),
            inject=False,
        )
        with_batch = other.with_batch(self.data.size("batch"))
        seen = with_batch if encode_covariates else None
        self.encoder = RegionEncoder(
            n_regions,
            n_latent,
            n_hidden,
            n_batch=self.data.size("batch") if encode_covariates else 1,
            n_layers=n_layers_encoder,
            dropout=dropout_rate,
            batch_norm=False,
            layer_norm=True,
            covariates=other if encode_covariates else None,
            transform=None,
        )
        self.decoder = RegionDecoder(
            n_latent, n_regions, n_hidden, n_layers=n_layers_decoder, covariates=with_batch
        )
        self.depth_encoder = (
            DepthEncoder(n_regions, n_hidden, n_layers=n_layers_encoder, covariates=seen)
            if model_depth
            else None
        )
        self.region_logits = nn.Parameter(torch.zeros(n_regions)) if region_factors else None

    def model(self, cells: Cells) -> None:
        """Generate the regions seen open from a latent."""
        lazy_deterministic("region_factor", self._region_factor, event_dim=1)
        with self.plate(cells):
            z = self._latent(StandardNormal(self.encoder.n_latent))
            logits = self.decoder(z, cells.batch, cells.categorical_covariates, cells.continuous_covariates)
            lazy_deterministic("accessibility", logits.sigmoid, event_dim=1)
            depth_logits = self._depth_logits(cells)
            lazy_deterministic("depth", lambda: _chance(depth_logits, logits[..., :1]), event_dim=1)
            seen = ScaledBernoulli(logits, depth_logits=depth_logits, region_logits=self.region_logits)
            pyro.sample("x", seen.to_event(1), obs=cells.accessibility)

    def guide(self, cells: Cells) -> None:
        """Infer the latent from the regions seen open."""
        with self.plate(cells):
            seen = cells.as_input("accessibility", self.encoder)
            self._latent(self.encoder(seen, *self._seen_covariates(cells)))

    def _latent(self, distribution: TorchDistribution) -> torch.Tensor:
        """Draw z; the logistic-normal one is a softmax of the Gaussian site ``w``, whose KL is exact."""
        if self.latent_distribution == "normal":
            return pyro.sample("z", distribution, infer=self.kl)
        return pyro.deterministic("z", pyro.sample("w", distribution, infer=self.kl).softmax(-1), event_dim=1)

    def _depth_logits(self, cells: Cells) -> torch.Tensor | None:
        """Logit of the chance that an open region is seen in each cell, shape (B, 1)."""
        if self.depth_encoder is None:
            return None
        seen = cells.as_input("accessibility", self.depth_encoder)
        logits: torch.Tensor = self.depth_encoder(seen, *self._seen_covariates(cells))
        return logits

    def _region_factor(self) -> torch.Tensor:
        return _chance(self.region_logits, self.decoder.regions.bias)

    def _seen_covariates(self, cells: Cells) -> tuple[torch.Tensor, ...]:
        if not self.encode_covariates:
            return ()
        return cells.batch, cells.categorical_covariates, cells.continuous_covariates


def _chance(logits: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return the factor, or the one that it is where it is left out."""
    return torch.ones_like(like) if logits is None else logits.sigmoid()
