"""The base of every model, with all the verbs that users know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrocell.models import saving
from pyrocell.models.comparisons import Comparisons
from pyrocell.models.correlations import Correlations
from pyrocell.models.diagnoses import Diagnoses
from pyrocell.models.mapping import ReferenceMapping
from pyrocell.models.packing import shortened
from pyrocell.models.projections import Projections
from pyrocell.models.proteins import ProteinQueries
from pyrocell.models.regions import Regions
from pyrocell.models.roles import verbs
from pyrocell.models.training import Training
from pyrocell.models.velocity_checks import VelocityChecks

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CellModel"]


class CellModel(
    Training,
    Diagnoses,
    Regions,
    ProteinQueries,
    VelocityChecks,
    Comparisons,
    Correlations,
    Projections,
    ReferenceMapping,
):
    """Base of all models: a Pyro model and guide over cells, and everything that users do with them.

    A model is a subclass with data fields as class attributes, a constructor that assigns its parts, a method
    ``model(cells)``, optionally ``guide(cells)``, and the names of the sites that play a role. See the guide "Add a
    model" for the whole story in one page.

    Parameters
    ----------
    adata
        Data that were set up with ``setup_anndata`` of the same class.

    Attributes
    ----------
    data : Schema
        What was frozen of the data: ``self.data.size("counts")``, ``self.data.names("batch")`` ...
    module : PyroModule
        Owner of every parameter. Assigning an ``nn.Module``, ``Parameter``, ``PyroParam``, ``PyroSample`` or tensor to
        ``self`` puts it there, and reading it goes there.
    history : DataFrame
        One row an epoch; the ``elbo_*`` columns are losses in nats per cell: lower is better.
    constructor : dict
        Arguments that the model was made with.
    mapping : dict or None
        For a query mapped onto a reference: ``frozen``, ``new_categories``, ``absent_features``, ``fraction_absent``.

    Raises
    ------
    SetupError
        If ``adata`` was not set up for this class.
    DataError
        If the data cannot be used: the message names the offenders and the remedy.
    """

    def save(self, folder: str | Path, *, overwrite: bool = False, save_anndata: bool = False) -> None:
        """Write ``model.safetensors`` and ``model.json``, on request ``adata.h5ad`` or ``mdata.h5mu``; no pickle.

        Parameters
        ----------
        folder
            Where to write.
        overwrite
            Whether a model already there may be replaced.
        save_anndata
            Whether to write the data too.

        Raises
        ------
        FileExistsError
            If a model is there already, unless ``overwrite``; if a data file is there that was not saved with it.
        """
        saving.save(self, folder, overwrite=overwrite, save_anndata=save_anndata)

    @classmethod
    def load(cls, folder: str | Path, adata: AnnData | None = None, *, device: str | None = None) -> Any:
        """Read a model that ``save`` wrote.

        Parameters
        ----------
        folder
            Where it was written.
        adata
            Data to work on: features are aligned by name. By default those in the folder, if any, else none.
        device
            Where to put the parameters.

        Raises
        ------
        LoadError
            If files are missing, truncated, foreign, newer, or of another class.
        DataError
            If ``adata`` lacks features of the model or has categories that it does not know.
        """
        return saving.load(cls, folder, adata, device=device)

    def __dir__(self) -> list[str]:
        absent = {name for name, present in verbs(type(self)).items() if not present}
        return sorted(set(super().__dir__()) - absent)

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={shortened(value)}" for key, value in self.constructor.items())
        state = f"trained for {len(self.history)} epochs" if self.is_trained else "not trained"
        return f"{type(self).__name__}({options})\n{self.data}\n{state}, seed {self.stream.seed}"
