"""The models are those of the references: by Stein's identities over reference draws, and by a plain formula.

For a density p and draws w of it, the score s = grad log p(w) satisfies E[s] = 0 and E[w s^T] = -I. In whitened
unconstrained coordinates each entry is estimated with a standard error, from which it must not be far.
"""

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.posteriordb import reference
from benchmarks.posteriordb.models import TARGETS
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.structure import describe

FOLDER = os.environ.get("PYROFLOWS_POSTERIORDB")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="PYROFLOWS_POSTERIORDB does not name a folder of posteriors")

NUM_DRAWS = 2000
# Some 1400 entries are looked at, the largest of which is about 3.4 standard errors off by chance.
MAX_STANDARD_ERRORS = 4.5
GAUSSIAN_PROCESS = "gp_pois_regr-gp_pois_regr"

# Latent sites that references do not hold, from those that they do.
LATENTS = {
    "theta_trans": lambda ref: (ref["theta"] - ref["mu"][:, None]) / ref["tau"][:, None],
    "share": lambda ref: ref["beta1"] / (1 - ref["alpha1"]),
    "f_tilde": lambda ref: torch.randn(ref["f"].shape, dtype=torch.float64),
}


def log_joint_and_draws(name):
    """The log joint, the arguments, and reference draws by site; in float64 whatever the target's dtype."""
    target, ref = replace(TARGETS[name], dtype=torch.float64), reference.load(Path(FOLDER), name)
    args = target.args(ref.data)
    thin = len(next(iter(ref.draws.values()))) // NUM_DRAWS
    draws = {k: torch.from_numpy(v[::thin]) for k, v in ref.draws.items()}
    layout = Layout(describe(target.model, args, {}))
    draws |= {name: LATENTS[name](draws) for name in layout.slices if name not in draws}
    log_joint = LogJoint(target.model, args, {}, layout, layout.unconstrain(draws)[:5])
    return log_joint, args, draws


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", TARGETS)
def test_sites_bear_the_names_and_shapes_of_the_reference_and_broadcast(name):
    log_joint, *_ = log_joint_and_draws(name)
    sites = {s.name: s for s in (*log_joint.structure.latents, *log_joint.structure.deterministic)}
    for key, value in reference.load(Path(FOLDER), name).draws.items():
        assert sites[key].shape == value.shape[1:]
    assert log_joint.batched.mode == "plate"


@pytest.mark.parametrize("name", [name for name in TARGETS if name != GAUSSIAN_PROCESS])
def test_the_score_at_reference_draws_satisfies_steins_identities(name):
    log_joint, _, draws = log_joint_and_draws(name)
    x = log_joint.layout.unconstrain(draws).requires_grad_()
    (score,) = torch.autograd.grad(log_joint(x).sum(), x)
    x = x.detach()
    scale = torch.linalg.cholesky(x.T.cov())
    w = torch.linalg.solve_triangular(scale, (x - x.mean(0)).T, upper=False).T
    products = w[:, :, None] * (score @ scale)[:, None, :]
    assert _standard_errors(score @ scale, torch.zeros(x.shape[1])) < MAX_STANDARD_ERRORS
    assert _standard_errors(products, -torch.eye(x.shape[1])) < MAX_STANDARD_ERRORS


def _standard_errors(samples, expected):
    return ((samples.mean(0) - expected).abs() / samples.std(0) * len(samples) ** 0.5).max()


def test_the_gaussian_process_has_the_density_of_its_latent_function():
    # f_tilde cannot be recovered from a stored f, as the kernel is nearly singular. So: the density of (rho, alpha, f),
    # by SciPy, at functions drawn from the prior, times |df / df_tilde|.
    log_joint, args, draws = log_joint_and_draws(GAUSSIAN_PROCESS)
    x, k = (a.numpy() for a in args)
    draws = {site.name: draws[site.name][:20] for site in log_joint.structure.latents}
    vectors = log_joint.layout.unconstrain(draws)
    values, ladj = log_joint.layout.constrain(vectors)
    found = log_joint(vectors) - ladj
    f = log_joint.batched.in_chunks(values, len(vectors)).values["f"]
    for i in range(len(vectors)):
        rho, alpha = draws["rho"][i].item(), draws["alpha"][i].item()
        kernel = alpha**2 * (np.exp(-0.5 * np.subtract.outer(x, x) ** 2 / rho**2) + 1e-8 * np.eye(len(x)))
        half_log_determinant = 0.5 * np.linalg.slogdet(kernel)[1]
        expected = (
            stats.gamma(25.0, scale=1 / 4.0).logpdf(rho)
            + stats.halfnorm(scale=2.0).logpdf(alpha)
            - 0.5 * f[i].numpy() @ np.linalg.solve(kernel, f[i].numpy())
            - half_log_determinant
            - 0.5 * len(x) * math.log(2 * math.pi)
            + stats.poisson(np.exp(f[i].numpy())).logpmf(k).sum()
            + half_log_determinant
        )
        # The condition number is 1e9.
        assert found[i].item() == pytest.approx(expected, rel=1e-6, abs=1e-5)
