"""Write amortised fits to safetensors files, and read them; no pickle is involved."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.archive import decoding, part_of, read_archive, write_archive
from pyroflows.errors import CheckpointError, OptionError
from pyroflows.fitting import DensityFit, MatchingFit
from pyroflows.flows import Flow
from pyroflows.flows.encoding import decode, encode
from pyroflows.flows.files import require_sense
from pyroflows.grad_mode import isolated
from pyroflows.inference.amortized.amortized import Amortized
from pyroflows.inference.amortized.data_sites import SiteEmbedding
from pyroflows.inference.amortized.simulated_range import SimulatedRange
from pyroflows.inference.amortized.simulator import Simulator
from pyroflows.models.saved_sites import decode_sites, difference, encode_sites
from pyroflows.models.tracing import Model
from pyroflows.options import kind

FORMAT = 2
KIND = "amortised fit"


def save_amortized(amortized: Amortized, path: str | Path) -> None:
    """Write the fit with its flow, history and figures, the simulated range, and the shapes of latents and data.

    Of an embedding of a class of the user's the file holds the state alone.

    Args:
        amortized: the fit.
        path: the path of the file.

    Raises:
        OptionError: if the flow holds what no file can rebuild, such as a layer of a class of the user's.
        CheckpointError: if the file cannot be written.
    """
    embedders = _embedders(amortized.flow)
    own = {i: embedder.embedding for i, embedder in enumerate(embedders) if not _can_be_rebuilt(embedder.embedding)}
    for module in amortized.flow.modules():
        if isinstance(module, Flow):
            module._places = None  # a cache, which holds the embedding too
    try:
        for i in own:
            embedders[i].embedding = nn.Identity()
        code, tensors = encode({"flow": amortized.flow, "fits": amortized.fits, "simulated": amortized.simulated})
    finally:
        for i, embedding in own.items():
            embedders[i].embedding = embedding
    for i, embedding in own.items():
        tensors |= {f"embedding.{i}.{name}": value for name, value in embedding.state_dict().items()}
    layout = amortized.simulator.layout
    latents, of_latents = encode_sites(layout.structure.latents)
    tensors |= {f"latents.{name}": value for name, value in of_latents.items()}
    tensors |= {f"center.{name}": center for name, center in layout.centers.items()}
    counts = {"num_simulations": amortized.num_simulations, "num_left_out": amortized.num_left_out}
    header = {
        "parts": code,
        "sites": _sites(amortized.simulator),
        "latents": latents,
        "own_embeddings": list(own),
        **counts,
    }
    write_archive(path, KIND, FORMAT, header, tensors)


@isolated
def load_amortized(
    path: str | Path,
    model: Model,
    observed: str | Sequence[str] = "y",
    embedding: nn.Module | None = None,
    *,
    latents: Sequence[str] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Amortized:
    """Read an amortised fit that :meth:`pyroflows.Amortized.save` wrote.

    The file holds the trained flow, not the model. What the posteriors are judged by is the model that is given here.

    Args:
        path: the path of the file.
        model: the Pyro model that was simulated.
        observed: the name of the observed site, or a list of names, as in :func:`pyroflows.fit_amortized`.
        embedding: a module like the embedding of the fit, which gets the saved state, if that was of a class of your
            own; None if the file holds the embedding, or there is none.
        latents: the names of the latents that are inferred; None for all.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.

    Raises:
        CheckpointError: if the file cannot be read, belongs to a model with other latents or data, or needs another
            embedding.
        ModelError: if the model cannot be simulated; names the site.

    Example:
        >>> import tempfile
        >>> def model(y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("N", 3):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> options = {"max_epochs": 2, "seed": 0, "progress_bar": False}
        >>> amortized = pf.fit_amortized(model, num_simulations=200, **options)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     amortized.save(f"{folder}/fit.safetensors")
        ...     loaded = pf.load_amortized(f"{folder}/fit.safetensors", model)
        >>> loaded.posterior([0.5, 1.0, 1.5]).sample(100)["mu"].shape
        torch.Size([100])
    """
    header, tensors = read_archive(path, KIND, FORMAT)
    with decoding(path):
        parts = decode(header["parts"], tensors)
        saved_latents, centers = (
            decode_sites(header["latents"], part_of(tensors, "latents.")),
            part_of(tensors, "center."),
        )
        own_embeddings, sites = list(map(int, header["own_embeddings"])), header["sites"]
        counts = int(header["num_simulations"]), int(header["num_left_out"])
        _require_sense(parts, own_embeddings, sites)
    if own_embeddings:
        _load_embeddings(parts["flow"], embedding, own_embeddings, tensors, path)
    simulator = Simulator.of(model, observed, latents, args, kwargs)
    found = _sites(simulator)
    with decoding(path):
        for part in found:
            # Latents and data are packed in this order.
            if found[part] != sites[part]:
                raise CheckpointError(
                    f"{path} belongs to {part} {_described(sites[part])}, but this model has "
                    f"{_described(found[part])}: give the model, observed, latents and arguments of the fit"
                )
        if saved_latents is not None and (other := difference(saved_latents, simulator.layout.structure.latents)):
            raise CheckpointError(f"{path} belongs to a model {other}")
        for name, center in simulator.layout.centers.items():
            # Draws of the flow stand for angles around the prior's direction.
            if not torch.allclose(center, centers[name], atol=1e-5):
                raise CheckpointError(
                    f"{path} belongs to a model where the prior of '{name}' has another mean direction"
                )
    return Amortized(parts["flow"], parts["fits"], simulator, parts["simulated"], *counts)


def _require_sense(parts: Any, own_embeddings: Sequence[int], sites: Any) -> None:
    """Raise if what was read is no amortised fit, for instance since a part is missing."""
    flow, fits, simulated = parts["flow"], parts["fits"], parts["simulated"]
    is_fit = isinstance(flow, Flow) and all(isinstance(fit, DensityFit | MatchingFit) for fit in fits)
    if not (is_fit and isinstance(simulated, SimulatedRange) and isinstance(fits, tuple) and fits):
        raise CheckpointError("it holds no flow with its fits and the range of the simulations")
    repr(fits)
    embedders = _embedders(flow)
    if not all(0 <= i < len(embedders) for i in own_embeddings):
        raise CheckpointError("it holds states of embeddings that its flow does not have")
    for part in ("latents", "data"):
        _described(sites[part])
    row = simulated.median[None]
    simulated.far_out(row)
    require_sense(flow, None if own_embeddings else row.to(next(flow.parameters())))


def _embedders(flow: Flow) -> list[SiteEmbedding]:
    return [module for module in flow.modules() if isinstance(module, SiteEmbedding)]


def _can_be_rebuilt(embedding: nn.Module) -> bool:
    try:
        encode(embedding)
    except OptionError:
        return False
    return True


def _load_embeddings(
    flow: Flow, embedding: nn.Module | None, places: list[int], tensors: Mapping[str, Tensor], path: str | Path
) -> None:
    """Put the user's embedding, with the saved states, into a flow that was read without it."""
    if not isinstance(embedding, nn.Module):
        raise CheckpointError(
            f"{path} was fitted with an embedding of a class of the user's, whose state alone it holds: give "
            f"embedding= a module that the same code makes, got {kind(embedding)}"
        )
    embedders, dtype = _embedders(flow), next(flow.parameters()).dtype
    for i in places:
        state = part_of(tensors, f"embedding.{i}.")
        embedders[i].embedding = copy.deepcopy(embedding).to(dtype).train(embedders[i].training)
        try:
            embedders[i].embedding.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path} was fitted with another embedding: {error}") from error


def _sites(simulator: Simulator) -> dict[str, list[list[Any]]]:
    """The names and shapes of latents and of data, in the order in which they are packed."""
    return {
        "latents": [[site.name, list(site.shape)] for site in simulator.layout.structure.latents],
        "data": [[name, list(shape)] for name, shape in simulator.data.shapes.items()],
    }


def _described(sites: list[list[Any]]) -> str:
    return ", ".join(f"'{name}' of shape {tuple(shape)}" for name, shape in sites)
