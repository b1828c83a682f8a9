"""SCVI: a variational autoencoder of single-cell counts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import pyro
import torch
from pyro.distributions import Normal, TorchDistribution
from torch import nn
from torch.nn import functional

from pyrocell.data import Categories, Category, Cells, Continuous, Counts, SizeFactor
from pyrocell.distributions import (
    NegativeBinomial,
    Poisson,
    StandardNormal,
    ZeroInflatedNegativeBinomial,
    log1p_counts,
)
from pyrocell.errors import SetupError
from pyrocell.infer.effects import NO_WARMUP, lazy_deterministic
from pyrocell.models.base import CellModel
from pyrocell.models.options import check_choices, check_sizes, of_group
from pyrocell.nn import Covariates, DecoderOutput, GaussianEncoder, ProfileDecoder

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["SCVI"]

Likelihood = Literal["zinb", "nb", "poisson", "normal"]
Dispersion = Literal["gene", "gene-batch", "gene-label", "gene-cell"]


class SCVI(CellModel):
    """Variational autoencoder of counts with a (zero-inflated) negative binomial likelihood.

    Per cell n and gene g::

        z_n        ~ Normal(0, I)                        or softmax of it ("ln")
        rho_n      = softmax(f(z_n, batch_n, covariates_n))
        library_n  = log total counts of the cell        or ~ Normal(mean and variance of its batch)
        mu_ng      = exp(library_n) * rho_ng
        x_ng       ~ ZINB(mu_ng, theta_g, zi_logits_ng), NB(mu_ng, theta_g), Poisson(mu_ng) or Normal

    The guide is Normal in z (and in library, where latent), with mean and variance from a network that sees log1p(x).

    Parameters
    ----------
    adata
        Raw counts, set up with ``SCVI.setup_anndata``.
    n_hidden
        Width of every hidden layer.
    n_latent
        Dimension of the latent z.
    n_layers
        Hidden layers of the encoder and of the decoder.
    dropout_rate
        Dropout in the encoder.
    dispersion
        What has an inverse dispersion theta of its own: ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or
        ``"gene-cell"``.
    gene_likelihood
        ``"zinb"``, ``"nb"``, ``"poisson"``, or ``"normal"`` for log-normalised values.
    use_observed_lib_size
        Take each cell's total count as its size; otherwise the size is latent.
    latent_distribution
        ``"normal"``, or ``"ln"`` for a latent on the simplex (logistic normal).
    encode_covariates
        Whether the encoder sees batch and covariates too.
    batch_representation
        ``"one-hot"``, or ``"embedding"`` for a learned vector of length 5.

    Raises
    ------
    SetupError
        If an option is unknown, or needs a field that was not set up.
    DataError
        If the counts cannot be used.

    Notes
    -----
    Fields: ``counts``, ``batch``, ``label``, ``size_factor``, ``categorical_covariates``, ``continuous_covariates``.

    Sites: ``z`` (n_latent, no unit; ``w`` before the softmax of "ln"), ``library`` (1, log counts, if latent), ``rho``
    (n_genes, fraction of the cell's transcripts; counts per unit of the size factor, where one is given), ``size`` (1,
    counts), ``mu`` (n_genes, expected counts), ``x`` (n_genes, counts).

    When not to use it: on normalised values (but for ``"normal"``), on fewer cells than a few hundred, or where a
    linear picture suffices and each dimension must be read as a gene programme.

    Departures from the original: the decoder works on the log scale throughout, with no epsilon; warm-up ends by
    default; only the heads in use are built; the guide of a latent library departs from the total count; cells without
    counts are refused; continuous covariates are standardised; ``"normal"`` has an unconstrained mean and no library.

    References
    ----------
    R. Lopez, J. Regier, M. B. Cole, M. I. Jordan, N. Yosef. Deep generative modeling for single-cell transcriptomics.
    Nature Methods 15, 1053-1058 (2018). https://doi.org/10.1038/s41592-018-0229-2
    """

    counts = Counts()
    batch = Category(optional=True)
    label = Category(optional=True, query_may_lack=True)
    size_factor = SizeFactor()
    categorical_covariates = Categories()
    continuous_covariates = Continuous()

    latent_site = "z"
    expression_site = "rho"
    library_site = "size"
    batch_parameters = ("log_theta", "library_mean", "library_sd")

    max_epochs_cap = 80
    default_lr = 1e-2
    default_lr_decay = 0.5

    def __init__(
        self,
        adata: AnnData,
        n_hidden: int = 128,
        n_latent: int = 10,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        *,
        dispersion: Dispersion = "gene",
        gene_likelihood: Likelihood = "zinb",
        use_observed_lib_size: bool = True,
        latent_distribution: Literal["normal", "ln"] = "normal",
        encode_covariates: bool = False,
        batch_representation: Literal["one-hot", "embedding"] = "one-hot",
    ) -> None:
        super().__init__(adata)
        self._check_options()
        self.gene_likelihood, self.dispersion = gene_likelihood, dispersion
        self.encode_covariates, self.latent_distribution = encode_covariates, latent_distribution
        self.latent_library = not use_observed_lib_size
        self.expression_effect = "difference" if gene_likelihood == "normal" else "log2_ratio"

        n_genes, n_batch = self.data.size("counts"), self.data.size("batch")
        covariates = Covariates(
            sizes=tuple(self.data.sizes("categorical_covariates")),
            n_continuous=self.data.size("continuous_covariates"),
            embedding_dim=5 if batch_representation == "embedding" else None,
        )
        encoder = partial(
            GaussianEncoder,
            n_genes,
            n_hidden=n_hidden,
            n_batch=n_batch if encode_covariates else 1,
            dropout=dropout_rate,
            covariates=covariates if encode_covariates else None,
            transform=None if gene_likelihood == "normal" else log1p_counts,
        )
        self.encoder = encoder(n_latent=n_latent, n_layers=n_layers)
        if self.latent_library:
            # Normalising over the minibatch would blur what this network is to find: the size itself.
            self.library_encoder = encoder(n_latent=1, batch_norm=False, layer_norm=True)
            self.library_mean, self.library_sd = self._library_prior()
        heads: list[Literal["dispersion", "zero_inflation"]] = []
        if dispersion == "gene-cell" and gene_likelihood != "poisson":
            heads.append("dispersion")
        if gene_likelihood == "zinb":
            heads.append("zero_inflation")
        self.decoder = ProfileDecoder(
            n_latent,
            n_genes,
            n_hidden,
            n_batch,
            n_layers=n_layers,
            covariates=covariates,
            heads=heads,
            profile=self._profile(),
        )
        rows = {"gene-batch": (n_batch,), "gene-label": (self.data.size("label"),)}
        if dispersion != "gene-cell" and gene_likelihood != "poisson":
            self.log_theta = nn.Parameter(torch.randn(*rows.get(dispersion, ()), n_genes))

    def _check_options(self) -> None:
        options = self.constructor
        choices = {
            "dispersion": Dispersion,
            "gene_likelihood": Likelihood,
            "latent_distribution": Literal["normal", "ln"],
            "batch_representation": Literal["one-hot", "embedding"],
        }
        check_choices(options, choices)
        check_sizes(options)
        if options["dispersion"] == "gene-label" and not self.data.has("label"):
            raise SetupError('dispersion="gene-label" needs labels; set up the data with labels_key=.')
        if not options["use_observed_lib_size"] and self.data.has("size_factor"):
            raise SetupError(
                "A size factor was set up, so the library cannot be latent; drop one of the two."
            )

    def model(self, cells: Cells) -> None:
        """Generate counts from a latent."""
        with self.plate(cells):
            self._generate(cells, self._latent(StandardNormal(self.encoder.n_latent)))

    def guide(self, cells: Cells) -> None:
        """Infer the latent from log counts."""
        with self.plate(cells):
            self._infer(cells)

    def _generate(self, cells: Cells, z: torch.Tensor) -> None:
        """Draw counts given the latent."""
        out = self.decoder.heads(z, cells.batch, cells.categorical_covariates, cells.continuous_covariates)
        lazy_deterministic("rho", lambda: self._rho(out), event_dim=1)
        log_size = self._log_size(cells)
        lazy_deterministic("size", lambda: self._size(cells, log_size), event_dim=1)
        lazy_deterministic("mu", lambda: self._rho(out) * self._size(cells, log_size), event_dim=1)
        pyro.sample("x", self._likelihood(cells, out, log_size).to_event(1), obs=cells.counts)

    def _infer(self, cells: Cells) -> torch.Tensor:
        """Draw the latents of SCVI given counts; returns z."""
        seen = (
            (cells.batch, cells.categorical_covariates, cells.continuous_covariates)
            if self.encode_covariates
            else ()
        )
        z = self._latent(self.encoder(cells.as_input("counts", self.encoder), *seen))
        if self.latent_library:
            departure = self.library_encoder(cells.as_input("counts", self.library_encoder), *seen).base_dist
            library = Normal(departure.loc + cells.library.log(), departure.scale)
            pyro.sample("library", library.to_event(1), infer=NO_WARMUP)
        return z

    def _latent(self, distribution: TorchDistribution) -> torch.Tensor:
        """Draw z; the logistic-normal one is a softmax of the Gaussian site ``w``, whose KL is exact."""
        if self.latent_distribution == "normal":
            return pyro.sample("z", distribution)
        return pyro.deterministic("z", pyro.sample("w", distribution).softmax(-1), event_dim=1)

    def _log_size(self, cells: Cells) -> torch.Tensor:
        """Log size of each cell in counts, shape (B, 1)."""
        if cells.size_factor is not None:
            return cells.size_factor.log()
        if not self.latent_library:
            return cells.library.log()
        prior = Normal(self.library_mean[cells.batch], self.library_sd[cells.batch]).to_event(1)
        # The library's KL is never warmed up: its prior is data, and without it the size drifts.
        return pyro.sample("library", prior, infer=NO_WARMUP)

    def _size(self, cells: Cells, log_size: torch.Tensor) -> torch.Tensor:
        if self.gene_likelihood == "normal":  # a mean of normalised values has no size
            return torch.ones_like(log_size)
        observed = not self.latent_library and cells.size_factor is None
        return cells.library if observed else log_size.exp()  # exp(log(566)) is not 566

    def _likelihood(self, cells: Cells, out: DecoderOutput, log_size: torch.Tensor) -> TorchDistribution:
        if self.gene_likelihood == "normal":
            return Normal(out.log_rho, functional.softplus(self._log_theta(cells, out)) + 1e-3)
        log_mean = out.log_mean(log_size)
        if self.gene_likelihood == "poisson":
            return Poisson(log_rate=log_mean)
        log_theta = self._log_theta(cells, out)
        if self.gene_likelihood == "nb":
            return NegativeBinomial(log_mean=log_mean, log_theta=log_theta)
        zi_logits = cast("torch.Tensor", out.zi_logits)  # built for this likelihood
        return ZeroInflatedNegativeBinomial(log_mean=log_mean, log_theta=log_theta, zi_logits=zi_logits)

    def _log_theta(self, cells: Cells, out: DecoderOutput) -> torch.Tensor:
        if self.dispersion == "gene-cell":
            return cast("torch.Tensor", out.log_theta)
        return of_group(self.log_theta, self.dispersion, cells)

    def _rho(self, out: DecoderOutput) -> torch.Tensor:
        return out.log_rho if self.gene_likelihood == "normal" else out.log_rho.exp()

    def _profile(self) -> Literal["softmax", "softplus", "identity"]:
        if self.gene_likelihood == "normal":
            return "identity"
        return "softplus" if self.data.has("size_factor") else "softmax"

    def _library_prior(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of log total counts in each batch, shape (n_batch, 1)."""
        moments = (self.data.statistics[name] for name in ("library_log_mean", "library_log_var"))
        mean, variance = (torch.tensor(values, dtype=torch.float32)[:, None] for values in moments)
        return mean, variance.sqrt().clamp_min(0.01)  # cells of one size would leave a prior without width
