"""Networks of models of chromatin accessibility: layer norm and leaky ReLU, for inputs of zeros and ones."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pyrocell.distributions import NonZeros
from pyrocell.nn.covariates import Covariates, gather_codes
from pyrocell.nn.encoders import GaussianEncoder
from pyrocell.nn.features import FeatureLinear
from pyrocell.nn.mlp import MLP

__all__ = ["DepthEncoder", "RegionDecoder", "RegionEncoder"]


class RegionEncoder(GaussianEncoder):
    """Gaussian posterior over a latent from the regions seen open; arguments as of `GaussianEncoder`."""

    smallest_variance = 1e-6
    activation = nn.LeakyReLU


class DepthEncoder(nn.Module):
    """Logit of the chance that an open region is seen in a cell.

    Parameters
    ----------
    n_in
        Number of regions.
    n_hidden, n_layers
        As in :class:`~pyrocell.nn.MLP`; there is no dropout.
    covariates
        The covariates to condition on, the batch first.
    """

    reads_nonzeros: ClassVar[bool] = True

    def __init__(
        self, n_in: int, n_hidden: int = 128, *, n_layers: int = 2, covariates: Covariates | None = None
    ) -> None:
        super().__init__()
        self.mlp = _layers(n_in, n_hidden, n_layers, covariates)
        self.out = nn.Linear(n_hidden, 1)

    def forward(
        self,
        x: Tensor | NonZeros,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> Tensor:
        """Return logits, shape (..., B, 1); arguments as of `GaussianEncoder`."""
        out: Tensor = self.out(self.mlp(x, gather_codes(self.mlp.covariates, batch, categorical), continuous))
        return out


class RegionDecoder(nn.Module):
    """Logit of the probability that each region is open; within `select_features`, of the chosen ones only.

    Parameters
    ----------
    n_latent
        Dimension of the latent.
    n_regions
        Number of regions.
    n_hidden, n_layers
        As in :class:`~pyrocell.nn.MLP`; there is no dropout.
    covariates
        The covariates to condition on, the batch first.
    field
        Field of the data that the regions belong to.
    """

    def __init__(
        self,
        n_latent: int,
        n_regions: int,
        n_hidden: int = 128,
        *,
        n_layers: int = 2,
        covariates: Covariates | None = None,
        field: str = "accessibility",
    ) -> None:
        super().__init__()
        self.mlp = _layers(n_latent, n_hidden, n_layers, covariates)
        self.regions = FeatureLinear(n_hidden, n_regions, field=field)

    def forward(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> Tensor:
        """Return logits, shape (..., B, n_regions); arguments as of `ProfileDecoder`."""
        codes = gather_codes(self.mlp.covariates, batch, categorical)
        out: Tensor = self.regions(self.mlp(z, codes, continuous))
        return out


def _layers(n_in: int, n_hidden: int, n_layers: int, covariates: Covariates | None) -> MLP:
    return MLP(
        n_in,
        n_hidden,
        n_hidden=n_hidden,
        n_layers=n_layers,
        dropout=0.0,
        batch_norm=False,
        layer_norm=True,
        covariates=covariates or Covariates(sizes=(1,)),
        activation=nn.LeakyReLU,
    )
