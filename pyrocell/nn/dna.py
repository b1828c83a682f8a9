"""A convolutional network that reads DNA."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DnaTower", "reverse_complement", "shifted"]

_UNKNOWN = 4
_STEM_KERNEL, _STEM_POOL = 17, 3
_KERNEL, _POOL = 5, 2
_SLOPE = 1.702  # x * sigmoid(1.702 x) is close to GELU
# Sequences that run at once without gradients: the first layer of the usual size takes 1.5 MB of memory each.
_AT_ONCE = 128


def reverse_complement(codes: Tensor) -> Tensor:
    """Return the other strand of sequences of codes 0 to 3 (A, C, G, T) and 4 (unknown), shape (..., length)."""
    return torch.where(codes == _UNKNOWN, codes, 3 - codes).flip(-1)


def shifted(codes: Tensor, n: int | Tensor) -> Tensor:
    """Shift sequences by ``n`` bases to the right, to the left if negative; unknown bases fill the gap.

    Parameters
    ----------
    codes
        Shape (B, length).
    n
        Number of bases, one for all; a tensor need not leave its device.
    """
    length = codes.shape[-1]
    place = torch.arange(length, device=codes.device) - n
    inside = (place >= 0) & (place < length)
    return torch.where(inside, codes[..., place.clamp(0, length - 1)], _UNKNOWN)


class _Norm(nn.BatchNorm1d):
    """Batch normalisation that takes a single value for each channel."""

    def __init__(self, n_channels: int, *, affine: bool = True) -> None:
        super().__init__(n_channels, eps=1e-3, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, channels) or (B, channels, length) over everything but the channels."""
        if self.training and x.numel() == x.shape[1]:
            # One value has no variance: normalise it by what was learned so far, and learn nothing from it.
            learned = (self.running_mean, self.running_var, self.weight, self.bias)
            return functional.batch_norm(x, *learned, training=False, eps=self.eps)
        return super().forward(x)


def _activate(x: Tensor) -> Tensor:
    return functional.silu(x * _SLOPE) / _SLOPE


class _Block(nn.Module):
    """Convolution, normalisation and pooling; before them an activation, but not on the bases themselves."""

    def __init__(self, n_in: int, n_out: int, kernel: int, pool: int, *, first: bool = False) -> None:
        super().__init__()
        self.first, self.pool = first, pool
        self.conv = nn.Conv1d(n_in, n_out, kernel, padding=kernel // 2, bias=False)
        self.norm = _Norm(n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x if self.first else _activate(x)))
        return x if self.pool == 1 else functional.max_pool1d(x, self.pool, padding=(self.pool - 1) // 2)


class DnaTower(nn.Module):
    """Embeddings of DNA sequences: a stem, a tower of convolutions, each of which halves the length, and a dense layer.

    In training, each minibatch is read on one strand or the other, shifted by up to ``max_shift`` bases. In evaluation,
    both strands are read, and the mean of the two embeddings is taken.

    Parameters
    ----------
    length
        Bases in a sequence.
    n_out
        Dimensions of the embedding.
    n_filters
        Filters of the stem, and of the first block of the tower.
    n_blocks
        Blocks of the tower.
    growth
        Factor by which the filters grow from block to block.
    n_last
        Filters of the last convolution, of width one.
    dropout
        Probability of dropping a dimension of the embedding in training.
    max_shift
        Largest shift in training.

    Raises
    ------
    ValueError
        If the sequences are too short for so many blocks.
    """

    def __init__(
        self,
        length: int,
        n_out: int = 32,
        *,
        n_filters: int = 288,
        n_blocks: int = 6,
        growth: float = 1.122,
        n_last: int = 256,
        dropout: float = 0.2,
        max_shift: int = 3,
    ) -> None:
        super().__init__()
        self.max_shift = max_shift
        self.bases: Tensor
        self.register_buffer("bases", torch.cat([torch.eye(4), torch.full((1, 4), 0.25)]), persistent=False)
        left = length_after(length, n_blocks)
        if left < 1:
            most = max((n for n in range(n_blocks) if length_after(length, n) >= 1), default=0)
            raise ValueError(f"{length} bases are enough for {most} blocks, not for {n_blocks}")
        widths = [n_filters, n_filters]
        while len(widths) <= n_blocks:
            widths.append(round(widths[-1] * growth))
        widths = widths[: n_blocks + 1]
        self.blocks = nn.Sequential(
            _Block(4, n_filters, _STEM_KERNEL, _STEM_POOL, first=True),
            *(_Block(n_in, n, _KERNEL, _POOL) for n_in, n in pairwise(widths)),
            _Block(widths[-1], n_last, 1, 1),
        )
        self.dense = nn.Linear(left * n_last, n_out, bias=False)
        nn.init.kaiming_normal_(self.dense.weight)
        self.norm = _Norm(n_out)
        # Mean 0 and variance 1: the mean of a cell's logits is its bias then, and nothing else.
        self.standard, self.dropout = _Norm(n_out, affine=False), nn.Dropout(dropout)

    def forward(self, codes: Tensor) -> Tensor:
        """Return embeddings, shape (B, n_out).

        Parameters
        ----------
        codes
            0 to 3 for A, C, G, T, 4 for an unknown base; uint8, shape (B, length).
        """
        if self.training:
            return self._embed(self._augmented(codes))
        return torch.cat([self._of_both_strands(part) for part in codes.split(_AT_ONCE)])

    def _of_both_strands(self, codes: Tensor) -> Tensor:
        """Read both strands: a site means the same on either, which a trained network does not quite know."""
        return (self._embed(codes) + self._embed(reverse_complement(codes))) / 2

    def _embed(self, codes: Tensor) -> Tensor:
        x = self.blocks(self.bases[codes.int()].transpose(1, 2))
        embedding = _activate(self.norm(self.dense(_activate(x.flatten(1)))))
        return self.dropout(self.standard(embedding))

    def _augmented(self, codes: Tensor) -> Tensor:
        """Decide on the device: a step that is recorded there decides anew each time it is played."""
        shift = torch.randint(-self.max_shift, self.max_shift + 1, (), device=codes.device)
        other_strand = torch.rand((), device=codes.device) < 0.5
        return shifted(torch.where(other_strand, reverse_complement(codes), codes), shift)


def length_after(length: int, n_blocks: int) -> int:
    """Return the length of a sequence of ``length`` bases after the stem and so many blocks; 0 if it is too short."""
    for pool in (_STEM_POOL, *[_POOL] * n_blocks):
        length = max(0, math.floor((length + 2 * ((pool - 1) // 2) - pool) / pool) + 1)
    return length
