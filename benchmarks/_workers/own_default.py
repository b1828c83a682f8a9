"""The pyrocell side of ``time_to_quality.py``: ``train()`` without arguments that bear on the result."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from common import Job
from default_run import Clock, main
from own import Own


class OwnDefault(Own):
    """Pyrocell with its defaults, which also looks at the held-out cells after every epoch; the clock counts that."""

    def train(self, train: np.ndarray, validation: np.ndarray, job: Job) -> list[float]:
        """Fit on the given cells."""
        plan = replace(
            self._model.default_plan, train_indices=train, validation_indices=validation, validate_every=1
        )
        self.clock = Clock()
        with self.clock:
            self._model.train(plan=plan)
        history = self._model.history
        seconds = [float(value) for value in history["seconds"]]
        bounds = [-float(value) for value in history["elbo_validation"]]
        self.told: dict[str, Any] = {
            "epochs": len(history),
            "epoch_seconds": seconds,
            "elbo_by_epoch": bounds,
        }
        return seconds


if __name__ == "__main__":
    main(OwnDefault)
