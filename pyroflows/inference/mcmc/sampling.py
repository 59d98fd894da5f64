"""Run chains on the posterior of a model, in the base space of a flow."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, ReshapeTransform, TransformedDistribution

from pyroflows.errors import OptionError
from pyroflows.flows import Flow
from pyroflows.inference.mcmc.hmc import MIN_SAMPLES, TOO_FEW, BaseChains, run_hmc
from pyroflows.inference.mcmc.independence import run_independence
from pyroflows.inference.mcmc.nuts import run_nuts
from pyroflows.inference.mcmc.steady import SteadyMap
from pyroflows.inference.mcmc.target import where_finite
from pyroflows.interruption import keeping
from pyroflows.models.log_joint import LogJoint
from pyroflows.options import checked_int
from pyroflows.randomness import seeded
from pyroflows.transforms import Compose, FlowTransform
from pyroflows.transforms.foreign import Foreign

METHODS = {"hmc": run_hmc, "nuts": run_nuts, "independence": run_independence}
NUM_CHAINS = {"hmc": 64, "nuts": 4, "independence": 64}


class LatentChains(NamedTuple):
    """Unconstrained draws ``(C, N, D)``, their base values ``(C, N, D)``, and figures ``(C, N)`` by name."""

    latents: Tensor
    z: Tensor
    stats: dict[str, Tensor]


def sample_latents(
    flow: Flow,
    log_joint: LogJoint,
    method: str,
    num_samples: int,
    num_chains: int | None,
    num_warmup: int,
    seed: int | None,
    progress_bar: bool,
) -> LatentChains:
    """Run the chains; see :meth:`pyroflows.Posterior.mcmc`.

    Raises:
        OptionError: for an option outside its range.
        ModelError: if the log joint is finite at too few draws from the flow to start from.
        FitInterrupted: if the chains are interrupted; its ``result`` holds the draws so far.
    """
    if method not in METHODS:
        raise OptionError(f"method must be one of {list(METHODS)}, got {method!r}")
    num_chains = NUM_CHAINS[method] if num_chains is None else num_chains
    num_samples = checked_int("num_samples", num_samples, MIN_SAMPLES)
    num_chains = checked_int("num_chains", num_chains)
    num_warmup = checked_int("num_warmup", num_warmup)
    with seeded(seed):
        base, transform = _of_vectors(flow)
        rows = base.sample((1 if method == "nuts" else num_chains,))
        steady = SteadyMap(transform, base)
        value_and_grad = where_finite(log_joint.value_and_grad(rows, steady, steady.can_be_recorded))
        chains: BaseChains | None = None

        def found(interrupted: BaseChains | None = None) -> LatentChains | None:
            in_base = chains if interrupted is None else interrupted
            return None if in_base is None else _latent(in_base, steady, log_joint.batched.chunk_size)

        with keeping("the chains", found, TOO_FEW):
            chains = METHODS[method](value_and_grad, base, num_samples, num_chains, num_warmup, progress_bar)
            latents = _latent(chains, steady, log_joint.batched.chunk_size)
        steady.check(latents.z.flatten(0, 1))
    return latents


def _latent(chains: BaseChains, steady: SteadyMap, chunk_size: int) -> LatentChains:
    z, stats = chains
    latents, ladj = _mapped(steady, z.flatten(0, 1), chunk_size)
    # This makes lp the log joint in the unconstrained space, as in the posterior's own ArviZ data.
    lp = stats["lp"] - ladj.reshape(stats["lp"].shape)
    return LatentChains(latents.reshape(z.shape), z, {**stats, "lp": lp})


def _of_vectors(flow: Flow) -> tuple[Distribution, FlowTransform]:
    """The base and the exact transform of a flow, with base values flattened into vectors."""
    base, transform = flow.base(), flow.transform.exact()
    if len(flow.base_shape) == 1:
        return base, transform
    unflatten = ReshapeTransform(torch.Size([flow.dim]), flow.base_shape)
    return TransformedDistribution(base, unflatten.inv), Compose([Foreign(unflatten, flow.dim), transform])


@torch.no_grad()
def _mapped(transform: SteadyMap, z: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    parts = [transform(part) for part in z.split(chunk_size)]
    return torch.cat([x for x, _ in parts]), torch.cat([ladj for _, ladj in parts])
