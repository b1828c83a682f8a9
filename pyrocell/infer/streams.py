"""A stream of random numbers of one's own: the user's global generators are never moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["RandomStream", "seeded"]


def _cuda_states() -> list[torch.Tensor]:
    # Asking an uninitialised CUDA for its state would start it; nothing can have been drawn there yet.
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


@contextmanager
def _borrowed_generators() -> Iterator[None]:
    """Give torch's global generators back as they were, also after an error."""
    cpu, cuda = torch.get_rng_state(), _cuda_states()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def seeded(seed: int) -> Iterator[np.random.Generator]:
    """Run a block from a fixed seed; yields a NumPy generator of the same seed."""
    with _borrowed_generators():
        torch.manual_seed(seed)
        yield np.random.default_rng(seed)


class RandomStream:
    """Random state of one model: swapped in for the length of a ``with`` block, kept between blocks.

    Parameters
    ----------
    seed
        Start of the stream.

    Notes
    -----
    Two models with a stream each may be trained in turn, step by step, and equal each trained alone.
    On CUDA the stream restarts from the CPU state at each entry, so that one tensor describes it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)
        with _borrowed_generators():
            torch.manual_seed(self.seed)
            self.state = torch.get_rng_state()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside the block, and remember where it stopped."""
        with _borrowed_generators():
            torch.set_rng_state(self.state)
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(int(torch.randint(2**62, ())))
            try:
                yield
            finally:
                self.state = torch.get_rng_state()
