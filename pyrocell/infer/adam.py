"""Adam as torch has it, without the bookkeeping that takes as long as its arithmetic on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Adam"]


@dataclass
class _Group:
    """Parameters that took the same number of steps, with their averages, and that number."""

    options: dict[str, Any]
    parameters: list[torch.Tensor]
    means: list[torch.Tensor]
    squares: list[torch.Tensor]
    steps: torch.Tensor


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` with the same options, state and results.

    Where every parameter lies on the CPU and has a gradient, its fused step is called directly, and steps are counted
    once for all parameters of a group; the counts of single parameters are brought up to date by `state_dict`. All
    else, among it the first step, is torch's own.
    """

    _gathered: list[_Group] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; see `torch.optim.Adam.step`."""
        groups = self._groups()
        grads = [[p.grad for p in group.parameters if p.grad is not None] for group in groups]
        complete = all(len(row) == len(group.parameters) for row, group in zip(grads, groups, strict=True))
        if closure is not None or not groups or not complete:
            self._settle()
            return _step_of_torch(self, closure)
        for group, row in zip(groups, grads, strict=True):
            _take(group, row)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state; see `torch.optim.Optimizer.state_dict`."""
        self._settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold; see `torch.optim.Optimizer`."""
        self._settle()
        return super().__getstate__()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state over; see `torch.optim.Optimizer.load_state_dict`."""
        self._settle()  # a state that is refused changes nothing
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; see `torch.optim.Optimizer.add_param_group`."""
        self._settle()
        super().add_param_group(param_group)

    def _groups(self) -> list[_Group]:
        """Return what the direct step needs, or nothing where that step cannot be taken."""
        if self._gathered is None:
            found = [_gather(group, self.state) for group in self.param_groups]
            if any(group is None for group in found):
                return []
            self._gathered = [group for group in found if group is not None]
        return self._gathered

    def _settle(self) -> None:
        """Write the counts of steps back to each parameter, where torch keeps them."""
        for group in self._gathered or ():
            for parameter in group.parameters:
                self.state[parameter]["step"].copy_(group.steps)
        self._gathered = None


def _step_of_torch(optimizer: Adam, closure: Callable[[], Any] | None) -> Any:
    """Take torch's own step; its hooks run around ours already, which torch wraps like its own."""
    step: Any = torch.optim.Adam.step
    return (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer, closure)


def _gather(options: dict[str, Any], state: Any) -> _Group | None:
    parameters = options["params"]
    if not options["fused"] or options["amsgrad"] or any(p.device.type != "cpu" for p in parameters):
        return None
    kept = [state.get(p) for p in parameters]
    if not all(kept) or len({float(of_one["step"]) for of_one in kept}) != 1:
        return None
    means, squares = ([of_one[name] for of_one in kept] for name in ("exp_avg", "exp_avg_sq"))
    return _Group(options, parameters, means, squares, kept[0]["step"].clone())


def _take(group: _Group, grads: list[torch.Tensor]) -> None:
    options = group.options
    group.steps += 1.0
    torch._fused_adam_(
        group.parameters,
        grads,
        group.means,
        group.squares,
        [],
        [group.steps] * len(grads),
        lr=options["lr"],
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=False,
        maximize=options["maximize"],
    )
