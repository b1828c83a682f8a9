"""Models written by a user of the library: the smallest complete one, one without a guide, one fully Bayesian."""

from __future__ import annotations

import pyro
import torch
from pyro.distributions import Normal, constraints
from pyro.nn import PyroParam, PyroSample

from pyrocell import CellModel
from pyrocell.data import Category, Counts
from pyrocell.distributions import NegativeBinomial, Poisson, StandardNormal
from pyrocell.nn import GaussianEncoder, ProfileDecoder


class BatchVAE(CellModel):
    """Negative-binomial VAE with a batch-conditioned decoder."""

    counts = Counts()
    batch = Category(optional=True)

    latent_site = "z"
    expression_site = "rho"

    def __init__(self, adata, n_latent=10, n_hidden=128):
        super().__init__(adata)
        n_genes, n_batch = self.data.size("counts"), self.data.size("batch")
        self.encoder = GaussianEncoder(n_genes, n_latent, n_hidden)
        self.decoder = ProfileDecoder(n_latent, n_genes, n_hidden, n_batch)
        self.theta = PyroParam(torch.ones(n_genes), constraints.positive)

    def model(self, cells):
        with self.plate(cells):
            z = pyro.sample("z", StandardNormal(self.encoder.n_latent))
            rho = pyro.deterministic("rho", self.decoder(z, cells.batch), event_dim=1)
            pyro.sample("x", NegativeBinomial(cells.library * rho, self.theta).to_event(1), obs=cells.counts)

    def guide(self, cells):
        with self.plate(cells):
            pyro.sample("z", self.encoder(cells.counts))


class PoissonFactors(CellModel):
    """Poisson factor model without a guide of its own: every latent, also those of single cells, is automatic."""

    counts = Counts()

    latent_site = "z"
    expression_site = "rho"

    def __init__(self, adata, n_latent=3):
        super().__init__(adata)
        self.n_latent = n_latent
        self.loadings = PyroSample(Normal(0.0, 1.0).expand([n_latent, self.data.size("counts")]).to_event(2))

    def model(self, cells):
        loadings = self.loadings
        with self.plate(cells):
            z = pyro.sample("z", StandardNormal(self.n_latent))
            scores = (z.unsqueeze(-2) @ loadings).squeeze(-2)  # both may have a leading dimension of draws
            rho = pyro.deterministic("rho", scores.softmax(-1), event_dim=1)
            pyro.sample("x", Poisson(cells.library * rho).to_event(1), obs=cells.counts)


class NoLatent(CellModel):
    """Mean profile alone: declares no role, so it has no verb that needs one."""

    counts = Counts()

    def __init__(self, adata):
        super().__init__(adata)
        self.profile = PyroParam(
            torch.ones(self.data.size("counts")) / self.data.size("counts"), constraints.simplex
        )

    def model(self, cells):
        with self.plate(cells):
            pyro.sample("x", Poisson(cells.library * self.profile).to_event(1), obs=cells.counts)

    def guide(self, cells):
        pass
