"""Saved models: tensors, a JSON record, optionally the data; read without executing anything."""

from __future__ import annotations

import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyrocell import files
from pyrocell.data import Schema
from pyrocell.data.registration import complete_setup
from pyrocell.errors import LoadError

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrocell.models.base import CellModel

__all__ = ["load", "save", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of everything that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("pyrocell", "torch", "pyro-ppl", "anndata", "numpy", "scipy", "pandas"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found


def save(model: CellModel, folder: str | Path, *, overwrite: bool, save_anndata: bool) -> None:
    """Write a model; see `CellModel.save`."""
    folder = Path(folder)
    if (folder / "model.json").exists() and not overwrite:
        raise FileExistsError(
            f"{folder} holds a saved model already; choose another folder or give overwrite=True."
        )
    record = {
        "kind": "model",
        "class": type(model).__name__,
        "constructor": _plain(model.constructor),
        "schema": model.data.to_json(),
        "seed": model.stream.seed,
        "is_trained": model.is_trained,
        "cell_names": model.cell_names,
        "history": _history_to_json(model.history),
        "has_anndata": save_anndata,  # a file of a model before is not this one's
        "versions": versions(),
    }
    tensors = {f"module.{name}": t for name, t in model.module.state_dict().items()}
    tensors["stream"] = model.stream.state
    tensors["train_indices"] = torch.from_numpy(model.train_indices)
    tensors["validation_indices"] = torch.from_numpy(model.validation_indices)
    files.write_folder(folder, "model", tensors, record)
    if save_anndata:
        model.require_data(None).adata.write_h5ad(folder / "adata.h5ad")


def load(
    model_class: type[CellModel], folder: str | Path, adata: AnnData | None, *, device: str | None
) -> CellModel:
    """Read a model; see `CellModel.load`."""
    folder = Path(folder)
    tensors, record = files.read_folder(folder, "model")
    _check_record(model_class, folder, record)
    try:
        model = _from_record(model_class, record)
        _fill(model, tensors, record)
    except LoadError as error:
        raise LoadError(f"{folder / 'model.json'}: {error}") from error
    if device is not None:
        model.module.to(device)
    if adata is None and record.get("has_anndata", False):
        adata = _read_anndata(folder / "adata.h5ad")
    if adata is not None:
        model.attach(adata)
    return model


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
    own = ("stream", "train_indices", "validation_indices")
    if missing := [name for name in own if name not in tensors]:
        raise LoadError(f"The tensors {missing} are missing from model.safetensors; save the model again.")
    state = {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
    try:
        model.module.load_state_dict(state)
    except RuntimeError as error:
        raise LoadError(f"The tensors do not fit a {type(model).__name__}: {error}") from error
    model.module.eval()
    model.stream.state = tensors["stream"]
    model.train_indices, model.validation_indices = (tensors[name].numpy() for name in own[1:])
    model.is_trained, model.cell_names = record["is_trained"], record["cell_names"]
    try:
        model.history = _history_from_json(record["history"])
    except (TypeError, ValueError) as error:
        raise LoadError(f"The history is damaged: {error}.") from error


def _read_anndata(path: Path) -> AnnData:
    """Read the saved data."""
    from anndata import read_h5ad

    try:
        return read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many kinds on damaged files
        raise LoadError(
            f"{path} cannot be read ({error}); copy the whole folder again, or give the data with adata=."
        ) from error


_RECORD = {
    "class": str,
    "constructor": dict,
    "schema": dict,
    "cell_names": list,
    "seed": int,
    "is_trained": bool,
    "history": dict,
}


def _check_record(model_class: type[CellModel], folder: Path, record: dict[str, Any]) -> None:
    path = folder / "model.json"
    if missing := sorted({"kind", *_RECORD} - set(record)):
        raise LoadError(f"{path} lacks {missing}; it is damaged, or not a saved model.")
    if wrong := [name for name, kind in _RECORD.items() if not isinstance(record[name], kind)]:
        name = wrong[0]
        raise LoadError(
            f"{path}: {name!r} is {record[name]!r}; expected {_RECORD[name].__name__}. The file is damaged; save again."
        )
    if record["class"] != model_class.__name__:
        raise LoadError(
            f"{folder} holds a {record['class']}, not a {model_class.__name__}; load it with "
            f"{record['class']}.load({str(folder)!r})."
        )


def _plain(value: Any) -> Any:
    """Turn constructor arguments into JSON values, or say which one cannot be saved."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"A constructor argument of type {type(value).__name__} cannot be saved; expected numbers, strings, None, or "
        "lists and dicts of them."
    )


def _history_to_json(history: pd.DataFrame) -> dict[str, list[float | None]]:
    return {
        str(name): [None if math.isnan(value) else value for value in column.astype(float)]
        for name, column in history.items()
    }


def _history_from_json(columns: dict[str, list[float | None]]) -> pd.DataFrame:
    history = pd.DataFrame({name: np.array(values, dtype=float) for name, values in columns.items()})
    history.index.name = "epoch"
    return history
