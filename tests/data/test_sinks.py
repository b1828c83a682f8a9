"""Sinks of answers, without a model: what they take, what they refuse, and what an interruption leaves."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from scipy import sparse

from pyrocell.data import Layer, Obsm, Zarr
from pyrocell.data.filling import Filling
from pyrocell.data.overlap import place_of_array
from pyrocell.data.sinks import Asked
from pyrocell.errors import QueryError, SaveError
from tests.multimodal import as_mudata, make_adata

N, G = 23, 5
VALUES = np.random.default_rng(0).normal(size=(3, N, G)).astype(np.float32)


def make(n=N, g=G):
    adata = AnnData(sparse.csr_matrix(np.ones((n, g), dtype=np.float32)))
    adata.var_names = [f"gene{i}" for i in range(g)]
    return adata


def asked(adata, *, rows=None, features=None, n_draws=None, inputs=()):
    rows = np.arange(adata.n_obs) if rows is None else rows
    names = list(adata.var_names) if features is None else features
    return Asked(adata, rows, adata.n_obs, names, n_draws, inputs)


def fill(out, adata, values=VALUES[0], step=4, **options):
    with Filling(out, asked(adata, **options)) as filling:
        for start in range(0, len(values), step):
            filling.add(values[start : start + step], slice(start, min(start + step, len(values))))
        return filling.kept()


def fill_draws(out, adata, step=4, at_once=2):
    with Filling(out, asked(adata, n_draws=3)) as filling:
        for start in range(0, N, step):
            cells = slice(start, min(start + step, N))
            for first in range(0, 3, at_once):
                draws = slice(first, min(first + at_once, 3))
                filling.add(VALUES[draws, cells], cells, draws)
        return filling.kept()


# ------------------------------------------------------------------------------------------------ arrays


def test_without_a_sink_there_is_a_new_array():
    adata = make()
    assert np.array_equal(fill(None, adata), VALUES[0])
    assert np.array_equal(fill_draws(None, adata), VALUES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_array_is_filled_and_returned(dtype):
    given = np.zeros((N, G), dtype=dtype)
    assert fill(given, make()) is given
    assert np.array_equal(given, VALUES[0])
    strided = np.zeros((N, 2 * G), dtype=dtype)[:, ::2]
    assert np.array_equal(fill(strided, make()), VALUES[0])


def test_a_mapped_file_is_filled(tmp_path):
    mapped = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype="float32", shape=VALUES.shape)
    fill_draws(mapped, make())
    mapped.flush()
    assert np.array_equal(np.load(tmp_path / "a.npy"), VALUES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((N, G), dtype=np.int32), "type int32; expected float32 or float64"),
        (np.zeros((N, G), dtype=np.float16), "type float16"),
        (np.zeros((N + 1, G), dtype=np.float32), r"shape \(24, 5\); expected \(23, 5\)"),
        (np.zeros((G, N), dtype=np.float32), r"shape \(5, 23\)"),
        (np.zeros((1, N, G), dtype=np.float32), r"shape \(1, 23, 5\)"),
        ([[0.0]], "out is a list; expected a NumPy array"),
    ],
)
def test_an_array_of_another_kind_is_refused_and_left_alone(given, message):
    with pytest.raises(QueryError, match=message):
        fill(given, make())
    assert not np.any(given)


def test_an_array_that_cannot_be_written_to_is_refused():
    given = np.zeros((N, G), dtype=np.float32)
    given.setflags(write=False)
    with pytest.raises(QueryError, match="cannot be written to"):
        fill(given, make())


@pytest.mark.parametrize(
    "given",
    [
        np.lib.stride_tricks.as_strided(np.zeros(G, dtype="f4"), (N, G), (0, 4)),
        np.lib.stride_tricks.sliding_window_view(np.zeros(N + G - 1, dtype="f4"), G, writeable=True),
    ],
)
def test_an_array_that_overlaps_itself_is_refused(given):
    assert given.flags.writeable and given.shape == (N, G)
    with pytest.raises(QueryError, match="lie at the same place in memory"):
        fill(given, make())
    assert not given.any()


@pytest.mark.parametrize("given", [np.zeros((G, N)).T, np.zeros((N, G))[::-1], np.zeros((N, 1, G))[:, 0]])
def test_slices_and_transposes_do_not_overlap_themselves(given):
    assert np.array_equal(fill(given, make()), VALUES[0].astype(given.dtype))


def full_of_arrays():
    """Make data with an array of (N, G) numbers in every place that can hold one."""
    numbers = np.random.default_rng(1).random((N, N))
    adata = AnnData(numbers[:, :G].astype(np.float32))
    adata.raw = adata.copy()
    adata.layers["dense"] = numbers[:, :G].copy()
    adata.layers["csr"] = sparse.csr_matrix(numbers[:, :G])
    adata.layers["csc"] = sparse.csc_matrix(numbers[:, :G])
    adata.obsm["array"] = numbers[:, :G].copy()
    adata.obsm["table"] = pd.DataFrame(numbers[:, :G].copy(), index=adata.obs_names, columns=list("abcde"))
    adata.obsp["array"], adata.obsp["csr"] = numbers.copy(), sparse.csr_matrix(numbers)
    adata.uns["nested"] = {"array": numbers[:, :G].copy()}
    return adata


PLACES = {
    "X": lambda adata: adata.X,
    "layers['dense']": lambda adata: adata.layers["dense"],
    "layers['csr']": lambda adata: adata.layers["csr"].data.reshape(N, G),
    "layers['csc']": lambda adata: adata.layers["csc"].data.reshape(G, N).T,
    "obsm['array']": lambda adata: adata.obsm["array"][::-1],
    "obsm['table']['a']": lambda adata: writeable(adata.obsm["table"].to_numpy(copy=False)),
    "obsp['array']": lambda adata: adata.obsp["array"][:, :G],
    "obsp['csr']": lambda adata: adata.obsp["csr"].data[: N * G].reshape(N, G),
    "raw.X": lambda adata: adata.raw.X,
    "uns['nested']['array']": lambda adata: adata.uns["nested"]["array"],
}


def writeable(array):
    """pandas may give its array for reading alone; the one that a table was made from has no such flag."""
    array.setflags(write=True)
    return array


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of", ["asked", "own", "view", "mudata"])
def test_an_array_of_the_data_is_refused_and_left_alone(place, of):
    adata = full_of_arrays()
    given = PLACES[place](adata)
    before = given.copy()
    question, named = asked(adata), place
    if of == "own":
        question = replace(asked(make()), own=adata)
    elif of == "view":
        question = asked(adata[np.arange(N)[::-1]])
    elif of == "mudata":
        with mudata.set_options(pull_on_update=False):
            question = replace(question, adata=mudata.MuData({"rna": adata}))
        named = f"mod['rna'].{place}"
    with pytest.raises(QueryError, match=rf"in common with {re.escape(named)} of the data"):
        Filling(given, question)
    assert np.array_equal(given, before)
    assert Filling(before, question), "a copy is taken"


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_data_on_disk_are_looked_through(tmp_path, kind):
    adata = full_of_arrays()
    adata.X = kind(VALUES[0])
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata = read_h5ad(tmp_path / "a.h5ad", backed="r")
    adata.uns["table"] = pd.Series([1.0], index=["data"])
    adata.uns["coo"] = sparse.coo_matrix(VALUES[0])
    given = np.zeros((N, G))
    for data in (adata, adata[:7]):
        assert place_of_array(given, data) is None
        assert place_of_array(adata.obsm["array"], data) == "obsm['array']"


def test_another_mapping_of_the_data_s_file_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", VALUES[0])
    adata = AnnData(np.load(tmp_path / "x.npy", mmap_mode="r"))
    with pytest.raises(QueryError, match="in common with X of the data"):
        fill(np.load(tmp_path / "x.npy", mmap_mode="r+"), adata)
    assert np.array_equal(np.load(tmp_path / "x.npy"), VALUES[0])


def interrupted(out, adata, **options):
    with pytest.raises(KeyboardInterrupt), Filling(out, asked(adata, **options)) as filling:
        filling.add(VALUES[0, :4], slice(0, 4))
        raise KeyboardInterrupt


def test_an_interrupted_array_shows_what_is_missing():
    given = np.zeros((N, G), dtype=np.float32)
    interrupted(given, make())
    assert np.array_equal(given[:4], VALUES[0, :4])
    assert np.isnan(given[4:]).all()


# ------------------------------------------------------------------------------------------------ the data


@pytest.mark.parametrize(("sink", "slot"), [(Layer("new"), "layers"), (Obsm("new"), "obsm")])
def test_the_data_get_what_is_complete(sink, slot):
    adata = make()
    interrupted(sink, adata)
    assert "new" not in getattr(adata, slot)
    found = fill(sink, adata)
    assert found is getattr(adata, slot)["new"]
    assert np.array_equal(found, VALUES[0])


@pytest.mark.parametrize(("kind", "slot"), [(Layer, "layers"), (Obsm, "obsm")])
def test_what_is_there_is_replaced_on_request_alone(kind, slot):
    adata = make()
    getattr(adata, slot)["old"] = before = np.ones((N, G))
    with pytest.raises(QueryError, match=rf"already have 'old'.*{kind.__name__}\('old', overwrite=True\)"):
        fill(kind("old"), adata)
    interrupted(kind("old", overwrite=True), adata)
    assert np.array_equal(getattr(adata, slot)["old"], before)
    fill(kind("old", overwrite=True), adata)
    assert np.array_equal(getattr(adata, slot)["old"], VALUES[0])
    with pytest.raises(QueryError, match="The model reads 'old'"):
        fill(kind("old", overwrite=True), adata, inputs={"old"})


@pytest.mark.parametrize(("kind", "slot"), [(Layer, "layers"), (Obsm, "obsm")])
def test_a_key_that_was_added_meanwhile_is_not_replaced(kind, slot):
    adata, mine = make(), np.ones((N, G))
    with (
        pytest.raises(QueryError, match="'new' was added to the data while.* is left as it is"),
        Filling(kind("new"), asked(adata)) as filling,
    ):
        filling.add(VALUES[0], slice(0, N))
        getattr(adata, slot)["new"] = mine
        filling.kept()
    assert np.array_equal(getattr(adata, slot)["new"], mine)
    with Filling(kind("other", overwrite=True), asked(adata)) as filling:
        filling.add(VALUES[0], slice(0, N))
        getattr(adata, slot)["other"] = mine
        assert np.array_equal(filling.kept(), VALUES[0]), "on request"


@pytest.mark.parametrize("kind", [Layer, Obsm])
def test_the_data_take_all_cells_and_no_draws(kind):
    adata = make()
    for rows in (np.arange(3), np.arange(N)[::-1], np.zeros(N, dtype=int)):
        with pytest.raises(QueryError, match="holds all 23 cells in their order"):
            fill(kind("new"), adata, rows=rows)
    with pytest.raises(QueryError, match="3 draws were asked for"):
        fill_draws(kind("new"), adata)
    with pytest.raises(QueryError, match="a view of another one"):
        fill(kind("new"), adata[:, :])
    with pytest.raises(QueryError, match="has no key"):
        fill(kind(""), adata)
    with pytest.raises(QueryError, match=r"shape \(5,\)"), Filling(kind("new"), asked(adata)) as filling:
        filling.add(VALUES[0, 0], None)
    assert not adata.layers and not adata.obsm


def test_a_layer_takes_all_features_by_name():
    adata = make()
    backwards = list(adata.var_names)[::-1]
    found = fill(Layer("new"), adata, VALUES[0][:, ::-1], features=backwards)
    assert np.array_equal(found, VALUES[0])
    some = backwards[:2]
    with pytest.raises(QueryError, match="lacks 'gene0', 'gene1', 'gene2'"):
        fill(Layer("other"), adata, VALUES[0][:, :2], features=some)
    with pytest.raises(QueryError, match="it has 'gene9'"):
        fill(Layer("other"), adata, features=[*adata.var_names, "gene9"])
    with pytest.raises(QueryError, match="it has 'gene0'"):
        fill(Layer("other"), adata, features=["gene0", *adata.var_names])
    with pytest.raises(QueryError, match="has 2 columns"):
        fill(Layer("other"), adata, VALUES[0][:, :2])
    assert fill(Obsm("some"), adata, VALUES[0][:, :2], features=some).shape == (N, 2)
    assert set(adata.layers) == {"new"}


def test_a_mudata_has_no_layers():
    mdata = as_mudata(make_adata())
    question = Asked(mdata, np.arange(mdata.n_obs), mdata.n_obs, ["a"], None)
    with pytest.raises(QueryError, match="MuData has no layers"):
        Layer("new").check(question)
    Obsm("new").check(question)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_name_of_a_modality_is_never_a_key(overwrite):
    """In a MuData, it says which cells the modality has."""
    mdata = as_mudata(make_adata())
    name = next(iter(mdata.mod))
    before = mdata.obsm[name].copy()
    with pytest.raises(QueryError, match=f"'{name}' is a modality"):
        fill(Obsm(name, overwrite=overwrite), mdata, np.zeros((mdata.n_obs, 1), dtype=np.float32))
    assert np.array_equal(mdata.obsm[name], before)


# ------------------------------------------------------------------------------------------------ zarr


zarr_is_there = pytest.mark.skipif(find_spec("zarr") is None, reason="zarr is not installed")


@zarr_is_there
@pytest.mark.parametrize("step", [1, 4, 7, N])
def test_a_zarr_array_holds_the_same(tmp_path, step):
    from anndata.io import read_elem

    found = fill(tmp_path / "a.zarr", make(), step=step)
    assert found.dtype == np.float32
    assert np.array_equal(found[:], VALUES[0])
    assert np.array_equal(read_elem(found), VALUES[0])
    assert np.array_equal(fill_draws(str(tmp_path / "b.zarr"), make(), step=step)[:], VALUES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "b.zarr"]


@zarr_is_there
@pytest.mark.parametrize("values", [VALUES[0, 0], VALUES[0, :2], np.float32(3.0).reshape(())])
def test_one_value_for_all_cells(tmp_path, values):
    for out in (None, tmp_path / "a.zarr"):
        with Filling(out, asked(make())) as filling:
            filling.add(values, None)
            assert np.array_equal(filling.kept()[...], values)


@zarr_is_there
def test_small_blocks_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("pyrocell.data.zarr_sink._CHUNK_NUMBERS", 12 * G)
    found = fill(tmp_path / "a.zarr", make(), step=4)
    assert found.chunks == (12, G)
    assert np.array_equal(found[:], VALUES[0])


@zarr_is_there
def test_an_interrupted_zarr_array_is_not_there(tmp_path):
    interrupted(tmp_path / "a.zarr", make())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), Filling(tmp_path / "a.zarr", asked(make())) as filling:
        filling.add(VALUES[0, :4], slice(0, 4))
        [beside] = tmp_path.iterdir()
        assert beside.name.endswith(".partial"), "killed now, this would stay"
        raise KeyboardInterrupt


@zarr_is_there
def test_a_zarr_array_is_replaced_on_request_alone(tmp_path):
    path = tmp_path / "a.zarr"
    fill(path, make(), VALUES[1])
    with pytest.raises(QueryError, match=r"already something at out=.*overwrite=True\) to replace"):
        fill(path, make())
    interrupted(Zarr(path, overwrite=True), make())
    assert np.array_equal(fill(Zarr(path, overwrite=True), make())[:], VALUES[0])
    assert [found.name for found in tmp_path.iterdir()] == ["a.zarr"]


@zarr_is_there
def test_a_zarr_array_stays_until_the_new_one_is_complete(tmp_path):
    import zarr

    path = tmp_path / "a.zarr"
    fill(path, make(), VALUES[1])
    interrupted(Zarr(path, overwrite=True), make())
    assert np.array_equal(zarr.open_array(str(path), mode="r")[:], VALUES[1])


@zarr_is_there
def test_nothing_but_a_zarr_array_is_replaced(tmp_path):
    import zarr

    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    zarr.open_group(str(tmp_path / "group"), mode="w")
    fill(tmp_path / "a.zarr", make())
    (tmp_path / "link").symlink_to(tmp_path / "a.zarr")
    for name in ("folder", "file", "group", "link"):
        with pytest.raises(QueryError, match="is no zarr array, and is not replaced"):
            fill(Zarr(tmp_path / name, overwrite=True), make())
    assert (tmp_path / "file").read_text() == "mine"


@zarr_is_there
@pytest.mark.parametrize("text", ["{", "[]", "{}", b"\xff\xfe"])
def test_a_damaged_record_is_named(tmp_path, text):
    fill(tmp_path / "a.zarr", make())
    record = tmp_path / "a.zarr" / "zarr.json"
    record.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(QueryError, match=rf"{re.escape(str(record))} cannot be read.*not replaced"):
        fill(Zarr(tmp_path / "a.zarr", overwrite=True), make())


def appear(kind, path):
    """Put something where an answer is to go."""
    import zarr

    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to(path.parent)
    elif kind == "group":
        zarr.open_group(str(path), mode="w")
    elif kind == "zarr":
        fill(path, make(), VALUES[1])
    else:
        path.mkdir()
        (path / "mine").write_text("mine")


def told_place(error):
    """Return the folder that a message names as that of the complete answer."""
    return Path(re.search(r"complete, in (\S+\.partial);", str(error)).group(1))


def answer_while(happening, out):
    with pytest.raises((QueryError, SaveError)) as error, Filling(out, asked(make())) as filling:
        filling.add(VALUES[0], slice(0, N))
        happening()
        filling.kept()
    return error.value


@zarr_is_there
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "group", "link", "zarr"])
def test_what_appeared_meanwhile_is_left_alone_and_the_answer_is_kept(tmp_path, kind, overwrite):
    import zarr

    path = tmp_path / "a.zarr"
    if kind == "zarr" and overwrite:
        with Filling(Zarr(path, overwrite=True), asked(make())) as filling:
            filling.add(VALUES[0], slice(0, N))
            appear(kind, path)
            assert np.array_equal(filling.kept()[:], VALUES[0]), "on request"
        return
    error = answer_while(lambda: appear(kind, path), Zarr(path, overwrite=overwrite))
    assert isinstance(error, QueryError) and "was taken while the question was answered" in str(error)
    assert np.array_equal(zarr.open_array(str(told_place(error)), mode="r")[:], VALUES[0])
    assert {"file": path.is_file, "link": path.is_symlink}.get(kind, path.is_dir)()
    if kind in ("file", "folder"):
        assert (path / "mine" if kind == "folder" else path).read_text() == "mine"
    if kind == "zarr":
        assert np.array_equal(zarr.open_array(str(path), mode="r")[:], VALUES[1])
    assert {found.name for found in tmp_path.iterdir()} == {"a.zarr", told_place(error).name}


@zarr_is_there
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appears_at_the_very_last_moment_is_left_alone(tmp_path, monkeypatch, kind, overwrite):
    """After the check, the renaming itself fails, or what was set aside is put back."""
    import zarr

    from pyrocell.data import zarr_sink

    path, check = tmp_path / "a.zarr", zarr_sink._check_free

    def late(place, **options):
        check(place, **options)
        appear(kind, place)

    def happening():
        monkeypatch.setattr(zarr_sink, "_check_free", late)
        monkeypatch.setattr(zarr_sink._OnDisk, "_move", moved)

    move = zarr_sink._OnDisk._move

    def moved(self):
        monkeypatch.setattr(zarr_sink, "_check_free", check)
        move(self)

    error = answer_while(happening, Zarr(path, overwrite=overwrite))
    assert (path / "mine" if kind == "folder" else path).read_text() == "mine"
    assert np.array_equal(zarr.open_array(str(told_place(error)), mode="r")[:], VALUES[0])
    assert len(list(tmp_path.iterdir())) == 2


@zarr_is_there
def test_of_two_answers_with_one_path_the_first_has_it_and_the_second_is_kept(tmp_path):
    import zarr

    path = tmp_path / "a.zarr"
    error = answer_while(lambda: fill(path, make(), VALUES[1]), path)
    assert np.array_equal(zarr.open_array(str(path), mode="r")[:], VALUES[1])
    assert np.array_equal(zarr.open_array(str(told_place(error)), mode="r")[:], VALUES[0])


@zarr_is_there
def test_a_name_that_cannot_be_given_keeps_old_and_new(tmp_path, monkeypatch):
    import zarr

    path = tmp_path / "a.zarr"
    fill(path, make(), VALUES[1])
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    error = answer_while(lambda: None, Zarr(path, overwrite=True))
    assert isinstance(error, SaveError)
    assert np.array_equal(zarr.open_array(str(path), mode="r")[:], VALUES[1])
    assert np.array_equal(zarr.open_array(str(told_place(error)), mode="r")[:], VALUES[0])


@zarr_is_there
def test_places_where_no_array_can_be(tmp_path):
    import zarr

    zarr.open_group(str(tmp_path / "group"), mode="w")
    fill(tmp_path / "a.zarr", make())
    for inside in ("group/a", "a.zarr/b"):
        with pytest.raises(QueryError, match="lies inside the zarr group"):
            fill(tmp_path / inside, make())
    with pytest.raises(QueryError, match="is not there; make it first"):
        fill(tmp_path / "nowhere" / "a.zarr", make())
    with pytest.raises(QueryError, match="is an address"):
        fill("s3://bucket/a.zarr", make())


@zarr_is_there
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import zarr

    def full(self, key, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(SaveError, match=r"could not be written.*nothing of it is left"):
        fill(tmp_path / "a.zarr", make())
    assert list(tmp_path.iterdir()) == []


def test_without_zarr_a_path_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(QueryError, match="pip install zarr"):
        fill(tmp_path / "a.zarr", make())
