"""The linear regressions.

Predictors are used as they are stored, neither centred nor scaled (but for diamonds, whose model centres them). Data
are one event rather than a plate, so that the means of all draws are one matrix product: ``(..., D) @ (D, N)``.
"""

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor

Data = dict[str, Tensor]
REAL_LINE, POSITIVE = constraints.real, constraints.positive


def flat(name: str, support: constraints.Constraint, *shape: int) -> Tensor:
    """A site with constant density on the support."""
    independent = constraints.independent(support, len(shape)) if shape else support
    return pyro.sample(name, dist.ImproperUniform(independent, (), shape))


def observe(y: Tensor, mean: Tensor, sigma: Tensor) -> None:
    pyro.sample("y", dist.Normal(mean, sigma[..., None]).to_event(1), obs=y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    beta = flat("beta", REAL_LINE, x.shape[1])
    sigma = flat("sigma", POSITIVE)
    observe(y, beta @ x.T, sigma)


def kidscore_interaction(x: Tensor, y: Tensor) -> None:
    beta = flat("beta", REAL_LINE, x.shape[1])
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    observe(y, beta @ x.T, sigma)


def blr(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([x.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    observe(y, beta @ x.T, sigma)


def kilpisjarvi(x: Tensor, y: Tensor, prior: Data) -> None:
    alpha = pyro.sample("alpha", dist.Normal(prior["pmualpha"], prior["psalpha"]))
    beta = pyro.sample("beta", dist.Normal(prior["pmubeta"], prior["psbeta"]))
    sigma = flat("sigma", POSITIVE)
    observe(y, alpha[..., None] + beta[..., None] * x, sigma)


def diamonds(centered: Tensor, y: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([centered.shape[1]]).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = flat("sigma", POSITIVE)
    pyro.factor("sigma_prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma))
    observe(y, intercept[..., None] + b @ centered.T, sigma)


def design(*columns: Tensor) -> Tensor:
    """A column of ones and the columns, ``(N, 1 + D)``."""
    return torch.stack([torch.ones_like(columns[0]), *columns], -1)


def nes_args(data: Data) -> tuple[Tensor, Tensor]:
    groups = [(data["age_discrete"] == k).to(data["income"]) for k in (2, 3, 4)]
    x = design(data["real_ideo"], data["race_adj"], *groups, data["educ1"], data["gender"], data["income"])
    return x, data["partyid7"]


def mesquite_args(data: Data) -> tuple[Tensor, Tensor]:
    diam1, diam2, height = (data[name].log() for name in ("diam1", "diam2", "canopy_height"))
    x = design(diam1 + diam2 + height, diam1 + diam2, diam1 - diam2, data["total_height"].log(), data["group"])
    return x, data["weight"].log()


def kidscore_args(data: Data) -> tuple[Tensor, Tensor]:
    return design(data["mom_hs"], data["mom_iq"], data["mom_hs"] * data["mom_iq"]), data["kid_score"]


def logearn_args(data: Data) -> tuple[Tensor, Tensor]:
    return design(data["height"], data["male"], data["height"] * data["male"]), data["earn"].log()


def diamonds_args(data: Data) -> tuple[Tensor, Tensor]:
    x = data["X"][:, 1:]
    return x - x.mean(0), data["Y"]
