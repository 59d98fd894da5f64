"""Fit a density to integers with noise that is learned: variational dequantisation."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.arrays import floating_tensor
from pyroflows.constraints import parts_of
from pyroflows.errors import OptionError, ShapeError
from pyroflows.fitting.maximum_likelihood import MaximumLikelihood, parts
from pyroflows.flows import Flow
from pyroflows.flows.without_data import require_no_statistics
from pyroflows.options import kind
from pyroflows.randomness import seeded
from pyroflows.shapes import as_given, described
from pyroflows.training.data import Data, Rows
from pyroflows.training.integers import dequantized, uniform_noise
from pyroflows.training.objective import Figures, Objective, trained_parameters
from pyroflows.transforms import Standardize
from pyroflows.transforms.wild import location_and_scale, wild_elements_among


class VariationalDequantization(MaximumLikelihood):
    r"""This objective trains a density p of integers x together with noise q on the cells above them:

    .. math:: \log P(x \mid c) = \log \int_{[0, 1]^D} p(x + u \mid c) \, du
        \ge E_{q(u \mid x)}[\log p(x + u \mid c) - \log q(u \mid x)]

    (Ho et al. 2019, arXiv:1902.00275, eq. 12). With uniform q it is the bound of Theis et al. (2016, arXiv:1511.01844).
    A step records ``log_prob``, the weighted mean of the bound over a batch, with one draw of the noise for each row.

    Args:
        flow: the flow p.
        noise: the flow q, with support (0, 1), whose context is x.
        data: all rows, of integers.
        index: indices ``(n,)`` of the rows to train on.
        batch_size: number B of rows in a step, from 1 to n.

    Shapes: a step draws integers x ``(B, *event_shape)``, weights ``(B,)``, base draws of the noise
    ``(B, *base_shape)`` and, if there are any, contexts ``(B, *context_shape)``.

    Example:
        >>> from pyroflows.training.data import load
        >>> flow, noise = pf.flows.NSF(2, num_layers=2), pf.flows.Dequantizer(2)
        >>> data = load(flow, torch.randint(5, (100, 2)), are_integers=True)
        >>> objective = VariationalDequantization(flow, noise, data, torch.arange(100), batch_size=10)
        >>> pf.train(objective, num_steps=20, progress_bar=False)
        History(20 steps: log_prob, grad_norm, learning_rate)
    """

    def __init__(self, flow: Flow, noise: Flow, data: Data, index: Tensor, batch_size: int) -> None:
        super().__init__(flow, data, index, batch_size)
        self.own_parameters += trained_parameters(noise)
        self._noise = noise
        self._of_noise = Objective(noise)
        self._seed = int(torch.randint(2**31, ()))

    @property
    def state(self) -> list[nn.Module | Tensor]:
        """The noise, which the loss reads besides the flow."""
        return [self._noise]

    def before_step(self) -> None:
        """Bring the state of both flows up to date."""
        super().before_step()
        self._noise.before_step()

    def draw(self) -> list[Tensor]:
        """Draw the next batch: integers, their weights, base draws of noise, and contexts if there are any."""
        y, weights, *context = super().draw()
        return [y.floor(), weights, self._of_noise.noise(len(y)), *context]

    def loss(self, x: Tensor, weights: Tensor, *others: Tensor) -> tuple[Tensor, Figures]:
        """Compute minus the weighted mean of the bound over a batch."""
        z, *context = others
        u, log_q = self._noise(x).estimated().transport(self._of_noise.base_draws(z))
        log_p = self.flow(*context).estimated().log_prob(dequantized(x, u))
        bound = (weights * (log_p - log_q)).mean()
        return -bound, {"log_prob": bound}

    @torch.no_grad()
    def log_prob(self, rows: Rows) -> Tensor:
        """Return the bounds ``(n,)`` of rows, with the same draws of the noise each time."""
        with seeded(self._seed):
            bounds = [
                log_weights(self.flow, self._noise, part.x.floor(), part.context, num_samples=1)[0]
                for part in parts(rows, self.flow.dim)
            ]
        return torch.cat(bounds)


def log_weights(flow: Flow, noise: Flow | None, x: Tensor, context: Tensor | None, num_samples: int) -> Tensor:
    r"""Draw noise u for integers x and return :math:`\log p(x + u \mid c) - \log q(u \mid x)`.

    Args:
        flow: the flow p.
        noise: the flow q; None for uniform noise, whose log-density is zero.
        x: integers ``(n, *event_shape)``.
        context: their contexts ``(n, *context_shape)``, or None.
        num_samples: number S of draws for each row.

    Returns:
        The logarithms ``(S, n)`` of weights whose mean over draws is an unbiased estimate of P(x).

    Example:
        >>> log_weights(pf.flows.MAF(2), None, torch.zeros(5, 2), None, num_samples=3).shape
        torch.Size([3, 5])
    """
    if noise is None:
        u = uniform_noise(x.expand(num_samples, *x.shape))
        return flow(context).log_prob(dequantized(x, u))
    u, log_q = noise(x).rsample_and_log_prob((num_samples,))
    return flow(context).log_prob(dequantized(x, u)) - log_q


@torch.no_grad()
def adapt_to_integers(flow: Flow, rows: Rows) -> None:
    """Let the layers of a flow learn from integers with noise, unless they have learned before.

    Where nearly all integers of a column agree, such as those of a pixel at the border of images, the noise alone gives
    the column its spread, and the other integers are far out, see :func:`pyroflows.transforms.wild.wild_elements`. They
    count for location and scale all the same, unless they are far out among the integers themselves.

    Args:
        flow: the flow.
        rows: the rows to learn from.
    """
    layer = flow.standardization
    if layer is not None and not layer.is_adapted and not layer.by_channel:
        is_wild = wild_elements_among(rows.x.floor(), rows.weights > 0)
        loc, scale = location_and_scale(flow.before_support(rows.x), rows.weights, is_wild)
        layer.load_state_dict(Standardize(layer.event_shape, loc, scale).state_dict())
    if not flow.is_adapted:
        flow.adapt(rows.x, rows.context, rows.weights)


@torch.no_grad()
def adapt_noise(noise: Flow, rows: Rows) -> None:
    """Let the layers of the noise learn from rows of integers with uniform noise, unless they have learned before."""
    if not noise.is_adapted:
        x = rows.x.floor()
        noise.adapt(uniform_noise(x), x, rows.weights)


def check_dequantization(flow: Flow, dequantization: Any) -> None:
    """Raise if this is no way to dequantise the data of a flow: None, "uniform" or a flow that draws the noise.

    Raises:
        OptionError: if it is none of these, if it is a flow that cannot be the noise, or events are discrete.
        ShapeError: if it is a flow for data of another shape.
    """
    if dequantization is None:
        return
    if flow.support.is_discrete:
        raise OptionError("this flow is a law of integers itself: leave dequantization out")
    if isinstance(dequantization, Flow):
        check_noise(flow, dequantization)
    elif not isinstance(dequantization, str) or dequantization != "uniform":
        got = repr(dequantization) if isinstance(dequantization, str) else kind(dequantization)
        raise OptionError(f'dequantization must be None, "uniform" or a flow such as pf.flows.Dequantizer, got {got}')


def check_noise(flow: Flow, noise: Flow) -> None:
    """Raise if a flow cannot draw the noise between 0 and 1 for the integers of another flow.

    Raises:
        OptionError: if it has another support, draws without gradients, another dtype or device, or shares parameters;
            or if it keeps running statistics of data.
        ShapeError: if its events or contexts have another shape than the integers.

    Example:
        >>> check_noise(pf.flows.MAF(2), pf.flows.Dequantizer(2))
    """
    if not isinstance(noise, Flow):
        raise OptionError(f"noise must be a pyroflows.Flow such as pf.flows.Dequantizer, or None, got {kind(noise)}")
    shape = flow.event_shape
    if noise.event_shape != shape or noise.context_shape != shape:
        context = f"contexts of {described(noise.context_shape)}" if noise.context_dim else "no context"
        raise ShapeError(
            f"the noise for integers of {described(shape)} must have events and contexts of that shape, but this flow "
            f"has events of {described(noise.event_shape)} and {context}: use pf.flows.Dequantizer({as_given(shape)})"
        )
    if any(_ends(part) != (0.0, 1.0) for part, _ in parts_of(noise.support, shape[-1])):
        raise OptionError(
            f"the noise lies between 0 and 1, but this flow has the support {noise.support}: make it with "
            "support=constraints.unit_interval, or use pf.flows.Dequantizer"
        )
    require_no_statistics(noise, "the noise of integers")
    if not noise(torch.zeros(shape)).has_rsample:
        raise OptionError("draws of the noise must carry gradients, which those of this flow do not")
    kinds = [(tensor.dtype, tensor.device) for tensor in map(floating_tensor, (flow, noise)) if tensor is not None]
    if len(set(kinds)) > 1:
        (dtype, device), (other_dtype, other_device) = kinds
        raise OptionError(
            f"flow and noise must have one dtype and device, but have {dtype} on {device} and {other_dtype} on "
            f"{other_device}: use noise.to({str(device)!r}, {dtype})"
        )
    if {id(p) for p in noise.parameters()} & {id(p) for p in flow.parameters()}:
        raise OptionError("flow and noise have parameters in common: make a flow of its own for the noise")


def _ends(constraint: Any) -> tuple[float | None, float | None]:
    """Return the ends of an interval that is the same for all elements; None where there is none."""
    ends = (getattr(constraint, name, math.nan) for name in ("lower_bound", "upper_bound"))
    low, high = (set(torch.as_tensor(end).flatten().tolist()) for end in ends)
    return (low.pop() if len(low) == 1 else None), (high.pop() if len(high) == 1 else None)
