"""The only training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrocell.infer.capture import StepGraphs, can_be_recorded
from pyrocell.infer.checkpoint import Progress, leave_checkpoint, write_checkpoint
from pyrocell.infer.elbo import Elbo, Population
from pyrocell.infer.guard import FiniteGuard, report_skipped, warn_of_skipped
from pyrocell.infer.interruption import Interruption
from pyrocell.infer.plan import TrainingPlan
from pyrocell.infer.progress import ProgressBar
from pyrocell.infer.schedule import Decay, make_plateau
from pyrocell.infer.streams import RandomStream, seeded
from pyrocell.infer.tally import Tally
from pyrocell.infer.tape import PlainStep, TapedStep

__all__ = ["Trainer"]

Minibatches = Callable[[np.random.Generator | None], Iterable[Population]]


class Trainer:
    """Fit the parameters of a module by stochastic variational inference.

    Parameters
    ----------
    elbo
        The objective.
    module
        Holder of every parameter of model and guide.
    plan
        Options.
    stream
        Random numbers of the model.
    shuffle
        NumPy generator that orders the cells of each epoch.
    lr
        Learning rate.
    max_epochs
        Epochs in all, also after a resume.
    n_epochs_kl_warmup
        Epochs until the KL weight is full.
    early_stopping
        Whether to stop on a stale validation ELBO and restore the best weights.
    steps_per_epoch
        Minibatches of an epoch.
    """

    def __init__(
        self,
        elbo: Elbo,
        module: torch.nn.Module,
        plan: TrainingPlan,
        *,
        stream: RandomStream,
        shuffle: np.random.Generator,
        lr: float,
        max_epochs: int,
        n_epochs_kl_warmup: int,
        early_stopping: bool,
        steps_per_epoch: int,
    ) -> None:
        self.elbo, self.module, self.plan = elbo, module, plan
        self.stream, self.shuffle = stream, shuffle
        self.max_epochs, self.early_stopping = max_epochs, early_stopping
        self.n_epochs_kl_warmup = n_epochs_kl_warmup
        self.device = next(module.parameters()).device
        self.optimizer = plan.make_optimizer(module.named_parameters(), lr)
        self.plateau = make_plateau(plan, self.optimizer)
        share = plan.lr_decay or 0.0
        self.decay = Decay(self.optimizer, share, max_epochs=max_epochs, steps_per_epoch=steps_per_epoch)
        self.options: dict[str, Any] = {
            "lr": lr,
            "n_epochs_kl_warmup": n_epochs_kl_warmup,
            "early_stopping": early_stopping,
            **plan.decisive(),
            **self.decay.decisive(),
        }
        self.progress = Progress()
        self.guard = FiniteGuard(module, plan.max_grad_norm)
        self.tally = Tally(self.device)
        recorded = plan.record_step and can_be_recorded(self.optimizer)
        self.graphs = StepGraphs(elbo, self.optimizer, self.guard, self.tally) if recorded else None
        plain = PlainStep(elbo, lambda: plan.products(self.device), self.device)
        taped = plan.record_step and self.device.type == "cpu"
        self.evaluate = TapedStep(plain, module, self.guard.undo) if taped else plain
        self.n_steps = max_epochs * steps_per_epoch
        self.last_finite = self.snapshot()
        self.best_state: dict[str, torch.Tensor] | None = None
        self.interruption, self.order_of_epoch = Interruption(), shuffle.bit_generator.state

    def fit(self, training: Minibatches, validation: Minibatches | None = None) -> pd.DataFrame:
        """Train until ``max_epochs`` or the early stop; returns the history, one row an epoch.

        Parameters
        ----------
        training, validation
            Functions that yield the minibatches of one epoch; training ones are shuffled by the generator given.

        Raises
        ------
        TrainingError
            After ``plan.max_bad_steps`` non-finite steps in a row; the best finite state is restored.
        KeyboardInterrupt, SystemExit
            On SIGINT and SIGTERM, when a step is complete and a checkpoint is written, if the plan has a place for one.
        """
        bar = ProgressBar(self.max_epochs, self.progress.epoch)
        with self.stream.active(), bar, Interruption() as self.interruption:
            while not self._is_done():
                row = self._train_epoch(training)
                if validation is not None and self._validates():
                    seen, loss = self._validate(validation)
                    row |= seen
                    self._judge(row, loss)
                self._finish_epoch(row)
                bar.show(row)
                if not self._is_done():
                    self._stop_if_asked(None)
            # Before a signal that came after the last step.
            if self.early_stopping and self.best_state is not None:
                self.module.load_state_dict(self.best_state)
        self.module.eval()
        warn_of_skipped(self.progress)
        return self.history()

    def history(self) -> pd.DataFrame:
        """Return one row for each epoch so far."""
        return pd.DataFrame(self.progress.rows).set_index("epoch") if self.progress.rows else pd.DataFrame()

    def _train_epoch(self, training: Minibatches) -> dict[str, float]:
        self.module.train()
        began = time.perf_counter() - self.progress.seconds
        self.order_of_epoch = self.shuffle.bit_generator.state
        if not self.progress.within:
            self.tally.begin()
        for cells in islice(training(self.shuffle), self.progress.within, None):
            weight = self.plan.kl_weight(self.progress.epoch, self.progress.step, self.n_epochs_kl_warmup)
            self.decay.set_rates(self.progress.step)
            if self.graphs is None or not self.graphs.replay(cells, weight, self.plan.products(self.device)):
                self._step(cells.load(), weight)
            self.progress.step += 1
            self.progress.within += 1
            self._stop_if_asked(began)
        if self.graphs is not None:
            self.graphs.end_epoch()
        epoch = self.tally.read()
        weight = self.plan.kl_weight(self.progress.epoch, self.progress.step - 1, self.n_epochs_kl_warmup)
        if epoch.skipped_on_device:
            report_skipped(self, epoch.skipped_on_device, epoch.culprit, epoch.longest)
        return {
            "epoch": self.progress.epoch,
            "elbo_train": sum(list(epoch.means.values())[:3]),
            **{f"{name}_train": mean for name, mean in epoch.means.items()},
            "kl_weight": weight,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - began,
            "skipped_steps": epoch.skipped,
        }

    def _step(self, cells: Population, weight: float) -> None:
        """Take one step, or skip it because the loss or a gradient is not finite."""
        self.guard.remember()
        terms = self.evaluate(cells, weight, self.n_steps - self.progress.step)
        if not self.guard.is_finite(terms.loss):
            self.guard.undo()
            self.tally.skip()
            self.progress.bad_in_a_row += 1
            report_skipped(self, 1, self.guard.culprit(terms), self.progress.bad_in_a_row)
            return
        self.progress.bad_in_a_row = 0
        self.optimizer.step()
        self.tally.add(terms)

    def _stop_if_asked(self, began: float | None) -> None:
        """Leave a checkpoint, if there is a place for one, and let an interruption have its way."""
        if self.interruption.asked is None:
            return
        if began is not None:  # within an epoch
            self.progress.tally = self.tally.to_json()
            self.progress.seconds = time.perf_counter() - began
        leave_checkpoint(self)
        self.interruption.deliver()

    def _validates(self) -> bool:
        last = self.progress.epoch == self.max_epochs - 1
        each = self.plan.validate_every or (1 if self.early_stopping or self.plan.lr_plateau else None)
        return last or (each is not None and (self.progress.epoch + 1) % each == 0)

    @torch.no_grad()
    def _validate(self, validation: Minibatches) -> tuple[dict[str, float], float]:
        """Return the bound for the history, and the loss itself, as it weighs the KL after warm-up."""
        self.module.eval()
        sums, n_cells = torch.zeros(4, device=self.device), 0
        # The same noise at each validation: epochs are comparable, and training does not feel that it happened.
        with seeded(self.stream.seed):
            for cells in validation(None):
                n_cells += len(cells)
                terms = self.elbo(cells.load(), self.plan.max_kl_weight)
                sums += torch.cat([terms.totals(), terms.loss.reshape(1) * len(cells)])
        reconstruction, kl_local, kl_global, loss = (sums / n_cells).tolist()
        row = {
            "elbo_validation": reconstruction + kl_local + kl_global,
            "reconstruction_validation": reconstruction,
            "kl_local_validation": kl_local,
        }
        return row, loss

    def _judge(self, row: dict[str, float], value: float) -> None:
        """Update the best state and the learning rate, once warm-up is over."""
        if row["kl_weight"] < self.plan.max_kl_weight:
            return
        if self.plan.lr_plateau:
            self.plateau.step(value)
        if value < self.progress.best - self.plan.min_delta:
            self.progress.best, self.progress.best_epoch, self.progress.stale = value, self.progress.epoch, 0
            if self.early_stopping:
                self.best_state = self.snapshot()
        else:
            self.progress.stale += 1

    def _is_done(self) -> bool:
        stopped_early = self.early_stopping and self.progress.stale >= self.plan.patience
        return stopped_early or self.progress.epoch >= self.max_epochs

    def _finish_epoch(self, row: dict[str, float]) -> None:
        self.progress.rows.append(row)
        self.progress.epoch += 1
        self.progress.within, self.progress.tally, self.progress.seconds = 0, {}, 0.0
        state = self.module.state_dict()  # skipped steps left no trace in it
        if all(bool(t.sum().isfinite()) for t in state.values()):  # a sum tells of all, in one pass
            for name, t in state.items():  # into the memory of the last one: parameters may be large
                self.last_finite[name].copy_(t)
        is_due = self.progress.epoch % self.plan.checkpoint_every == 0 or self._is_done()
        if self.plan.checkpoint is not None and is_due:
            write_checkpoint(self, self.plan.checkpoint)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copy the state of the module."""
        return {name: t.detach().clone() for name, t in self.module.state_dict().items()}
