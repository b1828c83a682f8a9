"""What both workers share: job file, stop-watch, memory meter and one definition of the validation ELBO.

Needs numpy, scipy and anndata only, so that it runs unchanged in either environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import anndata
import numpy as np
from scipy.special import gammaln

__all__ = [
    "RESULT",
    "SIZES",
    "SMALL_SCBASSET",
    "Contender",
    "Job",
    "answer_job",
    "main",
    "marker_table",
    "measure_quality",
    "measure_speed",
    "negative_binomial_log_prob",
    "release",
    "seconds_of_steps",
]

RESULT = "BENCHMARK-RESULT "
"""Marks the one line of standard output that the driver reads."""
SIZES: dict[str, dict[str, int]] = {"SCBASSET": {"n_filters_init": 64}}
"""Options of the constructors where the defaults would take minutes an epoch; both sides know them by these names."""
SMALL_SCBASSET: dict[str, Any] = {
    "n_bottleneck_layer": 16,
    "n_filters_init": 24,
    "n_repeat_blocks_tower": 4,
    "filters_mult": 1.0,
    "n_filters_pre_bottleneck": 24,
}
"""A network for 1,000 short sequences."""

_BLOCK = 1024


def seconds_of_steps(make: Callable[[], Any], few: int = 50, many: int = 350) -> list[float]:
    """Seconds of a step of a model that trains on all data at once: a longer training less a shorter one."""
    totals = []
    for n in (few, few, many):  # the first one also pays for thread pools and compilation
        model, start = make(), time.perf_counter()
        model.train(n)
        totals.append(time.perf_counter() - start)
    return [(totals[2] - totals[1]) / (many - few)] * 2


def marker_table(model: str, adata: anndata.AnnData) -> list[Any]:
    """Return the constructor's further arguments: for CellAssign, genes by types of all genes that are markers."""
    if model != "CellAssign":
        return []
    table = adata.varm["markers"]
    return [table[table.any(axis=1)]]


@dataclass(frozen=True)
class Job:
    """One run of one worker, as the driver writes it.

    Parameters
    ----------
    data, split
        The counts (h5ad, ``obs`` columns ``batch`` and ``group``), the cells to train and validate on (npz).
    mode
        ``"speed"`` or ``"quality"``.
    stages
        What to time: ``train``, ``latent``, ``expression``, ``genes``, ``de_groups``, ``de_population``.
    epochs, warmup, batch_size, n_latent, n_hidden, n_layers, seed, threads
        The options that both sides share.
    inner
        How often the fast queries are repeated within the worker.
    elbo_draws
        Posterior draws per cell for the validation ELBO.
    gene_likelihood, dispersion
        Options of the model, of the same name on both sides.
    """

    data: str
    split: str
    mode: str
    stages: list[str]
    epochs: int
    warmup: int
    batch_size: int
    n_latent: int
    n_hidden: int
    n_layers: int
    seed: int
    threads: int
    inner: int
    elbo_draws: int
    gene_likelihood: str = "nb"
    dispersion: str = "gene"

    @classmethod
    def read(cls, path: str) -> Job:
        """Read the job that the driver wrote."""
        return cls(**json.loads(Path(path).read_text()))


class Contender(Protocol):
    """The verbs that a side has to bring."""

    def versions(self) -> dict[str, str]:
        """Name the packages that matter for the timing, with their versions."""

    def build(self, adata: anndata.AnnData, job: Job) -> None:
        """Set up the data and make the model."""

    def train(self, train: np.ndarray, validation: np.ndarray, job: Job) -> list[float]:
        """Fit, and return the seconds of each epoch, without validation."""

    def latent(self) -> Any:
        """Posterior means, (n_cells, n_latent)."""

    def expression(self, genes: list[str] | None = None) -> Any:
        """Normalised expression, (n_cells, n_genes)."""

    def differential(self) -> Any:
        """Table of every group against the rest, in mode "change"."""

    def elbo(self, rows: np.ndarray) -> float:
        """Mean evidence lower bound per cell by the package's own verb, one draw for each row; higher is better."""

    def latent_moments(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances of q(z|x), each (n_rows, n_latent)."""

    def count_parameters(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and inverse dispersion of the counts at one draw of z for each row, each (n_rows, n_genes)."""


def _process_bytes(field_name: str) -> int:
    """Read one size from Linux's account of this process; elsewhere only the highest one is known."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith(field_name))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes() -> int:
    """Highest resident set of this process, since the last reset where the system knows resets."""
    # Not ru_maxrss: a child starts with the high-water mark of the process that spawned it.
    return _process_bytes("VmHWM")


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return _process_bytes("VmRSS")


def reset_peak() -> None:
    """Start a new high-water mark, where the system can (Linux); elsewhere peaks only ever grow."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def release() -> int:
    """Give freed memory back to the system, so that what comes next counts in full; return what is still held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


@dataclass
class Meter:
    """Seconds, processor seconds of all threads, peaks, failures and shapes of the results, by stage."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)

    def run(self, stage: str, work: Callable[[], Any], *, repeats: int = 1) -> Any:
        """Time one stage; a failure is noted and does not stop the stages after it."""
        gc.collect()
        reset_peak()
        result: Any = None
        try:
            for _ in range(repeats):
                result = None  # the result of the round before must not count towards this one's peak
                start, cpu = time.perf_counter(), time.process_time()
                result = work()
                self.seconds.setdefault(stage, []).append(time.perf_counter() - start)
                self.cpu_seconds.setdefault(stage, []).append(time.process_time() - cpu)
        except Exception:
            self.errors[stage] = traceback.format_exc(limit=-6)
        self.peaks[stage] = peak_bytes()
        if hasattr(result, "shape"):
            self.shapes[stage] = [int(size) for size in result.shape]
        return result

    def as_json(self) -> dict[str, Any]:
        """Everything noted, with the peak over all stages."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_bytes": {**self.peaks, "all": max(self.peaks.values())},
            "errors": self.errors,
            "shapes": self.shapes,
        }


def negative_binomial_log_prob(counts: np.ndarray, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Log-probability of counts under mean and inverse dispersion, all (n_cells, n_genes), in float64."""
    x, mean, theta = (np.asarray(values, dtype=np.float64) for values in (counts, mean, theta))
    mean = np.maximum(mean, 1e-30)
    log_total = np.log(theta + mean)
    constant = gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
    log_prob: np.ndarray = constant + theta * (np.log(theta) - log_total) + x * (np.log(mean) - log_total)
    return log_prob


def _audited_terms(
    contender: Contender, adata: anndata.AnnData, rows: np.ndarray, draws: int
) -> dict[str, float]:
    """Reconstruction and KL per cell from exported parameters: the same code for both sides."""
    reconstruction, kl = 0.0, 0.0
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        # Cells are repeated within one call: pyrocell's queries start from the same seed at every call, so that
        # a second call would return the very same draws.
        mean, theta = contender.count_parameters(np.tile(block, draws))
        counts = adata.X[block].toarray()
        for draw in range(draws):
            of_draw = slice(draw * len(block), (draw + 1) * len(block))
            log_prob = negative_binomial_log_prob(counts, mean[of_draw], theta[of_draw])
            reconstruction += log_prob.sum() / draws
        location, variance = (np.asarray(m, dtype=np.float64) for m in contender.latent_moments(block))
        kl += 0.5 * (variance + location**2 - 1 - np.log(variance)).sum()
    return {"reconstruction": reconstruction / len(rows), "kl": kl / len(rows)}


def measure_quality(contender: Contender, adata: anndata.AnnData, job: Job) -> dict[str, Any]:
    """Train once and evaluate the held-out cells: mean ELBO per cell, KL with weight 1; higher is better."""
    split = np.load(job.split)
    contender.build(adata, job)
    start = time.perf_counter()
    contender.train(split["train"], split["validation"], job)
    seconds = time.perf_counter() - start
    rows = split["validation"]
    terms = _audited_terms(contender, adata, rows, job.elbo_draws)
    return {
        "train_seconds": seconds,
        "elbo": terms["reconstruction"] - terms["kl"],
        "elbo_by_package": contender.elbo(np.tile(rows, job.elbo_draws)),
        **terms,
    }


def _questions(contender: Contender, adata: anndata.AnnData) -> dict[str, Callable[[], Any]]:
    """Every query by its stage; means of groups are compared by a side that knows that mode."""
    genes = list(adata.var_names[np.linspace(0, adata.n_vars - 1, 10).astype(int)])
    questions: dict[str, Callable[[], Any]] = {
        "latent": contender.latent,
        "expression": contender.expression,
        "genes": lambda: contender.expression(genes),
        "de_groups": contender.differential,
    }
    of_means = getattr(contender, "population_differential", None)
    return questions if of_means is None else questions | {"de_population": of_means}


def measure_speed(contender: Contender, adata: anndata.AnnData, job: Job) -> dict[str, Any]:
    """Train, then time every query that was asked for."""
    split = np.load(job.split)
    train, validation = split["train"], split["validation"]
    meter = Meter()
    if "train" in job.stages:
        # A first training pays for compilation, thread pools and first allocations.
        meter.run("first_build", lambda: contender.build(adata, job))
        meter.run("first_train", lambda: contender.train(train, validation, replace(job, epochs=1)))
    meter.run("build", lambda: contender.build(adata, job))
    epoch_seconds = None
    if not meter.errors:
        epoch_seconds = meter.run("train", lambda: contender.train(train, validation, job))
    for stage, ask in _questions(contender, adata).items():
        if stage in job.stages and epoch_seconds is not None:
            # All groups in scvi-tools take as long as all else together.
            meter.run(stage, ask, repeats=1 if stage == "de_groups" else job.inner)
    return {"epoch_seconds": epoch_seconds, **meter.as_json()}


def main(make_contender: Callable[[Job], Contender]) -> None:
    """Run the job named on the command line and print its result as one marked line of JSON."""
    job = Job.read(sys.argv[1])
    start = time.perf_counter()
    contender = make_contender(job)
    import_seconds = time.perf_counter() - start
    adata = anndata.read_h5ad(job.data)
    baseline = resident_bytes()
    measure = measure_quality if job.mode == "quality" else measure_speed
    result = measure(contender, adata, job)
    result |= {
        "baseline_bytes": baseline,
        "import_seconds": import_seconds,
        "ru_maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "versions": contender.versions(),
    }
    print(RESULT + json.dumps(result), flush=True)


def answer_job(
    answers: Mapping[str, Callable[..., dict[str, np.ndarray]]],
    prepare: Callable[[Mapping[str, Any]], None],
    *,
    given: str,
    told: Callable[[], dict[str, float]],
) -> None:
    """Answer the job whose file is named on the command line: arrays into a file, numbers for the driver.

    Parameters
    ----------
    answers
        By model, what answers, given the data and one entry of the job.
    prepare
        Sets threads, seed and silence.
    given
        Name of that entry.
    told
        Called at the end: what it took.
    """
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    prepare(job)
    np.savez(job["out"], **answers[job["model"]](anndata.read_h5ad(job["data"]), job[given]))
    print(RESULT + json.dumps(told()), flush=True)
