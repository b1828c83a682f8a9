"""Files that mean harm: each gives one named error, executes nothing, and writes nothing outside the folder."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

import pyrocell
from pyrocell import SCVI, files
from pyrocell.errors import LoadError
from tests.golden import make
from tests.models.killing import make as make_training

GOLDEN = make.HERE / pyrocell.__version__


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with its data."""
    folder = tmp_path_factory.mktemp("hostile") / "saved"
    case = make.case_of("SCVI")
    model = case.model_class.load(GOLDEN / "SCVI", case.data())
    model.save(folder, save_anndata=True)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to be spoilt, in a place where everything is watched."""
    shutil.copytree(saved, tmp_path / "place" / "saved")
    return tmp_path / "place" / "saved"


def tree(root):
    """Everything below a folder, by content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


class Watched(BaseException):
    """Something was started, unpickled or opened for writing that has no business here."""


WATCH = {"on": False}
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.spawn",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "os.remove",
)
FORBIDDEN += (
    "os.rename",
    "os.mkdir",
    "os.symlink",
    "os.truncate",
    "shutil.",
    "socket.connect",
    "ctypes.dlopen",
)


def _hook(event, args):
    if not WATCH["on"]:
        return
    written = (
        event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if event.startswith(FORBIDDEN) or (written and "__pycache__" not in str(args[0])):
        raise Watched(event, args)


sys.addaudithook(_hook)


@contextlib.contextmanager
def watched():
    """Let Python itself tell of whatever it starts, unpickles or writes."""
    WATCH["on"] = True
    try:
        yield
    finally:
        WATCH["on"] = False


def refused(folder, model_class=SCVI, match=None):
    """Load, and see that there is one named error and that nothing has changed anywhere near."""
    root = folder.parent
    before, here = tree(root), sorted(os.listdir())
    with pytest.raises(LoadError, match=match) as caught, watched():
        model_class.load(folder)
    assert type(caught.value) is LoadError and len(str(caught.value)) > 40
    assert tree(root) == before and sorted(os.listdir()) == here


def reseal(folder, change=None):
    """Make the record fit what lies beside it: whoever means harm can compute checksums too."""
    record = json.loads((folder / "model.json").read_text())
    data = (folder / "model.safetensors").read_bytes()
    record |= {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for name in record["beside"]:
        record["beside"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if change is not None:
        change(record)
    (folder / "model.json").write_text(json.dumps(files.sealed(record)))


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def pickled():
    return pickle.dumps(Bomb())


def torch_file():
    buffer = io.BytesIO()
    torch.save({"a": Bomb()}, buffer)
    return buffer.getvalue()


def zip_bomb():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../bomb", b"\0" * 50_000_000)
    return buffer.getvalue()


def of_header(header, body=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def numpy_file():
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


TENSORS = {
    "pickle": pickled(),
    "file of torch with a pickle": torch_file(),
    "file of NumPy with a pickle": numpy_file(),
    "zip bomb": zip_bomb(),
    "nothing": b"",
    "text": b"hello, I am a model" * 20,
    "zeros": b"\0" * 4096,
    "a header longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header that is a list": of_header([1, 2]),
    "a header that is no JSON": of_header(b"{'a': 1}"),
    "a header nested 100,000 deep": of_header(b"[" * 100_000),
    "a shape of 2^40": of_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}}),
    "a shape whose product overflows": of_header(
        {"a": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 64]}}
    ),
    "a negative shape": of_header({"a": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}}),
    "offsets beyond the file": of_header(
        {"a": {"dtype": "F32", "shape": [16], "data_offsets": [2**40, 2**40 + 64]}}
    ),
    "offsets that overlap": of_header(
        {name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in "ab"}
    ),
    "an unknown type": of_header({"a": {"dtype": "PICKLE", "shape": [64], "data_offsets": [0, 64]}}),
    "other names": save({"../../../outside": torch.zeros(3), "/etc/passwd": torch.zeros(2)}),
    "none": save({}),
}


@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.parametrize("sealed", [False, True], ids=["as found", "sealed anew"])
def test_something_else_in_place_of_the_tensors(folder, what, sealed):
    (folder / "model.safetensors").write_bytes(TENSORS[what])
    if sealed:
        reseal(folder)
    refused(folder, match=r"model\.(safetensors|json)")
    assert not Path("executed").exists()


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "adata.h5ad"])
def test_truncated_at_every_tenth(folder, name, tenth):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) * tenth // 10])
    refused(folder, match=name.replace(".", r"\."))


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("name", ["model.safetensors", "adata.h5ad"])
def test_truncated_and_sealed_anew(folder, name, tenth):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) * tenth // 10])
    reseal(folder)
    refused(folder, match=name.replace(".", r"\."))


def flips(name, n):
    """Places of single bits, spread over a file: the first ones lie in its header."""
    size = (GOLDEN / "SCVI" / name).stat().st_size
    chosen = np.linspace(0, size - 1, n).astype(int)
    return [(name, int(place), int(bit)) for place, bit in zip(chosen, np.arange(n) * 5 % 8, strict=True)]


@pytest.mark.parametrize(
    ("name", "place", "bit"), [*flips("model.json", 24), *flips("model.safetensors", 24)]
)
def test_a_bit_that_flipped(tmp_path, name, place, bit):
    shutil.copytree(GOLDEN / "SCVI", tmp_path / "place" / "saved")
    path = tmp_path / "place" / "saved" / name
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    refused(path.parent)


@pytest.mark.parametrize("place", np.linspace(0.001, 0.999, 12))
def test_a_bit_of_the_data_that_flipped(folder, place):
    content = bytearray((folder / "adata.h5ad").read_bytes())
    content[int(place * len(content))] ^= 4
    (folder / "adata.h5ad").write_bytes(content)
    refused(folder, match=r"adata\.h5ad is missing, was truncated, or has changed")


@pytest.mark.parametrize("place", range(0, 2000, 97))
def test_a_bit_of_the_header_that_was_flipped_on_purpose(folder, place):
    """What can be read is read, and what cannot is refused with one error: nothing else comes of it."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 2
    path.write_bytes(content)
    reseal(folder)
    with contextlib.suppress(LoadError), watched():
        SCVI.load(folder)


def put(*keys_and_value):
    """Return a change of the record: the value, under the keys."""
    *keys, last, value = keys_and_value

    def change(record):
        for key in keys:
            record = record[key]
        record[last] = value

    return change


DEEP = json.loads("[" * 500 + "]" * 500)
WRONG = [None, 7, -1, 1e400, True, "text", [1, [2]], {"a": {"b": 1}}, DEEP]
FIELDS = [
    ("class",), ("constructor",), ("schema",), ("cell_names",), ("history",), ("is_trained",), ("data_file",),
    ("mapping",), ("manifest",), ("training_defaults",), ("schema", "fields"), ("schema", "setup"),
    ("schema", "fields", "counts"), ("schema", "fields", "batch"), ("schema", "fields", "counts", "names"),
    ("schema", "fields", "counts", "cells"), ("schema", "statistics"), ("constructor", "n_hidden"),
    ("constructor", "gene_likelihood"), ("history", "elbo_train"), ("manifest", "trainings"),
]  # fmt: skip


@pytest.mark.parametrize("keys", FIELDS, ids=".".join)
def test_json_of_other_types(folder, keys):
    text = (folder / "model.json").read_text()
    tried = 0
    for value in WRONG:
        (folder / "model.json").write_text(text)
        before = json.loads(text)
        for key in keys:
            before = before[key]
        if type(value) is type(before) or (value is None and keys == ("mapping",)):
            continue
        reseal(folder, put(*keys, value))
        refused(folder)
        tried += 1
    assert tried >= 7


HOSTILE_RECORDS = {
    "a future version": (put("format_version", 99), "Upgrade pyrocell"),
    "version zero": (put("format_version", 0), "no format version"),
    "a version that is true": (put("format_version", True), "no format version"),
    "a future schema": (put("schema", "format", 99), "format 99"),
    "data above the folder": (put("data_file", "../outside.h5ad"), "data_file"),
    "data anywhere": (put("data_file", "/etc/passwd"), "data_file"),
    "data of another kind": (put("data_file", "model.json"), "data_file"),
    "a hidden layer of 10^9": (put("constructor", "n_hidden", 10**9), "far larger than the file"),
    "a hidden layer of 10^8": (put("constructor", "n_hidden", 10**8), "far larger than the file"),
    "a hidden layer of 10^6": (put("constructor", "n_hidden", 10**6), "size mismatch|far larger than the file"),
    "thirty hidden layers of 3000": (
        lambda record: record["constructor"].update(n_hidden=3000, n_layers=30),
        "far larger than the file",
    ),
    "10^30 latents": (put("constructor", "n_latent", 10**30), "constructor"),
    "a seed of 10^30": (put("seed", 10**30), "seed|constructor|stream"),
    "an array of 10^12": (
        put("constructor", "n_latent", {"pyrocell:kind": "array", "name": "stream", "dtype": "<f4", "shape": [10**12]}),
        "damaged",
    ),
    "an array of objects": (
        put("constructor", "n_latent", {"pyrocell:kind": "array", "name": "stream", "dtype": "O", "shape": [1]}),
        "damaged",
    ),
    "an array of records": (
        put("constructor", "n_latent", {"pyrocell:kind": "array", "name": "stream", "dtype": "i4,O", "shape": [1]}),
        "damaged",
    ),
    "a text of 4 GB": (
        put(
            "constructor",
            "n_latent",
            {"pyrocell:kind": "text", "values": ["a"], "dtype": "<U1000000000", "shape": [1]},
        ),
        "damaged",
    ),
    "a tensor of another file": (
        put("constructor", "n_latent", {"pyrocell:kind": "tensor", "name": "../../model"}),
        "damaged",
    ),
    "a kind that is a module": (
        put("constructor", "n_latent", {"pyrocell:kind": "__import__", "name": "os"}),
        "damaged",
    ),
    "a constructor of other arguments": (put("constructor", "__class__", "os.system"), "constructor"),
    "a class that is a path": (put("class", "os.system"), "not a SCVI"),
    "rows that do not exist": (put("schema", "n_cells", -5), None),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_RECORDS)
def test_a_record_that_means_harm(folder, what):
    change, match = HOSTILE_RECORDS[what]
    reseal(folder, change)
    if what == "rows that do not exist":
        reseal(folder, put("data_file", ""))
    refused(folder, match=match)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "9" * 10_000, "\xff\xfe", "null", "NaN", '"x"']
)
def test_json_that_is_none(folder, text):
    (folder / "model.json").write_text(text, encoding="latin-1")
    refused(folder, match=r"model\.json")


def spoil_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        pair = json.loads((folder / "model.json").read_text())["pair"]
        (folder / "model.safetensors").write_bytes(save(tensors, {"pair": pair}))
        reseal(folder)

    return spoil


HOSTILE_TENSORS = {
    "a stream of zeros": lambda t: t.update(stream=torch.zeros_like(t["stream"])),
    "a stream of numbers": lambda t: t.update(stream=t["stream"].float()),
    "a stream too short": lambda t: t.update(stream=t["stream"][:9].clone()),
    "rows that are fractions": lambda t: t.update(train_indices=t["train_indices"].float()),
    "rows below zero": lambda t: t.update(train_indices=-t["train_indices"] - 1),
    "rows in a square": lambda t: t.update(validation_indices=torch.zeros(2, 2, dtype=torch.int64)),
    "a parameter of another type": lambda t: t.update({"module.log_theta": t["module.log_theta"].double()}),
    "a parameter of another shape": lambda t: t.update(
        {"module.log_theta": t["module.log_theta"][:3].clone()}
    ),
    "a parameter too many": lambda t: t.update({"module.more": torch.zeros(2)}),
    "a parameter too few": lambda t: t.pop("module.log_theta"),
    "a landmark too many": lambda t: t.update({"landmarks.more": torch.zeros(2)}),
    "landmarks in one dimension": lambda t: t.update({"landmarks.latents": torch.zeros(2)}),
}


@pytest.mark.parametrize("what", HOSTILE_TENSORS)
def test_tensors_that_mean_harm(folder, what):
    spoil_tensors(HOSTILE_TENSORS[what])(folder)
    refused(folder)


def links_out(folder):
    with h5py.File(folder.parent / "secret.h5", "w") as secret:
        secret["X"] = np.ones((3, 3))
    with h5py.File(folder / "adata.h5ad", "r+") as file:
        del file["obsm"]
        file["obsm"] = h5py.ExternalLink(str(folder.parent / "secret.h5"), "/")


def values_elsewhere(folder):
    (folder.parent / "secret").write_bytes(b"\1" * 80)
    with h5py.File(folder / "adata.h5ad", "r+") as file:
        file["uns"].create_dataset("stolen", (10,), "f8", external=[(str(folder.parent / "secret"), 0, 80)])


def virtual_values(folder):
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(str(folder.parent / "secret.h5"), "X", (3,))
    with h5py.File(folder / "adata.h5ad", "r+") as file:
        file["uns"].create_virtual_dataset("stolen", layout)


def empty_giant(folder):
    with h5py.File(folder / "adata.h5ad", "r+") as file:
        file["uns"].create_dataset("giant", (10**12,), "f8", chunks=(1000,))


def compressed_giant(folder):
    with h5py.File(folder / "adata.h5ad", "r+") as file:
        giant = file["uns"].create_dataset("giant", (10**10,), "f8", chunks=(10**6,), compression="gzip")
        giant[:10] = 1


def many_giants(folder):
    """Each is small enough; all of them would take 2.4 GB."""
    with h5py.File(folder / "adata.h5ad", "r+") as file:
        for n in range(40):
            file["uns"].create_dataset(f"giant {n}", (7_500_000,), "f8", chunks=(1000,))


def round_in_circles(folder):
    with h5py.File(folder / "adata.h5ad", "r+") as file:
        file["uns"]["again"] = file["uns"]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (links_out, "obsm is a link to another file"),
        (values_elsewhere, "the values of /uns/stolen lie in another file"),
        (virtual_values, "the values of /uns/stolen lie in another file"),
        (empty_giant, "giant says that it has 8,000,000,000,000 bytes, of which 0 are there"),
        (compressed_giant, "giant says that it has 80,000,000,000 bytes, of which"),
        (many_giants, r"its arrays say that they have 2,4\d\d,\d{3},\d{3} bytes together"),
        (round_in_circles, ""),
    ],
)
def test_data_that_mean_harm(folder, spoil, why):
    spoil(folder)
    reseal(folder)
    refused(folder, match=rf"adata\.h5ad cannot be read.*{why}")


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "adata.h5ad"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link out"])
def test_something_else_in_place_of_a_file(folder, name, kind):
    (folder / name).unlink()
    if kind == "folder":
        os.makedirs(folder / name)
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/etc/hostname" if kind == "link out" else "nothing")
    root = folder.parent
    names = sorted(str(path) for path in root.rglob("*"))
    with pytest.raises(LoadError), watched():
        SCVI.load(folder)
    assert sorted(str(path) for path in root.rglob("*")) == names


CHECKPOINTS = {
    "pickle": lambda data: TENSORS["pickle"],
    "zip bomb": lambda data: TENSORS["zip bomb"],
    "half": lambda data: data[: len(data) // 2],
    "a bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
}


@pytest.mark.parametrize("what", CHECKPOINTS)
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "checkpoint.json"])
def test_checkpoints_that_mean_harm(checkpoint, tmp_path, name, what):
    shutil.copytree(checkpoint, tmp_path / "place" / "c")
    path = tmp_path / "place" / "c" / name
    path.write_bytes(CHECKPOINTS[what](path.read_bytes()))
    model, before = make_training(), tree(tmp_path)
    with pytest.raises(LoadError, match=r"checkpoint\.(json|safetensors)"):
        model.train(2, resume=tmp_path / "place" / "c")
    assert tree(tmp_path) == before and not model.is_trained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_training().train(1, plan=pyrocell.TrainingPlan(checkpoint=folder))
    return folder


def test_the_bombs_would_go_off_and_be_noticed(tmp_path, monkeypatch):
    """What is refused above is dangerous indeed."""
    for act in (
        lambda: pickle.loads(TENSORS["pickle"]),
        lambda: (tmp_path / "x").write_text(""),
        lambda: (tmp_path / "y").mkdir(),
        lambda: torch.load(io.BytesIO(TENSORS["file of torch with a pickle"]), weights_only=False),
    ):
        with pytest.raises(Watched), watched():
            act()
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    pickle.loads(TENSORS["pickle"])
    assert Path("executed").exists()
    with zipfile.ZipFile(io.BytesIO(TENSORS["zip bomb"])) as archive:
        assert archive.infolist()[0].file_size > 500 * len(TENSORS["zip bomb"])
