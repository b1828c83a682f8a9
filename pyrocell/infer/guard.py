"""Watch over one training step: a non-finite loss or gradient must leave no trace in the model."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pyrocell.errors import list_some
from pyrocell.infer.elbo import ElboTerms

__all__ = ["FiniteGuard"]


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
        self.buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._kept: list[torch.Tensor] = []

    def remember(self) -> None:
        """Forget the last gradients, and keep the running statistics: a forward pass changes them."""
        for parameter in self.parameters:
            parameter.grad = None
        self._kept = list(torch._foreach_add(self.buffers, 0.0)) if self.buffers else []

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
        if self.max_grad_norm is None:
            total = torch.stack([loss, *_one_number_each(grads)]).sum()
        else:
            total = loss + torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        return total.isfinite()

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
        named = self.module.named_parameters()
        return f"gradients of {list_some(n for n, p in named if p.grad is not None and not p.grad.isfinite().all())}"


def _one_number_each(grads: list[torch.Tensor]) -> Iterable[torch.Tensor]:
    """Return numbers that are finite if all entries are.

    Devices take the largest entries, all at once. On the CPU a sum takes a tenth of the time; it overflows, as a sum of
    squares would much earlier, only where a gradient is past all use.
    """
    if grads and grads[0].device.type == "cpu":
        return (grad.sum() for grad in grads)
    return torch._foreach_norm(grads, float("inf"))
