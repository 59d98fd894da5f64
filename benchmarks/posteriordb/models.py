"""Sixteen posteriors of posteriordb as Pyro models.

Each model is an ordinary Pyro model, written to broadcast under an outer plate. Its sites, ``pyro.deterministic`` ones
included, bear the names of the reference's parameters. Models hold no dtype: they run in torch's default dtype, which
:meth:`Target.args` and all that runs the model must find set to that of the target.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from benchmarks.posteriordb import dynamics, regressions

Model = Callable[..., Any]
Data = dict[str, Tensor]


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gp_pois_regr(x: Tensor, k: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = pyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    distance = (x[:, None] - x) / rho[..., None, None]
    # The jitter stands beside ones, not beside alpha^2: no draw of alpha can make the factorisation fail.
    correlation = torch.exp(-0.5 * distance**2) + 1e-8 * torch.eye(len(x))
    factor = torch.linalg.cholesky(correlation)
    f = pyro.deterministic("f", alpha[..., None] * (factor @ f_tilde[..., None])[..., 0], event_dim=1)
    pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)


def gauss_mix(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=y)


@dataclass(frozen=True)
class Target:
    """A posterior.

    Args:
        model: the Pyro model.
        from_data: its arguments, from the posterior's data.
        dtype: in which it is run. float32 has a relative error of 6e-8 in each of the terms whose sum is the log
            joint; float64 where that shows: thousands of observations, or predictors of which the
            coefficients nearly cancel.
        by_quantiles: the quantities whose mean and sd are set by a few extreme draws.
    """

    model: Model
    from_data: Callable[[Data], tuple[Any, ...]]
    dtype: torch.dtype = torch.float32
    by_quantiles: tuple[str, ...] = ()

    def args(self, data: dict[str, Any]) -> tuple[Any, ...]:
        """The model's arguments from the content of ``data.json``."""
        return self.from_data({k: torch.tensor(v, dtype=self.dtype) for k, v in data.items()})

    @contextmanager
    def default_dtype(self) -> Iterator[None]:
        """Run a block in this target's dtype."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


TARGETS = {
    "eight_schools-eight_schools_noncentered": Target(eight_schools, lambda d: (d["sigma"], d["y"])),
    "arK-arK": Target(dynamics.autoregression, dynamics.autoregression_args),
    "garch-garch11": Target(dynamics.garch, lambda d: (d["y"], d["sigma1"])),
    # float64 for the nearly singular kernel.
    "gp_pois_regr-gp_pois_regr": Target(gp_pois_regr, lambda d: (d["x"], d["k"]), torch.float64),
    "bball_drive_event_0-hmm_drive_0": Target(
        dynamics.hmm_drive, lambda d: (d["alpha"], d["u"], d["v"]), torch.float64
    ),
    "hmm_example-hmm_example": Target(dynamics.hmm_example, lambda d: (d["y"],)),
    "diamonds-diamonds": Target(regressions.diamonds, regressions.diamonds_args, torch.float64),
    "nes1980-nes": Target(regressions.flat_regression, regressions.nes_args, torch.float64),
    "sblrc-blr": Target(regressions.blr, lambda d: (d["X"], d["y"]), torch.float64),
    "mesquite-logmesquite_logvash": Target(regressions.flat_regression, regressions.mesquite_args),
    "kidiq-kidscore_interaction": Target(regressions.kidscore_interaction, regressions.kidscore_args, torch.float64),
    "earnings-logearn_interaction": Target(regressions.flat_regression, regressions.logearn_args, torch.float64),
    "kilpisjarvi_mod-kilpisjarvi": Target(regressions.kilpisjarvi, lambda d: (d["x"], d["y"], d), torch.float64),
    "low_dim_gauss_mix-low_dim_gauss_mix": Target(gauss_mix, lambda d: (d["y"],), torch.float64),
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": Target(
        dynamics.michaelis_menten,
        lambda d: (d["times"], d["D"], d["V"], d["C_hat"]),
        by_quantiles=("K_m", "V_m"),
    ),
    "hudson_lynx_hare-lotka_volterra": Target(dynamics.lotka_volterra, lambda d: (d["ts"], d["y_init"], d["y"])),
}
