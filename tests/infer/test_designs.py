"""Designs over replicates: what a formula reads, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pyrocell.errors import QueryError
from pyrocell.infer.comparison import compare_groups
from pyrocell.infer.designs import Design, design_of, unit_covariates
from pyrocell.infer.population_plan import plan_population
from tests.infer.test_population import Study

AGES = [31.0, 58.0, 44.0, 67.0, 25.0, 39.0, 52.0, 70.0]
SEXES = list("FMFMFFMM")


def cells(**columns):
    """Eight donors of five cells, four in each group; columns are given by donor."""
    table = {"group": list("AAAABBBB"), "donor": [f"d{i}" for i in range(8)], "age": AGES, "sex": SEXES}
    return pd.DataFrame(table | columns).loc[np.repeat(np.arange(8), 5)].reset_index(drop=True)


def ask(formula, obs=None, coefficient=None):
    """Covariates and design of A against B, whichever way round the contrast has them."""
    obs = cells() if obs is None else obs
    comparisons = compare_groups(obs["group"], group1="A", group2="B")
    plan = plan_population(comparisons, samples=obs["donor"], cells_per_stratum=100)
    [contrast] = plan.contrasts
    strata = [plan.rows[plan.codes == stratum] for stratum in range(plan.n_strata)]
    covariates = unit_covariates(contrast, formula, obs, stratum_cells=strata, group_key="group")
    design = design_of(
        contrast,
        paired=None,
        formula=formula,
        coefficient=coefficient,
        covariates=covariates,
        keys=("group", "donor"),
    )
    assert isinstance(design, Design)
    return contrast, covariates, design


@pytest.mark.parametrize(
    "formula",
    [
        "~ group + scale(age)",
        "~ group + center(age)",
        "~ group + poly(age, 2)",
        "~ group + bs(age, df=3)",
        "~ group + scale(np.log(`age in years`))",
        "~ group + center(age):sex",
    ],
)
def test_transforms_with_a_memory_read_their_columns(formula):
    obs = cells(**{"age in years": AGES})
    contrast, covariates, design = ask(formula, obs)
    read = "age in years" if "years" in formula else "age"
    order = [int(unit.sample[1:]) for unit in contrast.units]
    np.testing.assert_array_equal(covariates[read], np.asarray(AGES)[order])
    assert design.matrix.shape[0] == 8 and np.linalg.matrix_rank(design.matrix) == design.matrix.shape[1]
    # the memory is that of all replicates, so the group's own column alone differs between the groups
    assert np.abs(design.contrast).sum() == pytest.approx(1.0)


def test_a_scaled_covariate_is_scaled():
    contrast, _, design = ask("~ group + scale(age)")
    age = np.asarray(AGES)[[int(unit.sample[1:]) for unit in contrast.units]]
    np.testing.assert_allclose(design.matrix[:, -1], (age - age.mean()) / age.std(ddof=1))


def test_a_column_named_as_a_transform_is_not_read():
    ask("~ group + scale(age)", cells().assign(scale=np.arange(40)))


def test_the_first_category_is_the_reference():
    obs = cells()
    obs["sex"] = pd.Categorical(obs["sex"], categories=["X", "M", "F"])
    obs["group"] = pd.Categorical(obs["group"], categories=["B", "A"])
    _, covariates, design = ask("~ group + sex", obs, coefficient="sex[T.F]")
    assert list(covariates["sex"].cat.categories) == ["M", "F"]  # a category without replicates is none
    np.testing.assert_array_equal(design.matrix[:, -1], covariates["sex"] == "F")
    ask("~ group + sex", obs, coefficient="group[T.A]")
    with pytest.raises(QueryError, match=r"no coefficient 'sex\[T.M\]'"):
        ask("~ group + sex", obs, coefficient="sex[T.M]")


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        ("sex ~ group", "has a left-hand side, or several parts"),
        ("~ group | sex", "has a left-hand side, or several parts"),
        ("~ group + scale(years)", r"cannot be computed.*'years' is not defined"),
        ("~ group + sort_of(age)", "reads 'sort_of', which adata.obs does not have"),
        ("~ group + C(sex, Treatment('X'))", "cannot be computed.*'X'"),
        ("~ group + lag(age)", "cannot be computed.*null"),
        ("~ group + np.log(age - 25)", r"not finite in 'np.log\(age - 25\)'"),
        ("~ group + years", "reads 'years', which adata.obs does not have"),
        ("~ group + .", "is no formula"),
        ("~ scale(", "is no formula"),
    ],
)
def test_formulas_that_make_no_sense(formula, said):
    with pytest.raises(QueryError, match=said):
        ask(formula)


def test_a_contrast_is_named_and_says_nothing_of_the_groups():
    study = Study(n_genes=30)
    table = study.table(sample_key="unit", design="~ group + sex", contrast="sex[T.M]")
    assert (table["contrast"] == "sex[T.M]").all() and (table["group1"] == "A").all()
    assert table[["lfc_model", "lfc_raw", "lfc_pseudobulk"]].isna().all(axis=None)
    assert table[["lfc_mean", "scale1", "scale2"]].notna().all(axis=None)
    plain = study.table(sample_key="unit", design="~ group + sex")
    assert "contrast" not in plain and plain[["lfc_model", "lfc_raw"]].notna().all(axis=None)
