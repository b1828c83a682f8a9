"""Saved models: tensors, a JSON record, optionally the data; read without executing anything."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyrocell import files
from pyrocell.data import Schema
from pyrocell.data.registration import complete_setup
from pyrocell.data.storing import data_file_of, read_data, write_data
from pyrocell.errors import LoadError
from pyrocell.infer.freezing import freeze
from pyrocell.infer.landmarks import Landmarks
from pyrocell.infer.sound import with_prefix
from pyrocell.models.manifest import versions
from pyrocell.models.novelty import find_landmarks
from pyrocell.models.packing import pack, unpack
from pyrocell.models.soundness import check_record, check_tensors, no_more_than

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from pyrocell.models.base import CellModel

__all__ = ["load", "read", "save"]


def save(model: CellModel, folder: str | Path, *, overwrite: bool, save_anndata: bool) -> None:
    """Write a model; see `CellModel.save`."""
    folder = Path(folder)
    data = model.require_data(None).adata if save_anndata else None
    data_file = "" if data is None else data_file_of(data)  # that of a model before is not this one's
    _refuse_to_replace(folder, data_file, overwrite=overwrite)
    arrays: dict[str, torch.Tensor] = {}
    record = {
        "kind": "model",
        "class": type(model).__name__,
        "constructor": pack(model.constructor, arrays),
        "schema": model.data.to_json(),
        "seed": model.stream.seed,
        "is_trained": model.is_trained,
        "cell_names": model.cell_names,
        "history": _history_to_json(model.history),
        "mapping": model.mapping,
        "training_defaults": {name: vars(model)[name] for name in _DEFAULTS if name in vars(model)},
        "data_file": data_file,
        "versions": versions(),
        "manifest": model.manifest(),
    }
    tensors = {f"module.{name}": t for name, t in model.module.state_dict().items()}
    tensors |= {f"trainable.{name}": mask for name, mask in (model.trainable or {}).items()}
    tensors |= arrays
    if (landmarks := find_landmarks(model)) is not None:
        tensors |= {f"landmarks.{name}": t for name, t in vars(landmarks).items()}
    tensors["stream"] = model.stream.state
    tensors["train_indices"] = torch.from_numpy(model.train_indices)
    tensors["validation_indices"] = torch.from_numpy(model.validation_indices)
    beside = {} if data is None else {data_file: partial(write_data, data)}
    files.write_folder(folder, "model", tensors, record, beside=beside)


def _refuse_to_replace(folder: Path, data_file: str, *, overwrite: bool) -> None:
    """Replace a saved model only if asked to, and data only if they are those of a saved model."""
    if files.holds(folder, "model") and not overwrite:
        raise FileExistsError(
            f"{folder} holds a saved model already; choose another folder or give overwrite=True."
        )
    own = [record.get("data_file") for record in files.records_in(folder, "model")]
    if data_file and os.path.lexists(folder / data_file) and data_file not in own:
        raise FileExistsError(
            f"{folder / data_file} was not written with the model there, and save_anndata=True would replace it, with "
            "overwrite=True too. Choose another folder, or move that file."
        )


def load(
    model_class: type[CellModel], folder: str | Path, adata: AnnData | MuData | None, *, device: str | None
) -> CellModel:
    """Read a model; see `CellModel.load`."""
    folder = Path(folder)
    model, record = read(model_class, folder)
    if device is not None:
        model.module.to(device)
    if adata is None and record["data_file"]:
        adata = read_data(files.beside_path(folder, record, record["data_file"]))
    if adata is not None:
        model.attach(adata)
    return model


def read(model_class: type[CellModel], folder: str | Path) -> tuple[CellModel, dict[str, Any]]:
    """Read a model without data, and the record beside its tensors."""
    folder = Path(folder)
    tensors, record = files.read_folder(folder, "model")
    check_record(model_class, folder, record)
    try:
        record["constructor"] = unpack(record["constructor"], tensors)
        with no_more_than(sum(tensor.nbytes for tensor in tensors.values())):
            model = _from_record(model_class, record)
        check_tensors(model, tensors, record)
        _fill(model, tensors, record)
    except (LoadError, RecursionError) as error:
        raise LoadError(f"{folder / 'model.json'}: {error}") from error
    return model, record


def _from_record(model_class: type[CellModel], record: dict[str, Any]) -> CellModel:
    """Build the model without data, so that whatever goes wrong is the file's fault."""
    schema = Schema.from_json(record["schema"])
    if set(schema.fields) != set(model_class.fields):
        raise LoadError(
            f"The file has the fields {sorted(schema.fields)}, {model_class.__name__} has "
            f"{sorted(model_class.fields)}: the class has changed since, or the file is damaged."
        )
    try:
        complete_setup(model_class.fields, schema.setup)
        return model_class.build((None,), record["constructor"], seed=record["seed"], schema=schema)
    except Exception as error:  # whatever a constructor raises on arguments or sizes that it was not made for
        raise LoadError(
            f"The constructor arguments {record['constructor']} or the schema do not fit {model_class.__name__}: "
            f"{error}. The class has changed since, or the file is damaged."
        ) from error


def _fill(model: CellModel, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Put parameters, random stream and history in place."""
    model.module.load_state_dict(with_prefix(tensors, "module."))
    model.module.eval()
    model.stream.state = tensors["stream"]
    manifest = record.get("manifest", {})
    model.made_with = manifest.get("versions", record.get("versions"))
    model.trainings = tuple(manifest.get("trainings", ()))
    for name in ("train_indices", "validation_indices"):
        setattr(model, name, tensors[name].numpy())
    model.is_trained, model.cell_names = record["is_trained"], record["cell_names"]
    for name, value in record.get("training_defaults", {}).items():
        if name in _DEFAULTS and isinstance(value, int):
            setattr(model, name, value)
    model.mapping = record.get("mapping")
    if model.mapping is not None and model.mapping["frozen"]:
        model.trainable = with_prefix(tensors, "trainable.")
        freeze(model.module, model.trainable)
    if landmarks := with_prefix(tensors, "landmarks."):
        model.landmarks = Landmarks(**landmarks)
    try:
        model.history = _history_from_json(record["history"])
    except (TypeError, ValueError) as error:
        raise LoadError(f"The history is damaged: {error}.") from error


# What a fitted model to start from changes of the class's training.
_DEFAULTS = ("max_epochs_cap", "kl_warmup_cap")


def _history_to_json(history: pd.DataFrame) -> dict[str, list[float | None]]:
    return {
        str(name): [None if math.isnan(value) else value for value in column.tolist()]
        for name, column in history.items()
    }


def _history_from_json(columns: dict[str, list[float | None]]) -> pd.DataFrame:
    history = pd.DataFrame({name: _column(values) for name, values in columns.items()})
    history.index.name = "epoch"
    return history


def _column(values: list[float | None]) -> np.ndarray:
    whole = bool(values) and all(type(value) is int for value in values)
    return np.array(values, dtype=np.int64 if whole else float)
