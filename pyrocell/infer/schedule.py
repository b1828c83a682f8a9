"""The learning rate during training: constant, falling towards the end, or falling where the loss is stuck."""

from __future__ import annotations

from typing import Any

import torch

from pyrocell import settings
from pyrocell.infer.plan import TrainingPlan

__all__ = ["Decay", "make_plateau", "tell_of_idle_patience"]


def make_plateau(
    plan: TrainingPlan, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.ReduceLROnPlateau:
    """Return what lowers the learning rate where the validation ELBO is stuck, as the plan says.

    Parameters
    ----------
    plan
        Options.
    optimizer
        Whose learning rates it lowers.
    """
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer,
        factor=plan.lr_factor,
        patience=plan.lr_patience,
        threshold=0.0,
        threshold_mode="abs",
        min_lr=plan.lr_min,
    )


def tell_of_idle_patience(plan: TrainingPlan, *, early_stopping: bool, n_epochs_after_warmup: int) -> None:
    """Log it where patience outlasts the training: what waits for it then does nothing.

    Parameters
    ----------
    plan
        Options.
    early_stopping
        Whether training is to stop early.
    n_epochs_after_warmup
        Epochs in which epochs without improvement are counted.
    """
    waiting = {"patience": early_stopping, "lr_patience": plan.lr_plateau}
    for name in (name for name, is_asked in waiting.items() if is_asked):
        if getattr(plan, name) >= n_epochs_after_warmup:
            settings.logger.warning(
                "%s is %d, and %d epochs follow the warm-up of the KL: it will not act. Give fewer n_epochs_kl_warmup, "
                "more max_epochs, or TrainingPlan(%s=...).", name, getattr(plan, name), n_epochs_after_warmup, name,
            )  # fmt: skip


class Decay:
    """The learning rate falls on a straight line towards zero, over the last steps of training.

    It follows from the number of the step alone, so a checkpoint needs no state of it.

    Parameters
    ----------
    optimizer
        Whose learning rates, as they are now, are those of the steps before.
    share
        Part of the steps over which they fall, from 0 (none) to 1 (all).
    max_epochs, steps_per_epoch
        Their product is the number of steps.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, share: float, *, max_epochs: int, steps_per_epoch: int
    ) -> None:
        self.optimizer, self.share, self.max_epochs = optimizer, share, max_epochs
        self.n_steps = max_epochs * steps_per_epoch
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def factor(self, step: int) -> float:
        """Return what the learning rates of a step are multiplied by; of the last step it is above zero.

        Parameters
        ----------
        step
            Steps before it.
        """
        falling = self.share * self.n_steps
        return min(1.0, (self.n_steps - step) / falling) if falling else 1.0

    def set_rates(self, step: int) -> None:
        """Give the optimizer the learning rates of a step.

        Parameters
        ----------
        step
            Steps before it.
        """
        if not self.share:  # they may belong to a plateau
            return
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor(step)

    def decisive(self) -> dict[str, Any]:
        """Return what a checkpoint must agree in: where rates fall, the number of epochs decides each step."""
        return {"lr_decay": self.share, "max_epochs": self.max_epochs} if self.share else {}
