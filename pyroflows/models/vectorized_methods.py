"""Methods of Pyro's and torch's distributions that branch on values, in a form that runs under ``torch.func.vmap``.

Each of them gives what the method in its place gives for a single draw. To add one, append a line to :data:`METHODS`.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import coalescent, conjugate, hmm, sine_bivariate_von_mises, stable
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.ops import special
from torch import Tensor
from torch.distributions import von_mises
from torch.distributions.utils import broadcast_all

from pyroflows.models.over_draws import each_draw, over_draws

# What is inside of its memory of earlier calls, which under vmap would not find one again.
_make_phylogeny = coalescent._make_phylogeny.__wrapped__
_spline = import_module("pyro.distributions.transforms.spline")
_NO_SHAPE = torch.Size()


def _multinomial_log_prob(self: Any, value: Tensor) -> Tensor:
    r""":math:`\log n! - \sum_k \log x_k! + \sum_k x_k \log p_k`, where the last term is 0 for :math:`x_k = p_k = 0`."""
    logits, value = broadcast_all(self.logits, value)
    powers = torch.where((value == 0) & (logits == -torch.inf), 0.0, logits) * value
    return (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1) + powers.sum(-1)


def _poisson_log_prob(self: Any, value: Tensor) -> Tensor:
    """The density with all counts; ``is_sparse`` only saves time at zeros."""
    return torch.distributions.Poisson.log_prob(self, value)


_dense_log_beta = conjugate._log_beta_1


def _log_beta_1(alpha: Tensor, value: Tensor, is_sparse: bool) -> Tensor:
    """The function with all counts; ``is_sparse`` only saves time at zeros."""
    return _dense_log_beta(alpha, value, is_sparse=False)


def _nan_masked_normal_log_prob(self: Any, value: Tensor) -> Tensor:
    """The normal log-density, and 0 where the value is not finite."""
    is_given = value.isfinite()
    log_prob = torch.distributions.Normal.log_prob(self, torch.where(is_given, value, 0.0))
    return torch.where(is_given, log_prob, 0.0)


def _nan_masked_multivariate_normal_log_prob(self: Any, value: Tensor) -> Tensor:
    r"""The log-density of the finite entries.

    It is that of a normal law in which each other entry is independent of all, has variance 1 and lies at its mean,
    plus :math:`\tfrac12\log 2\pi` for each of those.
    """
    is_given = value.isfinite()
    is_pair_given = is_given[..., :, None] & is_given[..., None, :]
    identity = torch.eye(value.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
    covariance = torch.where(is_pair_given, self.covariance_matrix, identity)
    given = torch.where(is_given, value, self.loc)
    whole = torch.distributions.MultivariateNormal(self.loc, covariance, validate_args=False).log_prob(given)
    return whole + 0.5 * math.log(2 * math.pi) * (~is_given).to(value.dtype).sum(-1)


def _ordered_logistic_init(self: Any, predictor: Tensor, cutpoints: Tensor, validate_args: bool | None = None) -> None:
    r""":math:`p_k = \sigma(c_{k+1} - \eta) - \sigma(c_k - \eta)`, with :math:`c_0 = -\infty, c_K = \infty`."""
    q = torch.sigmoid(cutpoints - predictor[..., None])
    self.predictor = predictor.expand(q.shape[:-1])
    self.cutpoints = cutpoints.expand(q.shape)
    probs = torch.cat([q[..., :1], q[..., 1:] - q[..., :-1], 1 - q[..., -1:]], -1)
    super(dist.OrderedLogistic, self).__init__(probs, validate_args=validate_args)


def _sine_skewed_init(self: Any, base_dist: Any, skewness: Tensor, validate_args: bool | None = None) -> None:
    """The constructor without its warning of weights that sum to more than one."""
    batch_shape = torch.broadcast_shapes(base_dist.batch_shape, skewness.shape[:-1])
    self.skewness = skewness.broadcast_to(batch_shape + skewness.shape[-1:])
    self.base_dist = base_dist.expand(batch_shape)
    TorchDistribution.__init__(self, batch_shape, skewness.shape[-1:], validate_args=validate_args)


_ANGLES = ("phi_loc", "psi_loc", "phi_concentration", "psi_concentration", "correlation")


def _sine_bivariate_init(
    self: Any,
    phi_loc: Any,
    psi_loc: Any,
    phi_concentration: Any,
    psi_concentration: Any,
    correlation: Any = None,
    weighted_correlation: Any = None,
    validate_args: bool | None = None,
) -> None:
    """The constructor without its limit of the concentrations."""
    if weighted_correlation is not None:
        correlation = weighted_correlation * torch.as_tensor(phi_concentration * psi_concentration).sqrt()
    values = broadcast_all(phi_loc, psi_loc, phi_concentration, psi_concentration, correlation)
    vars(self).update(zip(_ANGLES, values, strict=True))
    TorchDistribution.__init__(self, values[0].shape, torch.Size([2]), validate_args)


def _log_bessel(orders: Any, value: Tensor, terms: Any = 250) -> Tensor:
    r""":math:`\log I_m(x)` for m up to the largest of the orders, with as many terms as the draw that needs most."""

    def called(value: Tensor, terms: Tensor) -> Tensor:
        return special.log_I1(orders, value, int(terms.max())).movedim(0, 1)

    return over_draws(called, value.dim(), 0)(value, torch.as_tensor(terms))


def _sine_bivariate_sample(self: Any, sample_shape: Any = _NO_SHAPE) -> Tensor:
    """Draws by the sampler for a batch, which proposes until all draws are accepted."""

    def called(*values: Tensor) -> Tensor:
        return dist.SineBivariateVonMises(*values, validate_args=False).sample()

    shape = torch.Size(sample_shape) + self.batch_shape
    return over_draws(called, 0, 0, 0, 0, 0)(*(getattr(self, name).expand(shape) for name in _ANGLES))


_wishart_init_of_fixed_df = torch.distributions.Wishart.__init__


def _wishart_init(
    self: Any,
    df: Any,
    covariance_matrix: Tensor | None = None,
    precision_matrix: Tensor | None = None,
    scale_tril: Tensor | None = None,
    validate_args: bool | None = None,
) -> None:
    """The constructor without its checks of the degrees of freedom, which come in after it."""
    matrix = next(m for m in (covariance_matrix, precision_matrix, scale_tril) if m is not None)
    size = matrix.shape[-1]
    df = torch.as_tensor(df, dtype=matrix.dtype, device=matrix.device)
    large = torch.full(df.shape, size + 1.0, dtype=matrix.dtype, device=matrix.device)
    _wishart_init_of_fixed_df(self, large, covariance_matrix, precision_matrix, scale_tril, validate_args)
    self.df = df.expand(self.batch_shape)
    steps = torch.arange(size, dtype=matrix.dtype, device=matrix.device)
    self._dist_chi2 = torch.distributions.Chi2(self.df[..., None] - steps)


def _wishart_rsample(self: Any, sample_shape: Any = _NO_SHAPE, max_try_correction: Any = None) -> Tensor:
    """A draw by Bartlett's decomposition, which is not repeated where it is singular up to rounding."""
    return self._bartlett_sampling(torch.Size(sample_shape))


def _projected_normal_rsample(self: Any, sample_shape: Any = _NO_SHAPE) -> Tensor:
    """A normal draw around the concentration, divided by its norm, which is zero with probability zero."""
    shape = self._extended_shape(torch.Size(sample_shape))
    draw = self.concentration + torch.randn(shape, dtype=self.concentration.dtype, device=self.concentration.device)
    return draw / draw.norm(dim=-1, keepdim=True)


def _matching_log_prob(self: Any, value: Tensor) -> Tensor:
    """The log-probability, for each draw by itself, since the approximation by belief propagation takes no batches."""

    def single(logits: Tensor, value: Tensor) -> Tensor:
        return type(self)(logits, bp_iters=self.bp_iters, validate_args=False).log_prob(value)

    return over_draws(each_draw(single), 2, value.dim())(self.logits, value)


def _spanning_tree_sample(self: Any, sample_shape: Any = _NO_SHAPE) -> Tensor:
    """Draws of trees, for each draw by itself, since their sampler walks along edges."""

    def single(logits: Tensor) -> Tensor:
        return dist.SpanningTree(logits, self.sampler_options, validate_args=False).sample(sample_shape)

    return over_draws(each_draw(single), 1)(self.edge_logits)


_rational_spline_over_draws = over_draws(_spline._monotonic_rational_spline, 0, 1, 1, 1, 1)


def _rational_spline(inputs: Tensor, *parameters: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The spline and its log-derivative, which are the identity and 0 beyond the last knots."""
    given = [tensor for tensor in parameters if tensor is not None]
    return _rational_spline_over_draws(inputs, *given, **options)


# The owner of a method or function, its name, and the version that runs under vmap.
METHODS: list[tuple[Any, str, Callable[..., Any]]] = [
    (torch.distributions.Multinomial, "log_prob", _multinomial_log_prob),
    (dist.Poisson, "log_prob", _poisson_log_prob),
    (conjugate, "_log_beta_1", _log_beta_1),
    (dist.NanMaskedNormal, "log_prob", _nan_masked_normal_log_prob),
    (dist.NanMaskedMultivariateNormal, "log_prob", _nan_masked_multivariate_normal_log_prob),
    (dist.OrderedLogistic, "__init__", _ordered_logistic_init),
    (dist.SineSkewed, "__init__", _sine_skewed_init),
    (dist.SineBivariateVonMises, "__init__", _sine_bivariate_init),
    (dist.SineBivariateVonMises, "sample", _sine_bivariate_sample),
    (sine_bivariate_von_mises, "log_I1", _log_bessel),
    (torch.distributions.Wishart, "__init__", _wishart_init),
    (torch.distributions.Wishart, "rsample", _wishart_rsample),
    (dist.ProjectedNormal, "rsample", _projected_normal_rsample),
    (dist.OneOneMatching, "log_prob", _matching_log_prob),
    (dist.OneTwoMatching, "log_prob", _matching_log_prob),
    (dist.SpanningTree, "sample", _spanning_tree_sample),
    (hmm, "_sequential_logmatmulexp", over_draws(hmm._sequential_logmatmulexp, 3)),
    (stable, "_stable_log_prob", over_draws(stable._stable_log_prob, 0, 0, 0)),
    (stable, "_standard_stable", over_draws(stable._standard_stable, 0, 0, 0, 0)),
    (von_mises, "_rejection_sample", over_draws(von_mises._rejection_sample, 0, 0, 0, 0)),
    (coalescent, "_make_phylogeny", over_draws(_make_phylogeny, 1, 1)),
    (coalescent, "_sample_coalescent_times", over_draws(coalescent._sample_coalescent_times, 1)),
    (_spline, "_monotonic_rational_spline", _rational_spline),
]
