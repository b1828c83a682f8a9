"""Whether what was read from a saved model is sound, before any of it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from pyrocell.data.storing import DATA_FILES
from pyrocell.errors import LoadError, list_some
from pyrocell.infer.landmarks import Landmarks
from pyrocell.infer.sound import DAMAGED, check_state, check_stream, with_prefix

if TYPE_CHECKING:
    from pyrocell.models.base import CellModel

__all__ = ["check_record", "check_tensors", "no_more_than"]

_RECORD = {
    "class": str,
    "constructor": dict,
    "schema": dict,
    "cell_names": list,
    "seed": int,
    "is_trained": bool,
    "history": dict,
    "data_file": str,
}
# Entries that files of the first version may lack.
_OPTIONAL = {"mapping": dict | None, "training_defaults": dict, "manifest": dict}
_MAPPING = {"frozen": bool, "new_categories": dict, "absent_features": dict, "fraction_absent": dict}
# A model may take this many times the bytes of its file, and this many bytes in any case.
_FOLD, _SMALL = 64, 2**28
_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye}


def check_record(model_class: type[CellModel], folder: Path, record: dict[str, Any]) -> None:
    """Raise a LoadError unless the JSON record is one of a saved model of this class."""
    path = folder / "model.json"
    if missing := sorted({"kind", *_RECORD} - set(record)):
        raise LoadError(f"{path} lacks {missing}; it is damaged, or not a saved model.")
    present = {name: kind for name, kind in _OPTIONAL.items() if name in record}
    for name, kind in {**_RECORD, **present}.items():
        if not isinstance(record[name], kind):
            raise LoadError(
                f"{path}: {name!r} is {record[name]!r}; expected {getattr(kind, '__name__', kind)}. {DAMAGED}"
            )
    if record["class"] != model_class.__name__:
        raise LoadError(
            f"{folder} holds a {record['class']}, not a {model_class.__name__}; load it with "
            f"{record['class']}.load({str(folder)!r})."
        )
    if record["data_file"] not in ("", *DATA_FILES):
        raise LoadError(
            f"{path}: 'data_file' is {record['data_file']!r}; expected {list_some(DATA_FILES)}. {DAMAGED}"
        )
    mapping = record.get("mapping")
    if mapping is not None and not all(isinstance(mapping.get(k), kind) for k, kind in _MAPPING.items()):
        raise LoadError(f"{path}: 'mapping' is {mapping!r}; expected {list_some(_MAPPING)}. {DAMAGED}")
    for name, column in record["history"].items():
        if not isinstance(column, list) or not all(isinstance(one, int | float | None) for one in column):
            raise LoadError(f"{path}: 'history' has {name!r}, which is no list of numbers. {DAMAGED}")
    _check_manifest(path, record.get("manifest", {}))
    if not all(isinstance(name, str) for name in record["cell_names"]):
        raise LoadError(f"{path}: 'cell_names' holds other things than names. {DAMAGED}")


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    trainings = manifest.get("trainings", [])
    sound = isinstance(trainings, list) and isinstance(manifest.get("versions", {}), dict)
    if not sound or not all(
        isinstance(one, dict) and type(one.get("first_epoch")) is int and "data" in one for one in trainings
    ):
        raise LoadError(f"{path}: 'manifest' is not one that a model gives. {DAMAGED}")


def check_tensors(model: CellModel, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Raise a LoadError unless the tensors are those of this model."""
    own = ("stream", "train_indices", "validation_indices")
    if missing := [name for name in own if name not in tensors]:
        raise LoadError(f"The tensors {missing} are missing from model.safetensors; save the model again.")
    known, fit = model.module.state_dict(), f"The tensors do not fit a {type(model).__name__}"
    check_state(fit, with_prefix(tensors, "module."), model.module)
    for name, mask in with_prefix(tensors, "trainable.").items():
        if name not in known or mask.shape != known[name].shape or mask.dtype != torch.bool:
            raise LoadError(f"{fit}: trainable.{name} is no mask of a parameter. {DAMAGED}")
    check_stream(tensors["stream"])
    for name in own[1:]:
        _check_rows(name, tensors[name])
    _check_landmarks(with_prefix(tensors, "landmarks."))
    if model.has_local_parameters and len(record["cell_names"]) != model.data.n_cells:
        raise LoadError(
            f"{fit}: it has parameters of {model.data.n_cells} cells, of which {len(record['cell_names'])} have names. "
            f"{DAMAGED}"
        )


def _check_rows(name: str, rows: torch.Tensor) -> None:
    if rows.dtype != torch.int64 or rows.ndim != 1 or (len(rows) and int(rows.min()) < 0):
        raise LoadError(
            f"The tensor {name} is no list of rows, but {rows.dtype} of {tuple(rows.shape)}. {DAMAGED}"
        )


def _check_landmarks(found: dict[str, torch.Tensor]) -> None:
    shapes = {name: (tensor.ndim, tensor.dtype) for name, tensor in found.items()}
    wanted = dict(zip(Landmarks.__dataclass_fields__, ((2, torch.float32), (1, torch.float32)), strict=True))
    if found and shapes != wanted:
        raise LoadError(f"The file has the landmarks {shapes}; expected {wanted}. {DAMAGED}")


@contextmanager
def no_more_than(n_bytes: int) -> Iterator[None]:
    """Refuse to make tensors that are together far larger than a file: sizes in a damaged one must not fill the memory.

    Parameters
    ----------
    n_bytes
        Size of all tensors of the file.
    """
    with _Ceiling(max(_SMALL, _FOLD * n_bytes)):
        yield


class _Ceiling(TorchFunctionMode):
    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.left = n_bytes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the sizes that a tensor is to be made with, and add them up: many small ones fill a memory too."""
        if func in _FACTORIES and args:
            sizes = args[0] if isinstance(args[0], tuple | list | torch.Size) else args
            numbers = [size for size in sizes if isinstance(size, int)]
            self.left -= 4 * math.prod(numbers)
            if self.left < 0:
                raise ValueError(f"with a tensor of {tuple(numbers)} the model is far larger than the file")
        return func(*args, **(kwargs or {}))
