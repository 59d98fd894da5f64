"""What discrete layers refuse, in sentences."""

import pyro
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyroflows.errors import DataError, InexactError, OptionError, ShapeError
from pyroflows.transforms import Compose, DiscreteAutoregressive, DiscreteCoupling, OneHot, Planar
from pyroflows.transforms.discrete.stacks import one_hot_value
from tests.transforms.discrete.registry import Running, wide_convolution

LAYERS = {"autoregressive": DiscreteAutoregressive, "coupling": DiscreteCoupling}
BAD_VALUES = {"too large": 5, "negative": -1, "fractional": 1.5, "nan": torch.nan, "infinite": torch.inf}

all_layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
bad_values = pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES)


def views(t):
    """All ways to call a layer with values."""
    return [
        t,
        t.inv,
        t.forward_and_ladj,
        t.inverse_and_ladj,
        t.base_value,
        t.inv.forward_and_ladj,
        Compose([t]),
        Compose([t]).inverse_and_ladj,
        Compose([t, t.inv, t]).inv,
    ]


# Values


@all_layers
@bad_values
def test_values_that_are_no_categories_raise_and_are_named(layer, value):
    x = torch.zeros(7, 3)
    x[4, 1] = value
    for call in views(layer(3, 5)):
        with pytest.raises(DataError, match=rf"takes categories 0 to 4, but got {value:g} at \[4, 1\].*num_categories"):
            call(x)


@all_layers
def test_integers_that_are_no_categories_raise(layer):
    for dtype, value in ((torch.int64, -3), (torch.int32, 5), (torch.uint8, 255)):
        with pytest.raises(DataError, match=rf"got {value} at \[2\]"):
            layer(3, 5)(torch.tensor([0, 1, value], dtype=dtype))


@all_layers
def test_a_dtype_without_all_categories_raises(layer):
    """It would give other categories in silence."""
    for dtype in (torch.uint8, torch.int8, torch.bool, torch.bfloat16):
        with pytest.raises(DataError, match=r"categories 0 to 299, and torch.* does not have all these numbers"):
            layer(3, 300, hidden_dims=(2,))(torch.zeros(3, dtype=dtype))
    z = torch.tensor([1, 255, 0], dtype=torch.uint8)
    t = layer(3, 256, hidden_dims=(2,))
    assert torch.equal(t.inv(t(z)), z)
    bits = torch.tensor([True, False, True])
    assert torch.equal(layer(3, 2)(bits), bits)


@pytest.mark.parametrize("univariate", ["additive", "affine"])
@all_layers
def test_values_are_not_checked_where_pyro_does_not_validate(layer, univariate):
    with pyro.validation_enabled(False):
        layer(3, 5, univariate)(torch.tensor([0, 1, 5]))


@all_layers
def test_values_are_not_read_where_they_are_recorded(layer):
    t = layer(3, 5)
    graph = make_fx(t)(torch.tensor([0, 1, 2]))
    assert torch.equal(graph(torch.tensor([4, 1, 2])), torch.tensor([4, 1, 2]))
    assert torch.equal(torch.func.vmap(t)(torch.tensor([[4, 1, 2]])), torch.tensor([[4, 1, 2]]))


def test_one_hot_refuses_other_values():
    t = OneHot(2, 3)
    with pytest.raises(DataError, match=r"OneHot takes categories 0 to 2, but got 3 at \[0, 1\]"):
        t(torch.tensor([[0, 3]]))
    with pytest.raises(DataError, match=r"the inverse of OneHot takes one-hot vectors, but the one at \[1\] is none"):
        t.inv(torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]))
    with pytest.raises(ShapeError, match=r"event shape \(2, 3\)"):
        t.inv(torch.zeros(3, 2))


# Options


@all_layers
@pytest.mark.parametrize("length", [0, -1, 2.0, "3", (2, 2)])
def test_no_length_raises(layer, length):
    with pytest.raises(OptionError, match="length must be"):
        layer(length, 5)


@pytest.mark.parametrize("layer", [*LAYERS.values(), OneHot])
@pytest.mark.parametrize("size", [1, 0, -3, 2.5])
def test_fewer_than_two_categories_raise(layer, size):
    with pytest.raises(OptionError, match="num_categories must be .*at least 2"):
        layer(3, size)


@all_layers
@pytest.mark.parametrize("temperature", [0, -1.0, torch.inf, torch.nan, "1", None, True])
def test_no_temperature_raises(layer, temperature):
    with pytest.raises(OptionError, match="temperature must be a number above 0 and finite"):
        layer(3, 5, temperature=temperature)


@all_layers
@pytest.mark.parametrize("dim", [0, -2, 1.5])
def test_no_size_of_embeddings_raises(layer, dim):
    with pytest.raises(OptionError, match="embedding_dim must be"):
        layer(3, 5, embedding_dim=dim)


@all_layers
def test_unknown_names_raise(layer):
    with pytest.raises(OptionError, match="univariate map of a discrete layer must be one of .* got 'spline'"):
        layer(3, 5, univariate="spline")
    with pytest.raises(OptionError, match="conditioner must be one of .* got 'mpl'"):
        layer(3, 5, conditioner="mpl")
    with pytest.raises(OptionError, match="conditioner must be a name, or a function"):
        layer(3, 5, conditioner=nn.Linear(3, 3))


@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1], [1, 2, 3], [0.0, 1.0, 2.0], [0, None, 1, 2]], ids=str)
def test_wrong_order_raises(order):
    with pytest.raises(OptionError, match="order of DiscreteAutoregressive must be a permutation of 0 to 2"):
        DiscreteAutoregressive(3, 5, order=order)


@pytest.mark.parametrize("mask", [[True, False], [1, 0, 1], [[True, False, True]]], ids=str)
def test_wrong_mask_raises(mask):
    with pytest.raises(OptionError, match="mask of DiscreteCoupling must be 3 booleans"):
        DiscreteCoupling(3, 5, mask=mask)


@pytest.mark.parametrize(("passes", "what"), [(True, "transforms nothing"), (False, "nothing to condition on")])
def test_mask_that_is_the_same_everywhere_raises(passes, what):
    with pytest.raises(OptionError, match=what):
        DiscreteCoupling(3, 5, mask=[passes] * 3)


@pytest.mark.parametrize("conditioner", ["made", "residual"])
def test_context_that_the_conditioner_cannot_take_raises(conditioner):
    with pytest.raises(OptionError, match=r"takes a context vector, but got a context of shape \(2, 3\)"):
        DiscreteAutoregressive(3, 5, conditioner=conditioner, context_dim=(2, 3))


@pytest.mark.parametrize(("conditioner", "context_dim"), [("mlp", (2, 3)), ("conv", (2, 4)), ("conv", (2, 3, 1))])
def test_context_that_does_not_fit_a_coupling_raises(conditioner, context_dim):
    with pytest.raises(OptionError, match=r"context vector or, with convolutions, \(channels, 3\), but got"):
        DiscreteCoupling(3, 5, conditioner=conditioner, context_dim=context_dim)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: DiscreteAutoregressive(3, 5, conditioner="causal_conv", hidden_dims=(4,), context_dim=(2, 3)),
        lambda: DiscreteCoupling(3, 5, conditioner="conv", hidden_dims=(4,), context_dim=(2, 3)),
    ],
    ids=LAYERS,
)
def test_convolutions_take_conditioning_sequences(layer):
    t, z = layer(), torch.randint(5, (7, 3))
    for parameter in t.parameters():
        nn.init.normal_(parameter)
    x = t.condition(torch.randn(7, 2, 3))(z)
    assert not torch.equal(x, t.condition(torch.randn(2, 3))(z))


# Networks of one's own


class Dropping(Running):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.dropout = nn.Dropout(0.1)


def test_dropout_raises():
    with pytest.raises(OptionError, match=r"must not contain Dropout at 'dropout': .* breaks the bijection"):
        DiscreteAutoregressive(3, 5, conditioner=Dropping)
    with pytest.raises(OptionError, match="must not contain Dropout at '1'"):
        DiscreteCoupling(3, 5, conditioner=lambda *sizes: nn.Sequential(nn.Conv1d(*sizes[:2], 1), nn.Dropout(0.1)))


def test_a_factory_of_no_network_raises():
    for layer in LAYERS.values():
        with pytest.raises(OptionError, match="conditioner must be a torch.nn.Module, got int"):
            layer(3, 5, conditioner=lambda *args, **options: 3)


class TooFew(Running):
    def forward(self, z, context=None):
        return super().forward(z, context)[..., :0]


def test_parameters_of_another_shape_raise_at_the_first_call():
    t = DiscreteAutoregressive(3, 5, conditioner=TooFew)
    with pytest.raises(ShapeError, match=r"must map \(7, 5, 3\), .* to \(7, 5, 3, 2\), but gave \(7, 5, 3, 0\)"):
        t(torch.zeros(7, 3))
    t = DiscreteCoupling(3, 5, conditioner=lambda a, b, hidden_dims: wide_convolution(a, b + 1, (4,)))
    with pytest.raises(
        ShapeError, match=r"DiscreteCoupling must map \(7, 6, 3\) to \(7, 9, 3\), but gave \(7, 10, 3\)"
    ):
        t(torch.zeros(7, 3))


# What does not apply


@all_layers
def test_scores_raise(layer):
    t = layer(3, 5)
    z = torch.zeros(7, 3)
    for view in (t, t.inv, Compose([t]), Compose([t, t.inv]), layer(3, 5, context_dim=2).condition(torch.zeros(2))):
        for value in (z, z.long()):
            with pytest.raises(InexactError, match="maps categories, whose law has no density, and so no score"):
                view.forward_and_score(value, -z)
    with pytest.raises(InexactError, match="OneHot maps categories"):
        OneHot(3, 5).forward_and_score(z, -z)


@all_layers
def test_adaptation_raises(layer):
    t = layer(3, 5)
    for adapt in (t.adapt, t.adapt_to_draws, t.inv.adapt, t.inv.adapt_to_draws):
        with pytest.raises(OptionError, match="maps categories, which have no location and scale"):
            adapt(torch.zeros(7, 3))


def test_gradients_through_another_layer_raise():
    with pytest.raises(OptionError, match="Planar is no discrete layer"):
        one_hot_value(Compose([DiscreteCoupling(3, 5), Planar(3)]), torch.zeros(3, 5), None, "inverse")


@all_layers
def test_one_hot_vectors_of_another_shape_raise(layer):
    with pytest.raises(ShapeError, match=r"event shape \(3, 5\), but got a tensor of shape \(3, 4\)"):
        one_hot_value(layer(3, 5), torch.zeros(3, 4), None, "inverse")
    with pytest.raises(ShapeError, match=r"context size 2, but got shape \(3,\)"):
        one_hot_value(layer(3, 5, context_dim=2), torch.zeros(3, 5), torch.zeros(3), "inverse")
