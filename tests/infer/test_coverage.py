"""Intervals of effects where most genes have none: what they hold, by kind of gene."""

from __future__ import annotations

import numpy as np
import pytest

from tests.infer.test_population import CALLED, Study

N_GENES = 600


def sparse_effects(seed):
    """A tenth of the genes changes, by a factor of 1.4 to 4."""
    rng = np.random.default_rng(1000 + seed)
    size = rng.uniform(0.5, 2.0, N_GENES) * rng.choice([-1.0, 1.0], N_GENES)
    return np.where(np.arange(N_GENES) < N_GENES // 10, size, 0.0)


def coverage(*, donors, seeds=(0, 1, 2), sample_key=None, without_counts=False):
    """Share of 90 % intervals that hold the truth, of all genes, of changed ones and of called ones."""
    held, changed, called = [], [], []
    for seed in seeds:
        effects = sparse_effects(seed)
        study = Study(n_genes=N_GENES, effects=effects, donor_sd=0.3 if donors else 0.0, seed=seed)
        table = study.table(relative_to="total", sample_key=sample_key, without_counts=without_counts)
        # where no effect is most probable, the interval is a point
        inside = (table["lfc_low"] - 1e-9 <= effects) & (effects <= table["lfc_high"] + 1e-9)
        tested = table["tested"].to_numpy()
        held.append(inside[tested])
        changed.append((effects != 0)[tested])
        called.append(table[CALLED][tested])
    held, changed, called = (np.concatenate(part) for part in (held, changed, called))
    return {"all": held.mean(), "changed": held[changed].mean(), "called": held[called].mean()}


@pytest.mark.parametrize(("donors", "least"), [(False, 0.78), (True, 0.62)], ids=["cells", "donors"])
def test_intervals_of_sparse_effects(donors, least):
    """The user guide says so: wide of the mark for changed genes that are not called, right for those called."""
    found = coverage(donors=donors, sample_key="unit" if donors else None)
    assert found["all"] >= 0.95 and found["called"] >= 0.84 and found["changed"] >= least, found


def test_defects_of_sparse_intervals_are_noticed():
    """The model's means without the counts, and cells taken for replicates."""
    assert coverage(donors=False, seeds=(0,), without_counts=True)["changed"] < 0.5
    assert coverage(donors=True, seeds=(0,))["called"] < 0.7
