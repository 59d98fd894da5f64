"""What public functions do with flows of categories: they work, or say in a sentence why they do not."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

import pyroflows as pf
from pyroflows import DataError, FlowError, OptionError, flows

from .categories import make

LETTERS = np.array(list("abcd"))
REAL = flows.IAF(3, hidden_dims=(8,))


def normal_model(y=None):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def rows(count=50):
    return torch.randint(4, (count, 3), generator=torch.Generator().manual_seed(0))


def of_dim(dim, context_dim=0):
    return flows.DiscreteCoupling(dim, 4, context_dim=context_dim)


Y = torch.zeros(3)
REFUSALS = {
    "flow matching": (lambda flow: pf.fit_flow_matching(flow, rows()), "Continuous.*fit_density"),
    "a student": (lambda flow: pf.distill(flow, REAL), "a student needs .* fit it to draws of the teacher"),
    "a teacher": (lambda flow: pf.distill(REAL, flow), "a teacher needs .* fit another flow of categories"),
    "a discrete teacher": (
        lambda flow: pf.distill(REAL, dist.Poisson(torch.ones(3)).to_event(1)),
        "a teacher needs a law of real numbers",
    ),
    "a guide": (lambda flow: pf.FlowVI(normal_model, guide=flow), "function latent_dim -> flow"),
    "a guide's function": (
        lambda flow: pf.FlowVI(normal_model, guide=of_dim, progress_bar=False).run(Y),
        "a guide needs a law of real numbers.*TraceEnum_ELBO",
    ),
    "flow_fn": (lambda flow: pf.guides.AutoFlow(normal_model, of_dim)(Y), "a guide needs a law of real numbers"),
    "an amortised posterior": (
        lambda flow: pf.fit_amortized(normal_model, flow=of_dim, num_simulations=50, progress_bar=False),
        "an amortised posterior needs a law of real numbers",
    ),
    "a proposal": (
        lambda flow: pf.importance_sample(normal_model, flow, Y, num_samples=10, progress_bar=False),
        "a proposal .* needs a law of real numbers",
    ),
    "a mixture with real numbers": (lambda flow: flows.Mixture([flow, REAL]), "all be of categories, or all of real"),
    "a mixture of mixtures": (
        lambda flow: flows.Mixture([flow, flows.Mixture([flows.DiscreteCoupling(3, 5)])]),
        "same categories, but have .4, 5. of them",
    ),
    "a comparison with real numbers": (
        lambda flow: pf.compare_densities({"a": flow, "b": flows.MAF(3)}, rows()),
        "bits_per_dim",
    ),
    "uniform noise": (lambda flow: pf.fit_density(flow, rows(), dequantization="uniform"), "leave dequantization out"),
    "learned noise": (
        lambda flow: pf.fit_density(flow, rows(), dequantization=flows.Dequantizer(3)),
        "leave dequantization out",
    ),
    "the noise of a density": (
        lambda flow: pf.fit_density(REAL, rows(), dequantization=of_dim(3, context_dim=3)),
        "the noise lies between 0 and 1",
    ),
    "a conditional law": (lambda flow: flow.conditional(torch.tensor([1.0])), "conditional .* needs a law of real"),
    "a marginal law": (lambda flow: flow.marginal([0]), "marginal law needs a law of real .*enumerate_support"),
    "conditional draws": (
        lambda flow: pf.sample_conditional(flow, torch.tensor([1.0]), [0]),
        "sample_conditional needs a law of real .*enumerate_support",
    ),
    "bits with noise": (lambda flow: pf.bits_per_dim(flow, rows(), 4, noise=REAL), "leave noise out"),
    "bits of other levels": (lambda flow: pf.bits_per_dim(flow, rows(), 256), "4 categories, but levels is 256"),
    "bits of other data": (lambda flow: pf.bits_per_dim(flow, rows() + 1, 4), "the first is 4 in row"),
    "data of other categories": (lambda flow: pf.fit_density(flow, rows() + 1), "the first is 4 in row"),
    "negative data": (lambda flow: pf.fit_density(flow, rows() - 1), "the first is -1 in row"),
    "fractions": (lambda flow: pf.fit_density(flow, rows() + 0.5), "no integers from 0 to 3"),
    "data that take more categories": (
        lambda flow: pf.fit_density(flow, rows() + 3),
        "no integers from 0 to 3 in .*: the largest is 6, which takes num_categories=7",
    ),
    "data that start below 0": (
        lambda flow: pf.bits_per_dim(flow, rows() - 2, 4),
        "the smallest is -2 and the largest 1: give x . 2, whose categories are 0 to 3, with num_categories=4",
    ),
    "fractions of a number": (
        lambda flow: pf.fit_density(flow, rows() / 4),
        "give it whole numbers from 0 to num_categories - 1",
    ),
    "strings": (lambda flow: pf.fit_density(flow, LETTERS[rows()]), "integer codes of strings, such as np.unique"),
    "a column of strings": (
        lambda flow: pf.fit_density(flow, pd.DataFrame(LETTERS[rows()])),
        "of kind 'string', .*a flow of categories takes their codes, np.unique",
    ),
    "a column of categories": (
        lambda flow: pf.fit_density(flow, pd.DataFrame(LETTERS[rows()]).astype("category")),
        r"of kind 'categorical', .*x\[0\].cat.codes",
    ),
    "a series of categories": (
        lambda flow: pf.fit_density(of_dim(1), pd.Series(["a", "b"] * 9, dtype="category")),
        "takes their codes, x.cat.codes",
    ),
    "bits of a Dataset": (
        lambda flow: pf.bits_per_dim(flow, TensorDataset(rows()), 4),
        r"x is a TensorDataset: give its rows as a tensor, torch.stack",
    ),
    "a context of the wrong width": (lambda flow: flow(torch.zeros(2)), "no context|context size|has context"),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_what_does_not_apply_says_so(call, message):
    with pytest.raises(FlowError, match=message):
        call(make(order=[0, 1, 2]))


def test_what_messages_advise_for_strings_and_categories_works():
    letters = LETTERS[rows()]
    codes = np.unique(letters, return_inverse=True)[1].reshape(np.shape(letters))
    frame = pd.DataFrame(letters).astype("category")
    for x in (codes, pd.DataFrame({label: frame[label].cat.codes for label in frame})):
        assert pf.bits_per_dim(of_dim(3), x, 4).item() == pytest.approx(2)


def test_bits_per_character_are_exact():
    flow, x = make(base="autoregressive", univariate="permutation"), rows()
    expected = -flow().log_prob(x).mean() / (3 * math.log(2))
    torch.testing.assert_close(pf.bits_per_dim(flow, x, 4), expected.detach())
    frame = x.numpy()
    torch.testing.assert_close(pf.bits_per_dim(flow, frame, 4, num_samples=1), expected.detach())
    new = flows.DiscreteCoupling(3, 4)
    assert pf.bits_per_dim(new, x, 4).item() == pytest.approx(2)
    mixture = flows.Mixture([new, flows.DiscreteAutoregressive(3, 4)])
    assert pf.bits_per_dim(mixture, x, 4).item() == pytest.approx(2)
    with_context = make(context_dim=2)
    context = torch.randn(50, 2)
    expected = -with_context(context).log_prob(x).mean() / (3 * math.log(2))
    torch.testing.assert_close(pf.bits_per_dim(with_context, x, 4, context), expected.detach())


def test_bits_of_one_hot_vectors():
    torch.manual_seed(1)
    integers = make(univariate="permutation")
    torch.manual_seed(1)
    vectors = make(univariate="permutation", one_hot=True)
    x = rows()
    torch.testing.assert_close(pf.bits_per_dim(vectors, one_hot(x, 4), 4), pf.bits_per_dim(integers, x, 4))
    with pytest.raises(OptionError, match="4 categories, but levels is 3"):
        pf.bits_per_dim(vectors, one_hot(x, 4), 3)
    with pytest.raises(DataError, match="outside the support"):
        pf.bits_per_dim(vectors, torch.zeros(50, 3, 4), 4)


@pytest.mark.parametrize("vectors", [False, True])
def test_fit_and_picture(vectors):
    x = rows()
    fit = pf.fit_density(
        make("coupling", one_hot=vectors), one_hot(x, 4) if vectors else x, max_epochs=2, seed=0, progress_bar=False
    )
    assert fit.gaussian_log_prob is None
    fit.plot()


def test_nothing_is_standardised():
    flow = make()
    assert flow.standardization is None
    assert not flow.adapts
    for nothing_to_adapt in (flow, flows.Mixture([flow, of_dim(3)])):
        with pytest.raises(OptionError, match="categories.* has nothing to learn from data before training"):
            nothing_to_adapt.adapt(rows())
    flow.adapt_to_draws()
    flow = make(context_dim=2)
    context = 5 + 3 * torch.randn(50, 2)
    flow.adapt(rows().float(), context)
    torch.testing.assert_close(flow.transform.context_scale.loc, context.mean(0))
    mixture = flows.Mixture([flow, of_dim(3)])
    mixture.adapt(rows(), context)
    torch.testing.assert_close(mixture.gate.context_scale.loc, context.mean(0))


def test_comparison_of_discrete_flows():
    compared = pf.compare_densities(
        {"coupling": of_dim(3), "autoregressive": flows.DiscreteAutoregressive(3, 4)},
        rows(),
        max_epochs=2,
        progress_bar=False,
        seed=0,
    )
    assert set(compared.fits) == {"coupling", "autoregressive"}
