"""Map a query onto a reference, and transfer labels: pyrocell, scvi-tools, and pyrocell trained on all cells.

Each side runs in a process and an environment of its own, on the same cells with the same options and epochs.
``kang``: PBMC of 8 donors, of whom 2 are the query. ``sorted``: sorted PBMC, of which a random 30 % are the query, as a
batch of their own. Labels of the query's cells are the vote of their 15 nearest reference cells in the latent space.
``--left-out`` takes each cell type out of the reference in turn, and reports how well ``get_novelty`` finds it in the
query.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from _cases import COARSE, data_folder, most_variable
from _environments import Side, default_peer_folder, own_side, peer_side, run_worker
from scipy.stats import rankdata
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

FILES = {"kang": "kang_8donors_12261.h5ad", "sorted": "pbmc_facs_sorted_zheng.h5ad"}
QUERY_DONORS = ("101", "1244")


def _cells(name: str, n_cells: int) -> anndata.AnnData:
    """Return some cells, with the columns that the workers read."""
    folder = data_folder()
    if folder is None:
        raise SystemExit("The data folder was not found; name it in PYROCELL_DATA.")
    rng = np.random.default_rng(0)
    adata = anndata.read_h5ad(folder / FILES[name])
    adata = adata[np.sort(rng.choice(adata.n_obs, min(n_cells, adata.n_obs), replace=False))].copy()
    types = adata.obs["cell_type"].astype(str)
    if name == "kang":
        adata.obs["batch"] = adata.obs["donor"].astype(str)
        is_query = adata.obs["batch"].isin(QUERY_DONORS).to_numpy()
    else:
        adata = adata[:, most_variable(adata.X, 1500)].copy()
        is_query = rng.random(adata.n_obs) < 0.3
        adata.obs["batch"] = np.where(is_query, "query", "reference")
    adata.obs["type"], adata.obs["is_query"] = types.replace(COARSE), is_query
    return adata


def _accuracy(reference: np.ndarray, query: np.ndarray, types: np.ndarray, is_query: np.ndarray) -> str:
    vote = KNeighborsClassifier(15).fit(reference, types[~is_query]).predict(query)
    right = float((vote == types[is_query]).mean())
    return f"{right:.3f} ({f1_score(types[is_query], vote, average='macro'):.3f})"


def _transfer(sides: list[Side], adata: anndata.AnnData, options: argparse.Namespace, folder: Path) -> None:
    types, is_query = adata.obs["type"].to_numpy(), adata.obs["is_query"].to_numpy()
    adata.write_h5ad(folder / "cells.h5ad")
    print("accuracy (macro F1) of labels; largest change of the reference's latents")
    for seed in range(options.seeds):
        for encode in (False, True):
            for side in sides:
                job = _job(folder, options, seed) | {"encode_covariates": encode}
                found = run_worker(side, job, timeout=options.timeout)
                name = f"{side.name}, seed {seed}, encode_covariates={encode}"
                if "failure" in found:
                    print(name, found["failure"], file=sys.stderr)
                    continue
                latents = np.load(job["out"])
                line = f"{name}: mapped {_accuracy(latents['reference'], latents['query'], types, is_query)}"
                if "joint" in latents:
                    joint = latents["joint"]
                    line += f", joint {_accuracy(joint[~is_query], joint[is_query], types, is_query)}"
                print(f"{line}, moved {found['moved']:.1e}, {found['cpu_seconds']:.0f} s of CPU", flush=True)


def _left_out(side: Side, adata: anndata.AnnData, options: argparse.Namespace, folder: Path) -> None:
    types, is_query = adata.obs["type"].to_numpy(), adata.obs["is_query"].to_numpy()
    for left_out in sorted(set(types)):
        adata[is_query | (types != left_out)].copy().write_h5ad(folder / "cells.h5ad")
        found = run_worker(
            side, _job(folder, options, 0) | {"encode_covariates": False}, timeout=options.timeout
        )
        if "failure" in found:
            print(left_out, found["failure"], file=sys.stderr)
            continue
        with np.load(folder / "latents.npz") as latents:
            distance, quantile = latents["distance"], latents["quantile"]
        new = types[is_query] == left_out
        ranks, n = rankdata(distance), int(new.sum())
        auroc = (ranks[new].sum() - n * (n + 1) / 2) / (n * (len(new) - n))
        shares = [f"{(quantile[which] > 0.95).mean():.2f}" for which in (new, ~new)]
        print(
            f"{left_out}: {n} of {len(new)}; AUROC {auroc:.3f}; above 0.95: new {shares[0]}, known {shares[1]}",
            flush=True,
        )


def _job(folder: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    out = str(folder / "latents.npz")
    job = {"data": str(folder / "cells.h5ad"), "out": out, "seed": seed, "joint": not options.left_out}
    return job | {"epochs": options.epochs, "lr": options.lr, "threads": options.threads}


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--case", choices=list(FILES), default="kang", help="which cells; default kang")
    add("--cells", type=int, default=5000, help="number of cells; default 5000")
    add(
        "--epochs",
        type=int,
        default=60,
        help="epochs of the reference, of the query, and of all together; default 60",
    )
    add("--lr", type=float, default=1e-3, help="learning rate; default 0.001")
    add("--seeds", type=int, default=2, help="number of seeds; default 2")
    add("--threads", type=int, default=1, help="threads of each worker; default 1")
    add("--timeout", type=float, default=1800, help="seconds after which a worker is given up")
    add(
        "--left-out", action="store_true", help="novelty of each cell type, left out of the reference in turn"
    )
    add("--own-only", action="store_true", help="without scvi-tools")
    add("--peer-env", type=Path, default=default_peer_folder(), help="environment of scvi-tools")
    options = parser.parse_args()
    sides = (
        [own_side()] if options.own_only or options.left_out else [own_side(), peer_side(options.peer_env)]
    )
    sides = [replace(side, worker=side.worker.with_name(f"{side.worker.stem}_mapping.py")) for side in sides]
    with tempfile.TemporaryDirectory() as folder:
        adata = _cells(options.case, options.cells)
        if options.left_out:
            _left_out(sides[0], adata, options, Path(folder))
        else:
            _transfer(sides, adata, options, Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
