"""What the commands beside scvi-tools share: their options, their cases, pairs of runs in turn, and the JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _cases import REAL_CASES, Case, RealFile, data_folder, write_split
from _environments import PEER_REQUIREMENTS, Side, default_peer_folder, own_side, peer_side, run_worker

__all__ = [
    "add_data_options",
    "failed",
    "finish",
    "job",
    "machine",
    "named",
    "parser",
    "print_versions",
    "real_cases",
    "run_cases",
    "run_pairs",
    "sides",
]

RESULTS = Path(__file__).resolve().parent / "results"


def parser(description: str | None, name: str, *, repeats: int = 3) -> argparse.ArgumentParser:
    """Return a parser with the options that all commands have; ``name`` is that of their JSON."""
    layout = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=layout)
    add = made.add_argument
    add("--repeats", type=int, default=repeats, help=f"pairs of runs; default {repeats}")
    add("--seed", type=int, default=0, help="first seed")
    add("--threads", type=int, default=2, help="threads of each worker; default 2")
    add("--quick", action="store_true", help="does everything run? small counts, 1 repeat")
    add("--timeout", type=float, default=3600, help="seconds after which a worker is given up")
    peer = default_peer_folder()
    add("--peer-env", type=Path, default=peer, help="environment of scvi-tools (made if absent)")
    add("--json", type=Path, default=RESULTS / f"{name}.json", help=f"default benchmarks/results/{name}.json")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--own-only", action="store_true", help="run pyrocell only")
    which.add_argument("--peer-only", action="store_true", help="run scvi-tools only")
    return made


def add_data_options(made: argparse.ArgumentParser) -> None:
    """Let the user name a file of their own."""
    add = made.add_argument
    add("--data", help="an h5ad with raw counts in X, instead of the cases")
    add("--batch-key", help="column of obs of --data with the batches")
    add("--group-key", help="column of obs of --data with the groups for DE (default: library size cut in 8)")
    add("--top-genes", type=int, help="keep this many most variable genes of --data")


def finish(options: argparse.Namespace) -> argparse.Namespace:
    """Check what the parser cannot, and make the folder of the JSON."""
    if options.quick:
        options.repeats = 1
    if options.repeats < 1:
        raise SystemExit("--repeats must be 1 or more")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    return options


def named(asked: str | None, known: list[str], option: str) -> list[str]:
    """Read a comma-separated option, and refuse names that are not known."""
    chosen = known if asked is None else asked.split(",")
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"{option} knows {', '.join(known)}; not {', '.join(sorted(unknown))}")
    return chosen


def real_cases(options: argparse.Namespace) -> dict[str, RealFile]:
    """Return the user's own file where one is named, else the real files that are found."""
    if getattr(options, "data", None) is not None:
        source = RealFile(options.data, options.batch_key, options.group_key, options.top_genes)
        return {Path(options.data).stem: source}
    folder = data_folder()
    if folder is None:
        print("no real data found: set PYROCELL_DATA or give --data", file=sys.stderr)
        return {}
    return {name: source for name, source in REAL_CASES.items() if (folder / source.path).exists()}


def sides(options: argparse.Namespace) -> list[Side]:
    """Return the sides asked for, the environment of scvi-tools made where it is missing."""
    own = [] if options.peer_only else [own_side()]
    return own if options.own_only else [*own, peer_side(options.peer_env)]


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine, print it, and warn when it is busy with something else."""
    load = os.getloadavg()[0]
    found = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": options.threads,
        "load_before": load,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "peer": list(PEER_REQUIREMENTS),
    }
    print(
        f"{found['processor']}, {found['cpus']} cores, {options.threads} threads, {found['platform']}, load {load:.1f}"
    )
    if load > 0.5:
        print(f"CAUTION: the load average is {load:.1f}; timings will be unsteady", file=sys.stderr)
    return found


def _processor() -> str:
    """Name the processor: Linux tells it in its account of the CPUs only."""
    account = Path("/proc/cpuinfo")
    lines = account.read_text().splitlines() if account.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def job(options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Fill in what both workers are told; the keys are the fields of ``_workers.common.Job``."""
    told = {
        "mode": "speed",
        "stages": [],
        "epochs": 2,
        "warmup": 1,
        "batch_size": 128,
        "n_latent": 10,
        "n_hidden": 128,
        "n_layers": 1,
        "threads": options.threads,
        "inner": 3,
        "elbo_draws": 10,
    }
    return told | changes


def _complain(side: Side, result: dict[str, Any]) -> None:
    failures = {"worker": result["failure"]} if "failure" in result else result.get("errors", {})
    for stage, text in failures.items():
        print(f"  {side.name} failed in {stage}:\n{text}", file=sys.stderr)


def run_pairs(
    case: Case, sides: list[Side], told: dict[str, Any], options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Run the sides in turn (A B A B ...); every pair has a seed and a split of its own."""
    runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for repeat in range(options.repeats):
        seed = options.seed + repeat
        split = write_split(case, seed, Path(case.path).parent)
        for side in sides:
            start = time.perf_counter()
            given = told | {"data": case.path, "split": str(split), "seed": seed}
            result = run_worker(side, given, timeout=options.timeout)
            runs[side.name].append(result)
            seconds = time.perf_counter() - start
            print(f"  {case.name}, run {repeat + 1}: {side.name} took {seconds:.0f} s", file=sys.stderr)
            _complain(side, result)
    return runs


def run_cases(
    cases: dict[str, tuple[Callable[[], Case], dict[str, Any]]],
    options: argparse.Namespace,
    summarise: Callable[[str, dict[str, Any]], dict[str, Any]],
    show: Callable[[str, Case, dict[str, Any]], None],
) -> dict[str, Any]:
    """Run every case, and print and keep it as soon as it is known.

    Parameters
    ----------
    cases
        By name: what writes the counts, and what the workers are told.
    options
        Of the command line.
    summarise, show
        Given the name of a case: from its runs to what the JSON keeps of them, and from that to the printed table.
    """
    contenders = sides(options)
    report: dict[str, Any] = {"machine": machine(options), "versions": {}, "cases": {}}
    for name, (write, told) in cases.items():
        case = write()
        runs = run_pairs(case, contenders, told, options)
        found = {"data": case.as_json(), "options": told, "summary": summarise(name, runs), "runs": runs}
        report["cases"][name] = found
        report["versions"] |= {side: _versions(results) for side, results in runs.items()}
        print(f"\n{case.describe()}; {told['epochs']} epochs, warm-up {told['warmup']}")
        show(name, case, found)
        # Written after every case, so that an interrupted run keeps what it has.
        options.json.write_text(json.dumps(report, indent=1))
    print_versions(report["versions"])
    print(f"numbers: {options.json}")
    return report


def _versions(results: list[dict[str, Any]]) -> dict[str, str]:
    """Take the versions from the first worker that came to its end."""
    return next((result["versions"] for result in results if "versions" in result), {})


def print_versions(versions: dict[str, dict[str, str]]) -> None:
    """Say what was compared."""
    for side, found in versions.items():
        print(f"{side}: " + ", ".join(f"{name} {number}" for name, number in found.items()))


def failed(report: dict[str, Any]) -> bool:
    """Whether a worker or a stage failed."""
    runs = [run for case in report["cases"].values() for found in case["runs"].values() for run in found]
    return any("failure" in run or run.get("errors") for run in runs)
