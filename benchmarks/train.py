"""Time the training of SCVI beside scvi-tools: seconds an epoch, by the wall and of all processors.

Each side runs in a process and an environment of its own, in turn (A B A B ...), on the same counts, the same split and
with the same options. A first training of one epoch, which also compiles and fills caches, is not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _runs
from _cases import Case, RealFile, read_real, simulate, write_case
from _tables import TRAINING, summary, table


@dataclass(frozen=True)
class TrainCase:
    """Counts and a kind of model, with the ratio scvi-tools : pyrocell aimed for.

    Parameters
    ----------
    source
        A real file, or the number of simulated genes.
    gene_likelihood, dispersion
        Options of SCVI.
    target
        Least ratio of the seconds an epoch; ``None`` for information.
    """

    source: RealFile | int
    gene_likelihood: str = "nb"
    dispersion: str = "gene"
    target: float | None = None


SIMULATED = {
    "nb": TrainCase(2000, target=4.0),
    "nb-8000": TrainCase(8000, target=5.0),
    "zinb": TrainCase(2000, "zinb", target=3.0),
    "gene-batch": TrainCase(2000, dispersion="gene-batch", target=3.0),
}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _runs.parser(__doc__, "train")
    _runs.add_data_options(parser)
    parser.add_argument(
        "--case",
        help=f"comma-separated, of {', '.join(SIMULATED)}, kang, pbmc_sorted; default all that are found",
    )
    parser.add_argument("--epochs", type=int, help="epochs that are timed; default 10, with --quick 2")
    return _runs.finish(parser.parse_args(arguments))


def _cases(options: argparse.Namespace) -> dict[str, TrainCase]:
    real = {name: TrainCase(source) for name, source in _runs.real_cases(options).items()}
    if options.data is not None:
        return real
    known = SIMULATED | ({} if options.quick and options.case is None else real)
    return {name: known[name] for name in _runs.named(options.case, list(known), "--case")}


def _write(name: str, case: TrainCase, options: argparse.Namespace, folder: Path) -> Case:
    if isinstance(case.source, RealFile):
        return write_case(name, read_real(case.source), folder)
    n_cells, n_genes = (1000, case.source // 4) if options.quick else (10_000, case.source)
    return write_case(name, simulate(n_cells, n_genes), folder)


def _show(targets: dict[str, float | None], name: str, _: Case, found: dict[str, Any]) -> None:
    print(table(found["summary"], TRAINING, {"train_epoch": targets.get(name)}))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 when a worker failed."""
    options = _options(arguments)
    chosen, epochs = _cases(options), options.epochs or (2 if options.quick else 10)
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Any] = {}
        for name, case in chosen.items():
            kind = {"gene_likelihood": case.gene_likelihood, "dispersion": case.dispersion}
            told = _runs.job(options, stages=["train"], epochs=epochs, warmup=max(1, epochs // 2), **kind)
            cases[name] = (partial(_write, name, case, options, Path(folder)), told)
        report = _runs.run_cases(
            cases,
            options,
            lambda _, runs: summary(runs, TRAINING),
            partial(_show, {} if options.quick else {name: case.target for name, case in chosen.items()}),
        )
    return int(_runs.failed(report))


if __name__ == "__main__":
    sys.exit(main())
