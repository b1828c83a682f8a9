"""Differential expression where the truth is known: pyrocell, scvi-tools, Wilcoxon's test (scanpy) and pydeseq2.

Fold changes are planted in real counts by binomial thinning, inside one cell type; other questions have no true answer
but "none", or a well-known one (genes of the interferon response). Each side runs in an environment of its own, on the
same cells; the two models train for the same epochs. pydeseq2 answers only where there are donors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _environments import Side, default_peer_folder, own_side, peer_side, run_worker
from _planting import TASKS, Study, make_study
from sklearn.metrics import roc_auc_score

INTERFERON = ("ISG15", "IFIT1", "IFIT3", "IFI6", "ISG20", "MX1", "LY6E", "IFIT2", "IFI35", "OAS1")
DESEQ = "pydeseq2==0.5.4"


def _deseq_side(folder: Path, workers: Path) -> Side:
    """Return the side of pydeseq2, after making its environment where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        import subprocess

        print(f"making the environment of pydeseq2 in {folder} (once)", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", DESEQ], check=True)
    return Side("pydeseq2", python, workers / "deseq_de.py")


def _sides(options: argparse.Namespace) -> list[Side]:
    """Return the sides asked for; an environment is made only for one of them."""
    workers = Path(__file__).resolve().parent / "_workers"
    own = own_side()
    known: dict[str, Callable[[], Side]] = {
        "pyrocell": lambda: Side("pyrocell", own.python, workers / "own_de.py", import_from=own.import_from),
        "Wilcoxon": lambda: Side("Wilcoxon", own.python, workers / "wilcoxon_de.py"),
        "scvi-tools": lambda: Side("scvi-tools", peer_side(options.peer_env).python, workers / "peer_de.py"),
        "pydeseq2": lambda: _deseq_side(options.deseq_env, workers),
    }
    usual = ["pyrocell", "Wilcoxon"] if options.own_only else list(known)
    asked = options.sides.split(",") if options.sides else usual
    if unknown := set(asked) - set(known):
        raise SystemExit(f"--sides knows {', '.join(known)}; not {', '.join(sorted(unknown))}")
    return [known[name]() for name in asked]


# ------------------------------------------------------------------------------------------------ scores


def _planted(study: Study, answer: dict[str, np.ndarray], name: str) -> dict[str, float]:
    truth = study.truth
    assert truth is not None
    changed, called = truth != 0, answer[f"{name}|called"].astype(bool)
    lfc = answer[f"{name}|lfc"]
    kept = changed & np.isfinite(lfc) & (np.abs(lfc) < 15)  # a rank test gives infinite ratios
    scores = {
        "calls": float(called.sum()),
        "FDP": float((called & ~changed).sum() / max(called.sum(), 1)),
        "power": float(called[changed].mean()),
        "AUROC": np.nan if changed.all() else float(roc_auc_score(changed, answer[f"{name}|score"])),
        "slope": float(np.polyfit(truth[kept], lfc[kept], 1)[0]),
    }
    if f"{name}|estimate" in answer:
        estimate = answer[f"{name}|estimate"]
        scores["slope before shrinkage"] = float(np.polyfit(truth[changed], estimate[changed], 1)[0])
    if f"{name}|low" in answer:
        scores |= _coverage(truth, answer[f"{name}|low"], answer[f"{name}|high"], called)
    return scores


def _coverage(truth: np.ndarray, low: np.ndarray, high: np.ndarray, called: np.ndarray) -> dict[str, float]:
    """Share of 90 % intervals that hold the truth; an interval of no effect is a point."""
    tested, held = np.isfinite(low), (low - 1e-9 <= truth) & (truth <= high + 1e-9)
    return {
        f"covered, {kind}": float(held[chosen].mean()) if chosen.any() else np.nan
        for kind, chosen in (("all", tested), ("changed", tested & (truth != 0)), ("called", called))
    }


def _nulls(answer: dict[str, np.ndarray], kind: str) -> dict[str, float]:
    shares = [
        float(value.mean())
        for key, value in answer.items()
        if key.startswith(kind) and key.endswith("|called")
    ]
    return {
        "splits with a call": float(np.mean(np.array(shares) > 0)),
        "genes called": float(np.mean(shares)),
    }


def _interferon(study: Study, answer: dict[str, np.ndarray]) -> dict[str, float]:
    """Known genes: worst rank of the best five in any cell type, share with the right sign, share called."""
    known = np.flatnonzero(study.adata.var_names.isin(INTERFERON))
    ranks, signs, called = [], [], []
    for question in study.questions:
        order = answer.get(f"{question}|order", answer[f"{question}|score"])
        score = order * (answer[f"{question}|lfc"] > 0)
        rank = np.argsort(np.argsort(-score, kind="stable"), kind="stable")[known] + 1
        ranks.append(np.sort(rank)[: min(5, len(known))].max())
        signs.append((answer[f"{question}|lfc"][known] > 0).mean())
        called.append(answer[f"{question}|called"][known].mean())
    return {
        "cell types": float(len(ranks)),
        "known genes": float(len(known)),
        "five best within rank, median": float(np.median(ranks)),
        "five best within rank, worst": float(np.max(ranks)),
        "right sign": float(np.mean(signs)),
        "called": float(np.mean(called)),
    }


def _scores(task: str, study: Study, answer: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    if task == "null":
        return {f"null, {kind}": _nulls(answer, kind) for kind in ("cells", "donors")}
    if task in ("ifnb", "muscat"):
        return {task: _interferon(study, answer)}
    return {task: _planted(study, answer, task)}


# ------------------------------------------------------------------------------------------------ runs


def _run(task: str, seed: int, sides: list[Side], options: argparse.Namespace) -> dict[str, Any]:
    study = make_study(task, seed)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        study.adata.write_h5ad(Path(folder) / "cells.h5ad")
        for side in sides:
            if side.name == "pydeseq2" and not any(key for _, key in study.questions.values()):
                continue
            job = {"data": f"{folder}/cells.h5ad", "out": f"{folder}/{side.name}.npz", "seed": seed}
            job |= {
                "questions": study.questions,
                "epochs": options.epochs,
                "threads": options.threads,
            }
            result = run_worker(side, job, timeout=options.timeout)
            if "failure" in result:
                print(side.name, result["failure"], file=sys.stderr)
                found[side.name] = result
                continue
            with np.load(job["out"]) as answer:
                scores = _scores(task, study, dict(answer))
            found[side.name] = {"seconds": result, "scores": scores}
            for row, values in scores.items():
                line = "; ".join(f"{name} {value:.3f}" for name, value in values.items())
                print(f"{row}, seed {seed}, {side.name}: {line}", flush=True)
    return {"task": task, "seed": seed, "sides": found}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--tasks",
        default=",".join(TASKS),
        help=f"which of: {'; '.join(f'{k}: {v}' for k, v in TASKS.items())}",
    )
    add("--seeds", type=int, default=3, help="number of plantings; the other tasks run once; default 3")
    add("--epochs", type=int, default=60, help="epochs of the models; default 60")
    add("--threads", type=int, default=1, help="threads of each worker; default 1")
    add("--timeout", type=float, default=3600, help="seconds after which a worker is given up")
    add("--own-only", action="store_true", help="without scvi-tools and pydeseq2")
    add("--sides", help="names of sides to run, by comma; default all")
    add("--peer-env", type=Path, default=default_peer_folder(), help="environment of scvi-tools")
    add(
        "--deseq-env",
        type=Path,
        default=default_peer_folder().with_name("pydeseq2"),
        help="environment of pydeseq2",
    )
    add("--json", type=Path, help="where the numbers go; default benchmarks/results/de.json")
    options = parser.parse_args()
    options.json = options.json or Path(__file__).resolve().parent / "results" / "de.json"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    """Run every task, and print its scores as soon as they are known."""
    options = _options()
    sides, report = _sides(options), []
    for task in options.tasks.split(","):
        planted = task not in ("null", "ifnb", "muscat")
        for seed in range(options.seeds if planted else 1):
            report.append(_run(task, seed, sides, options))
            options.json.write_text(json.dumps(report, indent=1))
    return int(any("failure" in result for run in report for result in run["sides"].values()))


if __name__ == "__main__":
    sys.exit(main())
