"""The folder format: what goes in comes out, and nothing else is read."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
import torch

from pyrocell import files
from pyrocell.errors import LoadError, list_some


@pytest.fixture
def folder(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(2.5)}
    files.write_folder(tmp_path / "saved", "model", tensors, {"kind": "model", "x": [1, None, 0.1]})
    return tmp_path / "saved", tensors


def test_round_trip(folder):
    where, tensors = folder
    read, record = files.read_folder(where, "model")
    assert record["x"] == [1, None, 0.1] and record["format_version"] == files.FORMAT_VERSION
    assert all(
        torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items()
    )
    assert sorted(p.name for p in where.iterdir()) == ["model.json", "model.safetensors"]


def test_views_and_shared_storage_are_written(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    files.write_folder(tmp_path, "model", {"t": x.T, "row": x[1]}, {})
    read, _ = files.read_folder(tmp_path, "model")
    assert torch.equal(read["t"], x.T) and torch.equal(read["row"], x[1])


def reseal(where):
    """Make the record fit the tensors that lie beside it, as whoever means harm would."""
    data = (where / "model.safetensors").read_bytes()
    record = json.loads((where / "model.json").read_text())
    record |= {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (where / "model.json").write_text(json.dumps(files.sealed(record)))


@pytest.mark.parametrize("keep", [0, 5, 40, 100])
def test_truncated_tensors(folder, keep):
    where, _ = folder
    path = where / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError, match="truncated"):
        files.read_folder(where, "model")


def test_damaged_tensors_of_the_right_size(folder):
    where, _ = folder
    path = where / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(LoadError, match="has changed since it was written"):
        files.read_folder(where, "model")
    reseal(where)
    with pytest.raises(LoadError, match="not a readable safetensors"):
        files.read_folder(where, "model")


def test_pickle_in_place_of_tensors_is_not_executed(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    where, _ = folder
    (where / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    reseal(where)
    with pytest.raises(LoadError, match="not a readable safetensors"):
        files.read_folder(where, "model")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "no format version"),
        ('{"format_version": 99, "versions": {"pyrocell": "9.9"}}', "version 99.*written by 9.9"),
        ('{"format_version": "1"}', "no format version"),
    ],
)
def test_foreign_or_newer_record(folder, text, match):
    where, _ = folder
    (where / "model.json").write_text(text)
    with pytest.raises(LoadError, match=match):
        files.read_folder(where, "model")


def test_missing_parts_are_named(folder, tmp_path):
    where, _ = folder
    with pytest.raises(LoadError, match="no such folder"):
        files.read_folder(tmp_path / "nowhere", "model")
    (where / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors is missing"):
        files.read_folder(where, "model")


def test_list_some_counts_the_rest():
    assert list_some("abc") == "'a', 'b', 'c'"
    assert list_some(range(8)) == "0, 1, 2, 3, 4 and 3 more"
