"""Damaged and nonsensical files: each is refused by a CheckpointError, or gives what was saved."""

import copy
import json
import math
import os
import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors import safe_open
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.archive import write_archive
from pyroflows.guides import AutoPlanar
from pyroflows.inference.search.starts import Starts
from pyroflows.training.history import History

Y = torch.tensor([1.0, 2.0, 2.5])
KINDS = ("posterior", "posterior without data", "flow", "amortised fit")
NUM_RUNS = 60


def model(y=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.Uniform(0.0, 3.0))
    angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
    pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(mean + angle, scale + 0.1), obs=y)


def small_flow(dim, context_dim):
    return pf.flows.MAF(dim, context_dim=context_dim, num_layers=1, hidden_dims=(4,))


def saved(kind, path):
    """Write the file of a kind."""
    if kind == "flow":
        pf.flows.NSF(2, num_layers=1, hidden_dims=(4,), support=constraints.positive).save(path)
    elif kind == "amortised fit":
        options = {"num_simulations": 100, "max_epochs": 1, "compile": "none", "seed": 0, "progress_bar": False}
        pf.fit_amortized(model, flow=small_flow, num_flows=2, **options).save(path)
    else:
        guide = AutoPlanar(model, num_layers=1)
        guide(Y)
        history, starts = History({"elbo": [-3.0, -2.0]}), Starts((-3.0,), (-3.0,), num_starts=2)
        pf.Posterior(model, guide, (Y,), {}, history, starts).save(path)


def loaded(kind, path):
    """Read a file of a kind; give a function that draws from what it holds."""
    if kind == "flow":
        flow = pf.load_flow(path)
        return lambda: [flow().sample((3,))]
    if kind == "amortised fit":
        amortized = pf.load_amortized(path, model)
        return lambda: list(amortized.sample(Y[None], 3).values())
    posterior = pf.load_posterior(path, model, *([] if kind == "posterior without data" else [Y]))
    return lambda: list(posterior.sample(3).values())


@pytest.fixture(autouse=True)
def is_quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def drawn(draw):
    torch.manual_seed(0)
    return draw()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The contents of the files by kind, and draws from what they hold."""
    folder = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        saved(kind, folder / kind)
    return {kind: ((folder / kind).read_bytes(), drawn(loaded(kind, folder / kind))) for kind in KINDS}


def damaged(contents, generator):
    """Damage a file at random, in its header as often as elsewhere."""
    altered, size = bytearray(contents), len(contents)
    header = 8 + int.from_bytes(contents[:8], "little")
    place = generator.randrange(generator.choice([header, size]))
    length = generator.randrange(1, 20)
    how = generator.choice(["flip", "overwrite", "cut", "insert", "delete", "length", "text", "swap", "repeat"])
    if how == "flip":
        altered[place] ^= 1 << generator.randrange(8)
    elif how == "overwrite":
        altered[place : place + length] = generator.randbytes(length)
    elif how == "cut":
        del altered[place:]
    elif how == "insert":
        altered[place:place] = generator.randbytes(length)
    elif how == "delete":
        del altered[place : place + length]
    elif how == "length":
        lengths = [0, 1, 10**8, 2**63, 2**64 - 1, size, size - 8, generator.randrange(size)]
        altered[:8] = generator.choice(lengths).to_bytes(8, "little")
    elif how == "text":
        place = generator.randrange(8, header)
        altered[place : place + 1] = generator.choice([b"0", b"9", b"}", b'"', b" ", b"e9", b"[", b"\\", b"\xff"])
    elif how == "swap":
        other = generator.randrange(size)
        part = altered[place : place + length]
        altered[place : place + length] = altered[other : other + length]
        altered[other : other + length] = part
    else:
        altered[place:place] = altered[place : place + 64]
    return bytes(altered)


def check_damaged(kind, files, path, seeds):
    contents, right = files[kind]
    for seed in seeds:
        path.write_bytes(damaged(contents, random.Random(seed)))
        try:
            draw = loaded(kind, path)
        except pf.CheckpointError:
            continue
        assert all(torch.equal(a, b) for a, b in zip(drawn(draw), right, strict=True)), seed


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_gives_what_was_saved(kind, files, tmp_path):
    check_damaged(kind, files, tmp_path / "damaged", range(NUM_RUNS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_damaged_files(kind, files, tmp_path):
    check_damaged(kind, files, tmp_path / "damaged", range(NUM_RUNS, NUM_RUNS + 1000))


# Files whose checksums are right, but whose headers are not those of what they are said to hold

NONSENSE = [None, True, -1, 10**12, 10**30, 1.5, math.nan, math.inf, "x", "", [], {}, [1], [[-5]]]
NONSENSE += [{"class": "os:system", "has": {}}, {"tensor": "x"}, {"size": [-1]}, {"constraint": "real"}, {"dict": {}}]


def places(value, path=()):
    """The paths of all values in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def parts_of_file(path):
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pyroflows"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header["pyroflows"]
    return header.pop("kind"), header.pop("format"), header, tensors


def nonsensical(header, tensors, paths, generator):
    """Change one value of a header, or take it or a tensor away."""
    header, tensors = copy.deepcopy(header), dict(tensors)
    how = generator.choice(["delete", "replace", "replace", "tensor"])
    if how == "tensor":
        name = generator.choice(list(tensors))
        other = generator.choice([None, torch.zeros(0), torch.zeros(*tensors[name].shape, 2)])
        del tensors[name]
        return header, tensors if other is None else {**tensors, name: other}
    *path, last = generator.choice(paths)
    owner = header
    for key in path:
        owner = owner[key]
    if how == "delete":
        del owner[last]
    else:
        owner[last] = generator.choice(NONSENSE)
    return header, tensors


def check_nonsensical(kind, files, path, seeds):
    path.write_bytes(files[kind][0])
    of_kind, number, header, tensors = parts_of_file(path)
    paths = list(places(header))
    for seed in seeds:
        write_archive(path, of_kind, number, *nonsensical(header, tensors, paths, random.Random(seed)))
        try:
            draw = loaded(kind, path)
        except pf.CheckpointError:
            continue
        # What the change does not touch is there.
        draw()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nonsensical_header_is_refused(kind, files, tmp_path):
    check_nonsensical(kind, files, tmp_path / "nonsense", range(NUM_RUNS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_nonsensical_headers(kind, files, tmp_path):
    check_nonsensical(kind, files, tmp_path / "nonsense", range(NUM_RUNS, NUM_RUNS + 1000))


KEYS = {
    "posterior": ("recipe", "sites", "latents", "data", "starts", "dtype", "verdict"),
    "flow": ("flow",),
    "amortised fit": ("parts", "sites", "latents", "own_embeddings", "num_simulations", "num_left_out"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KEYS.items() for name in names])
def test_a_header_without_a_key_is_refused(kind, name, files, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(files[kind][0])
    of_kind, number, header, tensors = parts_of_file(path)
    del header[name]
    write_archive(path, of_kind, number, header, tensors)
    with pytest.raises(pf.CheckpointError, match=f"{path} cannot be read: KeyError"):
        loaded(kind, path)


@pytest.mark.parametrize("kind", ["posterior", "amortised fit"])
def test_a_newer_format_is_refused(kind, files, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(files[kind][0])
    of_kind, number, header, tensors = parts_of_file(path)
    write_archive(path, of_kind, number + 1, header, tensors)
    with pytest.raises(pf.CheckpointError, match=f"has format {number + 1} of .*reads format {number}: install"):
        loaded(kind, path)


@pytest.mark.parametrize("name", ["num_layers", "num_components", "dim"])
def test_a_flow_that_is_said_to_be_huge_is_not_made(name, files, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(files["posterior"][0])
    of_kind, number, header, tensors = parts_of_file(path)
    state = pf.flows.facts.json_from_tensor(tensors["flow._extra_state"])
    if name == "num_layers":
        header["recipe"]["options"][name] = state["recipe"]["options"][name] = 10**12
    else:
        state[name] = 10**12
    tensors["flow._extra_state"] = pf.flows.facts.json_to_tensor(state)
    write_archive(path, of_kind, number, header, tensors)
    with pytest.raises(pf.CheckpointError, match="more than the .* numbers that it holds"):
        loaded("posterior", path)
