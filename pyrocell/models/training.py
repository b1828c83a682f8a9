"""The verb that fits a model: how options become one run of the only training loop."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pyrocell import settings
from pyrocell.data import Dataset
from pyrocell.data.resident import resident_on
from pyrocell.errors import TrainingError, list_some
from pyrocell.infer.checkpoint import read_checkpoint, refuse_to_replace
from pyrocell.infer.elbo import Population
from pyrocell.infer.freezing import frozen_besides
from pyrocell.infer.plan import TrainingPlan
from pyrocell.infer.schedule import tell_of_idle_patience
from pyrocell.infer.split import chosen_rows, default_kl_warmup, default_max_epochs, split_cells
from pyrocell.infer.trainer import Trainer
from pyrocell.models.manifest import Manifested, bound_to, training_record

__all__ = ["Training"]

Minibatches = Callable[[np.random.Generator | None], Iterator[Population]]


class Training(Manifested):
    """Mix-in of `CellModel`: training and its record."""

    def train(
        self,
        max_epochs: int | None = None,
        *,
        lr: float | None = None,
        batch_size: int | None = None,
        train_size: float | None = None,
        validation_size: float | None = None,
        n_epochs_kl_warmup: int | None = None,
        early_stopping: bool | None = None,
        device: str | None = None,
        resume: str | Path | None = None,
        plan: TrainingPlan | None = None,
    ) -> None:
        """Fit the model.

        Training again goes on from the present parameters.

        Parameters
        ----------
        max_epochs
            Passes over the training cells; by default the class's ``max_epochs_cap`` (400 unless its page says
            otherwise) for up to 20,000 cells, and fewer in proportion for more; never fewer for a model with parameters
            of single cells, each of which takes one step a pass.
        lr
            Learning rate, the same for all steps; by default the class's ``default_lr`` (1e-3 unless its page says
            otherwise), which falls over the last part of training that ``default_lr_decay`` says (0 but for SCVI).
        batch_size
            Cells in a minibatch; by default the class's ``default_batch_size`` (128). A model whose loss couples all
            cells takes none.
        train_size, validation_size
            Fractions of the cells to train on and to validate on; by default the class's ``default_train_size`` (0.9
            unless its page says otherwise), and the rest.
        n_epochs_kl_warmup
            Epochs over which the KL weight grows; by default half of ``max_epochs``, so that it ends, and at most the
            class's ``kl_warmup_cap`` (400).
        early_stopping
            Stop when the validation ELBO no longer improves, and restore the best weights. By default the class's
            ``default_early_stopping`` (False), where there are validation cells.
        device
            Such as ``"cpu"`` or ``"cuda:0"``; by default ``pyrocell.settings.device`` or the best one present.
        resume
            Folder of a checkpoint (see ``TrainingPlan.checkpoint``) to go on from, exactly. SIGTERM and an interruption
            from the keyboard leave one too, from within the epoch.
        plan
            Everything else; by default the class's ``default_plan``. To change one option of it, give
            ``dataclasses.replace(model.default_plan, ...)``.

        Raises
        ------
        TrainingError
            If the options are impossible, if the folder for checkpoints holds that of another training, or after
            repeated non-finite steps: the model then holds its best finite state.
        SaveError
            If a checkpoint cannot be written, such as to a full disk; the one before stays, and the model holds what it
            has learned.
        """
        plan = self.default_plan if plan is None else plan
        if self.full_batch or self.has_local_parameters:
            self._refuse_parts(plan, batch_size, train_size, validation_size, early_stopping=early_stopping)
        refuse_to_replace(plan.checkpoint, resume)
        plan = self._scheduled(plan, lr)
        lr = self.default_lr if lr is None else lr
        dataset = self.require_data(None)
        training, validation = self._split(plan, train_size, validation_size)
        n_train = len(training)
        max_epochs = self._default_epochs(n_train) if max_epochs is None else max_epochs
        batch_size = self.default_batch_size if batch_size is None else batch_size
        batch_size = n_train if self.full_batch else batch_size
        _check_numbers(max_epochs, batch_size, lr, n_epochs_kl_warmup)
        early_stopping = self._stops_early(asked=early_stopping, n_validation=len(validation))
        warmup = default_kl_warmup(max_epochs, self.kl_warmup_cap)
        warmup = warmup if n_epochs_kl_warmup is None else n_epochs_kl_warmup
        tell_of_idle_patience(plan, early_stopping=early_stopping, n_epochs_after_warmup=max_epochs - warmup)
        where = _device(device)
        self.module.to(where)
        minibatches = _minibatches_of(dataset, batch_size, where, n_total=n_train, keep=self.full_batch)
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
                steps_per_epoch=math.ceil(n_train / batch_size),
            )
            content = dataset.content_hash if plan.hash_data else None
            self._bind(trainer, resume, batch_size=batch_size, split=(training, validation), content=content)
            cells = {"n_train": n_train, "n_validation": len(validation), "data": content}
            finished = False
            try:
                with frozen_besides(self.module, trainer.optimizer, self.trainable):
                    trainer.fit(minibatches(training), minibatches(validation) if len(validation) else None)
                finished = True
            finally:
                self.module.eval()  # also after an interruption from the keyboard
                self._after_training(trainer.history())
                # Also of an epoch that did not come to its end: the parameters moved.
                if trainer.progress.step:
                    record = training_record(trainer, finished=finished, beside=cells)
                    self.note_training(record, resumed=resume is not None)

    def _bind(
        self,
        trainer: Trainer,
        resume: str | Path | None,
        *,
        batch_size: int,
        split: tuple[np.ndarray, np.ndarray],
        content: str | None,
    ) -> None:
        """Say what a checkpoint must agree in, and go on from one if asked; a refused one changes nothing."""
        known = {"batch_size": batch_size, "seed": self.stream.seed, "cells": _fingerprint_of(*split)}
        trainer.options |= known | bound_to(self, content)
        trainer.progress.epochs_before = len(self.history)
        if resume is not None:
            read_checkpoint(trainer, resume)
            self.history = self.history.iloc[: trainer.progress.epochs_before]
        self.train_indices, self.validation_indices = split

    def _default_epochs(self, n_train: int) -> int:
        """Return the length of training: as many steps for each parameter, however many cells there are."""
        if (
            self.full_batch or self.has_local_parameters
        ):  # one step an epoch: of all, or of those of each cell
            return self.max_epochs_cap
        return default_max_epochs(n_train, self.max_epochs_cap)

    def _scheduled(self, plan: TrainingPlan, lr: float | None) -> TrainingPlan:
        """Say how the learning rate falls: as the plan does, or as the class does for its own learning rate."""
        if plan.lr_decay is not None:
            return plan
        is_chosen = lr is not None or plan.lr_plateau or callable(plan.optimizer)
        return replace(plan, lr_decay=0.0 if is_chosen else self.default_lr_decay)

    def _refuse_parts(
        self,
        plan: TrainingPlan,
        batch_size: int | None,
        train_size: float | None,
        validation_size: float | None,
        *,
        early_stopping: bool | None,
    ) -> None:
        """Refuse options that leave cells out, where the loss couples all or each has parameters of its own."""
        asked = {
            "batch_size": self.full_batch and batch_size is not None,
            "train_size": train_size not in (None, 1),
            "validation_size": validation_size not in (None, 0),
            "early_stopping": bool(early_stopping),
            "TrainingPlan.train_indices": plan.train_indices is not None
            and len(plan.train_indices) < self.require_data(None).n_cells,
        }
        if wrong := [name for name, is_asked in asked.items() if is_asked]:
            reason = (
                "its loss is one of all cells together, so every step sees them all and none"
                if self.full_batch
                else "each cell has parameters of its own, so none"
            )
            raise TrainingError(
                f"{type(self).__name__} was asked for {list_some(wrong)}; {reason} can be held out. Leave it out; to "
                "learn from fewer cells, make the model with fewer."
            )

    def _stops_early(self, *, asked: bool | None, n_validation: int) -> bool:
        """Return whether to stop early: as asked, or as the class does where there are cells to judge by."""
        if asked and n_validation == 0:
            raise TrainingError("early_stopping needs validation cells; set train_size below 1.")
        return self.default_early_stopping and n_validation > 0 if asked is None else asked

    def _split(
        self, plan: TrainingPlan, train_size: float | None, validation_size: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the rows to train on and to validate on."""
        if self.trainable is not None and not self.trainable:
            raise TrainingError(
                "The query has no category that the reference lacks, so there is nothing to learn: the model answers "
                "as it is. To train the parameters of the reference too, map with frozen=False."
            )
        n_cells = self.require_data(None).n_cells
        train_size = self.default_train_size if train_size is None else train_size
        nobody = np.array([], dtype=np.int64)
        if (
            self.has_local_parameters or self.full_batch
        ):  # a cell that was not trained on would have an untrained posterior
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

    def _after_training(self, history: pd.DataFrame) -> None:
        if len(history):
            history.index += len(self.history)
            self.history = pd.concat([self.history, history]) if len(self.history) else history
            self.is_trained = True
            if self.trainable is None:  # the latents move
                self.landmarks = None


def _fingerprint_of(training: np.ndarray, validation: np.ndarray) -> str:
    """Say in few letters which cells are trained and validated on."""
    content = training.tobytes() + b"|" + validation.tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _minibatches_of(
    dataset: Dataset, batch_size: int, device: torch.device, *, n_total: int, keep: bool
) -> Callable[[np.ndarray], Minibatches]:
    """Return a function from rows to their minibatches; each call shuffles them anew, or keeps those of the first."""
    resident = resident_on(dataset, device)

    def minibatches(rows: np.ndarray) -> Minibatches:
        def one_epoch(rng: np.random.Generator | None) -> Iterator[Population]:
            # One minibatch of all cells needs no shuffling.
            order = rng if len(rows) > batch_size else None
            if resident is not None:
                return resident.minibatches(rows, batch_size, rng=order, n_total=n_total)
            return dataset.minibatches(rows, batch_size, rng=order, device=device, n_total=n_total)

        return _read_once(one_epoch) if keep else one_epoch

    return minibatches


def _read_once(one_epoch: Minibatches) -> Minibatches:
    """Keep the minibatches of an epoch, which are the same at each."""
    kept = list(one_epoch(None))
    return lambda _: iter(kept)


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
