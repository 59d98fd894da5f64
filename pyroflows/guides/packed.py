"""The flow guide, a Pyro ``AutoContinuous`` whose distribution over all latents is one flow."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import Distribution
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.poutine import Trace
from torch import Tensor

from pyroflows.errors import CheckpointError, ModelError, OptionError
from pyroflows.flows import Flow, Mixture, Recipe
from pyroflows.flows.conversion import as_flow
from pyroflows.flows.without_data import require_no_statistics
from pyroflows.grad_mode import isolated
from pyroflows.guides.centering import Centering, centerings
from pyroflows.guides.enumerating import require_enumeration
from pyroflows.guides.flow_functions import as_flow_fn
from pyroflows.guides.hierarchical import hierarchy_of
from pyroflows.guides.left_out import with_left_out
from pyroflows.guides.neutra import ToDeclaredSpace
from pyroflows.guides.param_store import claim_parameters
from pyroflows.guides.state import FlowState
from pyroflows.models.arguments import in_dtype
from pyroflows.models.centred_forms import CentredForms
from pyroflows.models.fixed_supports import require_fixed_supports
from pyroflows.models.layout import Layout, constrain_site, unpack
from pyroflows.models.requirements import describe_for_flow, require_dtype, require_local_rows
from pyroflows.models.structure import ModelStructure, Site
from pyroflows.models.tracing import InitFn, Model, latent_init
from pyroflows.transforms import Compose, Elementwise, FlowTransform, Triangular
from pyroflows.transforms.univariate import Affine

FlowFn = Callable[[int], Any]

NUM_QUANTILE_SAMPLES = 10_000
NOT_BUILT = "this guide is not built yet: call guide(*args) once with the model's arguments"


def flow_near(flow_fn: FlowFn, loc: Tensor, scale: Tensor, centering: Centering | None = None) -> Flow:
    r"""Build the flow of a guide, :math:`x = \mu + S\, T(z)`, where T is the flow that a function makes.

    Layers of T that learn before training, such as :class:`pyroflows.transforms.ActNorm`, learn from draws.

    Args:
        flow_fn: ``latent_dim -> flow``, which makes T.
        loc: :math:`\mu`, ``(latent_dim,)``; the flow gets its dtype and device.
        scale: S, positive ``(latent_dim,)`` or lower triangular ``(latent_dim, latent_dim)``.
        centering: a layer that follows, of which the flow gets a copy; None for none.

    Raises:
        OptionError: if S is not lower triangular with a positive diagonal, or a layer keeps running statistics of data.
        ShapeError: if ``flow_fn`` gives a flow of another dimension.

    Example:
        >>> flow = flow_near(Recipe("Gaussian"), loc=torch.tensor([1.0, 2.0]), scale=torch.tensor([1e-3, 1e-3]))
        >>> flow().sample().round()
        tensor([1., 2.])
    """
    dim = len(loc)
    flow = as_flow(flow_fn(dim), dim)
    require_no_statistics(flow, "a guide")
    last: FlowTransform
    if scale.dim() == 1:
        last = Elementwise(dim, Affine(None, None), init=torch.stack([loc, scale.log()], -1))
    else:
        last = Triangular(dim, loc=loc, scale_tril=scale)
    layers = [*flow.layers, last, *([] if centering is None else [copy.deepcopy(centering)])]
    flow = Flow(layers, base=flow.base, standardize=False).to(loc)
    if not loc.is_meta:
        flow.adapt_to_draws()
    return flow


def _point_mass(site: Site, value: Tensor, ladj: Tensor) -> Distribution:
    """A site's value under a guide, with the density that the bijection adds; masked where entries are left out."""
    log_density = 0.0 if poutine.get_mask() is False else -ladj
    delta = dist.Delta(value, log_density=log_density, event_dim=value.dim() - ladj.dim())
    if site.kept is not None:
        delta = delta.mask(site.kept.to(value.device))
    return delta.to_event(site.event_dim - delta.event_dim)


def _unpacked(latent: Tensor, layout: Layout) -> Iterator[tuple[Site, Tensor]]:
    """Iterate over the sites and their unconstrained values, broadcast over plates around the guide."""
    for site, part in layout.split(latent):
        assert site.unconstrained_shape is not None
        event_dim = site.event_dim + len(site.unconstrained_shape) - len(site.shape)
        shape = torch.broadcast_shapes(site.unconstrained_shape, latent.shape[:-1] + (1,) * event_dim)
        yield site, unpack(site, part).reshape(shape)


class AutoFlow(AutoContinuous):
    r"""A guide whose distribution over all continuous latents, packed into one unconstrained vector, is a flow.

    .. math:: x = \mu + \sigma \odot T(z)

    T is the flow that ``flow_fn`` makes; :math:`\mu` and :math:`\sigma` belong to a last affine layer, which starts at
    ``init_loc_fn`` and ``init_scale``. Layers start close to the identity, so the guide starts as a narrow version of
    the base around the initial values. It works wherever Pyro's own autoguides do: ``SVI`` with any ELBO,
    ``Predictive``, ``AutoGuideList``, ``NeuTraReparam``, the param store. The flow is built at the first call with the
    model's arguments, or by ``load_state_dict``. It leaves discrete latents to ``TraceEnum_ELBO``.

    Args:
        model: a Pyro model whose latents are continuous, or discrete with values that can be enumerated, and the same
            in every run.
        flow_fn: ``latent_dim -> flow``, where the flow is a :class:`pyroflows.Flow`, a torch or Pyro transform, a list
            of these, or a Zuko flow; or a :class:`pyroflows.flows.Recipe`, or a class of flows that has one, which a
            saved posterior can rebuild; None for ``Recipe("default", scaled=True)``: affine IAF layers for 2 to 64
            latents, couplings for more, planar layers for one.
        init_loc_fn: function that gives the initial values by site, one of Pyro's ``init_to_...`` functions.
        init_scale: initial standard deviation in the unconstrained space, positive.
        dtype: dtype in which the flow and the model run; None for that of the model's latents.

    Raises:
        ModelError: at the first call, if a flow cannot fit the model; in a step of an ELBO that does not enumerate, if
            it has discrete latents; names the site.
        OptionError: if ``flow_fn`` is no function, ``init_scale`` is not positive, or ``dtype`` is neither float32 nor
            float64.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = AutoFlow(model)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> loss = svi.step(torch.tensor(1.0))
    """

    def __init__(
        self,
        model: Model,
        flow_fn: FlowFn | None = None,
        *,
        init_loc_fn: InitFn = init_to_median,
        init_scale: float = 0.1,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not init_scale > 0:
            raise OptionError(f"init_scale must be positive, got {init_scale}")
        require_dtype(dtype)
        super().__init__(in_dtype(model, dtype), init_loc_fn=latent_init(init_loc_fn))
        self.flow_fn = Recipe("default", scaled=True) if flow_fn is None else as_flow_fn(flow_fn)
        self._init_scale = init_scale
        self.dtype = dtype
        self.layout: Layout | None = None
        self.flow: Flow | None = None
        # Whether the flow got new values from a state dict, a start or a fit since the last call. They then take
        # precedence over values that were loaded into Pyro's store.
        self._holds_new_values = False
        # The centers of angles in a state that was loaded before the guide is built.
        self._centers: dict[str, Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents, as a dictionary by site.

        Args:
            args: the model's arguments.
            kwargs: the model's keyword arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        require_enumeration(self._built_layout().structure)
        self._claim_parameters()
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        values, ladjs = {}, {}
        for site, unconstrained in _unpacked(latent, self._built_layout()):
            values[site.name], ladjs[site.name] = constrain_site(site, unconstrained)
        structure = self._built_layout().structure
        # A guide that was unpickled has no model, and leaves entries without a posterior at a constant.
        if self.__dict__["_model"] is not None:
            values = with_left_out(values, structure, self.model, args, kwargs)
        for site in structure.latents:
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[site.name]:
                    stack.enter_context(plates[frame.name])
                pyro.sample(site.name, _point_mass(site, values[site.name], ladjs[site.name]))
        return values

    def _claim_parameters(self) -> None:
        flow = self._modules.get("flow")
        if flow is not None and not pyro.settings.get("module_local_params"):
            claim_parameters(self._pyro_get_fullname("flow"), flow, takes_loaded=not self._holds_new_values)
            self._holds_new_values = False

    @isolated
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        structure, trace = describe_for_flow(self.model, args, kwargs)
        self._require_rows(structure)
        require_fixed_supports(structure, self.model, args, kwargs)
        layout = Layout(structure).at_centers(self._centers)
        flow = self._modules.get("flow")
        if flow is not None and flow.event_shape != (layout.dim,):
            raise CheckpointError(
                f"this guide holds a flow of {flow.dim} dimensions, but the model has {layout.dim} "
                "unconstrained latents: the state or file belongs to another model"
            )
        self.layout = layout
        self._keep_prototype(trace)
        if self.master is None:
            # NeuTraReparam needs the plates even if the guide was trained without being called.
            with poutine.block():
                self._create_plates(*args, **kwargs)
        if flow is None:
            self.flow = self._flow_at(self._init_loc().to(self.dtype or layout.dtype))
        self._bind(args, kwargs)

    def _bind(self, args: Any, kwargs: Any) -> None:
        """Give the flow the priors of the model, if it has layers that need them."""
        layers = centerings(self._built())
        if layers:
            for name in layers[0].names:
                if name not in self._built_layout().slices:
                    raise CheckpointError(
                        f"this guide has learned the centring of latent site '{name}', which the model does not have: "
                        "the state or file belongs to another model"
                    )
            loc = self._init_loc().to(next(layers[0].parameters()))
            forms = CentredForms(self.model, args, kwargs, self._built_layout(), layers[0].names, loc)
            for layer in layers:
                layer.bind(forms)

    def _require_rows(self, structure: ModelStructure) -> None:
        """Raise if the run of the model that builds the guide does not show all latents."""
        require_local_rows(structure)

    def _keep_prototype(self, trace: Trace) -> None:
        """Set the attributes that Pyro's own ``_setup_prototype`` sets, without a second run of the model."""
        for name, node in list(trace.nodes.items()):
            if node["type"] in ("sample", "param") and self._prototype_hide_fn(node):
                trace.remove_node(name)
        if self.master is not None:
            self.master()._check_prototype(trace)
        self.prototype_trace = trace
        self._cond_indep_stacks = {name: node["cond_indep_stack"] for name, node in trace.iter_stochastic_nodes()}
        self._prototype_frames = {frame.name: frame for stack in self._cond_indep_stacks.values() for frame in stack}
        self.latent_dim = self._built_layout().dim

    @property
    def structure(self) -> ModelStructure | None:
        """The structure of the model; None before the guide is built."""
        return None if self.layout is None else self.layout.structure

    def _built_layout(self) -> Layout:
        if self.layout is None:
            raise ModelError(NOT_BUILT)
        return self.layout

    @property
    def _unconstrained_shapes(self) -> dict[str, torch.Size | None]:
        return {site.name: site.unconstrained_shape for site in self._built_layout().structure.latents}

    def _init_loc(self) -> Tensor:
        nodes = self.prototype_trace.nodes
        layout = self._built_layout()
        return layout.unconstrain({site.name: nodes[site.name]["value"] for site in layout.structure.latents})

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """Iterate over the sites' nodes and unconstrained values, broadcast over plates around the guide."""
        for site, unconstrained in _unpacked(latent, self._built_layout()):
            yield self.prototype_trace.nodes[site.name], unconstrained

    def _flow_at(self, loc: Tensor, scale: Tensor | None = None, centering: Centering | None = None) -> Flow:
        scale = torch.full_like(loc, self._init_scale) if scale is None else scale
        return flow_near(self.flow_fn, loc, scale, centering)

    def hold(self, flow: Flow, flow_fn: FlowFn) -> None:
        """Take over a flow that was fitted elsewhere.

        Args:
            flow: a flow that :func:`flow_near` built, or a mixture of such flows.
            flow_fn: the function or recipe that made it.
        """
        self.flow, self.flow_fn = flow, flow_fn
        self._holds_new_values = True

    def holding(self, flow: Flow, flow_fn: FlowFn) -> "AutoFlow":
        """Return a guide like this one that holds another flow, as by :meth:`hold`; this one stays as it is."""
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(self.__dict__, _modules=dict(self._modules))
        made.hold(flow, flow_fn)
        return made

    def center_at(self, centers: Mapping[str, Tensor]) -> None:
        """Put other angles at the origin of the unconstrained space, so that draws of the flow stand for other angles.

        Args:
            centers: angles by site on circles, such as ``layout.centers`` of another guide; other names are ignored.
        """
        self._centers = dict(centers)
        if self.layout is not None:
            self.layout = self.layout.at_centers(self._centers)

    def start_at(self, loc: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> None:
        r"""Build the flow anew so that it starts close to :math:`\mu + S z`, whatever it has learned before.

        Args:
            loc: :math:`\mu`, a packed unconstrained vector ``(latent_dim,)``.
            scale: S, positive ``(latent_dim,)`` or lower triangular ``(latent_dim, latent_dim)``; with a triangular
                scale the other layers learn in whitened coordinates.
            args: the model's arguments.
            kwargs: the model's keyword arguments.

        Raises:
            OptionError: if S is not lower triangular with a positive diagonal.
        """
        if self.layout is None:
            self._setup_prototype(*args, **kwargs)
        layout = self._built_layout()
        dtype = self.dtype or layout.dtype
        self.flow = self._flow_at(loc.to(dtype), scale.to(dtype))
        self._holds_new_values = True

    @property
    def _recipe(self) -> Recipe | None:
        return self.flow_fn if isinstance(self.flow_fn, Recipe) else None

    def get_extra_state(self) -> Tensor:
        """Note in the state dict how the flow was built; an empty tensor if it is not built yet."""
        flow = self.flow
        if flow is None:
            return torch.zeros(0, dtype=torch.uint8)
        return self._state_of(flow).to_tensor().to(next(flow.parameters()).device)

    def _state_of(self, flow: Flow) -> FlowState:
        return FlowState.of(flow, self._recipe, self._centers if self.layout is None else self.layout.centers)

    def set_extra_state(self, state: Tensor) -> None:
        """Build the flow of a state dict, or check that it is built like the flow that this guide holds.

        Args:
            state: what :meth:`get_extra_state` gave.

        Raises:
            CheckpointError: if this guide makes, or holds, another flow; names the first difference.
        """
        if not state.numel():
            return
        saved = FlowState.from_tensor(state)
        held = replace(saved, recipe=self._recipe) if self.flow is None else self._state_of(self.flow)
        saved.check_same(held)
        self.center_at(saved.centers)
        if self.flow is None:
            zeros = torch.zeros(saved.dim, dtype=getattr(torch, saved.dtype), device=state.device)
            centering = Centering(saved.centred, zeros) if saved.centred else None
            parts = [self._unfilled_flow(saved, zeros, centering) for _ in range(saved.num_components)]
            self.flow = parts[0] if len(parts) == 1 else Mixture(parts)
        self._holds_new_values = True

    def _unfilled_flow(self, saved: FlowState, zeros: Tensor, centering: Centering | None) -> Flow:
        if saved.hierarchy is not None:
            return hierarchy_of(saved.hierarchy, self.flow_fn, zeros, centering)
        scale = torch.eye(saved.dim).to(zeros) if saved.last_layer == "triangular" else None
        return self._flow_at(zeros, scale, centering)

    def _built(self) -> Flow:
        flow = self.flow
        if flow is None:
            raise ModelError(NOT_BUILT)
        return flow

    def get_base_dist(self) -> Distribution:
        """The base distribution of the flow."""
        return self._built().base()

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The map from base values z to unconstrained latents, with a cache of its last pair of values.

        It is what ``NeuTraReparam`` uses. The unconstrained values are those of Pyro, from which the site's declared
        support gives the values; where this support is too large, they fill a part of the real line.
        """
        transform = self._built().transform.exact()
        if self.layout is not None:
            to_declared = ToDeclaredSpace(self.layout, self.prototype_trace)
            transform = transform if to_declared.is_identity else Compose([transform, to_declared])
        return transform.with_cache()

    def get_posterior(self, *args: Any, **kwargs: Any) -> Distribution:
        """The distribution of the packed unconstrained latents, with event shape ``(latent_dim,)``."""
        return self._built()()

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw a packed vector, at a sample site of the law of :meth:`get_posterior`.

        With gradients, as ``SVI`` runs the guide, the site has the values and log-densities that layers give in
        training, and without them the exact ones.
        """
        law: Any = self.get_posterior(*args, **kwargs)
        if torch.is_grad_enabled():
            law = law.estimated()
        return pyro.sample(f"_{self._pyro_name}_latent", law, infer={"is_auxiliary": True})

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal posterior medians by site, from samples; the medians of a simplex need not sum to one.

        Args:
            args: the model's arguments, needed only if the guide is not built yet.
            kwargs: the model's keyword arguments.
        """
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal posterior quantiles of every component, from samples.

        Args:
            quantiles: probabilities between 0 and 1.
            args: the model's arguments, needed only if the guide is not built yet.
            kwargs: the model's keyword arguments.

        Returns:
            Tensors ``(len(quantiles), *site shape)`` by site.
        """
        if self.layout is None:
            self._setup_prototype(*args, **kwargs)
        latents = self.get_posterior().sample((NUM_QUANTILE_SAMPLES,))
        values, _ = self._built_layout().constrain(latents)
        levels = torch.as_tensor(quantiles, dtype=latents.dtype, device=latents.device)
        return {name: torch.quantile(value, levels, dim=0) for name, value in values.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's version also removes the model from the guide that is copied. Functions are left out, since functions
        # that users write at the prompt cannot be pickled.
        return {**self.__dict__, "_model": None, "master": None, "flow_fn": self._recipe}

    def __deepcopy__(self, memo: dict[int, Any]) -> "AutoFlow":
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # Attributes are set through __dict__, since a module would register a model that is a module.
        copied.__dict__.update(_model=self.__dict__["_model"], flow_fn=self.flow_fn)
        return copied
