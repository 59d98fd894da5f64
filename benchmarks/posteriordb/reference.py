"""Data and reference draws, from a folder in one of two layouts.

- One folder a posterior, with ``data.json`` and ``reference.npz``, whose arrays are ``(chains, draws, *shape)``.
- A checkout of posteriordb (github.com/stan-dev/posteriordb; Magnusson et al. 2024, arXiv:2407.04967), in which
  ``posterior_database/posteriors/NAME.json`` names the files of data and of draws, each a JSON file in a zip archive.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

# "theta", "theta[2]" or "theta[1,2]".
ELEMENT = re.compile(r"(?P<name>[^\[]+)(?:\[(?P<index>[\d,]+)\])?")


@dataclass(frozen=True)
class Reference:
    """A posterior's data, and its reference draws ``(S, *shape)`` by parameter in float64."""

    data: dict[str, Any]
    draws: dict[str, np.ndarray]


def load(folder: Path, name: str) -> Reference:
    """Read a posterior from a folder of either layout."""
    own = folder / name
    if own.is_dir():
        with np.load(own / "reference.npz") as arrays:
            draws = {key: arrays[key].reshape(-1, *arrays[key].shape[2:]).astype(np.float64) for key in arrays}
        return Reference(json.loads((own / "data.json").read_text()), draws)
    database = folder / "posterior_database"
    entry = json.loads((database / "posteriors" / f"{name}.json").read_text())
    data = _read_zip(database / "data" / "data" / f"{entry['data_name']}.json.zip")
    draws_folder = database / "reference_posteriors" / "draws" / "draws"
    chains = _read_zip(draws_folder / f"{entry['reference_posterior_name']}.json.zip")
    elements = {key: np.concatenate([np.asarray(chain[key], np.float64) for chain in chains]) for key in chains[0]}
    return Reference(data, _assembled(elements))


def _read_zip(path: Path) -> Any:
    with ZipFile(path) as archive:
        (member,) = archive.namelist()
        return json.loads(archive.read(member))


def _assembled(elements: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays ``(S, *shape)`` from draws ``(S,)`` by element, whose indices count from 1."""
    parsed: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for key, draws in elements.items():
        match = ELEMENT.fullmatch(key)
        assert match is not None, key
        index = tuple(int(i) - 1 for i in match["index"].split(",")) if match["index"] else ()
        parsed.setdefault(match["name"], {})[index] = draws
    arrays = {}
    for name, parts in parsed.items():
        shape = tuple(max(positions) + 1 for positions in zip(*parts, strict=True))
        arrays[name] = np.empty((len(next(iter(parts.values()))), *shape))
        for index, draws in parts.items():
            arrays[name][(slice(None), *index)] = draws
    return arrays
