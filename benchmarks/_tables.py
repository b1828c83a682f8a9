"""From the workers' raw results to medians, spreads and ratios, and to printed tables."""

from __future__ import annotations

import math
from statistics import mean, median
from typing import Any

__all__ = ["METRICS", "Metric", "quality_summary", "quality_table", "speed_summary", "speed_table"]

OWN, PEER = "pyrocell", "scvi-tools"


class Metric:
    """One row of the table: how to take it from a worker's result, and the ratio aimed for.

    Parameters
    ----------
    title
        What the row says.
    stage
        The stage it comes from.
    kind
        ``"epoch"``, ``"call"``, ``"cpu"``, ``"seconds"``, ``"peak"``, or ``"growth"``: the peak over the loaded data.
    target
        Largest ratio pyrocell : scvi-tools aimed for; ``None`` where the row is for information.
    """

    def __init__(self, title: str, stage: str, kind: str = "seconds", target: float | None = None) -> None:
        self.title, self.stage, self.kind, self.target = title, stage, kind, target

    @property
    def key(self) -> str:
        """Name in the JSON."""
        return self.stage if self.kind == "seconds" else f"{self.stage}_{self.kind}"

    def value(self, result: dict[str, Any]) -> float | None:
        """Take this metric from one worker's result; seconds or MiB."""
        # A side that failed somewhere did less work: its peak over all stages would flatter it.
        if (
            "failure" in result
            or self.stage in result["errors"]
            or (self.stage == "all" and result["errors"])
        ):
            return None
        if self.kind in ("peak", "growth"):
            peak: int | None = result["peak_bytes"].get(self.stage)
            base: int = result["baseline_bytes"] if self.kind == "growth" else 0
            return None if peak is None else (peak - base) / 2**20
        seconds: list[float] = result["seconds"].get(self.stage)
        if not seconds:
            return None
        if self.kind == "seconds":
            return median(seconds)
        epochs: list[float] = result["epoch_seconds"]
        if self.kind == "cpu":
            return float(result["cpu_seconds"][self.stage] / len(epochs))
        # The first epoch also pays for thread pools and first allocations.
        return median(epochs[1:] or epochs) if self.kind == "epoch" else seconds[0] / len(epochs)


METRICS = [
    Metric("training, s an epoch", "train", "epoch", 0.4),
    Metric("training, s an epoch, whole call", "train", "call"),
    Metric("training, CPU s an epoch", "train", "cpu"),
    Metric("latent, s", "latent", target=1.0),
    Metric("expression, all genes, s", "expression", target=1.0),
    Metric("expression, 10 genes, s", "genes", target=1.0),
    Metric("DE, one group against rest, s", "de_one"),
    Metric("DE, all groups against rest, s", "de_groups", target=0.2),
    Metric("peak, training, MiB", "train", "peak", 1.0),
    Metric("peak, latent, MiB", "latent", "peak", 1.0),
    Metric("peak, expression, MiB", "expression", "peak", 1.0),
    Metric("peak, DE all groups, MiB", "de_groups", "peak", 1.0),
    Metric("peak, all stages, MiB", "all", "peak", 1.0),
    Metric("peak over loaded data, MiB", "all", "growth", 1.0),
]


def _spread(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest and every value."""
    return {"median": median(values), "min": min(values), "max": max(values), "values": values}


def speed_summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Summarise the runs of one case; ratios are taken between runs that followed each other."""
    summary: dict[str, Any] = {}
    for metric in METRICS:
        values = {name: [metric.value(run) for run in found] for name, found in runs.items()}
        kept = {name: [v for v in found if v is not None] for name, found in values.items()}
        row = {name: _spread(found) for name, found in kept.items() if found}
        pairs = list(zip(values.get(OWN, []), values.get(PEER, []), strict=False))
        ratios = [own / peer for own, peer in pairs if own is not None and peer]
        if row:
            summary[metric.key] = row | ({"ratio": _spread(ratios)} if ratios else {})
    return summary


def _number(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 4)}f}"


def _cell(found: dict[str, Any] | None) -> str:
    """Median, and half the range in per cent of it."""
    if found is None:
        return "-"
    spread = (found["max"] - found["min"]) / 2 / abs(found["median"]) if found["median"] else 0.0
    return f"{_number(found['median'])} ±{spread:.0%}"


def _verdict(ratio: dict[str, Any] | None, target: float | None) -> str:
    if ratio is None or target is None:
        return ""
    return f"{'met' if ratio['median'] <= target else 'MISSED'} (<= {target:g})"


def speed_table(summary: dict[str, Any]) -> str:
    """Lay out one case: medians with half ranges, the median of the paired ratios, and the aim."""
    lines = [f"{'':36}{OWN:>18}{PEER:>18}{'ratio':>16}   aim"]
    for metric in METRICS:
        row = summary.get(metric.key)
        if row is None:
            continue
        ratio = row.get("ratio")
        cells = f"{_cell(row.get(OWN)):>18}{_cell(row.get(PEER)):>18}{_cell(ratio):>16}"
        lines.append(f"{metric.title:36}{cells}   {_verdict(ratio, metric.target)}".rstrip())
    return "\n".join(lines + _inner_ratios(summary))


def _inner_ratios(summary: dict[str, Any]) -> list[str]:
    """Say what more groups or fewer genes cost on each side."""
    lines = []
    for many, one, text in (
        ("de_groups", "de_one", "DE of all groups costs {} times one comparison"),
        ("genes", "expression", "10 genes cost {} of all genes"),
    ):
        for name in (OWN, PEER):
            if all(name in summary.get(key, {}) for key in (many, one)):
                share = summary[many][name]["median"] / summary[one][name]["median"]
                lines.append(f"  {name}: {text.format(f'{share:.2f}')}")
    return lines


def quality_summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Summarise the validation ELBO per cell, and its relative differences (positive: pyrocell is better)."""
    kept = {name: [None if "failure" in run else run for run in found] for name, found in runs.items()}
    summary: dict[str, Any] = {"runs": kept}
    for name, found in kept.items():
        elbos = [run["elbo"] for run in found if run is not None]
        summary[name] = _spread(elbos) if elbos else None
    pairs = zip(kept.get(OWN, []), kept.get(PEER, []), strict=False)
    both = [(own["elbo"], peer["elbo"]) for own, peer in pairs if own is not None and peer is not None]
    differences = [(own - peer) / abs(peer) for own, peer in both]
    if differences:
        summary["relative_difference"] = _spread(differences) | {"mean": mean(differences)}
    return summary


def quality_table(summary: dict[str, Any], seeds: list[int]) -> str:
    """Lay out one case: a line a seed and side, then the relative difference."""
    columns = ("elbo", "reconstruction", "kl", "elbo_by_package", "train_seconds")
    lines = [f"{'seed':>4} {'':12}" + "".join(f"{column:>17}" for column in columns)]
    for position, seed in enumerate(seeds):
        for name, found in summary["runs"].items():
            run = found[position]
            cells = "failed" if run is None else "".join(f"{run[column]:>17,.3f}" for column in columns)
            lines.append(f"{seed:>4} {name:12}{cells}")
    difference = summary.get("relative_difference")
    if difference is not None:
        each = ", ".join(f"{value:+.3%}" for value in difference["values"])
        verdict = "met" if difference["mean"] >= -0.005 else "MISSED"
        mean_difference = f"mean {difference['mean']:+.3%} ({each})"
        lines.append(f"relative difference (positive: {OWN} better): {mean_difference}")
        lines.append(f"  aim: not worse than 0.5 %: {verdict}")
    return "\n".join(lines)
