"""Metropolis proposals from the flow, between trajectories of Hamiltonian Monte Carlo."""

from functools import partial

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import Distribution

from pyroflows.inference.mcmc.hmc import BaseChains, State, Tuner, run_hmc
from pyroflows.models.log_joint import ValueAndGrad

DEFENSIVE_WEIGHT = 0.1
DEFENSIVE_DF = 5.0


class DefensiveMixture:
    r"""The base mixed with a distribution of heavier tails, :math:`0.9\, q(z) + 0.1\, t_5(z; m, s)`.

    A chain in a region where q is too small would stay there for long, since its weight :math:`p / q` is large. The
    second part, a multivariate Student-t at the location and scales of the target, keeps the weights bounded there.

    Args:
        base: the base distribution q of the flow.
        loc: the location m of the target, ``(D,)``.
        scale: the scales s of the target, positive, ``(D,)``.
    """

    def __init__(self, base: Distribution, loc: Tensor, scale: Tensor) -> None:
        self._base = base
        self._wide = dist.MultivariateStudentT(loc.new_tensor(DEFENSIVE_DF), loc, torch.diag(scale))

    def sample(self, num_draws: int) -> Tensor:
        """Draw values ``(num_draws, D)``."""
        shape = torch.Size([num_draws])
        wide = self._wide.sample(shape)
        is_wide = torch.rand_like(wide[:, :1]) < DEFENSIVE_WEIGHT
        return torch.where(is_wide, wide, self._base.sample(shape))

    def log_prob(self, z: Tensor) -> Tensor:
        """The log-density of the mixture at z, ``(S, D)`` to ``(S,)``."""
        base = torch.tensor(1 - DEFENSIVE_WEIGHT).log() + self._base.log_prob(z)
        return torch.logaddexp(base, torch.tensor(DEFENSIVE_WEIGHT).log() + self._wide.log_prob(z))


def independent_move(
    value_and_grad: ValueAndGrad, base: Distribution, state: State, tuner: Tuner
) -> tuple[State, Tensor]:
    r"""Make a Metropolis step with proposals z' from a mixture q that does not depend on z.

    A proposal is accepted with probability :math:`\min(1, \frac{p(z') q(z)}{p(z) q(z')})`.

    Returns:
        The new state, and the acceptance probabilities ``(C,)``.
    """
    mixture = DefensiveMixture(base, tuner.loc, tuner.scale)
    z = mixture.sample(len(state.z))
    proposal = State(z, *value_and_grad(z))
    log_ratio = proposal.log_density - state.log_density + mixture.log_prob(state.z) - mixture.log_prob(z)
    accept_prob = log_ratio.clamp(max=0.0).exp()
    return state.moved(torch.rand_like(accept_prob) < accept_prob, proposal), accept_prob


def run_independence(
    value_and_grad: ValueAndGrad,
    base: Distribution,
    num_samples: int,
    num_chains: int,
    num_warmup: int,
    progress_bar: bool = True,
) -> BaseChains:
    """Run chains as :func:`run_hmc` does, with a proposal from the flow after each trajectory.

    The proposals reach regions that trajectories do not, such as other modes; the trajectories move chains away from
    points where the density of the flow is so small that no proposal is accepted.
    """
    move = partial(independent_move, value_and_grad, base)
    return run_hmc(value_and_grad, base, num_samples, num_chains, num_warmup, progress_bar, move)
