"""How long fits of models with discrete latents take, beside the same models summed out by hand.

    python -m benchmarks.enumeration --rounds 3

Both are fitted by turns in one process, after a fit of each that is not counted. What is printed is the way in which
each runs, the median of the processor's seconds of a whole fit, the median of the ratios, and by how many standard
errors of their means the two posteriors differ at most.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions.utils import clamp_probs

import pyroflows as pf

torch.manual_seed(0)
PLACES = torch.tensor([-4.0, 0.0, 3.0])
ROWS = PLACES[torch.randint(0, 3, (200,))] + torch.randn(200)
COUNTS = torch.poisson(torch.full((200,), 3.0)) * (torch.rand(200) < 0.7)


def _states(num_steps: int) -> Tensor:
    states, state = [], 0
    for _ in range(num_steps):
        state = state if torch.rand(()) < 0.9 else 1 - state
        states.append(state)
    return torch.tensor(states)


SERIES = 3.0 * _states(100) - 1.5 + torch.randn(100)
ALIVE = torch.cumprod((torch.rand(100, 9) < 0.8).float(), 1)
HISTORIES = torch.cat([torch.ones(100, 1), ALIVE * (torch.rand(100, 9) < 0.5)], 1)


def mixture(by_hand: bool) -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    # The order of the means is known, so that there is one mode.
    mu = pyro.sample("mu", dist.Normal(PLACES, 1.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", len(ROWS)):
        if by_hand:
            pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(mu, sd)), obs=ROWS)
        else:
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], sd), obs=ROWS)


def zero_inflated(by_hand: bool) -> None:
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("row", len(COUNTS)):
        if by_hand:
            pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=COUNTS)
        else:
            is_zero = pyro.sample("is_zero", dist.Bernoulli(gate))
            pyro.sample("y", dist.Poisson(torch.where(is_zero == 1, 1e-30, rate)), obs=COUNTS)


def _transition_and_means() -> tuple[Tensor, Tensor]:
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2) + 4 * torch.eye(2)).to_event(1))
    return transition, pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))


def hidden_markov(by_hand: bool) -> None:
    """By hand the sum goes forward, step by step."""
    transition, mu = _transition_and_means()
    if by_hand:
        alpha = transition[0].log() + dist.Normal(mu, 1.0).log_prob(SERIES[0])
        for y in SERIES[1:]:
            alpha = torch.logsumexp(alpha[:, None] + transition.log(), 0) + dist.Normal(mu, 1.0).log_prob(y)
        pyro.factor("y", torch.logsumexp(alpha, 0))
        return
    z = torch.tensor(0)
    for t in pyro.markov(range(len(SERIES))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=SERIES[t])


def hidden_markov_by_halves(by_hand: bool) -> None:
    """By hand the sum is that of DiscreteHMM, which needs logarithmically many operations."""
    if not by_hand:
        hidden_markov(by_hand)
        return
    transition, mu = _transition_and_means()
    start = torch.tensor([0.0, -torch.inf])
    law = dist.DiscreteHMM(start, transition.log(), dist.Normal(mu, 1.0), duration=len(SERIES))
    pyro.sample("y", law, obs=SERIES)


def capture_recapture(by_hand: bool) -> None:
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
    num_animals, num_times = HISTORIES.shape
    if by_hand:
        last = (HISTORIES * torch.arange(num_times)).argmax(1)
        unseen = [torch.ones_like(phi)]
        for _ in range(num_times - 1):
            unseen.append(1 - phi + phi * (1 - rho) * unseen[-1])
        seen = HISTORIES[:, 1:].sum(1)
        with pyro.plate("animal", num_animals):
            total = last * phi.log() + seen * rho.log() + (last - seen) * torch.log1p(-rho)
            pyro.factor("y", total + torch.stack(unseen)[num_times - 1 - last].log())
        return
    with pyro.plate("animal", num_animals):
        z = torch.ones(num_animals)
        for t in pyro.markov(range(1, num_times)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(clamp_probs(phi * z)))
            pyro.sample(f"y_{t}", dist.Bernoulli(clamp_probs(rho * z)), obs=HISTORIES[:, t])


def fitted(model: Callable[[bool], Any], by_hand: bool) -> tuple[float, pf.Posterior]:
    start = time.process_time()
    posterior = pf.FlowVI(model, seed=0, progress_bar=False).run(by_hand)
    return time.process_time() - start, posterior


def difference(posteriors: list[pf.Posterior]) -> float:
    """The largest difference of the means of all components, in its standard errors."""
    first, second = (posterior.importance_sample(10_000, seed=1) for posterior in posteriors)
    largest = 0.0
    for name in posteriors[1].sample(1):
        means, errors = [], []
        for weighted in (first, second):
            w = weighted.weights.normalized
            x = (
                weighted.draws[name].double().flatten(1)
                if weighted.draws[name].dim() > 1
                else weighted.draws[name].double()[:, None]
            )
            mean = (w[:, None] * x).sum(0)
            means.append(mean)
            errors.append((w[:, None] ** 2 * (x - mean) ** 2).sum(0))
        largest = max(largest, ((means[0] - means[1]).abs() / (errors[0] + errors[1]).sqrt()).max().item())
    return largest


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}\n")
    print("| model | enumerated | by hand | ratio | means differ by |\n|---|---|---|---|---|")
    for model in (mixture, zero_inflated, capture_recapture, hidden_markov, hidden_markov_by_halves):
        posteriors = [fitted(model, by_hand)[1] for by_hand in (False, True)]
        rounds = [[fitted(model, by_hand)[0] for by_hand in (False, True)] for _ in range(options.rounds)]
        enumerated, by_hand = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(first / second for first, second in rounds)
        modes = [posterior.log_joint.batched.mode for posterior in posteriors]
        print(
            f"| {model.__name__.replace('_', ' ')} | {modes[0]}, {enumerated:.1f} s | {modes[1]}, {by_hand:.1f} s "
            f"| {ratio:.2f} | {difference(posteriors):.1f} se |",
            flush=True,
        )
