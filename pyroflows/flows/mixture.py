"""Mixtures of flows, for laws with several separate modes.

A single flow either misses some of these modes or connects them by bridges of mass.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import ComposeTransform, biject_to, constraints

from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.flows.clusters import clusters_of, starting_weights, unexplained
from pyroflows.flows.flow import Flow
from pyroflows.flows.mixture_distribution import MixtureDistribution
from pyroflows.flows.union import union_of
from pyroflows.nets.mlp import MLP
from pyroflows.options import kind
from pyroflows.shapes import as_given, described, shape_of
from pyroflows.transforms.binding import Binding, Places
from pyroflows.transforms.codomain import is_inside
from pyroflows.transforms.discrete.stacks import maps_categories, num_categories_of
from pyroflows.transforms.foreign import Foreign
from pyroflows.transforms.held import is_validated
from pyroflows.transforms.normalization import ContextScale


class Mixture(Flow):
    r"""The mixture :math:`q(x \mid c) = \sum_k w_k(c)\, q_k(x \mid c)` of K flows :math:`q_k`, which may depend on a
    context c. The weights :math:`w(c) = \mathrm{softmax}(a + g(c))` are learned, with a network g that starts at zero.

    :func:`pyroflows.fit_density` maximises the likelihood of the mixture over all components and weights. Before that,
    :meth:`adapt` divides the rows into K clusters, drawn from torch's global generator, and each component learns from
    those of one cluster, such as its location and scale. The weights become the shares of the clusters. Components that
    have adapted before, such as flows that were fitted to other data, stay as they are while others have not: these
    start at the rows that those do not explain, and the weights stay too. To keep the weights as they were given, call
    ``mixture.gate.requires_grad_(False)``.

    The density is positive where that of a component is: components may have different supports. Draws carry no
    gradients, as the choice of a component has none, so that a mixture is no flow for a guide that is to be trained.

    The components have no base in common. So the base of this flow is the mixture itself, and its transform is the
    identity.

    Args:
        flows: one or more flows of one event shape, dtype and device. Those that take a context take one of the same
            shape. The same flow may stand in several places, and then has the sum of their weights.
        log_weights: logarithms of positive weights ``(K,)``, which need not sum to one; training starts from them, and
            they are a up to a constant. None for equal weights.
        context_dim: size or shape of the context that the weights depend on, 0 if they depend on none; None for that of
            the components.

    Shapes: ``flow()`` has the event shape of the components and no batch shape; ``flow(context)`` has the batch shape
    of the context.

    Raises:
        ShapeError: if the flows differ in event shape or context, or the number of weights is not that of the flows.
        OptionError: if the components are no flows, or differ in dtype or device, or a weight is no number.
        DataError: from :meth:`adapt`, if a component has fewer than two rows inside its support, or cannot learn from
            its rows.

    Example:
        >>> q = Mixture([pf.flows.Gaussian(2), pf.flows.NSF(2)], torch.tensor([0.3, 0.7]).log())
        >>> q().log_prob(q().sample((5,))).shape
        torch.Size([5])
        >>> q.gate().exp()
        tensor([0.3000, 0.7000], grad_fn=<ExpBackward0>)
        >>> x = torch.cat([torch.randn(500, 2), 100 + torch.randn(500, 2)])
        >>> fit = pf.fit_density(q, x, max_epochs=5, seed=0, progress_bar=False)
        >>> sorted(round(flow.standardization.loc[0].item()) for flow in q.components)
        [0, 100]
    """

    def __init__(
        self,
        flows: Sequence[Flow],
        log_weights: Tensor | None = None,
        context_dim: int | Sequence[int] | None = None,
    ) -> None:
        flows = _checked(flows)
        shape = _context_shape(flows, context_dim)
        tensor = next((t for flow in flows for t in _numbers(flow)), torch.zeros(()))
        log_weights = _checked_weights(log_weights, len(flows), tensor)
        identity = Foreign(ComposeTransform([]), flows[0].event_shape)
        of_weights = shape if context_dim != 0 else torch.Size()
        super().__init__([identity], standardize=False)
        # The base of another flow takes no context, and is checked by a call without one.
        self.base = _Components(flows, log_weights, of_weights)
        self._note_stateful_layers()
        self._context_shape = shape

    @property
    def components(self) -> Sequence[Flow]:
        """The flows of the mixture."""
        components: Any = self.base.flows
        return list(components)

    @property
    def gate(self) -> "Gate":
        """The module of the weights: ``mixture.gate(context)`` returns their logarithms ``(..., K)``."""
        gate: Any = self.base.gate
        return gate

    @property
    def context_shape(self) -> torch.Size:
        """The shape of the context, ``(context_dim,)`` for vectors and empty for none."""
        return self._context_shape

    @property
    def context_dim(self) -> int:
        """The number of elements of the context, 0 for none."""
        return self._context_shape.numel() if self._context_shape else 0

    @property
    def support(self) -> constraints.Constraint:
        """The union of the supports of the components."""
        return union_of([flow.support for flow in self.components], self.event_shape)

    @property
    def adapts(self) -> bool:
        """Whether a component or the network of the weights learns from data before training."""
        return self.gate.adapts or any(flow.adapts for flow in self.components)

    @property
    def is_adapted(self) -> bool:
        """Whether all that learns from data before training has done so; a state that is loaded counts."""
        return all(flow.is_adapted for flow in self.components) and self.gate.is_adapted

    @property
    def reads_values(self) -> bool:
        """Whether a component has a layer that decides by the values of its tensors what to do."""
        return any(flow.reads_values for flow in self.components)

    @property
    def observes(self) -> bool:
        """Whether a layer of a component keeps statistics of data up to date during training."""
        return any(flow.observes for flow in self.components)

    @torch.no_grad()
    def _observe(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        """Let each component see the rows with their weights times its share of their density."""
        law = self._law(context)
        terms = torch.stack([part.estimated().log_prob(x) for part in law.components], -1) + law.log_weights()
        # No component has a share of rows outside of all supports.
        shares = terms.softmax(-1).nan_to_num(0.0)
        weights = x.new_ones(len(x)) if weights is None else weights
        for flow, places in self._places_of_components().items():
            flow._observe(x, context if flow.context_dim else None, weights * shares[:, places].sum(-1))

    def _places_of_components(self) -> dict[Flow, list[int]]:
        """Return the places of each component, which may stand in several."""
        places: dict[Flow, list[int]] = {}
        for place, flow in enumerate(self.components):
            places.setdefault(flow, []).append(place)
        return places

    def before_support(self, x: Tensor) -> Tensor:
        """Return rows in the coordinates in which the components are unbounded, as they are if those differ."""
        return _unbounded(self.components, x)

    @torch.no_grad()
    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        weights = x.new_ones(len(x)) if weights is None else weights
        if context is not None and self.gate.adapts and (self.is_adapted or not self.gate.is_adapted):
            self.gate.adapt(context, weights)
        places = self._places_of_components()
        flows = [flow for flow in places if flow.adapts]
        learners = [flow for flow in flows if not flow.is_adapted] or flows
        if not learners:
            return
        fitted = [flow for flow in flows if flow not in learners]
        if fitted:
            laws = [flow(context if flow.context_dim else None).estimated() for flow in fitted]
            for law in laws:
                law._validate_args = False
            weights = unexplained(laws, x, weights)
        priority = torch.stack([self.gate.value[places[flow]].logsumexp(0) for flow in learners])
        clusters = _assigned(learners, priority, x, weights)
        for flow, is_member in zip(learners, clusters, strict=True):
            rows = _is_inside(flow, x)
            if rows.sum() < 2:
                raise DataError(
                    f"component {places[flow][0]} of this mixture has fewer than 2 of the {len(x)} rows of x inside "
                    f"its support {flow.support}: leave it out"
                )
            given = context[rows] if context is not None and flow.context_dim else None
            flow.adapt(x[rows], given, starting_weights(x[rows], is_member[rows], weights[rows]))
        if len(learners) == len(places) and self.gate.value.requires_grad:
            # No weight starts so small that its component hardly learns.
            shares = 0.01 + (clusters * weights).sum(-1) / weights.sum()
            for flow, share in zip(learners, shares, strict=True):
                self.gate.value[places[flow]] = torch.log(share / len(places[flow])).to(self.gate.value)

    def _law(self, context: Tensor | None) -> MixtureDistribution:
        return self.base(context)


class Gate(nn.Module):
    r"""The logarithms of the weights of a mixture, :math:`\log w(c) = \log\mathrm{softmax}(a + g(c))`, where g is a
    network that starts at zero and sees contexts of mean 0 and variance 1. Without a context g is left out.

    Args:
        value: a, of shape ``(K,)``.
        context_shape: the shape of the context, empty for none.

    Shapes: contexts ``(..., *context_shape)`` give ``(..., K)``; none gives ``(K,)``.

    Example:
        >>> Gate(torch.zeros(2), torch.Size([3]))(torch.randn(5, 3)).exp()[0]
        tensor([0.5000, 0.5000], grad_fn=<SelectBackward0>)
    """

    def __init__(self, value: Tensor, context_shape: torch.Size) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())
        self.context_shape = context_shape
        self.net = MLP(context_shape.numel(), len(value), hidden_dims=(64,)).to(value) if context_shape else None
        self.context_scale = ContextScale(context_shape).to(value) if context_shape else None

    def forward(self, context: Tensor | None = None) -> Tensor:
        if self.net is None or self.context_scale is None:
            return self.value.log_softmax(-1)
        if context is None:
            raise ShapeError(f"the weights of this mixture need a context of {described(self.context_shape)}")
        given, _ = self.context_scale.inverse_and_ladj(context)
        return (self.value + self.net(given.flatten(-len(self.context_shape)))).log_softmax(-1)

    @property
    def adapts(self) -> bool:
        """Whether it learns location and scale of contexts before training."""
        return self.context_scale is not None

    @property
    def is_adapted(self) -> bool:
        """Whether it has learned them; true if it never does."""
        return self.context_scale is None or self.context_scale.is_adapted

    def adapt(self, context: Tensor, weights: Tensor) -> None:
        """Learn location and scale of contexts ``(n, *context_shape)`` whose rows have weights ``(n,)``."""
        if self.context_scale is not None:
            self.context_scale.adapt(context, None, weights)


class _Components(nn.Module):
    """The base of a mixture: a module that holds the components and their weights, and returns their mixture."""

    def __init__(self, flows: Sequence[Flow], log_weights: Tensor, context_shape: torch.Size) -> None:
        super().__init__()
        self.flows: Any = nn.ModuleList(flows)
        self.gate = Gate(log_weights, context_shape)

    def forward(self, context: Tensor | None = None) -> MixtureDistribution:
        laws = [flow(context if flow.context_dim else None) for flow in self.flows]
        for law in laws:
            law._validate_args = False  # A value outside the support of one component may be inside that of another.
        shape = self.gate.context_shape
        batch_shape = torch.Size() if context is None or not shape else context.shape[: context.dim() - len(shape)]
        # The weights are computed at each use, so that they are never stale and have a graph of their own each time.
        binding = Binding(Places(self.gate))
        log_weights = partial(_log_weights, binding, context if shape else None)
        return MixtureDistribution(laws, log_weights, batch_shape, is_validated())


def _log_weights(gate: Binding, context: Tensor | None) -> Tensor:
    module: Any = gate.modules[0]
    return module(context)


def _assigned(flows: Sequence[Flow], priority: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Divide rows into as many clusters as there are flows, and give each flow one of them.

    The flow with the fewest rows inside its support chooses first, and of those with equal numbers the one of the
    largest priority. It takes the cluster of which most rows are inside.

    Args:
        flows: the K flows.
        priority: their priorities ``(K,)``.
        x: rows ``(n, *event_shape)``.
        weights: weights of the rows ``(n,)``.

    Returns:
        Booleans ``(K, n)``: whether a row is in the cluster of a flow.
    """
    inside = torch.stack([_is_inside(flow, x) for flow in flows])
    cluster = clusters_of(_unbounded(flows, x), weights, len(flows))
    of_cluster = cluster == torch.arange(len(flows), device=x.device)[:, None]
    overlap = (inside * weights) @ of_cluster.to(weights).T
    order = sorted(range(len(flows)), key=lambda k: (int(inside[k].sum()), -float(priority[k])))
    taken = torch.zeros(len(flows), dtype=torch.bool, device=x.device)
    chosen = [0] * len(flows)
    for k in order:
        chosen[k] = int(torch.where(taken, -1.0, overlap[k]).argmax())
        taken[chosen[k]] = True
    return of_cluster[chosen]


def _is_inside(flow: Flow, x: Tensor) -> Tensor:
    return is_inside(flow.support, x, len(flow.event_shape))


def _unbounded(flows: Sequence[Flow], x: Tensor) -> Tensor:
    """Return rows in the coordinates in which flows of one support are unbounded; as they are if there are several."""
    support = union_of([flow.support for flow in flows], flows[0].event_shape)
    try:
        rows = biject_to(support).inv(x)
    except NotImplementedError:
        return x
    return rows if rows.shape == x.shape and rows.isfinite().all() else x


def _checked(flows: Sequence[Flow]) -> list[Flow]:
    if not isinstance(flows, Iterable):
        raise OptionError(f"a mixture is made of a list of flows, such as [flow, other], but got {kind(flows)}")
    flows = list(flows)
    for flow in flows:
        if not isinstance(flow, Flow):
            raise OptionError(f"a mixture is made of flows, but got {kind(flow)}")
    shapes = {as_given(flow.event_shape): None for flow in flows}
    if len(shapes) != 1:
        raise ShapeError(f"a mixture needs one or more flows of one size, but got flows of sizes {list(shapes)}")
    if len({flow.support.is_discrete for flow in flows}) > 1:
        raise OptionError("the flows of a mixture must all be of categories, or all of real numbers, but are of both")
    sizes = {num_categories_of(flow): None for flow in flows if maps_categories(flow)}
    if len(sizes) > 1:
        raise OptionError(f"the flows of a mixture must have the same categories, but have {list(sizes)} of them")
    kinds = list({(t.dtype, t.device): None for flow in flows for t in _numbers(flow)})
    if len(kinds) > 1:
        found = " and ".join(f"{dtype} on {device}" for dtype, device in kinds)
        raise OptionError(f"the flows of a mixture must have one dtype and device, but have {found}: use flow.to")
    return flows


def _numbers(flow: Flow) -> list[Tensor]:
    return [tensor for tensor in (*flow.parameters(), *flow.buffers()) if tensor.is_floating_point()]


def _context_shape(flows: Sequence[Flow], context_dim: int | Sequence[int] | None) -> torch.Size:
    """Return the shape of the context that components and weights have in common, empty for none."""
    shapes = {flow.context_shape: None for flow in flows if flow.context_dim}
    if context_dim:
        shapes[shape_of(context_dim)] = None
    if len(shapes) > 1:
        sizes = [as_given(shape) for shape in shapes]
        raise ShapeError(f"the flows and the weights of a mixture must have one context, but have sizes {sizes}")
    return next(iter(shapes), torch.Size())


def _checked_weights(log_weights: Tensor | None, num_flows: int, like: Tensor) -> Tensor:
    """Return normalised log weights of the dtype and device of a tensor."""
    given = torch.zeros(num_flows) if log_weights is None else torch.as_tensor(log_weights)
    if given.shape != (num_flows,):
        raise ShapeError(f"a mixture of {num_flows} flows needs a log weight for each, got shape {tuple(given.shape)}")
    normalized = given.detach().to(like).log_softmax(0)
    if normalized.isnan().any():
        raise OptionError(f"log_weights must be numbers, of which one is finite, got {given.tolist()}")
    return normalized
