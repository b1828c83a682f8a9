"""Train a few entries of a module, and leave all others exactly as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["freeze", "frozen_besides"]


def freeze(module: torch.nn.Module, trainable: Mapping[str, Tensor]) -> None:
    """Switch off the gradient of every parameter that has no trainable entry.

    Parameters
    ----------
    module
        Holder of all parameters.
    trainable
        Mask of the trainable entries of a parameter, by its name.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trainable)


@contextmanager
def frozen_besides(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, trainable: Mapping[str, Tensor] | None
) -> Iterator[None]:
    """Hold everything but the trainable entries while the optimizer works.

    Gradients of the other entries are zero, so that clipping and moments do not see them, and after each step these
    entries are put back: weight decay, or whatever an optimizer does beside the gradient, moves them by nothing at
    all. Batch normalisation uses, and keeps, the statistics that it has.

    Parameters
    ----------
    module
        Holder of all parameters.
    optimizer
        The optimizer of these parameters.
    trainable
        Mask of the trainable entries of a parameter, by its name; None: everything trains.
    """
    if trainable is None:
        yield
        return
    handles = [
        part.register_forward_pre_hook(_evaluate) for part in module.modules() if isinstance(part, _BatchNorm)
    ]
    kept: list[tuple[torch.nn.Parameter, Tensor, Tensor]] = []
    for name, parameter in module.named_parameters():
        if name in trainable and not bool(trainable[name].all()):
            fixed = ~trainable[name].to(parameter.device)
            kept.append((parameter, fixed, parameter.detach().clone()))
            handles.append(parameter.register_hook(_without(fixed)))
    handles.append(optimizer.register_step_post_hook(lambda *_: _put_back(kept)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _evaluate(part: torch.nn.Module, inputs: object) -> None:
    part.eval()  # whatever mode the whole module is in


def _without(fixed: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(fixed, 0.0)


@torch.no_grad()
def _put_back(kept: list[tuple[torch.nn.Parameter, Tensor, Tensor]]) -> None:
    for parameter, fixed, value in kept:
        parameter.copy_(torch.where(fixed, value, parameter))
