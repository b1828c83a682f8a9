"""Plots: what is drawn is what was given, and every function returns the axes it drew into."""

from __future__ import annotations

import subprocess
import sys

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.text import Text

from pyrocell import plotting
from pyrocell.errors import QueryError
from pyrocell.infer.criticism import check_predictions
from pyrocell.infer.diagnosis import Diagnosis, Finding


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(rng.choice(["b", "a"], 60), categories=["b", "a", "unused"]),
            "score": rng.normal(size=60),
            "flag": rng.random(60) > 0.5,
        },
        index=[f"cell{i}" for i in range(60)],
    )
    data = anndata.AnnData(rng.poisson(1.0, (60, 2)).astype(np.float32), obs=obs)
    data.var_names = ["CD3D", "LYZ"]
    data.obsm["X_umap"] = rng.normal(size=(60, 2))
    return data


@pytest.fixture
def table():
    lfc = np.array([3.0, -2.0, 0.1, 0.0, 2.9])
    return pd.DataFrame(
        {
            "lfc_mean": lfc,
            "proba_de": [1.0, 0.99, 0.2, 0.0, 0.97],
            "is_de_fdr_0.05": [True, True, False, False, True],
            "group1": "B cell",
            "group2": "rest",
            "comparison": "B cell vs rest",
        },
        index=["UP", "DOWN", "FLAT", "NIL", "UP2"],
    )


@pytest.fixture(scope="module")
def check():
    rng = np.random.default_rng(0)
    mean = np.array([0.5, 2.0, 8.0, 0.0])
    observed = torch.from_numpy(rng.poisson(mean, (200, 4)).astype(np.float32))
    draws = torch.from_numpy(rng.poisson(mean, (10, 200, 4)).astype(np.float32))
    return check_predictions([(observed, draws)], feature_names=list("abcd"))


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_training_curves_draw_both_losses_and_skip_epochs_without_validation():
    history = pd.DataFrame({"elbo_train": [9.0, 5.0, 4.0], "elbo_validation": [np.nan, 6.0, 5.5]})
    ax = plotting.training_curves(history)
    train, held_out = ax.lines
    np.testing.assert_array_equal(train.get_ydata(), [9, 5, 4])
    np.testing.assert_array_equal(held_out.get_xdata(), [1, 2])
    assert labels(ax) == ["training cells", "held-out cells"]
    assert "nats per cell" in ax.get_ylabel()
    only = plotting.training_curves(history[["elbo_train"]])
    assert len(only.lines) == 1
    assert only is not ax


def test_first_epochs_do_not_flatten_the_curve():
    loss = 100 + 1e4 * np.exp(-np.arange(200.0))
    ax = plotting.training_curves(pd.DataFrame({"elbo_train": loss}))
    assert ax.get_ylim()[1] < 200


def test_training_curves_need_training():
    with pytest.raises(QueryError, match="train the model first"):
        plotting.training_curves(pd.DataFrame())


def test_latent_colours_categories_in_the_order_given(adata):
    adata.obs.loc["cell0", "kind"] = np.nan
    _, given = pyplot.subplots()
    ax = plotting.latent(adata, color="kind", ax=given)
    assert ax is given
    assert labels(ax) == ["b", "a", "missing"]
    points = ax.collections[0]
    drawn = {
        tuple(xy): to_hex(c) for xy, c in zip(points.get_offsets().data, points.get_facecolors(), strict=True)
    }
    expected = {"b": "#0072b2", "a": "#e69f00"}
    for xy, kind in zip(adata.obsm["X_umap"], adata.obs["kind"], strict=True):
        assert drawn[tuple(xy)] == expected.get(kind, "#dddddd")


@pytest.mark.parametrize("color", ["score", "LYZ"])
def test_latent_colours_numbers_and_genes(adata, color):
    ax = plotting.latent(adata, basis="umap", color=color)
    expected = adata.obs["score"] if color == "score" else adata[:, "LYZ"].X.ravel()
    np.testing.assert_allclose(ax.collections[0].get_array(), expected)
    assert ax.get_xlabel() == "UMAP 1"
    assert ax.get_title() == color


def test_latent_takes_flags_one_colour_and_many_categories(adata):
    assert labels(plotting.latent(adata, color="flag")) == ["False", "True"]
    assert plotting.latent(adata).get_legend() is None
    for n in (9, 15, 40):
        adata.obs["many"] = [f"type {i % n:02d}" for i in range(60)]
        ax = plotting.latent(adata, color="many")
        assert len(labels(ax)) == n
        assert len({to_hex(c) for c in ax.collections[0].get_facecolors()}) == n


def test_latent_names_what_is_missing(adata):
    with pytest.raises(QueryError, match=r"no 'tsne'.*'X_umap'"):
        plotting.latent(adata, basis="tsne")
    with pytest.raises(QueryError, match="'typ' is neither a gene nor a column"):
        plotting.latent(adata, color="typ")


def test_volcano_colours_what_the_table_calls(table):
    ax = plotting.volcano(table)
    silent, up, down = ax.collections[:3]
    assert [len(part.get_offsets()) for part in (silent, up, down)] == [2, 2, 1]
    np.testing.assert_allclose(up.get_offsets(), [[3.0, 1.0], [2.9, 0.97]])
    np.testing.assert_allclose(down.get_offsets(), [[-2.0, 0.99]])
    assert {text.get_text() for text in ax.texts} == {"UP", "DOWN", "UP2"}
    assert labels(ax) == ["not called", "higher in B cell (2)", "lower in B cell (1)"]
    assert ax.get_xlim()[0] == -ax.get_xlim()[1]


def test_volcano_labels_do_not_overlap():
    rng = np.random.default_rng(0)
    n = 400
    crowd = pd.DataFrame(
        {"lfc_mean": 2 + rng.normal(size=n) * 0.01, "proba_de": 1.0, "is_de_fdr_0.05": True},
        index=[f"LONGNAME{i}" for i in range(n)],
    )
    ax = plotting.volcano(crowd, n_labels=100)
    ax.figure.canvas.draw()
    assert crowd["lfc_mean"].idxmax() in {text.get_text() for text in ax.texts}  # the largest goes first
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the line to the point
    assert boxes
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_volcano_asks_which_comparison_to_draw(table):
    other = table.assign(group1="T cell", comparison="T cell vs rest", lfc_mean=-table["lfc_mean"])
    both = pd.concat([table, other])
    with pytest.raises(QueryError, match=r"2 comparisons.*group="):
        plotting.volcano(both)
    for group in ("T cell", "T cell vs rest"):
        ax = plotting.volcano(both, group=group)
        assert ax.get_title() == "T cell against rest"
        np.testing.assert_allclose(ax.collections[1].get_offsets(), [[2.0, 0.99]])
    with pytest.raises(QueryError, match=r"'NK'.*'B cell', 'T cell'"):
        plotting.volcano(both, group="NK")


def test_volcano_needs_effects(table):
    with pytest.raises(QueryError, match="mode='change'"):
        plotting.volcano(table[["proba_de"]])
    ax = plotting.volcano(table.rename(columns={"lfc_mean": "effect_mean"}).drop(columns="is_de_fdr_0.05"))
    assert ax.get_xlabel() == "mean difference"
    assert len(ax.collections[1].get_offsets()) == 2


@pytest.mark.parametrize(("what", "n_shown"), [("mean", 3), ("variance", 3), ("zero_fraction", 4)])
def test_predictive_check_draws_each_feature_and_the_diagonal(check, what, n_shown):
    ax = plotting.predictive_check(check, what=what)
    points = ax.collections[-1].get_offsets()
    assert len(points) == n_shown  # on logarithmic axes there is no place for the feature without counts
    np.testing.assert_allclose(points[:, 0], check.features[f"observed_{what}"].iloc[:n_shown])
    np.testing.assert_allclose(points[:, 1], check.features[f"predicted_{what}"].iloc[:n_shown])
    diagonal = ax.lines[-1]
    np.testing.assert_allclose(diagonal.get_xdata(), diagonal.get_ydata())
    assert ax.get_xscale() == ("linear" if what == "zero_fraction" else "log")


def test_predictive_check_draws_calibration(check):
    ax = plotting.predictive_check(check, what="calibration")
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], check.pit["density"])
    assert f"{check.summary['coverage_90']:.1%}" in ax.get_title()
    with pytest.raises(QueryError, match=r"'spread'.*'calibration'"):
        plotting.predictive_check(check, what="spread")


def test_matplotlib_is_loaded_on_first_use_only():
    program = "import sys, pyrocell.plotting; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def diagnosed(*, dimensions=True, features=True):
    findings = [
        Finding("convergence", float("nan"), 0.01, "a share", True, "Train."),
        Finding("dead dimensions", 0.75, 0.5, "a share", True, "Fewer."),
        Finding("predictive fit", 0.05, 0.1, "a share", False, "Fine."),
    ]
    shares = pd.DataFrame({"explained": [0.0, 0.9, 0.01, 0.0]}, index=pd.RangeIndex(4, name="dimension"))
    fit = pd.DataFrame({"ks_pit": np.linspace(0.4, 0, 12)}, index=[f"G{i}" for i in range(12)])
    return Diagnosis.of(
        findings,
        pd.Series([9.0, 5.0, 4.0]),
        dimensions=shares.assign(is_dead=shares["explained"] < 0.02) if dimensions else None,
        features=fit.assign(is_misfit=fit["ks_pit"] > 0.3) if features else None,
    )


def colors_of(patches):
    return [to_hex(patch.get_facecolor()) for patch in patches]


def test_a_diagnosis_has_a_bar_for_each_check_and_red_ones_for_those_worth_a_look():
    ax = plotting.diagnosis(diagnosed())
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "predictive fit",
        "dead dimensions",
        "convergence",
    ]
    assert ax.get_title() == "2 of 3 checks are worth a look"
    known = [patch for patch in ax.patches if patch.get_facecolor()[3] > 0]
    assert [patch.get_width() for patch in known] == pytest.approx([0.5, 1.5])
    assert colors_of(known) == ["#0072b2", "#d55e00"]
    assert [text.get_text() for text in ax.texts] == ["0.05", "0.75", "cannot be told"]


def test_a_diagnosis_shows_what_is_behind_it():
    ax = plotting.diagnosis(diagnosed(), what="dimensions")
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "0", "3"]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.9, 0.01, 0.0, 0.0])
    assert ax.get_title() == "1 of 4 dimensions of the latent are in use" and labels(ax) == ["in use", "dead"]
    ax = plotting.diagnosis(diagnosed(), what="features")
    assert [text.get_text() for text in ax.get_yticklabels()] == [f"G{i}" for i in range(9, -1, -1)]
    assert colors_of(ax.patches) == ["#0072b2"] * 7 + ["#d55e00"] * 3
    ax = plotting.diagnosis(diagnosed(), what="convergence")
    assert list(ax.lines[0].get_ydata()) == [9.0, 5.0, 4.0]
    given = pyplot.subplots()[1]
    assert plotting.diagnosis(diagnosed(), ax=given) is given
    few = diagnosed()
    few.dimensions[:] = pd.DataFrame({"explained": [np.nan] * 4, "is_dead": [False] * 4})
    assert plotting.diagnosis(few, what="dimensions").get_title() == "too few cells to tell"


def test_a_diagnosis_without_a_latent_says_so():
    with pytest.raises(QueryError, match="no dimensions to draw: the model has no latent"):
        plotting.diagnosis(diagnosed(dimensions=False), what="dimensions")
    with pytest.raises(QueryError, match="no features to draw: the model has no likelihood"):
        plotting.diagnosis(diagnosed(features=False), what="features")
    with pytest.raises(QueryError, match="what is 'all'; expected one of 'checks'"):
        plotting.diagnosis(diagnosed(), what="all")


# differences of means


@pytest.fixture
def means(table):
    wide = table.assign(
        lfsr=[1e-30, 1e-3, 0.8, 1.0, 0.02],
        lfc_low=table["lfc_mean"] - 0.5,
        lfc_high=table["lfc_mean"] + 0.5,
        lfc_raw=table["lfc_mean"] * 1.1,
    )
    wide.loc["NIL", ["lfc_mean", "lfc_low", "lfc_high"]] = np.nan  # below the floor
    return wide


def test_volcano_of_means_shows_the_false_sign_rate(means):
    ax = plotting.volcano(means)
    assert "false sign rate" in ax.get_ylabel()
    heights = np.concatenate([points.get_offsets()[:, 1] for points in ax.collections[:3]])
    assert len(heights) == 4 and heights.max() == pytest.approx(16)
    assert list(ax.get_yticks()) == [0, 4, 8, 12, 16]


def test_effects_have_their_intervals(means):
    ax = plotting.effects(means)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["DOWN", "UP2", "UP"]
    (bars,) = [item for item in ax.collections if hasattr(item, "get_segments")]
    ends = [(segment[0][0], segment[1][0]) for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [(-2.5, -1.5), (2.4, 3.4), (2.5, 3.5)])
    named = plotting.effects(means, ["FLAT", "UP"])
    assert [text.get_text() for text in named.get_yticklabels()] == ["FLAT", "UP"]
    with pytest.raises(QueryError, match="no features 'GONE'"):
        plotting.effects(means, ["GONE"])
    with pytest.raises(QueryError, match="no credible intervals"):
        plotting.effects(means.drop(columns=["lfc_low", "lfc_high"]))


def test_calls_over_groups(means):
    other = means.assign(group1="T cell", comparison="T cell vs rest", lfc_mean=-means["lfc_mean"])
    ax = plotting.calls(pd.concat([means, other]))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["B cell", "T cell"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["UP", "UP2", "DOWN"]
    np.testing.assert_allclose(ax.images[0].get_array(), [[3, -3], [2.9, -2.9], [-2, 2]])
    assert len(ax.collections[0].get_offsets()) == 6
    with pytest.raises(QueryError, match="no features 'GONE'"):
        plotting.calls(means, ["GONE"])
    with pytest.raises(QueryError, match="needs the column"):
        plotting.calls(means.drop(columns="lfc_mean"))


def test_the_counts_are_moved_as_the_effects_are(means):
    moved = means.assign(lfc_offset=[0.4, 0.4, 0.4, np.nan, 0.4])
    squares = plotting.effects(moved, ["UP"]).collections[-1].get_offsets()
    np.testing.assert_allclose(squares, [[3.3 - 0.4, 0]])


@pytest.fixture
def regions(means):
    """Results of `differential_accessibility`: the names are of accessibility."""
    names = {"proba_de": "prob_da", "lfc_mean": "effect_size", "is_de_fdr_0.05": "is_da_fdr_0.05"}
    others = {"lfc_low": "effect_low", "lfc_high": "effect_high", "lfc_raw": "emp_effect"}
    return means.rename(columns=names | others)


@pytest.mark.parametrize("ratio", [False, True])
def test_accessibility_is_drawn_as_expression_is(means, regions, ratio):
    if ratio:
        regions["effect_pseudobulk"] = 0.0  # what tells ratios apart
    unit = "log2 fold change" if ratio else "difference"
    for draw in (plotting.volcano, plotting.effects, plotting.calls):
        one, two = draw(means), draw(regions)
        for a, b in zip(one.collections, two.collections, strict=False):
            np.testing.assert_array_equal(a.get_offsets(), b.get_offsets())
        assert len(one.collections) - len(two.collections) == (ratio and draw is plotting.effects)
        bar = two.figure.axes[-1].get_ylabel()
        assert unit in (bar if draw is plotting.calls else two.get_xlabel())


def test_shares_of_cell_types_are_drawn(means):
    names = {"proba_de": "proba_da", "is_de_fdr_0.05": "is_da_fdr_0.05"}
    shares = means.rename(columns=names).drop(columns=["comparison", "group1", "group2"])
    assert labels(plotting.volcano(shares))[1] == "higher in group 1 (2)"
    assert len(plotting.effects(shares).get_yticklabels()) == 3
