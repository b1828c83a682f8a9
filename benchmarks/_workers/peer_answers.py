"""How the scvi-tools side answers a question: read the job, ask the model that it names, write the arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from common import answer_job
from peer_common import prepare

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
    answer_job(answers, lambda job: prepare(job["threads"], job["seed"]), given=given, told=told)
