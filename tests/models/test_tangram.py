"""Tangram: its loss, its modes, its verbs, what it refuses, and what it recovers."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.metrics import roc_auc_score

import pyrocell
from pyrocell import Tangram, TangramWeights, TrainingPlan
from pyrocell.errors import DataError, NotTrainedError, QueryError, SetupError, TrainingError
from pyrocell.nn.assignment import assign

SIDE, N_GENES = 10, 150


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def simulate(seed=0, side=SIDE, n_genes=N_GENES, per_spot=4, n_decoys=0, depth=6.0):
    """Cells of a grid of spots with smooth genes; decoys have genes in combinations that no place has."""
    draw = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2)
    centres, widths = draw.uniform(0, side, (n_genes, 3, 2)), draw.uniform(1.0, 2.5, (n_genes, 3))
    away = ((places[:, None, None] - centres) ** 2).sum(-1)
    pattern = np.exp(-away / (2 * widths**2)).sum(-1) + 0.02
    home = np.repeat(np.arange(side**2), per_spot)
    rates = depth * pattern[home] * draw.lognormal(0, 0.2, (len(home), 1))
    counts = draw.poisson(rates)
    spots = np.add.reduceat(counts, np.arange(0, len(home), per_spot)) + draw.poisson(0.1, pattern.shape)
    decoys = np.stack([draw.permuted(counts[:, g]) for g in range(n_genes)], 1)[:n_decoys]
    adata = anndata.AnnData(sparse.csr_matrix(np.vstack([counts, decoys]).astype(np.float32)))
    adata.obs_names = [f"cell{i}" for i in range(len(home) + n_decoys)]
    adata.var_names = [f"gene{g}" for g in range(n_genes)]
    adata.obs["label"] = [f"part{3 * (v % side) // side}{2 * (v // side) // side}" for v in home] + [
        "decoy"
    ] * n_decoys
    table = pd.DataFrame(spots.astype(np.float32), columns=adata.var_names).rename("spot{}".format)
    return adata, table, {"home": home, "places": places}


def small(**options):
    return simulate(side=4, n_genes=30, per_spot=3, **options)[:2]


def make(adata=None, spots=None, *, model_class=Tangram, epochs=0, **options):
    one, two = small()
    adata, spots = one if adata is None else adata, two if spots is None else spots
    model_class.setup_anndata(adata, labels_key="label")
    model = model_class(adata, spots, **options)
    if epochs:
        model.train(epochs)
    return model


@pytest.fixture(scope="module")
def fitted():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        return make(epochs=60)
    finally:
        pyrocell.settings.progress = before


# --------------------------------------------------------------------------------------------- the loss


def cosine(one, two, axis):
    return (one * two).sum(axis) / (np.linalg.norm(one, axis=axis) * np.linalg.norm(two, axis=axis))


def loss_by_hand(model, weights, target_count):
    """Compute the loss in float64 from the formula alone."""
    u = model.mapping_logits.detach().numpy().astype(np.float64)
    x = model.dataset.adata.X.toarray().astype(np.float64)
    a = x / x.sum(1, keepdims=True) * x.sum(1).mean()
    f = np.ones(len(a))
    if model.mode == "constrained":
        f = 1 / (1 + np.exp(-model.filter_logits.detach().numpy().astype(np.float64)))
    if model.mode == "clusters":
        labels = model.dataset.adata.obs["label"].astype("category").cat.codes.to_numpy()
        f = np.bincount(labels).astype(np.float64)
        a = np.stack([a[labels == k].mean(0) for k in range(len(f))])
    y = model.constructor["spatial"].to_numpy().astype(np.float64)
    m = np.exp(u - u.max(1, keepdims=True))
    m /= m.sum(1, keepdims=True)
    yhat, dhat, d = (f[:, None] * m).T @ a, f @ m / f.sum(), y.sum(1) / y.sum()
    loss = -weights.lambda_g1 * cosine(y, yhat, 0).mean() - weights.lambda_g2 * cosine(y, yhat, 1).mean()
    loss += weights.lambda_d * (d * np.log(d / dhat)).sum() - weights.lambda_r * (m * np.log(m)).sum()
    if model.mode == "constrained":
        loss += weights.lambda_count * abs(f.sum() - target_count)
        loss += weights.lambda_f_reg * (f * (1 - f)).sum()
    return loss


@pytest.mark.parametrize("mode", ["cells", "constrained", "clusters"])
@pytest.mark.parametrize(
    "weights", [TangramWeights(), TangramWeights(2.0, 0.7, 0.3, 0.02, 0.5, 3.0)], ids=["default", "all"]
)
def test_the_loss_is_its_formula(mode, weights):
    target = 20 if mode == "constrained" else None
    model = make(mode=mode, weights=weights, target_count=target)
    with model.running(), torch.no_grad():
        terms = model.elbo()(next(model.dataset.minibatches(None, model.dataset.n_cells)))
    assert terms.loss.item() == pytest.approx(loss_by_hand(model, weights, target), rel=1e-5)
    assert terms.elbo.item() == pytest.approx(terms.loss.item(), rel=1e-6)


@pytest.mark.parametrize("block_size", [1, 7, 16, 100, None])
@pytest.mark.parametrize("rows", [None, "permuted"])
def test_blocks_change_neither_sums_nor_gradients(block_size, rows):
    draw = torch.Generator().manual_seed(0)
    n, m, k = 23, 5, 4
    u, w = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((n, m), (n,)))
    values, scale = torch.rand(n, k, generator=draw).double(), torch.rand(n, 1, generator=draw).double()
    order = None if rows is None else torch.randperm(n, generator=draw)
    mix, of_mass = torch.randn(m, k, generator=draw).double(), torch.randn(m, generator=draw).double()

    def plainly(u, w):
        shares = (u if order is None else u[order]).softmax(1)
        entropy = -(shares * shares.log()).sum()
        return shares.T @ (w[:, None] * values * scale), shares.T @ w, entropy

    def in_blocks(u, w):
        options = {"weights": w, "scale": scale, "rows": order, "block_size": block_size}
        return assign(u, values, with_entropy=True, **options)

    found = []
    for compute in (plainly, in_blocks):
        leaves = [u.clone().requires_grad_(), w.clone().requires_grad_()]
        got, mass, entropy = compute(*leaves)
        total = (got * mix).sin().sum() + (mass * of_mass).sum() + 0.3 * entropy
        found.append([total, *torch.autograd.grad(total, leaves)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_the_block_size_changes_results_by_rounding_alone():
    plain, blocked = make(epochs=5), make(epochs=5, block_size=7)
    np.testing.assert_allclose(plain.get_mapper_matrix(), blocked.get_mapper_matrix(), rtol=1e-3)


def test_no_matrix_of_cells_by_spots_is_made_in_a_step():
    """Beside the logits and their gradient, only blocks are allocated."""
    n, m, k, size = 2000, 300, 20, 50
    logits, values = torch.randn(n, m, requires_grad=True), torch.rand(n, k)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as seen:
        got, _, _ = assign(logits, values, weights=torch.ones(n), block_size=size)
        got.square().sum().backward()
    large = [event.cpu_memory_usage for event in seen.events() if event.cpu_memory_usage >= 4 * n * m]
    assert logits.grad is not None and set(large) == {4 * n * m}
    leaves = [event.name for event in seen.events() if event.self_cpu_memory_usage >= 4 * n * m]
    assert len(leaves) == 1, f"more than the gradient was allocated: {leaves}"


# -------------------------------------------------------------------------------------------- the verbs


def test_the_mapping_and_what_it_brings(fitted):
    mapping = fitted.get_mapper_matrix()
    adata, spots = fitted.dataset.adata, fitted.constructor["spatial"]
    assert list(mapping.index) == list(adata.obs_names) and list(mapping.columns) == list(spots.index)
    np.testing.assert_allclose(mapping.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(fitted.posterior("mapping", indices=[5, 2]), mapping.iloc[[5, 2]], rtol=1e-5)
    x = adata.X.toarray()
    scaled = x / x.sum(1, keepdims=True) * x.sum(1).mean()
    genes = fitted.project_genes()
    assert list(genes.columns) == list(adata.var_names) and list(genes.index) == list(spots.index)
    np.testing.assert_allclose(genes, mapping.to_numpy().T @ scaled, rtol=1e-4)
    few = fitted.project_genes(gene_list=["gene7", "gene3"])
    np.testing.assert_allclose(few, genes[["gene7", "gene3"]], rtol=1e-5)
    marks = pd.get_dummies(adata.obs["label"]).astype(float)
    scores = fitted.project_cell_annotations()
    np.testing.assert_allclose(scores, mapping.to_numpy().T @ marks.to_numpy(), rtol=1e-4)
    shares = fitted.project_cell_annotations("label", normalize=True)
    np.testing.assert_allclose(shares, scores.div(scores.sum(1), axis=0), rtol=1e-5)
    by_name = fitted.project_cell_annotations(adata.obs["label"].iloc[::-1])
    np.testing.assert_allclose(by_name[scores.columns], scores, rtol=1e-5)


def test_genes_that_the_spots_lack_are_projected_and_not_learned_from():
    adata, spots = small()
    spots = spots.drop(columns=["gene4", "gene11"]).assign(gene9=0.0, elsewhere=3.0)
    model = make(adata, spots, epochs=3)
    assert model.data.size("counts") == 27 and "gene9" not in model.data.names("counts")
    assert list(model.project_genes().columns) == list(adata.var_names)
    chosen = make(adata, spots, genes=[f"gene{g}" for g in range(20, 12, -1)] + ["gene1", "gene2"])
    assert chosen.data.names("counts") == ["gene1", "gene2"] + [f"gene{g}" for g in range(13, 21)]


def test_clusters_bring_sums_or_means():
    mapped = {scale: make(mode="clusters", scale_clusters=scale, epochs=20) for scale in (True, False)}
    model = mapped[True]
    adata, labels = model.dataset.adata, model.data.names("label")
    mapping = model.get_mapper_matrix()
    assert list(mapping.index) == labels and mapping.shape == (len(labels), 16)
    x = adata.X.toarray()
    scaled = x / x.sum(1, keepdims=True) * x.sum(1).mean()
    per_label = np.stack([scaled[adata.obs["label"] == name].sum(0) for name in labels])
    np.testing.assert_allclose(model.project_genes(), mapping.to_numpy().T @ per_label, rtol=1e-4)
    sizes = adata.obs["label"].value_counts()[labels].to_numpy()
    np.testing.assert_allclose(
        mapped[False].project_genes(),
        mapped[False].get_mapper_matrix().to_numpy().T @ (per_label / sizes[:, None]),
        rtol=1e-4,
    )
    assert not model.cell_parameters
    model.project_genes(adata[:9].copy())  # other cells of the same labels


def test_there_is_no_verb_of_a_likelihood(fitted):
    absent = ["get_elbo", "get_marginal_ll", "get_reconstruction_error", "posterior_predictive_check"]
    absent += ["posterior_predictive_sample", "get_likelihood_parameters", "load_query_data"]
    assert not [verb for verb in absent if hasattr(fitted, verb) or verb in dir(fitted)]


def test_saved_and_loaded(fitted, tmp_path):
    spots = fitted.constructor["spatial"].assign(gene9=0.0)
    model = make(small()[0], spots, epochs=2)
    model.save(tmp_path)
    again = Tangram.load(tmp_path)
    pd.testing.assert_frame_equal(again.get_mapper_matrix(), model.get_mapper_matrix())
    pd.testing.assert_frame_equal(again.constructor["spatial"], spots)
    pd.testing.assert_frame_equal(again.project_genes(model.dataset.adata), model.project_genes())
    with pytest.raises(QueryError, match="parameters for each cell"):
        again.project_genes(model.dataset.adata[::-1].copy())


def test_steps_do_not_shrink_with_the_gradient():
    """Gradients 10,000 times smaller, as of 10,000 times more cells x spots, lead to the same mapping."""
    factor = 1e-4
    small_weights = TangramWeights(lambda_g1=factor, lambda_d=factor)
    one, two = (make(epochs=40, weights=weights) for weights in (None, small_weights))
    start = make(epochs=1).get_mapper_matrix()
    moved = (one.get_mapper_matrix() - start).abs().to_numpy().mean()
    apart = (one.get_mapper_matrix() - two.get_mapper_matrix()).abs().to_numpy().mean()
    assert apart < 0.02 * moved, (apart, moved)


def test_training_habits():
    model = make(epochs=2)
    assert (model.history["lr"] == 0.1).all() and "elbo_validation" not in model.history
    assert len(model.train_indices) == model.dataset.n_cells and model.max_epochs_cap == 1000
    assert len(model.validation_indices) == 0


# ---------------------------------------------------------------------------------------- bad input


def at(table, spots, value):
    changed = table.copy()
    changed.loc[spots] = value
    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.rename(columns=lambda g: g if g in ("gene1", "gene2") else f"x{g}"),
            "^2 genes are shared",
        ),
        (lambda t: t.rename(columns=str.upper), "Without regard to case 30 would be"),
        (lambda t: at(t, ["spot3", "spot5"], 0.0), "2 spots have no counts.*'spot3', 'spot5'"),
        (lambda t: at(t, ["spot3"], -1.0), "30 values that are negative.*spot 'spot3'"),
        (lambda t: at(t, ["spot2"], np.nan), "30 values that are NaN or infinite.*spot 'spot2'"),
        (lambda t: at(t.astype(object), ["spot2"], "many"), "values that are no numbers"),
        (lambda t: t.set_axis(["spot"] * len(t)), "spot names occur more than once"),
        (lambda t: t.set_axis(["gene0"] * t.shape[1], axis=1), "gene names occur more than once"),
        (
            lambda t: t.assign(**dict.fromkeys(t.columns[7:], 0.0)),
            "Of 30 shared genes 7 are seen on both sides",
        ),
        (lambda t: t.assign(elsewhere=np.nan), "16 values that are NaN.*gene 'elsewhere'"),
        (lambda t: t.to_numpy(), "spatial is a ndarray; expected a DataFrame"),
        (lambda t: anndata.AnnData(t), r"spatial is a AnnData.*to_df\(\)"),
    ],
    ids=[
        "few",
        "case",
        "empty",
        "negative",
        "missing",
        "text",
        "spot twice",
        "gene twice",
        "unseen",
        "not shared",
        "array",
        "adata",
    ],
)
def test_impossible_spots_are_named(change, said):
    adata, spots = small()
    with pytest.raises((DataError, SetupError), match=said):
        make(adata, change(spots))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": np.full(16, 0.1)}, "density sums to 1.6; expected shares that sum to 1"),
        ({"density": [0.5, 0.5]}, r"density has shape \(2,\); expected one share for each of 16"),
        ({"density": np.array([1.5, -0.5] + [0.0] * 14)}, "negative or missing for the spots 'spot1'"),
        ({"density": pd.Series({"spot0": 1.0})}, "density lacks the spots 'spot1'"),
        ({"density": "by eye"}, "density is 'by eye'"),
        ({"mode": "spots"}, "mode is 'spots'"),
        ({"mode": "constrained"}, "target_count is None with mode='constrained'"),
        ({"target_count": 5}, "target_count is 5 with mode='cells'"),
        ({"mode": "constrained", "target_count": 1000}, "target_count is 1000; expected.*up to 48"),
        ({"block_size": 0}, "block_size is 0"),
        ({"genes": ["gene1", "Gfap"]}, "1 of the 2 genes.*single cells: 'Gfap'"),
        ({"genes": ["gene1", "gene2"]}, "^2 chosen genes are shared"),
        ({"weights": {"lambda_r": -1.0}}, "lambda_r is -1.0"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options, said):
    with pytest.raises((DataError, SetupError), match=said):
        make(**options)


def test_clusters_need_labels_and_cells_need_counts():
    adata, spots = small()
    Tangram.setup_anndata(adata)
    with pytest.raises(SetupError, match="mode='clusters' maps labels, and there are none"):
        Tangram(adata, spots, mode="clusters")
    adata.X = sparse.csr_matrix(np.where(np.arange(adata.n_vars) < 5, adata.X.toarray() + 1, 0))
    with pytest.raises(DataError, match="48 cells have no counts over the 25 features"):
        Tangram(adata, spots.drop(columns=[f"gene{g}" for g in range(5)]))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 10},
        {"train_size": 0.9},
        {"validation_size": 0.1},
        {"early_stopping": True},
        {"plan": TrainingPlan(train_indices=[0, 1])},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_part_of_the_cells_is_refused(options):
    model = make()
    name = next(iter(options)).replace("plan", "train_indices")
    with pytest.raises(TrainingError, match=f"{name}'.*every step sees them all"):
        model.train(1, **options)
    assert not model.is_trained


def test_questions_that_have_no_answer(fitted):
    model = make()
    for ask in (model.get_mapper_matrix, model.project_genes, model.project_cell_annotations):
        with pytest.raises(NotTrainedError):
            ask()
    with pytest.raises(QueryError, match="Gfap"):
        fitted.project_genes(gene_list=["Gfap"])
    with pytest.raises(QueryError, match="no such column.*'label'"):
        fitted.project_cell_annotations("labels")
    with pytest.raises(QueryError, match="labels has 3 entries; expected one for each of 48"):
        fitted.project_cell_annotations(["a", "b", "c"])
    named = pd.Series("a", index=fitted.cell_names).drop("cell7").rename({"cell8": "other"})
    with pytest.raises(QueryError, match="labels lacks 2 of 48 cells by name: 'cell7', 'cell8'"):
        fitted.project_cell_annotations(named)
    with pytest.raises(DataError, match="missing"):
        fitted.project_cell_annotations(pd.Series([None] + ["a"] * 47))


# ------------------------------------------------------------------------------------------- the recovery


def recovery(model_class=Tangram, epochs=300, seed=0):
    adata, spots, truth = simulate(seed)
    model_class.setup_anndata(adata)
    learned = [name for g, name in enumerate(adata.var_names) if g % 5]
    model = model_class(adata, spots, genes=learned)
    model.train(epochs)
    mapping, projected = model.get_mapper_matrix().to_numpy(), model.project_genes()
    steps = np.abs(truth["places"][mapping.argmax(1)] - truth["places"][truth["home"]]).max(1)
    held_out = [name for name in adata.var_names if name not in learned]
    y, yhat = spots[held_out].to_numpy(), projected[held_out].to_numpy()
    d, dhat = spots.to_numpy().sum(1) / spots.to_numpy().sum(), mapping.mean(0)
    return {
        "near": (steps <= 1).mean(),
        "cosine": cosine(y, yhat, 0).mean(),
        "correlation": cosine(y - y.mean(0), yhat - yhat.mean(0), 0).mean(),
        "divergence": (d * np.log(d / dhat)).sum(),
    }


def is_recovered(found):
    return (
        found["near"] >= 0.6
        and found["cosine"] >= 0.95
        and found["correlation"] >= 0.8
        and found["divergence"] <= 0.02
    )


@pytest.mark.slow
def test_recovery():
    found = recovery()
    assert is_recovered(found), found


class _SeesAnother(Tangram):
    """Hands out the counts of a cell that lies elsewhere."""

    def _hand_out(self, cells):
        return super()._hand_out(cells.replace(counts=cells.counts.roll(150, 0)))


class _RewardsDivergence(Tangram):
    """Takes the density term with the wrong sign."""

    def _terms(self, cells):
        for name, term in super()._terms(cells):
            yield name, -term if name == "density" else term


@pytest.mark.slow
@pytest.mark.parametrize("model_class", [_SeesAnother, _RewardsDivergence])
def test_defects_are_noticed(model_class):
    found = recovery(model_class)
    assert not is_recovered(found), found


@pytest.mark.slow
def test_decoys_are_filtered_out():
    adata, spots, truth = simulate(n_decoys=300)
    Tangram.setup_anndata(adata)
    n = len(truth["home"])
    model = Tangram(adata, spots, mode="constrained", target_count=n)
    model.train(300)
    used = model.posterior("weight")
    assert abs(used.sum() - n) <= 10, used.sum()
    assert roc_auc_score(np.arange(len(used)) < n, used) >= 0.9
