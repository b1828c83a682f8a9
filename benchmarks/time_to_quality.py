"""Train SCVI by the defaults of pyrocell and of scvi-tools; compare bounds of held-out cells, and time.

Each side runs in a process and an environment of its own, on the same counts and the same split. scvi-tools takes
minutes to an hour for each seed; ``--reuse`` takes its runs from the file of an earlier call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import _runs
from _cases import REAL_CASES, RealFile, data_folder, read_real, simulate, write_case, write_split
from _environments import Side, default_peer_folder, own_side, peer_side, run_worker

OWN, PEER = "pyrocell", "scvi-tools"
CASES: dict[str, RealFile | None] = {
    **REAL_CASES,
    "cbmc": RealFile("citeseq_cbmc_1182.h5ad"),
    "pancreas": RealFile("velocity_pancreas_3696x2000.h5ad", None, "cell_type"),
    "simulated": None,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--case", default="kang,pbmc_sorted,cbmc", help=f"comma-separated, of {', '.join(CASES)}")
    add("--seeds", type=int, default=3, help="seeds, each with a split of its own; default 3")
    add("--threads", type=int, default=2, help="threads of each worker; default 2")
    add("--quick", action="store_true", help="does everything run? 400 simulated cells, one seed")
    add("--reuse", action="store_true", help="take scvi-tools' runs from the JSON, where it has them")
    add("--timeout", type=float, default=7200, help="seconds after which a worker is given up")
    add("--peer-env", type=Path, default=default_peer_folder(), help="environment of scvi-tools")
    add("--json", type=Path, help="where the numbers go; default benchmarks/results/time_to_quality.json")
    options = parser.parse_args()
    if options.quick:
        options.case, options.seeds = "simulated", 1
    if unknown := set(options.case.split(",")) - set(CASES):
        raise SystemExit(f"--case knows {', '.join(CASES)}; not {', '.join(sorted(unknown))}")
    results = Path(__file__).resolve().parent / "results"
    options.json = options.json or results / "time_to_quality.json"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    return options


def _earlier(options: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the report of an earlier call, whose runs of scvi-tools are to be taken; another machine's are refused."""
    if not (options.reuse and options.json.exists()):
        return {}
    before: dict[str, Any] = json.loads(options.json.read_text())
    for key in ("processor", "threads", "peer"):
        if before["machine"][key] != machine[key]:
            raise SystemExit(
                f"--reuse: {options.json} has {key} {before['machine'][key]}, here it is {machine[key]}"
            )
    return before


def _sides(options: argparse.Namespace) -> list[Side]:
    sides = [own_side(), peer_side(options.peer_env)]
    return [replace(side, worker=side.worker.with_name(f"{side.worker.stem}_default.py")) for side in sides]


def _job(data: str, split: Path, seed: int, threads: int) -> dict[str, Any]:
    """Fill in what both workers are told; epochs and warm-up are theirs to choose."""
    sizes = {"batch_size": 128, "n_latent": 10, "n_hidden": 128, "n_layers": 1, "epochs": 0, "warmup": 0}
    told = {"data": data, "split": str(split), "seed": seed, "threads": threads, "mode": "quality"}
    return told | sizes | {"stages": [], "inner": 1, "elbo_draws": 10}


def _one_seed(
    job: dict[str, Any], sides: list[Side], known: dict[str, Any] | None, timeout: float
) -> dict[str, Any]:
    """Train both sides by their defaults."""
    found = {side.name: known if side.name == PEER else None for side in sides}
    for side in sides:
        found[side.name] = found[side.name] or run_worker(side, job, timeout=timeout)
        if "failure" in found[side.name]:
            raise SystemExit(f"{side.name} failed:\n{found[side.name]['failure']}")
    return found | {"ratios": _ratios(found[OWN], found[PEER])}


def _ratios(own: dict[str, Any], peer: dict[str, Any]) -> dict[str, float | None]:
    """Compare times; the moment at which scvi-tools' bound is reached is a share of the steps' seconds."""
    until = list(accumulate(own["epoch_seconds"]))
    reached = [t for t, elbo in zip(until, own["elbo_by_epoch"], strict=True) if elbo >= peer["elbo"]]
    share = reached[0] / until[-1] if reached else None
    ratio = peer["train_cpu_seconds"] / own["train_cpu_seconds"]
    return {
        "wall": peer["train_seconds"] / own["train_seconds"],
        "processor": ratio,
        "share of training until scvi-tools' bound": share,
        "processor, until then": share and ratio / share,
        "bound, nats per cell more": own["elbo"] - peer["elbo"],
    }


def _print_seed(seed: int, found: dict[str, Any]) -> None:
    for name in (PEER, OWN):
        run = found[name]
        seconds = f"{run['train_seconds']:,.0f} s, processor {run['train_cpu_seconds']:,.0f} s"
        print(
            f"  seed {seed}, {name:10} {run['epochs']:>4} epochs, bound {run['elbo']:.2f}, {seconds}",
            flush=True,
        )


def _print_ratios(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """Print medians over the seeds of scvi-tools / pyrocell; a seed that never got there makes no median."""
    medians: dict[str, float | None] = {}
    for name in runs[0]["ratios"]:
        values = [run["ratios"][name] for run in runs]
        medians[name] = None if None in values else median(values)
        each = ", ".join("never" if value is None else f"{value:.2f}" for value in values)
        print(f"  {name}: {'never' if medians[name] is None else f'{medians[name]:.2f}'} ({each})")
    return medians


def main() -> int:
    """Run the benchmark; the exit status is 1 where all of pyrocell's training takes over a fifth, or ends worse."""
    options = _options()
    sides = _sides(options)
    report: dict[str, Any] = {"machine": _runs.machine(options), "cases": {}}
    before = _earlier(options, report["machine"])
    with tempfile.TemporaryDirectory() as folder:
        for name in options.case.split(","):
            source = CASES[name]
            if source is not None and not (data_folder() and (data_folder() / source.path).exists()):
                raise SystemExit(f"{source.path} is not found: set PYROCELL_DATA, or choose other cases")
            counts = read_real(source) if source else simulate(400, 100) if options.quick else simulate()
            case = write_case(name, counts, Path(folder))
            print(case.describe(), flush=True)
            known = before.get("cases", {}).get(name, {}).get("runs", [])
            runs: list[dict[str, Any]] = []
            for seed in range(options.seeds):
                job = _job(case.path, write_split(case, seed, Path(folder)), seed, options.threads)
                peer = known[seed][PEER] if seed < len(known) else None
                runs.append(_one_seed(job, sides, peer, options.timeout))
                _print_seed(seed, runs[-1])
            versions = {side: runs[0][side]["versions"] for side in (OWN, PEER)}
            report["cases"][name] = {"medians": _print_ratios(runs), "versions": versions, "runs": runs}
            options.json.write_text(json.dumps(report, indent=1))
    print(f"numbers: {options.json}")
    medians = [case["medians"] for case in report["cases"].values()]
    return int(any(found["processor"] < 5 or found["bound, nats per cell more"] < 0 for found in medians))


if __name__ == "__main__":
    sys.exit(main())
