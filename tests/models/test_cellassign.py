"""CellAssign: the bound against a sum written out, its table of markers, its verbs, and what it recovers."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from scipy import sparse
from scipy.special import gammaln, logsumexp

import pyrocell
from pyrocell import CellAssign
from pyrocell.errors import DataError, NotTrainedError, PyrocellWarning, QueryError, SetupError
from pyrocell.infer.calibration import calibration_error
from tests.multimodal import real_data

TYPES = ["A", "B", "C", "D", "E"]
N_MARKERS, N_NOISE, N_OTHERS = 5, 15, 160


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def simulate(seed=0, n_cells=1200, n_types=5, *, shift=0.0, rate=-0.5):
    """Types of five markers each, cells of no type, and genes of no type; theta is a bump at low means.

    ``shift`` lowers or raises the counts of a second batch, by its natural logarithm; ``rate`` is the mean log rate.
    """
    draw = np.random.default_rng(seed)
    n_genes = N_MARKERS * n_types + N_NOISE
    is_marker = np.zeros((n_genes, n_types), dtype=int)
    is_marker[np.arange(N_MARKERS * n_types), np.repeat(np.arange(n_types), N_MARKERS)] = 1
    delta = draw.uniform(2.1, 4, is_marker.shape) * is_marker
    label = draw.choice(n_types + 1, n_cells, p=draw.dirichlet(np.full(n_types + 1, 5.0)))
    size, batch = draw.lognormal(0, 0.3, n_cells), draw.integers(2, size=n_cells)
    per_type = np.column_stack([delta, np.zeros(n_genes)])
    log_mean = np.log(size)[:, None] + draw.normal(rate, 0.5, n_genes) + per_type[:, label].T
    mean = np.exp(log_mean + shift * batch[:, None])
    theta = 1.0 + 4.0 * np.exp(-0.5 * ((mean - 10) / 10) ** 2)
    counts = draw.poisson(draw.gamma(theta, mean / theta))
    # Other genes, by which the depth of a cell is seen.
    depth = (size * np.exp(shift * batch))[:, None]
    others = draw.poisson(depth * draw.gamma(1.0, 5.0, N_OTHERS))
    adata = anndata.AnnData(sparse.csr_matrix(np.hstack([counts, others]).astype(np.float32)))
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    names = [f"marker{g}" for g in range(n_genes)]
    adata.var_names = [*names, *(f"other{g}" for g in range(N_OTHERS))]
    adata.obs["type"] = np.array([*TYPES[:n_types], "unassigned"])[label]
    adata.obs["batch"], adata.obs["size"] = batch.astype(str), size
    adata = adata[np.asarray(adata[:, names].X.sum(1)).ravel() > 0].copy()
    markers = pd.DataFrame(is_marker, index=names, columns=TYPES[:n_types])
    return adata, markers, {"delta": delta}


def make(adata, markers, *, model_class=CellAssign, setup=None, train=None, **options):
    model_class.setup_anndata(adata, **(setup or {}))
    model = model_class(adata, markers, **options)
    if train is not None:
        model.train(train)
    return model


@pytest.fixture(scope="module")
def fitted():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        adata, markers, _ = simulate(1, 300, 3, rate=-3.5)
        return make(adata, markers, setup={"batch_key": "batch"}, train=40, unassigned=True)
    finally:
        pyrocell.settings.progress = before


# --------------------------------------------------------------------------------------------- the model


def joint_by_hand(model, rows):
    """log p(z = c) + log p(x | z = c) of cells by types, in float64."""
    adata, names = model.dataset.adata, model.data.names("counts")
    state = {name: value.double().numpy() for name, value in model.module.state_dict().items()}
    x = adata[rows, names].X.toarray().astype(np.float64)
    size = np.asarray(adata.X.sum(1)).ravel()[rows]
    delta = model.get_marker_effects().to_numpy().astype(np.float64)
    is_marker = delta > 0
    base = (
        state["base.linear.bias"]
        + state["base.linear.table"][adata.obs["batch"].to_numpy().astype(int)[rows]]
    )
    log_mean = np.log(size)[:, None, None] + base[:, :, None] + delta
    mean = np.exp(log_mean)
    if model.dispersion == "gene-marker":
        theta = np.exp(np.where(is_marker, state["log_theta"][1][:, None], state["log_theta"][0][:, None]))
    else:
        centres, weights = state["centres"], np.exp(state["log_weights"])
        bumps = np.exp(
            -((np.minimum(mean, centres[-1])[..., None] - centres) ** 2)
            / (2 * (centres[1] - centres[0]) ** 2)
        )
        theta = 1e-3 + (bumps * weights).sum(-1)
    x = x[:, :, None]
    log_p = gammaln(x + theta) - gammaln(theta) - gammaln(x + 1)
    log_p = log_p + theta * np.log(theta / (theta + mean)) + x * np.log(mean / (theta + mean))
    logits = state["type_logits"]
    return log_p.sum(1) + logits - logsumexp(logits)


@pytest.mark.parametrize("dispersion", ["gene-marker", "mean"])
def test_bound_and_probabilities_are_those_of_the_sum_written_out(dispersion):
    adata, markers, _ = simulate(2, 120, 3)
    options = {"unassigned": True, "dispersion": dispersion, "setup": {"batch_key": "batch"}, "train": 5}
    model = make(adata, markers, **options)
    rows = np.arange(20)
    joint = joint_by_hand(model, rows)
    expected = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
    np.testing.assert_allclose(model.predict(indices=rows), expected, atol=2e-5)
    np.testing.assert_allclose(
        model.get_reconstruction_error(indices=rows, return_mean=False), -logsumexp(joint, axis=1), rtol=2e-5
    )
    fold, mean, sd = (np.asarray(getattr(model, name).detach()) for name in ("fold", "fold_mean", "fold_sd"))
    prior = -(((np.log(fold) - mean) / sd) ** 2) / 2 - np.log(sd) - np.log(2 * np.pi) / 2
    with model.asking():
        terms = model.elbo()(model.dataset.cells(rows))
    assert terms.kl_global.item() == pytest.approx(-prior.sum() / model.data.n_cells, rel=1e-4)
    assert terms.loss.item() == pytest.approx(
        -logsumexp(joint, axis=1).mean() - prior.sum() / model.data.n_cells, rel=1e-4
    )


def test_effects_stay_above_their_least_value(fitted):
    effects = fitted.get_marker_effects()
    assert list(effects.columns) == ["A", "B", "C", "unassigned"]
    assert (effects["unassigned"] == 0).all()
    assert (effects.to_numpy()[effects.to_numpy() > 0] >= 2).all() and (effects > 0).sum().sum() == 15
    assert fitted.get_type_proportions().sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_size_factors_means_nothing(scale):
    adata, markers, _ = simulate(3, 300, 3)
    tables = []
    for factor in (1.0, scale):
        adata.obs["size"] = adata.obs["size"].to_numpy() * factor
        tables.append(make(adata, markers, setup={"size_factor_key": "size"}, train=30).predict())
    np.testing.assert_allclose(*tables, atol=1e-3)


def test_other_genes_tell_the_size_and_nothing_else():
    """Genes in another order, and more of them where a size factor is given, change no answer."""
    adata, markers, _ = simulate(4, 150, 3)
    adata.obs["total"] = np.asarray(adata.X.sum(1)).ravel()
    plain = make(adata, markers, train=3)
    assert plain.data.names("counts") == list(markers.index)
    given = make(adata, markers, setup={"size_factor_key": "total"}, train=3)
    np.testing.assert_array_equal(plain.predict(), given.predict())
    alone = adata[:, markers.index[::-1]].copy()
    np.testing.assert_array_equal(given.predict(alone), given.predict())
    with pytest.raises(
        DataError, match=r"Without size_factor_key.*160 of the 190 features.*'other0'.*named with"
    ):
        plain.predict(alone)


# --------------------------------------------------------------------------------------------- the verbs


def test_predictions_are_named(fitted):
    table = fitted.predict()
    assert list(table.index) == list(fitted.dataset.obs_names)
    assert list(table.columns) == ["A", "B", "C", "unassigned"]
    np.testing.assert_allclose(table.sum(1), 1, atol=1e-5)
    labels = fitted.predict(soft=False)
    assert (labels == table.idxmax(axis=1)).all() and labels.name == "cell_type"
    sure = fitted.predict(soft=False, min_probability=0.99)
    unsure = table.max(axis=1) < 0.99
    assert unsure.any() and (sure[unsure] == "unassigned").all() and (sure[~unsure] == labels[~unsure]).all()
    some = fitted.predict(indices=[7, 2], batch_size=1)
    pd.testing.assert_frame_equal(some, table.iloc[[7, 2]], atol=1e-6)


def test_draws_of_types_are_those_of_the_probabilities(fitted):
    table = fitted.predict().to_numpy()
    doubtful = np.flatnonzero(table.max(1) < 0.9)[:5]
    assert len(doubtful)
    z = fitted.posterior("z", indices=doubtful, n_samples=2000, return_mean=False)
    drawn = np.stack([(z == c).mean(0) for c in range(4)], axis=1)
    np.testing.assert_allclose(drawn, table[doubtful], atol=0.05)


def test_the_batch_is_corrected_for(fitted):
    mu = {b: fitted.posterior("mu", given={"batch": b}, n_samples=1, seed=0) for b in ("0", "1")}
    effect = fitted.base.linear.table.detach().numpy()
    np.testing.assert_allclose(
        np.log(mu["1"] / mu["0"]), np.broadcast_to(effect[1] - effect[0], mu["0"].shape), atol=1e-4
    )


def test_a_query_with_a_new_batch(fitted):
    query = simulate(1, 300, 3, rate=-3.5)[0]
    query.obs["batch"] = np.where(query.obs["batch"] == "1", "new", "0")
    mapped = CellAssign.load_query_data(query, fitted)
    counts = query.X.toarray()
    counts[np.asarray(query.obs["batch"] == "new")] *= (
        2  # also of other genes: only the ratio to the size matters
    )
    counts[np.asarray(query.obs["batch"] == "new"), :3] *= 4
    query.X = sparse.csr_matrix(counts)
    mapped = CellAssign.load_query_data(query, fitted)
    mapped.train(200)
    known = query.obs["batch"].to_numpy() == "0"
    np.testing.assert_array_equal(mapped.predict()[known], fitted.predict()[known])
    effect = mapped.base.linear.table.detach().numpy()
    shift = effect[-1] - effect[:-1].mean(0)
    assert shift[:3].min() > shift[3:].max()  # what the new batch has more of


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_probability": 0.9}, "min_probability is 0.9 with soft=True"),
        ({"min_probability": 2, "soft": False}, "is 2"),
    ],
    ids=str,
)
def test_impossible_questions_are_named(fitted, options, said):
    with pytest.raises(QueryError, match=said):
        fitted.predict(**options)


def test_untrained_models_predict_nothing():
    adata, markers, _ = simulate(0, 60, 3)
    model = make(adata, markers)
    for verb in ("predict", "get_marker_effects", "get_type_proportions"):
        with pytest.raises(NotTrainedError):
            getattr(model, verb)()


# --------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            lambda m: m.rename(index={"marker3": "Marker3"}),
            DataError,
            r"1 of the 30 .*'Marker3'.*Leave them out.*Did you mean 'marker3'",
        ),
        (lambda m: m.rename(index="ENSG{}".format), DataError, r"None of them is there.*symbols, Ensembl"),
        (lambda m: m.assign(F=0), SetupError, r"no marker of the types 'F'.*at least one.*unassigned=True"),
        (lambda m: m.assign(F=m["A"]), SetupError, r"the types 'A', 'F' the same markers.*join them"),
        (lambda m: m.assign(unassigned=1), SetupError, r"a type 'unassigned', the name of cells of no type"),
        (lambda m: m * 0.5, SetupError, r"has 0\.5; expected a DataFrame"),
        (lambda m: m.where(m > 0), SetupError, r"has .*nan; expected"),
        (lambda m: m.iloc[:, :0], SetupError, r"the shape \(30, 0\); expected"),
        (lambda m: pd.concat([m, m.iloc[:2]]), SetupError, r"a gene more than once: 'marker0', 'marker1'"),
        (lambda m: m.set_axis(["A", "B", "A"], axis=1), SetupError, r"a cell type more than once: 'A'"),
        (lambda m: m.to_numpy(), SetupError, r"is a ndarray; expected a DataFrame"),
    ],
)
def test_impossible_tables_of_markers_are_named(change, error, said):
    adata, markers, _ = simulate(0, 60, 3)
    with pytest.raises(error, match=said):
        make(adata, change(markers))


def test_a_cell_without_any_marker_is_named():
    adata, markers, _ = simulate(0, 60, 3)
    counts = adata.X.toarray()
    counts[[4, 9], : len(markers)] = 0
    adata.X = sparse.csr_matrix(counts)
    with pytest.raises(
        DataError, match=r"2 cells have no counts over the 30 features.*'cell4', 'cell9'.*Remove"
    ):
        make(adata, markers)


def test_markers_that_are_never_counted():
    adata, markers, _ = simulate(0, 60, 3)
    counts = adata.X.toarray()
    counts[:, 0] = 0
    adata.X = sparse.csr_matrix(counts)
    with pytest.warns(PyrocellWarning, match="1 of 30 markers have no count in any cell: 'marker0'"):
        model = make(adata, markers, train=2)
    assert np.isfinite(model.predict()).all(axis=None)
    counts[:, :N_MARKERS] = 0
    counts[:, N_MARKERS] += 1
    adata.X = sparse.csr_matrix(counts)
    with pytest.raises(DataError, match="No marker of 'A' has a count in any cell.*'marker0'"):
        make(adata, markers)


def test_a_total_over_markers_alone_is_no_size():
    adata, markers, _ = simulate(0, 60, 3)
    alone = adata[:, markers.index].copy()
    with pytest.raises(SetupError, match=r"no other genes than the 30 markers.*size_factor_key="):
        make(alone, markers)
    make(alone, markers, setup={"size_factor_key": "size"})


def test_other_genes_are_checked_where_they_tell_the_size():
    adata, markers, _ = simulate(0, 60, 3)
    adata.X = adata.X.toarray()
    adata.X[3, -1] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinite.*'cell3'.*'other159'"):
        make(adata, markers)
    make(adata, markers, setup={"size_factor_key": "size"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_log_fold": -1.0}, "min_log_fold is -1.0"),
        ({"min_log_fold": float("nan")}, "min_log_fold is nan"),
        ({"dispersion": "gene"}, "dispersion is 'gene'"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options, said):
    adata, markers, _ = simulate(0, 60, 3)
    with pytest.raises(SetupError, match=said):
        make(adata, markers, **options)


def test_extreme_counts_stay_finite():
    adata, markers, _ = simulate(0, 100, 3)
    adata.X = adata.X.toarray()
    adata.X[0, 0], adata.X[1, 1] = 1e6, 3e5
    for dispersion in ("gene-marker", "mean"):
        model = make(adata, markers, train=5, dispersion=dispersion)
        assert model.history["skipped_steps"].sum() == 0
        assert np.isfinite(model.predict()).all(axis=None)


# ------------------------------------------------------------------------------------------- the recovery


GATES = {"accuracy": 0.95, "delta": 0.7, "proportions": -0.05, "recall of no type": 0.8}


def recovery(model_class=CellAssign, seed=0, **options):
    adata, markers, truth = simulate(seed)
    pyrocell.settings.seed = seed
    model = make(adata, markers, model_class=model_class, train=150, unassigned=True, **options)
    label = adata.obs["type"]
    hit = (model.predict(soft=False) == label).to_numpy()
    share = label.iloc[model.train_indices].value_counts(normalize=True)
    marked = truth["delta"] > 0
    effects = model.get_marker_effects()[TYPES].to_numpy()
    with np.errstate(invalid="ignore"):  # of effects that a defect puts elsewhere: all are 0 here
        correlation = np.corrcoef(effects[marked], truth["delta"][marked])[0, 1]
    return {
        "accuracy": hit.mean(),
        "delta": correlation,
        "proportions": -(model.get_type_proportions() - share).abs().sum(),
        "recall of no type": hit[(label == "unassigned").to_numpy()].mean(),
    }


def failures(found):
    return {name for name, least in GATES.items() if not found[name] >= least}


@pytest.mark.slow
@pytest.mark.parametrize("dispersion", ["gene-marker", "mean"])
def test_recovers_what_was_simulated(dispersion):
    found = recovery(dispersion=dispersion)
    assert not failures(found), found


@pytest.mark.slow
def test_a_shift_of_a_batch_costs_nothing():
    adata, markers, _ = simulate(0, shift=1.0)
    adata.obs["even"] = 1.0  # sizes that know nothing of the shift
    setup = {"batch_key": "batch", "size_factor_key": "even"}
    model = make(adata, markers, setup=setup, train=150, unassigned=True)
    assert (model.predict(soft=False) == adata.obs["type"]).mean() >= 0.93
    effect = model.base.linear.table.detach().numpy()
    assert (effect[1] - effect[0]).mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
def test_full_batches_only_go_down():
    adata, markers, _ = simulate(0, 400)
    CellAssign.setup_anndata(adata)
    model = CellAssign(adata, markers)
    model.train(60, lr=3e-3, batch_size=400, train_size=1.0)
    assert (np.diff(model.history["elbo_train"]) < 0).all()


@pytest.mark.slow
def test_sorted_blood_cells():
    """Four sorted types, known from surface proteins; the plain mean of each type's markers is the one to beat."""
    lists = json.loads(real_data("cellassign_tme_markers.json").read_text())["symbol"]
    adata = anndata.read_h5ad(real_data("pbmc_facs_sorted_zheng.h5ad"))
    names = {"B": "B cells", "T": "T cells", "CTL": "Cytotoxic T cells", "mono": "Monocyte/Macrophage"}
    genes = [
        g for g in dict.fromkeys(g for name in names.values() for g in lists[name]) if g in adata.var_names
    ]
    markers = pd.DataFrame(
        {t: [int(g in lists[name]) for g in genes] for t, name in names.items()}, index=genes
    )
    sorted_as = dict.fromkeys(["memoryt", "regulatoryt", "thelper", "naivet"], "T")
    sorted_as |= {"bcells": "B", "monocytes": "mono", "cytotoxict": "CTL", "naivecytotoxic": "CTL"}
    adata.obs["type"] = adata.obs["cell_type"].astype(str).map(sorted_as)
    counted = np.asarray(adata[:, genes].X.sum(1)).ravel() > 0
    adata = adata[counted & adata.obs["type"].notna().to_numpy()].copy()
    truth = markers.columns.get_indexer(adata.obs["type"])
    plain = (adata[:, genes].X @ markers.to_numpy()) / markers.sum().to_numpy()
    table = make(adata, markers, train=400).predict().to_numpy()
    accuracy = (table.argmax(1) == truth).mean()
    assert accuracy >= 0.9 > 0.85 > (plain.argmax(1) == truth).mean()
    assert calibration_error(table, truth) <= 0.07


class MarkersOfTheNext(CellAssign):
    """Defect: each type is given the markers of the next."""

    def __init__(self, adata, cell_type_markers, *, unassigned=False):
        super().__init__(adata, cell_type_markers, unassigned=unassigned)
        types = len(TYPES)
        self.is_marker[:types] = self.is_marker[:types].roll(1, 0).clone()
        self.marker_at = self.is_marker.flatten().nonzero()[:, 0]


class EverythingMarksNothing(CellAssign):
    """Defect: the type without markers has them all."""

    def __init__(self, adata, cell_type_markers, *, unassigned=False):
        super().__init__(adata, cell_type_markers, unassigned=unassigned)
        self.is_marker[-1] = True
        self.marker_at = self.is_marker.flatten().nonzero()[:, 0]
        self.fold = PyroParam(torch.full((int(self.is_marker.sum()),), 3.0), constraints.greater_than(2.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "broken"),
    [(MarkersOfTheNext, "accuracy"), (EverythingMarksNothing, "recall of no type")],
    ids=["markers", "no type"],
)
def test_the_recovery_fails_on_a_defect(defect, broken):
    found = recovery(defect)
    assert broken in failures(found), found
