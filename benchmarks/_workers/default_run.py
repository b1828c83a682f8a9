"""What both workers of ``time_to_quality.py`` share: one training by defaults, its clocks, its held-out cells."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
from common import RESULT, Job, measure_quality

__all__ = ["Clock", "main"]


class Clock:
    """Processor and wall seconds of one piece of work."""

    def __enter__(self) -> Clock:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_seconds = time.perf_counter() - self._start[0]
        self.cpu_seconds = time.process_time() - self._start[1]


def main(make_contender: Callable[[Job], Any]) -> None:
    """Run the job named on the command line; a contender tells its ``clock`` and what it did in ``told``."""
    job = Job.read(sys.argv[1])
    contender = make_contender(job)
    result = measure_quality(contender, anndata.read_h5ad(job.data), job)
    clock: Clock = contender.clock
    result |= {"train_seconds": clock.wall_seconds, "train_cpu_seconds": clock.cpu_seconds}
    result |= {"versions": contender.versions(), **contender.told}
    print(RESULT + json.dumps(result, default=np.ndarray.tolist), flush=True)
