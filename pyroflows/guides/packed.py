"""The flow guide: a Pyro ``AutoContinuous`` whose distribution is a flow."""

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution
from pyro.infer.autoguide import AutoContinuous, init_to_median
from pyro.params.param_store import param_with_module_name
from pyro.poutine import Trace
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyroflows.errors import CheckpointError, ModelError, OptionError
from pyroflows.flows import Flow, Mixture, Recipe
from pyroflows.flows.flow import as_flow
from pyroflows.guides.state import FlowState
from pyroflows.models.layout import Layout
from pyroflows.models.requirements import require_flow
from pyroflows.models.structure import InitFn, Model, ModelStructure, describe_run, in_dtype, latent_init
from pyroflows.transforms import Elementwise, FlowTransform, Triangular
from pyroflows.transforms.univariate import Affine

FlowFn = Callable[[int], Any]

NUM_QUANTILE_SAMPLES = 10_000
NOT_BUILT = "this guide is not built yet: call guide(*args) once with the model's arguments"

# The parameters that guides have put into Pyro's store. A tensor there that is none of them was loaded: nothing else
# tells them apart, since a loaded state holds parameters too, under the same names.
_PARAMETERS: MutableMapping[Tensor, None] = WeakIdKeyDictionary()


def flow_near(flow_fn: FlowFn, loc: Tensor, scale: Tensor) -> Flow:
    r"""The flow of a guide: that of a recipe under a last affine layer, :math:`x = \mu + S\, t(z)`.

    Args:
        flow_fn: ``latent_dim -> flow``.
        loc: :math:`\mu`, ``(latent_dim,)``, whose dtype and device are the flow's.
        scale: S, positive ``(latent_dim,)`` or lower triangular ``(latent_dim, latent_dim)``.

    Raises:
        OptionError: if S is not lower triangular with a positive diagonal.
        ShapeError: if ``flow_fn`` gives a flow of another dimension.
    """
    dim = len(loc)
    flow = as_flow(flow_fn(dim), dim)
    last: FlowTransform
    if scale.dim() == 1:
        last = Elementwise(dim, Affine(None, None), init=torch.stack([loc, scale.log()], -1))
    else:
        last = Triangular(dim, loc=loc, scale_tril=scale)
    return Flow([*flow.layers, last], base=flow.base, standardize=False).to(loc)


class AutoFlow(AutoContinuous):
    r"""A guide whose law over all latents, packed into one unconstrained vector, is a flow.

    .. math:: x = \mu + \sigma \odot T(z)

    where T is the flow of ``flow_fn`` and :math:`\mu, \sigma` are a last affine layer that starts at ``init_loc_fn``
    and ``init_scale``. Layers start close to the identity, so the guide starts as a narrow version of the base around
    the initial values. It works wherever Pyro's own autoguides do: ``SVI`` with any ELBO, ``Predictive``,
    ``AutoGuideList``, ``NeuTraReparam``, the param store. The flow is built at the first call with the model's
    arguments, or by ``load_state_dict``.

    Args:
        model: a Pyro model whose latents are continuous and the same in every run.
        flow_fn: ``latent_dim -> flow``, where the flow is a :class:`pyroflows.Flow`, a torch or Pyro transform, a list
            of these, or a Zuko flow; or a :class:`pyroflows.flows.Recipe`, which a saved posterior remembers; None for
            ``Recipe("default")``, an affine IAF, or couplings above 64 latents, or planar layers for a single one.
        init_loc_fn: initial values by site, one of Pyro's ``init_to_...`` functions.
        init_scale: initial standard deviation in the unconstrained space, positive.
        dtype: dtype in which the flow and the model run; None for that of the model's latents.

    Raises:
        ModelError: at the first call, if the model cannot have a flow guide; names the site.
        OptionError: if ``flow_fn`` is no function or ``init_scale`` is not positive.

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
        if flow_fn is not None and (isinstance(flow_fn, Flow) or not callable(flow_fn)):
            raise OptionError(
                "flow_fn must be a function latent_dim -> flow, such as lambda dim: pf.flows.IAF(dim), got "
                f"{type(flow_fn).__name__}"
            )
        if not init_scale > 0:
            raise OptionError(f"init_scale must be positive, got {init_scale}")
        super().__init__(in_dtype(model, dtype), init_loc_fn=latent_init(init_loc_fn))
        self.flow_fn = flow_fn or Recipe("default")
        self._init_scale = init_scale
        self.dtype = dtype
        self.layout: Layout | None = None
        self.flow: Flow | None = None
        # Whether the flow was given its values, by a state dict, a start or a fit, since the last call. Then they count
        # more than what has been loaded into Pyro's store.
        self.own_values_count = False

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents, with the same arguments as the model; a dict by site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._claim_parameters()
        return super().forward(*args, **kwargs)

    def _claim_parameters(self) -> None:
        """Make Pyro's store hold this guide's own parameters under this guide's names.

        ``pyro.module`` leaves a tensor that stands there already, and a step of SVI would then train that one. It is
        another guide's of this name, which has its turn when it is called; or it was loaded, and its value counts.
        """
        flow = self._modules.get("flow")
        if flow is None or pyro.settings.get("module_local_params"):
            return
        store = pyro.get_param_store()
        for name, parameter in flow.named_parameters():
            full_name = param_with_module_name(self._pyro_get_fullname("flow"), name)
            if full_name in store and (stored := store[full_name].unconstrained()) is not parameter:
                is_loaded = stored not in _PARAMETERS
                if is_loaded and not self.own_values_count and stored.shape == parameter.shape:
                    parameter.data.copy_(stored.detach())
                del store[full_name]
            _PARAMETERS[parameter] = None
        self.own_values_count = False

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        structure, trace = describe_run(self.model, args, kwargs)
        require_flow(structure)
        layout = Layout(structure)
        flow = self._modules.get("flow")
        if flow is not None and flow.event_shape != (layout.dim,):
            raise CheckpointError(
                f"this guide holds a flow of {flow.dim} dimensions, but the model has {layout.dim} "
                "unconstrained latents: the state or file belongs to another model"
            )
        self.layout = layout
        self._keep_prototype(trace)
        if self.master is None:
            # NeuTraReparam wants them, also of a guide that was trained without being called.
            with poutine.block():
                self._create_plates(*args, **kwargs)
        if flow is None:
            self.flow = self._flow_at(self._init_loc().to(self.dtype or layout.dtype))

    def _keep_prototype(self, trace: Trace) -> None:
        """Keep what Pyro's own version of ``_setup_prototype`` keeps, without a second run of the model."""
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
        """What the model's first run showed; None before it."""
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
        """Each site's node and unconstrained value, where plates around the guide share dimensions with the site's."""
        for site, part in self._built_layout().split(latent):
            assert site.unconstrained_shape is not None
            event_dim = site.event_dim + len(site.unconstrained_shape) - len(site.shape)
            shape = torch.broadcast_shapes(site.unconstrained_shape, latent.shape[:-1] + (1,) * event_dim)
            yield self.prototype_trace.nodes[site.name], part.reshape(shape)

    def _flow_at(self, loc: Tensor, scale: Tensor | None = None) -> Flow:
        return flow_near(self.flow_fn, loc, torch.full_like(loc, self._init_scale) if scale is None else scale)

    def hold(self, flow: Flow, flow_fn: FlowFn) -> None:
        """Take over a flow that was fitted elsewhere and what made it; its last layer is one of :func:`flow_near`."""
        self.flow, self.flow_fn = flow, flow_fn
        self.own_values_count = True

    def start_at(self, loc: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> None:
        r"""Build the flow anew, close to :math:`\mu + S z` instead of ``init_loc_fn`` and ``init_scale``.

        Args:
            loc: :math:`\mu`, a packed unconstrained vector ``(latent_dim,)``.
            scale: S, positive ``(latent_dim,)`` or lower triangular ``(latent_dim, latent_dim)``; what a triangular one
                whitens, the flow learns in whitened coordinates.
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
        self.own_values_count = True

    @property
    def _recipe(self) -> Recipe | None:
        return self.flow_fn if isinstance(self.flow_fn, Recipe) else None

    def get_extra_state(self) -> Tensor:
        """How the flow was built, for the state dict; nothing for a guide that was not called yet."""
        flow = self.flow
        if flow is None:
            return torch.zeros(0, dtype=torch.uint8)
        return FlowState.of(flow, self._recipe).to_tensor().to(next(flow.parameters()).device)

    def set_extra_state(self, state: Tensor) -> None:
        """Build the flow that a state dict belongs to, or compare it with the flow that this guide holds.

        Raises:
            CheckpointError: if this guide makes, or holds, another flow; names the first difference.
        """
        if not state.numel():
            return
        saved = FlowState.from_tensor(state)
        held = replace(saved, recipe=self._recipe) if self.flow is None else FlowState.of(self.flow, self._recipe)
        saved.check_same(held)
        if self.flow is None:
            zeros = torch.zeros(saved.dim, dtype=getattr(torch, saved.dtype), device=state.device)
            scale = torch.eye(saved.dim).to(zeros) if saved.last_layer == "triangular" else None
            parts = [self._flow_at(zeros, scale) for _ in range(saved.num_components)]
            self.flow = parts[0] if len(parts) == 1 else Mixture(parts, zeros.new_zeros(len(parts)))
        self.own_values_count = True

    def _built(self) -> Flow:
        flow = self.flow
        if flow is None:
            raise ModelError(NOT_BUILT)
        return flow

    def get_base_dist(self) -> Distribution:
        """The base distribution z of the flow."""
        return self._built().base()

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """The map from z to the unconstrained latent; it remembers its last pair of values."""
        return self._built().transform.with_cache()

    def get_posterior(self, *args: Any, **kwargs: Any) -> Distribution:
        """The law of the unconstrained latent, of event shape ``(latent_dim,)``."""
        return self._built()()

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal posterior medians by site, from samples; those of a simplex need not sum to one."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal posterior quantiles by site and component, from samples; ``(len(quantiles), *site shape)``."""
        if self.layout is None:
            self._setup_prototype(*args, **kwargs)
        latents = self.get_posterior().sample((NUM_QUANTILE_SAMPLES,))
        values, _ = self._built_layout().constrain(latents)
        levels = torch.as_tensor(quantiles, dtype=latents.dtype, device=latents.device)
        return {name: torch.quantile(value, levels, dim=0) for name, value in values.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's version also forgets the model of the guide that is copied. Functions are left out, since those that
        # users write at the prompt cannot be pickled.
        return {**self.__dict__, "_model": None, "master": None, "flow_fn": self._recipe}

    def __deepcopy__(self, memo: dict[int, Any]) -> "AutoFlow":
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        # Through __dict__, since a module would register what it is given.
        copied.__dict__.update(_model=self.__dict__["_model"], flow_fn=self.flow_fn)
        return copied
