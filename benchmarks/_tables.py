"""From the workers' raw results to medians, spreads and ratios, and to printed tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

__all__ = [
    "MEMORY",
    "QUERIES",
    "TRAINING",
    "Metric",
    "length_differences",
    "quality_summary",
    "quality_table",
    "summary",
    "table",
    "verdict",
]

OWN, PEER = "pyrocell", "scvi-tools"


@dataclass(frozen=True)
class Metric:
    """One row of a table, and how to take it from a worker's result.

    Parameters
    ----------
    title
        What the row says.
    stage
        The stage it comes from.
    kind
        ``"seconds"`` and ``"cpu"`` of a call, by the wall and of all processors; ``"epoch"`` and ``"epoch_cpu"``, the
        same of an epoch; ``"call"``, the whole training divided by its epochs; ``"peak"`` and ``"growth"``, MiB, the
        latter over the loaded data.
    """

    title: str
    stage: str
    kind: str = "seconds"

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
        if self.stage not in result["seconds"]:
            return None
        if self.kind in ("seconds", "cpu"):
            return median(result["seconds" if self.kind == "seconds" else "cpu_seconds"][self.stage])
        epochs: list[float] = result["epoch_seconds"]
        if self.kind == "epoch":
            return median(epochs)
        source = "cpu_seconds" if self.kind == "epoch_cpu" else "seconds"
        return float(result[source][self.stage][0] / len(epochs))


TRAINING = [
    Metric("training, s an epoch", "train", "epoch"),
    Metric("training, s an epoch, whole call", "train", "call"),
    Metric("training, processor s an epoch", "train", "epoch_cpu"),
]
QUERIES = [
    Metric(f"{title}, {unit}", stage, kind)
    for stage, title in (
        ("latent", "latent"),
        ("expression", "expression, all genes"),
        ("genes", "expression, 10 genes"),
        ("de_groups", "DE, groups against rest"),
        ("de_population", "the same, of means"),
    )
    for kind, unit in (("seconds", "s"), ("cpu", "processor s"))
]
MEMORY = [
    Metric("peak, training, MiB", "train", "peak"),
    Metric("peak, latent, MiB", "latent", "peak"),
    Metric("peak, expression, MiB", "expression", "peak"),
    Metric("peak, expression, 10 genes, MiB", "genes", "peak"),
    Metric("peak, DE of groups, MiB", "de_groups", "peak"),
    Metric("peak, all stages, MiB", "all", "peak"),
    Metric("peak over loaded data, MiB", "all", "growth"),
]


def _spread(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest and every value."""
    return {"median": median(values), "min": min(values), "max": max(values), "values": values}


def summary(runs: dict[str, list[dict[str, Any]]], metrics: Sequence[Metric]) -> dict[str, Any]:
    """Summarise the runs of one case; ratios, scvi-tools : pyrocell, are of runs that followed each other."""
    found: dict[str, Any] = {}
    for metric in metrics:
        values = {name: [metric.value(run) for run in results] for name, results in runs.items()}
        kept = {name: [v for v in each if v is not None] for name, each in values.items()}
        row = {name: _spread(each) for name, each in kept.items() if each}
        pairs = list(zip(values.get(OWN, []), values.get(PEER, []), strict=False))
        ratios = [peer / own for own, peer in pairs if own and peer is not None]
        if row:
            found[metric.key] = row | ({"ratio": _spread(ratios)} if ratios else {})
    return found


def _number(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 4)}f}"


def _cell(found: dict[str, Any] | None) -> str:
    """Median, and half the range in per cent of it."""
    if found is None:
        return "-"
    spread = (found["max"] - found["min"]) / 2 / abs(found["median"]) if found["median"] else 0.0
    return f"{_number(found['median'])} ±{spread:.0%}"


def verdict(ratio: float, target: float) -> str:
    """Say whether a ratio scvi-tools : pyrocell reaches its aim."""
    return f"{'met' if ratio >= target else 'MISSED'} (>= {target:g})"


def table(found: dict[str, Any], metrics: Sequence[Metric], targets: Mapping[str, float | None]) -> str:
    """Lay out one case: medians with half ranges, the median of the paired ratios, and the aim by key."""
    lines = [f"{'':36}{OWN:>18}{PEER:>18}{'ratio':>16}   aim"]
    for metric in metrics:
        row = found.get(metric.key)
        if row is None:
            continue
        ratio, target = row.get("ratio"), targets.get(metric.key)
        cells = f"{_cell(row.get(OWN)):>18}{_cell(row.get(PEER)):>18}{_cell(ratio):>16}"
        aim = "" if ratio is None or target is None else verdict(ratio["median"], target)
        lines.append(f"{metric.title:36}{cells}   {aim}".rstrip())
    return "\n".join(lines)


def length_differences(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Stages in which the two sides returned tables of different lengths: those times do not compare."""
    lengths: dict[str, set[int]] = {}
    for results in runs.values():
        for stage, shape in results[0].get("shapes", {}).items():
            lengths.setdefault(stage, set()).add(shape[0])
    return sorted(stage for stage, found in lengths.items() if len(found) > 1)


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
