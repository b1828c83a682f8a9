"""What all workers of ``de.py`` share: read the job, answer each question, write one array for each."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from common import RESULT

__all__ = ["answer_all"]

Answer = dict[str, np.ndarray]
"""``lfc``, ``score`` (the larger, the surer) and ``called``, in the order of the genes."""


def answer_all(prepare: Callable[[anndata.AnnData, dict[str, Any]], Callable[..., Answer]]) -> None:
    """Make a contender ready, and let it answer the questions of the job that the command line names."""
    warnings.filterwarnings("ignore")
    job = json.loads(Path(sys.argv[1]).read_text())
    adata = anndata.read_h5ad(job["data"])
    begun = time.perf_counter()
    ask = prepare(adata, job)
    ready = time.perf_counter()
    found, before = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = time.process_time()
    for name, (column, sample_key) in job["questions"].items():
        found |= {f"{name}|{key}": value for key, value in ask(column, sample_key).items()}
    np.savez(job["out"], **found)
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = {"fit": ready - begun, "questions": time.perf_counter() - ready, "MiB": rise / 1024}
    seconds["processor"] = time.process_time() - used  # the same on a busy machine
    print(RESULT + json.dumps(seconds))
