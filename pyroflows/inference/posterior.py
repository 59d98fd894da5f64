"""The result of a fit: a posterior that samples, scores, judges and corrects itself."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pyroflows import plots
from pyroflows.errors import OptionError, each_said_once
from pyroflows.fitting import DensityFit, Distillation, MatchingFit
from pyroflows.grad_mode import isolated
from pyroflows.guides import AutoFlow
from pyroflows.guides.packed import FlowFn
from pyroflows.inference import files, refit
from pyroflows.inference.bridge import BridgeEstimate, bridge_estimate
from pyroflows.inference.export import arviz_data
from pyroflows.inference.judged import JudgedApproximation
from pyroflows.inference.local import draw_locals, log_joint_of_rows, require_structured
from pyroflows.inference.local_draws import LocalDraws
from pyroflows.inference.mcmc import Chains
from pyroflows.inference.mcmc.hmc import TOO_FEW
from pyroflows.inference.mcmc.sampling import LatentChains, sample_latents
from pyroflows.inference.pairs import NUM_DRAWS, plot_pairs
from pyroflows.inference.search.starts import Starts
from pyroflows.inference.summary import Summary
from pyroflows.inference.weights import WeightedDraws, Weights, in_batches
from pyroflows.interruption import keeping
from pyroflows.models.arguments import require_arguments, require_own_options, usable_arguments
from pyroflows.models.structure import model_parameters
from pyroflows.options import kind
from pyroflows.randomness import seeded
from pyroflows.training.history import History


class Posterior(JudgedApproximation):
    """A flow as the posterior of a Pyro model.

    Args:
        model: the Pyro model.
        guide: a flow guide, built and trained.
        args: the model's positional arguments.
        kwargs: the model's keyword arguments.
        history: the history of the training; empty if the flow was not trained on the model.
        starts: the result of the search for modes, if the fit made one.
        num_diagnostic_samples: number of draws from which ``elbo``, ``khat``, ``ess``, ``log_evidence`` and the verdict
            are computed, at least 100; four times as many where the verdict would otherwise hang on their errors. None
            for 10,000, and for fewer with more than 2,000 latents.
        compile: how the log joint is compiled for chains, as for :class:`FlowVI`.
        log_joint: the log joint of the model with these arguments, if a fit has made it; None to make it when needed.
        draws: the draws behind the figures, if a fit has made them; None to make them when needed.
        outcome: how the fit ended; None if it is not known.
        labels: the names of dimensions and the labels along them, of which those are kept that fit the model.

    Attributes:
        refitted: the result of :meth:`distill` or :meth:`fit_proposal`, if one of them fitted the guide; it holds the
            KL divergence or the log-density, and has ``plot()``.

    Raises:
        ModelError: if the guide is not built yet, or the model shows other latents than the guide's.
        OptionError: if ``num_diagnostic_samples`` is below 100.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("N", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = pf.FlowVI(model, num_steps=400, seed=0, progress_bar=False).run(torch.tensor([1.0, 2.0]))
        >>> posterior.sample(100)["mu"].shape
        torch.Size([100])
        >>> posterior.diagnose().verdict
        'good'
    """

    refitted: Distillation | DensityFit | MatchingFit | None = None

    @isolated
    def with_data(self, *args: Any, **kwargs: Any) -> "Posterior":
        """The same flow as the posterior at other arguments of the model, for instance without subsampling.

        Labels of a dimension whose number of entries changes are left out.

        Args:
            args: the model's arguments, for which it must have the same latents.
            kwargs: the model's keyword arguments.

        Raises:
            OptionError: if the model does not take these arguments.
            ModelError: if the model has other latents at these arguments.
        """
        require_arguments(self.model, args, kwargs)
        return Posterior(
            self.model,
            self.guide,
            args,
            kwargs,
            self.history,
            self.starts,
            self.num_diagnostic_samples,
            self._compile,
            outcome=self.outcome,
            labels=self.labels,
        )

    @isolated
    @keeping("importance sampling", lambda found: found, "a batch of draws")
    def importance_sample(self, num_samples: int, seed: int | None = None, progress_bar: bool = True) -> WeightedDraws:
        """Draw from the flow and weight the draws by Pareto-smoothed importance weights.

        Args:
            num_samples: number of draws, at least 1.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.
            progress_bar: whether to show one.

        Raises:
            OptionError: if ``num_samples`` is not a positive integer.
            ModelError: if a plate is subsampled.
            FitInterrupted: if the call is interrupted, such as by Ctrl-C; its ``result`` holds the draws so far, if
                there are any, and otherwise is None.

        Example:
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            >>> posterior = pf.FlowVI(model, seed=0, progress_bar=False).run(torch.tensor(1.0))
            >>> weighted = posterior.importance_sample(1000, progress_bar=False)
            >>> weighted.draws["mu"].shape, weighted.log_weights.shape
            (torch.Size([1000]), torch.Size([1000]))
        """
        self._require_full_plates()
        batched = self.log_joint.batched

        def make(draws: dict[str, Tensor], weights: Weights) -> WeightedDraws:
            return WeightedDraws(draws, weights, self.structure, self.labels, batched)

        with seeded(seed):
            latents, log_q = self._latents(num_samples)

            def weighted(rows: slice) -> tuple[dict[str, Tensor], Tensor]:
                return self._sites(latents[rows]), self.log_joint.in_chunks(latents[rows]) - log_q[rows]

            return in_batches(weighted, make, len(latents), batched.chunk_size, progress_bar)

    @isolated
    def local(self, *args: Any, num_samples: int = 1000, seed: int | None = None, **kwargs: Any) -> LocalDraws:
        r"""Draw the latents of the rows of a plate given the globals, and judge each row by itself, without a new fit.

        The posterior must be that of :class:`pyroflows.guides.AutoStructuredFlow`. With arguments of the model, the
        rows are those of these arguments, such as schools that were never seen; they need a guide whose encoder reads
        the data. The data of new rows enter the globals by the weights alone, each row by itself. Without arguments the
        rows are those of the fit. Their data are in the globals already: 20 successive draws then have the same
        globals, and their weights count against one another alone.

        Args:
            args: arguments of the model with the data of the new rows; none for the rows of the fit. A model with an
                argument named like an option gets it by position.
            num_samples: number of draws, at least 1; without arguments it is rounded up to a multiple of 20.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.
            kwargs: keyword arguments of the model.

        Returns:
            The :class:`pyroflows.LocalDraws`: draws ``(S, *site shape)`` by site, with weights and a verdict for each
            row of the outermost plate with latents.

        Raises:
            OptionError: if the guide has no flows for rows, or parameters for each row where new rows are given; or for
                an option outside its range.
            ModelError: if the model has other latents at these arguments or sees a part of the rows, if rows depend on
                one another given the
                globals, if data of a row stand outside of its plate, or if several plates with latents cross.

        Example:
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("rows", len(y)) as rows:
            ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
            ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            >>> guide = pf.guides.AutoStructuredFlow(model, encoder=lambda rows, y: y[rows, None])
            >>> vi = pf.FlowVI(model, guide, num_steps=20, num_particles=8, seed=0, progress_bar=False)
            >>> posterior = vi.run(torch.randn(30))
            >>> posterior.local(torch.tensor([2.0, 0.0])).draws["z"].shape
            torch.Size([1000, 2])
        """
        guide = require_structured(self.guide)
        require_own_options({"num_samples": num_samples != 1000, "seed": seed is not None}, self._model, args)
        is_own = not args and not kwargs
        # What is drawn to set the model up must not change the draws.
        with seeded(0):
            if is_own:
                args, kwargs, log_joint = self._args, self._kwargs, self.log_joint
            else:
                require_arguments(self._model, args, kwargs)
                args, kwargs = usable_arguments(self._model, args, kwargs, guide.dtype)
                log_joint = log_joint_of_rows(self._model, guide, args, kwargs)
        with seeded(seed):
            return draw_locals(guide, args, kwargs, log_joint, self.labels, num_samples, is_own)

    @isolated
    def distill(self, flow_fn: FlowFn | None = None, **options: Any) -> "Posterior":
        """Distill the flow into another one, for instance a slow sampler into a quick one.

        The new posterior judges itself against the model, as any posterior does.

        Args:
            flow_fn: ``latent_dim -> flow``, as for :class:`pyroflows.guides.AutoFlow`; None for the default recipe.
            options: options of :func:`pyroflows.distill`.

        Raises:
            OptionError: for an option outside its range, or a student whose draws carry no gradients.
            DivergedError: if the loss stays non-finite.
            FitInterrupted: if the fit is interrupted, such as by Ctrl-C; its ``result`` is the new posterior with the
                best state so far.

        Example:
            >>> def model(y):
            ...     mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            ...     pyro.sample("y", dist.Normal(mu.prod(-1), 0.5), obs=y)
            >>> options = {"num_steps": 100, "seed": 0, "progress_bar": False}
            >>> slow = pf.FlowVI(model, lambda dim: pf.flows.MAF(dim), **options).run(torch.tensor(1.0))
            >>> fast = slow.distill(warm_start=100, **options)
            >>> fast.sample(5)["mu"].shape
            torch.Size([5, 2])
        """
        make = partial(self._with_guide, self.starts)
        return refit.distilled(make, self.model, self.guide, flow_fn, self._args, self._kwargs, options)

    @isolated
    def fit_proposal(
        self,
        flow_fn: FlowFn | None = None,
        num_samples: int = 20_000,
        seed: int | None = None,
        chains: Chains | None = None,
        method: str = "auto",
        **options: Any,
    ) -> "Posterior":
        r"""Fit another flow to this posterior's importance-weighted draws, or to draws of chains.

        By maximum likelihood the fit maximises :math:`\sum_i w_i \log q(x_i)`. If the weights are good, it minimises
        the forward KL divergence from the exact posterior to q. Where the fit by reverse KL is too narrow, the new flow
        covers what the weights show, and is the better proposal for importance sampling and for independence chains. It
        cannot find a region that no draw has visited. Chains that have mixed serve where the weights are poor.

        Args:
            flow_fn: ``latent_dim -> flow``, which should be quick to score; None for :class:`pyroflows.flows.MAF`, or
                :class:`pyroflows.flows.NSF` for a single latent.
            num_samples: number of weighted draws, at least 1.
            seed: seed that makes draws and fit reproducible and leaves the global generator as it was; None to use the
                global generator.
            chains: chains of this posterior, by :meth:`mcmc`, to whose draws the flow is fitted; None for weighted
                draws.
            method: "maximum_likelihood"; "flow_matching" for continuous flows, such as :class:`pyroflows.flows.CNF`; or
                "auto", which chooses by the flow.
            options: options of :func:`pyroflows.fit_density`, whose ``patience`` is 5 here by default, or of
                :func:`pyroflows.fit_flow_matching`.

        Raises:
            OptionError: for an option outside its range.
            ModelError: if a plate is subsampled.
            FitInterrupted: if the fit is interrupted, such as by Ctrl-C; its ``result`` is the new posterior with the
                best state so far.
        """
        self._require_full_plates()
        with seeded(seed):
            latents, weights = self._weighted_latents(num_samples) if chains is None else self._latents_of(chains)
            # The new flow covers those modes that the draws have visited; the modes of the first fit say nothing of it.
            make = partial(self._with_guide, None)
            return refit.weighted(
                make, self.model, self.guide, flow_fn, latents, weights, self._args, self._kwargs, method, options
            )

    def _weighted_latents(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Draw unconstrained vectors ``(S, dim)`` from the flow, with smoothed weights ``(S,)`` that sum to one."""
        latents, log_q = self._latents(num_samples)
        weights = Weights.smoothed(self.log_joint.in_chunks(latents) - log_q)
        return latents, weights.normalized.to(latents)

    def _latents_of(self, chains: Chains) -> tuple[Tensor, Tensor]:
        """The distinct draws of all chains as unconstrained vectors ``(S, dim)``, and how often each occurs."""
        if not isinstance(chains, Chains):
            raise OptionError(f"chains must be what posterior.mcmc returns, got {kind(chains)}")
        draws = {name: value.flatten(0, 1) for name, value in chains.draws.items()}
        self.layout.check_draws(draws)
        # A chain that rejects a proposal repeats its state.
        latents, counts = self.layout.unconstrain(draws).to(self._center).unique(dim=0, return_counts=True)
        return latents, counts.to(latents)

    def _with_guide(
        self, starts: Starts | None, guide: AutoFlow, found: Distillation | DensityFit | MatchingFit
    ) -> "Posterior":
        made = Posterior(
            self.model,
            guide,
            self._args,
            self._kwargs,
            History(),
            starts,
            self.num_diagnostic_samples,
            self._compile,
            self.log_joint,
            labels=self.labels,
        )
        made.refitted = found
        return made

    @isolated
    def mcmc(
        self,
        num_samples: int = 250,
        num_chains: int | None = None,
        method: str = "hmc",
        num_warmup: int = 300,
        seed: int | None = None,
        progress_bar: bool = True,
    ) -> Chains:
        """Draw from the exact posterior by Markov chains in the flow's base space (NeuTra, arXiv:1903.03704).

        There the posterior is close to the base, so that chains mix quickly. A poor flow makes the chains slower, not
        wrong; ``rhat`` and ``ess`` of the result show it. The base space of a mixture of flows is the unconstrained
        space itself.

        Args:
            num_samples: number of draws that are kept of each chain, at least 4.
            num_chains: number of chains; None for 64, or 4 for "nuts".
            method: "hmc" runs many chains in one batch, tuned together; "nuts" runs Pyro's NUTS, one chain after the
                other; "independence" runs "hmc" and proposes a draw from the flow after each trajectory, which moves
                chains between separate modes if the flow covers them.
            num_warmup: number of iterations before the kept draws, in which the sampler is tuned, at least 1.
            seed: seed that makes the chains reproducible and leaves the global generator as it was; None to use the
                global generator.
            progress_bar: whether to show one.

        Raises:
            OptionError: for an option outside its range.
            ModelError: if a plate is subsampled, or if the log joint is finite at next to no draws from the flow.
            FitInterrupted: if the chains are interrupted, such as by Ctrl-C; its ``result`` holds the draws so far, if
                they are at least 4 of each chain, and otherwise is None. Of "nuts" these are the chains that are
                complete, or the first one.
        """
        self._require_full_plates()
        latents: LatentChains | None = None

        def found(interrupted: LatentChains | None = None) -> Chains | None:
            drawn = latents if interrupted is None else interrupted
            return None if drawn is None else self._chains(drawn, method)

        with keeping("mcmc", found, TOO_FEW):
            latents = sample_latents(
                self._flow, self.log_joint, method, num_samples, num_chains, num_warmup, seed, progress_bar
            )
            return self._chains(latents, method)

    def _chains(self, found: LatentChains, method: str) -> Chains:
        sites = self._sites(found.latents.flatten(0, 1))
        draws = {name: value.unflatten(0, found.latents.shape[:2]) for name, value in sites.items()}
        return Chains(draws, found.stats, method, self.structure, self.log_joint.batched, self.labels)

    @isolated
    def bridge_sample(
        self, num_samples: int = 10_000, num_warmup: int = 300, seed: int | None = None, progress_bar: bool = True
    ) -> BridgeEstimate:
        """Estimate the log evidence by bridge sampling between the flow and the exact posterior.

        If the flow is poor, or too narrow, the error is far smaller than that of ``log_evidence``, and its standard
        error can be trusted.

        Args:
            num_samples: number of draws from the posterior, by :meth:`mcmc` with "hmc", or "independence" for a mixture
                of flows, and of as many draws from the flow; at least 1000.
            num_warmup: number of iterations of the chains before the kept draws, at least 1.
            seed: seed that makes the estimate reproducible and leaves the global generator as it was; None to use the
                global generator.
            progress_bar: whether to show one.

        Raises:
            OptionError: for an option outside its range.
            ModelError: if a plate is subsampled, or if the log joint is finite at next to no draws from the flow.
            FitInterrupted: if the chains are interrupted, such as by Ctrl-C; its ``result`` is the estimate by the
                draws so far, if they are at least 100 of each chain, and otherwise None.
        """
        self._require_full_plates()
        return bridge_estimate(self._flow, self.log_joint, num_samples, num_warmup, seed, progress_bar)

    @isolated
    def to_arviz(
        self,
        num_samples: int = 1000,
        log_likelihood: bool = True,
        posterior_predictive: bool = True,
        prior: bool = True,
        coords: Mapping[str, Sequence[Any]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        seed: int | None = None,
    ) -> Any:
        """Convert one chain of draws from the flow to ArviZ data: InferenceData (ArviZ 0.x) or DataTree (1.x).

        ``sample_stats`` holds ``lp`` and ``log_q`` in the unconstrained space, and ``log_weight``. R-hat means nothing
        here: the draws are independent, whether or not the flow fits. What cannot be drawn or scored is left out, and
        one warning says which site of which group, and why.

        Args:
            num_samples: number of draws, at least 1.
            log_likelihood: whether to add the pointwise log-likelihood, which ``az.loo`` needs.
            posterior_predictive: whether to add posterior predictive draws.
            prior: whether to add prior and prior predictive draws.
            coords: labels by dimension, in place of those of the fit.
            dims: names of dimensions by site, in place of those of the fit.
            seed: seed that makes the draws reproducible and leaves the global generator as it was; None to use the
                global generator.

        Raises:
            ModelError: if a plate is subsampled.
            OptionError: if ``coords`` or ``dims`` name what does not exist, or give a wrong number of labels.
        """
        self._require_full_plates()
        labels = self.labels.updated(self.structure, coords, dims)
        with seeded(seed), each_said_once(self.log_joint.batched.said):
            latents, log_q = self._latents(num_samples)
            log_p = self.log_joint.in_chunks(latents)
            return arviz_data(
                self._sites(latents),
                self.structure,
                self.log_joint.batched,
                sample_stats={"lp": log_p, "log_q": log_q, "log_weight": log_p - log_q},
                log_likelihood=log_likelihood,
                posterior_predictive=posterior_predictive,
                prior=prior,
                coords=labels.coords,
                dims=labels.dims,
            )

    def plot_training(self) -> Any:
        """Plot the ELBO and the variance of the log weights over the steps, as a matplotlib figure.

        Where a flow was trained at each of several modes, these are the steps of the first.

        Raises:
            PlotError: if matplotlib is not installed, or no flow was trained on the model.
        """
        return plots.plot_training(self.history)

    def plot_pairs(
        self,
        var_names: Sequence[str] | None = None,
        coords: Mapping[str, Any] | None = None,
        num_samples: int = NUM_DRAWS,
        **kwargs: Any,
    ) -> Any:
        """Plot marginals and pairs of up to six components, by ArviZ; the figure has ``savefig``.

        Without ``var_names`` and ``coords`` these are the first six, scalar sites before others; the title says what is
        left out. Of a single component there is the marginal.

        Args:
            var_names: sites to show; None for those that :meth:`summary` shows.
            coords: labels to show by dimension, one or a list of them; plates are dimensions, whose rows are numbered
                where they have no labels.
            num_samples: number of draws, at least 1.
            kwargs: further options of ArviZ's ``plot_pair``, or ``plot_dist`` for a single component.

        Raises:
            PlotError: if matplotlib is not installed.
            OptionError: if there is no such site, dimension or label, or if more than six components were chosen.
        """
        plots.require_matplotlib()
        return plot_pairs(Summary(self.sample(num_samples), self.structure, self.labels), var_names, coords, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write the flow, the latents and parameters of the model, and what is known of the fit to a safetensors file.

        :func:`pyroflows.load_posterior` reads the file. It takes the place of an older one only once it is complete.
        Labels that are neither strings nor numbers, such as dates, are written as strings.

        Raises:
            CheckpointError: if the file cannot be written, or the path is that of a directory or a device.
        """
        parameters = model_parameters(self.structure, self._model, self._args, self._kwargs, self._init_fn)
        # The verdict is not worth new draws, which cost more than all the rest.
        verdict = str(self.diagnose()) if "_diagnostics" in vars(self) else None
        files.save(
            self.guide, self.structure, parameters, self.history, self.starts, verdict, self.outcome, self.labels, path
        )
