"""Bits per dimension of integer data under a density."""

import math

import torch
from torch import Tensor

from pyroflows.arrays import ArrayLike, labels_of, require_one_index, require_values
from pyroflows.errors import OptionError, ShapeError, warn
from pyroflows.fitting.dequantization import check_noise, log_weights
from pyroflows.fitting.maximum_likelihood import num_scored
from pyroflows.flows import Flow
from pyroflows.options import checked_int, kind
from pyroflows.randomness import seeded
from pyroflows.training.data import contexts_of, event_rows
from pyroflows.training.integers import refuse_fractions, refuse_other_levels
from pyroflows.training.refusals import refuse_outside
from pyroflows.transforms.discrete.stacks import maps_categories, num_categories_of

# More bits than those of the uniform law, by this factor, are a sign of a flow on another scale.
MAX_RATIO = 10.0


@torch.no_grad()
def bits_per_dim(
    flow: Flow,
    x: ArrayLike,
    levels: int,
    context: ArrayLike | None = None,
    noise: Flow | None = None,
    num_samples: int = 16,
    seed: int | None = None,
) -> Tensor:
    r"""Compute how many bits a dimension of integer data takes under a flow that was fitted to them.

    For a flow of categories it is exact, the mean over rows of :math:`-\log_2 q(x \mid c) / D` for sequences of length
    D, such as bits per character. For a flow of real numbers that was fitted to integers with noise, it is the mean of
    :math:`-\log_2 P(x \mid c) / D`, where importance sampling gives the probability of the D integers x from the
    density p of their sum with noise,

    .. math:: P(x \mid c) = \int_{[0, 1]^D} p(x + u \mid c) \, du
        \approx \frac1S \sum_{s=1}^S \frac{p(x + u_s \mid c)}{q(u_s \mid x)}, \qquad u_s \sim q(u \mid x).

    The estimate of P(x) is unbiased, so that its logarithm is too small in the mean: the result is an upper bound of
    the true bits in expectation, which is tighter the more draws there are (Burda et al. 2016, arXiv:1509.00519). One
    draw gives the bound that training maximises.

    Args:
        flow: a flow that :func:`pyroflows.fit_density` fitted to integers, with ``dequantization`` unless it is one of
            categories.
        x: integers from 0 to ``levels - 1``, or one-hot vectors of categories, rows ``(n, *event_shape)``.
        levels: the number of levels, at least 2, such as 256 for bytes. It only serves to check x, and a flow of
            categories.
        context: rows ``(n, *context_shape)``, if the flow takes a context.
        noise: the flow q that was fitted with it, ``fit.noise``; None for uniform noise.
        num_samples: number S of draws of the noise for each row, at least 1; a flow of categories needs no noise.
        seed: makes the estimate reproducible and leaves the global generator as it was; None to draw from that one.

    Returns:
        A tensor without axes. A warning says so if it is more than ten times the bits of the uniform law, as it is for
        a flow on another scale.

    Raises:
        ShapeError: if numbers of rows or columns do not fit.
        DataError: if a value of x is none of the levels, or cannot be used; the message names the row and the column.
        OptionError: if an option is outside its range, or the flow has another number of categories than levels.

    Example:
        >>> x = torch.randint(16, (500, 2))
        >>> flow = pf.flows.NSF(2, num_layers=2, hidden_dims=(16,))
        >>> fit = pf.fit_density(flow, x, dequantization="uniform", max_epochs=5, seed=0, progress_bar=False)
        >>> pf.bits_per_dim(flow, x, levels=16, seed=0)  # 4 bits tell 16 levels apart
        tensor(4...)
    """
    if not isinstance(flow, Flow):
        raise OptionError(f"bits_per_dim takes a pyroflows.Flow, got {kind(flow)}")
    require_values(flow)
    levels, num_samples = checked_int("levels", levels, least=2), checked_int("num_samples", num_samples)
    is_exact = flow.support.is_discrete
    if is_exact:
        _check_categories(flow, levels, noise)
    elif noise is not None:
        check_noise(flow, noise)
    require_one_index(x=x, context=context)
    values = event_rows(x, flow)
    if not len(values):
        raise ShapeError("x has no rows, of which bits per dimension could be the mean")
    if is_exact:
        refuse_outside(flow.support, values, labels_of(x))
    else:
        refuse_fractions(values, labels_of(x))
    refuse_other_levels(values, levels, labels_of(x))
    contexts = contexts_of(context, len(values), flow)
    size = num_scored(flow.dim)
    num_at_once = max(1, size // len(values))
    counts = [min(num_at_once, num_samples - i) for i in range(0, num_samples, num_at_once)]
    total = 0.0
    with seeded(seed):
        for i in range(0, len(values), size):
            rows, given = values[i : i + size], None if contexts is None else contexts[i : i + size]
            if is_exact:
                total += flow(given).log_prob(rows).double().sum().item()
                continue
            log_ratios = torch.cat([log_weights(flow, noise, rows, given, count) for count in counts])
            total += (log_ratios.double().logsumexp(0) - math.log(num_samples)).sum().item()
    num_places = flow.event_shape[0] if maps_categories(flow) else flow.dim  # one-hot vectors have more elements
    bits = -total / (len(values) * num_places * math.log(2))
    if bits > MAX_RATIO * math.log2(levels) and not is_exact:
        warn(
            f"{bits:.3g} bits per dimension are many more than the {math.log2(levels):.3g} that tell {levels} levels "
            "apart without any flow: fit the flow to these integers, by fit_density with dequantization, not to "
            "another scale of them"
        )
    return values.new_tensor(bits)


def _check_categories(flow: Flow, levels: int, noise: Flow | None) -> None:
    """Raise if a flow of whole numbers has another number of categories, or noise is given."""
    if noise is not None:
        raise OptionError("this flow is a law of categories, whose probabilities need no noise: leave noise out")
    if maps_categories(flow) and (size := num_categories_of(flow)) != levels:
        raise OptionError(f"this flow is one of {size} categories, but levels is {levels}: give the number that it has")
