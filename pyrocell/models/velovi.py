"""VELOVI: RNA velocity from the kinetics of splicing, with a time for each gene and cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, get_args

import pyro
import torch
from torch import nn
from torch.nn import functional

from pyrocell.data import Abundances, Cells
from pyrocell.distributions import Dirichlet, NormalMixture, StandardNormal
from pyrocell.errors import DataError, SetupError, list_some
from pyrocell.infer.effects import NO_WARMUP, Site
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.base import CellModel
from pyrocell.models.kinetic_sites import Phases, corners, name_kinetics
from pyrocell.nn import GaussianEncoder, KineticDecoder, Rates

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["VELOVI"]

Coupling = Literal["joint", "separate"]

_LARGEST_RATE = 50.0
_SMALLEST_SD = 1e-3
_QUIET = 0.1
"""A gene that is off is that much less noisy than one that is on."""


class VELOVI(CellModel):
    """Splicing kinetics with a normal likelihood of smoothed spliced and unspliced RNA, in four states of each gene.

    Per cell n and gene g, abundances on a scale from 0 to 1::

        z_n             ~ Normal(0, I)
        pi_ng           ~ Dirichlet(0.25, 0.25, 0.25, 0.25)    induction, steady on, repression, steady off
        progress_ng     = sigmoid(f(z_n))                      through induction; another one through repression
        (u, s)_ngk      = solution of du/dt = alpha_g - beta_g u, ds/dt = beta_g u - gamma_g s in state k
        s_ng            ~ sum_k pi_ngk Normal(s_ngk, sd_s)        and u_ng alike, see ``state_coupling``
        velocity_ng     = sum_k pi_ngk (beta_g u_ngk - gamma_g s_ngk)

    alpha is 0 after the switch time of the gene. The guide is Normal in z, from a network that sees s and u, and
    Dirichlet in pi, from a network that sees z. Rates, switch times and noise are point estimates.

    Parameters
    ----------
    adata
        Smoothed abundances, set up with ``VELOVI.setup_anndata``.
    n_hidden
        Width of every hidden layer.
    n_latent
        Dimension of the latent z.
    n_layers
        Hidden layers of each network.
    dropout_rate
        Dropout in the encoder.
    linear_decoder
        Whether progress is a sigmoid of a linear function of z.
    state_coupling
        ``"separate"``: spliced and unspliced RNA of a gene are each in a state of its own, with the same probabilities.
        ``"joint"``: both are in one state; on real data its velocities pointed less well.
    time_dependent_transcription
        Whether transcription goes from one rate to another during induction.
    t_max
        Length of the time axis, in its own arbitrary unit.
    penalty
        Weight, early in training, of the distance between the switch point of each gene and its highest cells.
    state_concentration
        Concentration of the Dirichlet prior of the states; below 1 it favours one state.

    Raises
    ------
    SetupError
        If an option is impossible.
    DataError
        If the data cannot be used.

    Notes
    -----
    Fields: ``spliced``, ``unspliced``.

    Sites: ``z`` (n_latent, no unit), ``pi`` (n_genes x 4, probability), ``velocity``, ``velocity_unspliced`` (n_genes,
    change of the scaled abundance per unit of time), ``latent_time`` (n_genes, 0 to ``t_max``), each with ``_max``
    behind its name for that of the likeliest state, ``fit_spliced``, ``fit_unspliced`` (n_genes, scaled abundance),
    ``s``, ``u`` (n_genes, scaled abundance). ``get_velocity`` and ``get_expression_fit`` answer in units of the data.

    When not to use it: on raw counts, on genes without unspliced RNA, where cells do not change by splicing kinetics
    with constant rates (mature tissue, bursts, strong batch effects), or to compare speeds between genes: each has a
    time unit of its own.

    Departures from the original: the solution holds where rates are equal; each gene is scaled inside the model;
    transcription starts from the data; variances of the guide are exponentials; warm-up ends by default; without
    ``n_samples``, answers are at the posterior means; a gene that is off may count as late (``off_time``).

    References
    ----------
    A. Gayoso, P. Weiler, M. Lotfollahi, D. Klein, J. Hong, A. Streets, F. J. Theis, N. Yosef. Deep generative modeling
    of transcriptional dynamics for RNA velocity analysis in single cells. Nature Methods 21, 50-59 (2024).
    https://doi.org/10.1038/s41592-023-01994-w
    """

    spliced = Abundances()
    unspliced = Abundances()

    latent_site = "z"
    velocity_site = "velocity"
    observed_sites = {"s": "spliced", "u": "unspliced"}  # noqa: RUF012

    max_epochs_cap = 500
    default_lr = 1e-2
    default_batch_size = 256
    default_early_stopping = True
    default_plan = TrainingPlan(optimizer="adamw", weight_decay=1e-2, max_grad_norm=10.0)

    def __init__(
        self,
        adata: AnnData | MuData,
        n_hidden: int = 256,
        n_latent: int = 10,
        *,
        n_layers: int = 1,
        dropout_rate: float = 0.1,
        linear_decoder: bool = False,
        state_coupling: Coupling = "separate",
        time_dependent_transcription: bool = False,
        t_max: float = 20.0,
        penalty: float = 0.2,
        state_concentration: float = 0.25,
    ) -> None:
        super().__init__(adata)
        self._check_options()
        self._check_genes()
        self.state_coupling, self.t_max, self.penalty = state_coupling, t_max, penalty
        n_genes = self.data.size("spliced")
        self.encoder = GaussianEncoder(
            2 * n_genes,
            n_latent,
            n_hidden,
            n_layers=n_layers,
            dropout=dropout_rate,
            layer_norm=True,
            transform=None,
        )
        self.decoder = KineticDecoder(n_latent, n_genes, n_hidden, n_layers=n_layers, linear=linear_decoder)
        self.corner = corners(
            self.dataset, n_genes
        )  # unspliced and spliced of the highest cells of each gene
        start = _inverse_softplus(self.corner[0].clamp_min(_SMALLEST_SD))
        self.alpha_raw = nn.Parameter(start)
        half = _inverse_softplus(self.corner[0].clamp_min(_SMALLEST_SD) / 2)
        self.alpha_start_raw = nn.Parameter(half) if time_dependent_transcription else None
        self.kappa_raw = nn.Parameter(-torch.ones(n_genes)) if time_dependent_transcription else None
        self.beta_raw = nn.Parameter(torch.full((n_genes,), 0.5))
        self.gamma_raw = nn.Parameter(-torch.ones(n_genes))
        start = (7 + 0.5 * torch.randn(n_genes)).clamp_min(1.0) * t_max / 20
        self.switch_raw = nn.Parameter(_inverse_softplus(start))
        self.sd_raw = nn.Parameter(-torch.ones(2, n_genes))
        self.state_prior = torch.full((4,), state_concentration)

    def _check_options(self) -> None:
        options = self.constructor
        for name in ("n_hidden", "n_latent", "n_layers"):
            if options[name] < 1:
                raise SetupError(f"{name} is {options[name]}; expected an integer of at least 1.")
        for name in ("t_max", "state_concentration"):
            if not options[name] > 0:
                raise SetupError(f"{name} is {options[name]}; expected a number above 0.")
        if not options["penalty"] >= 0:
            raise SetupError(f"penalty is {options['penalty']}; expected a number of at least 0.")
        if options["state_coupling"] not in get_args(Coupling):
            expected = " or ".join(map(repr, get_args(Coupling)))
            raise SetupError(f"state_coupling is {options['state_coupling']!r}; expected {expected}.")

    def _check_genes(self) -> None:
        spliced, unspliced = self.data.names("spliced"), self.data.names("unspliced")
        if spliced == unspliced:
            return
        alone = sorted(set(spliced) ^ set(unspliced))
        what = f"{len(alone)} of them are in one only: {list_some(alone)}" if alone else "their order differs"
        raise DataError(
            f"spliced has {len(spliced)} genes and unspliced has {len(unspliced)}, and they are not the same; {what}. "
            "Expected the same genes in the same order: select them by name in both, mdata.mod[name][:, genes]."
        )

    @property
    def rates(self) -> Rates:
        """Rates of each gene, per unit of time, for abundances on a scale from 0 to 1."""
        rates = [_positive(raw, _LARGEST_RATE) for raw in (self.alpha_raw, self.beta_raw, self.gamma_raw)]
        for raw in (self.alpha_start_raw, self.kappa_raw):
            if raw is not None:
                rates.append(_positive(raw, _LARGEST_RATE))
        return Rates(*rates)

    @property
    def switch_time(self) -> torch.Tensor:
        """Time at which transcription of each gene stops."""
        return _positive(self.switch_raw, self.t_max)

    def model(self, cells: Cells) -> None:
        """Generate spliced and unspliced RNA from a latent."""
        sd_u, sd_s = functional.softplus(self.sd_raw).clamp_min(_SMALLEST_SD / _QUIET).unbind(0)
        prior = Dirichlet(self.state_prior, validate_args=False).expand([self.data.size("spliced")])
        with self.plate(cells):
            z = pyro.sample("z", StandardNormal(self.encoder.n_latent))
            pi = pyro.sample("pi", prior.to_event(1), infer=NO_WARMUP)
            phases = Phases.at(self.rates, self.switch_time, self.t_max, self.decoder(z))
            name_kinetics(phases, pi)
            weights = list(pi.log().unbind(-1))
            s = NormalMixture(weights, phases.spliced, [sd_s, sd_s, sd_s, _QUIET * sd_s])
            if self.state_coupling == "joint":  # what s has said of the state holds for u
                weights = s.log_weights_given(cells.spliced)
            u = NormalMixture(weights, phases.unspliced, [sd_u, sd_u, sd_u, _QUIET * sd_u])
            pyro.sample("s", s.to_event(1), obs=cells.spliced)
            pyro.sample("u", u.to_event(1), obs=cells.unspliced)

    def guide(self, cells: Cells) -> None:
        """Infer the latent from both kinds of RNA, and the states from the latent."""
        with self.plate(cells):
            z = pyro.sample("z", self.encoder(torch.cat([cells.spliced, cells.unspliced], dim=-1)))
            pi = Dirichlet(self.decoder.concentration(z), validate_args=False)
            pyro.sample("pi", pi.to_event(1), infer=NO_WARMUP)

    def extra_terms(self, cells: Cells, guide: Mapping[str, Site]) -> dict[str, torch.Tensor]:
        """Return how far the switch points lie from the highest cells: it counts until warm-up is over."""
        weight = guide["z"]["scale"] / guide["z"]["infer"]["scale_before_warmup"]
        zero = torch.zeros_like(self.switch_time)
        phases = Phases.at(self.rates, self.switch_time, self.t_max, (zero, zero))
        switch = torch.stack([phases.unspliced[2], phases.spliced[2]])
        return {"switch_penalty": self.penalty * (1 - weight) * (switch - self.corner).square().sum()}


def _positive(raw: torch.Tensor, largest: float) -> torch.Tensor:
    return functional.softplus(raw).clamp_max(largest)


def _inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    return x + torch.log(-torch.expm1(-x))
