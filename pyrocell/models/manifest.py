"""How a model came about, in JSON values: what a methods section needs, and whoever repeats the work."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyrocell.models.core import ModelCore
from pyrocell.models.packing import pack

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from pyrocell.infer.trainer import Trainer

__all__ = ["Manifested", "bound_to", "training_record", "versions"]

_PACKAGES = ("pyrocell", "torch", "pyro-ppl", "anndata", "scanpy", "numpy", "scipy", "pandas")


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found


def versions() -> dict[str, str]:
    """Return the versions of everything that results depend on."""
    return dict(_versions())


class Manifested(ModelCore):
    """Mix-in of `CellModel`: the record of how a model came about."""

    made_with: dict[str, str] | None = None
    """Versions that a model from a file was made with."""
    trainings: tuple[dict[str, Any], ...] = ()
    """A record of each training, the oldest first."""

    def manifest(self) -> dict[str, Any]:
        """Say how this model came about: it is saved with the model, and stands in the report.

        Returns
        -------
        dict
            JSON values. ``model``, ``seed``, ``versions`` (that the model was made with), ``constructor`` (all
            arguments; arrays and tables by shape and SHA-256), ``setup`` (all arguments of ``setup_anndata``), ``data``
            (``n_cells``, and ``sha256`` of everything read of the data last trained on: None before training),
            ``mapping`` (of a query), and ``trainings``: for each its options, the cells and the device used, the epochs
            and steps done (steps alone, if interrupted in its first epoch), whether it came to its end, its versions,
            the SHA-256 of the data at its beginning, and a checksum of ``cells``: their names and order.
        """
        last = self.trainings[-1]["data"] if self.trainings else None
        manifest = {
            "model": type(self).__name__,
            "seed": self.stream.seed,
            "versions": versions() if self.made_with is None else self.made_with,
            "constructor": {name: _described(value) for name, value in self.constructor.items()},
            "setup": self.data.setup,
            "data": {"n_cells": self.data.n_cells, "sha256": last},
            "mapping": self.mapping,
            "trainings": self.trainings,
        }
        copied: dict[str, Any] = json.loads(json.dumps(manifest))
        return copied

    def note_training(self, record: dict[str, Any], *, resumed: bool) -> None:
        """Add a record; that of a training which went on from a checkpoint takes the place of those of its epochs."""
        before = [old for old in self.trainings if not resumed or old["first_epoch"] < record["first_epoch"]]
        self.trainings = (*before, record | {"cells": self._cells_in_order()})

    def attach(self, adata: AnnData | MuData, *, check: bool = True) -> None:
        """Take data to work on; rows that were trained on or held out say nothing of other cells."""
        super().attach(adata, check=check)
        if not len(self.train_indices) or self.dataset is None:
            return
        known = self.trainings[-1].get("cells") if self.trainings else None
        same = self.dataset.n_cells == self.data.n_cells if known is None else known == self._cells_in_order()
        if not same:
            self.train_indices = self.validation_indices = np.array([], dtype=np.int64)

    def _cells_in_order(self) -> str:
        """Say in few letters which cells the model has, in which order: by name, and by the size of some of them.

        Three digits of it: the same data in another container are summed in another order.
        """
        assert self.dataset is not None  # the callers have looked
        sizes = [f"{size:.2e}" for size in self._seen]
        content = "\n".join([*map(str, self.dataset.obs_names), *sizes])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def bound_to(model: Manifested, content: str | None) -> dict[str, Any]:
    """Return what a checkpoint must agree in with the model that goes on from it, beside options of training.

    Parameters
    ----------
    model
        That is trained.
    content
        SHA-256 of the data; None where it is not wanted.
    """
    constructor = {f"constructor.{name}": _described(value) for name, value in model.constructor.items()}
    bound = {"model": type(model).__name__, "data": content, **constructor}
    return {name: value for name, value in bound.items() if name != "data" or value is not None}


def training_record(trainer: Trainer, *, finished: bool, beside: Mapping[str, Any]) -> dict[str, Any]:
    """Say in JSON values what a training did.

    Parameters
    ----------
    trainer
        After training.
    finished
        Whether it came to its end, rather than to an interruption or an error.
    beside
        What the trainer does not know.
    """
    plan, rows = trainer.plan, trainer.progress.rows
    options = {name: value for name, value in trainer.options.items() if not _is_of_model(name)}
    options |= {"max_epochs": trainer.max_epochs, "lr_decay": trainer.decay.share}
    options |= {"optimizer": _name_of(plan.optimizer)}
    options |= {name: getattr(plan, name) for name in ("checkpoint_every", "record_step", "max_bad_steps")}
    return {
        "options": options,
        "first_epoch": trainer.progress.epochs_before,
        "n_epochs": len(rows),
        "n_steps": trainer.progress.step,
        "n_skipped_steps": int(sum(row["skipped_steps"] for row in rows)),
        "finished": finished,
        "device": str(trainer.device),
        "n_threads": torch.get_num_threads(),
        "versions": versions(),
        **beside,
    }


def _is_of_model(option: str) -> bool:
    """Whether the manifest tells of it elsewhere: see `bound_to`."""
    return option in ("model", "data") or option.startswith("constructor.")


def _name_of(optimizer: Any) -> str:
    if isinstance(optimizer, str):
        return optimizer
    name = getattr(optimizer, "__qualname__", type(optimizer).__qualname__)
    return f"{getattr(optimizer, '__module__', '')}.{name}"


def _described(value: Any) -> Any:
    """Return a constructor argument as JSON values: of arrays and tables, shape and checksum."""
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if not isinstance(
        value, np.ndarray | torch.Tensor | pd.DataFrame | pd.Series | pd.Index | pd.Categorical
    ):
        return _plain(value)
    tensors: dict[str, torch.Tensor] = {}
    content = hashlib.sha256(json.dumps(pack(value, tensors), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return {"type": type(value).__name__, "shape": list(value.shape), "sha256": content.hexdigest()}


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(pack(value, {})))
    except TypeError:  # what cannot be saved can be told of all the same
        return repr(value)
