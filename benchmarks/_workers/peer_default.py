"""The scvi-tools side of ``time_to_quality.py``: ``train()`` without arguments that bear on the result."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import Job
from default_run import Clock, main
from peer import Peer


class PeerDefault(Peer):
    """scvi-tools with its defaults: length, learning rate and warm-up."""

    def train(self, train: np.ndarray, validation: np.ndarray, job: Job) -> list[float]:
        """Fit on the given cells; logger, checkpoints and progress bar, which only cost time, are off."""
        seconds: list[float] = []
        self.clock = Clock()
        with self.clock:
            self._model.train(
                accelerator="cpu",
                enable_progress_bar=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                logger=False,
                callbacks=[self._stop_watch(seconds)],
                datasplitter_kwargs={"external_indexing": [train, validation]},
            )
        self._model.module.eval()
        self.told: dict[str, Any] = {"epochs": len(seconds), "epoch_seconds": seconds}
        return seconds


if __name__ == "__main__":
    main(PeerDefault)
