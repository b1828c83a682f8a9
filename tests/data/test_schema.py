"""The frozen schema: what it records, and that nothing is lost in JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pyrocell.data import Category, Counts, Schema
from pyrocell.errors import LoadError, QueryError, SetupError
from tests.data.helpers import SETUP, freeze, make_adata, make_counts

ADATA = make_adata()
SCHEMA = freeze(ADATA, **SETUP)


def test_sizes_and_names():
    assert SCHEMA.n_cells == 30
    assert SCHEMA.size("counts") == 12
    assert SCHEMA.names("counts")[:2] == ["g0", "g1"]
    assert SCHEMA.size("batch") == 2
    assert SCHEMA.names("batch") == ["0", "1"]
    assert SCHEMA.names("label") == ["T", "B", "NK"]
    assert SCHEMA.names("categorical_covariates") == ["donor", "kit"]
    assert SCHEMA.sizes("categorical_covariates") == [3, 2]
    assert SCHEMA.levels("categorical_covariates") == [["0", "1", "2"], ["False", "True"]]
    assert SCHEMA.size("continuous_covariates") == 2
    assert SCHEMA.names("continuous_covariates") == ["age", "score"]


def test_has():
    bare = freeze(ADATA)
    for name in ("batch", "label", "size_factor", "categorical_covariates", "continuous_covariates"):
        assert SCHEMA.has(name)
        assert not bare.has(name)
    assert bare.has("counts")
    assert not bare.has("proteins")


def test_fields_left_out():
    bare = freeze(ADATA)
    assert bare.size("batch") == bare.size("label") == 1
    assert bare.sizes("categorical_covariates") == []
    assert bare.size("continuous_covariates") == 0


def test_moments_of_the_covariates():
    record = SCHEMA.fields["continuous_covariates"]
    values = ADATA.obs[["age", "score"]].to_numpy(float)
    np.testing.assert_array_equal(record["means"], values.mean(0))
    np.testing.assert_array_equal(record["sds"], values.std(0))


def test_library_moments_per_batch():
    logs, lane = np.log(make_counts().sum(1, dtype=float)), ADATA.obs["lane"].to_numpy()
    for i, name in enumerate(["0", "1"]):
        chosen = logs[lane == name]
        assert SCHEMA.statistics["library_log_mean"][i] == pytest.approx(chosen.mean(), rel=1e-12)
        assert SCHEMA.statistics["library_log_var"][i] == pytest.approx(chosen.var(ddof=0), rel=1e-12)
    whole = freeze(ADATA).statistics
    assert whole["library_log_mean"] == pytest.approx([logs.mean()])
    assert whole["library_log_var"] == pytest.approx([logs.var(ddof=0)])


def test_a_category_without_counts_has_no_library():
    schema = freeze(ADATA, {"batch": Category()}, batch_key="lane")
    assert schema.statistics == {}
    assert schema.size("batch") == 2


def test_json_keeps_every_digit():
    text = json.dumps(SCHEMA.to_json(), allow_nan=False)
    for again in (Schema.from_json(json.loads(text)), Schema.from_json(text)):
        assert again == SCHEMA
        assert again.statistics["library_log_var"] == SCHEMA.statistics["library_log_var"]
    assert Schema.from_json(freeze(ADATA).to_json()) != SCHEMA


def test_json_is_a_copy():
    SCHEMA.to_json()["fields"]["counts"]["names"][0] = "changed"
    SCHEMA.names("counts")[0] = "changed"
    assert SCHEMA.names("counts")[0] == "g0"


@pytest.mark.parametrize("record", [{}, "{", "[1]", {"format": 1, "n_cells": 3}, {"format": "x"}])
def test_what_is_no_schema(record):
    with pytest.raises(LoadError, match="no schema of pyrocell"):
        Schema.from_json(record)


def test_a_newer_schema():
    with pytest.raises(LoadError, match="format 99; this pyrocell reads up to 1"):
        Schema.from_json({**SCHEMA.to_json(), "format": 99})


def test_codes():
    assert SCHEMA.code("label", "NK") == 2
    assert SCHEMA.code("batch", 1) == 1
    with pytest.raises(QueryError, match=r"label='nk': .* Did you mean 'NK'\? Available: 'T', 'B', 'NK'"):
        SCHEMA.code("label", "nk")


def test_a_field_that_is_not_there():
    with pytest.raises(SetupError, match=r"no field 'bach'. Did you mean 'batch'\?.*'counts'"):
        SCHEMA.size("bach")
    with pytest.raises(SetupError, match="no columns of categories"):
        SCHEMA.sizes("batch")


def test_it_cannot_be_changed_and_says_what_it_is():
    with pytest.raises(AttributeError):
        SCHEMA.n_cells = 3
    assert repr(SCHEMA).startswith(
        "30 cells; counts: 12 (g0, g1, g2, ...); batch: 2 (0, 1); label: 3 (T, B, NK)"
    )
    assert "size_factor" not in repr(freeze(ADATA))


def test_unused_categories_are_dropped():
    part = ADATA[ADATA.obs["type"] != "B"]
    assert freeze(part, {"counts": Counts(), "label": Category()}, labels_key="type").names("label") == [
        "T",
        "NK",
    ]
