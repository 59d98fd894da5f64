"""Variational inference by reverse KL, from a model to a posterior: a Gaussian where it is enough, else a flow."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch

from pyroflows.compiling.check import Compiler
from pyroflows.errors import DivergedError, FitInterrupted, OptionError, each_said_once, warn
from pyroflows.fitting.estimators import ESTIMATORS
from pyroflows.flows import Flow, Recipe
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.guides.centering import Centering
from pyroflows.guides.hierarchical import HierarchicalGaussian, has_block, hierarchical_layer, hierarchy_near
from pyroflows.guides.packed import FlowFn
from pyroflows.guides.structured import AutoStructuredFlow
from pyroflows.inference.batches import Batches, FixedArguments, is_loader
from pyroflows.inference.candidates import Candidate, FittedCandidate, Start, is_enough
from pyroflows.inference.component_labels import ComponentLabels, Coords, Dims
from pyroflows.inference.effort import NUM_PARTICLES, num_particles_of, schedule_of, updates_of
from pyroflows.inference.elbo import Tempering
from pyroflows.inference.fit_progress import FitProgress
from pyroflows.inference.guide_option import check_guide, guide_for
from pyroflows.inference.minibatches import elbo_of
from pyroflows.inference.of_batches import PosteriorOfBatches
from pyroflows.inference.outcome import Ending, Outcome
from pyroflows.inference.posterior import Posterior
from pyroflows.inference.preparation import init_at, prepared
from pyroflows.inference.search.gaussians import GaussianApproximation
from pyroflows.inference.search.hierarchical import global_marginal, with_locals
from pyroflows.inference.search.local_modes import has_images, has_other_rows
from pyroflows.inference.search.marginal import GlobalMarginal
from pyroflows.inference.search.starts import (
    NUM_ROWS,
    Starts,
    Target,
    find_start,
    further_points,
    starting_points,
)
from pyroflows.inference.so_far import FitSoFar
from pyroflows.models.all_rows import WithAllRows
from pyroflows.models.arguments import in_dtype, require_arguments, unwritten, usable_arguments
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.requirements import require_dtype
from pyroflows.models.structure import describe, model_parameters
from pyroflows.models.tracing import Model
from pyroflows.options import checked_int
from pyroflows.randomness import seeded
from pyroflows.shapes import counted
from pyroflows.training.history import History
from pyroflows.training.loop import OptimizerLike, Trainer, ends_training

NUM_STARTS = 8
# With more latents than this the search from each of the first starts takes seconds, hence few of them.
MAX_DIM_OF_STARTS, FEW_STARTS = 200, 2
# Where local latents are integrated out, a start costs much and the few globals seldom have several modes.
MAX_STARTS_OF_GLOBALS = 24
# The inverse temperature rises to 1 over this many steps, where the fit itself decides on their number.
NUM_TEMPERED_STEPS = 500
# A fit in float32 is repeated in float64 if more than this share of its draws lies on an edge of their support.
MAX_SHARE_AT_EDGES, NUM_EDGE_DRAWS = 0.01, 1000

Callback: TypeAlias = Callable[[History, Posterior], bool | None]


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
        model: a Pyro model whose latents are the same in every run. They are continuous, or discrete with values that
            can be enumerated: these are summed out, and drawn from their exact conditional given draws of the others.
        guide: a flow guide; or a flow class, such as :class:`pyroflows.flows.NSF`, a recipe or another function
            ``latent_dim -> flow``, as for :class:`pyroflows.guides.AutoFlow`; or None for the default.
        num_steps: number of training steps; None for as many as it takes.
        num_particles: number of draws a step; None for 128, for 16 where steps see a part of the rows, and down
            to 4 in hierarchies of hundreds of latents.
        estimator: the gradient estimator, one of :mod:`pyroflows.fitting.estimators`: "total", "path", "iwae", "dreg"
            or "vargrad"; "auto" stands for "path".
        compile: how a training step becomes one program without Python in between. "trace" records it, in a second or
            less; "inductor" generates machine code, in tens of seconds, which pays off over tens of thousands of steps;
            "none" leaves it as it is; "auto" traces, unless the model's code depends on the values of the latents, in
            which case it warns and does not compile.
        optimizer: a function from parameters to a torch optimizer, or a Pyro optimizer; None for Adam with learning
            rate 0.01. Where steps see a part of the rows of a hierarchy, its betas are 0.9 and 0.99, and gradients are
            not clipped; they are for an optimizer of yours.
        num_starts: the largest number of points from which modes are sought: the initial values, and others at random;
            None for 200, or fewer if they cost too much. There are fewer in any case as soon as a further one would
            find a new mode with a probability below 2 %, which takes about 55 where there is one mode; and at most 24
            where many local latents are integrated out. A guide made of
            the model starts where it stands, whatever this number is.
        gate: whether a Gaussian that is certainly good enough may stand in for a flow. It never does if ``guide``,
            ``num_steps`` or ``temper`` is given, if rows are subsampled, or if the model has parameters of its own.
        temper: inverse temperature between 0 and 1, by which the log joint is multiplied in the search for modes and at
            the start of training; it rises to 1 over a third of ``num_steps``, or over 500 steps. Tempering helps to
            find several modes, and to leave a poor one.
        dtype: dtype in which the flow and the model run; None for that of the model's latents. A fit in float32 that
            diverges, or has many draws on an edge of their support, is then repeated in float64, with a warning.
        callback: a function of the history of the training and of the posterior so far, which is called once in 50
            steps: to log, or to look at the convergence. The posterior is a copy, which training leaves alone; its
            figures are computed when they are asked for. The fit ends if the function returns False. Where several
            flows are trained, one after the other, each has a history of its own, and the posterior is that of all.
        coords: labels by dimension, such as ``{"school": names}``, which tables, pictures and ArviZ data show. The name
            of a plate is that of its dimension.
        dims: names of the dimensions of sites from the left, such as ``{"weight": ["feature"]}``, where a plate does
            not name them.
        seed: seed that makes the run reproducible and leaves the global generator as it was; None to use the global
            generator.
        progress_bar: whether to show what the fit does: the search for modes, each training with its ELBO, and how
            long the rest takes where that is known.

    Attributes:
        posterior: the posterior of the last run, also if that was interrupted or diverged: it is then that of the best
            state so far. None if there was none yet.

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
        callback: Callback | None = None,
        coords: Coords | None = None,
        dims: Dims | None = None,
        seed: int | None = None,
        progress_bar: bool = True,
    ) -> None:
        if not callable(model):
            raise OptionError(f"model must be a function with pyro.sample statements, got {type(model).__name__}")
        num_steps = None if num_steps is None else checked_int("num_steps", num_steps)
        num_starts = None if num_starts is None else checked_int("num_starts", num_starts)
        num_particles = None if num_particles is None else checked_int("num_particles", num_particles)
        if not isinstance(gate, bool):
            raise OptionError(f"gate must be True or False, got {gate!r}")
        if estimator != "auto" and estimator not in ESTIMATORS:
            raise OptionError(f"estimator must be one of {['auto', *ESTIMATORS]}, got {estimator!r}")
        if callback is not None and not callable(callback):
            raise OptionError(f"callback must be a function of the history and the posterior, got {callback!r}")
        check_guide(guide)
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
        self.num_particles = num_particles
        self.estimator = ESTIMATORS["path" if estimator == "auto" else estimator]
        self.optimizer = optimizer
        self.compile = Compiler(compile).mode
        self.num_starts = num_starts
        self.gate = gate
        self.temper = temper
        self.dtype = dtype
        self.callback = callback
        self.coords = coords
        self.dims = dims
        self.posterior: Posterior | None = None
        self.seed = seed
        self.progress_bar = progress_bar

    @isolated
    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """Fit to the model's arguments.

        NumPy arrays, pandas data and lists of numbers become tensors, if the model does not run with them as they are;
        floating numbers then get the dtype of the fit. The fit runs on the device of the model's latents, which is that
        of the tensors from which their priors are made. Torch's modes for gradients and casts around the call do not
        matter.

        Data may come in batches: a single argument that is a ``DataLoader``, or another object that gives batches each
        time that one iterates over it, and no tensor, array, list, tuple or dictionary. Each step takes the next
        batch: a tuple or a list holds positional arguments of the model, a dictionary keyword arguments, a tensor is
        one argument. The plate of the rows then states their full number, by ``pyro.plate("rows", N,
        subsample_size=len(y))`` or ``pyro.plate("rows", N, subsample=indices)``. Batches of at most four different
        sizes are quick. The posterior has the global latents; ``with_data`` with all data gives the one of all latents,
        with a verdict. The order of the batches is the loader's: give it a generator of its own where it shuffles.

        Args:
            args: the positional arguments of the model, such as inputs and data; or one object that gives batches.
            kwargs: the keyword arguments of the model.

        Returns:
            The posterior, which samples, scores, judges and corrects itself; ``print`` it for a table, the evidence and
            the verdict. It is also the attribute :attr:`posterior`.

        Raises:
            UntraceableError: if ``compile`` is "trace" or "inductor", and the model cannot be compiled.
            ModelError: if the model cannot be fitted; names the site.
            DataError: if observed values are NaN, or an argument holds something other than finite numbers where it
                matters; names the site or the argument. Also if there are no batches, or they differ by more than
                tensors.
            DivergedError: if the fit diverges, also in float64 where neither ``dtype`` nor a guide of the model is
                given; the guide keeps its last good state, and the exception's ``result`` and :attr:`posterior` are the
                posterior with it.
            FitInterrupted: if the fit is interrupted, such as by Ctrl-C; its ``result`` and :attr:`posterior` are the
                posterior of the best state so far, with its verdict.
            OptionError: if the model does not take these arguments, or counts each of several batches as all of the
                data; if ``coords`` or ``dims`` do not fit it, or the guide holds a mixture of flows, which a fit with
                several modes leaves in it.
        """
        with each_said_once(set()):
            return self._run_with_care(args, kwargs)

    def _run_with_care(self, args: Any, kwargs: Any) -> Posterior:
        """Fit, and again in float64 where float32 is too coarse."""
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

    def _seeded_run(self, args: Any, kwargs: Any, prefix: str = "") -> Posterior:
        self.posterior = None
        with seeded(self.seed), FitProgress(self.progress_bar, prefix) as progress:
            progress.say("describing the model")
            try:
                return self._run(args, kwargs, progress)
            except KeyboardInterrupt as error:
                if isinstance(error, FitInterrupted):
                    raise
                raise FitInterrupted(
                    "the fit was interrupted while it described the model, so that there is no result"
                ) from None

    def _run_in_float64(self, args: Any, kwargs: Any, reason: str) -> Posterior | None:
        """Repeat a fit in float64 with a warning; None if the model is not in float32, or float64 fails."""
        with seeded(0):
            args_of_model = Batches(self.model, *args).first if is_loader(args, kwargs) else (args, kwargs)
            if describe(self.model, *usable_arguments(self.model, *args_of_model)).dtype != torch.float32:
                return None
        precise = copy.copy(self)
        precise.dtype = torch.float64
        try:
            posterior = precise._seeded_run(args, kwargs, "in float64: ")
        except FitInterrupted as error:
            # Before the repeated fit has a state, the first one is the last result.
            self.posterior = error.result or self.posterior
            raise
        except Exception:  # a model may not run in float64, for instance with modules in float32
            return None
        warn(f"{reason}, and was repeated in float64; dtype=torch.float64 does so at once")
        self.posterior = posterior
        return posterior

    def _run(self, args: Any, kwargs: Any, progress: FitProgress) -> Posterior:
        started = time.perf_counter()
        dtype = self.guide.dtype if isinstance(self.guide, AutoFlow) else self.dtype
        arguments = self._arguments(args, kwargs, dtype)
        args, kwargs = arguments.first
        with unwritten(self.model, args, kwargs):
            guide = guide_for(self.model, self.guide, dtype, args, kwargs)
            # A call of the guide would also put the flow's parameters into Pyro's store.
            guide._setup_prototype(*args, **kwargs)
        assert guide.structure is not None
        labels = ComponentLabels.of(guide.structure, self.coords, self.dims)
        has_own_guide = isinstance(self.guide, AutoFlow) or isinstance(guide, AutoStructuredFlow)
        # The posterior is that of all rows, whatever a step of training sees, if the arguments hold their data.
        is_whole = isinstance(guide, AutoStructuredFlow) and not guide.structure.subsampled
        whole = WithAllRows(self.model) if is_whole else self.model
        model = in_dtype(whole, guide.dtype)
        log_joint, center = prepared(model, guide, args, kwargs, self.compile, may_move=not has_own_guide)
        make_posterior = partial(
            PosteriorOfBatches if isinstance(arguments, Batches) else Posterior,
            whole,
            args=args,
            kwargs=kwargs,
            compile=self.compile,
            log_joint=log_joint,
            labels=labels,
        )

        def make(guide: AutoFlow, ending: Ending, **found: Any) -> Posterior:
            return make_posterior(guide, outcome=Outcome(time.perf_counter() - started, ending), **found)

        own = model_parameters(log_joint.structure, model, args, kwargs, init_at(log_joint.layout, center))
        so_far = FitSoFar(make, guide, log_joint, center, list(own.values()))
        so_far.elbo_of = elbo_of(guide, in_dtype(self.model, guide.dtype), arguments, log_joint, center)
        try:
            fitted = (
                self._fit_guide(so_far, progress) if has_own_guide else self._fit(so_far, progress, model, args, kwargs)
            )
        except KeyboardInterrupt:
            self.posterior = so_far.posterior("interrupted")
            raise FitInterrupted(
                "the fit was interrupted; the posterior of the best state so far is the attribute posterior of the "
                "FlowVI, and the attribute result of this exception",
                self.posterior,
            ) from None
        except DivergedError as error:
            self.posterior = error.result = so_far.posterior("diverged")
            raise
        guide.hold(fitted.flow, fitted.candidate.flow_fn)
        progress.done(fitted)
        draws = vars(fitted).get("draws")  # which exist where candidates were compared
        ending: Ending = "ended by the callback" if so_far.is_ended else "fitted"
        self.posterior = make(guide, ending, history=fitted.history, starts=fitted.found, draws=draws)
        return self.posterior

    def _arguments(self, args: Any, kwargs: Any, dtype: torch.dtype | None) -> FixedArguments | Batches:
        """The arguments of the steps of a fit, as the model takes them."""
        if is_loader(args, kwargs):
            batches = Batches(self.model, *args)
            batches.require_scales(in_dtype(self.model, dtype))
            return batches
        require_arguments(self.model, args, kwargs)
        return FixedArguments(*usable_arguments(in_dtype(self.model, dtype), args, kwargs, dtype))

    def _fit_guide(self, so_far: FitSoFar, progress: FitProgress) -> FittedCandidate:
        """Train a guide of the user's from its present state."""
        guide, log_joint = so_far.guide, so_far.log_joint
        assert guide.flow is not None
        flow, candidate = guide.flow, Candidate(guide.flow_fn, ())

        def as_it_is(history: History) -> FittedCandidate:
            return FittedCandidate(candidate, flow, history, log_joint, None)

        return as_it_is(self._train(flow, as_it_is, so_far, progress))

    def _fit(self, so_far: FitSoFar, progress: FitProgress, model: Model, args: Any, kwargs: Any) -> FittedCandidate:
        """Search for modes, and fit candidates that start at them."""
        log_joint = so_far.log_joint
        has_verdict = not so_far.own_parameters and not log_joint.structure.subsampled
        is_default = has_verdict and self.guide is None and self.num_steps is None and self.temper is None
        # The layer's runs know no discrete latents.
        is_plain = not log_joint.structure.enumerated
        centering = Centering.of(model, args, kwargs, log_joint.layout, so_far.center) if is_plain else None
        marginal = global_marginal(log_joint, so_far.center, centering) if is_default else None
        fit = partial(self._fit_from, so_far, progress, model, args, kwargs, centering, is_default)
        fitted = fit(marginal)
        is_block = marginal is not None and has_block(fitted.flow.components[0])
        if not is_block or so_far.is_ended or fitted.diagnosis.verdict != "do not use":
            return fitted
        # Given the global latents the block is far from a Gaussian.
        return min(fitted, fit(None), key=lambda fitted: fitted.diagnosis.log_weight_variance)

    def _fit_from(
        self,
        so_far: FitSoFar,
        progress: FitProgress,
        model: Model,
        args: Any,
        kwargs: Any,
        centering: Centering | None,
        is_default: bool,
        marginal: GlobalMarginal | None,
    ) -> FittedCandidate:
        """Search for modes of the log joint, or of the marginal density, and fit candidates that start at them."""
        log_joint = so_far.log_joint
        target: Target = marginal or log_joint
        center = so_far.center if marginal is None else so_far.center[marginal.places]
        layout = target.layout
        num_first = NUM_STARTS if marginal is None and len(so_far.center) <= MAX_DIM_OF_STARTS else FEW_STARTS
        num_first = min(num_first, self.num_starts or num_first)
        # Where local latents are integrated out, their form does not matter.
        layer = centering if marginal is None else None
        points = starting_points(model, args, kwargs, layout, center, num_first, layer)
        propose = partial(further_points, model, args, kwargs, layout, center, centering=layer)

        def with_all(modes: list[GaussianApproximation]) -> list[Start]:
            return [mode if marginal is None else with_locals(marginal, mode) for mode in modes]

        def note(modes: list[GaussianApproximation], found: Starts, num_expected: int) -> None:
            so_far.note_modes(partial(with_all, modes), found)
            progress.found(found, num_expected)

        progress.say(f"search for modes from {counted(num_first, 'start')}")
        num_rows = NUM_ROWS if marginal is None else marginal.num_rows
        max_starts = self.num_starts or (None if marginal is None else MAX_STARTS_OF_GLOBALS)
        found_modes, found = find_start(target, points, self.temper, propose, max_starts, note, layer, num_rows)
        modes = with_all(found_modes)
        if marginal is not None:
            at_modes = [mode for mode in modes if isinstance(mode, HierarchicalGaussian)]
            gaussians = [hierarchy_near(mode, Recipe("Gaussian"), has_local_flow=False) for mode in at_modes]
            is_symmetric = has_images(log_joint, gaussians)
            if is_symmetric and len(so_far.center) <= MAX_DIM_OF_STARTS:
                return self._fit_from(so_far, progress, model, args, kwargs, centering, is_default, None)
            of_all = log_joint.layout, so_far.center, marginal.num_rows, marginal.centering
            points = starting_points(model, args, kwargs, *of_all)
            if is_symmetric or has_other_rows(marginal, found_modes[0].loc, points):
                # A search among all latents would take too long; the verdict says that a mode is left out.
                found = replace(found, modes=(*found.modes, found.modes[0]))

        def fit(flow_fn: FlowFn, is_trained: bool = True, name: str = "flow") -> FittedCandidate:
            progress.fit(name, len(modes))
            train = partial(self._train, so_far=so_far, progress=progress)
            fitted = Candidate(flow_fn, tuple(modes), is_trained).fit(log_joint, train, found)
            so_far.note_finished(fitted)
            return fitted

        # Candidates are compared by their verdicts, which need all rows and a model whose parameters are fixed.
        if is_default:
            return self._best(fit, so_far, progress)
        return fit(so_far.guide.flow_fn)

    def _best(self, fit: Callable[..., FittedCandidate], so_far: FitSoFar, progress: FitProgress) -> FittedCandidate:
        """Fit a Gaussian, a flow and a flow with heavier tails, in this order, until one is good enough."""
        if self.gate:
            progress.say("checking whether a Gaussian is enough")
            gaussian = fit(Recipe("Gaussian"), is_trained=False)
            if is_enough(gaussian):
                return gaussian
        light = fit(Recipe("default"))
        progress.say("judging the flow")
        # Heavier tails do not help where there are too many modes to fit, and the flow of a hierarchy has none.
        is_shared = hierarchical_layer(light.flow.components[0]) is not None
        if so_far.is_ended or light.diagnosis.verdict != "do not use" or light.diagnosis.num_other_modes or is_shared:
            return light
        try:
            heavy = fit(Recipe("default", base="student_t"), name="flow with heavier tails")
        except DivergedError as error:
            warn(f"a flow with heavier tails was tried, and left out: {error}")
            return light
        progress.say("judging the flow with heavier tails")
        return min(light, heavy, key=lambda fitted: fitted.diagnosis.log_weight_variance)

    def _train(
        self, flow: Flow, make: Callable[[History], FittedCandidate], so_far: FitSoFar, progress: FitProgress
    ) -> History:
        """Train a flow in place, of the candidate that a function makes of it and the history."""
        if so_far.is_ended:
            return History()
        log_joint = so_far.log_joint
        # The verdict needs exact log-densities: a flow that has none is refused before it is trained.
        flow.transform.exact()
        if not flow().has_rsample:
            raise OptionError(
                "the draws of this guide's flow carry no gradients, as for a mixture of flows, so that it cannot be "
                "trained by them: give another guide"
            )
        num_tempered = NUM_TEMPERED_STEPS if self.num_steps is None else self.num_steps // 3
        tempering = None if self.temper is None else Tempering(self.temper, num_tempered)
        objective = so_far.elbo_of(flow, self.estimator, NUM_PARTICLES, so_far.own_parameters, tempering)
        objective.num_particles = self.num_particles or num_particles_of(objective)
        hold = tempering.num_steps if tempering else 0
        schedule = schedule_of(objective, self.num_steps, hold)
        trainer = Trainer(
            objective,
            schedule,
            **updates_of(objective, self.optimizer),
            compile=log_joint.compiler,
            callback=None if self.callback is None else self._called_with(so_far),
            progress_bar=progress,
        )
        progress.train()
        so_far.note_training(make, trainer.history)
        try:
            return trainer.run()
        except DivergedError as error:
            raise _explained(error, flow, log_joint) from None

    def _called_with(self, so_far: FitSoFar) -> Callable[[History], bool]:
        """The callback as the trainer calls it."""
        callback: Any = self.callback

        def call(history: History) -> bool:
            so_far.is_ended = ends_training(callback(history, so_far.copied_posterior()))
            return not so_far.is_ended

        return call


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
    with seeded(0), torch.no_grad():
        at_edges = posterior.layout.at_edges(posterior._draw(NUM_EDGE_DRAWS))
    shares = {name: float(is_at_edge.double().mean()) for name, is_at_edge in at_edges.items()}
    too_many = {name: share for name, share in shares.items() if share > MAX_SHARE_AT_EDGES}
    if not too_many:
        return None
    sites = ", ".join(f"{share:.0%} at site '{name}'" for name, share in too_many.items())
    return (
        f"the fit in float32 has many draws on an edge of their support ({sites}), which it cannot tell from the edge"
    )
