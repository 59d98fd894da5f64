"""Hamiltonian Monte Carlo for many chains in one batch."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyroflows.errors import ModelError
from pyroflows.interruption import keeping
from pyroflows.models.log_joint import ValueAndGrad

MIN_SAMPLES = 4  # R-hat needs as many
TOO_FEW = f"{MIN_SAMPLES} draws of each chain after the warm-up"
TARGET_ACCEPTANCE = 0.8
# In a standard normal the position at the end of a trajectory of this length is independent of that at its start.
QUARTER_PERIOD = math.pi / 2
MAX_LEAPFROG_STEPS = 256
MIN_INSIDE = 0.1
DIVERGENCE = 1000.0  # an energy error too large for rounding to explain
# Fractions of the warm-up, at which windows end; the scales then become those of the draws in the window.
WINDOW_ENDS = (0.1, 0.2, 0.4, 0.8)
MAX_STARTS = 100


class State(NamedTuple):
    """The positions z of the chains ``(C, D)``, with log-densities ``(C,)`` and gradients ``(C, D)``."""

    z: Tensor
    log_density: Tensor
    gradient: Tensor

    def moved(self, accepted: Tensor, proposal: "State") -> "State":
        """The next state, which is the proposal in those chains that accept it."""
        return State(
            torch.where(accepted[:, None], proposal.z, self.z),
            torch.where(accepted, proposal.log_density, self.log_density),
            torch.where(accepted[:, None], proposal.gradient, self.gradient),
        )


class TrajectoryEnd(NamedTuple):
    """The end of a trajectory: its state, the whitened momentum ``(C, D)``, and whether to accept it, ``(C,)``."""

    state: State
    momentum: Tensor
    accept_prob: Tensor
    is_diverging: Tensor


class BaseChains(NamedTuple):
    """Draws in the base space ``(C, N, D)``, and figures of each draw ``(C, N)`` by name."""

    z: Tensor
    stats: dict[str, Tensor]


# Makes a further move after each trajectory, and gives the new state and the acceptance probability of the move.
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
    """Run chains that start at draws from the base.

    Args:
        value_and_grad: function from ``(C, D)`` to the target's log-densities ``(C,)`` and gradients ``(C, D)``.
        base: the base distribution of the flow.
        num_samples: number of draws that are kept of each chain.
        num_chains: number of chains C.
        num_warmup: number of iterations before the kept draws, in which the sampler is tuned.
        progress_bar: whether to show one.
        move: a further move after each trajectory; None for none.
    """
    state = start(value_and_grad, base, num_chains)
    tuner = Tuner(state.z, num_warmup)
    z = state.z.new_empty((num_chains, num_samples, state.z.shape[1]))
    stats = {name: state.log_density.new_empty((num_chains, num_samples)) for name in ("lp", "acceptance_rate")}
    stats["diverging"] = torch.zeros((num_chains, num_samples), dtype=torch.bool)
    if move is not None:
        stats["flow_acceptance_rate"] = torch.empty_like(stats["lp"])
    num_kept = 0

    def found(_: Any = None) -> BaseChains | None:
        kept = {name: figure[:, :num_kept] for name, figure in stats.items()}
        return BaseChains(z[:, :num_kept], kept) if num_kept >= MIN_SAMPLES else None

    with (
        keeping("the chains", found, TOO_FEW),
        tqdm(total=num_warmup + num_samples, disable=not progress_bar, unit="draw") as bar,
    ):
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
                num_kept = draw + 1
            bar.update()
            if iteration % 10 == 0:
                status = {"acceptance": f"{proposal.accept_prob.mean():.2f}", "step size": f"{tuner.step_size:.2g}"}
                bar.set_postfix({"stage": "warm-up" if draw < 0 else "sampling", **status}, refresh=False)
    return BaseChains(z, stats)


def start(value_and_grad: ValueAndGrad, base: Distribution, num_chains: int) -> State:
    """Start each chain at a draw from the base at which the target is positive.

    Raises:
        ModelError: if a hundred times as many draws as chains do not give enough such starts.
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
    r"""Take leapfrog steps from a momentum :math:`r \sim N(0, I)`, in the coordinates :math:`z / s`.

    A step is :math:`r \mathrel{+}= \frac\epsilon2 s \odot g(z)`, :math:`z \mathrel{+}= \epsilon s \odot r`,
    :math:`r \mathrel{+}= \frac\epsilon2 s \odot g(z)`, where g is the gradient of the log-density. The end is accepted
    with probability :math:`\min(1, e^{H_0 - H_1})`, where :math:`H = \frac12 |r|^2 - \log p(z)`. The scales s have the
    effect of a diagonal mass matrix :math:`s^{-2}`.

    Args:
        value_and_grad: function that gives the log-density and its gradient.
        state: the state at the start.
        step_size: :math:`\epsilon`, positive, in units of the scales.
        num_steps: number of leapfrog steps, at least 1.
        scale: s, positive, ``(D,)``.
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
    # A trajectory that overflowed has energy NaN, and is rejected.
    log_ratio = torch.where(log_ratio.isnan(), -torch.inf, log_ratio)
    accept_prob = log_ratio.clamp(max=0.0).exp()
    return TrajectoryEnd(State(z, log_density, gradient), r, accept_prob, log_ratio < -DIVERGENCE)


def van_der_corput(n: int) -> float:
    """The n-th number of the van der Corput sequence, which fills (0, 1) evenly; it is n + 1 with its bits mirrored.

    Example:
        >>> [van_der_corput(n) for n in range(4)]
        [0.5, 0.25, 0.75, 0.125]
    """
    value, weight, n = 0.0, 0.5, n + 1
    while n:
        value, n, weight = value + weight * (n & 1), n >> 1, weight / 2
    return value


class Tuner:
    """Tunes HMC during warm-up, from all chains at once: scales, step size and trajectory length.

    Args:
        z: the positions at which the chains start, ``(C, D)``.
        num_warmup: number of iterations of warm-up.

    Attributes:
        loc: mean of each component ``(D,)``.
        scale: standard deviation of each component ``(D,)``.
        mean_trajectory: mean length of a trajectory, in units of the scales.
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
        """The largest leapfrog step, in units of the scales."""
        return self._averaging.step_size

    def steps(self, jitter: float) -> tuple[float, int]:
        """The size and the number of leapfrog steps of a trajectory with ``jitter`` times the mean length."""
        length = jitter * self.mean_trajectory
        num_steps = math.ceil(length / self.step_size)
        # Steps are shortened so that they add up to the length, unless there would be too many of them.
        return (
            (length / num_steps, num_steps) if num_steps <= MAX_LEAPFROG_STEPS else (self.step_size, MAX_LEAPFROG_STEPS)
        )

    def update(self, iteration: int, before: State, proposal: TrajectoryEnd, jitter: float, after: State) -> None:
        """Learn from one iteration of warm-up; the last one fixes the step size."""
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
    """Mean acceptance probability of the trajectories that smaller steps could help.

    A trajectory that ends where the density is zero or NaN is left out, since it is rejected however small its steps
    are. If nearly all trajectories end there, the step size is taken as the cause after all.
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
        """Add the positions of all chains, ``(C, D)``."""
        z = z.double().cpu()
        self._count += len(z)
        self._sum += z.sum(0)
        self._sum_of_squares += z.square().sum(0)

    def loc_and_scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation; the variance is shrunk to 1, that of the base, as if by ten draws more."""
        mean = self._sum / self._count
        variance = (self._sum_of_squares / self._count - mean.square()).clamp(min=0.0)
        return mean, ((self._count * variance + 10) / (self._count + 10)).sqrt()


class DualAveraging:
    r"""Step size for a mean acceptance probability (Hoffman and Gelman 2014, arXiv:1111.4246, section 3.2).

    .. math:: \log\epsilon_{t+1} = \mu - \frac{\sqrt t}{\gamma (t + t_0)} \sum_{i=1}^t (\delta - \alpha_i)

    Here :math:`\mu = \log 2 \epsilon_1`, so that larger steps are tried first, which are cheaper. The paper has
    :math:`\log 10 \epsilon_1`, with which the first steps would be unstable, since :math:`\epsilon_1` is a good guess
    here.

    Args:
        step_size: :math:`\epsilon_1`, positive.
        gamma: :math:`\gamma`, positive; the smaller, the larger the adjustments.
        t0: :math:`t_0`, which damps the first adjustments.
        kappa: the exponent by which the weights of earlier steps decay in the average, between 0.5 and 1.
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
        """The average step size, weighted towards the last ones, with which to sample after warm-up."""
        return math.exp(self._log_average)

    def update(self, accept_prob: float) -> None:
        """Adjust the step size by the mean acceptance probability of one iteration."""
        self._t += 1
        t = self._t
        self._mean_error += (TARGET_ACCEPTANCE - accept_prob - self._mean_error) / (t + self._t0)
        log_step = self._mu - math.sqrt(t) / self._gamma * self._mean_error
        weight = t**-self._kappa
        self._log_average += weight * (log_step - self._log_average)
        self.step_size = math.exp(log_step)


class Chees:
    r"""The ChEES criterion, which tunes the mean length of trajectories by gradient ascent.

    .. math:: \tfrac14 E\left[\left(|w' - E w'|^2 - |w - E w|^2\right)^2\right]

    Here w and w' are the whitened positions at both ends of a trajectory, and expectations are over chains, weighted by
    acceptance probabilities (Hoffman, Radul and Sountsov 2021, AISTATS 130, section 3). The length never falls below a
    quarter of the period of a standard normal, at which means are estimated best if the flow is good.
    """

    def __init__(self) -> None:
        self._log_length = torch.tensor(math.log(QUARTER_PERIOD), dtype=torch.float64, requires_grad=True)
        self._adam = torch.optim.Adam([self._log_length], lr=0.025, betas=(0.0, 0.95), maximize=True)

    def update(self, start: Tensor, end: Tensor, momentum: Tensor, accept_prob: Tensor, jitter: float) -> float:
        """Adjust the mean length by one trajectory of each chain, and give the new one.

        Args:
            start: whitened positions at the start, ``(C, D)``.
            end: whitened positions at the end, ``(C, D)``.
            momentum: whitened momenta at the end, ``(C, D)``.
            accept_prob: acceptance probabilities ``(C,)``.
            jitter: the length of these trajectories over the mean length.
        """
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
