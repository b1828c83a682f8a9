"""Tensors and a JSON record in one folder: the format of saved models and checkpoints. No pickle, ever.

What the bytes mean, and what a reader refuses, is in docs/developer/format.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from pyrocell.errors import LoadError, SaveError

__all__ = ["FORMAT_VERSION", "beside_path", "holds", "read_folder", "records_in", "sealed", "write_folder"]

FORMAT_VERSION = 2
_SUM = "checksum"
_LOST = "Copy the whole folder again, or save again."


def write_folder(
    folder: str | Path,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    *,
    beside: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write ``name.safetensors`` and ``name.json``, all of it or nothing: whenever it stops, one save is whole.

    Parameters
    ----------
    folder
        Created when absent.
    name
        Stem of both files.
    tensors
        Any tensors; shared storage is copied.
    record
        JSON-able values; the format version and checksums are added.
    beside
        Further files of the same save by name, each with a function that writes it to the path given.

    Raises
    ------
    SaveError
        If the disk is full, or the folder cannot be written to; what lay there before is untouched.
    """
    from safetensors.torch import save

    folder, beside = Path(folder), beside or {}
    pair = secrets.token_hex(8)  # tells the two halves of one save from those of another
    data = save({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, {"pair": pair})
    names = [f"{name}.safetensors", *beside, f"{name}.json"]
    with _refusing(folder, names, len(data)) as renamed, _alone(folder):
        _settle(folder, name)
        # Every new file is complete on disk before the first takes the place of an old one.
        _write(_staged(folder, names[0]), data)
        sums = {other: _written(_staged(folder, other), write) for other, write in beside.items()}
        head = {"format_version": FORMAT_VERSION, "pair": pair, "n_bytes": len(data)}
        head |= {"sha256": hashlib.sha256(data).hexdigest(), "beside": sums}
        text = json.dumps(sealed({**head, **record, **head}), indent=1)
        _write(_staged(folder, names[-1]), text.encode())
        # From the first of these on the new save is the one that is read: see `_settle`.
        for file_name in names:
            os.replace(_staged(folder, file_name), folder / file_name)
            renamed.append(file_name)
            _sync(folder)


def read_folder(folder: str | Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_folder` wrote.

    Raises
    ------
    LoadError
        If a file is missing, truncated, changed, not of this format, or written by a newer version.
    """
    folder = Path(folder)
    tensors_path = folder / f"{name}.safetensors"
    try:
        record = _read_json(folder / f"{name}.json")
        _check_tensors_file(tensors_path, record)
    except LoadError:
        # A save that was cut off between its renames has left its record under the name that it was staged with.
        with suppress(LoadError):
            record = _read_json(_staged(folder, f"{name}.json"))
            _check_tensors_file(tensors_path, record)
            return _read_tensors(tensors_path, record), record
        raise
    return _read_tensors(tensors_path, record), record


def holds(folder: str | Path, name: str) -> bool:
    """Whether there is a save in a folder: of one that was cut off at its very end, the tensors alone have their name.

    Parameters
    ----------
    folder, name
        As in `write_folder`.
    """
    return any((Path(folder) / f"{name}.{kind}").exists() for kind in ("json", "safetensors"))


def records_in(folder: str | Path, name: str) -> list[dict[str, Any]]:
    """Return the sound records of a folder: of the save there, and of one that was cut off between its renames.

    Parameters
    ----------
    folder, name
        As in `write_folder`.
    """
    found, plain = [], Path(folder) / f"{name}.json"
    for path in (plain, _staged(plain.parent, plain.name)):
        with suppress(LoadError):
            found.append(_read_json(path))
    return found


def beside_path(folder: str | Path, record: Mapping[str, Any], file_name: str) -> Path:
    """Find a further file of a save, and check that it is the one that was written.

    Parameters
    ----------
    folder, record
        Where it was written, and the record that was read there.
    file_name
        Its name.

    Raises
    ------
    LoadError
        If it is missing or not the one that was written.
    """
    path = Path(folder) / file_name
    if record["format_version"] == 1:  # had no checksums
        return path
    wanted = _beside(record).get(file_name)
    for candidate in (path, _staged(Path(folder), file_name)):
        if candidate.is_file() and _digest(candidate) == wanted:
            return candidate
    raise LoadError(
        f"{path} is missing, was truncated, or has changed since it was saved. {_LOST} Without it, give the data with "
        "adata=."
    )


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record, as JSON gives it back, with the checksum of all its other entries.

    Parameters
    ----------
    record
        JSON-able values.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(record)))
    plain.pop(_SUM, None)
    return {**plain, _SUM: _checksum(plain)}


def _checksum(record: Mapping[str, Any]) -> str:
    others = {key: value for key, value in record.items() if key != _SUM}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _staged(folder: Path, file_name: str) -> Path:
    return folder / f".{file_name}.new"


def _settle(folder: Path, name: str) -> None:
    """Bring a save to its end that was cut off between its renames: its record is known by the tensors in place."""
    staged = _staged(folder, f"{name}.json")
    with suppress(LoadError):
        record = _read_json(staged)
        _check_tensors_file(folder / f"{name}.safetensors", record)
        for file_name in [*_beside(record), f"{name}.json"]:
            if _staged(folder, file_name).is_file():
                os.replace(_staged(folder, file_name), folder / file_name)
        _sync(folder)


def _beside(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums of the further files of a save: of names in its folder, and of no path out of it."""
    sums = record.get("beside")
    return (
        {key: str(value) for key, value in sums.items() if Path(key).name == key}
        if isinstance(sums, dict)
        else {}
    )


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # where a link lies there, what it points to is not ours
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _written(path: Path, write: Callable[[Path], None]) -> str:
    """Let a file be written, see it to the disk, and return its checksum."""
    path.unlink(missing_ok=True)
    write(path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _sync(folder: Path) -> None:
    """See the names in a folder to the disk, where the system has a way to."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a folder, and wait until nobody else writes to it: two writers would mix what they stage.

    The lock is on the folder itself, and ends with the process. Systems and disks without such locks go without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _refusing(folder: Path, names: list[str], n_bytes: int) -> Iterator[list[str]]:
    """Turn a failure of the disk into an error that says what to do, and take what was half written away.

    Yields a list, to be filled with the names of files that are in their place.
    """
    renamed: list[str] = []
    try:
        yield renamed
    except OSError as error:
        free = "unknown"
        with suppress(OSError):
            # Once the tensors are in their place, what is staged is all that there is of this save.
            if _staged(folder, names[0]).exists():
                for file_name in names:
                    _staged(folder, file_name).unlink(missing_ok=True)
        with suppress(OSError):
            free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB"
        left = (
            "All of it is on the disk all the same, under names of its own, and is what is read there from now on"
            if renamed
            else "What was saved there before is untouched"
        )
        raise SaveError(
            f"{folder / names[0]} could not be written: {error.strerror or error} (it needs {n_bytes / 1e6:.1f} MB "
            f"beside the old one; free there: {free}). {left}. Make room, or save to another folder."
        ) from error


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        folder = path.parent
        found = sorted(p.name for p in folder.iterdir())[:5] if folder.is_dir() else "no such folder"
        raise LoadError(f"{path} does not exist (found: {found}); expected a folder written by save().")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        checksum = _checksum(record) if isinstance(record, dict) else None
    except (ValueError, OSError, RecursionError) as error:  # of text that is no Unicode, too
        raise LoadError(
            f"{path} is not JSON ({error}); the file is damaged or foreign. Save again."
        ) from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is not int or version < 1:
        raise LoadError(
            f"{path} has no format version; expected a file written by pyrocell's save(). {_LOST}"
        )
    if version > FORMAT_VERSION:
        versions = record.get("versions")
        writer = versions.get("pyrocell") if isinstance(versions, dict) else None
        raise LoadError(
            f"{path} has format version {version}, this pyrocell reads up to {FORMAT_VERSION}. Upgrade pyrocell "
            f"(the file was written by {writer or 'a newer version'})."
        )
    if version > 1 and record.get(_SUM) != checksum:
        raise LoadError(
            f"{path} has changed since it was written: its checksum is not that of its content. {_LOST}"
        )
    return record


def _check_tensors_file(path: Path, record: Mapping[str, Any]) -> None:
    """Raise a LoadError unless the file is the one that the record was written with."""
    if not path.is_file():
        raise LoadError(f"{path} is missing beside its JSON file; copy the whole folder, or save again.")
    size = path.stat().st_size
    if size != record.get("n_bytes"):
        raise LoadError(
            f"{path} has {size} bytes, but its JSON file says {record.get('n_bytes')}: it was truncated or "
            f"belongs to another save. {_LOST}"
        )
    pair = _pair_of(path)
    if pair is not None and pair != record.get("pair"):
        raise LoadError(f"{path} and the JSON file beside it come from two different saves; save again.")
    if record["format_version"] > 1 and _digest(path) != record.get("sha256"):
        raise LoadError(
            f"{path} has changed since it was written: its checksum is not the one of its JSON file. {_LOST}"
        )


def _pair_of(path: Path) -> str | None:
    """Return what names the save that a file of tensors belongs to; None if it is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return str((file.metadata() or {}).get("pair"))
    except (SafetensorError, OSError, ValueError):
        return None


def _read_tensors(path: Path, record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise LoadError(
            f"{path} is not a readable safetensors file ({error}); copy or save it again."
        ) from error
