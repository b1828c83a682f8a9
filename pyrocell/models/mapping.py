"""The verb that maps a query onto a fitted reference; written once, for every model with a guide of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrocell import settings
from pyrocell.data import Categories, Category, Schema, read_setup, setup_of
from pyrocell.errors import SetupError
from pyrocell.infer.freezing import freeze
from pyrocell.models import saving
from pyrocell.models.core import ModelCore
from pyrocell.models.novelty import Novelty, find_landmarks
from pyrocell.models.roles import needs
from pyrocell.nn.growth import inherit

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["ReferenceMapping"]


class ReferenceMapping(Novelty):
    """Mix-in of `CellModel`: queries mapped onto a reference."""

    @needs("guide")
    @classmethod
    def load_query_data(cls, adata: AnnData, reference: Novelty | str | Path, *, frozen: bool = True) -> Any:
        """Make a model of a query, with the parameters of a fitted reference and room for what is new in the query.

        New batches, and new levels of other categorical covariates, come after those of the reference, and start as
        their mean. Features are matched by name; absent ones are taken for zeros, further ones are ignored. Continuous
        covariates are standardised with the mean and standard deviation of the reference. A query may be without
        labels. What was found is in ``mapping`` of the new model.

        Train it next, unless there is nothing new. Only the parameters of new categories learn: the reference's cells
        keep their embeddings to the last bit, asked from either model. Neither the data nor the reference are changed.

        Parameters
        ----------
        adata
            The query. It needs no set-up if its layer and columns have the names that the reference's had; if it was
            set up for this model, that holds.
        reference
            A fitted model of this class, or the folder of a saved one.
        frozen
            Whether the parameters of the reference stay as they are. If not, all learn, and the embeddings of
            reference and query are comparable only within the new model.

        Returns
        -------
        CellModel
            A model of the same class.

        Raises
        ------
        DataError
            If the query lacks more than half of the reference's features, or cannot be used; it names the offenders.
        SetupError
            If the reference is of another class, or has parameters of single cells; if a column is not there.
        NotTrainedError
            If the reference was not trained.

        Warns
        -----
        PyrocellWarning
            If the query lacks more than a fifth of the reference's features.

        References
        ----------
        M. Lotfollahi, M. Naghipourfar, M. D. Luecken, M. Khajavi, et al. Mapping single-cell data to reference atlases
        by transfer learning. Nature Biotechnology 40, 121-130 (2022). https://doi.org/10.1038/s41587-021-01001-7
        """
        known = _reference(cls, reference)
        schema = known.data.extend(adata, cls.fields, _setup(adata, known))
        # Made with its data: what a constructor reads off them, the query's new categories have too.
        model = cls.build((adata,), known.constructor, seed=settings.seed, schema=schema)
        try:
            new = inherit(model.module, known.module, cls.batch_parameters)
        except ValueError as error:
            raise SetupError(
                f"{cls.__name__} cannot take new categories: {error} Name it in batch_parameters."
            ) from error
        model.trainable = new if frozen else None
        if frozen:
            freeze(model.module, new)
        model.mapping = {"frozen": frozen, **_report(cls, known.data, schema)}
        model.is_trained = not new  # what the query adds to the reference must be learnt first
        model.landmarks = find_landmarks(known) if frozen else None
        found = model.mapping
        settings.logger.info("new: %s; absent: %s", found["new_categories"], found["fraction_absent"])
        return model


def _reference(model_class: Any, reference: Novelty | str | Path) -> Novelty:
    """Return the reference, checked, without data."""
    known = saving.read(model_class, reference)[0] if isinstance(reference, str | Path) else reference
    if type(known) is not model_class:
        name = type(known).__name__
        hint = f" Call {name}.load_query_data." if isinstance(known, ModelCore) else ""
        raise SetupError(
            f"The reference is a {name}; expected a fitted {model_class.__name__} or the folder of a saved one.{hint}"
        )
    known.require_trained()
    if known.has_local_parameters:
        raise SetupError(
            f"This {type(known).__name__} has parameters for each cell that it was trained on, and none for others; a "
            "query needs a guide that infers a cell from its data."
        )
    return known


def _setup(adata: AnnData, known: Novelty) -> dict[str, Any]:
    """Return where a query has its data: as it was set up for this model, or else where the reference had them."""
    name = type(known).__name__
    try:
        return read_setup(adata, name)
    except SetupError:
        return setup_of(adata, known.data.setup, known.fields, name)


def _report(model_class: Any, known: Schema, schema: Schema) -> dict[str, Any]:
    """Say in JSON values what is new in a query, and what it lacks."""
    new: dict[str, list[str]] = {}
    absent = {name: record["absent"] for name, record in schema.fields.items() if "absent" in record}
    for name, field in model_class.fields.items():
        if isinstance(field, Category):
            new[name] = schema.names(name)[known.size(name) :]
        elif isinstance(field, Categories):
            levels = zip(schema.names(name), schema.levels(name), known.sizes(name), strict=True)
            new |= {key: names[n:] for key, names, n in levels}
    return {
        "new_categories": {name: names for name, names in new.items() if names},
        "absent_features": absent,
        "fraction_absent": {name: len(names) / known.size(name) for name, names in absent.items()},
    }
