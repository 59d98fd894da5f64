"""The distribution that a call of a flow returns."""

from typing import Any, ClassVar

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution, TransformedDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints

from pyroflows.arrays import as_tensor, floating_tensor
from pyroflows.compiling.eager import is_under_func
from pyroflows.flows.base import context_shape_of
from pyroflows.flows.law import refuse_moments, shapes_of_law
from pyroflows.flows.temperature import sample_at
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.binding import Binding, Places
from pyroflows.transforms.codomain import is_inside, is_met, is_unbounded, moved_inside
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.gradients import pull_back
from pyroflows.transforms.memory import Memory, are_equal, values_of


class FlowDistribution(TransformedDistribution):
    r"""The law of :math:`x = t(z)`, where z follows a base distribution p:

    .. math:: \log q(x) = \log p(z) + \log\left|\det \frac{\partial z}{\partial x}\right|.

    Log-densities are exact, even if the transform's own log-determinant is an estimate; :meth:`estimated` returns the
    law that uses the estimate. Reparametrisations of Pyro's, such as ``TransformReparam``, see it as the transformed
    distribution that it is, through ``base_dist`` and ``transforms``.

    Outside of the support the log-density is -inf where values are not validated, and an error where they are. At the
    ends of an interval it is -inf.

    The distribution is that of the parameters and buffers that transform and base hold when it is made: those that
    ``torch.func.functional_call`` gives for one call, or that ``vmap`` stacks. They are the tensors themselves, so that
    it follows the changes of an optimiser.

    The distribution remembers its last sample with its log-density, so that scoring a fresh sample once is free.
    Deepcopy and pickle drop the memory, and it is not used after the sample, the context, or a parameter or a buffer of
    transform or base, has changed.

    Args:
        base: the distribution of z, of the transform's base shape; or a module whose call returns it.
        transform: the map from base to data.
        context: ``(..., *context_shape)``, if the transform takes one; its leading axes belong to the batch shape. A
            base that is a module with ``context_dim`` is called with it, as layers see it.
        validate_args: whether values are checked; None for the setting of Pyro.
        is_estimate: whether log-densities use the transform's own log-determinant, exact or not.
        places: where transform and base hold their tensors, if it is known already; see :class:`Places`.

    Shapes: draws are ``(*sample_shape, *batch_shape, *event_shape)``; log-densities lack the event shape.

    Raises:
        InexactError: when it scores, if a layer has no exact log-determinant and ``is_estimate`` is false.
        ValueError: when it scores a value outside of the support, if values are validated. Under ``torch.func``, which
            gives Python no values to look at, they never are.

    Example:
        >>> q = pf.flows.MAF(3, context_dim=2)(torch.zeros(5, 2))
        >>> q.batch_shape, q.event_shape, q.sample((7,)).shape
        (torch.Size([5]), torch.Size([3]), torch.Size([7, 5, 3]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        base: Distribution | nn.Module,
        transform: FlowTransform,
        context: Tensor | None = None,
        validate_args: Any = None,
        is_estimate: bool = False,
        places: Places | None = None,
    ) -> None:
        # A base of this library knows its batch shape, and is called at each use. One of the user's is called here,
        # where Pyro's handlers see it, and again only once its tensors have other values.
        batch_shape: Any = getattr(base, "batch_shape", None)
        self._called: tuple[Distribution, Any] | None = None
        self.context = context
        if isinstance(base, nn.Module) and not isinstance(batch_shape, torch.Size):
            self._called = self._call(base, transform), values_of(_tensors(base))
            batch_shape = self._called[0].batch_shape
        if context is not None:
            context_batch = context.shape[: context.dim() - len(transform.context_shape)]
            batch_shape = torch.broadcast_shapes(batch_shape, context_batch)
        self._base = base
        self._is_estimate = is_estimate
        self._expanded_to: torch.Size | None = None
        self._support = transform.codomain
        self._bind(transform, places)
        # Torch's own constructor would expand the base, and compose the transforms once more.
        Distribution.__init__(self, batch_shape, transform.event_shape, validate_args=validate_args)

    # A vector has no distribution function. Torch's would take the layers for maps of scalars.
    cdf, icdf = Distribution.cdf, Distribution.icdf
    mean = variance = property(refuse_moments)
    __repr__ = shapes_of_law

    def _bind(self, transform: FlowTransform, places: Places | None) -> None:
        roots = (transform, self._base) if isinstance(self._base, nn.Module) else (transform,)
        self._binding = Binding(places or Places(*roots))
        self._memory = self._new_memory()

    def _new_memory(self) -> Memory:
        return Memory(self._binding, None if isinstance(self._base, nn.Module) else self._base, self.context)

    def __getstate__(self) -> dict[str, Any]:
        # The modules go along with the tensors that are bound, whatever they hold now. What was computed from them is
        # part of a graph, which could not be copied.
        transform, *base = self._binding.modules
        state = {**self.__dict__, "_transform": transform, "_base": base[0] if base else self._base, "_called": None}
        return {name: value for name, value in state.items() if name not in ("_binding", "_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        transform = state.pop("_transform")
        self.__dict__.update(state)
        self._bind(transform, None)

    @property
    def transform(self) -> FlowTransform:
        """The map from base to data, with the tensors that are bound."""
        transform: Any = self._binding.modules[0]
        return transform

    @property
    def base(self) -> Distribution:
        """The law of z, made of the tensors that are bound."""
        return self._bound()[1]

    def _bound(self) -> tuple[FlowTransform, Distribution]:
        """Return transform and base with the tensors that are bound."""
        modules: Any = self._binding.modules
        base: Any = self._base
        if len(modules) > 1:
            transform, module = modules
            base = self._call(module, transform) if self._called is None else self._called_base(module, transform)
        if self._is_estimate and hasattr(base, "estimated"):
            base = base.estimated()
        return modules[0], base if self._expanded_to is None else base.expand(self._expanded_to)

    def _call(self, module: nn.Module, transform: FlowTransform) -> Distribution:
        """Return the law that a base gives, at the context as layers see it if it takes one."""
        given = [transform.layer_context(self.context)] if context_shape_of(module) else []
        law: Distribution = module(*given)
        return law

    def _called_base(self, module: nn.Module, transform: FlowTransform) -> Distribution:
        """Return the law that the user's base gave, or what it gives now that its tensors have changed."""
        assert self._called is not None
        base, values = self._called
        now = values_of(_tensors(module))
        if values is None or now is None or are_equal(values, now):
            return base
        return self._call(module, transform)

    @property
    def base_dist(self) -> Distribution:
        """The law of z, with the batch shape of this distribution."""
        return self._expanded(self.base)

    @property
    def transforms(self) -> list[FlowTransform]:
        """The layers from base to data, at the context; their log-determinants are those that :meth:`log_prob` uses."""
        transform = self._scoring(self.transform)
        layers = transform.layers if isinstance(transform, Compose) else [transform]
        if self.context is None:
            return list(layers)
        context: Any = transform.layer_context(self.context)
        return [layer.condition(context) if layer.context_dim else layer for layer in layers]

    @property
    def has_rsample(self) -> bool:
        return bool(self.base.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        return self._support

    @property
    def is_exact(self) -> bool:
        """Whether log-densities are exact, rather than unbiased estimates."""
        transform, base = self._bound()
        return getattr(base, "is_exact", True) and (not self._is_estimate or transform.ladj_is_exact)

    def estimated(self) -> "FlowDistribution":
        """Return the same law with the log-densities that its layers give, which may be unbiased estimates.

        It is for training. If all layers are exact, the method returns this object.
        """
        transform, base = self._bound()
        # A base may be a law itself, such as that of a mixture of flows.
        is_final = not hasattr(base, "estimated") or base.estimated() is base
        if self._is_estimate or (transform.ladj_is_exact and is_final):
            return self
        return self._changed(_is_estimate=True)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowDistribution":
        # The context stays as small as it is, so that what depends on it alone is computed once for all copies. The
        # base raises if the batch shape does not fit.
        batch_shape = self.base_dist.expand(batch_shape).batch_shape
        return self._changed(_batch_shape=batch_shape, _expanded_to=batch_shape)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> Pair:  # noqa: B008
        """Return draws ``(*sample_shape, *batch_shape, *event_shape)`` and their log-densities, from one pass.

        The draws carry gradients if the base has ``rsample``.

        Args:
            sample_shape: the shape of the sample.
        """
        transform, base = self._bound()
        expanded = self._expanded(base)
        draw = expanded.rsample if base.has_rsample else expanded.sample
        return self._transport(transform, base, draw(torch.Size(sample_shape)))

    def transport(self, z: Tensor) -> Pair:
        r"""Return ``x = t(z)`` and :math:`\log q(x)`.

        Args:
            z: draws of the base, ``(..., *base_shape)``.

        Example:
            >>> q = pf.flows.IAF(3)()
            >>> x, log_q = q.transport(q.base.rsample((5,)))
            >>> x.shape, log_q.shape
            (torch.Size([5, 3]), torch.Size([5]))
        """
        return self._transport(*self._bound(), z)

    def _transport(self, transform: FlowTransform, base: Distribution, z: Tensor) -> Pair:
        x, ladj = self._scoring(transform).forward_and_ladj(z, self.context)
        return x, _log_density(base, z) - ladj

    def transport_and_score(self, z: Tensor) -> Triple:
        r"""Return ``x = t(z)``, :math:`\log q(x)`, and :math:`\nabla_x \log q(x)`, through which no gradients flow.

        The score costs what :meth:`pyroflows.transforms.FlowTransform.forward_and_score` does for each layer.

        Args:
            z: draws of the base, ``(..., *base_shape)``.

        Example:
            >>> q = pf.flows.IAF(3)()
            >>> x, log_q, score = q.transport_and_score(q.base.rsample((5,)))
            >>> score.shape
            torch.Size([5, 3])
        """
        transform, base = self._bound()
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            log_p = _log_density(base, at)
        (score,) = pull_back((log_p,), (torch.ones_like(log_p),), (at,))
        x, ladj, score = self._scoring(transform).forward_and_score(z, score, self.context)
        return x, _log_density(base, z) - ladj, score

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        transform, base = self._bound()
        if not base.has_rsample:
            raise NotImplementedError(f"draws of the base {type(base).__name__} carry no gradients: use sample")
        z = self._expanded(base).rsample(torch.Size(sample_shape))
        if torch.compiler.is_compiling() or not (self._is_estimate or transform.ladj_is_exact):
            # While torch compiles there is no memory; and an exact density that nobody may ask for can be dear.
            return self._mapping(transform)._data_value(z, self.context)
        x, log_q = self._transport(transform, base, z)
        self._memory.keep(x, log_q)
        return x

    def sample(self, sample_shape: Any = torch.Size(), temperature: float = 1.0) -> Tensor:  # noqa: B008
        r"""Return draws ``(*sample_shape, *batch_shape, *event_shape)`` without gradients.

        Args:
            sample_shape: the shape of the sample.
            temperature: the factor T, at least 0, of the standard deviations of a normal base: z is drawn from
                :math:`N(\mu, T^2 \Sigma)` instead of :math:`N(\mu, \Sigma)`. Below 1 draws lie closer to the image of
                the mean :math:`\mu`, and at 0 they are that image; they do not follow q, unless T is 1.

        Raises:
            OptionError: if the temperature is below 0 or not finite, or is not 1 where the base is not normal.

        Example:
            >>> q = pf.flows.NSF(2)()
            >>> torch.equal(q.sample(temperature=0.0), q.transport(torch.zeros(2))[0])
            True
        """
        transform, base = self._bound()
        with torch.no_grad():
            z = sample_at(self._expanded(base), torch.Size(sample_shape), temperature)
            return self._mapping(transform)._data_value(z, self.context)

    def log_prob(self, value: Tensor) -> Tensor:
        value = self._as_tensor(value)
        if not torch.compiler.is_compiling() and (last := self._memory.recall(value, None)) is not None:
            # It is used once, since a second backward pass needs a graph of its own.
            self._memory.forget()
            return last[1]
        if self._validate_args:
            self._validate_sample(value)
        bound, base = self._bound()
        transform = self._scoring(bound)
        z, ladj = transform.inverse_and_ladj(value, self.context)
        log_q = self._log_prob_of_base(base, z) + ladj
        # Where no z gives the value, that at hand is arbitrary, and so would be the gradient.
        return log_q if transform.is_onto_reals else torch.where(ladj == -torch.inf, -torch.inf, log_q)

    def latent(self, value: Tensor) -> Tensor:
        """Return the base value z of x, ``(..., *base_shape)``; NaN outside of the support, where there is none.

        Args:
            value: x, ``(..., *event_shape)``.
        """
        value = self._as_tensor(value)
        if self._validate_args:
            self._validate_sample(value)
        return self._mapping(self.transform).base_value(value, self.context)

    def _as_tensor(self, value: Any) -> Tensor:
        """Return a value in the dtype and on the device of the transform; :class:`Flow` casts contexts likewise."""
        return as_tensor("the value", value, floating_tensor(self.transform))

    def _log_prob_of_base(self, base: Distribution, z: Tensor) -> Tensor:
        """Return the log-density of the base, which is -inf outside of its support."""
        support = _support_of(base)
        if not z.numel() or is_unbounded(support) or isinstance(base, FlowDistribution):
            return _log_density(base, z)
        if self._validate_args and not is_under_func():
            base._validate_sample(z)
        num_axes = len(base.event_shape)
        # Most laws know their density at the closed end of an interval, but torch's transforms have no value there.
        is_in = is_inside(support, z, num_axes) if _is_transformed(base) else is_met(support, z, num_axes)
        log_p = base.log_prob(moved_inside(support, z, is_in, num_axes))
        return torch.where(is_in, log_p, -torch.inf)

    def _changed(self, **changes: Any) -> "FlowDistribution":
        """Return this law with other values of some attributes, and with a memory of its own."""
        changed = object.__new__(type(self))
        changed.__dict__.update(self.__dict__, **changes)
        changed._memory = changed._new_memory()
        return changed

    def _validate_sample(self, value: Tensor) -> None:
        # Torch cannot check no rows; the layers check their shape.
        if value.numel() and not is_under_func():
            super()._validate_sample(value)

    def _scoring(self, transform: FlowTransform) -> FlowTransform:
        return transform if self._is_estimate else transform.exact()

    def _mapping(self, transform: FlowTransform) -> FlowTransform:
        """Return the transform for values without densities, whose own may be all that there is."""
        return transform if self._is_estimate or transform.value_is_exact else transform.exact()

    def _expanded(self, base: Distribution) -> Distribution:
        return base if base.batch_shape == self.batch_shape else base.expand(self.batch_shape)


def _log_density(law: Distribution, value: Tensor) -> Tensor:
    """Return log-densities of events; of no events as well, of whose log-densities torch cannot form sums."""
    if value.numel() and 0 not in law.batch_shape:
        return law.log_prob(value)
    num_axes = len(law.event_shape)
    batch_shape = torch.broadcast_shapes(value.shape[: value.dim() - num_axes], law.batch_shape)
    return value.flatten(-num_axes).sum(-1).expand(batch_shape)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _support_of(base: Distribution) -> constraints.Constraint:
    try:
        support: Any = base.support
    except NotImplementedError:  # A law of the user's own need not say where its values lie.
        support = constraints.real
    return support


def _is_transformed(law: Any) -> bool:
    """Tell whether a law scores by the transforms of another one."""
    while isinstance(law, Independent | ExpandedDistribution | MaskedDistribution):
        law = law.base_dist
    return type(law).log_prob is torch.distributions.TransformedDistribution.log_prob
