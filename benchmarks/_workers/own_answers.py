"""How the pyrocell side answers a question: read the job, ask the model that it names, write the arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from common import answer_job

import pyrocell

__all__ = ["answer"]


def answer(answers: Mapping[str, Callable[..., Any]], *, given: str, told: Callable[[], Any]) -> None:
    """Answer the job named on the command line; arguments as for `common.answer_job`."""
    answer_job(answers, _prepare, given=given, told=told)


def _prepare(job: Mapping[str, Any]) -> None:
    import torch

    torch.set_num_threads(job["threads"])
    pyrocell.settings.progress = False
    pyrocell.settings.device = "cpu"
    pyrocell.settings.seed = job["seed"]
