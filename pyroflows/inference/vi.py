"""Variational inference by reverse KL, from a model to a posterior: a Gaussian where it is enough, else a flow."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyroflows.compiling.check import Compiler
from pyroflows.errors import DivergedError, OptionError, warn
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.flows import Flow, Recipe
from pyroflows.grad_mode import with_gradients
from pyroflows.guides import AutoFlow
from pyroflows.guides.packed import FlowFn
from pyroflows.inference.candidates import Candidate, FittedCandidate, is_enough
from pyroflows.inference.elbo import ModelELBO, Tempering
from pyroflows.inference.files import load
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.preparation import init_at, prepared
from pyroflows.inference.search.starts import find_start, further_points, starting_points
from pyroflows.models.arguments import in_dtype, usable_arguments
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.requirements import require_dtype
from pyroflows.models.structure import describe, model_parameters
from pyroflows.models.tracing import Model
from pyroflows.randomness import seeded
from pyroflows.training.history import History
from pyroflows.training.loop import OptimizerLike, Trainer
from pyroflows.training.schedules import Plateau

NUM_PARTICLES = 128
# Below this variance, averaged over the window of steps, the learning rate starts its final decay.
SETTLED_LOG_WEIGHT_VARIANCE = 0.02
SETTLED_WINDOW = 50
NUM_STARTS = 8
# With more latents than this the search from each of the first starts takes seconds, hence few of them.
MAX_DIM_OF_STARTS, FEW_STARTS = 200, 2
# The inverse temperature rises to 1 over this many steps, where the fit itself decides on their number.
NUM_TEMPERED_STEPS = 500
# A fit in float32 is repeated in float64 if more than this share of its draws lies on an edge of their support.
MAX_SHARE_AT_EDGES, NUM_EDGE_DRAWS = 0.01, 1000


class FlowVI:
    r"""Fit a flow as the posterior of a Pyro model, by reverse KL.

    The fit maximises :math:`\mathrm{ELBO} = E_q[\log p(x, y) - \log q(x)]` over the flow q in the unconstrained space,
    with several draws a step, for all of which the model runs once. It first searches for modes from as many starts as
    it takes and fits a Gaussian at each, see :func:`pyroflows.inference.search.starts.find_start`. If the Gaussian is
    certainly good enough, it becomes the posterior; otherwise a flow starts at it. If there are separate modes, a
    Gaussian or a flow is fitted at each, and the posterior is their mixture, weighted by their evidences. If neither
    ``guide``, ``num_steps`` nor ``temper`` is given and the verdict is "do not use", a second flow with a Student-t
    base is fitted, and the flow whose log weights have the smaller variance is kept.

    Args:
        model: a Pyro model whose latents are continuous and the same in every run.
        guide: a flow guide; or a recipe or another function ``latent_dim -> flow``, as for
            :class:`pyroflows.guides.AutoFlow`; or None for the default.
        num_steps: number of training steps; None for as many as it takes.
        num_particles: number of draws a step; None for 128.
        estimator: the gradient estimator, one of :mod:`pyroflows.fitting.estimators`: "total", "path", "iwae", "dreg"
            or "vargrad"; "auto" stands for "path".
        compile: how a training step becomes one program without Python in between. "trace" records it, in a second or
            less; "inductor" generates machine code, in tens of seconds, which pays off over tens of thousands of steps;
            "none" leaves it as it is; "auto" traces, unless the model's code depends on the values of the latents, in
            which case it warns and does not compile.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam with learning
            rate 0.01.
        num_starts: the largest number of points from which modes are sought: the initial values, and others at random;
            None for 200, or fewer if they cost too much. There are fewer in any case as soon as a further one would
            find a new mode with a probability below 2 %, which takes about 55 where there is one mode. A guide made of
            the model starts where it stands, whatever this number is.
        gate: whether a Gaussian that is certainly good enough may stand in for a flow. It never does if ``guide``,
            ``num_steps`` or ``temper`` is given, if rows are subsampled, or if the model has parameters of its own.
        temper: inverse temperature between 0 and 1, by which the log joint is multiplied in the search for modes and at
            the start of training; it rises to 1 over a third of ``num_steps``, or over 500 steps. Tempering helps to
            find several modes, and to leave a poor one.
        dtype: dtype in which the flow and the model run; None for that of the model's latents. A fit in float32 that
            diverges, or has many draws on an edge of their support, is then repeated in float64, with a warning.
        seed: seed that makes the run reproducible and leaves the global generator as it was; None to use the global
            generator.
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
        if not callable(model):
            raise OptionError(f"model must be a function with pyro.sample statements, got {type(model).__name__}")
        for name, value in (("num_particles", num_particles), ("num_steps", num_steps), ("num_starts", num_starts)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} must be positive and an integer, got {value!r}")
        if not isinstance(gate, bool):
            raise OptionError(f"gate must be True or False, got {gate!r}")
        if estimator != "auto" and estimator not in ESTIMATORS:
            raise OptionError(f"estimator must be one of {['auto', *ESTIMATORS]}, got {estimator!r}")
        _check_guide(guide)
        if temper is not None and not 0 < temper < 1:
            raise OptionError(f"temper must be an inverse temperature between 0 and 1, got {temper}")
        if estimator == "vargrad" and num_particles == 1:
            raise OptionError('estimator="vargrad" needs a variance, hence num_particles of at least 2')
        if dtype is not None and isinstance(guide, AutoFlow):
            raise OptionError("give dtype to the guide, not to FlowVI, where the guide is yours")
        require_dtype(dtype)
        self.model = model
        self.guide = guide
        self.num_steps = num_steps
        self.num_particles = NUM_PARTICLES if num_particles is None else num_particles
        self.estimator = ESTIMATORS["path" if estimator == "auto" else estimator]
        self.optimizer = optimizer
        self.compile = Compiler(compile).mode
        self.num_starts = num_starts
        self.gate = gate
        self.temper = temper
        self.dtype = dtype
        self.seed = seed
        self.progress_bar = progress_bar

    @with_gradients
    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """Fit to the model's arguments.

        NumPy arrays, pandas data and lists of numbers become tensors, if the model does not run with them as they are;
        floating numbers then get the dtype of the fit. Torch's modes for gradients and casts around the call do not
        matter.

        Raises:
            UntraceableError: if ``compile`` is "trace" or "inductor", and the model cannot be compiled.
            ModelError: if the model cannot be fitted; names the site.
            DataError: if observed values are NaN, or an argument holds something other than finite numbers where it
                matters; names the site or the argument.
            DivergedError: if the fit diverges, also in float64 where neither ``dtype`` nor a guide of the model is
                given; the guide keeps its last good state.
            OptionError: if the guide holds a mixture of flows, which a fit with several modes leaves in it.
        """
        if self.dtype is not None or isinstance(self.guide, AutoFlow):
            return self._seeded_run(args, kwargs)
        try:
            posterior = self._seeded_run(args, kwargs)
        except DivergedError as error:
            precise = self._run_in_float64(args, kwargs, f"the fit in float32 diverged ({error})")
            if precise is None:
                raise
            return precise
        found = _describe_edges(posterior)
        precise = self._run_in_float64(args, kwargs, found) if found else None
        return posterior if precise is None else precise

    def _seeded_run(self, args: Any, kwargs: Any) -> Posterior:
        with seeded(self.seed):
            return self._run(args, kwargs)

    def _run_in_float64(self, args: Any, kwargs: Any, reason: str) -> Posterior | None:
        """Repeat a fit in float64 with a warning; None if the model is not in float32, or float64 fails."""
        with seeded(0):
            if describe(self.model, *usable_arguments(self.model, args, kwargs)).dtype != torch.float32:
                return None
        precise = copy.copy(self)
        precise.dtype = torch.float64
        try:
            posterior = precise._seeded_run(args, kwargs)
        except Exception:  # a model may not run in float64, for instance with modules in float32
            return None
        warn(f"{reason}, and was repeated in float64; dtype=torch.float64 does so at once")
        return posterior

    def _run(self, args: Any, kwargs: Any) -> Posterior:
        guide = self.guide if isinstance(self.guide, AutoFlow) else AutoFlow(self.model, self.guide, dtype=self.dtype)
        args, kwargs = usable_arguments(in_dtype(self.model, guide.dtype), args, kwargs, guide.dtype)
        # A call of the guide would also put the flow's parameters into Pyro's store.
        guide._setup_prototype(*args, **kwargs)
        model, has_own_guide = in_dtype(self.model, guide.dtype), isinstance(self.guide, AutoFlow)
        log_joint, center = prepared(model, guide, args, kwargs, self.compile, may_move=not has_own_guide)
        layout = log_joint.layout
        own = list(model_parameters(layout.structure, model, args, kwargs, init_at(layout, center)).values())
        train = partial(self._train, log_joint=log_joint, own=own)
        posterior = partial(Posterior, self.model, guide, args, kwargs, compile=self.compile, log_joint=log_joint)
        if has_own_guide:
            return posterior(history=self._train_guide(guide, train))
        num_first = NUM_STARTS if layout.dim <= MAX_DIM_OF_STARTS else FEW_STARTS
        num_first = min(num_first, self.num_starts or num_first)
        points = starting_points(model, args, kwargs, layout, center, num_first)
        propose = partial(further_points, model, args, kwargs, layout, center)
        modes, found = find_start(log_joint, points, self.temper, propose, self.num_starts)

        def fit(flow_fn: FlowFn, is_trained: bool = True) -> FittedCandidate:
            return Candidate(flow_fn, tuple(modes), is_trained).fit(log_joint, train, found)

        # Candidates are compared by their verdicts, which need all rows and a model whose parameters are fixed.
        has_verdict = not own and not layout.structure.subsampled
        if has_verdict and self.guide is None and self.num_steps is None and self.temper is None:
            fitted = self._best(fit, may_be_gaussian=self.gate)
            draws = fitted.draws
        else:
            fitted, draws = fit(guide.flow_fn), None
        guide.hold(fitted.flow, fitted.candidate.flow_fn)
        return posterior(history=fitted.history, starts=found, draws=draws)

    def _train_guide(self, guide: AutoFlow, train: Callable[[Flow], History]) -> History:
        """Train a guide of the user's from its present state."""
        assert guide.flow is not None
        try:
            return train(guide.flow)
        finally:
            guide.hold(guide.flow, guide.flow_fn)

    def _best(self, fit: Callable[..., FittedCandidate], may_be_gaussian: bool) -> FittedCandidate:
        """Fit a Gaussian, a flow and a flow with heavier tails, in this order, until one is good enough."""
        if may_be_gaussian:
            gaussian = fit(Recipe("Gaussian"), is_trained=False)
            if is_enough(gaussian):
                return gaussian
        light = fit(Recipe("default"))
        # Heavier tails do not help where there are too many modes to fit.
        if light.diagnosis.verdict != "do not use" or light.diagnosis.num_other_modes:
            return light
        try:
            heavy = fit(Recipe("default", base="student_t"))
        except DivergedError as error:
            warn(f"a flow with heavier tails was tried, and left out: {error}")
            return light
        return min(light, heavy, key=lambda fitted: fitted.diagnosis.log_weight_variance)

    def _train(self, flow: Flow, log_joint: LogJoint, own: Sequence[Tensor]) -> History:
        # The verdict needs exact log-densities: a flow that has none is refused before it is trained.
        flow.transform.exact()
        if not flow().has_rsample:
            raise OptionError(
                "the draws of this guide's flow carry no gradients, as for a mixture of flows, so that it cannot be "
                "trained by them: give another guide"
            )
        num_tempered = NUM_TEMPERED_STEPS if self.num_steps is None else self.num_steps // 3
        tempering = None if self.temper is None else Tempering(self.temper, num_tempered)
        objective = ModelELBO(flow, log_joint, self.estimator, self.num_particles, own, tempering)
        hold = tempering.num_steps if tempering else 0
        schedule = Plateau(objective.monitor, self.num_steps, _is_settled, hold, objective.falls)
        trainer = Trainer(
            objective, schedule, self.optimizer, compile=log_joint.compiler, progress_bar=self.progress_bar
        )
        try:
            return trainer.run()
        except DivergedError as error:
            raise _explained(error, flow, log_joint) from None


@with_gradients
def load_posterior(path: Any, model: Model, *args: Any, flow_fn: FlowFn | None = None, **kwargs: Any) -> Posterior:
    """Read a posterior from the file that :meth:`Posterior.save` wrote.

    Args:
        path: the path of the file.
        model: the Pyro model that was fitted.
        args: the model's arguments.
        flow_fn: the function that made the flow, if it was the user's own.
        kwargs: the model's keyword arguments.

    Raises:
        CheckpointError: if the file cannot be read or belongs to another model.

    Example:
        >>> import tempfile
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor(1.0)
        >>> posterior = FlowVI(model, seed=0, progress_bar=False).run(y)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     posterior.save(f"{folder}/posterior.safetensors")
        ...     loaded = load_posterior(f"{folder}/posterior.safetensors", model, y)
        >>> loaded.elbo == posterior.elbo
        True
    """
    guide, history, starts = load(path, model, args, kwargs, flow_fn)
    return Posterior(model, guide, args, kwargs, history, starts)


def _check_guide(guide: Any) -> None:
    if isinstance(guide, Flow):
        raise OptionError(
            "guide must be a flow guide of the model, or a function latent_dim -> flow, got a flow: give a "
            "function such as lambda dim: pf.flows.IAF(dim)"
        )
    if isinstance(guide, torch.nn.Module) and not isinstance(guide, AutoFlow):
        raise OptionError(
            f"FlowVI trains flow guides, but got {type(guide).__name__}: use pyro.infer.SVI for it, or give "
            "a function latent_dim -> flow"
        )
    if guide is not None and (not callable(guide) or isinstance(guide, type)):
        raise OptionError(f"guide must be a flow guide of the model, or a function latent_dim -> flow, got {guide!r}")


def _is_settled(history: History) -> bool:
    recent = history.recent("log_weight_variance", SETTLED_WINDOW)
    return len(recent) == SETTLED_WINDOW and float(recent.mean()) < SETTLED_LOG_WEIGHT_VARIANCE


@torch.no_grad()
def _explained(error: DivergedError, flow: Flow, log_joint: LogJoint) -> DivergedError:
    """Name the sites whose log-density is not finite at draws of a flow whose training diverged."""
    sites = log_joint.non_finite_sites(flow().sample((NUM_PARTICLES,)))
    if not sites:
        return error
    shares = ", ".join(f"'{name}' at {count / NUM_PARTICLES:.0%}" for name, count in sites.items())
    return DivergedError(
        f"{error}. At draws of the flow these sites have a log-density that is not finite: {shares} of {NUM_PARTICLES} "
        "draws. If that is a constraint, give the latents a support that meets it"
    )


def _describe_edges(posterior: Posterior) -> str | None:
    """Say how many draws lie on edges of their supports where that is too many; see ``LogJoint.shares_at_edges``."""
    with seeded(0):
        draws = posterior._draw(NUM_EDGE_DRAWS)
    shares = posterior.log_joint.shares_at_edges(draws)
    at_edges = {name: share for name, share in shares.items() if share > MAX_SHARE_AT_EDGES}
    if not at_edges:
        return None
    sites = ", ".join(f"{share:.0%} at site '{name}'" for name, share in at_edges.items())
    return (
        f"the fit in float32 has many draws on an edge of their support ({sites}), which it cannot tell from the edge"
    )
