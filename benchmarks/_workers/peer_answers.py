"""How the scvi-tools side answers a question: read the job, ask the model that it names, write the arrays."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import scvi
import torch
from common import answer_job

__all__ = ["QUIET", "answer"]

warnings.filterwarnings("ignore")

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "logger": False,
}


def answer(answers: Mapping[str, Callable[..., Any]], *, given: str, told: Callable[[], Any]) -> None:
    """Answer the job named on the command line; arguments as for `common.answer_job`."""
    answer_job(answers, _prepare, given=given, told=told)


def _prepare(job: Mapping[str, Any]) -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(job["threads"])
    scvi.settings.num_threads = job["threads"]
    scvi.settings.verbosity = logging.ERROR
    scvi.settings.seed = job["seed"]
