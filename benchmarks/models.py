"""Compare the seconds an epoch of every model with those of scvi-tools: one line for each model.

Each side runs in a process and an environment of its own, in turn (A B A B ...), on the same simulated data, with the
same minibatch size and architecture (scvi-tools' defaults, which the options name where pyrocell's differ). A ratio is
the seconds of scvi-tools divided by those of pyrocell.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import anndata
import numpy as np
import pandas as pd
from _cases import simulate
from _environments import Side, default_peer_folder, own_side, peer_side, run_worker
from _tables import verdict
from scipy import sparse

MODELS = (
    "SCVI",
    "SCANVI",
    "TOTALVI",
    "PEAKVI",
    "VELOVI",
    "SCBASSET",
    "CellAssign",
    "RNAStereoscope",
    "SpatialStereoscope",
    "Tangram",
)
MINIBATCHES = {"TOTALVI": 256, "VELOVI": 256, "CellAssign": 1024}


def _cells(n_cells: int, seed: int = 0) -> anndata.AnnData:
    """Simulate 2,000 genes, and beside them 30 proteins, labels of which nine in ten are hidden, and 100 markers."""
    rng = np.random.default_rng(seed)
    adata = simulate(n_cells, 2000, seed=seed)
    group = adata.obs["group"].astype("category").cat.codes.to_numpy()
    foreground = rng.random((8, 30)) < 0.3
    mean = 5.0 * np.where(foreground[group], 10.0, 1.0) * rng.lognormal(0.0, 0.3, (n_cells, 30))
    names = [f"protein{t}" for t in range(30)]
    proteins = rng.poisson(rng.gamma(5.0, mean / 5.0)).astype(np.float32)
    adata.obsm["protein_expression"] = pd.DataFrame(proteins, index=adata.obs_names, columns=names)
    total = np.asarray(adata.X.sum(1)).ravel()
    adata.obs["size"] = total / total.mean()
    counted = np.argsort(-np.asarray(adata.X.sum(0)).ravel())[:100]
    is_marker = np.zeros((adata.n_vars, 8), dtype=np.int64)
    is_marker[counted, np.arange(100) % 8] = 1
    adata.varm["markers"] = pd.DataFrame(is_marker, adata.var_names, [f"type{c}" for c in range(8)])
    hidden = rng.random(n_cells) < 0.9
    adata.obs["label"] = np.where(hidden, "unknown", adata.obs["group"].astype(str))
    return adata


def _regions(n_cells: int, n_regions: int = 20_000, density: float = 0.03, seed: int = 0) -> anndata.AnnData:
    """Simulate open regions, 3 % of them seen in a cell."""
    rng = np.random.default_rng(seed)
    open_in = sparse.random(n_cells, n_regions, density, format="csr", dtype=np.float32, random_state=rng)
    open_in.data[:] = 1.0
    names = [f"cell{i}" for i in range(n_cells)]
    batch = [f"batch{b}" for b in rng.choice(2, n_cells)]
    return anndata.AnnData(open_in, obs=pd.DataFrame({"batch": batch}, index=names))


def _kinetics(n_cells: int, n_genes: int = 500, seed: int = 0) -> anndata.AnnData:
    """Simulate genes that rise and fall along one time axis, unspliced RNA ahead of spliced, from 0 to 1."""
    rng = np.random.default_rng(seed)
    time, peak = rng.random((n_cells, 1)), rng.uniform(0.2, 0.8, n_genes)
    layers = {}
    for name, delay in (("Mu", 0.0), ("Ms", 0.1)):
        values = np.exp(-(((time - peak - delay) / 0.2) ** 2)) + rng.normal(0, 0.05, (n_cells, n_genes))
        low = values.min(0)
        layers[name] = ((values - low) / (values.max(0) - low)).astype(np.float32)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    return anndata.AnnData(layers["Ms"], obs=obs, layers=layers)


def _spots(n_cells: int, n_spots: int = 300, seed: int = 0) -> anndata.AnnData:
    """Simulate cells with 500 genes, and spots of ten of them each."""
    rng = np.random.default_rng(seed)
    adata = simulate(n_cells, 500, seed=seed)
    chosen = rng.integers(adata.n_obs, size=(n_spots, 10))
    sums = np.stack([np.asarray(adata.X[rows].sum(0)).ravel() for rows in chosen])
    seen = (sums.sum(0) > 0) & (np.asarray(adata.X.sum(0)).ravel() > 0)
    adata = adata[:, seen].copy()
    names = [f"spot{v}" for v in range(n_spots)]
    adata.uns["spots"] = pd.DataFrame(sums[:, seen], names, list(adata.var_names))
    return adata


def _peaks(n_cells: int, n_peaks: int = 512, seed: int = 0) -> anndata.AnnData:
    """Simulate peaks with random DNA, 10 % of them seen in a cell: few, because each costs so much."""
    rng = np.random.default_rng(seed)
    adata = _regions(n_cells, n_peaks, density=0.1, seed=seed)
    filled = adata.X.tolil()
    filled[np.arange(n_peaks) % n_cells, np.arange(n_peaks)] = 1.0
    filled[np.arange(n_cells), np.arange(n_cells) % n_peaks] = 1.0
    adata.X = filled.tocsr()
    adata.varm["dna_code"] = rng.integers(4, size=(n_peaks, 1344), dtype=np.uint8)
    return adata


def _job(model: str, data: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    return {
        "model": model,
        "data": str(data),
        "epochs": options.epochs,
        "threads": options.threads,
        "batch_size": MINIBATCHES.get(model, 128),
        "seed": seed,
    }


def _seconds(result: dict[str, Any]) -> float | None:
    """Median over epochs; the first one also pays for thread pools and first allocations."""
    if "failure" in result:
        print(result["failure"], file=sys.stderr)
        return None
    return median(result["epoch_seconds"][1:])


def _measure(model: str, data: Path, sides: list[Side], options: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[float | None]] = {side.name: [] for side in sides}
    for repeat in range(options.repeats):
        for side in sides:
            found = run_worker(side, _job(model, data, options, repeat), timeout=options.timeout)
            runs[side.name].append(_seconds(found))
    pairs = list(zip(*runs.values(), strict=True))
    ratios = [peer / own for own, peer in pairs if own and peer]
    return {"seconds": runs, "ratios": ratios, "ratio": median(ratios) if ratios else None}


def _line(model: str, found: dict[str, Any]) -> str:
    medians = [median([s for s in runs if s] or [float("nan")]) for runs in found["seconds"].values()]
    cells = "".join(f"{seconds:>16.3f}" for seconds in medians)
    if found["ratio"] is None:
        return f"{model:20}{cells}{'failed':>12}"
    spread = (max(found["ratios"]) - min(found["ratios"])) / 2 / found["ratio"]
    return f"{model:20}{cells}{found['ratio']:>8.2f} ±{spread:.0%}   {verdict(found['ratio'], 1.0)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--only", default=",".join(MODELS), help=f"comma-separated, of {', '.join(MODELS)}")
    add("--cells", type=int, default=5000, help="number of cells; default 5000")
    add("--epochs", type=int, default=4, help="epochs of each run; default 4")
    add("--repeats", type=int, default=3, help="pairs of runs; default 3")
    add("--threads", type=int, default=2, help="threads of each worker; default 2")
    add("--timeout", type=float, default=1800, help="seconds after which a worker is given up")
    add("--peer-env", type=Path, default=default_peer_folder(), help="environment of scvi-tools")
    add("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "models.json")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(MODELS):
        raise SystemExit(f"--only knows {', '.join(MODELS)}; not {', '.join(sorted(unknown))}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    return options


def main() -> int:
    """Run every model asked for, and print its line as soon as it is known."""
    options = _options()
    sides = [
        replace(side, worker=side.worker.with_name(f"{side.worker.stem}_models.py"))
        for side in (own_side(), peer_side(options.peer_env))
    ]
    report: dict[str, Any] = {}
    print(f"{'':20}{'pyrocell, s':>16}{'scvi-tools, s':>16}{'ratio':>12}")
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"PEAKVI": _regions, "VELOVI": _kinetics, "SCBASSET": _peaks, "Tangram": _spots}
        files: dict[str, Path] = {}
        for model in options.only.split(","):
            make = kinds.get(model, _cells)
            if make.__name__ not in files:
                files[make.__name__] = Path(folder) / f"{make.__name__}.h5ad"
                make(options.cells).write_h5ad(files[make.__name__])
            report[model] = _measure(model, files[make.__name__], sides, options)
            print(_line(model, report[model]), flush=True)
            options.json.write_text(json.dumps(report, indent=1))
    return int(any(found["ratio"] is None for found in report.values()))


if __name__ == "__main__":
    sys.exit(main())
