"""Mixtures of flows, for laws with several separate modes.

A single flow either misses some of these modes or connects them by bridges of mass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import ComposeTransform, constraints
from torch.func import functional_call

from pyroflows.compiling.eager import is_transformed, runs_in_python
from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.flows.base import is_validated
from pyroflows.flows.clusters import clusters_of
from pyroflows.flows.flow import Flow
from pyroflows.flows.union import is_unbounded, point_in, union_of
from pyroflows.nets.mlp import MLP
from pyroflows.shapes import as_given, described, shape_of
from pyroflows.transforms.foreign import Foreign, on_events

# A component that starts at too few rows, or at rows with a constant column, also sees the others, with this share of
# the weight.
SHARE_OF_OTHERS = 0.1


class Mixture(Flow):
    r"""The mixture :math:`q(x \mid c) = \sum_k w_k(c)\, q_k(x \mid c)` of K flows :math:`q_k`, which may depend on a
    context c. The weights :math:`w(c) = \mathrm{softmax}(a + g(c))` are learned, with a network g that starts at zero.

    :func:`pyroflows.fit_density` maximises the likelihood of the mixture over all components and weights. Before that,
    :meth:`adapt` divides the rows into K clusters, drawn from torch's global generator, and each component learns from
    those of one cluster, such as its location and scale. The weights become the shares of the clusters. Components that
    have adapted before, such as flows that were fitted to other data, stay as they are while others have not, and then
    the weights stay too. To keep the weights as they were given, call ``mixture.gate.requires_grad_(False)``.

    The density is positive where that of a component is: components may have different supports. Draws carry no
    gradients, as the choice of a component has none, so that a mixture is no flow for a guide that is to be trained.

    The components have no base in common. So the base of this flow is the mixture itself, and its transform is the
    identity.

    Args:
        flows: one or more flows of one event shape, dtype and device. Those that take a context take one of the same
            shape. The same flow may stand in several places, and then has the sum of their weights.
        log_weights: logarithms of positive weights ``(K,)``, which need not sum to one: the weights, up to g, before
            they are trained; None for equal weights.
        context_dim: size or shape of the context that the weights depend on, 0 if they depend on none; None for that of
            the components.

    Shapes: ``flow()`` has the event shape of the components and no batch shape; ``flow(context)`` has the batch shape of
    the context.

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
        >>> sorted(flow.standardization.loc[0].round().item() for flow in q.components)
        [0.0, 100.0]
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
        log_weights = _checked_weights(log_weights, len(flows)).to(tensor)
        identity = Foreign(ComposeTransform([]), flows[0].event_shape)
        of_weights = shape if context_dim != 0 else torch.Size()
        super().__init__([identity], standardize=False)
        # The base of another flow takes no context, and is checked by a call without one.
        self.base = _Components(flows, log_weights, of_weights)
        self._context_shape = shape

    @property
    def components(self) -> Sequence[Flow]:
        """The flows of the mixture."""
        components: Any = self.base.flows
        return list(components)

    @property
    def gate(self) -> "Gate":
        """The module of the weights: ``mixture.gate(context)`` returns their logarithms ``(..., K)``."""
        return self.base.gate

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
        return any(flow.adapts for flow in self.components)

    @property
    def is_adapted(self) -> bool:
        """Whether all components that learn from data before training have done so; a state that is loaded counts."""
        return all(flow.is_adapted for flow in self.components)

    @torch.no_grad()
    def _adapt(self, x: Tensor, context: Tensor | None, weights: Tensor | None) -> None:
        weights = x.new_ones(len(x)) if weights is None else weights
        places: dict[Flow, list[int]] = {}
        for place, flow in enumerate(self.components):
            places.setdefault(flow, []).append(place)
        learners = [flow for flow in places if self.is_adapted or not flow.is_adapted]
        priority = torch.stack([self.gate.value[places[flow]].logsumexp(0) for flow in learners])
        clusters = _assigned(learners, priority, x, weights)
        for flow, is_member in zip(learners, clusters, strict=True):
            rows = _is_inside(flow, x)
            if rows.sum() < 2:
                raise DataError(
                    f"component {places[flow][0]} of this mixture has fewer than 2 of the {len(x)} rows of x inside its "
                    f"support {flow.support}: leave it out"
                )
            given = context[rows] if context is not None and flow.context_dim else None
            flow.adapt(x[rows], given, _starting_weights(x[rows], is_member[rows], weights[rows]))
        self.gate.adapt(context, weights)
        if len(learners) == len(places) and self.gate.value.requires_grad:
            # No weight starts so small that its component hardly learns.
            shares = 0.01 + (clusters * weights).sum(-1) / weights.sum()
            for flow, share in zip(learners, shares, strict=True):
                self.gate.value[places[flow]] = torch.log(share / len(places[flow])).to(self.gate.value)

    def _law(self, context: Tensor | None) -> "MixtureDistribution":
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

    loc: Tensor
    scale: Tensor

    def __init__(self, value: Tensor, context_shape: torch.Size) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())
        self.context_shape = context_shape
        self.net = MLP(context_shape.numel(), len(value), hidden_dims=(64,)).to(value) if context_shape else None
        if context_shape:
            self.register_buffer("loc", value.new_zeros(context_shape))
            self.register_buffer("scale", value.new_ones(context_shape))

    def forward(self, context: Tensor | None = None) -> Tensor:
        if self.net is None:
            return self.value.log_softmax(-1)
        if context is None:
            raise ShapeError(f"the weights of this mixture need a context of {described(self.context_shape)}")
        given = (context - self.loc) / self.scale
        return (self.value + self.net(given.flatten(-len(self.context_shape)))).log_softmax(-1)

    def adapt(self, context: Tensor | None, weights: Tensor) -> None:
        """Store location and scale of contexts ``(n, *context_shape)`` whose rows have weights ``(n,)``."""
        if self.net is None or context is None:
            return
        shares = (weights / weights.sum()).double().reshape(-1, *[1] * len(self.context_shape))
        loc = (shares * context.double()).sum(0)
        scale = (shares * (context.double() - loc) ** 2).sum(0).sqrt()
        self.loc.copy_(loc)
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))


class _Components(nn.Module):
    """The base of a mixture: a module that holds the components and their weights, and returns their mixture."""

    def __init__(self, flows: Sequence[Flow], log_weights: Tensor, context_shape: torch.Size) -> None:
        super().__init__()
        self.flows: Any = nn.ModuleList(flows)
        self.gate = Gate(log_weights, context_shape)

    def forward(self, context: Tensor | None = None) -> "MixtureDistribution":
        laws = [flow(context if flow.context_dim else None) for flow in self.flows]
        for law in laws:
            law._validate_args = False  # A value outside the support of one component may be inside that of another.
        shape = self.gate.context_shape
        batch_shape = torch.Size() if context is None or not shape else context.shape[: context.dim() - len(shape)]
        # The law binds the tensors that the gate has now, and computes the weights at each use, so that they are never
        # stale and have a graph of their own each time.
        tensors = {**dict(self.gate.named_parameters()), **dict(self.gate.named_buffers())}
        log_weights = partial(functional_call, self.gate, tensors, (context if shape else None,))
        return MixtureDistribution(laws, log_weights, batch_shape, is_validated())


class MixtureDistribution(TorchDistribution):
    """The law of a mixture of laws, whose draws carry no gradients. A :class:`Mixture` returns it.

    Log-densities are exact, and so are their gradients; :meth:`estimated` returns this law itself, since the logarithm
    of a sum of unbiased estimates would be biased.

    Args:
        components: laws of one event shape.
        log_weights: a function that returns the logarithms of their weights ``(*batch_shape, K)``, which sum to one.
        batch_shape: the batch shape of the weights; that of the law is broadcast from it and those of the components.
        validate_args: whether values are checked; None for the setting of Pyro.

    Shapes: draws are ``(*sample_shape, *batch_shape, *event_shape)``; log-densities lack the event shape.

    Example:
        >>> parts = [pf.flows.Gaussian(2)(), pf.flows.Gaussian(2)()]
        >>> MixtureDistribution(parts, lambda: torch.tensor([0.5, 0.5]).log()).sample((5,)).shape
        torch.Size([5, 2])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False
    is_exact = True

    def __init__(
        self,
        components: Sequence[Any],
        log_weights: Callable[[], Tensor],
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
        validate_args: bool | None = None,
    ) -> None:
        self.components = list(components)
        self.log_weights = log_weights
        # The batch shape before any expansion.
        self._own_shape = torch.broadcast_shapes(batch_shape, *(law.batch_shape for law in self.components))
        super().__init__(self._own_shape, self.components[0].event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The union of the supports of the components."""
        return union_of([law.support for law in self.components], self.event_shape)

    def estimated(self) -> "MixtureDistribution":
        """Return this law: its log-densities are exact in training too."""
        return self

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MixtureDistribution":
        law = self._get_checked_instance(MixtureDistribution, _instance)
        law.components, law.log_weights, law._own_shape = self.components, self.log_weights, self._own_shape
        batch_shape = torch.broadcast_shapes(torch.Size(batch_shape), self.batch_shape)
        TorchDistribution.__init__(law, batch_shape, self.event_shape, validate_args=False)
        law._validate_args = self._validate_args
        return law

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws ``(*sample_shape, *batch_shape, *event_shape)`` without gradients."""
        shape = torch.Size(sample_shape) + self.batch_shape
        # Axes that an expansion added are further draws from the same laws.
        is_own = self.batch_shape[len(self.batch_shape) - len(self._own_shape) :] == self._own_shape
        own = self._own_shape if is_own else self.batch_shape
        count = shape[: len(shape) - len(own)].numel()
        log_weights = self.log_weights().expand(count, *own, len(self.components))
        # The largest of the log weights with Gumbel noise is each with the probability of its weight.
        which = (log_weights - torch.log(-torch.log(torch.rand_like(log_weights)))).argmax(-1)
        x = log_weights.new_zeros(count, *own, *self.event_shape)
        for k, law in enumerate(self.components):
            x = self._filled(x, which == k, law.expand(own))
        return x.reshape(shape + self.event_shape)

    def _filled(self, x: Tensor, is_here: Tensor, law: Any) -> Tensor:
        """Return x ``(n, *batch, *event_shape)`` with draws from a law ``(*batch)`` at the places of a mask.

        Each cell of the batch takes as many draws in turn as it needs, and all cells draw as many as the neediest.
        """
        order = is_here.cumsum(0)
        num_draws = int(order.amax()) if runs_in_python() and order.numel() else len(x)
        if not num_draws:
            return x
        draws = law.sample((num_draws,))
        is_here, index = (t[(..., *[None] * len(self.event_shape))] for t in (is_here, (order - 1).clamp_min(0)))
        return torch.where(is_here, draws.gather(0, index.expand_as(x)), x)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Raise, since draws of a mixture carry no gradients."""
        raise NotImplementedError("draws of a mixture carry no gradients: use sample")

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> tuple[Tensor, Tensor]:  # noqa: B008
        """Return draws without gradients, and their log-densities."""
        return self.transport(self.sample(sample_shape))

    def transport(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return draws themselves, as the mixture is its own base, and their log-densities."""
        return z, self._log_prob(z)

    def latent(self, value: Tensor) -> Tensor:
        """Return the value itself, as the mixture is its own base."""
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-densities ``(...)`` of values ``(..., *event_shape)``."""
        if self._validate_args and not is_transformed():
            self._validate_sample(value)
        return self._log_prob(value)

    def _log_prob(self, value: Tensor) -> Tensor:
        parts = torch.broadcast_tensors(*(_log_prob_anywhere(law, value) for law in self.components))
        log_prob = _log_sum_exp(torch.stack(parts, -1) + self.log_weights())
        num_axes = value.dim() - len(self.event_shape)
        return log_prob.expand(torch.broadcast_shapes(value.shape[:num_axes], self.batch_shape))


def _log_prob_anywhere(law: Any, value: Tensor) -> Tensor:
    """Return log-densities that are -inf outside the support of a law, with gradients that are zero there."""
    support = on_events(law.support, len(law.event_shape))
    if is_unbounded(support):
        return law.log_prob(value)
    is_inside = support.check(value)
    inside = point_in(support, law.event_shape, value)
    if inside is not None:
        # The law computes nothing at values outside, whose infinite slopes would make gradients NaN.
        value = torch.where(is_inside[(..., *[None] * len(law.event_shape))], value, inside)
    return torch.where(is_inside, law.log_prob(value), -torch.inf)


def _log_sum_exp(terms: Tensor) -> Tensor:
    """Return the log of the sum of exponentials over the last axis, whose gradient is zero where all terms are -inf."""
    is_empty = (terms == -torch.inf).all(-1)
    return torch.where(is_empty, -torch.inf, terms.masked_fill(is_empty[..., None], 0.0).logsumexp(-1))


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
    return on_events(flow.support, len(flow.event_shape)).check(x)


def _unbounded(flows: Sequence[Flow], x: Tensor) -> Tensor:
    """Return rows in the coordinates in which flows of one support are unbounded; as they are if there are several."""
    support = union_of([flow.support for flow in flows], flows[0].event_shape)
    try:
        rows = torch.distributions.biject_to(support).inv(x)
    except NotImplementedError:
        return x
    return rows if rows.shape == x.shape and rows.isfinite().all() else x


def _starting_weights(x: Tensor, is_member: Tensor, weights: Tensor) -> Tensor:
    """Return the weights of rows from which a component learns location and scale: those of its cluster, if they do."""
    own = weights * is_member
    members = x[own > 0].flatten(1)
    if len(members) > 2 * members.shape[1] and (members != members[0]).any(0).all():
        return own
    if not own.sum():
        return weights
    return (1 - SHARE_OF_OTHERS) * own / own.sum() + SHARE_OF_OTHERS * weights / weights.sum()


def _checked(flows: Sequence[Flow]) -> list[Flow]:
    flows = list(flows)
    for flow in flows:
        if not isinstance(flow, Flow):
            raise OptionError(f"a mixture is made of flows, but got {type(flow).__name__}")
    shapes = {as_given(flow.event_shape): None for flow in flows}
    if len(shapes) != 1:
        raise ShapeError(f"a mixture needs one or more flows of one size, but got flows of sizes {list(shapes)}")
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


def _checked_weights(log_weights: Tensor | None, num_flows: int) -> Tensor:
    if log_weights is None:
        return torch.zeros(num_flows)
    if log_weights.shape != (num_flows,):
        raise ShapeError(
            f"a mixture of {num_flows} flows needs a log weight for each, got shape {tuple(log_weights.shape)}"
        )
    log_weights = log_weights.detach().log_softmax(0)
    if log_weights.isnan().any():
        raise OptionError(f"log_weights must be numbers, of which one is finite, got {log_weights.tolist()}")
    return log_weights
