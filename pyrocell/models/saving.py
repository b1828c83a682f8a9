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
    if adata is None and (folder / "adata.h5ad").is_file():
        from anndata import read_h5ad

        adata = read_h5ad(folder / "adata.h5ad")
    schema = Schema.from_json(record["schema"])
    model = model_class.build((adata,), record["constructor"], seed=record["seed"], schema=schema)
    state = {name.removeprefix("module."): t for name, t in tensors.items() if name.startswith("module.")}
    try:
        model.module.load_state_dict(state)
    except RuntimeError as error:
        raise LoadError(f"The tensors in {folder} do not fit a {model_class.__name__}: {error}") from error
    model.module.eval()
    model.stream.state = tensors["stream"]
    model.train_indices, model.validation_indices = (
        tensors[name].numpy() for name in ("train_indices", "validation_indices")
    )
    model.is_trained = record["is_trained"]
    model.cell_names = record["cell_names"]
    if model.dataset is not None:
        model.require_same_cells(model.dataset)
    model.history = _history_from_json(record["history"])
    if device is not None:
        model.module.to(device)
    return model


def _check_record(model_class: type[CellModel], folder: Path, record: dict[str, Any]) -> None:
    expected = {"kind", "class", "constructor", "schema", "seed", "is_trained", "history", "cell_names"}
    if missing := sorted(expected - set(record)):
        raise LoadError(f"{folder / 'model.json'} lacks {missing}; it is damaged, or not a saved model.")
    if record["class"] != model_class.__name__:
        raise LoadError(
            f"{folder} holds a {record['class']}, not a {model_class.__name__}; load it with "
            f"pyrocell.{record['class']}.load({str(folder)!r})."
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
