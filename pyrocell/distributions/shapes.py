"""Shapes of batches."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["aligned", "broadcast"]


def broadcast(*shapes: torch.Size) -> torch.Size:
    """Broadcast shapes; the usual case, where each is the tail of the longest, costs a tenth of torch's way."""
    longest = max(shapes, key=len)
    if all(shape == longest[len(longest) - len(shape) :] for shape in shapes):
        return longest
    return torch.broadcast_shapes(*shapes)


def aligned(value: Tensor, batch_shape: torch.Size) -> tuple[Tensor, torch.Size, torch.Size, int]:
    """Line counts up with the batch of a distribution.

    Parameters
    ----------
    value : Tensor
        Counts; broadcasts with the batch.
    batch_shape : torch.Size
        Shape of the distribution.

    Returns
    -------
    tuple
        The counts, such that they are the last dimensions of the result; the shape of the result; the same with one
        dimension at least; and how many of its first dimensions the counts lack.
    """
    shape = broadcast(batch_shape, value.shape)
    full = shape or torch.Size([1])
    if value.ndim == 0 or value.shape != full[len(full) - value.ndim :]:
        # a view of the counts in another shape: their non-zeros are searched again, on this path only
        value = value.expand(full).contiguous()
    return value, shape, full, len(full) - value.ndim
