"""Bridge sampling, which estimates the evidence from draws of both the flow and the exact posterior."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from pyroflows.errors import warn
from pyroflows.flows import Flow
from pyroflows.inference import arviz
from pyroflows.inference.mcmc.sampling import LatentChains, sample_latents
from pyroflows.interruption import keeping
from pyroflows.models.log_joint import LogJoint
from pyroflows.options import checked_int
from pyroflows.randomness import seeded

MIN_SAMPLES = 1000
MAX_CHAINS = 64
MIN_DRAWS = 100  # a chain, which its autocorrelation needs
MAX_RHAT = 1.1  # many short chains can have 1.05 although they have mixed
NUM_HALVINGS = 80


@dataclass(frozen=True)
class BridgeEstimate:
    """An estimate of the log evidence by bridge sampling; see :meth:`pyroflows.Posterior.bridge_sample`.

    Args:
        log_evidence: the estimate, in nats.
        log_evidence_se: its standard error, in nats.
        num_samples: the number of draws from the posterior.
        ess: the effective sample size of these draws.
        rhat: R-hat of the log weights along the chains; above 1.1 they have not mixed, and the standard error is too
            small.

    Example:
        >>> BridgeEstimate(log_evidence=-3.2, log_evidence_se=0.01, num_samples=10_000, ess=8000.0, rhat=1.002)
        BridgeEstimate(log_evidence=-3.2000 +- 0.0100, ess=8000 of 10000, rhat=1.002)
    """

    log_evidence: float
    log_evidence_se: float
    num_samples: int
    ess: float
    rhat: float

    def __repr__(self) -> str:
        return (
            f"BridgeEstimate(log_evidence={self.log_evidence:.4f} +- {self.log_evidence_se:.4f}, "
            f"ess={self.ess:.0f} of {self.num_samples}, rhat={self.rhat:.3f})"
        )


def bridge_estimate(
    flow: Flow, log_joint: LogJoint, num_samples: int, num_warmup: int, seed: int | None, progress_bar: bool
) -> BridgeEstimate:
    """Run chains, draw from the flow, and bridge between them; see :meth:`pyroflows.Posterior.bridge_sample`.

    The draws that enter the estimate are neither those on which the flow was trained nor those of the warm-up, since
    these would bias it.

    Raises:
        OptionError: for an option outside its range.
        ModelError: if the log joint is finite at too few draws from the flow to start chains from.
        FitInterrupted: if the chains are interrupted; its ``result`` is the estimate by the draws so far, if they are
            at least 100 of each chain, and otherwise None.
    """
    num_samples = checked_int("num_samples", num_samples, MIN_SAMPLES)
    num_chains = min(MAX_CHAINS, num_samples // MIN_DRAWS)
    num_draws = math.ceil(num_samples / num_chains)
    with seeded(seed), torch.no_grad():
        # Trajectories alone do not move between the modes of a mixture.
        method = "hmc" if len(flow.components) == 1 else "independence"
        chains: LatentChains | None = None

        def found(interrupted: LatentChains | None = None) -> BridgeEstimate | None:
            drawn = chains if interrupted is None else interrupted
            return None if drawn is None or drawn.z.shape[1] < MIN_DRAWS else _estimate(flow, log_joint, drawn)

        with keeping("the bridge", found, f"{MIN_DRAWS} draws of each chain after the warm-up"):
            chains = sample_latents(flow, log_joint, method, num_draws, num_chains, num_warmup, None, progress_bar)
            return _estimate(flow, log_joint, chains)


def _estimate(flow: Flow, log_joint: LogJoint, chains: LatentChains) -> BridgeEstimate:
    """Bridge between chains and as many draws from the flow."""
    _, log_q = flow().transport(chains.z.unflatten(-1, flow.base_shape))
    x, log_q_of_flow = flow().rsample_and_log_prob((chains.z.shape[:2].numel(),))
    of_flow = log_joint.in_chunks(x) - log_q_of_flow
    return bridge(_array(chains.stats["lp"] - log_q), _array(of_flow))


def bridge(of_posterior: np.ndarray, of_flow: np.ndarray) -> BridgeEstimate:
    r"""Estimate the log evidence from log weights at draws from the posterior and from q.

    The log weights are :math:`\ell = \log p(x, y) - \log q(x)`. Of :math:`N_1` draws from the posterior with effective
    sample size :math:`n_1`, and :math:`n_2` draws from q, the optimal bridge function of Meng and Wong (1996,
    Statistica Sinica 6) makes the evidence r the solution of

    .. math:: \sum_{i=1}^{n_2} \frac{n_1 e^{\ell_i}}{n_1 e^{\ell_i} + n_2 r} = \frac{n_1}{N_1} \sum_{j=1}^{N_1}
        \frac{n_2 r}{n_1 e^{\ell_j} + n_2 r}

    The standard error is that of Fruehwirth-Schnatter (2004, Econometrics Journal 7), with :math:`f_1 = q / (n_1 p +
    n_2 q)` and :math:`f_2 = p / (n_1 p + n_2 q)`:

    .. math:: \frac{\mathrm{Var}_p f_1}{\mathrm{ESS}(f_1)\, (E_p f_1)^2} + \frac{\mathrm{Var}_q f_2}{n_2\, (E_q f_2)^2}

    Args:
        of_posterior: log weights at the draws of chains, ``(chain, draw)``.
        of_flow: log weights at independent draws from q, ``(S,)``; NaN counts as zero weight.
    """
    of_flow = np.nan_to_num(of_flow, nan=-np.inf, neginf=-np.inf)
    ess = _ess(of_posterior)
    num_flow = len(of_flow)
    offset = math.log(ess / num_flow)
    log_r = _root(of_posterior + offset, of_flow + offset, ess)
    # Up to constants f_1 and f_2 are the probabilities that a draw is from the flow, and from the posterior.
    f_1, f_2 = _sigmoid(log_r - of_posterior - offset), _sigmoid(of_flow + offset - log_r)
    variance = _relative_variance(f_1) / _ess(f_1) + _relative_variance(f_2) / num_flow
    rhat = float(np.nan_to_num(arviz.rhat(of_posterior), nan=1.0, posinf=np.inf))
    if rhat > MAX_RHAT:
        warn(
            f"the chains of the bridge have not mixed (R-hat {rhat:.2f}): the standard error is too small; draw more, "
            "give them a longer warm-up, or train the flow for longer",
        )
    return BridgeEstimate(log_r, math.sqrt(variance), of_posterior.size, ess, rhat)


def _root(of_posterior: np.ndarray, of_flow: np.ndarray, ess: float) -> float:
    """Solve the equation of :func:`bridge` for log r by bisection; its two sides are monotone in r."""
    finite = np.concatenate([of_posterior.ravel(), of_flow[np.isfinite(of_flow)]])
    low, high = finite.min() - 50.0, finite.max() + 50.0
    for _ in range(NUM_HALVINGS):
        middle = 0.5 * (low + high)
        excess = ess * _sigmoid(middle - of_posterior).mean() - _sigmoid(of_flow - middle).sum()
        low, high = (low, middle) if excess > 0 else (middle, high)
    return 0.5 * (low + high)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def _relative_variance(x: np.ndarray) -> float:
    return float(x.var() / x.mean() ** 2)


def _ess(x: np.ndarray) -> float:
    """Effective sample size of chains ``(chain, draw)``, cut off at the number of draws, above which it is noise."""
    ess = float(arviz.ess(x, method="mean"))
    return min(ess, float(x.size)) if math.isfinite(ess) else float(x.size)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
