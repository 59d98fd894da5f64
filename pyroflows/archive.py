"""Write a JSON header and tensors to one safetensors file, and read them; no pickle is involved."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pyroflows.atomic import write_atomically
from pyroflows.errors import CheckpointError


def write_archive(
    path: str | Path, kind: str, number: int, header: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a file, which takes the place of an older one only once it is complete, see :func:`write_atomically`.

    Args:
        path: the path of the file.
        kind: what the file holds, such as "flow".
        number: the number of the format of such files, which grows if an older version could not read them.
        header: values that JSON can hold.
        tensors: the tensors by name; the file holds copies on the CPU.

    Raises:
        CheckpointError: if the file cannot be written, or the path is that of a directory or a device.
    """
    values = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"kind": kind, "format": number, "pyroflows": version("pyroflows"), **header})
    metadata = {"pyroflows": text, "sha256": _digest(text, values)}
    try:
        write_atomically(path, save(values, metadata))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def read_archive(path: str | Path, kind: str, number: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a file that :func:`write_archive` wrote.

    Args:
        path: the path of the file.
        kind: what the file must hold.
        number: the number of the format that this version reads.

    Raises:
        CheckpointError: if there is no such file, it is damaged, or it holds something else.
    """
    try:
        is_file = Path(path).is_file()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not is_file:
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get("pyroflows", "{}")
            header = _header(text)
            _check_kind(path, header, kind, number)
            # Copies have the alignment of other tensors, on which the last bits of products depend.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            is_whole = metadata.get("sha256") == _digest(text, tensors)
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged file the parser may ask torch for anything
        raise CheckpointError(f"{path} is no readable safetensors file: {error}") from error
    if not is_whole:
        raise CheckpointError(f"{path} is damaged: its contents are not those that were written")
    return header, tensors


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def decoding(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while the contents of a file are decoded into a :class:`CheckpointError`.

    A checksum that is right says that the contents are those that were written, not that they make sense.

    Args:
        path: the path of the file.

    Example:
        >>> with decoding("posterior.safetensors"):
        ...     {}["flow"]
        Traceback (most recent call last):
        pyroflows.errors.CheckpointError: posterior.safetensors cannot be read: KeyError('flow')
    """
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if str(path) in text else f"{path} cannot be read: {text}") from error
    except Exception as error:  # values of another type, or of another size, may raise anything
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def _check_kind(path: str | Path, header: Mapping[str, Any], kind: str, number: int) -> None:
    if header.get("kind") != kind or not isinstance(header.get("format"), int):
        found = f": it holds a {header['kind']}" if "kind" in header else ""
        raise CheckpointError(f"{path} holds no {kind} of pyroflows{found}")
    if header["format"] != number:
        raise CheckpointError(
            f"{path} has format {header['format']} of version {header.get('pyroflows')} of pyroflows, but version "
            f"{version('pyroflows')}, which is installed, reads format {number}: install the version that wrote it"
        )


def _header(text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):  # also of a number with more digits than Python converts
        return {}
    return header if isinstance(header, dict) else {}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the header and of the names, dtypes, shapes and values of the tensors."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
