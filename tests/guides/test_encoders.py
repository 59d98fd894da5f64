"""Encoders of structured guides: what rows have in common, and what is wrong with features."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.guides import AutoStructuredFlow
from tests.guides.hierarchies import crossed, encode, measured, nested

Y = torch.linspace(-1.0, 2.0, 8)


def law_of(guide, y):
    """The law of all latents given these data, by the flow that a guide holds."""
    levels = guide.call((y,), {}).levels
    return guide.law_at(levels, {}, (y,), {})


def perturbed(**options):
    guide = AutoStructuredFlow(measured, encoder=encode, **options)
    guide(Y)
    for parameter in guide.flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return guide


def test_order_of_rows_does_not_matter():
    torch.manual_seed(0)
    guide, order = perturbed(), torch.randperm(len(Y))
    x = torch.randn(5, 9)
    permuted = torch.cat([x[:, :1], x[:, 1:][:, order]], -1)
    torch.testing.assert_close(law_of(guide, Y).log_prob(x), law_of(guide, Y[order]).log_prob(permuted))
    learned = AutoStructuredFlow(measured, encoder=encode, learned_rows=True)
    learned(Y)
    learned.flow.transform.layers[0].levels[0].affine.table.data.normal_()
    assert not torch.allclose(law_of(learned, Y).log_prob(x), law_of(learned, Y[order]).log_prob(permuted))


def test_number_of_parameters_does_not_depend_on_the_rows():
    sizes = []
    for num_rows in (5, 50):
        guide = AutoStructuredFlow(measured, encoder=encode)
        guide(torch.randn(num_rows))
        sizes.append(sum(parameter.numel() for parameter in guide.parameters()))
    assert sizes[0] == sizes[1]


def test_a_module_is_trained_with_the_flow_and_is_in_the_state():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 2)

        def forward(self, rows, y, size=None):
            return self.linear(y[rows, None])

    net = Net()
    before = net.linear.weight.clone()
    guide = AutoStructuredFlow(measured, encoder=net)
    svi = SVI(measured, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step(Y, 4)
    assert not torch.equal(before, net.linear.weight)
    assert any(name.endswith("linear.weight") for name in guide.state_dict())


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize(
    ("encoder", "got"),
    [
        (lambda rows, y, size=None: y[rows], r"got \(\d,\)"),
        (lambda rows, y, size=None: y[:2, None], r"got \(2, 1\)"),
        (lambda rows, y, size=None: None, "got None"),
    ],
    ids=["one dimension", "other rows", "no tensor"],
)
def test_features_of_a_wrong_shape_are_an_error(encoder, got, size):
    with pytest.raises(ShapeError, match=rf"encoder of the latents in plate 'g' must give features.*{got}"):
        AutoStructuredFlow(measured, encoder=encoder)(Y, size)


def test_features_that_are_nan_are_an_error():
    def encoder(rows, y):
        return torch.where(y[rows, None] > 0, torch.nan, 0.0)

    with pytest.raises(DataError, match=r"in plate 'g' gives features.*for 5 of 8 rows, the first of which is row 3"):
        AutoStructuredFlow(measured, encoder=encoder)(Y)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (encode, "give encoder= a dictionary by latent site"),
        ({"mu": encode}, "encoder names site 'mu', which is no latent in a plate"),
        ({"t": 3}, "an encoder must be a module or a function"),
    ],
)
def test_encoders_of_no_level_are_errors(encoder, message):
    for model in (nested, crossed)[: 2 if encoder is encode else 1]:
        with pytest.raises(OptionError, match=message):
            AutoStructuredFlow(model, encoder=encoder)(torch.zeros(4, 3), None)
