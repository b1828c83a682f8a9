"""Compare pyrocell's SCVI with scvi-tools: speed and memory, or (``--quality``) the validation ELBO.

Each side runs in a process and an environment of its own, in turn (A B A B ...), on the same counts, the
same split and with the same options.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _cases import REAL_CASES, Case, RealFile, data_folder, read_real, simulate, write_case, write_split
from _environments import PEER_REQUIREMENTS, Side, default_peer_folder, own_side, peer_side, run_worker
from _tables import quality_summary, quality_table, speed_summary, speed_table

STAGES = ["train", "latent", "expression", "genes", "de_one", "de_groups"]


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    cases = ", ".join(["simulated", *REAL_CASES])
    add("--quality", action="store_true", help="compare validation ELBO per cell instead of speed")
    add("--case", help=f"comma-separated, of {cases}; default: those whose data are found")
    add("--data", help="an h5ad with raw counts in X, instead of the cases")
    add("--batch-key", help="column of obs of --data with the batches")
    add("--group-key", help="column of obs of --data with the groups for DE (default: library size cut in 8)")
    add("--top-genes", type=int, help="keep this many most variable genes of --data")
    add("--only", help=f"comma-separated stages to time, of {', '.join(STAGES)}")
    add("--epochs", type=int, help="epochs; default 6, for quality see the README")
    add("--warmup", type=int, help="epochs of KL warm-up (default: half of the epochs)")
    add("--repeats", type=int, default=3, help="pairs of runs, with --quality seeds; default 3")
    add("--seed", type=int, default=0, help="first seed")
    add("--threads", type=int, default=2, help="threads of each worker; default 2")
    add("--quick", action="store_true", help="does everything run? small counts, 2 epochs, 1 repeat")
    add("--timeout", type=float, default=3600, help="seconds after which a worker is given up")
    add(
        "--peer-env",
        type=Path,
        default=default_peer_folder(),
        help="environment of scvi-tools (made if absent)",
    )
    add("--json", type=Path, help="where the numbers go; default benchmarks/results/scvi[-quality].json")
    sides = parser.add_mutually_exclusive_group()
    sides.add_argument("--own-only", action="store_true", help="run pyrocell only")
    sides.add_argument("--peer-only", action="store_true", help="run scvi-tools only")
    return parser


def _options(arguments: list[str] | None) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    options.stages = STAGES if options.only is None else options.only.split(",")
    if unknown := set(options.stages) - set(STAGES):
        raise SystemExit(f"--only knows {', '.join(STAGES)}; not {', '.join(sorted(unknown))}")
    if options.quick:
        options.repeats, options.epochs = 1, options.epochs or 2
    if options.repeats < 1:
        raise SystemExit("--repeats must be 1 or more")
    if options.json is None:
        name = "scvi-quality.json" if options.quality else "scvi.json"
        options.json = Path(__file__).resolve().parent / "results" / name
    options.json.parent.mkdir(parents=True, exist_ok=True)
    return options


def _sources(options: argparse.Namespace) -> dict[str, RealFile | None]:
    """Name the cases asked for; ``None`` stands for the simulation."""
    if options.data is not None:
        source = RealFile(options.data, options.batch_key, options.group_key, options.top_genes)
        return {Path(options.data).stem: source}
    known: dict[str, RealFile | None] = {"simulated": None, **REAL_CASES}
    if options.case is not None:
        if unknown := set(options.case.split(",")) - set(known):
            raise SystemExit(f"--case knows {', '.join(known)}; not {', '.join(sorted(unknown))}")
        return {name: known[name] for name in options.case.split(",")}
    if options.quick:
        return {"simulated": None}
    folder = data_folder()
    if folder is None:
        print("no real data found: set PYROCELL_DATA or give --data", file=sys.stderr)
    there = [name for name, source in REAL_CASES.items() if folder and (folder / source.path).exists()]
    found = {name: known[name] for name in there}
    return found if options.quality else {"simulated": None, **found}


def _write_case(name: str, source: RealFile | None, options: argparse.Namespace, folder: Path) -> Case:
    if source is not None:
        return write_case(name, read_real(source), folder)
    return write_case(name, simulate(2000, 500) if options.quick else simulate(), folder)


def _job(
    case: Case, source: RealFile | None, options: argparse.Namespace, split: Path, seed: int
) -> dict[str, Any]:
    """Fill in what both workers are told; the keys are the fields of ``_workers.common.Job``."""
    usual = (source.epochs if source else 100) if options.quality else 6
    epochs = options.epochs or usual
    if not options.quality and "train" not in options.stages and options.epochs is None:
        epochs = 2  # queries need a trained model, not a good one
    warmup = options.warmup if options.warmup is not None else max(1, epochs // 2)
    return {
        "data": case.path,
        "split": str(split),
        "mode": "quality" if options.quality else "speed",
        "stages": options.stages,
        "epochs": epochs,
        "warmup": warmup,
        "batch_size": 128,
        "n_latent": 10,
        "n_hidden": 128,
        "n_layers": 1,
        "seed": seed,
        "threads": options.threads,
        "inner": 3,
        "elbo_draws": 10,
    }


def _complain(side: Side, result: dict[str, Any]) -> None:
    failures = {"worker": result["failure"]} if "failure" in result else result.get("errors", {})
    for stage, text in failures.items():
        print(f"  {side.name} failed in {stage}:\n{text}", file=sys.stderr)


def _run_case(
    case: Case, source: RealFile | None, sides: list[Side], options: argparse.Namespace
) -> dict[str, Any]:
    """Run the sides in turn. In quality runs every pair has a seed and a split of its own."""
    runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    folder = Path(case.path).parent
    job: dict[str, Any] = {}
    for repeat in range(options.repeats):
        seed = options.seed + repeat
        split = write_split(case, seed, folder)
        job = _job(case, source, options, split, seed)
        for side in sides:
            start = time.perf_counter()
            result = run_worker(side, job, timeout=options.timeout)
            runs[side.name].append(result)
            seconds = time.perf_counter() - start
            print(f"  {case.name}, run {repeat + 1}: {side.name} took {seconds:.0f} s", file=sys.stderr)
            _complain(side, result)
    summarise = quality_summary if options.quality else speed_summary
    shared = {key: value for key, value in job.items() if key not in ("data", "split", "seed")}
    return {"data": case.as_json(), "options": shared, "summary": summarise(runs), "runs": runs}


def _failed(report: dict[str, Any]) -> bool:
    runs = [run for found in report["runs"].values() for run in found]
    return any("failure" in run or run.get("errors") for run in runs)


def _shape_differences(report: dict[str, Any]) -> list[str]:
    """Stages in which the two sides returned tables of different lengths: those times do not compare."""
    shapes: dict[str, set[int]] = {}
    for found in report["runs"].values():
        for stage, shape in found[0].get("shapes", {}).items():
            shapes.setdefault(stage, set()).add(shape[0])
    return sorted(stage for stage, lengths in shapes.items() if len(lengths) > 1)


def _print_case(case: Case, report: dict[str, Any], options: argparse.Namespace) -> None:
    print(f"\n{case.describe()}; {report['options']['epochs']} epochs, warm-up {report['options']['warmup']}")
    if options.quality:
        print(quality_table(report["summary"], [options.seed + r for r in range(options.repeats)]))
        return
    print(speed_table(report["summary"]))
    for stage in _shape_differences(report):
        print(f"  CAUTION: results of {stage} differ in length between the sides")


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine, and warn when it is busy with something else."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"CAUTION: the load average is {load:.1f}; timings will be unsteady", file=sys.stderr)
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": options.threads,
        "load_before": load,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "peer": list(PEER_REQUIREMENTS),
    }


def _sides(options: argparse.Namespace) -> list[Side]:
    sides = [] if options.peer_only else [own_side()]
    return sides if options.own_only else [*sides, peer_side(options.peer_env)]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit status is 1 when a worker or a stage failed."""
    options = _options(arguments)
    sources = _sources(options)
    if not sources:
        raise SystemExit("nothing to run on: set PYROCELL_DATA, or give --data or --case simulated")
    sides = _sides(options)
    report: dict[str, Any] = {"machine": _machine(options), "cases": {}}
    with tempfile.TemporaryDirectory() as name:
        for case_name, source in sources.items():
            case = _write_case(case_name, source, options, Path(name))
            report["cases"][case_name] = _run_case(case, source, sides, options)
            _print_case(case, report["cases"][case_name], options)
            # Written after every case, so that an interrupted run keeps what it has.
            options.json.write_text(json.dumps(report, indent=1))
    print(f"\nnumbers: {options.json}")
    return int(any(_failed(found) for found in report["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
