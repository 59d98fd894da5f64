"""A flow: layers stacked on a base distribution."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyroflows.archive import write_archive
from pyroflows.arrays import ArrayLike, as_tensor, floating_tensor, require_values
from pyroflows.errors import NotCalledError, OptionError, StateError
from pyroflows.flows.angles import check_base_of_angles
from pyroflows.flows.assembly import assemble
from pyroflows.flows.base import Base, base_module, checked_context, context_shape_of
from pyroflows.flows.columns import standard_base
from pyroflows.flows.discrete.base import FactorizedCategorical
from pyroflows.flows.discrete.checks import check_base_of_categories
from pyroflows.flows.discrete.distribution import DiscreteFlowDistribution
from pyroflows.flows.distribution import FlowDistribution
from pyroflows.flows.encoding import FORMAT, encode
from pyroflows.flows.facts import Facts, facts_of, json_from_tensor, json_to_tensor, require_same
from pyroflows.flows.learning import LearningFlow
from pyroflows.flows.subvector import SubvectorDistribution, subvector
from pyroflows.shapes import as_given, described
from pyroflows.transforms.base import FlowTransform, drop_param_store_references
from pyroflows.transforms.binding import Places
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.discrete.stacks import maps_categories, num_categories_of
from pyroflows.transforms.held import is_validated
from pyroflows.transforms.normalization import ContextScale, Standardize

# What a flow is asked for by users who take it for its distribution.
_OF_DISTRIBUTIONS = frozenset(name for name in dir(FlowDistribution) if not name.startswith("_")) - {
    *dir(nn.Module),
    "base",
    "transform",
}


class Flow(LearningFlow):
    r"""A normalizing flow: a stack of layers on a base distribution, whose call returns its distribution.

    .. math:: x = \mu + \sigma \odot t(z), \quad z \sim p, \qquad
        \log q(x) = \log p(z) - \log\left|\det \frac{\partial x}{\partial z}\right|

    The location :math:`\mu` and scale :math:`\sigma` of the data belong to a layer
    :class:`pyroflows.transforms.Standardize` at the data end, before the map onto a bounded support. It is the identity
    until :meth:`adapt` sets it, which :func:`pyroflows.fit_density` does, so that the other layers see data of mean 0
    and variance 1. Contexts lose their location and scale in the same way.

    Layers with the univariate map "circular_spline" make a flow of angles in radians, or of angles in some columns. It
    takes whole turns out of them at both ends, and leaves their location and scale alone.

    Discrete layers, such as :class:`pyroflows.transforms.DiscreteCoupling`, make a flow of sequences of categories. Its
    call returns a :class:`pyroflows.flows.DiscreteFlowDistribution`.

    Args:
        transforms: layers from base to data, the first next to the base: layers of this library, or any torch or Pyro
            transforms.
        base: a torch or Pyro distribution of the first layer's ``base_shape``, whose tensors become buffers; None for a
            standard normal, the uniform law for angles, and :class:`pyroflows.flows.FactorizedCategorical` for discrete
            layers; "student_t" for independent Student-t variables with learned degrees of freedom; or a module whose
            call returns a distribution. A base of discrete layers may take a context: a module with the attribute
            ``context_dim``, a size or a shape, is called with the context as layers see it.
        support: where the data lie, a torch constraint such as ``constraints.positive``; the bijection that
            ``biject_to`` has for it follows the transforms. With one constraint for each column it is
            ``constraints.cat([...], dim=-1)``, with ``pf.constraints.circular`` for angles. None if the transforms map
            onto the support themselves.
        standardize: whether the flow has the layer of location and scale, and one for contexts. The flow adds no layer
            of the first kind if a transform is a ``Standardize`` itself, such as one by channel, or if events are
            discrete.

    Shapes: ``flow()`` has the event shape of the last layer, ``(dim,)`` for vectors; ``flow(context)`` also has the
    batch shape of the context, which is its shape without the axes of ``context_shape``.

    Attributes:
        event_shape: the shape of an event x.
        base_shape: the shape of its base value z.
        dim: the number of elements of an event.

    Raises:
        ShapeError: if the shapes of layers, base, support or context do not agree, or the event size is unknown.
        OptionError: if the base or a transform is none of these, or there is no bijection onto the support; if only
            some layers, or the base, treat a column as angles, or if only some layers map categories; or if the base
            takes a context, but layers map real numbers.

    Example:
        >>> flow = Flow([Planar(2), Planar(2)])
        >>> x, log_q = flow().rsample_and_log_prob((100,))
        >>> x.shape, log_q.shape
        (torch.Size([100, 2]), torch.Size([100]))
    """

    def __init__(
        self,
        transforms: Transform | Sequence[Transform],
        base: Base = None,
        support: constraints.Constraint | None = None,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        stack = assemble(transforms, base, support, standardize)
        self._standardize_at = stack.standardize_at
        layers, angles = stack.layers, stack.angles_at_base
        self._maps_categories = any(maps_categories(layer) for layer in layers)
        context_shape = next((layer.context_shape for layer in layers if layer.context_dim), torch.Size())
        if base is None:
            base = default_base(layers[0], angles, context_shape)
        base = base_module(base, layers[0].base_shape)
        if (of_base := context_shape_of(base)) and not self._maps_categories:
            raise OptionError(
                f"the base takes a context of {described(of_base)}, but a flow of real numbers does not give its base "
                "one: give the context to layers, such as pf.transforms.Elementwise with its context_dim next to the "
                "base"
            )
        context_shape = context_shape or of_base
        scale = ContextScale(context_shape) if standardize and context_shape else None
        self.transform = Compose(layers, scale, as_given(of_base))
        self.base = base
        if any(angles):
            check_base_of_angles(self.base, angles)
        if self._maps_categories:
            check_base_of_categories(self.base, num_categories_of(self.transform))
        self._places: Places | None = None
        self._note_stateful_layers()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in _OF_DISTRIBUTIONS:
                raise
            context = "context" if self.context_dim else ""
            raise NotCalledError(
                f"a flow has no {name!r}, but its distribution has, which a call returns: flow({context}).{name}"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        drop_param_store_references(self)
        return {**self.__dict__, "_places": None}

    def save(self, path: str | Path) -> None:
        """Write the flow to a safetensors file, from which :func:`pyroflows.load_flow` reads it without any argument.

        The file holds the layers, base and support with their options, and the values of all parameters and buffers. It
        takes the place of an older file only once it is complete.

        Args:
            path: the path of the file.

        Raises:
            OptionError: if the flow holds what no file can rebuild, such as a layer or a network of a class of the
                user's; names the place. Or if the flow is on the meta device.
            CheckpointError: if the file cannot be written.
        """
        require_values(self)
        code, tensors = encode(self)
        write_archive(path, "flow", FORMAT, {"flow": code}, tensors)

    def get_extra_state(self) -> Tensor:
        """Note in the state dict what no tensor of the flow shows, such as masks, bounds and the kinds of layers."""
        return json_to_tensor(facts_of(self))

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a state is one of a flow like this; ``load_state_dict`` does so before it changes a value.

        Args:
            state: what :meth:`get_extra_state` gave.

        Raises:
            StateError: if it is the state of another flow; names the first difference.
        """
        try:
            saved: Facts = json_from_tensor(state)
        except (ValueError, OverflowError) as error:
            raise StateError(
                "this state does not say of which flow it is, since its entry _extra_state cannot be read: leave the "
                "entry out to load the tensors alone"
            ) from error
        require_same(saved, facts_of(self))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # A state without the entry, such as one of parameters and buffers only, is taken as it is.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def event_shape(self) -> torch.Size:
        """The shape of an event x, ``(dim,)`` for vectors."""
        return self.transform.event_shape

    @property
    def base_shape(self) -> torch.Size:
        """The shape of a base value z."""
        return self.transform.base_shape

    @property
    def dim(self) -> int:
        """The number of elements of an event."""
        return self.transform.dim

    @property
    def context_dim(self) -> int:
        """The number of elements of the context, 0 for none."""
        return self.transform.context_dim

    @property
    def context_shape(self) -> torch.Size:
        """The shape of the context, ``(context_dim,)`` for vectors and empty for none."""
        return self.transform.context_shape

    @property
    def standardization(self) -> Standardize | None:
        """The layer of location and scale at the data end, or None.

        It is the one that the flow itself added, or a transform that had no location and scale yet.
        """
        return None if self._standardize_at is None else self.transform.layers[self._standardize_at]

    @property
    def layers(self) -> list[FlowTransform]:
        """All layers from base to data, without the one of location and scale as long as that is the identity."""
        unused = self.standardization
        if unused is None or not unused.is_identity:
            return list(self.transform.layers)
        return [layer for layer in self.transform.layers if layer is not unused]

    @property
    def support(self) -> constraints.Constraint:
        """The constraint that holds where the density is positive."""
        return self.transform.codomain

    @property
    def components(self) -> Sequence["Flow"]:
        """The flows of which this one is a mixture; a plain flow is its only component."""
        return (self,)

    def forward(self, context: ArrayLike | None = None) -> FlowDistribution:
        """Return the distribution.

        Args:
            context: ``(..., *context_shape)``, if the flow takes one; it is brought to the flow's dtype and device.

        Raises:
            ShapeError: if the context has another shape, or is missing.
            DataError: if the context has NaN or infinite values, where values are validated; names the row.
        """
        context = checked_context(context, self, "this flow")
        if isinstance(self, PyroModule):
            _register_parameters(self)
        return self._law(context)

    def _law(self, context: Tensor | None) -> Any:
        transform, base = self.transform, self.base
        if self._places is None or not self._places.are_current:
            self._places = Places(transform, base)
        law = DiscreteFlowDistribution if self._maps_categories else FlowDistribution
        return law(base, transform, context, is_validated(), places=self._places)

    def conditional(
        self, given: ArrayLike, context: ArrayLike | None = None, columns: Sequence[int] | None = None
    ) -> SubvectorDistribution:
        r"""Return the law of the columns that are not given, exactly, for a flow whose layers have one order.

        These are autoregressive flows with an ``order``, and flows of elementwise or triangular layers. For all others,
        and for columns that do not come first in the order, there is :func:`pyroflows.sample_conditional`.

        Args:
            given: values ``(..., k)`` of k columns, 0 < k < dim.
            context: ``(..., *context_shape)``, if the flow takes one.
            columns: the given columns, in the order of the values; None for the first k of the flow's order.

        Raises:
            OptionError: if the law is not known in closed form, for example since the layers have different orders.
            ShapeError: if the number of values does not fit.
            DataError: if a value is not finite or outside of the support, where values are validated.

        Example:
            >>> flow = pf.flows.MAF(3, order=[2, 0, 1])
            >>> rest = flow.conditional(torch.tensor([1.5]))  # column 2 is 1.5
            >>> rest.columns, rest.sample((5,)).shape, rest.log_prob(torch.zeros(2)).shape
            ([0, 1], torch.Size([5, 2]), torch.Size([]))
        """
        return subvector(self(context), None, columns, as_tensor("given", given, floating_tensor(self)))

    def marginal(self, columns: Sequence[int], context: ArrayLike | None = None) -> SubvectorDistribution:
        """Return the law of some columns alone, exactly, for a flow whose layers have one order.

        With all columns it is the law of x, which has the distribution function of each column given those before it,
        by :meth:`pyroflows.flows.SubvectorDistribution.conditional_cdf`.

        Args:
            columns: columns that come first in the flow's order.
            context: ``(..., *context_shape)``, if the flow takes one.

        Raises:
            OptionError: if the law is not known in closed form, for example since the layers have different orders.

        Example:
            >>> flow = pf.flows.NSF(3, autoregressive=True, order=[0, 1, 2])
            >>> flow.marginal([0, 1]).sample((5,)).shape
            torch.Size([5, 2])
        """
        return subvector(self(context), columns, None, torch.zeros(0).to(floating_tensor(self)))

    @torch.no_grad()
    def before_support(self, x: Tensor) -> Tensor:
        """Return rows ``(n, *shape)`` where location and scale act on them, before the map onto a bounded support.

        Args:
            x: rows of data ``(n, *event_shape)``.
        """
        layers = self.transform.layers
        for layer in reversed(layers[len(layers) if self._standardize_at is None else self._standardize_at + 1 :]):
            x = layer.inverse_and_ladj(x)[0]
        return x


def default_base(first: FlowTransform, angles: Sequence[bool], context_shape: torch.Size) -> Base:
    """Return the base of a flow for which none was given, from its first layer and the context of its layers."""
    if maps_categories(first):
        return FactorizedCategorical(first.base_shape[0], num_categories_of(first), as_given(context_shape))
    return standard_base(first.base_shape, angles)


def _register_parameters(flow: nn.Module) -> None:
    """Read all parameters of a flow that ``to_pyro_module_`` has converted, which registers them with the Pyro program.

    The networks of the flow would read them only when a density is computed, and that is after the program has run.
    """
    for module in flow.modules():
        if isinstance(module, PyroModule):
            if module._pyro_samples:
                raise OptionError(
                    f"{type(module).__name__} in this flow has priors on {sorted(module._pyro_samples)}, but the "
                    "parameters of a flow cannot be sample sites: set them as nn.Parameter"
                )
            for name in module._parameters:
                getattr(module, name)
