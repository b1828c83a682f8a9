"""Watch over one training step: a non-finite loss or gradient must leave no trace in the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from pyrocell import settings
from pyrocell.errors import PyrocellWarning, TrainingError, list_some
from pyrocell.infer.elbo import ElboTerms

if TYPE_CHECKING:
    from pyrocell.infer.checkpoint import Progress
    from pyrocell.infer.trainer import Trainer

__all__ = ["FiniteGuard", "report_skipped", "warn_of_skipped"]

_MOST_NAMED = 5


class FiniteGuard:
    """Check gradients, name what is not finite, and undo what a bad minibatch did to running statistics.

    Parameters
    ----------
    module
        Holder of all parameters.
    max_grad_norm
        Clip the gradient's norm at this value; None for no clipping.
    """

    def __init__(self, module: torch.nn.Module, max_grad_norm: float | None) -> None:
        self.module, self.max_grad_norm = module, max_grad_norm
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        buffers = [b for b in module.buffers() if b.dtype != torch.bool]
        # One type at a time, which a device copies at once; the whole numbers count the steps of running statistics.
        kinds = [[b for b in buffers if b.is_floating_point() == is_float] for is_float in (True, False)]
        self._kinds = [kind for kind in kinds if kind]
        self.buffers = [buffer for kind in kinds for buffer in kind]
        self._kept: list[torch.Tensor] = []

    def remember(self) -> None:
        """Forget the last gradients, and keep the running statistics: a forward pass changes them."""
        for parameter in self.parameters:
            parameter.grad = None
        self._kept = [kept for kind in self._kinds for kept in torch._foreach_add(kind, 0)]

    def undo(self) -> None:
        """Bring the running statistics back."""
        for buffer, kept in zip(self.buffers, self._kept, strict=True):
            buffer.copy_(kept)

    def undo_unless(self, finite: torch.Tensor) -> None:
        """Bring the running statistics back where a step was not finite, without asking the device.

        Parameters
        ----------
        finite
            Whether it was, a scalar.
        """
        if self.buffers:
            pairs = zip(self.buffers, self._kept, strict=True)
            torch._foreach_copy_(self.buffers, [torch.where(finite, *pair) for pair in pairs])

    def is_finite(self, loss: torch.Tensor) -> torch.Tensor:
        """Clip the gradient if asked, and say whether all of it is finite, and the loss: a scalar on the device.

        Parameters
        ----------
        loss
            The loss that the gradient is of.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if self.max_grad_norm is None or not grads:
            return torch.stack([loss, *_one_number_each(grads)]).sum().isfinite()
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        finite = (loss + norm).isfinite()
        # What is not finite is left as it is: scaled by its norm, the gradients of all parameters would be no numbers.
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, torch.where(finite, scale, 1.0))
        return finite

    def culprit(self, terms: ElboTerms) -> str:
        """Name the sites, or else the parameters, that are not finite.

        Parameters
        ----------
        terms
            The bound that was evaluated.
        """
        sites = [name for name, term in terms.sites.items() if not term.isfinite()]
        if sites:
            return f"terms of sites {list_some(sites)}"
        grads = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        broken = [name for name, grad in grads.items() if not grad.isfinite().all()]
        return f"gradients of {list_some(broken)}" if broken else "norm of the gradient"


def _one_number_each(grads: list[torch.Tensor]) -> Iterable[torch.Tensor]:
    """Return numbers that are not finite if an entry is not.

    Devices take the largest entries, all at once. On the CPU a sum takes a tenth of the time; it overflows too where
    finite entries come near 3e38, and such a step is skipped with good reason.
    """
    if grads and grads[0].device.type == "cpu":
        return (grad.sum() for grad in grads)
    return torch._foreach_norm(grads, float("inf"))


def report_skipped(trainer: Trainer, n: int, culprit: str, in_a_row: int) -> None:
    """Log steps that were skipped, remember what was not finite, and stop after too many in a row.

    Parameters
    ----------
    trainer
        Whose steps they were.
    n
        How many.
    culprit
        What was not finite.
    in_a_row
        How many there are in a row by now.

    Raises
    ------
    TrainingError
        After ``max_bad_steps`` in a row; the best finite state is restored: without early stopping, the last one.
    """
    progress = trainer.progress
    settings.logger.warning("epoch %d: %d skipped, %s not finite", progress.epoch, n, culprit)
    if culprit not in progress.culprits and len(progress.culprits) < _MOST_NAMED:
        progress.culprits.append(culprit)
    if in_a_row < trainer.plan.max_bad_steps:
        return
    best = trainer.best_state if trainer.early_stopping else None
    trainer.module.load_state_dict(trainer.last_finite if best is None else best)
    trainer.module.eval()
    raise TrainingError(
        f"{in_a_row} steps in a row had non-finite {culprit} (epoch {progress.epoch}). The model holds its "
        f"{'last' if best is None else 'best'} finite state. Lower lr, set TrainingPlan(max_grad_norm=10), or look for "
        "extreme values in the data."
    )


def warn_of_skipped(progress: Progress) -> None:
    """Warn if any step of a training was skipped, and say because of what."""
    n = int(sum(row["skipped_steps"] for row in progress.rows))
    if n:
        warnings.warn(
            f"{n} training step{'s were' if n > 1 else ' was'} skipped because of non-finite "
            f"{'; '.join(progress.culprits) or 'losses or gradients'}. They left no trace in the model; "
            "model.history['skipped_steps'] and the log say when. If there are many, lower lr or set "
            "TrainingPlan(max_grad_norm=10).",
            PyrocellWarning,
            stacklevel=4,
        )
