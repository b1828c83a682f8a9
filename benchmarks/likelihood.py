"""Time the likelihoods of counts on the CPU: compiled loops beside the dense formula of other devices, in float64.

One minibatch of 128 cells, log-probabilities and slopes; the best of many calls, which a busy machine disturbs least.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from pyrocell.distributions import NegativeBinomial, NonZeros, Poisson, ZeroInflatedNegativeBinomial


def best(call: Callable[[], object], n_calls: int) -> float:
    """Return the shortest time of a call, in milliseconds, after one that compiles."""
    call()
    times = []
    for _ in range(n_calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def step(make: Callable[..., Poisson], parameters: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    """Score a minibatch and go back to its parameters, with an index of non-zeros made anew as in training."""
    NonZeros.search(x).attach_to(x)
    score = make(**parameters).to_event(1).log_prob(x).sum()
    torch.autograd.grad(score, list(parameters.values()))


def main() -> None:
    """Print one line for each family and number of genes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--genes", type=int, nargs="+", default=[2000, 8000], help="numbers of genes")
    parser.add_argument("--density", type=float, default=0.08, help="share of counts that are not zero")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch's threads; the loops take one in any case"
    )
    parser.add_argument("--calls", type=int, default=50, help="calls to take the best of")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'':28s}{'compiled, ms':>14s}{'float64, ms':>14s}{'ratio':>8s}")
    for n_genes in options.genes:
        x = torch.poisson(torch.full((128, n_genes), 0.8)) + 1.0
        x *= torch.rand_like(x) < options.density
        per_cell, per_gene = torch.randn(128, n_genes) - 3.0, torch.randn(n_genes)
        families = {
            "negative binomial": (NegativeBinomial, {"log_mean": per_cell, "log_theta": per_gene}),
            "zero-inflated": (
                ZeroInflatedNegativeBinomial,
                {"log_mean": per_cell, "log_theta": per_gene, "zi_logits": per_cell.clone()},
            ),
            "Poisson": (Poisson, {"log_rate": per_cell}),
        }
        for name, (make, given) in families.items():
            times = []
            for dtype in (torch.float32, torch.float64):
                parameters = {key: value.to(dtype).requires_grad_() for key, value in given.items()}
                counts = x.to(dtype)
                n_calls = options.calls if dtype == torch.float32 else max(3, options.calls // 10)
                times.append(best(lambda m=make, p=parameters, c=counts: step(m, p, c), n_calls))
            print(
                f"{f'{name}, {n_genes:,} genes':28s}{times[0]:14.2f}{times[1]:14.2f}{times[0] / times[1]:8.3f}"
            )


if __name__ == "__main__":
    main()
