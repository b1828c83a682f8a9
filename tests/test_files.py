"""The folder format: what goes in comes out, and nothing else is read."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pyrocell import files
from pyrocell.errors import LoadError, SaveError, list_some


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


# ------------------------------------------------------------------------------------------------ all or nothing


class Killed(BaseException):
    """Stands for a kill: nothing that catches errors of the disk catches it."""


def old_and_new(where, beside=True):
    def write(value):
        others = {"more.txt": lambda path: path.write_text(str(value))} if beside else {}
        files.write_folder(
            where, "model", {"a": torch.full((50,), float(value))}, {"value": value}, beside=others
        )

    return write


def what_is_read(where, beside=True):
    tensors, record = files.read_folder(where, "model")
    assert (tensors["a"] == record["value"]).all(), "halves of two saves"
    if beside:
        assert files.beside_path(where, record, "more.txt").read_text() == str(record["value"])
    return record["value"]


# Everything that writing asks of the system, in order; each may be the last thing that happens.
CALLS = ("fsync", "replace")


def watch(monkeypatch, before):
    """Have something done before each call to the system."""

    def watched(name, real):
        def call(*args):
            before(name)
            return real(*args)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))


def stop_at(monkeypatch, n, error):
    """Let the n-th call to the system fail, and tear the file that is being written then."""
    left = iter(range(n, -(10**6), -1))

    def fails(name):
        if next(left) == 0:
            raise error

    watch(monkeypatch, fails)
    write = files._write

    def torn(path, content):
        if next(left) == 0:
            path.write_bytes(content[: len(content) // 2])
            raise error
        write(path, content)

    monkeypatch.setattr(files, "_write", torn)


def n_calls(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        watch(patch, seen.append)
        old_and_new(tmp_path / "counted")(1)
    return len(seen) + 2  # and the two files that may be torn


@pytest.mark.parametrize("first", [False, True])
def test_wherever_writing_is_cut_off_one_save_is_whole(tmp_path, first):
    calls, read = n_calls(tmp_path), []
    for n in range(calls):
        write = old_and_new(tmp_path / f"{n}")
        if not first:
            write(1)
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, n, Killed())
            with pytest.raises(Killed):
                write(2)
        try:
            read.append(what_is_read(tmp_path / f"{n}"))
        except LoadError:
            read.append(None)  # as it may be where there was nothing before: see below
        write(3)  # and the next save finds its way
        assert what_is_read(tmp_path / f"{n}") == 3
        assert sorted(p.name for p in (tmp_path / f"{n}").iterdir()) == [
            "model.json", "model.safetensors", "more.txt",
        ]  # fmt: skip
    old = None if first else 1
    assert read == sorted(read, key=lambda value: value == 2), "old, old, ..., new, new"
    assert set(read) == {old, 2} and calls > 9


def test_a_save_that_was_cut_off_is_not_lost_by_the_next_that_is(tmp_path):
    """The first is cut off between its renames, the second before them."""
    write = old_and_new(tmp_path)
    write(1)
    for value, fails in ((2, "replace"), (3, "fsync")):
        with pytest.MonkeyPatch.context() as patch:
            seen = []

            def second(name, fails=fails, seen=seen):
                seen.append(name)
                if seen.count(fails) == 2:
                    raise Killed

            watch(patch, second)
            with pytest.raises(Killed):
                write(value)
        assert what_is_read(tmp_path) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_keeps_the_last_good_files(tmp_path, number):
    write = old_and_new(tmp_path)
    write(1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for n in range(6):  # up to the first rename
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, n, OSError(number, os.strerror(number)))
            with pytest.raises(
                SaveError, match=rf"model.safetensors could not be.*{os.strerror(number)}.*Make room"
            ):
                write(2)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert what_is_read(tmp_path) == 1


@pytest.mark.skipif(
    not hasattr(__import__("signal"), "SIGXFSZ"), reason="this system has no limit of file sizes"
)
def test_a_file_that_the_system_cuts_off(tmp_path):
    """No monkey patches: the kernel itself refuses to write on."""
    import resource

    write = old_and_new(tmp_path)
    write(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(SaveError, match="File too large"):
            write(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert what_is_read(tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="Not a directory|exists"):
        files.write_folder(tmp_path / "file" / "x", "model", {}, {})


def test_links_lead_nobody_out_of_the_folder(tmp_path):
    where, outside = tmp_path / "saved", tmp_path / "outside"
    where.mkdir()
    outside.write_text("mine")
    for name in (".model.json.new", ".model.safetensors.new", "model.json", "model.safetensors"):
        (where / name).symlink_to(outside)
    files.write_folder(where, "model", {"a": torch.zeros(1)}, {"x": 1})
    assert outside.read_text() == "mine" and files.read_folder(where, "model")[1]["x"] == 1


def test_names_of_a_hostile_record_lead_nobody_out_of_the_folder(tmp_path):
    """The record of a save that seems to be cut off tells which files to put in place."""
    where = tmp_path / "saved"
    files.write_folder(where, "model", {"a": torch.zeros(1)}, {"x": 1})
    record = json.loads((where / "model.json").read_text())
    (where / "...").mkdir()
    (where / "x.new").write_text("theirs")
    (tmp_path / "x").write_text("mine")
    record["beside"] = {"../../x": "0", "../x": "0", str(tmp_path / "x"): "0"}
    (where / ".model.json.new").write_text(json.dumps(files.sealed(record)))
    (where / "model.json").unlink()
    files.write_folder(where, "model", {"a": torch.zeros(1)}, {"x": 2})
    assert (tmp_path / "x").read_text() == "mine" and files.read_folder(where, "model")[1]["x"] == 2


# ------------------------------------------------------------------------------------------------ seals


def test_a_record_that_was_changed_is_noticed(folder):
    where, _ = folder
    text = (where / "model.json").read_text()
    (where / "model.json").write_text(text.replace("0.1", "0.2"))
    with pytest.raises(LoadError, match="has changed since it was written"):
        files.read_folder(where, "model")
    (where / "model.json").write_text(json.dumps(json.loads(text)))  # the same, with other spaces
    assert files.read_folder(where, "model")[1]["x"] == [1, None, 0.1]


def test_a_further_file_that_was_changed_is_noticed(tmp_path):
    old_and_new(tmp_path)(1)
    _, record = files.read_folder(tmp_path, "model")
    (tmp_path / "more.txt").write_text("2")
    with pytest.raises(LoadError, match=r"more\.txt is missing, was truncated, or has changed"):
        files.beside_path(tmp_path, record, "more.txt")


def test_files_of_the_first_version_are_read(folder):
    """They have no checksums; what they had is checked."""
    where, tensors = folder
    record = json.loads((where / "model.json").read_text())
    for name in ("sha256", "beside", "checksum"):
        del record[name]
    (where / "model.json").write_text(json.dumps(record | {"format_version": 1}))
    read, found = files.read_folder(where, "model")
    assert found["x"] == [1, None, 0.1] and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert files.beside_path(where, found, "adata.h5ad") == where / "adata.h5ad"
    (where / "model.json").write_text(json.dumps(record | {"format_version": 2}))
    with pytest.raises(LoadError, match="has changed"):
        files.read_folder(where, "model")


# ------------------------------------------------------------------------------------------------ two writers


def _write_often(where, value, n):
    for _ in range(n):
        files.write_folder(where, "model", {"x": torch.full((2000,), value)}, {"value": value})


@pytest.mark.skipif(importlib.util.find_spec("fcntl") is None, reason="this system has no locks of files")
def test_two_writers_of_one_folder_leave_a_whole_save(tmp_path, monkeypatch):
    """Each of them stops in the middle of its writing, so that without a lock the other one's files come between."""
    plain = files._write

    def slow(path, content):
        plain(path, content)
        time.sleep(0.01)

    monkeypatch.setattr(files, "_write", slow)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(_write_often, tmp_path, float(value), 8) for value in range(2)]:
            done.result()
    tensors, record = files.read_folder(tmp_path, "model")
    assert (tensors["x"] == record["value"]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_failure_after_the_first_rename_says_that_the_new_save_is_there(tmp_path, monkeypatch):
    _write_often(tmp_path, 1.0, 1)
    plain, n = os.replace, iter(range(10))

    def fails(source, target):
        if next(n) == 1:
            raise OSError(errno.EIO, "Input/output error")
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(SaveError, match="All of it is on the disk all the same") as caught:
            _write_often(tmp_path, 2.0, 1)
    assert "untouched" not in str(caught.value)
    assert files.read_folder(tmp_path, "model")[1]["value"] == 2.0
