"""Compiled loops as operators of torch: who records what torch does sees each loop as one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["as_operator", "plain_function"]

_LIBRARY = torch.library.Library("pyrocell", "FRAGMENT")
"""Operators live as long as this object does."""

_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def as_operator(schema: str, function: Callable[..., Any], *, draws: bool = False) -> Callable[..., Any]:
    """Make a function of CPU tensors an operator of torch, ``torch.ops.pyrocell.<name>``.

    Seen from outside, the function reads and writes memory that torch knows nothing of: recorded as it is, its result
    would be a constant. It takes no part in differentiation; call it from an autograd function.

    Parameters
    ----------
    schema : str
        Name, arguments and results in torch's notation, such as ``"twice(Tensor x) -> Tensor"``. Results share no
        memory with arguments or each other.
    function : callable
        What to run.
    draws : bool
        Whether it draws random numbers.

    Returns
    -------
    callable
        The operator.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.nondeterministic_seeded,) if draws else ())
    _LIBRARY.impl(name, function, "CPU")
    operator: Callable[..., Any] = getattr(torch.ops.pyrocell, name).default
    _FUNCTIONS[operator] = function
    return operator


def plain_function(operator: Any) -> Callable[..., Any] | None:
    """Return the function behind one of these operators, to be called without torch's dispatch; None for others.

    Parameters
    ----------
    operator : object
        An operator of torch.
    """
    return _FUNCTIONS.get(operator)
