"""One example of each distribution of torch and Pyro, with tensors that depend on one number."""

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.distributions import transforms as pyro_transforms
from torch.distributions import transforms

# Each is called with a number t in (0.4, 0.8) and returns a law of events or of scalars whose tensors depend on t.
# Shapes: ``v(t)`` is (2,), ``m(t)`` a positive definite 2 x 2 matrix.


def v(t):
    return torch.tensor([t, 1.5 * t])


def m(t):
    return torch.tensor([[1.0 + t, 0.3 * t], [0.3 * t, 1.2]])


def chol(t):
    return torch.linalg.cholesky(m(t))


def normal(t):
    return dist.Normal(v(t), 1 + v(t))


EXAMPLES = {
    "Normal": normal,
    "Normal of float64": lambda t: dist.Normal(v(t).double(), v(t).double()),
    "Normal of scalars, expanded": lambda t: dist.Normal(torch.tensor(t), torch.tensor(1 + t)).expand([2]),
    "Independent": lambda t: normal(t).to_event(1),
    "AVFMultivariateNormal": lambda t: dist.AVFMultivariateNormal(v(t), chol(t), 0.1 * torch.ones(2, 1, 2)),
    "AffineBeta": lambda t: dist.AffineBeta(1 + v(t), 2 + v(t), v(t), 1 + v(t)),
    "AsymmetricLaplace": lambda t: dist.AsymmetricLaplace(v(t), v(t), 1 + v(t)),
    "Bernoulli": lambda t: dist.Bernoulli(v(0.8 * t)),
    "Bernoulli of logits": lambda t: dist.Bernoulli(logits=v(t)),
    "Beta": lambda t: dist.Beta(1 + v(t), 2 + v(t)),
    "BetaBinomial": lambda t: dist.BetaBinomial(1 + v(t), 2 + v(t), torch.tensor(7)),
    "Binomial": lambda t: dist.Binomial(7, v(0.8 * t)),
    "Categorical": lambda t: dist.Categorical(logits=m(t)),
    "Cauchy": lambda t: dist.Cauchy(v(t), v(t)),
    "Chi2": lambda t: dist.Chi2(1 + v(t)),
    "ContinuousBernoulli": lambda t: dist.ContinuousBernoulli(v(0.8 * t)),
    "Delta": lambda t: dist.Delta(v(t), torch.tensor([t, 0.0]), event_dim=0),
    "Dirichlet": lambda t: dist.Dirichlet(1 + v(t)),
    "DirichletMultinomial": lambda t: dist.DirichletMultinomial(1 + v(t), torch.tensor(5)),
    "DiscreteHMM": lambda t: dist.DiscreteHMM(v(t), m(t), dist.Normal(v(t), 1.0), duration=3),
    "Empirical": lambda t: dist.Empirical(torch.tensor([t, 2 * t, 3.0]), torch.tensor([0.0, t, 1.0])),
    "ExpandedDistribution": lambda t: dist.ExpandedDistribution(dist.Gumbel(torch.tensor(t), torch.tensor(t)), [2]),
    "Exponential": lambda t: dist.Exponential(v(t)),
    "ExtendedBetaBinomial": lambda t: dist.ExtendedBetaBinomial(1 + v(t), 2 + v(t), torch.tensor(7)),
    "ExtendedBinomial": lambda t: dist.ExtendedBinomial(7, v(0.8 * t)),
    "FisherSnedecor": lambda t: dist.FisherSnedecor(3 + v(t), 5 + v(t)),
    "FoldedDistribution": lambda t: dist.FoldedDistribution(normal(t)),
    "Gamma": lambda t: dist.Gamma(1 + v(t), v(t)),
    "GammaPoisson": lambda t: dist.GammaPoisson(1 + v(t), v(t)),
    "GaussianHMM": lambda t: dist.GaussianHMM(
        dist.MultivariateNormal(v(t), m(t)),
        m(t),
        dist.MultivariateNormal(v(t), m(t)),
        m(t),
        dist.MultivariateNormal(v(t), m(t)),
        duration=3,
    ),
    "GaussianMRF": lambda t: dist.GaussianMRF(
        dist.MultivariateNormal(v(t), m(t)),
        dist.MultivariateNormal(torch.zeros(4), (1 + t) * torch.eye(4)),
        dist.MultivariateNormal(torch.zeros(4), (1 + t) * torch.eye(4)),
    ),
    "GaussianScaleMixture": lambda t: dist.GaussianScaleMixture(1 + v(t), v(t), 1 + v(t)),
    "GeneralizedPareto": lambda t: dist.GeneralizedPareto(v(t), v(t), v(t)),
    "Geometric": lambda t: dist.Geometric(v(0.8 * t)),
    "GroupedNormalNormal": lambda t: dist.GroupedNormalNormal(
        torch.tensor([t, 0.0]), torch.ones(2), 1 + torch.tensor([t, t, t]), torch.tensor([0, 1, 1])
    ),
    "Gumbel": lambda t: dist.Gumbel(v(t), v(t)),
    "HalfCauchy": lambda t: dist.HalfCauchy(v(t)),
    "HalfNormal": lambda t: dist.HalfNormal(v(t)),
    "IndependentHMM": lambda t: dist.IndependentHMM(
        dist.GaussianHMM(
            dist.MultivariateNormal(v(t)[:, None], (1 + v(t))[:, None, None]),
            v(t)[:, None, None, None],
            dist.MultivariateNormal(v(t)[:, None, None], (1 + v(t))[:, None, None, None]),
            v(t)[:, None, None, None],
            dist.MultivariateNormal(v(t)[:, None, None], (1 + v(t))[:, None, None, None]),
            duration=3,
        )
    ),
    "InverseGamma": lambda t: dist.InverseGamma(1 + v(t), v(t)),
    "Kumaraswamy": lambda t: dist.Kumaraswamy(1 + v(t), 2 + v(t)),
    "LKJ": lambda t: dist.LKJ(2, torch.tensor(1 + t)),
    "LKJCholesky": lambda t: dist.LKJCholesky(2, torch.tensor(1 + t)),
    "Laplace": lambda t: dist.Laplace(v(t), v(t)),
    "LinearHMM": lambda t: dist.LinearHMM(
        dist.Normal(v(t), 1 + v(t)).to_event(1),
        m(t),
        dist.StudentT(3 + v(t), v(t), 1 + v(t)).to_event(1),
        m(t),
        dist.Normal(v(t), 1 + v(t)).to_event(1),
        duration=3,
    ),
    "LogNormal": lambda t: dist.LogNormal(v(t), v(t)),
    "LogNormalNegativeBinomial": lambda t: dist.LogNormalNegativeBinomial(torch.tensor(3.0), v(t), v(t)),
    "Logistic": lambda t: dist.Logistic(v(t), v(t)),
    "LogisticNormal": lambda t: dist.LogisticNormal(v(t), v(t)),
    "LowRankMultivariateNormal": lambda t: dist.LowRankMultivariateNormal(v(t), v(t)[:, None], 1 + v(t)),
    "MaskedDistribution": lambda t: normal(t).mask(torch.tensor([True, t > 0.5])),
    "MaskedMixture": lambda t: dist.MaskedMixture(torch.tensor([True, False]), normal(t), dist.Laplace(v(t), v(t))),
    "MixtureOfDiagNormals": lambda t: dist.MixtureOfDiagNormals(m(t), 1 + m(t), v(t)),
    "MixtureOfDiagNormalsSharedCovariance": lambda t: dist.MixtureOfDiagNormalsSharedCovariance(m(t), 1 + v(t), v(t)),
    "MixtureSameFamily": lambda t: dist.MixtureSameFamily(
        dist.Categorical(logits=v(t)), dist.Normal(m(t), 1 + m(t)).to_event(1)
    ),
    "MixtureSameFamily of Gumbels": lambda t: dist.MixtureSameFamily(
        dist.Categorical(probs=v(t)), dist.Gumbel(m(t), 1 + m(t)).to_event(1)
    ),
    "Multinomial": lambda t: dist.Multinomial(5, v(t)),
    "MultivariateNormal": lambda t: dist.MultivariateNormal(v(t), m(t)),
    "MultivariateNormal of a precision": lambda t: dist.MultivariateNormal(v(t), precision_matrix=m(t)),
    "MultivariateNormal of a factor": lambda t: dist.MultivariateNormal(v(t), scale_tril=chol(t)),
    "MultivariateStudentT": lambda t: dist.MultivariateStudentT(torch.tensor(3 + t), v(t), chol(t)),
    "NanMaskedMultivariateNormal": lambda t: dist.NanMaskedMultivariateNormal(v(t), m(t)),
    "NanMaskedNormal": lambda t: dist.NanMaskedNormal(v(t), v(t)),
    "NegativeBinomial": lambda t: dist.NegativeBinomial(torch.tensor(3.0), v(0.8 * t)),
    "OMTMultivariateNormal": lambda t: dist.OMTMultivariateNormal(v(t), chol(t)),
    "OneHotCategorical": lambda t: dist.OneHotCategorical(v(t)),
    "OneHotCategoricalStraightThrough": lambda t: dist.OneHotCategoricalStraightThrough(v(t)),
    "OneOneMatching": lambda t: dist.OneOneMatching(m(t)),
    "OneTwoMatching": lambda t: dist.OneTwoMatching(torch.cat([m(t), 1 + m(t)]), bp_iters=10),
    "OrderedLogistic": lambda t: dist.OrderedLogistic(v(t), v(t)),
    "Pareto": lambda t: dist.Pareto(v(t), 1 + v(t)),
    "Poisson": lambda t: dist.Poisson(v(t)),
    "ProjectedNormal": lambda t: dist.ProjectedNormal(v(t)),
    "RelaxedBernoulli": lambda t: dist.RelaxedBernoulli(torch.tensor(t), v(0.8 * t)),
    "RelaxedBernoulliStraightThrough": lambda t: dist.RelaxedBernoulliStraightThrough(torch.tensor(t), v(0.8 * t)),
    "RelaxedOneHotCategorical": lambda t: dist.RelaxedOneHotCategorical(torch.tensor(t), v(t)),
    "RelaxedOneHotCategoricalStraightThrough": lambda t: dist.RelaxedOneHotCategoricalStraightThrough(
        torch.tensor(t), v(t)
    ),
    "SineBivariateVonMises": lambda t: dist.SineBivariateVonMises(
        *torch.tensor([t, 1 + t, 2 + t, 3 + t]), correlation=torch.tensor(t)
    ),
    "SineSkewed": lambda t: dist.SineSkewed(
        dist.Uniform(torch.full((2,), -torch.pi), torch.full((2,), torch.pi)).to_event(1), 0.3 * v(t)
    ),
    "SkewLogistic": lambda t: dist.SkewLogistic(v(t), v(t), 1 + v(t)),
    "SoftAsymmetricLaplace": lambda t: dist.SoftAsymmetricLaplace(v(t), v(t), 1 + v(t)),
    "SoftLaplace": lambda t: dist.SoftLaplace(v(t), v(t)),
    "Stable": lambda t: dist.Stable(1 + 0.5 * v(t), v(t) - 0.5, v(t), v(t)),
    "StableWithLogProb": lambda t: dist.StableWithLogProb(1 + 0.5 * v(t), v(t) - 0.5, v(t), v(t)),
    "StudentT": lambda t: dist.StudentT(2 + v(t), v(t), v(t)),
    "TransformedDistribution": lambda t: dist.TransformedDistribution(
        normal(t), [transforms.AffineTransform(v(t), v(t)), transforms.ExpTransform(), transforms.PowerTransform(v(t))]
    ),
    "TransformedDistribution by parts": lambda t: dist.TransformedDistribution(
        normal(t).to_event(1),
        [
            transforms.ComposeTransform([transforms.AffineTransform(v(t), v(t)).inv, transforms.SigmoidTransform()]),
            transforms.IndependentTransform(transforms.AffineTransform(v(t), 1 + v(t)), 1),
            transforms.CatTransform(
                [transforms.ExpTransform(), transforms.AffineTransform(torch.tensor(t), 2.0)], lengths=[1, 1], dim=-1
            ),
            pyro_transforms.LowerCholeskyAffine(v(t), chol(t)),
            pyro_transforms.Permute(torch.tensor([1, 0])),
        ],
    ),
    "TransformedDistribution by a distribution function": lambda t: dist.TransformedDistribution(
        dist.Uniform(torch.zeros(2), torch.ones(2)), [transforms.CumulativeDistributionTransform(normal(t)).inv]
    ),
    "TruncatedPolyaGamma": lambda t: dist.TruncatedPolyaGamma(prototype=v(t)),
    "Uniform": lambda t: dist.Uniform(v(t), 1 + v(t)),
    "Unit": lambda t: dist.Unit(v(t)),
    "VonMises": lambda t: dist.VonMises(v(t), v(t)),
    "VonMises3D": lambda t: dist.VonMises3D(t * torch.tensor([0.6, 0.8, 0.0])),
    "Weibull": lambda t: dist.Weibull(v(t), 1 + v(t)),
    "Wishart": lambda t: dist.Wishart(torch.tensor(9 + t), m(t)),
    "ZeroInflatedDistribution": lambda t: dist.ZeroInflatedDistribution(dist.Poisson(v(t)), gate=v(0.8 * t)),
    "ZeroInflatedNegativeBinomial": lambda t: dist.ZeroInflatedNegativeBinomial(
        torch.tensor(3.0), probs=v(0.8 * t), gate=v(0.8 * t)
    ),
    "ZeroInflatedPoisson": lambda t: dist.ZeroInflatedPoisson(v(t), gate=v(0.8 * t)),
}

# These are base classes, take functions, or have neither draws nor densities.
WITHOUT_EXAMPLE = {
    "CoalescentTimes",
    "CoalescentTimesWithRate",
    "Distribution",
    "ExponentialFamily",
    "GammaGaussianHMM",
    "ImproperUniform",
    "LKJCorrCholesky",
    "Rejector",
    "SpanningTree",
    "TorchDistribution",
}

# These have discrete values, or no draws or densities, or none in float64, or have no tensors, so that no flow can be
# tested on them.
NO_BASE = {
    "Normal of float64",
    "Bernoulli",
    "Bernoulli of logits",
    "BetaBinomial",
    "Binomial",
    "Categorical",
    "DirichletMultinomial",
    "DiscreteHMM",
    "Empirical",
    "ExtendedBetaBinomial",
    "ExtendedBinomial",
    "GammaPoisson",
    "GaussianMRF",
    "GaussianScaleMixture",
    "GeneralizedPareto",
    "Geometric",
    "GroupedNormalNormal",
    "LinearHMM",
    "LogNormalNegativeBinomial",
    "Multinomial",
    "NegativeBinomial",
    "OneHotCategorical",
    "OneHotCategoricalStraightThrough",
    "OneOneMatching",
    "OneTwoMatching",
    "OrderedLogistic",
    "Poisson",
    "TruncatedPolyaGamma",
    "Unit",
    "VonMises3D",
    "ZeroInflatedDistribution",
    "ZeroInflatedNegativeBinomial",
    "ZeroInflatedPoisson",
}

SUPPORTS = {
    "interval": lambda t: constraints.interval(v(t), 1 + v(t)),
    "greater_than": lambda t: constraints.greater_than(v(t)),
    "greater_than_eq": lambda t: constraints.greater_than_eq(v(t)),
    "less_than": lambda t: constraints.less_than(v(t)),
    "half_open_interval": lambda t: constraints.half_open_interval(v(t), 1 + v(t)),
    "independent": lambda t: constraints.independent(constraints.interval(v(t), 1 + v(t)), 1),
    "cat": lambda t: constraints.cat(
        [constraints.greater_than(torch.tensor(t)), constraints.interval(0.0, torch.tensor([t]))], dim=-1
    ),
    "stack": lambda t: constraints.stack(
        [constraints.less_than(torch.tensor(t)), constraints.interval(torch.tensor(t), torch.tensor(1 + t))], dim=-1
    ),
}
