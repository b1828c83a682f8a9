"""Tensors and a JSON record in one folder: the format of saved models and checkpoints. No pickle, ever."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyrocell.errors import LoadError

__all__ = ["FORMAT_VERSION", "read_folder", "write_folder"]

FORMAT_VERSION = 1


def write_folder(
    folder: str | Path, name: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]
) -> None:
    """Write ``name.safetensors`` and ``name.json``; halves of two saves are told apart.

    Parameters
    ----------
    folder
        Created when absent.
    name
        Stem of both files.
    tensors
        Any tensors; shared storage is copied.
    record
        JSON-able values; the format version is added.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pair = secrets.token_hex(8)  # tells the two halves of one save from those of another
    data = save({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, {"pair": pair})
    text = json.dumps(
        {"format_version": FORMAT_VERSION, "pair": pair, "n_bytes": len(data), **record}, indent=1
    )
    # Both new files are complete on disk before either takes the place of an old one.
    for suffix, content in ((".safetensors", data), (".json", text.encode())):
        with open(folder / f".{name}{suffix}.new", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for suffix in (".safetensors", ".json"):
        os.replace(folder / f".{name}{suffix}.new", folder / f"{name}{suffix}")


def read_folder(folder: str | Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_folder` wrote.

    Raises
    ------
    LoadError
        If a file is missing, truncated, not of this format, or written by a newer version.
    """
    folder = Path(folder)
    record = _read_json(folder, f"{name}.json")
    tensors_path = folder / f"{name}.safetensors"
    if not tensors_path.is_file():
        raise LoadError(
            f"{tensors_path} is missing beside {name}.json; copy the whole folder, or save again."
        )
    size = tensors_path.stat().st_size
    if size != record.get("n_bytes"):
        raise LoadError(
            f"{tensors_path} has {size} bytes, but {name}.json says {record.get('n_bytes')}: it was truncated or "
            "belongs to another save. Copy the whole folder again, or save again."
        )
    return _read_tensors(tensors_path, record.get("pair")), record


def _read_json(folder: Path, file_name: str) -> dict[str, Any]:
    path = folder / file_name
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:5] if folder.is_dir() else "no such folder"
        raise LoadError(f"{path} does not exist (found: {found}); expected a folder written by save().")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise LoadError(
            f"{path} is not JSON ({error}); the file is damaged or foreign. Save again."
        ) from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise LoadError(f"{path} has no format version; expected a file written by pyrocell's save().")
    if version > FORMAT_VERSION:
        versions = record.get("versions")
        writer = versions.get("pyrocell") if isinstance(versions, dict) else None
        raise LoadError(
            f"{path} has format version {version}, this pyrocell reads up to {FORMAT_VERSION}. Upgrade pyrocell "
            f"(the file was written by {writer or 'a newer version'})."
        )
    return record


def _read_tensors(path: Path, pair: object) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            if (file.metadata() or {}).get("pair") != pair:
                raise LoadError(
                    f"{path} and the JSON file beside it come from two different saves; save again."
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except LoadError:  # a ValueError too
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(
            f"{path} is not a readable safetensors file ({error}); copy or save it again."
        ) from error
