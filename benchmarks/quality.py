"""Hide labels, proteins or open regions of real data, and compare what each side says of them, with the simple method.

Each side runs in a process and an environment of its own, on the same cells with the same epochs; otherwise with its
own defaults. ``labels-sorted`` and ``labels-donors``: SCANVI from an SCVI, 90 % of the labels hidden. ``proteins``:
TOTALVI, the proteins of half of the cells hidden. ``regions``: PEAKVI, 10 % of the ones hidden.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _environments import Side, default_peer_folder, own_side, peer_side, run_worker
from _tasks import TASKS, Task

# Epochs of the first model; SCANVI from it trains by its own default on either side.
EPOCHS = {"labels-sorted": 120, "labels-donors": 120, "proteins": 100, "regions": 150}


def _answers(task: Task, seed: int, sides: list[Side], options: argparse.Namespace) -> dict[str, Any]:
    """Scores of every contender for one hiding."""
    adata, truth = task.hide(seed, options.cells)
    found: dict[str, Any] = dict(task.baseline(adata, truth))
    with tempfile.TemporaryDirectory() as folder:
        adata.write_h5ad(Path(folder) / "cells.h5ad")
        for side in sides:
            job = {"model": task.model, "data": f"{folder}/cells.h5ad", "out": f"{folder}/{side.name}.npz"}
            job |= {"epochs": options.epochs, "seed": seed, "threads": options.threads}
            result = run_worker(side, job, timeout=options.timeout)
            if "failure" in result:
                print(side.name, result["failure"], file=sys.stderr)
                continue
            with np.load(job["out"]) as answer:
                scores = task.score(adata, truth, dict(answer))
            found[side.name] = scores | {"processor seconds": result["cpu_seconds"]}
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("task", choices=list(TASKS), help="what is hidden")
    add("--cells", type=int, default=5500, help="at most so many cells; default 5500")
    add("--epochs", type=int, help=f"epochs; default {EPOCHS}")
    add("--seeds", type=int, default=3, help="number of hidings; default 3")
    add("--threads", type=int, default=1, help="threads of each worker; default 1")
    add("--timeout", type=float, default=3600, help="seconds after which a worker is given up")
    add("--own-only", action="store_true", help="without scvi-tools")
    add("--peer-env", type=Path, default=default_peer_folder(), help="environment of scvi-tools")
    add("--json", type=Path, help="where the numbers go; default benchmarks/results/quality-TASK.json")
    options = parser.parse_args()
    options.epochs = EPOCHS[options.task] if options.epochs is None else options.epochs
    results = Path(__file__).resolve().parent / "results"
    options.json = options.json or results / f"quality-{options.task}.json"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    """Run every hiding, and print its scores as soon as they are known."""
    options = _options()
    sides = [own_side()] if options.own_only else [own_side(), peer_side(options.peer_env)]
    sides = [replace(side, worker=side.worker.with_name(f"{side.worker.stem}_quality.py")) for side in sides]
    report = []
    for seed in range(options.seeds):
        report.append(_answers(TASKS[options.task], seed, sides, options))
        for contender, scores in report[-1].items():
            line = "; ".join(f"{name} {value:.3f}" for name, value in scores.items())
            print(f"hiding {seed}, {contender}: {line}", flush=True)
        options.json.write_text(json.dumps(report, indent=1))
    return int(any(side.name not in found for found in report for side in sides))


if __name__ == "__main__":
    sys.exit(main())
