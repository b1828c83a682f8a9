"""Peak memory of SCVI beside scvi-tools, stage by stage, and that of pyrocell's queries as cells become more.

Stages: each side in a process and an environment of its own, in turn (A B A B ...), on the same counts. Growth: a query
adds to the memory of the process that holds the counts; what it adds should not depend on the number of cells.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _runs
import anndata
from _cases import simulate, write_case
from _environments import own_side, run_worker
from _tables import MEMORY, summary, table
from scipy import sparse

STAGES = ["train", "latent", "expression", "genes", "de_groups"]
LARGEST_SHARE = 0.1
"""A query is flat when its peak rises, from the fewest cells to the most, by less than this share of what a number for
each cell and gene would take: far more than a few numbers a cell, and far less than all of them."""
NOISE_BYTES = 40 * 2**20
"""By so much two runs of one query may differ; there are too few cells to tell where the share above is less."""


def repeated(adata: anndata.AnnData, n_cells: int) -> anndata.AnnData:
    """Return so many cells by repeating those given: memory does not depend on what they count."""
    times = -(-n_cells // adata.n_obs)
    counts = sparse.vstack([adata.X] * times, format="csr")[:n_cells]
    obs = adata.obs.iloc[[row % adata.n_obs for row in range(n_cells)]].copy()
    obs.index = [f"cell{row}" for row in range(n_cells)]
    return anndata.AnnData(counts, obs=obs, var=adata.var.copy())


def grow(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ask pyrocell's queries of more and more cells; growth in bytes by query and number of cells."""
    side = own_side()
    side = replace(side, worker=side.worker.with_name("own_memory.py"))
    few = simulate(1000, 500) if options.quick else simulate()
    found: dict[str, Any] = {}
    for n_cells in options.cells:
        case = write_case(f"cells{n_cells}", repeated(few, n_cells), folder)
        job = {"data": case.path, "threads": options.threads}
        found[str(n_cells)] = run_worker(side, job, timeout=options.timeout)
        Path(case.path).unlink()
        for stage, text in _errors(found[str(n_cells)]).items():
            print(f"  pyrocell failed in {stage}, {n_cells:,} cells:\n{text}", file=sys.stderr)
    return found


def _errors(result: dict[str, Any]) -> dict[str, str]:
    return {"worker": result["failure"]} if "failure" in result else result["errors"]


def growth_table(found: dict[str, Any]) -> str:
    """Lay out MiB that each query adds to what the process held before it, and their rise beside that of all genes."""
    kept = {int(cells): result for cells, result in found.items() if "failure" not in result}
    lines = [f"{'MiB added by a query':26}" + "".join(f"{cells:>16,}" for cells in kept) + "   rise"]
    names = list(dict.fromkeys(name for result in kept.values() for name in result["growth_bytes"]))
    for name in names:
        if any(name in result["errors"] for result in kept.values()):
            lines.append(f"{name:26}  failed")
            continue
        sizes = [result["growth_bytes"][name] for result in kept.values()]
        cells = "".join(f"{size / 2**20:>16.1f}" for size in sizes)
        whole = 4 * (max(kept) - min(kept)) * max(result["n_genes"] for result in kept.values())
        lines.append(f"{name:26}{cells}{_verdict(sizes[-1] - sizes[0], whole)}")
    return "\n".join(lines)


def _verdict(rise: int, whole: int) -> str:
    """Judge a rise in bytes against that of an answer with a float32 for each cell and gene."""
    if LARGEST_SHARE * whole < NOISE_BYTES:
        return "      -   too few cells to tell"
    return f"{rise / whole:>7.2f}   {'flat' if rise < LARGEST_SHARE * whole else 'grows'}"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _runs.parser(__doc__, "memory")
    add = parser.add_argument
    add("--cells", help="numbers of cells for the growth, by comma; default 10000,30000,100000")
    add("--only", choices=["stages", "growth"], help="one of the two tables")
    options = _runs.finish(parser.parse_args(arguments))
    sizes = options.cells or ("1000,3000" if options.quick else "10000,30000,100000")
    options.cells = sorted(int(size) for size in sizes.split(","))
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print both tables; the exit status is 1 when a worker or a stage failed."""
    options = _options(arguments)
    report: dict[str, Any] = {"cases": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "growth":
            counts = partial(simulate, *((1000, 500) if options.quick else ()))
            cases: dict[str, Any] = {
                "simulated": (
                    lambda: write_case("simulated", counts(), folder),
                    _runs.job(options, stages=STAGES, inner=1),
                )
            }
            targets = {metric.key: 1.0 for metric in MEMORY}
            report = _runs.run_cases(
                cases,
                options,
                lambda _, runs: summary(runs, MEMORY),
                lambda _, case, found: print(table(found["summary"], MEMORY, targets)),
            )
        if options.only != "stages":
            report |= {} if "machine" in report else {"machine": _runs.machine(options)}
            report["growth"] = grow(options, folder)
            print(f"\n{growth_table(report['growth'])}")
            options.json.write_text(json.dumps(report, indent=1))
    return int(_runs.failed(report) or any(_errors(result) for result in report.get("growth", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
