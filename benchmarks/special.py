"""Ask models real questions with a known answer: of markers, spots, maps, velocity and DNA.

Each contender runs in a process of its own, on the same data: pyrocell, scvi-tools, and simpler ways.
``types``, ``types-unlisted``: CellAssign on sorted cells. ``spots``, ``spots-factors``: Stereoscope on sums of held-out
cells. ``map-genes``, ``map-types``: Tangram on spots whose hidden genes, or cells, are known. ``velocity``: VELOVI on a
known order of cell types. ``dna``: SCBASSET on planted motifs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean

from _dna_task import TASKS as DNA_TASKS
from _environments import Side, default_peer_folder, own_side, peer_side, run_worker
from _map_tasks import TASKS as MAP_TASKS
from _special_task import Answer, Scores, SpecialTask, read_answer
from _spot_tasks import TASKS as SPOT_TASKS
from _type_tasks import TASKS as TYPE_TASKS
from _velocity_task import TASKS as VELOCITY_TASKS

TASKS: dict[str, SpecialTask] = TYPE_TASKS | SPOT_TASKS | MAP_TASKS | VELOCITY_TASKS | DNA_TASKS


def _answer(
    task: SpecialTask, name: str, folder: str, sides: dict[str, Side], options: argparse.Namespace
) -> tuple[Answer | None, float]:
    """Let one contender answer; tell its answer, if it had one, and the processor seconds of its training."""
    contender = task.contenders[name]
    job = {"model": task.model, "data": f"{folder}/cells.h5ad", "out": f"{folder}/answer.npz"}
    job |= {"options": contender.options, "seed": options.seed, "threads": options.threads}
    result = run_worker(sides[contender.side], job, timeout=options.timeout)
    if "failure" in result:
        print(name, result["failure"], file=sys.stderr)
        return None, 0.0
    return read_answer(Path(job["out"])), result["training_seconds"]


def _scores(
    task: SpecialTask, sides: dict[str, Side], options: argparse.Namespace, seed: int
) -> dict[str, Scores]:
    """Scores of every contender on one data set."""
    options.seed = seed
    adata, truth = task.make(seed)
    found: dict[str, Scores] = {}
    if not options.only:
        found |= task.baseline(adata, truth)
        _tell(seed, found)
    with tempfile.TemporaryDirectory() as folder:
        adata.write_h5ad(Path(folder) / "cells.h5ad")
        for name, contender in task.contenders.items():
            if contender.side not in sides or (options.only and options.only not in name):
                continue
            answer, seconds = _answer(task, name, folder, sides, options)
            if answer is not None:
                found[name] = task.score(adata, truth, answer) | {"processor seconds of training": seconds}
                _tell(seed, {name: found[name]})
    return found


def _tell(seed: int, found: dict[str, Scores]) -> None:
    for contender, scores in found.items():
        line = "; ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(f"seed {seed}, {contender}: {line}", flush=True)


def _table(report: list[dict[str, Scores]]) -> str:
    """Lay out the means over the seeds, one contender a column, as Markdown."""
    contenders = list(dict.fromkeys(name for found in report for name in found))
    rows = list(dict.fromkeys(row for found in report for scores in found.values() for row in scores))
    lines = ["| | " + " | ".join(contenders) + " |", "| --- |" + " --- |" * len(contenders)]
    for row in rows:
        cells = []
        for name in contenders:
            values = [found[name][row] for found in report if row in found.get(name, {})]
            cells.append(f"{mean(values):.3f}" if values else "")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", choices=list(TASKS), help="what is asked")
    add("--seeds", default="0", help="comma-separated seeds of data and training; default 0")
    add("--only", help="only contenders whose name holds this, and no simpler ways")
    add("--own-only", action="store_true", help="without scvi-tools")
    add("--threads", type=int, default=1, help="threads of each worker; default 1")
    add("--timeout", type=float, default=7200, help="seconds after which a worker is given up")
    add("--peer-env", type=Path, default=default_peer_folder(), help="environment of scvi-tools")
    add("--json", type=Path, help="where the numbers go; default benchmarks/results/special-TASK.json")
    options = parser.parse_args()
    results = Path(__file__).resolve().parent / "results"
    options.json = options.json or results / f"special-{options.task}.json"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    """Run every seed, print scores as soon as they are known, and the table of means at the end."""
    options = _options()
    task = TASKS[options.task]
    both = [own_side()] if options.own_only else [own_side(), peer_side(options.peer_env)]
    sides = {
        side.name: replace(side, worker=side.worker.with_name(f"{side.worker.stem}_special.py"))
        for side in both
    }
    report = []
    for seed in map(int, options.seeds.split(",")):
        report.append(_scores(task, sides, options, seed))
        options.json.write_text(json.dumps(report, indent=1))
    print(_table(report))
    asked = [name for name in task.contenders if not options.only or options.only in name]
    asked = [name for name in asked if task.contenders[name].side in sides]
    return int(any(name not in found for found in report for name in asked))


if __name__ == "__main__":
    sys.exit(main())
