"""Compare the validation ELBO per cell of pyrocell's SCVI with that of scvi-tools, after equal trainings.

Each side runs in a process and an environment of its own, in turn (A B A B ...), on the same counts, the same split and
with the same options; a repeat has a seed of its own. One piece of code evaluates both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import _runs
from _cases import Case, RealFile, read_real, simulate, write_case
from _tables import quality_summary, quality_table


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _runs.parser(__doc__, "elbo")
    _runs.add_data_options(parser)
    parser.add_argument("--case", help="comma-separated, of those whose data are found; default all")
    parser.add_argument("--epochs", type=int, help="epochs; default 60 (kang), 120 (pbmc_sorted), 100")
    parser.add_argument("--warmup", type=int, help="epochs of KL warm-up (default: half of the epochs)")
    return _runs.finish(parser.parse_args(arguments))


def _told(source: RealFile | None, options: argparse.Namespace) -> dict[str, Any]:
    epochs = options.epochs or (2 if source is None else source.epochs)
    warmup = max(1, epochs // 2) if options.warmup is None else options.warmup
    return _runs.job(options, mode="quality", epochs=epochs, warmup=warmup)


def _write(name: str, source: RealFile | None, folder: Path) -> Case:
    return write_case(name, simulate(2000, 500) if source is None else read_real(source), folder)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 when a worker failed."""
    options = _options(arguments)
    known: dict[str, RealFile | None] = {"small": None} if options.quick else {**_runs.real_cases(options)}
    seeds = [options.seed + repeat for repeat in range(options.repeats)]
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Any] = {
            name: (partial(_write, name, known[name], Path(folder)), _told(known[name], options))
            for name in _runs.named(options.case, list(known), "--case")
        }
        if not cases:
            raise SystemExit("nothing to run on: set PYROCELL_DATA, or give --data")
        report = _runs.run_cases(
            cases,
            options,
            lambda _, runs: quality_summary(runs),
            lambda _, case, found: print(quality_table(found["summary"], seeds)),
        )
    return int(_runs.failed(report))


if __name__ == "__main__":
    sys.exit(main())
