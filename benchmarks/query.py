"""Time the queries of SCVI beside scvi-tools: latent, expression, and differential expression of all groups.

Each side runs in a process and an environment of its own, in turn (A B A B ...), on the same counts; one model, trained
for two epochs, answers all questions of a run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import _runs
from _cases import Case, read_real, simulate, write_case
from _tables import QUERIES, length_differences, summary, table

STAGES = ["latent", "expression", "genes", "de_groups", "de_population"]
SIMULATED = {"simulated": 2000, "wide": 8000}
TARGETS = {
    "simulated": {"latent": 1.5, "de_groups": 10.0},
    "wide": {"genes": 10.0},
}
"""Least ratios scvi-tools : pyrocell aimed for."""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _runs.parser(__doc__, "query")
    _runs.add_data_options(parser)
    parser.add_argument(
        "--case", help="comma-separated, of simulated, wide, kang, pbmc_sorted; default simulated,wide"
    )
    parser.add_argument(
        "--only", help=f"comma-separated, of {', '.join(STAGES)}; of wide, expression and genes"
    )
    return _runs.finish(parser.parse_args(arguments))


def _write(name: str, real: dict[str, Any], options: argparse.Namespace, folder: Path) -> Case:
    if name in real:
        return write_case(name, read_real(real[name]), folder)
    n_cells, n_genes = (1000, SIMULATED[name] // 4) if options.quick else (10_000, SIMULATED[name])
    return write_case(name, simulate(n_cells, n_genes), folder)


def _stages(case: str, options: argparse.Namespace) -> list[str]:
    stages = _runs.named(options.only, STAGES, "--only")
    return [stage for stage in stages if stage in ("expression", "genes")] if case == "wide" else stages


def _show(targets: dict[str, dict[str, float]], name: str, _: Case, found: dict[str, Any]) -> None:
    print(table(found["summary"], QUERIES, targets.get(name, {})))
    for stage in length_differences(found["runs"]):
        print(f"  CAUTION: results of {stage} differ in length between the sides")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 when a worker or a stage failed."""
    options = _options(arguments)
    asked = options.case or ("simulated,wide" if options.data is None else None)
    real = _runs.real_cases(options) if asked is None or set(asked.split(",")) - set(SIMULATED) else {}
    known = list(real) if options.data is not None else [*SIMULATED, *real]
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Any] = {
            name: (
                partial(_write, name, real, options, Path(folder)),
                _runs.job(options, stages=_stages(name, options), inner=5),
            )
            for name in _runs.named(asked, known, "--case")
        }
        show = partial(_show, {} if options.quick else TARGETS)  # the aims are for the whole counts
        report = _runs.run_cases(cases, options, lambda _, runs: summary(runs, QUERIES), show)
    return int(_runs.failed(report))


if __name__ == "__main__":
    sys.exit(main())
