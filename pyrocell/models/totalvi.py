"""TOTALVI: RNA and surface proteins of the same cells, with the background of antibodies told from signal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyro
import torch
from pyro.distributions import Delta, Normal, TorchDistribution
from torch import Tensor, nn
from torch.nn import functional

from pyrocell.data import Categories, Category, Cells, Continuous, Counts, Proteins, SizeFactor
from pyrocell.distributions import (
    NegativeBinomial,
    NegativeBinomialMixture,
    StandardNormal,
    ZeroInflatedNegativeBinomial,
    log1p_counts,
)
from pyrocell.errors import SetupError
from pyrocell.infer.effects import Site, lazy_deterministic
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.base import CellModel
from pyrocell.models.options import check_choices, check_sizes, of_group
from pyrocell.models.protein_background import BackgroundPrior, ProteinDesign
from pyrocell.models.proteins import JointExpression, name_proteins
from pyrocell.nn import Adversary, Covariates, DecoderOutput, GaussianEncoder, ProteinDecoder, SkipDecoder

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["TOTALVI"]

GeneDispersion = Literal["gene", "gene-batch", "gene-label"]
ProteinDispersion = Literal["protein", "protein-batch", "protein-label"]
Likelihood = Literal["nb", "zinb"]

_BACKGROUND_PREFERENCE = 0.1
"""Nats for each unit of log probability of the background: a Beta(1.1, 1) prior of that probability."""

_BLINDFOLDED = 0.5
"""Share of cells whose proteins the guide is not shown in a training step, where some are absent from a batch."""


class TOTALVI(JointExpression, CellModel):
    """Variational autoencoder of RNA and protein counts, proteins a mixture of background and foreground.

    Per cell n, gene g and protein t, in batch b, measured with antibody panel p::

        z_n            ~ Normal(0, I)
        rho_n          = softmax(f(z_n, b))
        x_ng           ~ NB(size_n * rho_ng, theta_g)                      or ZINB
        log_beta_nt    ~ Normal(background_mean_pt, background_sd_pt)      beta: background, in counts
        alpha_nt       = 1 + relu(f(z_n, b))                               foreground over background
        pi_nt          = sigmoid(f(z_n, b))                                probability of background
        log_e_bt       ~ Normal(0, 1), a point estimate                    efficiency of the antibody in the batch
        y_nt           ~ pi NB(e beta, phi_t) + (1 - pi) NB(e beta alpha, phi_t)

    The guide is Normal in z, from a network that sees log1p of both counts, and Normal in log_beta given z. Proteins
    that were not measured in a cell have neither likelihood nor KL; the guide sees zeros in their place.

    Parameters
    ----------
    adata
        Raw counts, set up with ``TOTALVI.setup_anndata`` or ``TOTALVI.setup_mudata``.
    n_latent
        Dimension of the latent z.
    n_hidden
        Width of every hidden layer.
    n_layers_encoder, n_layers_decoder
        Hidden layers of the encoder, and of each of the four decoders.
    dropout_rate
        Dropout in all networks.
    gene_dispersion, protein_dispersion
        What has an inverse dispersion of its own: ``"gene"``, ``"gene-batch"``, ``"gene-label"``; ``"protein"``,
        ``"protein-batch"``, ``"protein-label"``.
    gene_likelihood
        ``"nb"`` or ``"zinb"``.
    empirical_protein_background_prior
        Start the prior of the background from the low proteins of each cell; by default with more than 10 proteins.
    adversarial
        Train z against a classifier of batches; by default if a protein is absent from some batch but not from all.

    Raises
    ------
    SetupError
        If an option is unknown, or needs a field that was not set up.
    DataError
        If the counts cannot be used.

    Notes
    -----
    Fields: ``counts``, ``proteins``, ``batch``, ``label``, ``panel`` (by default the batch), ``size_factor``,
    ``categorical_covariates``, ``continuous_covariates``.

    Sites: ``z`` (n_latent, no unit), ``rho`` (n_genes, fraction), ``size`` (1, counts), ``mu`` (n_genes, counts), ``x``
    (n_genes, counts); over n_proteins: ``log_beta`` (log counts), ``background`` beta, ``protein`` (1 - pi) beta alpha,
    ``protein_total`` with pi beta added (both also ``_sampled``: pi replaced by its draw), ``protein_noisy`` (drawn
    with the noise of phi), ``y`` (all counts), ``foreground_probability`` 1 - pi; ``log_efficiency`` (batches too).

    When not to use it: for intensities (cytometry), which are no counts; for a handful of antibodies, where nothing
    tells what background is. Departures from the original: see the model's page.

    References
    ----------
    A. Gayoso, Z. Steier, R. Lopez, J. Regier, K. L. Nazor, A. Streets, N. Yosef. Joint probabilistic modeling of
    single-cell multi-omic data with totalVI. Nature Methods 18, 272-282 (2021).
    https://doi.org/10.1038/s41592-020-01050-x
    """

    counts = Counts()
    proteins = Proteins()
    batch = Category(optional=True)
    label = Category(optional=True, query_may_lack=True)
    panel = Category(
        optional=True,
        groups_of="proteins",
        argument="panel_key",
        doc="Column of ``adata.obs`` with the antibody panel of each cell: a panel has its own backgrounds.",
    )
    size_factor = SizeFactor()
    categorical_covariates = Categories()
    continuous_covariates = Continuous()

    latent_site = "z"
    expression_sites: ClassVar[dict[str, str]] = {"rho": "counts", "protein": "proteins"}
    observed_sites: ClassVar[dict[str, str]] = {"x": "counts", "y": "proteins"}
    denoised_sites: ClassVar[dict[str, str]] = {"proteins": "protein_noisy"}
    pseudocounts: ClassVar[dict[str, float]] = {"proteins": 1.0}
    library_site = "size"
    protein_site = "protein"
    foreground_site = "foreground_probability"
    background_site = "background"
    batch_parameters = (
        "log_theta",
        "log_phi",
        "background_mean",
        "background_log_sd",
        "log_efficiency",
        "protein_decoder.n_measured",
        "adversary.logits",
    )
    default_lr = 4e-3
    default_batch_size = 256
    default_early_stopping = True
    default_plan = TrainingPlan(lr_plateau=True)

    def __init__(
        self,
        adata: AnnData | MuData,
        n_latent: int = 20,
        n_hidden: int = 256,
        *,
        n_layers_encoder: int = 2,
        n_layers_decoder: int = 1,
        dropout_rate: float = 0.2,
        gene_dispersion: GeneDispersion = "gene",
        protein_dispersion: ProteinDispersion = "protein",
        gene_likelihood: Likelihood = "nb",
        empirical_protein_background_prior: bool | None = None,
        adversarial: bool | None = None,
    ) -> None:
        super().__init__(adata)
        self._check_options()
        sizes = map(self.data.size, ("counts", "proteins", "batch", "continuous_covariates"))
        n_genes, n_proteins, n_batch, n_continuous = sizes
        self.gene_dispersion, self.protein_dispersion = gene_dispersion, protein_dispersion
        self.panel_field = "panel" if self.data.has("panel") else "batch"
        design = ProteinDesign.of(self.dataset, n_batch, n_proteins, self.panel_field)
        covariates = Covariates(tuple(self.data.sizes("categorical_covariates")), n_continuous)
        wide = replace(covariates, n_continuous=n_continuous + n_proteins)
        self.encoder = GaussianEncoder(
            n_genes,
            n_latent,
            n_hidden,
            n_batch=n_batch,
            n_layers=n_layers_encoder,
            dropout=dropout_rate,
            covariates=wide,  # the proteins enter beside the covariates, so that counts stay sparse
            transform=log1p_counts,
        )
        layers: Any = {"n_layers": n_layers_decoder, "dropout": dropout_rate, "covariates": covariates}
        self.decoder = SkipDecoder(
            n_latent,
            n_genes,
            n_hidden,
            n_batch,
            **layers,
            heads=["zero_inflation"] if gene_likelihood == "zinb" else [],
            profile="softplus" if self.data.has("size_factor") else "softmax",
        )
        self.protein_decoder = ProteinDecoder(n_latent, design.n_measured, n_hidden, **layers)
        rows = {"batch": (n_batch,), "label": (self.data.size("label"),)}
        self.log_theta = nn.Parameter(torch.randn(*rows.get(gene_dispersion[5:], ()), n_genes))
        self.log_phi = nn.Parameter(2 * torch.rand(*rows.get(protein_dispersion[8:], ()), n_proteins))
        self.log_efficiency = nn.Parameter(torch.zeros(n_batch, n_proteins))
        n_panels, empirical = self.data.size(self.panel_field), empirical_protein_background_prior
        prior = BackgroundPrior.of(self.dataset, design, n_panels, empirical=empirical, stream=self.stream)
        self.background_mean, self.background_log_sd = nn.Parameter(prior.mean), nn.Parameter(prior.log_sd)
        self.protein_decoder.start_background(prior.mean.mean(0), prior.log_sd.mean(0).exp())
        adversarial = design.is_incomplete if adversarial is None else adversarial
        self.constructor["adversarial"] = adversarial  # a saved model is made again without the data
        self.adversary = Adversary(n_latent, n_batch) if adversarial else None

    def _check_options(self) -> None:
        options = self.constructor
        choices = {
            "gene_dispersion": GeneDispersion,
            "protein_dispersion": ProteinDispersion,
            "gene_likelihood": Likelihood,
            "empirical_protein_background_prior": Literal[True, False, None],
            "adversarial": Literal[True, False, None],
        }
        check_choices(options, choices)
        check_sizes(options)
        for name in ("gene_dispersion", "protein_dispersion"):
            if options[name].endswith("-label") and not self.data.has("label"):
                raise SetupError(f"{name}={options[name]!r} needs labels; set up the data with labels_key=.")
        if options["adversarial"] and self.data.size("batch") < 2:
            raise SetupError("adversarial=True needs at least two batches; set up the data with batch_key=.")

    def model(self, cells: Cells) -> None:
        """Generate RNA and proteins from a latent."""
        # Mode of one proper prior: it counts once, not once a cell, and does not warm up.
        zero = torch.zeros_like(self.log_efficiency)
        prior = Normal(zero, torch.ones_like(zero)).to_event(2)
        log_efficiency = pyro.sample("log_efficiency", prior)
        with self.plate(cells):
            z = pyro.sample("z", StandardNormal(self.encoder.n_latent))
            self._generate_proteins(cells, z, log_efficiency)
            self._generate_rna(cells, z)

    def guide(self, cells: Cells) -> None:
        """Infer the latent from log counts, and the background from the latent."""
        pyro.sample("log_efficiency", Delta(self.log_efficiency, event_dim=2))
        proteins = torch.log1p(cells.proteins) * cells.proteins_mask
        if self.module.training and self.protein_decoder.is_incomplete:
            # Some cells lack what others have: learn to find the latent without it, where it can be checked.
            proteins = proteins * torch.rand_like(cells.library).ge(_BLINDFOLDED)
        beside = torch.cat([cells.continuous_covariates, proteins], dim=-1)
        with self.plate(cells):
            posterior = self.encoder(
                cells.as_input("counts", self.encoder), cells.batch, cells.categorical_covariates, beside
            )
            z = pyro.sample("z", posterior)
            background = Normal(*self.protein_decoder.background(z, *_covariates(cells)))
            pyro.sample("log_beta", background.mask(cells.proteins_mask).to_event(1))

    def extra_terms(self, cells: Cells, guide: Mapping[str, Site]) -> dict[str, Tensor]:
        """Return the cross-entropy of the batches, which the classifier lowers and the latent raises."""
        if self.adversary is None:
            return {}
        return {"adversary": self.adversary(guide["z"]["value"], cells.batch)}

    def _generate_rna(self, cells: Cells, z: Tensor) -> None:
        out = self.decoder.heads(z, *_covariates(cells))
        size = cells.library if cells.size_factor is None else cells.size_factor
        lazy_deterministic("rho", lambda: out.log_rho.exp(), event_dim=1)
        lazy_deterministic("size", lambda: size, event_dim=1)
        lazy_deterministic("mu", lambda: out.log_rho.exp() * size, event_dim=1)
        pyro.sample("x", self._rna(cells, out, size).to_event(1), obs=cells.counts)

    def _rna(self, cells: Cells, out: DecoderOutput, size: Tensor) -> TorchDistribution:
        log_theta = of_group(self.log_theta, self.gene_dispersion, cells)
        log_mean = out.log_mean(size.log())
        if out.zi_logits is None:
            return NegativeBinomial(log_mean=log_mean, log_theta=log_theta)
        return ZeroInflatedNegativeBinomial(log_mean=log_mean, log_theta=log_theta, zi_logits=out.zi_logits)

    def _generate_proteins(self, cells: Cells, z: Tensor, log_efficiency: Tensor) -> None:
        panel = getattr(cells, self.panel_field)
        log_phi = of_group(self.log_phi, self.protein_dispersion, cells)
        log_fold, logits = self.protein_decoder.foreground(z, *_covariates(cells))
        if self.module.training:
            # A protein without signal fits as foreground as well as it fits as background: let it be background.
            preference = (functional.logsigmoid(logits) * cells.proteins_mask).sum(-1)
            pyro.factor("background_preference", _BACKGROUND_PREFERENCE * preference)
        # The background is drawn anew: that of the guide belongs to the batch as measured.
        background = partial(self.protein_decoder.background, z, *_covariates(cells))
        name_proteins(background, log_fold, logits, log_phi)
        prior = Normal(self.background_mean[panel], self.background_log_sd[panel].exp())
        log_beta = pyro.sample("log_beta", prior.mask(cells.proteins_mask).to_event(1))
        log_background = log_beta + self.protein_decoder.of_batch(log_efficiency, cells.batch)
        y = NegativeBinomialMixture(
            log_background=log_background,
            log_foreground=log_background + log_fold,
            log_theta=log_phi,
            background_logits=logits,
        )
        pyro.sample("y", y.mask(cells.proteins_mask).to_event(1), obs=cells.proteins)


def _covariates(cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    return cells.batch, cells.categorical_covariates, cells.continuous_covariates
