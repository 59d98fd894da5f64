"""Hamiltonian Monte Carlo, many chains in one batch."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyroflows.errors import ModelError
from pyroflows.models.log_joint import ValueAndGrad

TARGET_ACCEPTANCE = 0.8
# Of a trajectory in a standard normal: positions at its end are independent of those at its start.
QUARTER_PERIOD = math.pi / 2
MAX_LEAPFROG_STEPS = 256
MIN_INSIDE = 0.1
DIVERGENCE = 1000.0  # an energy error that no rounding explains
# Of the warm-up; at each end the scales become those of the draws of the window.
WINDOW_ENDS = (0.1, 0.2, 0.4, 0.8)
MAX_STARTS = 100


class State(NamedTuple):
    """Where the chains are: base values ``(C, D)``, their log densities ``(C,)`` and gradients ``(C, D)``."""

    z: Tensor
    log_density: Tensor
    gradient: Tensor

    def moved(self, accepted: Tensor, proposal: "State") -> "State":
        """With the proposal in those chains that accept it."""
        return State(
            torch.where(accepted[:, None], proposal.z, self.z),
            torch.where(accepted, proposal.log_density, self.log_density),
            torch.where(accepted[:, None], proposal.gradient, self.gradient),
        )


class TrajectoryEnd(NamedTuple):
    """The end of a trajectory: its state, whitened momentum ``(C, D)``, and acceptance probability ``(C,)``."""

    state: State
    momentum: Tensor
    accept_prob: Tensor
    is_diverging: Tensor


class BaseChains(NamedTuple):
    """Draws in the base space ``(C, N, D)``, and what is known of each draw, ``(C, N)``."""

    z: Tensor
    stats: dict[str, Tensor]


# A further move after each trajectory, given the scales of the target: the new state and its acceptance probability.
Move = Callable[[State, "Tuner"], tuple[State, Tensor]]


def run_hmc(
    value_and_grad: ValueAndGrad,
    base: Distribution,
    num_samples: int,
    num_chains: int,
    num_warmup: int,
    progress_bar: bool = True,
    move: Move | None = None,
) -> BaseChains:
    """Chains that start at draws from the base.

    Args:
        value_and_grad: of the target's log density.
        base: of the flow.
        num_samples: kept draws of each chain.
        num_chains: number of chains.
        num_warmup: iterations before, in which the sampler is tuned.
        progress_bar: whether to show one.
        move: made after each trajectory.
    """
    state = start(value_and_grad, base, num_chains)
    tuner = Tuner(state.z, num_warmup)
    z = state.z.new_empty((num_chains, num_samples, state.z.shape[1]))
    stats = {name: state.log_density.new_empty((num_chains, num_samples)) for name in ("lp", "acceptance_rate")}
    stats["diverging"] = torch.zeros((num_chains, num_samples), dtype=torch.bool)
    if move is not None:
        stats["flow_acceptance_rate"] = torch.empty_like(stats["lp"])
    with tqdm(total=num_warmup + num_samples, disable=not progress_bar, unit="draw") as bar:
        for iteration in range(num_warmup + num_samples):
            jitter = 0.5 + van_der_corput(iteration)
            proposal = trajectory(value_and_grad, state, *tuner.steps(jitter), tuner.scale)
            before = state
            state = state.moved(torch.rand_like(proposal.accept_prob) < proposal.accept_prob, proposal.state)
            if move is not None:
                state, flow_accept_prob = move(state, tuner)
            draw = iteration - num_warmup
            if draw < 0:
                tuner.update(iteration, before, proposal, jitter, state)
            else:
                z[:, draw] = state.z
                stats["lp"][:, draw] = state.log_density
                stats["acceptance_rate"][:, draw] = proposal.accept_prob
                stats["diverging"][:, draw] = proposal.is_diverging
                if move is not None:
                    stats["flow_acceptance_rate"][:, draw] = flow_accept_prob
            bar.update()
            if iteration % 10 == 0:
                status = {"acceptance": f"{proposal.accept_prob.mean():.2f}", "step size": f"{tuner.step_size:.2g}"}
                bar.set_postfix({"stage": "warm-up" if draw < 0 else "sampling", **status}, refresh=False)
    return BaseChains(z, stats)


def start(value_and_grad: ValueAndGrad, base: Distribution, num_chains: int) -> State:
    """Draws from the base where the target is positive.

    Raises:
        ModelError: if a hundred times as many draws as there are chains do not find so many.
    """
    parts: list[State] = []
    num_found = 0
    for _ in range(MAX_STARTS):
        z = base.sample((num_chains,))
        state = State(z, *value_and_grad(z))
        is_good = state.log_density > -torch.inf
        parts.append(State(*(tensor[is_good] for tensor in state)))
        num_found += int(is_good.sum())
        if num_found >= num_chains:
            return State(*(torch.cat(tensors)[:num_chains] for tensors in zip(*parts, strict=True)))
    raise ModelError(
        f"the log joint is finite at only {num_found} of {MAX_STARTS * num_chains} draws from the flow, too few to "
        f"start {num_chains} chains: train the flow for longer, or look for what makes the model's density NaN"
    )


def trajectory(
    value_and_grad: ValueAndGrad, state: State, step_size: float, num_steps: int, scale: Tensor
) -> TrajectoryEnd:
    r"""Leapfrog steps from a momentum :math:`r \sim N(0, I)`, in the coordinates :math:`z / \mathrm{scale}`.

    Each is :math:`r \mathrel{+}= \frac\epsilon2 s \odot g(z)`, :math:`z \mathrel{+}= \epsilon s \odot r`,
    :math:`r \mathrel{+}= \frac\epsilon2 s \odot g(z)`, g the gradient of the log density; the end is accepted with
    probability :math:`\min(1, e^{H_0 - H_1})`, :math:`H = \frac12 |r|^2 - \log p(z)`. Scales s are the same as a
    diagonal mass matrix :math:`s^{-2}`.
    """
    r = torch.randn_like(state.z)
    energy = 0.5 * r.square().sum(-1) - state.log_density
    z, log_density, gradient = state
    step = step_size * scale
    r = r + 0.5 * step * gradient
    for i in range(num_steps):
        z = z + step * r
        log_density, gradient = value_and_grad(z)
        r = r + (0.5 if i == num_steps - 1 else 1.0) * step * gradient
    log_ratio = energy - (0.5 * r.square().sum(-1) - log_density)
    # NaN where a trajectory has left the numbers: no step to it.
    log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)
    accept_prob = log_ratio.clamp(max=0.0).exp()
    return TrajectoryEnd(State(z, log_density, gradient), r, accept_prob, log_ratio < -DIVERGENCE)


def van_der_corput(n: int) -> float:
    """The n-th number of the sequence 1/2, 1/4, 3/4, 1/8, ..., which fills (0, 1) evenly: n + 1, its bits mirrored."""
    value, weight, n = 0.0, 0.5, n + 1
    while n:
        value, n, weight = value + weight * (n & 1), n >> 1, weight / 2
    return value


class Tuner:
    """What HMC learns in warm-up from all chains at once: scales, step size and trajectory length.

    Attributes:
        loc: mean of each component ``(D,)``.
        scale: standard deviation of each component ``(D,)``.
        step_size: the largest of leapfrog, in units of the scales.
        mean_trajectory: in the same units.
    """

    def __init__(self, z: Tensor, num_warmup: int) -> None:
        self.loc = torch.zeros_like(z[0])
        self.scale = torch.ones_like(z[0])
        self.mean_trajectory = QUARTER_PERIOD
        self._num_warmup = num_warmup
        self._ends = {int(end * num_warmup) - 1 for end in WINDOW_ENDS}
        self._window = Moments(z.shape[1])
        # The largest step with a good acceptance falls as D^(-1/4) (Beskos et al. 2013, arXiv:1001.4460).
        self._averaging = DualAveraging(z.shape[1] ** -0.25)
        self._chees = Chees()

    @property
    def step_size(self) -> float:
        return self._averaging.step_size

    def steps(self, jitter: float) -> tuple[float, int]:
        """Size and number of leapfrog steps of a trajectory that has ``jitter`` times the mean length."""
        length = jitter * self.mean_trajectory
        num_steps = math.ceil(length / self.step_size)
        # Steps are shortened so that the length is met, unless there would be too many of them.
        return (
            (length / num_steps, num_steps) if num_steps <= MAX_LEAPFROG_STEPS else (self.step_size, MAX_LEAPFROG_STEPS)
        )

    def update(self, iteration: int, before: State, proposal: TrajectoryEnd, jitter: float, after: State) -> None:
        """Learn from one iteration of warm-up, the last of which fixes everything."""
        self._averaging.update(_acceptance_by_step_size(proposal))
        self.mean_trajectory = self._chees.update(
            before.z / self.scale, proposal.state.z / self.scale, proposal.momentum, proposal.accept_prob, jitter
        )
        self._window.update(after.z)
        if iteration in self._ends:
            self.loc, self.scale = (value.to(self.scale) for value in self._window.loc_and_scale())
            self._window = Moments(len(self.scale))
            self._averaging = DualAveraging(self._averaging.average)
        if iteration == self._num_warmup - 1:
            self._averaging.step_size = self._averaging.average


def _acceptance_by_step_size(proposal: TrajectoryEnd) -> float:
    """Mean acceptance probability, of those trajectories for which the step size matters.

    A trajectory that ends where the density is zero or NaN is rejected however small its steps are, and steps that fell
    without end would not help it. If next to none ends elsewhere, the steps are to blame after all.
    """
    is_inside = proposal.state.log_density > -torch.inf
    return proposal.accept_prob[is_inside].mean().item() if is_inside.double().mean() >= MIN_INSIDE else 0.0


class Moments:
    """Running mean and standard deviation of each component, over chains and iterations."""

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._sum_of_squares = torch.zeros(dim, dtype=torch.float64)

    def update(self, z: Tensor) -> None:
        z = z.double().cpu()
        self._count += len(z)
        self._sum += z.sum(0)
        self._sum_of_squares += z.square().sum(0)

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """With a little of the standard normal that the flow aims at, as if ten draws of it were among them."""
        mean = self._sum / self._count
        variance = (self._sum_of_squares / self._count - mean.square()).clamp(min=0.0)
        return mean, ((self._count * variance + 10) / (self._count + 10)).sqrt()


class DualAveraging:
    r"""Step size for a mean acceptance probability (Hoffman and Gelman 2014, arXiv:1111.4246, section 3.2).

    .. math:: \log\epsilon_{t+1} = \mu - \frac{\sqrt t}{\gamma (t + t_0)} \sum_{i=1}^t (\delta - \alpha_i)

    With :math:`\mu = \log 2 \epsilon_1`: larger steps are tried first, since they are cheaper. Of the paper's 10 the
    first steps would be unstable: the start is a good guess here.
    """

    def __init__(self, step_size: float, gamma: float = 0.05, t0: float = 10.0, kappa: float = 0.75) -> None:
        self.step_size = step_size
        self._mu = math.log(2 * step_size)
        self._gamma, self._t0, self._kappa = gamma, t0, kappa
        self._t = 0
        self._mean_error = 0.0
        self._log_average = math.log(step_size)

    @property
    def average(self) -> float:
        """Of the step sizes, weighted towards the last, which is what to sample with."""
        return math.exp(self._log_average)

    def update(self, accept_prob: float) -> None:
        self._t += 1
        t = self._t
        self._mean_error += (TARGET_ACCEPTANCE - accept_prob - self._mean_error) / (t + self._t0)
        log_step = self._mu - math.sqrt(t) / self._gamma * self._mean_error
        weight = t**-self._kappa
        self._log_average += weight * (log_step - self._log_average)
        self.step_size = math.exp(log_step)


class Chees:
    r"""Mean length of trajectories, by gradient ascent on the change of the squared radius they make.

    .. math:: \tfrac14 E\left[\left(|w' - E w'|^2 - |w - E w|^2\right)^2\right]

    w and w' are whitened positions at both ends of a trajectory, the expectations are over chains and weighted by
    acceptance probabilities (Hoffman, Radul and Sountsov 2021, AISTATS 130, section 3). It never falls below a quarter
    of a period of a standard normal, where means are estimated best if the flow is good.
    """

    def __init__(self) -> None:
        self._log_length = torch.tensor(math.log(QUARTER_PERIOD), dtype=torch.float64, requires_grad=True)
        self._adam = torch.optim.Adam([self._log_length], lr=0.025, betas=(0.0, 0.95), maximize=True)

    def update(self, start: Tensor, end: Tensor, momentum: Tensor, accept_prob: Tensor, jitter: float) -> float:
        """The new mean length, from one trajectory of each chain."""
        weight = torch.where(accept_prob > 1e-4, accept_prob, 0.0)[:, None]
        if not weight.any():
            return self._log_length.exp().item()
        end, momentum = torch.where(weight > 0, end, 0.0), torch.where(weight > 0, momentum, 0.0)
        start = start - start.mean(0)
        end = end - (weight * end).sum(0) / weight.sum()
        change = end.square().sum(-1) - start.square().sum(-1)
        slope = jitter * change * (end * momentum).sum(-1)
        self._log_length.grad = ((weight[:, 0] * slope).sum() / weight.sum()).double().cpu()
        self._adam.step()
        self._log_length.data.clamp_(min=math.log(QUARTER_PERIOD))
        return self._log_length.exp().item()
