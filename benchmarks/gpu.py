"""Cells a second in training on a CUDA device: recorded steps, plain steps, and a hand-written step of torch.

One process, on simulated counts that lie on the device. ``hand-written`` is SCVI's network and likelihood in bare
torch, without Pyro, recorded as a CUDA graph in the same way: what is left to gain. The table is kept as JSON too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _cases import simulate
from models import _cells, _regions
from torch import nn
from torch.nn import functional

import pyrocell


class HandWritten(nn.Module):
    """SCVI with a negative binomial and two batches, as one would write it for this one purpose."""

    def __init__(self, n_genes: int, n_hidden: int = 128, n_latent: int = 10) -> None:
        super().__init__()
        norm = {"eps": 1e-3, "momentum": 0.01}
        self.encoder = nn.Sequential(
            nn.Linear(n_genes, n_hidden), nn.BatchNorm1d(n_hidden, **norm), nn.ReLU(), nn.Dropout(0.1)
        )
        self.heads = nn.Linear(n_hidden, 2 * n_latent)
        self.decoder = nn.Sequential(
            nn.Linear(n_latent + 2, n_hidden), nn.BatchNorm1d(n_hidden, **norm), nn.ReLU()
        )
        self.genes = nn.Linear(n_hidden, n_genes)
        self.log_theta = nn.Parameter(torch.randn(n_genes))

    def forward(self, x: torch.Tensor, batch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the loss per cell."""
        mean, log_variance = self.heads(self.encoder(x.log1p())).chunk(2, -1)
        variance = log_variance.exp() + 1e-4
        z = mean + variance.sqrt() * torch.randn_like(mean)
        hidden = self.decoder(torch.cat([z, functional.one_hot(batch, 2).float()], -1))
        log_mean = self.genes(hidden).log_softmax(-1) + x.sum(-1, keepdim=True).log()
        theta, log_theta = self.log_theta.exp(), self.log_theta
        log_total = torch.logaddexp(log_theta, log_mean)
        log_p = (
            torch.lgamma(x + theta)
            - torch.lgamma(theta)
            - torch.lgamma(x + 1)
            + theta * (log_theta - log_total)
            + x * (log_mean - log_total)
        )
        kl = 0.5 * (variance + mean.square() - 1 - variance.log()).sum(-1)
        return (weight * kl - log_p.sum(-1)).mean()


def hand_written(counts: torch.Tensor, batch: torch.Tensor, size: int, n_steps: int) -> float:
    """Cells a second of the recorded hand-written step."""
    module = HandWritten(counts.shape[1]).to(counts.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, fused=True, capturable=True)
    rows, weight = torch.zeros(size, dtype=torch.int64, device=counts.device), torch.ones((), device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        x = counts.index_select(0, rows).float()
        module(x, batch.index_select(0, rows), weight).backward()
        optimizer.step()

    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    seconds = []
    for _ in range(3):
        order = torch.randint(len(counts), (n_steps, size), device=counts.device)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for chosen in order:
            rows.copy_(chosen)
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1000)
    return n_steps * size / median(seconds)


def cells_a_second(name: str, adata: Any, options: argparse.Namespace, *, record: bool, **kind: Any) -> float:
    """Median over the epochs after the first three, in which steps are recorded."""
    model_class = getattr(pyrocell, name)
    setup: dict[str, Any] = {"batch_key": "batch"}
    if name == "SCANVI":
        setup |= {"labels_key": "label", "unlabeled_category": "unknown"}
    if name == "TOTALVI":
        setup |= {"protein_expression_obsm_key": "protein_expression"}
    model_class.setup_anndata(adata, **setup)
    model = model_class(adata, **kind)
    plan = dataclasses.replace(model.default_plan, record_step=record, lr_plateau=False)
    epochs = options.epochs if record else 5
    model.train(epochs, batch_size=options.batch_size, early_stopping=False, device="cuda", plan=plan)
    return len(model.train_indices) / median(model.history["seconds"].iloc[4:])


def main() -> int:
    """Run every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--cells", type=int, default=20_000, help="number of cells; default 20,000")
    add("--batch-size", type=int, default=128, help="cells in a minibatch; default 128")
    add("--epochs", type=int, default=12, help="epochs of each run; default 12")
    add("--json", type=Path, default=Path(__file__).resolve().parent / "results" / "gpu.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA device is present; there is nothing to measure.")
    pyrocell.settings.progress = False
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.cells:,} cells")
    cells = _cells(options.cells)
    counts = torch.from_numpy(cells.X.toarray()).to("cuda", torch.int16)
    batch = torch.from_numpy(
        cells.obs["batch"].astype("category").cat.codes.to_numpy().astype(np.int64)
    ).cuda()
    rows: dict[str, dict[str, float]] = {}
    speed = hand_written(counts, batch, options.batch_size, 500)
    print(f"hand-written step, nb, 2,000 genes: {speed:,.0f} cells/s", flush=True)
    rows["hand-written"] = {"recorded": speed}
    wide = simulate(options.cells // 2, 8000)
    kinds: list[tuple[str, str, Any, dict[str, Any]]] = [
        ("SCVI nb", "SCVI", cells, {"gene_likelihood": "nb"}),
        ("SCVI zinb", "SCVI", cells, {}),
        ("SCVI nb, 8,000 genes", "SCVI", wide, {"gene_likelihood": "nb"}),
        ("SCANVI", "SCANVI", cells, {}),
        ("TOTALVI", "TOTALVI", cells, {}),
        ("PEAKVI, 20,000 regions", "PEAKVI", _regions(options.cells // 4), {}),
    ]
    for label, name, adata, kind in kinds:
        found = {
            kind_of_step: cells_a_second(name, adata, options, record=record, **kind)
            for kind_of_step, record in (("recorded", True), ("plain", False))
        }
        rows[label] = found
        ratio = found["recorded"] / found["plain"]
        print(
            f"{label:24} recorded {found['recorded']:>10,.0f}  plain {found['plain']:>10,.0f} cells/s  {ratio:.1f}x",
            flush=True,
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
