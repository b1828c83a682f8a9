"""SCANVI: SCVI with labels, some or most of them unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.distributions import Categorical
from torch.nn import functional

from pyrocell import settings
from pyrocell.data import Category, Cells, Schema
from pyrocell.distributions import StandardNormal
from pyrocell.errors import SetupError
from pyrocell.infer.effects import Site
from pyrocell.models.asking import Question
from pyrocell.models.labels import ClassifierOptions, probability_table
from pyrocell.models.scvi import SCVI, Dispersion, Likelihood
from pyrocell.nn import Classifier, GaussianEncoder, indicators

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["SCANVI"]

_EPOCHS_AFTER_SCVI = 50
_SUMMED: Any = {"enumerate": "parallel", "warmup": True}
# Half the difference of logits that stands for certainty. Not more: float32 has no normal number near e^-100, and
# subnormal ones make a training step several times slower.
_CERTAIN = 20.0


class SCANVI(SCVI):
    """SCVI with labels, some unknown: a class-conditional latent under a (zero-inflated) negative binomial likelihood.

    Per cell n::

        y_n          ~ Categorical(1 / C)                           its label, one of C
        label_n      = y_n                                          where the label is known
        u_n          ~ Normal(0, I)                                 what varies within the label
        z_n | u, y   ~ Normal(m(u_n, y_n), v(u_n, y_n))             mean and variance from a network
        x_n | z      as in `SCVI`

    The guide draws z from the counts as SCVI's does, then y from a classifier of z (known labels are taken as they
    are), then u from z and y. The label is summed over, exactly; the counts are decoded once. Beside the bound, the
    classifier learns the known labels at the mean of q(z | x).

    Parameters
    ----------
    adata
        Raw counts with labels, set up with ``SCANVI.setup_anndata``.
    n_hidden, n_latent, n_layers, dropout_rate
        As for `SCVI`; u has the dimension of z.
    dispersion, gene_likelihood, use_observed_lib_size, encode_covariates, batch_representation
        As for `SCVI`; ``"gene-label"`` takes the label that is drawn where it is not known.
    classifier
        How labels are learned: `ClassifierOptions`.

    Raises
    ------
    SetupError
        If an option is unknown, or needs a field that was not set up.
    DataError
        If the counts cannot be used, no cell is labelled, or all labels are the same.

    Notes
    -----
    Fields: those of `SCVI`; ``label`` is needed, and ``unlabeled_category`` says which value of it means nothing.

    Sites: those of `SCVI`, and ``y`` (the label's code), ``u`` (n_latent, no unit), ``label`` (the code again, observed
    where it is known).

    When not to use it: where clusters are what is looked for (the labels pull cells together), where the labels of many
    cells are wrong, or where the unlabelled cells may be of new types: each gets one of the known labels.

    Departures from the original: known labels inform the bound itself, as in the paper, and not in its common
    implementation; the KL terms of z, u and y warm up alike; the classifier's gradient stops at z unless asked for; its
    cross-entropy needs no second pass over labelled cells; training uses all cells.

    References
    ----------
    C. Xu, R. Lopez, E. Mehlman, J. Regier, M. I. Jordan, N. Yosef. Probabilistic harmonization and annotation of
    single-cell transcriptomics data with deep generative models. Molecular Systems Biology 17, e9620 (2021).
    https://doi.org/10.15252/msb.20209620
    """

    label = Category(unlabeled=True, min_levels=2)

    default_train_size = 1.0  # a label that is held out teaches nothing
    max_epochs_cap, default_lr, default_lr_decay = 400, 1e-3, 0.0  # what SCVI does was not tried with labels

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
        encode_covariates: bool = False,
        batch_representation: Literal["one-hot", "embedding"] = "one-hot",
        classifier: ClassifierOptions | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            adata,
            n_hidden,
            n_latent,
            n_layers,
            dropout_rate,
            dispersion=dispersion,
            gene_likelihood=gene_likelihood,
            use_observed_lib_size=use_observed_lib_size,
            encode_covariates=encode_covariates,
            batch_representation=batch_representation,
        )
        self.options = ClassifierOptions.of(classifier)
        n_labels = self.data.size("label")
        self.classifier = Classifier(
            n_latent, n_labels, n_hidden, n_layers=self.options.n_layers, dropout=self.options.dropout
        )
        self.z_prior = GaussianEncoder(
            n_latent, n_latent, n_hidden, n_batch=n_labels, dropout=0.0, transform=None
        )
        self.u_encoder = GaussianEncoder(
            n_latent, n_latent, n_hidden, n_batch=n_labels, dropout=dropout_rate, transform=None
        )
        # Of the cells at hand, and nothing that was learned: a query has its own.
        self.module.register_buffer("cell_weight", self._cell_weight(), persistent=False)

    def _cell_weight(self) -> torch.Tensor:
        """Weight of a labelled cell of each class; over all cells, with 0 for unlabelled ones, its mean is one.

        So the mean over a minibatch is that over as many labelled cells as one expects in it: unbiased, whatever number
        there is.
        """
        n_labeled = torch.tensor(self.data.record("label")["n_labeled"], dtype=torch.float32)
        some = n_labeled.clamp(min=1.0)  # a query may have no cell of a class, or no label at all
        weight = 1 / some if self.options.class_weights == "balanced" else torch.ones_like(some)
        return weight * self.data.n_cells / (weight * n_labeled).sum().clamp(min=1e-6)

    def model(self, cells: Cells) -> None:
        """Generate counts from a label and a latent of what varies within it."""
        n_labels = self.data.size("label")
        with self.plate(cells):
            y = pyro.sample("y", Categorical(logits=cells.library.new_zeros(n_labels)))
            known = Categorical(logits=_certainly(y, n_labels)).mask(cells.is_labeled)
            pyro.sample("label", known, obs=cells.label)
            u = pyro.sample("u", StandardNormal(self.encoder.n_latent))
            z = pyro.sample("z", self.z_prior(u, y))
            self._generate(cells.replace(label=y), z)

    def guide(self, cells: Cells) -> None:
        """Infer the latent from log counts, the label from the latent where it is not known, and u from both."""
        with self.plate(cells):
            z = self._infer(cells)
            known = _certainly(cells.label, self.data.size("label"))
            logits = torch.where(cells.is_labeled.unsqueeze(-1), known, self.classifier(z))
            y = pyro.sample("y", Categorical(logits=logits), infer=_SUMMED)
            pyro.sample("u", self.u_encoder(z, y))

    def extra_terms(self, cells: Cells, guide: Mapping[str, Site]) -> dict[str, torch.Tensor]:
        """Return the classifier's cross-entropy at the mean of q(z | x), a mean over labelled cells."""
        mean, share = guide["z"]["fn"].mean, self.options.encoder_gradient
        logits = self.classifier(share * mean + (1 - share) * mean.detach())
        loss = functional.cross_entropy(logits, cells.label, reduction="none")
        weight = self.cell_weight[cells.label] * cells.is_labeled
        return {"classification": self.options.weight * (loss * weight).mean()}

    def predict(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        soft: bool = False,
        batch_size: int | None = None,
    ) -> pd.Series | pd.DataFrame:
        """Tell the label of each cell from its counts; labels that are known are not looked at.

        Parameters
        ----------
        adata
            Data; by default the model's own. Their labels need not be known, nor their column exist.
        indices
            Cells; by default all.
        soft
            Return the probability of every label.
        batch_size
            Cells at once.

        Returns
        -------
        Series or DataFrame
            Label of each cell, or with ``soft`` probabilities of cells by labels.
        """
        question = Question(self, adata, indices, batch_size=batch_size)
        with self.asking():
            table = probability_table(question, self._probabilities, self.data.names("label"))
        return table if soft else table.idxmax(axis=1).rename("label")

    def _probabilities(self, cells: Cells) -> torch.Tensor:
        with torch.no_grad():
            z = self.drawer().guide_latents(cells)["z"].mean
            probabilities: torch.Tensor = self.classifier(z).softmax(-1)
        return probabilities

    @classmethod
    def from_scvi_model(
        cls,
        scvi_model: SCVI,
        unlabeled_category: str | None,
        labels_key: str,
        adata: AnnData | None = None,
        *,
        classifier: ClassifierOptions | None = None,
    ) -> SCANVI:
        """Make a model that starts from a trained SCVI: its networks, its data, its set-up.

        Parameters
        ----------
        scvi_model
            A trained `SCVI`.
        unlabeled_category
            Value of the column that means that a label is not known; None if all are known.
        labels_key
            Column of ``adata.obs`` with the labels.
        adata
            Data with labels; by default those of the SCVI model.
        classifier
            As for `SCANVI`.

        Returns
        -------
        SCANVI
            To be trained; by default for few epochs, since only the labels are new.
        """
        if type(scvi_model) is not SCVI:
            raise SetupError(f"scvi_model is a {type(scvi_model).__name__}; expected a trained SCVI.")
        scvi_model.require_trained()
        data = scvi_model.require_data(None).adata if adata is None else adata
        options = dict(scvi_model.constructor)
        if options.pop("latent_distribution") != "normal":
            raise SetupError('SCANVI needs an SCVI with latent_distribution="normal".')
        labels = {"labels_key": labels_key, "unlabeled_category": unlabeled_category}
        known = scvi_model.data
        found = Schema.freeze(data, cls.fields, {**known.setup, **labels})
        fields = {**known.fields, "label": found.fields["label"]}
        schema = replace(found, fields=fields, statistics=known.statistics)
        model: SCANVI = cls.build(
            (data,), {**options, "classifier": classifier}, seed=settings.seed, schema=schema
        )
        model.max_epochs_cap, model.kl_warmup_cap = _EPOCHS_AFTER_SCVI, 0  # type: ignore[misc]
        own, given = model.module.state_dict(), scvi_model.module.state_dict()
        same = {name: t for name, t in given.items() if name in own and own[name].shape == t.shape}
        if options["dispersion"] == "gene-label" and known.names("label") != schema.names("label"):
            same.pop("log_theta", None)  # rows of other labels
        model.module.load_state_dict(same, strict=False)
        return model


def _certainly(label: torch.Tensor, n_labels: int) -> torch.Tensor:
    """Logits that leave no doubt about a label."""
    return (2 * indicators(label, n_labels).long() - 1) * _CERTAIN
