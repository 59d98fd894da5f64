"""Pyro's No-U-Turn sampler in the base space of a flow: NeuTra (Hoffman et al. 2019, arXiv:1903.03704)."""

from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyroflows.inference.mcmc.hmc import TARGET_ACCEPTANCE, BaseChains, start
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

    draws = []
    rates = torch.empty((num_chains, num_samples))
    is_diverging = torch.zeros((num_chains, num_samples), dtype=torch.bool)
    with tqdm(total=num_chains * (num_warmup + num_samples), disable=not progress_bar, unit="draw") as bar:
        for chain, z in enumerate(starts):
            mean_acceptance = ""

            def after_each(kernel: NUTS, *_: Any) -> None:
                nonlocal mean_acceptance
                # At the end of a run the kernel resets its mean acceptance.
                mean_acceptance = kernel.logging()["acc. prob"]
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
            draws.append(mcmc.get_samples()["z"])
            rates[chain] = float(mean_acceptance)
            is_diverging[chain, mcmc.diagnostics()["divergences"]["chain 0"]] = True
    log_density = torch.stack([torch.cat([value_and_grad(row[None])[0] for row in z]) for z in draws])
    return BaseChains(torch.stack(draws), {"lp": log_density, "acceptance_rate": rates, "diverging": is_diverging})
