"""Write a JSON header and tensors to one safetensors file, and read them; no pickle is involved."""

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyroflows.errors import CheckpointError


def write_archive(
    path: str | Path, kind: str, number: int, header: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a file, which takes the place of an older one only once it is complete.

    Args:
        path: the path of the file.
        kind: what the file holds, such as "flow".
        number: the number of the format of such files, which grows if an older version could not read them.
        header: values that JSON can hold.
        tensors: the tensors by name; the file holds copies on the CPU.

    Raises:
        CheckpointError: if the file cannot be written.
    """
    values = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"kind": kind, "format": number, "pyroflows": version("pyroflows"), **header})
    metadata = {"pyroflows": text, "sha256": _digest(text, values)}
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        save_file(values, unfinished, metadata=metadata)
        unfinished.replace(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_archive(path: str | Path, kind: str, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file that :func:`write_archive` wrote.

    Args:
        path: the path of the file.
        kind: what the file must hold.
        number: the number of the format that this version reads.

    Raises:
        CheckpointError: if there is no such file, it is damaged, or it holds something else.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies have the alignment of other tensors, on which the last bits of products depend.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
    text = metadata.get("pyroflows", "{}")
    header = _header(text)
    if header.get("kind") != kind or not isinstance(header.get("format"), int):
        found = f": it holds a {header['kind']}" if "kind" in header else ""
        raise CheckpointError(f"{path} holds no {kind} of pyroflows{found}")
    if header["format"] != number:
        raise CheckpointError(
            f"{path} has format {header['format']} of version {header.get('pyroflows')} of pyroflows, but version "
            f"{version('pyroflows')}, which is installed, reads format {number}: install the version that wrote it"
        )
    if metadata.get("sha256") != _digest(text, tensors):
        raise CheckpointError(f"{path} is damaged: its contents are not those that were written")
    return header, tensors


def _header(text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the header and of the names, dtypes, shapes and values of the tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
