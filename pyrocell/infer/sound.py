"""Whether tensors that were read from a file are those of a module, before any of them is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pyrocell.errors import LoadError, list_some

__all__ = ["DAMAGED", "check_state", "check_stream", "with_prefix"]

DAMAGED = "The file is damaged; save again."


def with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with a prefix, without it.

    Parameters
    ----------
    tensors
        By name.
    prefix
        Such as ``"module."``.
    """
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def check_state(what: str, found: Mapping[str, torch.Tensor], module: torch.nn.Module) -> None:
    """Raise a LoadError unless tensors are the state of a module, by name, shape and type.

    Parameters
    ----------
    what
        Beginning of the message.
    found
        What was read.
    module
        What it is to be put in.
    """
    known = module.state_dict()
    if gone := [name for name in known if name not in found]:
        raise LoadError(f"{what}: {list_some(gone)} are missing. {DAMAGED}")
    if more := [name for name in found if name not in known]:
        raise LoadError(f"{what}: it has no {list_some(more)}. {DAMAGED}")
    for name, tensor in known.items():
        if found[name].shape != tensor.shape:
            raise LoadError(
                f"{what}: {name}: size mismatch, {tuple(found[name].shape)} in the file, {tuple(tensor.shape)} in the "
                "model. The class has changed since, or the file is damaged."
            )
        if found[name].dtype != tensor.dtype:
            raise LoadError(f"{what}: {name} is of {found[name].dtype}; expected {tensor.dtype}. {DAMAGED}")


def check_stream(state: torch.Tensor) -> None:
    """Raise a LoadError unless a tensor is a state of random numbers.

    Parameters
    ----------
    state
        What was read.
    """
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise LoadError(f"The tensor stream is no state of random numbers ({error}). {DAMAGED}") from error
