"""A variational autoencoder in plain Pyro with two flows: one is the prior of the code, one its posterior.

The data are the 8 x 8 digits of scikit-learn, whose grey levels from 0 to 16 are binomial given the code z. A spline
flow is the prior of z. A network turns an image into a context, which gives the posterior of z a location and a scale
in each dimension; layers of an inverse autoregressive flow follow (Kingma et al. 2016, arXiv:1606.04934). At first they
are the identity. Pyro's ``SVI`` and ``Trace_ELBO`` train all of it.

Beside it stands a plain autoencoder with equally many parameters: its networks are wider, its prior is the standard
normal law and its posterior has location and scale alone. Both are trained alike, and both keep the state that is best
on validation digits. Noise and temperature, for example, were chosen on the validation digits of one split. Prints the
log-likelihood of test digits by importance sampling from each posterior, and draws reconstructions and samples.

    python examples/vae.py
    python examples/vae.py --num-steps 6000 --seed 1 --output pictures
"""

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, pyro_method
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

import pyroflows as pf

MAX_LEVEL = 16
NUM_TEST, NUM_VALIDATION = 297, 300  # of 1797 digits
NUM_PIXELS = 64
CODE_DIM = 8
CONTEXT_DIM = 32
WIDTH = 72  # of the networks beside the flows; those of the plain autoencoder are as wide as equal size allows
BATCH_SIZE = 200
LEARNING_RATE = 8e-3
WARM_UP = 300  # steps over which prior and posterior of the code come to count in full
NOISE = 1.6  # standard deviation of what is added to the levels that the encoder sees in training
VALIDATE_EVERY = 100  # steps
TEMPERATURE = 1.3  # of draws for importance sampling: standard deviation in the base of the posterior
CHUNK = 500  # draws for all images at once
NUM_SHOWN = 16  # images in a row of the picture
DPI = 120


def network(in_dim: int, width: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, width), nn.ELU(), nn.Linear(width, width), nn.ELU(), nn.Linear(width, out_dim)
    )


class StandardNormal(nn.Module):
    """The plain prior."""

    def forward(self) -> Any:
        return dist.Normal(torch.zeros(CODE_DIM), 1.0).to_event(1)


class VAE(PyroModule):
    """Code z by ``prior()``, then grey levels x by the decoder; z given x by ``posterior(context)``."""

    def __init__(self, prior: nn.Module, posterior: pf.Flow, width: int) -> None:
        super().__init__()
        self.prior, self.posterior = prior, posterior
        self.encoder = network(NUM_PIXELS, width, CONTEXT_DIM)
        self.decoder = network(CODE_DIM, width, NUM_PIXELS)

    @pyro_method
    def model(self, x: Tensor, batch_size: int | None = None, code_weight: float = 1.0) -> None:
        with pyro.plate("images", len(x), batch_size) as index:
            with poutine.scale(scale=code_weight):
                z = pyro.sample("z", self.prior())
            levels = dist.Binomial(MAX_LEVEL, logits=self.decoder(z)).to_event(1)
            pyro.sample("x", levels, obs=x[index])

    @pyro_method
    def guide(self, x: Tensor, batch_size: int | None = None, code_weight: float = 1.0) -> None:
        with pyro.plate("images", len(x), batch_size) as index, poutine.scale(scale=code_weight):
            # Noise keeps the encoder from learning the images by heart.
            noisy = x[index] + NOISE * torch.randn(len(index), NUM_PIXELS)
            pyro.sample("z", self.posterior(self.context(noisy)))

    def context(self, x: Tensor) -> Tensor:
        return self.encoder(2 * x / MAX_LEVEL - 1)

    @torch.no_grad()
    def reconstructions(self, x: Tensor) -> Tensor:
        """The mean levels at one draw of the code from each posterior."""
        return MAX_LEVEL * self.decoder(self.posterior(self.context(x)).sample()).sigmoid()

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """The mean levels at draws of the code from the prior."""
        return MAX_LEVEL * self.decoder(self.prior().sample((count,))).sigmoid()


def with_flows() -> VAE:
    prior = pf.flows.NSF(CODE_DIM, num_layers=2, hidden_dims=(24,))
    iaf = pf.flows.IAF(CODE_DIM, num_layers=2, hidden_dims=(32,), context_dim=CONTEXT_DIM)
    return VAE(prior, pf.Flow([location_and_scale(), *iaf.layers]), WIDTH)


def plain(size: int) -> VAE:
    """The plain autoencoder whose number of parameters is nearest to the size."""

    def of_width(width: int) -> VAE:
        return VAE(StandardNormal(), pf.Flow([location_and_scale()]), width)

    return min(map(of_width, range(WIDTH, 2 * WIDTH)), key=lambda vae: abs(num_parameters(vae) - size))


def location_and_scale() -> pf.transforms.Elementwise:
    return pf.transforms.Elementwise(CODE_DIM, context_dim=CONTEXT_DIM)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def train(vae: VAE, x: Tensor, validation: Tensor, num_steps: int, show_progress: bool) -> int:
    """SVI with a learning rate that falls to a tenth. Keeps the state that is best on validation digits.

    Returns the number of its steps.
    """
    # Pyro keeps parameters by name, and both autoencoders have the same names: as long as its store has those of the
    # first, it does not train the second.
    pyro.clear_param_store()
    # The loss is a sum over all images, so its gradients are large: the default clips nearly all of them.
    decay = 0.1 ** (1 / num_steps)
    optimizer = pyro.optim.ClippedAdam({"lr": LEARNING_RATE, "lrd": decay, "clip_norm": 100.0 * len(x)})
    svi = SVI(vae.model, vae.guide, optimizer, Trace_ELBO())
    best, best_elbo, best_step = vae.state_dict(), -math.inf, 0
    for step in trange(1, num_steps + 1, disable=not show_progress):
        svi.step(x, BATCH_SIZE, min(1.0, step / WARM_UP))
        if step % VALIDATE_EVERY == 0 or step == num_steps:
            elbo = mean_elbo(vae, validation, 10)
            if elbo > best_elbo:
                best, best_elbo, best_step = copy.deepcopy(vae.state_dict()), elbo, step
    vae.load_state_dict(best)
    return best_step


@dataclass
class Scores:
    """Of each image, in nats: the log-likelihood by importance sampling and its standard error; effective draws."""

    log_likelihood: Tensor
    error: Tensor
    effective: Tensor

    def mean_error(self) -> float:
        """The standard error of the mean log-likelihood over images, as far as draws of codes are its cause."""
        return (self.error.square().sum().sqrt() / len(self.error)).item()


def scores(vae: VAE, x: Tensor, num_draws: int) -> Scores:
    r"""Estimate :math:`\log p(x) \approx \log \frac1K \sum_k w_k` with :math:`w_k = p(x, z_k) / q(z_k | x)`.

    In expectation it is below the log-likelihood (Burda et al. 2016, arXiv:1509.00519), by half the squared error at
    first order. The effective draws are :math:`(\sum_k w_k)^2 / \sum_k w_k^2`; where they are few, the error is only
    known to be large.
    """
    chunks = [min(CHUNK, num_draws - start) for start in range(0, num_draws, CHUNK)]
    log_w = torch.cat([log_weights(vae, x, chunk, TEMPERATURE) for chunk in chunks])
    log_likelihood = log_w.logsumexp(0) - math.log(num_draws)
    w = (log_w - log_likelihood).exp()  # of mean 1
    return Scores(log_likelihood, (w.var(0) / num_draws).sqrt(), num_draws**2 / w.square().sum(0))


def mean_elbo(vae: VAE, x: Tensor, num_draws: int) -> float:
    return log_weights(vae, x, num_draws, temperature=1.0).mean().item()


@torch.no_grad()
def log_weights(vae: VAE, x: Tensor, num_draws: int, temperature: float) -> Tensor:
    """The log weights of draws from the posterior of each image, ``(num_draws, len(x))``.

    The proposal is the posterior with the temperature as standard deviation in its base; a wider one has tails that
    are not too light. At temperature 1, their mean estimates the ELBO.
    """
    law = vae.posterior(vae.context(x))
    wide = dist.Normal(torch.zeros(CODE_DIM), temperature).to_event(1)
    base_draws = wide.sample((num_draws, len(x)))
    z, log_q = law.transport(base_draws)
    log_q = log_q - law.base_dist.log_prob(base_draws) + wide.log_prob(base_draws)
    with pyro.plate("draws", num_draws, dim=-2):
        trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    return trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"] - log_q


def tiled(images: Tensor, num_columns: int = NUM_SHOWN) -> Tensor:
    """Images ``(n, 64)`` in rows, with a margin round each."""
    framed = F.pad(images.reshape(-1, num_columns, 8, 8), (1, 1, 1, 1), value=MAX_LEVEL / 2)
    return framed.transpose(1, 2).flatten(2).flatten(0, 1)


def save_picture(vaes: dict[str, VAE], titles: list[str], x: Tensor, path: Path) -> None:
    """Test digits and their reconstructions above, samples below."""
    x = x[:NUM_SHOWN]
    figure = plt.figure(figsize=(9.0, 6.9), layout="constrained")
    panels = figure.subplot_mosaic([["top", "top"], ["left", "right"]], height_ratios=[2, 5])
    above = torch.cat([x, *(vae.reconstructions(x) for vae in vaes.values())])
    panels["top"].set_title("test digits; one reconstruction each: " + ", ".join(vaes))
    show(panels["top"], tiled(above))
    for side, title, vae in zip(("left", "right"), titles, vaes.values(), strict=True):
        panels[side].set_title(title)
        show(panels[side], tiled(vae.samples(64), 8))
    figure.savefig(path, dpi=DPI)


def show(axes: plt.Axes, image: Tensor) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=MAX_LEVEL)
    axes.set_axis_off()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # the tensors are small, and more threads only wait for each other
    pyro.set_rng_seed(args.seed)
    levels = torch.as_tensor(load_digits(return_X_y=True)[0]).float()
    shuffled = levels[torch.randperm(len(levels))]
    x, validation, kept = shuffled.tensor_split([NUM_TEST, NUM_TEST + NUM_VALIDATION])

    flows = with_flows()
    vaes = {"plain": plain(num_parameters(flows)), "flows": flows}
    found, titles = {}, []
    print(f"{len(x)} test digits, {args.num_draws} draws of the code of each; all figures in nats")
    for name, vae in vaes.items():
        start = time.perf_counter()
        best = train(vae, kept, validation, args.num_steps, not args.no_progress_bar)
        seconds = time.perf_counter() - start
        found[name] = scores(vae, x, args.num_draws)
        mean, effective = found[name].log_likelihood.mean(), found[name].effective
        titles.append(f"samples, {name}: log-likelihood {mean:.1f}")
        print(
            f"{name}: {num_parameters(vae)} parameters, best of {args.num_steps} steps at {best}, {seconds:.0f} s\n"
            f"    ELBO {mean_elbo(vae, x, 100):.2f}, log-likelihood {mean:.2f} +- "
            f"{found[name].mean_error():.2f}, the error by draws\n"
            f"    effective draws: {effective.median():.0f} at the median, fewer than 10 for "
            f"{(effective < 10).sum()} digits, whose log-likelihood is rather too low",
            flush=True,
        )
    gain = found["flows"].log_likelihood - found["plain"].log_likelihood
    print(f"gain of the flows: {gain.mean():.2f} +- {gain.std() / math.sqrt(len(x)):.2f}, the error over digits")

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "vae.png"
    save_picture(vaes, titles, x, path)
    print(f"saved {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A variational autoencoder with flows as prior and posterior")
    parser.add_argument("-n", "--num-steps", type=int, default=2000, help="training steps of each (default: 2000)")
    parser.add_argument("--num-draws", type=int, default=3000, help="of the code of a test digit (default: 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers and the data (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder for the picture (default: output)")
    parser.add_argument("--no-progress-bar", action="store_true", help="train silently")
    main(parser.parse_args())
