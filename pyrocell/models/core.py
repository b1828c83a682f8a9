"""What every verb of a model stands on: data, parameters, and the two Pyro programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyrocell.data import Cells, Dataset, Schema, prototype_cells, read_setup, setup_of
from pyrocell.errors import DataError, NotTrainedError, QueryError, SetupError
from pyrocell.infer.draws import Drawer
from pyrocell.infer.effects import CellPlate, OnDevice, is_latent, is_local
from pyrocell.infer.elbo import Elbo
from pyrocell.infer.landmarks import Landmarks
from pyrocell.infer.plan import TrainingPlan
from pyrocell.infer.streams import RandomStream, seeded
from pyrocell.models.meta import ModelMeta

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["ModelCore"]

Program = Callable[[Cells], Any]


class ModelCore(metaclass=ModelMeta):
    """Data, parameters and programs of a model; `CellModel` adds the verbs."""

    fields: ClassVar[dict[str, Any]]
    setup_anndata: ClassVar[Callable[..., None]]
    setup_mudata: ClassVar[Callable[..., None]]
    latent_site: ClassVar[str | None] = None
    expression_site: ClassVar[str | None] = None
    accessibility_site: ClassVar[str | None] = None
    """Site of the probability that a region is open, over the regions of `accessibility_field`."""
    accessibility_field: ClassVar[str] = "accessibility"
    protein_site: ClassVar[str | None] = None
    """Site of the denoised proteins; with ``_total`` and ``_sampled`` behind its name, its variants."""
    foreground_site: ClassVar[str | None] = None
    background_site: ClassVar[str | None] = None
    depth_site: ClassVar[str | None] = None
    region_site: ClassVar[str | None] = None
    velocity_site: ClassVar[str | None] = None
    """Site of the velocity of spliced RNA; beside it lie those that `name_kinetics` names."""
    mapping_site: ClassVar[str | None] = None
    """Site of the shares of some places, named ``place_names``, in each cell."""
    weight_site: ClassVar[str | None] = None
    scale_site: ClassVar[str | None] = None
    """Sites of how much a cell counts at its places, and of what its counts are multiplied by there."""
    expression_sites: ClassVar[dict[str, str]] = {}
    """Sites of denoised values, each with the field whose features it is over; `expression_site` is the first."""
    denoised_sites: ClassVar[dict[str, str]] = {}
    """For a field, a site that draws its denoised values with their noise; by default a gamma of the likelihood."""
    pseudocounts: ClassVar[dict[str, float]] = {}
    """For a field, what is added to both sides of its fold changes; by default that is learned from the counts."""
    observed_sites: ClassVar[dict[str, str]] = {"x": "counts"}
    """Observed sites, each with the field that it is over; none in a model without a likelihood."""
    observed_site: ClassVar[str | None] = "x"
    """The first of the observed sites, and below its field."""
    feature_field: ClassVar[str] = "counts"
    library_site: ClassVar[str | None] = None
    max_plate_nesting: ClassVar[int] = 1
    automatic_guide: ClassVar[type[AutoGuide]] = AutoNormal
    """Kind of the guide of a class that writes none; `AutoDelta` for point estimates."""
    full_batch: ClassVar[bool] = False
    """Whether the loss couples all cells, so that every step needs all of them."""
    cell_parameters: tuple[str, ...] = ()
    """Parameters with a row for each cell of the training data, in their order; a constructor may say which."""
    batch_parameters: ClassVar[tuple[str, ...]] = ()
    """Parameters, buffers and parts (beside those of `InjectedLinear`) that grow with the categories of a query."""
    max_epochs_cap: ClassVar[int] = 400
    kl_warmup_cap: ClassVar[int] = 400
    default_lr: ClassVar[float] = 1e-3
    default_lr_decay: ClassVar[float] = 0.0
    default_batch_size: ClassVar[int] = 128
    default_train_size: ClassVar[float] = 0.9
    default_early_stopping: ClassVar[bool] = False
    default_plan: ClassVar[TrainingPlan] = TrainingPlan()

    data: Schema
    stream: RandomStream
    constructor: dict[str, Any]
    module: PyroModule
    cell_names: list[str]
    has_local_parameters: bool
    """Whether the guide has parameters of single cells, which only cells in the training data have."""

    def __init_subclass__(cls) -> None:
        """Let a class name one site of a kind, or several."""
        super().__init_subclass__()
        if "observed_sites" not in vars(cls) and {"observed_site", "feature_field"} & set(vars(cls)):
            cls.observed_sites = {str(cls.observed_site): cls.feature_field}
        first = next(iter(cls.observed_sites.items()), (None, cls.feature_field))
        cls.observed_site, cls.feature_field = first
        if "expression_sites" in vars(cls):
            cls.expression_site = next(iter(cls.expression_sites))
        elif cls.expression_site not in cls.expression_sites:
            cls.expression_sites = (
                {} if cls.expression_site is None else {cls.expression_site: cls.feature_field}
            )

    def __init__(
        self, adata: AnnData | MuData | None, *, features: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        if adata is None and self.data is None:
            raise SetupError(
                f"{type(self).__name__} needs an AnnData or MuData: {type(self).__name__}.setup_anndata(adata, ...), "
                f"then {type(self).__name__}(adata)."
            )
        self.module = PyroModule()
        self.dataset: Dataset | None = None
        self.history = pd.DataFrame()
        self.is_trained = False
        self.trainable: dict[str, torch.Tensor] | None = None  # of a query: the new entries of each parameter
        self.mapping: dict[str, Any] | None = None
        self.landmarks: Landmarks | None = None  # of the reference, where they are known
        self.train_indices = self.validation_indices = np.array([], dtype=np.int64)
        if adata is not None:
            if not self.data:
                setup = read_setup(adata, type(self).__name__)
                self.data = Schema.freeze(adata, self.fields, setup, features=features)
            self.attach(adata, check=False)  # whoever made the schema has checked every value

    def attach(self, adata: AnnData | MuData, *, check: bool = True) -> None:
        """Take data to work on, seen through the schema."""
        dataset = self._seen_through_schema(adata, check=check)
        if hasattr(self, "has_local_parameters"):  # the model is complete
            self.require_same_cells(dataset)
        self.dataset, self._seen = dataset, self._fingerprint(dataset)

    def restrict_features(self, field: str, features: Sequence[str]) -> None:
        """Read some features of a field alone, from now on; to be called in a constructor.

        The data may have many more, which the model ignores: they are never held in memory together.
        """
        if list(features) != self.data.names(field):
            self.data = self.data.over(self.fields[field], features)
            if self.dataset is not None:
                self.attach(self.dataset.adata)

    def _seen_through_schema(
        self, adata: AnnData | MuData, *, check: bool = True, schema: Schema | None = None
    ) -> Dataset:
        setup = setup_of(adata, self.data.setup, self.fields, type(self).__name__)
        return Dataset(adata, self.data if schema is None else schema, self.fields, check=check, setup=setup)

    def model(self, cells: Cells) -> None:
        """Describe how the cells came about: a Pyro model over ``self.plate(cells)``."""
        raise TypeError(f"{type(self).__name__} has no model(cells); every model needs one.")

    def plate(self, cells: Cells) -> pyro.plate:
        """Return the plate of cells: the minibatch stands for all ``cells.n_total`` of them."""
        return CellPlate(cells.n_total, cells.rows)

    def finish(self) -> None:
        """Complete the construction: an automatic guide if there is none, and one checked run of both programs."""
        cells = prototype_cells(self.data)
        self._is_bayesian = any(getattr(part, "_pyro_samples", None) for part in self.module.modules())
        self.has_local_parameters = bool(self.cell_parameters)
        self.module.eval()
        if not hasattr(type(self), "guide") and self._has_latents(cells):
            self.module.autoguide = self.automatic_guide(self._program(self.model), create_plates=self.plate)
            sites = poutine.trace(self.module.autoguide).get_trace(cells).nodes.values()
            self.has_local_parameters |= any(is_latent(site) and is_local(site) for site in sites)
        names = () if self.dataset is None else self.dataset.obs_names
        self.cell_names = list(names) if self.has_local_parameters else []
        elbo = self.elbo()
        with pyro.validation_enabled(True), torch.no_grad():
            elbo(cells, with_extra=True)
        self._classes_of_model_alone = elbo.has_classes_of_model_alone

    def _has_latents(self, cells: Cells) -> bool:
        """Whether there is anything to infer beside the parameters."""
        with torch.no_grad(), seeded(self.stream.seed):
            trace: Any = poutine.trace(self._program(self.model)).get_trace(cells)
        return any(is_latent(site) for site in trace.nodes.values())

    def elbo(self) -> Elbo:
        """Return the objective of this model."""
        return Elbo(
            self._program(self.model),
            self._guide_program(),
            max_plate_nesting=self.max_plate_nesting,
            extra_terms=getattr(self, "extra_terms", None),
            owner=self,
        )

    def drawer(self) -> Drawer:
        """Return the source of posterior draws of this model."""
        return Drawer(
            self._program(self.model),
            self._guide_program(),
            max_plate_nesting=self.max_plate_nesting,
            classes_of_model_alone=self._classes_of_model_alone,
        )

    def _guide_program(self) -> Program:
        guide = getattr(type(self), "guide", None)
        if guide is not None:
            return self._program(partial(guide, self))
        # Without latents, there is nothing to infer.
        return getattr(self.module, "autoguide", lambda cells: None)

    def _program(self, run: Program) -> Program:
        """Let a Bayesian module draw each of its weights once a run, and bring priors to the model's device."""

        def run_in_context(cells: Cells) -> Any:
            with self.module._pyro_context if self._is_bayesian else nullcontext():
                if self.device.type == "cpu":
                    return run(cells)
                with OnDevice(self.device):
                    return run(cells)

        return run_in_context

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run Pyro without its global parameter store and without per-step validation."""
        with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
            yield

    def require_data(self, adata: AnnData | MuData | None) -> Dataset:
        """Return the data to work on: those given, seen through the schema, or the model's own."""
        if isinstance(adata, str):
            raise QueryError(
                f"adata is the text {adata!r}; expected an AnnData. Name the argument: groupby={adata!r}?"
            )
        if adata is not None and (self.dataset is None or adata is not self.dataset.adata):
            other = self._seen_through_schema(adata)
            self.require_same_cells(other)
            return other
        if self.dataset is None:
            raise QueryError("This model was loaded without data; give adata=, or load it with data.")
        if not np.array_equal(self._fingerprint(self.dataset), self._seen):
            raise DataError(
                "The AnnData has changed since the model was made: cells were added, removed or reordered, or the "
                "counts were normalised in place. Keep raw counts in a layer (layer= of setup_anndata), or give adata=."
            )
        return self.dataset

    def _fingerprint(self, dataset: Dataset) -> np.ndarray:
        """Return names of cells and some totals, to notice when the data change under the model."""
        names = dataset.names_now
        known = len(names) == dataset.n_cells and names.equals(dataset.obs_names)
        first = dataset.cells(np.arange(min(64, dataset.n_cells)))
        counted = dict.fromkeys([self.feature_field, *self.observed_sites.values()])
        totals = [getattr(first, field).sum(-1).numpy() for field in counted]
        return np.concatenate([*totals, [known]])

    def require_same_cells(self, other: Dataset) -> None:
        """Refuse other cells where the guide has parameters of single cells, matched by their place."""
        if self.has_local_parameters and list(other.obs_names) != self.cell_names:
            raise QueryError(
                f"This {type(self).__name__} has parameters for each cell that it was trained on; expected these cells "
                "in their order. Give such data, or train a model on the new cells."
            )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.module.parameters(), torch.zeros(())).device

    def require_trained(self) -> None:
        """Refuse to answer from random parameters."""
        if not self.is_trained:
            raise NotTrainedError(f"This {type(self).__name__} has not been trained; call train() first.")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "module" or not isinstance(value, nn.Module | torch.Tensor | PyroParam | PyroSample):
            object.__setattr__(self, name, value)
            return
        if name in type(self).fields:
            raise TypeError(f"{name!r} is a field of {type(self).__name__}; give the part another name.")
        if "module" not in self.__dict__:
            raise TypeError(f"Call super().__init__(adata) before assigning self.{name}.")
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            self.module.register_buffer(name, value)
        else:
            setattr(self.module, name, value)

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("module")
        if module is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        try:
            return getattr(module, name)
        except AttributeError:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}") from None
