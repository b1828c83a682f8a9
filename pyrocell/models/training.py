"""The verb that fits a model: how options become one run of the only training loop."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pyrocell import settings
from pyrocell.data import Cells
from pyrocell.errors import TrainingError, list_some
from pyrocell.infer.checkpoint import read_checkpoint
from pyrocell.infer.plan import TrainingPlan
from pyrocell.infer.split import chosen_rows, default_kl_warmup, default_max_epochs, split_cells
from pyrocell.infer.trainer import Trainer
from pyrocell.models.core import ModelCore

__all__ = ["Training"]


class Training(ModelCore):
    """Mix-in of `CellModel`: training and its record."""

    def train(
        self,
        max_epochs: int | None = None,
        *,
        lr: float = 1e-3,
        batch_size: int = 128,
        train_size: float = 0.9,
        validation_size: float | None = None,
        n_epochs_kl_warmup: int | None = None,
        early_stopping: bool = False,
        device: str | None = None,
        resume: str | Path | None = None,
        plan: TrainingPlan | None = None,
    ) -> None:
        """Fit the model.

        Training again goes on from the present parameters.

        Parameters
        ----------
        max_epochs
            Passes over the training cells; by default 400 for up to 20,000 cells, and fewer in proportion for more.
        lr
            Learning rate.
        batch_size
            Cells in a minibatch.
        train_size, validation_size
            Fractions of the cells to train on and to validate on (default: the rest).
        n_epochs_kl_warmup
            Epochs over which the KL weight grows; by default half of ``max_epochs``, at most 400, so that it ends.
        early_stopping
            Stop when the validation ELBO no longer improves, and restore the best weights.
        device
            Such as ``"cpu"`` or ``"cuda:0"``; by default ``pyrocell.settings.device`` or the best one present.
        resume
            Folder of a checkpoint (see ``TrainingPlan.checkpoint``) to go on from, exactly.
        plan
            Everything else.

        Raises
        ------
        TrainingError
            If the options are impossible, or after repeated non-finite steps.
        """
        plan = plan or TrainingPlan()
        dataset = self.require_data(None)
        training, validation = self._split(plan, train_size, validation_size)
        n_train = len(training)
        max_epochs = default_max_epochs(n_train, self.max_epochs_cap) if max_epochs is None else max_epochs
        batch_size = n_train if self.full_batch else batch_size
        _check_numbers(max_epochs, batch_size, lr, n_epochs_kl_warmup)
        if early_stopping and len(validation) == 0:
            raise TrainingError("early_stopping needs validation cells; set train_size below 1.")
        warmup = default_kl_warmup(max_epochs) if n_epochs_kl_warmup is None else n_epochs_kl_warmup
        where = _device(device)
        self.train_indices, self.validation_indices = training, validation  # a refused call changes nothing
        self.module.to(where)

        def minibatches(rows: np.ndarray) -> Callable[[np.random.Generator | None], Iterator[Cells]]:
            def one_epoch(rng: np.random.Generator | None) -> Iterator[Cells]:
                # One minibatch of all cells keeps their order: Pyro then takes parameters of cells as they lie.
                order = rng if len(rows) > batch_size else None
                return dataset.minibatches(rows, batch_size, rng=order, device=where, n_total=n_train)

            return one_epoch

        with self.running():
            trainer = Trainer(
                self.elbo(),
                self.module,
                plan,
                stream=self.stream,
                shuffle=np.random.default_rng([self.stream.seed, len(self.history)]),
                lr=lr,
                max_epochs=max_epochs,
                n_epochs_kl_warmup=warmup,
                early_stopping=early_stopping,
            )
            cells = self._split_fingerprint()
            trainer.options |= {"batch_size": batch_size, "cells": cells, "seed": self.stream.seed}
            trainer.progress.epochs_before = len(self.history)
            if resume is not None:
                read_checkpoint(trainer, resume)
                self.history = self.history.iloc[: trainer.progress.epochs_before]
            try:
                trainer.fit(minibatches(training), minibatches(validation) if len(validation) else None)
            finally:
                self.module.eval()  # also after an interruption from the keyboard
                self._after_training(trainer.history())

    def _split(
        self, plan: TrainingPlan, train_size: float, validation_size: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the rows to train on and to validate on."""
        n_cells = self.require_data(None).n_cells
        nobody = np.array([], dtype=np.int64)
        if self.has_local_parameters:  # a cell that was not trained on would have an untrained posterior
            return np.arange(n_cells), nobody
        if plan.train_indices is None:
            rng = np.random.default_rng([self.stream.seed, n_cells])
            return split_cells(n_cells, train_size, validation_size, rng)
        training, validation = chosen_rows(plan.train_indices, n_cells, "TrainingPlan.train_indices"), nobody
        if plan.validation_indices is not None and len(plan.validation_indices):
            validation = chosen_rows(plan.validation_indices, n_cells, "TrainingPlan.validation_indices")
        both = np.intersect1d(training, validation)
        if len(both):
            raise TrainingError(
                f"{len(both)} cells are in both train_indices and validation_indices: {list_some(both.tolist())}. "
                "Validate on other cells than are trained on."
            )
        return training, validation

    def _split_fingerprint(self) -> str:
        """Say in few letters which cells are trained and validated on."""
        content = self.train_indices.tobytes() + b"|" + self.validation_indices.tobytes()
        return hashlib.blake2b(content, digest_size=8).hexdigest()

    def _after_training(self, history: pd.DataFrame) -> None:
        if len(history):
            history.index += len(self.history)
            self.history = pd.concat([self.history, history]) if len(self.history) else history
            self.is_trained = True


def _check_numbers(max_epochs: float, batch_size: float, lr: float, warmup: float | None) -> None:
    """Refuse impossible numbers by name."""
    for name, value, least in (
        ("max_epochs", max_epochs, 1),
        ("batch_size", batch_size, 1),
        ("n_epochs_kl_warmup", 0 if warmup is None else warmup, 0),
    ):
        if not isinstance(value, int | np.integer) or value < least:
            raise TrainingError(f"{name} is {value}; expected a whole number of at least {least}.")
    if not 0 <= lr < math.inf:
        raise TrainingError(f"lr is {lr}; expected a learning rate of at least 0, such as 1e-3.")


def _device(requested: str | None) -> torch.device:
    try:
        return settings.default_device(requested)
    except RuntimeError as error:
        wrong = settings.device if requested is None else requested
        raise TrainingError(
            f"device is {wrong!r}; expected such as 'cpu', 'cuda:0' or 'mps': {error}"
        ) from error
