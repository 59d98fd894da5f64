"""Variational inference: a flow guide trained by reverse KL, from a model to a posterior."""

import time
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.errors import ModelError, OptionError
from pyroflows.guides import AutoFlow
from pyroflows.guides.flow import FlowFn
from pyroflows.inference.batching import NUM_EXAMPLES
from pyroflows.inference.estimators import ESTIMATORS
from pyroflows.inference.log_joint import LogJoint
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.serialization import load
from pyroflows.model import InitFn, Model, ModelStructure, check_static, in_dtype, inspect_model, model_parameters
from pyroflows.randomness import seeded
from pyroflows.schedules import Plateau
from pyroflows.training import History, OptimizerLike, train

NUM_PARTICLES = 128
# Below it the flow is close enough for the final decay of the learning rate.
SETTLED_LOG_WEIGHT_VARIANCE = 0.02
SETTLED_WINDOW = 50
# Runs of the model at other values, to see whether its sites are the same.
NUM_LOOKS = 16
MAX_SECONDS_OF_LOOKS = 0.5


class FlowVI:
    r"""Fit a flow as the posterior of a Pyro model, by reverse KL.

    Maximises :math:`\mathrm{ELBO} = E_q[\log p(x, y) - \log q(x)]` over the flow q in the unconstrained space, with
    several draws a step and the model run once for all of them.

    Args:
        model: a Pyro model whose latents are continuous and the same in every run.
        guide: a flow guide; or ``latent_dim -> flow``, as for :class:`pyroflows.guides.AutoFlow`; or None for the
            default.
        num_steps: number of training steps; None for as many as it takes.
        num_particles: draws a step; None for 128.
        estimator: of the gradient: "total", "path" (see :mod:`pyroflows.inference.estimators`), or "auto", which is
            "total".
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.01.
        dtype: dtype in which the flow and the model run; None for that of the model's
            latents.
        seed: makes the run reproducible and leaves the global generator as it was; None to draw from the global one.
        progress_bar: whether to show the ELBO while training.

    Raises:
        OptionError: for an option outside its range.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("N", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> vi = pf.FlowVI(model, num_steps=200, seed=0, progress_bar=False)
        >>> posterior = vi.run(torch.tensor([1.0, 2.0]))
        >>> abs(posterior.sample(4000)["mu"].mean().item() - 1.0) < 0.1
        True
    """

    def __init__(
        self,
        model: Model,
        guide: AutoFlow | FlowFn | None = None,
        num_steps: int | None = None,
        num_particles: int | None = None,
        estimator: str = "auto",
        optimizer: OptimizerLike | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
        progress_bar: bool = True,
    ) -> None:
        if num_particles is not None and num_particles < 1:
            raise OptionError(f"num_particles must be positive, got {num_particles}")
        if num_steps is not None and num_steps < 1:
            raise OptionError(f"num_steps must be positive, got {num_steps}")
        if estimator != "auto" and estimator not in ESTIMATORS:
            raise OptionError(f"estimator must be one of {['auto', *ESTIMATORS]}, got {estimator!r}")
        if isinstance(guide, torch.nn.Module) and not isinstance(guide, AutoFlow):
            raise OptionError(
                f"FlowVI trains flow guides, but got {type(guide).__name__}: use pyro.infer.SVI for it, or give "
                "a function latent_dim -> flow"
            )
        if guide is not None and (not callable(guide) or isinstance(guide, type)):
            raise OptionError(
                f"guide must be a flow guide, made of the model, or a function latent_dim -> flow, got {guide}"
            )
        if dtype is not None and isinstance(guide, AutoFlow):
            raise OptionError("give dtype to the guide, not to FlowVI, where the guide is yours")
        self.model = model
        self.guide = guide
        self.num_steps = num_steps
        self.num_particles = NUM_PARTICLES if num_particles is None else num_particles
        self.estimator = ESTIMATORS["total" if estimator == "auto" else estimator]
        self.optimizer = optimizer
        self.dtype = dtype
        self.seed = seed
        self.progress_bar = progress_bar

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """Fit to the model's arguments.

        Raises:
            ModelError: if the model cannot be fitted; names the site.
            DataError: if observed values are NaN.
            DivergedError: if the fit diverges; the guide keeps its last good state.
        """
        with seeded(self.seed):
            return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Posterior:
        guide = self.guide if isinstance(self.guide, AutoFlow) else AutoFlow(self.model, self.guide, dtype=self.dtype)
        model = in_dtype(self.model, guide.dtype)
        # Not through a call: that would put the flow's parameters into Pyro's store.
        guide._setup_prototype(*args, **kwargs)
        flow, structure = guide.flow, guide.structure
        assert flow is not None
        assert structure is not None
        center = guide._init_loc().to(next(flow.parameters()))
        _check_static_around(center, model, args, kwargs, guide)
        with seeded(0):
            examples = center + 0.1 * torch.randn((NUM_EXAMPLES, structure.dim)).to(center)
        log_joint = LogJoint(model, args, kwargs, structure, examples)
        _check_start(log_joint, center)

        def step() -> Mapping[str, Tensor]:
            subsample = log_joint.draw_subsample()
            q = flow()
            z = q.base.rsample((self.num_particles,))
            loss, log_weights = self.estimator(q, lambda x: log_joint(x, subsample), z)
            loss.backward()
            variance = log_weights.var() if self.num_particles > 1 else torch.tensor(torch.nan)
            return {"elbo": log_weights.mean(), "log_weight_variance": variance}

        own = model_parameters(model, args, kwargs, _init_at(structure, center)).values()
        history = train(
            step,
            [*flow.parameters(), *own],
            Plateau("elbo", self.num_steps, _is_settled),
            optimizer=self.optimizer,
            progress_bar=self.progress_bar,
        )
        guide.own_values_count = True
        return Posterior(self.model, guide, args, kwargs, history)


def load_posterior(path: Any, model: Model, *args: Any, flow_fn: FlowFn | None = None, **kwargs: Any) -> Posterior:
    """The posterior that :meth:`Posterior.save` wrote.

    Args:
        path: of the file.
        model: the Pyro model that was fitted.
        args: arguments of the model.
        flow_fn: the function that made the flow, if it was the user's own.
        kwargs: keyword arguments of the model.

    Raises:
        CheckpointError: if the file cannot be read or belongs to another model.
    """
    guide, history = load(path, model, args, kwargs, flow_fn)
    return Posterior(model, guide, args, kwargs, history)


def _is_settled(history: History) -> bool:
    recent = history.recent("log_weight_variance", SETTLED_WINDOW)
    return len(recent) == SETTLED_WINDOW and float(recent.mean()) < SETTLED_LOG_WEIGHT_VARIANCE


def _init_at(structure: ModelStructure, vector: Tensor) -> InitFn:
    return init_to_value(values=structure.constrain(vector)[0])


def _check_static_around(center: Tensor, model: Model, args: Any, kwargs: Any, guide: AutoFlow) -> None:
    assert guide.structure is not None
    end = time.perf_counter() + MAX_SECONDS_OF_LOOKS
    with pyro.validation_enabled(False):
        for _ in range(NUM_LOOKS):
            init_fn = _init_at(guide.structure, center + torch.randn_like(center))
            other = inspect_model(model, args, kwargs, init_fn)
            check_static(guide.structure, other)
            if time.perf_counter() > end:
                break


def _check_start(log_joint: LogJoint, center: Tensor) -> None:
    """The log joint must be finite at the initial values."""
    values, _ = log_joint.structure.constrain(center[None])
    with torch.no_grad():
        log_probs = log_joint.batched(values, 1, log_joint.draw_subsample()).log_probs
    for name, log_prob in log_probs.items():
        if not torch.isfinite(log_prob).all():
            raise ModelError(
                f"the log joint is not finite at the initial values: site '{name}' has log-density "
                f"{log_prob.sum().item()}. Give a guide with init_loc_fn=init_to_value(values={{...}}), at which it is"
            )
