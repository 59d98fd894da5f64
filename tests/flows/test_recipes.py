"""The recipes: what they stack, where they start, and that they are densities whatever is mixed."""

import inspect
from functools import partial

import pyro.distributions as dist
import pytest
import torch

from pyroflows import flows
from pyroflows.errors import OptionError
from pyroflows.nets import MLP, ResidualMLP, ResMADE
from pyroflows.transforms import (
    LU,
    Autoregressive,
    BlockAutoregressive,
    Coupling,
    Elementwise,
    Inverse,
    Permutation,
    Residual,
)
from pyroflows.transforms.univariate import SOS, Additive, Affine, Monotone, Spline
from tests.flows.test_flow import cell_masses
from tests.transforms.registry import jacobian, perturb

CONTEXT_DIM = 3
COUPLING = {
    "nice": (flows.NICE, Additive),
    "realnvp": (flows.RealNVP, Affine),
    "nsf": (flows.NSF, Spline),
}
AUTOREGRESSIVE = {
    "iaf": (flows.IAF, Affine),
    "maf": (flows.MAF, Affine),
    "naf": (flows.NAF, Monotone),
    "sos": (flows.SOS, SOS),
    "nsf-autoregressive": (partial(flows.NSF, autoregressive=True), Spline),
}
WITH_CONDITIONER = COUPLING | AUTOREGRESSIVE
RECIPES = WITH_CONDITIONER | {
    "bnaf": (flows.BNAF, None),
    "residual": (lambda dim, num_layers, **options: flows.Residual(dim, num_blocks=num_layers, **options), None),
}
DENSE = {"planar": flows.Planar, "radial": flows.Radial, "sylvester": flows.Sylvester}
MIXING = [None, "permutation", "lu"]
NAMES = [
    "BNAF",
    "CNF",
    "IAF",
    "MAF",
    "NAF",
    "NICE",
    "NSF",
    "SOS",
    "Gaussian",
    "Planar",
    "Radial",
    "RealNVP",
    "Residual",
    "Sylvester",
]

all_recipes = pytest.mark.parametrize("recipe", RECIPES)
coupling_recipes = pytest.mark.parametrize("recipe", COUPLING)
autoregressive_recipes = pytest.mark.parametrize("recipe", AUTOREGRESSIVE)
DIMS = [1, 2, 5]
all_dims = pytest.mark.parametrize("dim", DIMS)
all_mixing = pytest.mark.parametrize("mixing", MIXING)


def make(recipe, dim=2, num_layers=3, **options):
    return RECIPES[recipe][0](dim, num_layers=num_layers, **{"hidden_dims": (8, 8), **options}).double()


def perturbed(recipe, dim=2, noise=0.4, **options):
    return perturb(make(recipe, dim, **options), noise)


# Enough to bend a density, and not so much that a grid misses the ridges of a spline.
GRID_NOISE = 0.2


def layers(flow, kind):
    """The layers of one kind, themselves where the flow stacks their inverses."""
    stacked = [layer.layer if isinstance(layer, Inverse) else layer for layer in flow.layers]
    return [layer for layer in stacked if isinstance(layer, kind)]


def asymmetric(dim):
    """A base of dependent, unequal dimensions: nothing that is mixed up, or left out, goes unseen."""
    factor = torch.eye(dim) + 0.5 * torch.ones(dim, dim).tril(-1)
    return dist.MultivariateNormal(torch.arange(1.0, dim + 1), factor @ factor.T)


BASES = {"normal": lambda dim: None, "student_t": lambda dim: "student_t", "user's": asymmetric}
all_bases = pytest.mark.parametrize("base", BASES)


# Densities


@pytest.mark.grid(recipe=RECIPES, dim=DIMS, mixing=MIXING, context_dim=[0, CONTEXT_DIM])
def test_samples_and_scores_agree(recipe, dim, mixing, context_dim):
    flow = perturbed(recipe, dim, mixing=mixing, context_dim=context_dim)
    law = flow(torch.randn(7, context_dim, dtype=torch.float64)) if context_dim else flow().expand((7,))
    x, log_q = law.rsample_and_log_prob((4,))
    assert (x.shape, log_q.shape) == ((4, 7, dim), (4, 7))
    torch.testing.assert_close(law.log_prob(x.clone()), log_q)


def assert_integrates_to_one(law):
    # Smooth densities are integrated to rounding, those of splines, which have kinks, to a few 1e-4.
    # sinh(7) = 548 holds the tails, which monotone networks stretch up to tenfold a layer.
    assert (cell_masses(law, n=420, reach=7.0).sum() - 1).abs() < 1e-3


@pytest.mark.parametrize(
    ("recipe", "base"), [(recipe, "user's") for recipe in RECIPES] + [("iaf", "normal"), ("nsf", "student_t")]
)
def test_density_integrates_to_one(recipe, base):
    assert_integrates_to_one(perturbed(recipe, base=BASES[base](2), noise=GRID_NOISE)())


@pytest.mark.grid(recipe=RECIPES, mixing=["permutation", "lu"], context_dim=[0, CONTEXT_DIM])
def test_density_of_mixed_layers_integrates_to_one(recipe, mixing, context_dim):
    flow = perturbed(recipe, mixing=mixing, context_dim=context_dim, noise=GRID_NOISE)
    assert_integrates_to_one(flow(torch.randn(context_dim, dtype=torch.float64)) if context_dim else flow())


@all_recipes
def test_densities_that_are_integrated_are_far_from_the_base(recipe):
    """An integral of one says something only of a density that is not the base's."""
    flow = perturbed(recipe, noise=GRID_NOISE)
    x = torch.randn(1000, 2, dtype=torch.float64)
    assert (flow().log_prob(x) - flow.base().log_prob(x)).abs().mean() > 0.2


@all_recipes
@all_dims
def test_context_moves_every_density(recipe, dim):
    flow = perturbed(recipe, dim, context_dim=CONTEXT_DIM)
    x = torch.randn(5, dim, dtype=torch.float64)
    a, b = (flow(torch.randn(CONTEXT_DIM, dtype=torch.float64)).log_prob(x) for _ in range(2))
    assert ((a - b).abs() > 1e-6).all()


@all_recipes
@all_dims
@all_bases
def test_untrained_flow_is_its_base(recipe, dim, base):
    flow = make(recipe, dim, base=BASES[base](dim))
    x = torch.randn(7, dim, dtype=torch.float64)
    torch.testing.assert_close(flow().log_prob(x), flow.base().log_prob(x))


@all_recipes
@all_dims
@pytest.mark.parametrize("mixing", ["permutation", "lu"])
def test_untrained_flow_with_mixing_is_its_base_in_another_order(recipe, dim, mixing):
    flow = make(recipe, dim, mixing=mixing, base=asymmetric(dim))
    x = torch.arange(1.0, dim + 1, dtype=torch.float64)
    z = flow().latent(x)
    torch.testing.assert_close(z.sort().values, x)
    torch.testing.assert_close(flow().log_prob(x), flow.base().log_prob(z))


@pytest.mark.grid(recipe=RECIPES, dim=DIMS, mixing=MIXING)
def test_all_parameters_are_trained_by_either_direction(recipe, dim, mixing):
    flow = perturbed(recipe, dim, mixing=mixing, context_dim=CONTEXT_DIM)
    law = flow(torch.randn(16, CONTEXT_DIM, dtype=torch.float64))
    x, log_q = law.rsample_and_log_prob()
    for loss in (log_q.sum() + x.square().sum(), law.log_prob(x.detach()).sum()):
        gradients = torch.autograd.grad(loss, list(flow.parameters()))
        for (name, _), gradient in zip(flow.named_parameters(), gradients, strict=True):
            # A masked network of one dimension sees the context alone.
            sees_nothing = dim == 1 and (name.endswith("conditioner.input.weight") or ".weights." in name)
            assert gradient.isfinite().all() and (gradient != 0).any() != sees_nothing


@pytest.mark.grid(recipe=RECIPES, dim=DIMS, mixing=MIXING)
def test_every_dimension_bends_and_sees_the_others(recipe, dim, mixing):
    """Two layers are enough for all that a dimension may depend on, save what a coupling still lets pass."""
    flow = perturbed(recipe, dim, num_layers=4, mixing=mixing, noise=1.0)
    z = torch.randn(20, dim, dtype=torch.float64)
    matrix = jacobian(flow.transform, z).abs().amax(0)
    assert (matrix > 1e-9).all()
    if recipe == "nice" and dim == 1:
        return  # of one dimension a shift and a scale
    if dim > 1 or recipe not in ("realnvp", "iaf", "maf"):  # which are affine in one dimension
        curvature = jacobian(flow.transform, z).std(0)
        assert (curvature.amax(-1) > 1e-6).all()


# What is stacked


@pytest.mark.parametrize("recipe", WITH_CONDITIONER)
@all_mixing
def test_layers_are_as_many_as_told_and_of_the_right_kind(recipe, mixing):
    flow = make(recipe, 4, num_layers=5, mixing=mixing)
    kind, univariate = Coupling if recipe in COUPLING else Autoregressive, RECIPES[recipe][1]
    assert [type(layer.univariate) for layer in layers(flow, kind)] == [univariate] * 5
    between = 0 if mixing is None else 2 if recipe in COUPLING else 4
    assert len(layers(flow, Permutation if mixing == "permutation" else LU)) == between
    assert len(flow.layers) == 5 + between + (recipe == "nice")


@pytest.mark.grid(recipe=RECIPES, mixing=["permutation", "lu"], dim=[2, 3, 10, 43])
def test_what_mixes_moves_every_dimension_each_time_elsewhere(recipe, mixing, dim):
    flow = make(recipe, dim, num_layers=6, mixing=mixing)
    orders = [layer.order.tolist() for layer in layers(flow, Permutation)]
    orders += [layer.permutation.order.tolist() for layer in layers(flow, LU)]
    assert len(orders) >= 2 and all(i != j for order in orders for i, j in enumerate(order))
    assert dim < 10 or len(set(map(tuple, orders))) == len(orders)


@coupling_recipes
@all_mixing
def test_couplings_take_turns(recipe, mixing):
    masks = [layer.mask for layer in layers(make(recipe, 5, num_layers=4, mixing=mixing), Coupling)]
    first, second = [True, True, False, False, False], [False, False, True, True, True]
    assert masks == [first, second] * 2


@autoregressive_recipes
def test_orders_turn_where_nothing_mixes(recipe):
    orders = [list(layer.order) for layer in layers(make(recipe, 3), Autoregressive)]
    assert orders == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    for mixing in ("permutation", "lu"):
        orders = [list(layer.order) for layer in layers(make(recipe, 3, mixing=mixing), Autoregressive)]
        assert orders == [[0, 1, 2]] * 3


@all_recipes
@all_mixing
def test_state_loads_into_a_flow_of_the_same_arguments(recipe, mixing):
    flow = perturbed(recipe, 5, mixing=mixing, base="student_t")
    torch.manual_seed(1)
    fresh = make(recipe, 5, mixing=mixing, base="student_t")
    fresh.load_state_dict(flow.state_dict())
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(fresh().log_prob(x), flow().log_prob(x), rtol=0, atol=0)


@autoregressive_recipes
def test_direction_that_needs_one_pass(recipe, monkeypatch):
    """Scoring, save for IAF."""
    flow = perturbed(recipe, mixing="lu")

    def called(*_):
        raise AssertionError("a dimension after the other")

    monkeypatch.setattr(Autoregressive, "_inverse_and_ladj", called)
    parallel, sequential = flow().rsample, partial(flow().log_prob, torch.randn(2, dtype=torch.float64))
    if recipe != "iaf":
        parallel, sequential = sequential, parallel
    parallel()
    with pytest.raises(AssertionError):
        sequential()


def test_bnaf_scores_by_one_pass_with_orders_that_turn(monkeypatch):
    flow = perturbed("bnaf", 3)
    assert [layer.order for layer in layers(flow, BlockAutoregressive)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]
    assert [layer.order for layer in layers(make("bnaf", 3, order=[1, 2, 0]), BlockAutoregressive)] == [[1, 2, 0]] * 3

    def called(*_):
        raise AssertionError("a dimension after the other")

    monkeypatch.setattr(BlockAutoregressive, "_inverse_and_log_slopes", called)
    flow().log_prob(torch.randn(5, 3, dtype=torch.float64))
    with pytest.raises(AssertionError):
        flow().rsample()


@pytest.mark.parametrize(("parallel", "by_default"), [("scoring", True), ("sampling", False)])
def test_direction_of_residual_flows_that_needs_no_iteration(parallel, by_default, monkeypatch):
    flow = perturb(flows.Residual(3, 2, (8,), **({} if by_default else {"parallel": parallel})).double(), 0.4)

    def called(*_):
        raise AssertionError("an iteration")

    monkeypatch.setattr("pyroflows.transforms.residual.layer.inverted", called)
    quick, slow = partial(flow().log_prob, torch.randn(5, 3, dtype=torch.float64)), flow().rsample_and_log_prob
    if parallel == "sampling":
        quick, slow = slow, quick
    quick()
    with pytest.raises(AssertionError, match="an iteration"):
        slow()


def test_residual_flows_stretch_further_than_their_layers():
    """By the scales between the blocks, which have no bounds."""
    flow = flows.Residual(2, num_blocks=3, parallel="sampling").double()
    with torch.no_grad():
        for layer in flow.modules():
            if isinstance(layer, Elementwise):
                layer.parameters_of.value[:, 1] = torch.tensor(10.0).log()
    torch.testing.assert_close(flow().sample((10_000,)).std(0), torch.full((2,), 1e3).double(), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("dim", "log_det", "is_exact"), [(16, None, True), (17, None, False), (17, "exact", True), (2, "roulette", False)]
)
def test_log_determinants_of_residual_flows(dim, log_det, is_exact):
    flow = flows.Residual(dim, 2, (8,), log_det=log_det)
    assert flow.transform.ladj_is_exact == is_exact


def test_residual_options_pass_through():
    flow = flows.Residual(2, 3, (8, 4), coefficient=0.5, activation="tanh", parallel="sampling")
    found = [layer for layer in flow.modules() if isinstance(layer, Residual)]
    assert [layer.coefficient for layer in found] == [0.5] * 3
    assert {layer.net.activation for layer in found} == {"tanh"}
    assert [[linear.out_features for linear in layer.net.layers] for layer in found] == [[8, 4, 2]] * 3
    with pytest.raises(OptionError, match='parallel must be "sampling" or "scoring", got \'both\''):
        flows.Residual(2, parallel="both")


def test_nice_keeps_volumes_up_to_its_rescaling():
    flow = perturbed("nice", 5)
    (rescaling,) = layers(flow, Elementwise)
    z = torch.randn(7, 5, dtype=torch.float64)
    _, ladj = flow.transform.forward_and_ladj(z)
    expected = rescaling.parameters_of.value[:, 1].sum() + flow.standardization.log_scale.sum()
    assert expected.abs() > 1e-2
    torch.testing.assert_close(ladj, expected.expand(7))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_rescaling_of_nice_has_no_bounds(scale):
    flow = make("nice")
    (rescaling,) = layers(flow, Elementwise)
    with torch.no_grad():
        rescaling.parameters_of.value[:, 1] = torch.tensor(scale).log()
    torch.testing.assert_close(flow().sample((10_000,)).std(0), torch.full((2,), scale).double(), rtol=0.1, atol=0)


# Options


@coupling_recipes
def test_conditioner_of_couplings(recipe):
    for options, kind in (({}, MLP), ({"conditioner": "residual"}, ResidualMLP)):
        assert all(type(layer.conditioner) is kind for layer in layers(make(recipe, 3, **options), Coupling))


@autoregressive_recipes
def test_residual_conditioner_of_autoregressive_layers(recipe):
    flow = make(recipe, 3, conditioner="residual")
    assert all(type(layer.conditioner) is ResMADE for layer in layers(flow, Autoregressive))
    assert not any(type(layer.conditioner) is ResMADE for layer in layers(make(recipe, 3), Autoregressive))


@pytest.mark.parametrize("recipe", ["nsf", "nsf-autoregressive"])
def test_bins_and_bound_of_splines(recipe):
    flow = make(recipe, 3, bins=5, bound=2.0)
    univariates = [layer.univariate for layer in layers(flow, (Coupling, Autoregressive))]
    assert {(univariate.bins, univariate.bound) for univariate in univariates} == {(5, 2.0)}


@all_recipes
def test_hidden_dims(recipe):
    narrow, wide = (sum(p.numel() for p in make(recipe, 3, hidden_dims=h).parameters()) for h in ((4,), (64, 64)))
    assert narrow < wide / 10


@all_recipes
@pytest.mark.parametrize("mixing", ["LU", "reverse", True], ids=str)
def test_unknown_mixing_raises(recipe, mixing):
    with pytest.raises(OptionError, match=f"mixing must be None or one of.*lu.*permutation.*got {mixing!r}"):
        make(recipe, mixing=mixing)


@pytest.mark.parametrize("recipe", WITH_CONDITIONER)
def test_unknown_conditioner_raises(recipe):
    with pytest.raises(OptionError, match="conditioner must be one of.*residual.*got 'transformer'"):
        make(recipe, conditioner="transformer")


@all_recipes
@pytest.mark.parametrize("num_layers", [0, -1])
def test_no_layers_raise(recipe, num_layers):
    with pytest.raises(OptionError, match="num_(layers|blocks) must be at least 1"):
        make(recipe, num_layers=num_layers)


@all_recipes
def test_no_dimension_raises(recipe):
    with pytest.raises(OptionError, match="dim"):
        make(recipe, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["num_bins", "layer", "between", "last"])
def test_unknown_option_raises(name, option):
    """Those of the constructor that recipes share are not let through either."""
    with pytest.raises(TypeError, match=rf"^{name}\b.*{option}"):
        getattr(flows, name)(2, **{option: 2})


@pytest.mark.parametrize("name", NAMES)
def test_signature_names_all_arguments(name):
    parameters = inspect.signature(getattr(flows, name)).parameters
    assert next(iter(parameters)) == "dim"
    assert all(p.kind is not p.VAR_KEYWORD and p.kind is not p.VAR_POSITIONAL for p in parameters.values())
    defaults = {"context_dim": 0, "base": None, "support": None, "mixing": None}
    if name in ("Gaussian", "CNF"):  # one layer, with nothing between
        del defaults["mixing"]
    assert {key: parameters[key].default for key in defaults} == defaults
    assert list(parameters)[-len(defaults) :] == list(defaults)


@pytest.mark.parametrize("name", NAMES)
def test_options_of_all_recipes_act(name):
    flow = getattr(flows, name)(2, context_dim=3, base="student_t", support=dist.constraints.positive)
    x, log_q = flow(torch.randn(5, 3)).rsample_and_log_prob()
    assert (x > 0).all() and (x.shape, log_q.shape) == ((5, 2), (5,))
    assert flow.context_dim == 3 and hasattr(flow.base, "raw_df")


@pytest.mark.parametrize("recipe", DENSE)
@pytest.mark.parametrize(("mixing", "kind"), [("permutation", Permutation), ("lu", LU)])
def test_mixing_between_layers_that_see_all_dimensions(recipe, mixing, kind):
    flow = DENSE[recipe](4, num_layers=3, mixing=mixing).double()
    stacked = [type(layer) for layer in flow.layers]
    layer = stacked[0]
    assert stacked == [layer, kind, layer, kind, layer] and layer is not kind
    x, log_q = perturb(flow, 0.3)().rsample_and_log_prob((7,))
    torch.testing.assert_close(flow().log_prob(x.clone()), log_q)
    with pytest.raises(OptionError, match="mixing must be None or one of"):
        DENSE[recipe](4, mixing="none")
    with pytest.raises(OptionError, match="num_layers must be at least 1, got 0"):
        DENSE[recipe](4, num_layers=0)
