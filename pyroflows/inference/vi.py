"""Variational inference by reverse KL, from a model to a posterior: a Gaussian where it is enough, else a flow."""

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

from pyroflows.compiling.check import Compiler, is_singular
from pyroflows.errors import DivergedError, ModelError, OptionError
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.flows import Flow, Recipe
from pyroflows.guides import AutoFlow
from pyroflows.guides.packed import FlowFn
from pyroflows.inference.candidates import Candidate, FittedCandidate
from pyroflows.inference.elbo import ModelELBO, Tempering
from pyroflows.inference.files import load
from pyroflows.inference.pathfinder import GaussianApproximation
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.starts import find_start, is_enough, starting_points
from pyroflows.models.batching import NUM_EXAMPLES
from pyroflows.models.layout import Layout
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.requirements import check_static
from pyroflows.models.structure import InitFn, Model, describe, in_dtype, model_parameters
from pyroflows.randomness import seeded
from pyroflows.training.history import History
from pyroflows.training.loop import OptimizerLike, Trainer
from pyroflows.training.schedules import Plateau

NUM_PARTICLES = 128
# Below it the flow is close enough for the final decay of the learning rate.
SETTLED_LOG_WEIGHT_VARIANCE = 0.02
SETTLED_WINDOW = 50
NUM_STARTS = 8
# Above so many latents the search from a start takes seconds.
MAX_DIM_OF_STARTS, FEW_STARTS = 200, 2
# Of a fit that takes as many steps as it takes.
NUM_TEMPERED_STEPS = 500
# Runs of the model at other values, to see whether its sites are the same.
NUM_LOOKS = 16
MAX_SECONDS_OF_LOOKS = 0.5


class FlowVI:
    r"""Fit a flow as the posterior of a Pyro model, by reverse KL.

    Maximises :math:`\mathrm{ELBO} = E_q[\log p(x, y) - \log q(x)]` over the flow q in the unconstrained space, with
    several draws a step and the model run once for all of them. Before, a Gaussian is sought from several starts, see
    :func:`pyroflows.inference.pathfinder.pathfinder`: it is the posterior where it is certainly enough, and otherwise
    what the flow starts at. Where starts end in separate modes, a flow is trained at each, and the posterior is their
    mixture, weighted by their evidences. Where nothing is prescribed and the verdict is "do not use", the fit is
    repeated with a Student-t base, and the one of the smaller variance of log weights is kept.

    Args:
        model: a Pyro model whose latents are continuous and the same in every run.
        guide: a flow guide; or a recipe or another function ``latent_dim -> flow``, as for
            :class:`pyroflows.guides.AutoFlow`; or None for the default.
        num_steps: number of training steps; None for as many as it takes.
        num_particles: draws a step; None for 128.
        estimator: of the gradient, a name of :mod:`pyroflows.fitting.estimators`: "total", "path", "iwae", "dreg",
            "vargrad"; or "auto", which is "path".
        compile: whether a step becomes one program without Python in between: "trace" it, a second or less; generate
            machine code by "inductor", tens of seconds, for tens of thousands of steps; "none"; or "auto", which
            traces, and goes on without, with a warning, where the model's code depends on the latents' values.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam at 0.01.
        num_starts: points from which Gaussians are sought: the initial values, and others at random; None for 8, or 2
            above 200 latents. A guide made of the model starts where it stands.
        gate: whether to leave out the flow where such a Gaussian is certainly good enough. It never is left out where
            a guide, ``num_steps`` or ``temper`` are given, where rows are subsampled, or where the model has parameters
            of its own.
        temper: an inverse temperature between 0 and 1 by which the log joint is multiplied in the search for Gaussians
            and at first in training; it rises to 1 over a third of ``num_steps``, or over 500 steps. It helps to find
            several modes, or the way out of a poor one.
        dtype: dtype in which the flow and the model run; None for that of the model's latents.
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
        compile: str = "auto",
        num_starts: int | None = None,
        gate: bool = True,
        temper: float | None = None,
        dtype: torch.dtype | None = None,
        seed: int | None = None,
        progress_bar: bool = True,
    ) -> None:
        for name, value in (("num_particles", num_particles), ("num_steps", num_steps), ("num_starts", num_starts)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} must be positive and an integer, got {value!r}")
        if not isinstance(gate, bool):
            raise OptionError(f"gate must be True or False, got {gate!r}")
        if estimator != "auto" and estimator not in ESTIMATORS:
            raise OptionError(f"estimator must be one of {['auto', *ESTIMATORS]}, got {estimator!r}")
        if isinstance(guide, Flow):
            raise OptionError(
                "guide must be made of the model, or a function latent_dim -> flow, got a flow: "
                "give a function such as lambda dim: pf.flows.IAF(dim)"
            )
        if isinstance(guide, torch.nn.Module) and not isinstance(guide, AutoFlow):
            raise OptionError(
                f"FlowVI trains flow guides, but got {type(guide).__name__}: use pyro.infer.SVI for it, or give "
                "a function latent_dim -> flow"
            )
        if guide is not None and (not callable(guide) or isinstance(guide, type)):
            raise OptionError(
                f"guide must be a flow guide, made of the model, or a function latent_dim -> flow, got {guide!r}"
            )
        if temper is not None and not 0 < temper < 1:
            raise OptionError(f"temper must be an inverse temperature between 0 and 1, got {temper}")
        if estimator == "vargrad" and num_particles == 1:
            raise OptionError('estimator="vargrad" needs a variance, hence num_particles of at least 2')
        if dtype is not None and isinstance(guide, AutoFlow):
            raise OptionError("give dtype to the guide, not to FlowVI, where the guide is yours")
        self.model = model
        self.guide = guide
        self.num_steps = num_steps
        self.num_particles = NUM_PARTICLES if num_particles is None else num_particles
        self.estimator = ESTIMATORS["path" if estimator == "auto" else estimator]
        self.optimizer = optimizer
        self.compiler = Compiler(compile)
        self.num_starts = num_starts
        self.gate = gate
        self.temper = temper
        self.dtype = dtype
        self.seed = seed
        self.progress_bar = progress_bar

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """Fit to the model's arguments.

        Raises:
            UntraceableError: if ``compile`` is "trace" or "inductor", and the model cannot be compiled.
            ModelError: if the model cannot be fitted; names the site.
            DataError: if observed values are NaN.
            DivergedError: if the fit diverges; the guide keeps its last good state.
            OptionError: if the guide holds a mixture of flows, the result of a fit with several modes.
        """
        with seeded(self.seed):
            return self._run(args, kwargs)

    def _run(self, args: Any, kwargs: Any) -> Posterior:
        guide = self.guide if isinstance(self.guide, AutoFlow) else AutoFlow(self.model, self.guide, dtype=self.dtype)
        # Not through a call: that would put the flow's parameters into Pyro's store.
        guide._setup_prototype(*args, **kwargs)
        assert guide.layout is not None
        layout, model = guide.layout, in_dtype(self.model, guide.dtype)
        center = guide._init_loc().to(guide.dtype or layout.dtype)
        log_joint = self._log_joint(model, args, kwargs, layout, center)
        own: list[Tensor] = []
        if layout.structure.parameters:
            own = list(model_parameters(model, args, kwargs, _init_at(layout, center)).values())
        train = partial(self._train, log_joint=log_joint, own=own)
        posterior = partial(Posterior, self.model, guide, args, kwargs, compile=self.compiler.mode, log_joint=log_joint)
        if isinstance(self.guide, AutoFlow):
            return posterior(history=self._train_guide(guide, train))
        num_starts = self.num_starts or (NUM_STARTS if layout.dim <= MAX_DIM_OF_STARTS else FEW_STARTS)
        points = starting_points(model, args, kwargs, layout, center, num_starts)
        modes, found = find_start(log_joint, points, self.temper)
        chooses = self.guide is None and self.num_steps is None and self.temper is None
        fit = partial(Candidate.fit, log_joint=log_joint, train=train, found=found)
        # A verdict is had where all rows are seen, and helps where the model stays what it is.
        if not chooses or own or layout.structure.subsampled:
            fitted, draws = fit(Candidate(guide.flow_fn, tuple(modes))), None
        else:
            fitted = self._best(tuple(modes), fit)
            draws = fitted.draws
        guide.hold(fitted.flow, fitted.candidate.flow_fn)
        return posterior(history=fitted.history, starts=found, draws=draws)

    def _log_joint(self, model: Model, args: Any, kwargs: Any, layout: Layout, center: Tensor) -> LogJoint:
        """The log joint, of a model whose latents are the same at other values, and finite at the initial ones."""
        if layout.structure.reads_values:
            _check_static_around(layout, center, model, args, kwargs)
        with seeded(0):
            examples = center + 0.1 * torch.randn((NUM_EXAMPLES, layout.dim)).to(center)
            examples[0] = center
        log_joint = LogJoint(model, args, kwargs, layout, examples, self.compiler)
        if log_joint.batched.mode == "loop" and not layout.structure.reads_values:  # what numpy reads is not seen
            _check_static_around(layout, center, model, args, kwargs)
        _check_start(log_joint)
        return log_joint

    def _train_guide(self, guide: AutoFlow, train: Callable[[Flow], History]) -> History:
        """Train a guide of the user's where it stands."""
        assert guide.flow is not None
        if not guide.flow().has_rsample:
            raise OptionError(
                "the draws of this guide's flow carry no gradients, which is so for a mixture of flows, so that it "
                "cannot be trained on: give another guide"
            )
        try:
            return train(guide.flow)
        finally:
            guide.hold(guide.flow, guide.flow_fn)

    def _best(
        self, modes: tuple[GaussianApproximation, ...], fit: Callable[[Candidate], FittedCandidate]
    ) -> FittedCandidate:
        """The simplest candidate that is good enough: a Gaussian, a flow, a flow with heavier tails."""
        if self.gate and len(modes) == 1:
            gaussian = fit(Candidate(Recipe("Gaussian"), modes, is_trained=False))
            if is_enough(gaussian.diagnosis):
                return gaussian
        light = fit(Candidate(Recipe("default"), modes))
        if light.diagnosis.verdict != "do not use":
            return light
        try:
            heavy = fit(Candidate(Recipe("default", base="student_t"), modes))
        except DivergedError as error:
            warnings.warn(f"heavier tails were tried, and left out: {error}", stacklevel=4)
            return light
        return min(light, heavy, key=lambda fitted: fitted.diagnosis.log_weight_variance)

    def _train(self, flow: Flow, log_joint: LogJoint, own: Sequence[Tensor]) -> History:
        num_tempered = NUM_TEMPERED_STEPS if self.num_steps is None else self.num_steps // 3
        tempering = None if self.temper is None else Tempering(self.temper, num_tempered)
        objective = ModelELBO(flow, log_joint, self.estimator, self.num_particles, own, tempering)
        hold = tempering.num_steps if tempering else 0
        schedule = Plateau(objective.monitor, self.num_steps, _is_settled, hold, objective.falls)
        return Trainer(
            objective, schedule, self.optimizer, compile=log_joint.compiler, progress_bar=self.progress_bar
        ).run()


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
    guide, history, starts = load(path, model, args, kwargs, flow_fn)
    return Posterior(model, guide, args, kwargs, history, starts)


def _is_settled(history: History) -> bool:
    recent = history.recent("log_weight_variance", SETTLED_WINDOW)
    return len(recent) == SETTLED_WINDOW and float(recent.mean()) < SETTLED_LOG_WEIGHT_VARIANCE


def _init_at(layout: Layout, vector: Tensor) -> InitFn:
    return init_to_value(values=layout.constrain(vector)[0])


def _check_static_around(layout: Layout, center: Tensor, model: Model, args: Any, kwargs: Any) -> None:
    """A model whose code reads values must show the same latents at other ones."""
    end = time.perf_counter() + MAX_SECONDS_OF_LOOKS
    with pyro.validation_enabled(False):
        for _ in range(NUM_LOOKS):
            init_fn = _init_at(layout, center + torch.randn_like(center))
            try:
                check_static(layout.structure, describe(model, args, kwargs, init_fn))
            except RuntimeError as error:
                if not is_singular(error):
                    raise
            if time.perf_counter() > end:
                break


def _check_start(log_joint: LogJoint) -> None:
    """The log joint must be finite at the initial values, the first of its examples."""
    for name, log_prob in log_joint.batched.reference.log_probs.items():
        if not torch.isfinite(log_prob).all():
            raise ModelError(
                f"the log joint is not finite at the initial values: site '{name}' has log-density "
                f"{log_prob.sum().item()}. Give a guide with init_loc_fn=init_to_value(values={{...}}), at which it is"
            )
