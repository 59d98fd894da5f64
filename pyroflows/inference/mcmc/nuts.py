"""Pyro's No-U-Turn sampler in the base space of a flow: NeuTra (Hoffman et al. 2019, arXiv:1903.03704)."""

import math
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyroflows.inference.mcmc.hmc import MIN_SAMPLES, TARGET_ACCEPTANCE, TOO_FEW, BaseChains, start
from pyroflows.interruption import keeping
from pyroflows.models.log_joint import ValueAndGrad


class _LogDensity(torch.autograd.Function):
    """A log-density for autograd, whose gradient is computed along with its value."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value_and_grad: ValueAndGrad) -> Tensor:
        value, gradient = value_and_grad(z[None])
        ctx.save_for_backward(gradient[0])
        return value[0]

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        return outputs[0] * ctx.saved_tensors[0], None


def run_nuts(
    value_and_grad: ValueAndGrad,
    base: Distribution,
    num_samples: int,
    num_chains: int,
    num_warmup: int,
    progress_bar: bool = True,
) -> BaseChains:
    """Run chains one after the other, each with its own warm-up, that start at draws from the base.

    Pyro gets the target as a potential function, the same that every other method uses. With the model under
    ``NeuTraReparam`` it would run the model's effect handlers in every leapfrog step.
    """
    starts = [start(value_and_grad, base, 1).z[0] for _ in range(num_chains)]

    def potential(params: dict[str, Tensor]) -> Tensor:
        return -_LogDensity.apply(params["z"], value_and_grad)

    # The draws of each chain so far, its mean acceptance, and which draws are divergent.
    draws: list[list[Tensor]] = [[] for _ in starts]
    rates = [math.nan] * num_chains
    divergences: list[list[int]] = [[] for _ in starts]

    def found(_: Any = None) -> BaseChains | None:
        """Return the chains that are as long as the first one."""
        length = len(draws[0])
        if length < MIN_SAMPLES:
            return None
        chains = [chain for chain in range(num_chains) if len(draws[chain]) == length]
        z = torch.stack([torch.stack(draws[chain]) for chain in chains])
        lp = torch.stack([torch.cat([value_and_grad(row[None])[0] for row in rows]) for rows in z])
        is_diverging = torch.zeros(lp.shape, dtype=torch.bool)
        for row, chain in enumerate(chains):
            is_diverging[row, [draw for draw in divergences[chain] if draw < length]] = True
        rate = torch.tensor([rates[chain] for chain in chains])[:, None].expand(lp.shape).clone()
        return BaseChains(z, {"lp": lp, "acceptance_rate": rate, "diverging": is_diverging})

    with (
        keeping("the chains", found, TOO_FEW),
        tqdm(total=num_chains * (num_warmup + num_samples), disable=not progress_bar, unit="draw") as bar,
    ):
        for chain, z in enumerate(starts):

            def after_each(kernel: NUTS, params: dict[str, Tensor], stage: str, _: int, chain: int = chain) -> None:
                # At the end of a run the kernel resets these figures.
                rates[chain] = float(kernel.logging()["acc. prob"])
                if stage.startswith("Sample"):
                    divergences[chain] = kernel.diagnostics()["divergences"]
                    draws[chain].append(params["z"].detach().clone())
                bar.update()

            mcmc = MCMC(
                NUTS(potential_fn=potential, target_accept_prob=TARGET_ACCEPTANCE),
                num_samples,
                num_warmup,
                initial_params={"z": z.clone()},
                hook_fn=after_each,
                disable_progbar=True,
            )
            mcmc.run()
        chains = found()
    assert chains is not None
    return chains
