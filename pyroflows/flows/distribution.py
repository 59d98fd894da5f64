"""The distribution that a call of a flow returns."""

from typing import Any, ClassVar

import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyroflows.arrays import as_tensor, floating_tensor
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.gradients import pull_back
from pyroflows.transforms.memory import Memory


class FlowDistribution(TransformedDistribution):
    r"""The law of :math:`x = t(z)`, where z follows a base distribution p:

    .. math:: \log q(x) = \log p(z) + \log\left|\det \frac{\partial z}{\partial x}\right|.

    Log-densities are exact, even if the transform's own log-determinant is an estimate; :meth:`estimated` returns the
    law that uses the estimate. Reparametrisations of Pyro's, such as ``TransformReparam``, see it as the transformed
    distribution that it is, through ``base_dist`` and ``transforms``.

    The distribution remembers its last sample with its log-density, so that scoring a fresh sample once is free.
    Deepcopy and pickle drop the memory, and it is not used after the sample, the context, or a parameter or a buffer of
    transform or base, has changed.

    Args:
        base: the distribution of z, of the transform's base shape.
        transform: the map from base to data.
        context: ``(..., *context_shape)``, if the transform takes one; its leading axes belong to the batch shape.
        validate_args: whether values are checked; None for the setting of Pyro.
        is_estimate: whether log-densities use the transform's own log-determinant, exact or not.

    Shapes: draws are ``(*sample_shape, *batch_shape, *event_shape)``; log-densities lack the event shape.

    Raises:
        InexactError: when it scores, if a layer has no exact log-determinant and ``is_estimate`` is false.

    Example:
        >>> q = pf.flows.MAF(3, context_dim=2)(torch.zeros(5, 2))
        >>> q.batch_shape, q.event_shape, q.sample((7,)).shape
        (torch.Size([5]), torch.Size([3]), torch.Size([7, 5, 3]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        base: Distribution,
        transform: FlowTransform,
        context: Tensor | None = None,
        validate_args: Any = None,
        is_estimate: bool = False,
    ) -> None:
        batch_shape = base.batch_shape
        if context is not None:
            context_batch = context.shape[: context.dim() - len(transform.context_shape)]
            batch_shape = torch.broadcast_shapes(batch_shape, context_batch)
        self.base = base
        self.transform = transform
        self.context = context
        self._is_estimate = is_estimate
        self._memory = Memory(transform, base, context)
        # Torch's own constructor would expand the base, and compose the transforms once more.
        Distribution.__init__(self, batch_shape, transform.event_shape, validate_args=validate_args)

    # A vector has no distribution function. Torch's would take the layers for maps of scalars.
    cdf, icdf = Distribution.cdf, Distribution.icdf

    @property
    def base_dist(self) -> Distribution:
        """The law of z, with the batch shape of this distribution."""
        return self._expanded_base()

    @property
    def transforms(self) -> list[FlowTransform]:
        """The layers from base to data, at the context; their log-determinants are those that :meth:`log_prob` uses."""
        transform = self._scoring_transform()
        layers = transform.layers if isinstance(transform, Compose) else [transform]
        if self.context is None:
            return list(layers)
        context: Any = transform.layer_context(self.context) if isinstance(transform, Compose) else self.context
        return [layer.condition(context) if layer.context_dim else layer for layer in layers]

    @property
    def has_rsample(self) -> bool:
        return bool(self.base.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        return self.transform.codomain

    @property
    def is_exact(self) -> bool:
        """Whether log-densities are exact, rather than unbiased estimates."""
        return getattr(self.base, "is_exact", True) and (not self._is_estimate or self.transform.ladj_is_exact)

    def estimated(self) -> "FlowDistribution":
        """Return the same law with the log-densities that its layers give, which may be unbiased estimates.

        It is for training. If all layers are exact, the method returns this object.
        """
        # A base may be a law itself, such as that of a mixture of flows.
        base: Any = self.base.estimated() if hasattr(self.base, "estimated") else self.base
        if base is self.base and (self._is_estimate or self.transform.ladj_is_exact):
            return self
        return FlowDistribution(base, self.transform, self.context, self._validate_args, is_estimate=True)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "FlowDistribution":
        # The context stays as small as it is, so that what depends on it alone is computed once for all copies.
        base = self._expanded_base().expand(batch_shape)
        return FlowDistribution(base, self.transform, self.context, self._validate_args, self._is_estimate)

    def rsample_and_log_prob(self, sample_shape: Any = torch.Size()) -> Pair:  # noqa: B008
        """Return draws ``(*sample_shape, *batch_shape, *event_shape)`` and their log-densities, from one pass.

        The draws carry gradients if the base has ``rsample``.

        Args:
            sample_shape: the shape of the sample.
        """
        base = self._expanded_base()
        draw = base.rsample if base.has_rsample else base.sample
        return self.transport(draw(torch.Size(sample_shape)))

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
        x, ladj = self._scoring_transform().forward_and_ladj(z, self.context)
        return x, self.base.log_prob(z) - ladj

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
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            log_p = self.base.log_prob(at)
        (score,) = pull_back((log_p,), (torch.ones_like(log_p),), (at,))
        x, ladj, score = self._scoring_transform().forward_and_score(z, score, self.context)
        return x, self.base.log_prob(z) - ladj, score

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        if not self.has_rsample:
            raise NotImplementedError(f"draws of the base {type(self.base).__name__} carry no gradients: use sample")
        if torch.compiler.is_compiling() or not (self._is_estimate or self.transform.ladj_is_exact):
            # While torch compiles there is no memory; and an exact density that nobody may ask for can be dear.
            z = self._expanded_base().rsample(torch.Size(sample_shape))
            return self.transform.forward_and_ladj(z, self.context)[0]
        x, log_q = self.rsample_and_log_prob(sample_shape)
        self._memory.keep(x, log_q)
        return x

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            z = self._expanded_base().sample(torch.Size(sample_shape))
            return self.transform.forward_and_ladj(z, self.context)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        value = self._as_tensor(value)
        if not torch.compiler.is_compiling() and (last := self._memory.recall(value, None)) is not None:
            # It is used once, since a second backward pass needs a graph of its own.
            self._memory.forget()
            return last[1]
        if self._validate_args:
            self._validate_sample(value)
        z, ladj = self._scoring_transform().inverse_and_ladj(value, self.context)
        return self.base.log_prob(z) + ladj

    def latent(self, value: Tensor) -> Tensor:
        """Return the base value z of x, ``(..., *base_shape)``.

        Args:
            value: x, ``(..., *event_shape)``.
        """
        return self.transform.inverse_and_ladj(self._as_tensor(value), self.context)[0]

    def _as_tensor(self, value: Any) -> Tensor:
        """Return a value in the dtype and on the device of the transform; :class:`Flow` casts contexts likewise."""
        return as_tensor("the value", value, floating_tensor(self.transform))

    def _scoring_transform(self) -> FlowTransform:
        return self.transform if self._is_estimate else self.transform.exact()

    def _expanded_base(self) -> Distribution:
        return self.base if self.base.batch_shape == self.batch_shape else self.base.expand(self.batch_shape)
