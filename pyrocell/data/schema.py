"""What is frozen of the data a model was made with: names, categories, moments; all of it JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyrocell.data import preflight
from pyrocell.data.base import Field, Frozen, named_fields
from pyrocell.data.fields import Counts
from pyrocell.data.registration import complete_setup
from pyrocell.data.slots import open_slots, what_there_is
from pyrocell.data.turned import as_read
from pyrocell.errors import DataError, LoadError, QueryError, SetupError, list_some

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["Schema"]

_FORMAT = 1


@dataclass(frozen=True, repr=False)
class Schema:
    """What a model knows of its data. It holds JSON values only and is saved with the model.

    Parameters
    ----------
    n_cells
        Number of cells it was frozen from; of features, where these are the rows that the model reads.
    fields
        A record for each field of the model.
    setup
        Arguments of ``setup_anndata`` or ``setup_mudata``, complete with defaults: where the data are.
    statistics
        ``library_log_mean`` and ``library_log_var``: mean and population variance of the log total count in each batch.
    """

    n_cells: int
    fields: dict[str, dict[str, Any]]
    setup: dict[str, Any]
    statistics: dict[str, list[float]]

    @classmethod
    def freeze(
        cls,
        adata: AnnData | MuData,
        fields: Mapping[str, Field],
        setup: Mapping[str, Any],
        *,
        features: Mapping[str, Sequence[str]] | None = None,
    ) -> Schema:
        """Check the data thoroughly, and record what the model needs to know.

        Parameters
        ----------
        adata
            Data to train on.
        fields
            The fields of the model, by name.
        setup
            Arguments that ``setup_anndata`` or ``setup_mudata`` was given, as `read_setup` returns them.
        features
            Names of the features that the model reads of a field of counts, where it does not read all.

        Raises
        ------
        DataError
            If the data cannot be used; the message names the offenders and the remedy.
        SetupError
            If a layer or column is not there.

        Warns
        -----
        PyrocellWarning
            If a covariate is confounded with the batch.
        """
        bound, complete = named_fields(fields), complete_setup(fields, setup)
        slots = as_read(open_slots(adata, complete.get("modalities")), bound)
        preflight.check_row_names(slots)
        for name, names in (features or {}).items():
            bound[name] = _reading(bound[name], names)
        for name, item in bound.items():
            item.check_setup(slots.of(name), complete)
        frozen = {name: item.freeze(slots.of(name), complete) for name, item in bound.items()}
        _warn_confounded(bound, frozen)
        _refuse_unmeasured_groups(bound, frozen)
        return cls(
            n_cells=slots.n_cells,
            fields={name: found.record for name, found in frozen.items()},
            setup=complete,
            statistics=_library_moments(frozen),
        )

    def extend(
        self, adata: AnnData, fields: Mapping[str, Field], setup: Mapping[str, Any] | None = None
    ) -> Schema:
        """Check a query, and return this schema with what the query adds to it: categories, after the known ones.

        Parameters
        ----------
        adata
            The query.
        fields
            The fields of the model, by name.
        setup
            Where the query has its data, if elsewhere than the reference.

        Raises
        ------
        DataError, SetupError
            If the query cannot be used; the message names the offenders and the remedy.
        """
        bound = named_fields(fields)
        complete = self.setup if setup is None else complete_setup(fields, setup)
        slots = as_read(open_slots(adata, complete.get("modalities")), bound)
        preflight.check_row_names(slots)
        found = {
            name: item.extend(slots.of(name), complete, self.record(name)) for name, item in bound.items()
        }
        _refuse_unmeasured_groups(bound, found, known=self)
        return Schema(
            n_cells=slots.n_cells,
            fields={name: frozen.record for name, frozen in found.items()},
            setup=complete,
            statistics=_further_moments(self.statistics, found),
        )

    def over(self, field: Counts, features: Sequence[str]) -> Schema:
        """Return this schema with other features of a field of counts: data seen through it show these alone.

        Parameters
        ----------
        field
            The field, as the model has it.
        features
            Their names.
        """
        record = field.over(self.record(field.name), list(features))
        return replace(self, fields={**self.fields, field.name: record})

    def record(self, name: str) -> dict[str, Any]:
        """Return what is recorded of a field."""
        if name not in self.fields:
            raise SetupError(f"The model has no field {name!r}.{what_there_is(name, self.fields)}")
        return self.fields[name]

    def has(self, name: str) -> bool:
        """Return whether the field exists and was given in the set-up."""
        return name in self.fields and bool(self.fields[name]["given"])

    def names(self, name: str) -> list[str]:
        """Return the names of a field's features, categories, or covariates."""
        return list(self.record(name)["names"])

    def size(self, name: str) -> int:
        """Return the number of features, categories, or covariates of a field; 1 for a category that was left out."""
        return len(self.record(name)["names"])

    def levels(self, name: str) -> list[list[str]]:
        """Return the categories of each column of a field of several categorical covariates."""
        record = self.record(name)
        if "levels" not in record:
            raise SetupError(
                f"The field {name!r} has no columns of categories; names({name!r}) says what it has."
            )
        return [list(levels) for levels in record["levels"]]

    def sizes(self, name: str) -> list[int]:
        """Return the number of categories of each column of a field of several categorical covariates."""
        return [len(levels) for levels in self.levels(name)]

    def code(self, name: str, category: object) -> int:
        """Return the code of a category of a field, by its name.

        Raises a QueryError, with the categories that there are, if it is none of them.
        """
        names = self.names(name)
        if str(category) not in names:
            hint = what_there_is(category, names)
            raise QueryError(f"{name}={category!r}: the model knows no such category.{hint}")
        return names.index(str(category))

    def to_json(self) -> dict[str, Any]:
        """Return the schema as JSON values; floats keep every digit."""
        record = {"format": _FORMAT, **vars(self)}
        copied: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
        return copied

    @classmethod
    def from_json(cls, record: Mapping[str, Any] | str) -> Schema:
        """Make a schema from what `to_json` returned, or from its text.

        Raises a LoadError if it is damaged or from a newer pyrocell.
        """
        try:
            found = json.loads(record if isinstance(record, str) else json.dumps(dict(record)))
            if found["format"] > _FORMAT:
                raise LoadError(
                    f"The schema has format {found['format']}; this pyrocell reads up to {_FORMAT}: install a newer "
                    "one."
                )
            schema = cls(**{name: found[name] for name in ("n_cells", "fields", "setup", "statistics")})
            schema._check_types()
            return schema
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise LoadError(f"This is no schema of pyrocell, or it is damaged: {error!r}.") from error

    def _check_types(self) -> None:
        """Raise a TypeError if what was read from a file has other types than what is written there."""
        _require(self.n_cells, int)
        if self.n_cells < 1:
            raise TypeError(f"{self.n_cells} is no number of cells")
        for part in (self.fields, self.setup, self.statistics):
            _require(part, dict)
        for record in self.fields.values():
            for name, kind in (("given", bool), ("names", list), ("cells", dict)):
                _require(record[name], kind)

    def __repr__(self) -> str:
        rows = next((record["rows"] for record in self.fields.values() if "rows" in record), "cells")
        parts = [f"{self.n_cells} {rows}"]
        for name, record in self.fields.items():
            if record["given"]:
                parts.append(f"{name}: {_summary(record)}")
        return "; ".join(parts)


def _reading(field: Field, features: Sequence[str]) -> Field:
    """Return a field of counts for a model that reads some features alone."""
    if not isinstance(field, Counts):
        raise TypeError(f"{field!r} has no features to choose from; only fields of counts do.")
    return field.only(features)


def _require(value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")


def _summary(record: Mapping[str, Any]) -> str:
    names = record["names"]
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} ({shown})"


def _warn_confounded(fields: Mapping[str, Field], frozen: Mapping[str, Frozen]) -> None:
    if "batch" not in frozen or not frozen["batch"].codes:
        return
    [(batch_key, batch)] = frozen["batch"].codes.items()
    covariates = [frozen[name] for name, item in fields.items() if item.is_covariate]
    preflight.warn_confounded(
        batch_key,
        batch,
        codes={key: codes for found in covariates for key, codes in found.codes.items()},
        numbers={key: values for found in covariates for key, values in found.numbers.items()},
    )


def _refuse_unmeasured_groups(
    fields: Mapping[str, Field], frozen: Mapping[str, Frozen], known: Schema | None = None
) -> None:
    """Raise a DataError if a category groups the measured cells of a field, and no cell of one that is new was."""
    for name, item in fields.items():
        of = getattr(item, "groups_of", None)
        measured = frozen[of].measured if of is not None else None
        if measured is None or not frozen[name].codes:
            continue
        [(key, codes)] = frozen[name].codes.items()
        levels = frozen[name].record["names"]
        n_cells = np.bincount(codes, minlength=len(levels))
        n_measured = np.bincount(codes, measured, minlength=len(levels))
        n_known = 0 if known is None or not known.has(name) else known.size(name)
        counted = list(zip(levels, n_cells, n_measured, strict=True))[n_known:]
        empty = [level for level, n, m in counted if n and not m]
        if empty:
            raise DataError(
                f"The column {key!r} names the {name}s {list_some(empty)}, but no cell of theirs has {of} that were "
                f"measured. Give these cells the {name} whose {of} are to be imputed for them, or remove them."
            )


def _library_moments(frozen: Mapping[str, Frozen], known: int = 0) -> dict[str, list[float]]:
    """Moments of the log totals in each batch but the first ``known`` ones."""
    totals = frozen["counts"].totals if "counts" in frozen else None
    if totals is None:
        return {}
    batch = np.zeros(len(totals), dtype=np.int64)
    if "batch" in frozen and frozen["batch"].codes:
        [batch] = frozen["batch"].codes.values()
    measured = np.isfinite(totals)
    # A batch in which no cell was measured is taken for an average one: nothing else is known of it.
    chosen = [(batch == level) & measured for level in range(known, batch.max() + 1)]
    logs = [np.log(totals[rows if rows.any() else measured]) for rows in chosen]
    return {
        "library_log_mean": [float(values.mean()) for values in logs],
        "library_log_var": [float(values.var()) for values in logs],
    }


def _further_moments(known: dict[str, list[float]], frozen: Mapping[str, Frozen]) -> dict[str, list[float]]:
    """Put the moments of a query's new batches after those of the reference, which stay."""
    new = _library_moments(frozen, known=len(known.get("library_log_mean", ())))
    return {name: [*values, *new.get(name, [])] for name, values in known.items()}
