"""Files of every version that was ever released load, and the models in them answer as they did."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

import pyrocell
from pyrocell import files
from pyrocell.testing.asking import state_of
from tests.golden import make
from tests.models.test_roles import public_models

# What is promised. Measured between torch 2.5 with NumPy 1.26 and torch 2.13 with NumPy 2.4: at most 5e-8.
TOLERANCE = 1e-5
FOLDERS = sorted(path.parent for path in make.HERE.glob("*/*/model.json"))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def name_of(folder):
    return f"{folder.parent.name}-{folder.name}"


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_golden_file_gives_the_answers_of_its_day(folder):
    case = make.case_of(folder.name)
    model = case.model_class.load(folder, case.data())
    wanted = load_file(folder / make.ANSWERS)
    found = make.answers(folder.name, model)
    assert found.keys() >= wanted.keys() and "loss" in wanted
    for name, value in wanted.items():
        assert value.shape == found[name].shape and value.isfinite().all()
        np.testing.assert_allclose(
            found[name], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"{folder}: {name}"
        )


def test_every_public_model_has_a_golden_file_of_this_version():
    names = {folder.name for folder in FOLDERS if folder.parent.name == pyrocell.__version__}
    assert names == {model.__name__ for model in public_models()} == set(make.CASES)


def test_the_versions_of_the_format_are_all_there():
    versions = {files._read_json(folder / "model.json")["format_version"] for folder in FOLDERS}
    assert versions == set(range(1, files.FORMAT_VERSION + 1))


def test_golden_files_stay_small():
    paths = [path for path in make.HERE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) < 500_000


def test_answers_depend_on_the_parameters(tmp_path):
    """The comparison above sees a parameter that was read wrongly."""
    shutil.copytree(make.HERE / pyrocell.__version__ / "SCVI", tmp_path / "SCVI")
    tensors, record = files.read_folder(tmp_path / "SCVI", "model")
    name = next(name for name in tensors if name.startswith("module.") and name.endswith("weight"))
    tensors[name] = tensors[name] * 1.01
    files.write_folder(tmp_path / "SCVI", "model", tensors, record)
    case = make.case_of("SCVI")
    found = make.answers("SCVI", case.model_class.load(tmp_path / "SCVI", case.data()))
    wanted = load_file(tmp_path / "SCVI" / make.ANSWERS)
    assert not np.allclose(found["loss"], wanted["loss"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.parent.name == "format1"], ids=name_of)
def test_a_file_of_the_first_format_becomes_one_of_the_present(folder, tmp_path):
    case = make.case_of(folder.name)
    model = case.model_class.load(folder, case.data())
    assert model.manifest()["trainings"] == [] and model.manifest()["versions"]["pyrocell"]
    model.save(tmp_path)
    assert files._read_json(tmp_path / "model.json")["format_version"] == files.FORMAT_VERSION
    again = case.model_class.load(tmp_path, case.data())
    assert all(np.array_equal(value, state_of(again)[name]) for name, value in state_of(model).items())
