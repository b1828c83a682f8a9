"""What the contract is run on: a model class, small data, and how to set both up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pyrocell import settings
from pyrocell.data.slots import is_mudata
from pyrocell.infer.plan import TrainingPlan
from pyrocell.testing.questions import questions

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from pyrocell.models.base import CellModel

__all__ = ["ModelCase"]


@dataclass
class ModelCase:
    """One row of the contract: a model class, small data for it, and how to set both up.

    Parameters
    ----------
    model_class
        The model.
    make_data
        Makes the same small AnnData, or MuData, at each call (100 to 500 cells are plenty).
    setup
        Arguments of ``setup_anndata``, or of ``setup_mudata``.
    options
        Arguments of the constructor.
    sites
        Documented sites, each with the shape of one cell's value; sites not named are only asked to exist.
    max_epochs
        Length of training in the checks.
    arguments
        For a verb, by its name, the arguments without which it cannot be called.
    """

    model_class: type[CellModel]
    make_data: Callable[[], AnnData | MuData]
    setup: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    sites: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    max_epochs: int = 3
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def data(self) -> Any:
        """Return fresh data, set up."""
        data = self.make_data()
        setup = self.model_class.setup_mudata if is_mudata(data) else self.model_class.setup_anndata
        setup(data, **self.setup)
        return data

    def make(self, adata: AnnData | MuData | None = None, seed: int = 0) -> CellModel:
        """Make a model with a given seed."""
        before, settings.seed = settings.seed, seed
        try:
            model: CellModel = self.model_class(self.data() if adata is None else adata, **self.options)
        finally:
            settings.seed = before
        return model

    def train(
        self,
        model: CellModel,
        max_epochs: int | None = None,
        *,
        batch_size: int = 64,
        n_epochs_kl_warmup: int | None = None,
        plan: TrainingPlan | None = None,
        resume: str | None = None,
    ) -> CellModel:
        """Train a model briefly, without a bar.

        Parameters
        ----------
        model
            The model.
        max_epochs
            By default that of the case.
        batch_size, n_epochs_kl_warmup, plan, resume
            As in ``CellModel.train``.
        """
        before, settings.progress = settings.progress, False
        try:
            model.train(
                self.max_epochs if max_epochs is None else max_epochs,
                batch_size=None if self.model_class.full_batch else batch_size,
                n_epochs_kl_warmup=n_epochs_kl_warmup,
                device="cpu",
                plan=plan,
                resume=resume,
            )
        finally:
            settings.progress = before
        return model

    @cached_property
    def trained(self) -> CellModel:
        """A trained model, shared by checks that only ask."""
        return self.train(self.make())

    @cached_property
    def told(self) -> dict[str, Any]:
        """What the trained model answers, by verb: asked once, for all checks that look at it."""
        return {verb: ask() for verb, ask in questions(self.trained, self.arguments).items()}
