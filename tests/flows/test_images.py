"""Flows of images: the recipes Glow, MultiscaleRealNVP and MultiscaleResidual, trained, saved, and in Pyro programs."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, TraceEnum_ELBO, config_enumerate, infer_discrete

import pyroflows as pf
from pyroflows import StateError
from pyroflows.errors import OptionError, ShapeError
from pyroflows.flows import Glow, MultiscaleRealNVP, MultiscaleResidual
from pyroflows.transforms import ActNorm, Coupling, EmergingConv, Residual, Standardize
from tests.transforms.registry import jacobian, perturb

SHAPE = (3, 8, 16)
RECIPES = {
    "glow": Glow,
    "emerging": partial(Glow, convolution="emerging"),
    "realnvp": MultiscaleRealNVP,
    "residual": MultiscaleResidual,
}
recipes_of_couplings = pytest.mark.parametrize(
    "recipe", [RECIPES[name] for name in ("glow", "emerging", "realnvp")], ids=["glow", "emerging", "realnvp"]
)
all_recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def make(recipe=Glow, shape=SHAPE, num_levels=3, **options):
    torch.manual_seed(0)
    return recipe(shape, **{"num_levels": num_levels, "num_steps": 2, "hidden_dims": (8, 8), **options})


def images(num_rows, shape=SHAPE, seed=0):
    """Smooth images of levels 0 to 255, with noise, and with a channel that is darker than the others."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (torch.linspace(-2, 2, size) for size in shape[1:])
    center = torch.randn(2, num_rows, shape[0], 1, 1, generator=generator)
    distance = (height[:, None] - center[0]) ** 2 + (width - center[1]) ** 2
    x = 200 * torch.exp(-distance) + 10 * torch.rand(num_rows, *shape, generator=generator)
    x[:, 0] /= 10
    return x


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def trained(request):
    """A flow after a short training, and the mean log-density of each batch."""
    flow, x, scores = make(request.param), images(192), []
    flow.adapt(x)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for i in range(30):
        loss = -flow().estimated().log_prob(x[i % 4 :: 4]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scores.append(-loss.item())
    return flow, scores


# The recipes


def test_round_trip_through_three_levels_after_training(trained):
    """In float32, in units of the scale of each channel."""
    flow, scores = trained
    assert sum(scores[-5:]) / 5 > scores[0] + 100  # 384 elements
    x = images(100, seed=1)
    z = flow().latent(x)
    back, log_q = flow().transport(z)
    assert ((back - x) / flow.standardization.scale).abs().max() < 1e-4
    torch.testing.assert_close(log_q, flow().log_prob(x), rtol=1e-4, atol=0)
    draws = torch.randn_like(z)
    again = flow().latent(flow().transport(draws)[0])
    assert (again - draws).abs().max() < 1e-4


@recipes_of_couplings
@pytest.mark.parametrize("raw", [-1e3, 1e3])
def test_no_coupling_scales_by_more_than_e(recipe, raw):
    """Wider bounds, multiplied over all layers, gave trained flows samples and latents of any size."""
    flow = make(recipe)
    couplings = [m for m in flow.modules() if isinstance(m, Coupling) and m.conditioner.hidden_dims]
    assert len(couplings) == (12 if recipe is MultiscaleRealNVP else 6)
    for coupling in couplings:
        *_, bias = coupling.conditioner.parameters()
        torch.nn.init.constant_(bias, raw)
        _, ladj = coupling.forward_and_ladj(torch.randn(coupling.event_shape))
        torch.testing.assert_close(ladj.abs(), torch.tensor(coupling.dim / 2))


@pytest.mark.parametrize("num_samples", [1000, pytest.param(30_000, marks=pytest.mark.slow)])
def test_samples_are_finite(trained, num_samples):
    flow, _ = trained
    size = 20 if isinstance(flow, MultiscaleResidual) else 1000  # whose log-densities take milliseconds each
    torch.manual_seed(1)
    for _ in range(num_samples // 1000):
        x = flow().sample((size,))
        assert x.isfinite().all() and flow().log_prob(x).isfinite().all()


@all_recipes
def test_log_density_is_that_of_the_jacobian(recipe):
    flow = perturb(make(recipe, (1, 4, 8), num_levels=2, num_steps=1, context_dim=3), 0.2).double()
    context, z = torch.randn(3).double(), torch.randn(32).double()
    x, log_q = flow(context).transport(z)
    matrix = jacobian(lambda z: flow(context).transport(z)[0].flatten(), z)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum() - torch.linalg.slogdet(matrix)[1]
    torch.testing.assert_close(log_q, expected)
    torch.testing.assert_close(flow(context).log_prob(x), expected)


@all_recipes
def test_new_flow_preserves_volume(recipe):
    """So that a deep stack starts at its base: its layers are permutations of elements and rotations of channels."""
    flow, x = make(recipe), torch.randn(5, *SHAPE)
    torch.testing.assert_close(flow().log_prob(x), dist.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3)), rtol=1e-4, atol=0)


def test_steps_of_glow():
    flow = make(convolution="emerging", num_levels=2, num_steps=3)
    kinds = [type(layer).__name__ for layer in flow.multiscale.layers[-1].layers]
    assert kinds == 3 * ["Coupling", "EmergingConv", "NormalizedConv1x1"] + ["Squeeze"]
    assert not any(isinstance(module, EmergingConv) for module in make().modules())
    assert isinstance(flow.standardization, Standardize) and flow.standardization.by_channel


def test_glow_starts_with_wavelets():
    """The first step of a level takes blocks of 2 x 2 pixels to their means, which pass, and to differences."""
    flow = make(num_levels=1, num_steps=1).double()
    x = torch.randn(5, 3, 4, 8, dtype=torch.float64).repeat_interleave(2, -1).repeat_interleave(2, -2)
    (z,) = flow.multiscale.split(flow().latent(x))
    torch.testing.assert_close(z[:, 3:], torch.zeros_like(z[:, 3:]), atol=1e-5, rtol=0)
    torch.testing.assert_close(z[:, :3].abs(), 2 * x[:, :, ::2, ::2].abs(), atol=1e-5, rtol=1e-5)


def test_steps_of_residual_flow():
    flow = make(MultiscaleResidual, num_levels=2, num_steps=2, coefficient=0.8)
    kinds = [type(layer).__name__ for layer in flow.multiscale.layers[-1].layers]
    assert kinds == 2 * ["Inverse", "ActNorm"] + ["Conv1x1", "Squeeze"]
    layers = [module for module in flow.modules() if isinstance(module, Residual)]
    assert [layer.event_shape for layer in layers] == 2 * [(24, 2, 4)] + 2 * [(12, 4, 8)]
    assert all(layer.coefficient == 0.8 and not layer.ladj_is_exact for layer in layers)


@pytest.mark.slow
def test_training_by_estimates_and_reports_by_exact_log_densities():
    flow, x = perturb(make(MultiscaleResidual, (1, 4, 8), num_levels=1), 0.3), torch.randn(50, 1, 4, 8)
    exact = flow().log_prob(x)
    assert torch.equal(flow().log_prob(x), exact)
    estimates = torch.stack([flow().estimated().log_prob(x).detach() for _ in range(400)])
    error = estimates.std(0) / 20
    assert (error > 1e-3).all() and ((estimates.mean(0) - exact).abs() < 4.5 * error + 1e-4).all()


def test_residual_flow_of_integers():
    """A fit with noise on integers ends with bits per dimension below those of the uniform law."""
    x = images(200, (1, 4, 8)).long().clamp(0, 255)
    flow = make(MultiscaleResidual, (1, 4, 8), num_levels=2)
    options = {"dequantization": "uniform", "batch_size": 32, "max_epochs": 3, "seed": 0, "progress_bar": False}
    fit = pf.fit_density(flow, x, **options)
    assert fit.history["validation_log_prob"][-1] > fit.history["validation_log_prob"][0]
    assert pf.bits_per_dim(flow, x, levels=256, seed=0) < 7


def test_steps_of_realnvp():
    flow = make(MultiscaleRealNVP, num_levels=2, num_steps=2)
    layers = flow.multiscale.layers[-1].layers
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == 2 * ["Coupling", "ActNorm"] + ["Squeeze"] + 2 * ["Coupling", "ActNorm"]
    couplings = layers[0], layers[2], layers[5], layers[7]
    assert [coupling.masks_places for coupling in couplings] == [False, False, True, True]
    for one, other in (couplings[:2], couplings[2:]):
        assert [not passes for passes in one.mask] == list(other.mask)


def test_latents_of_the_levels():
    flow = make()
    latents = flow.multiscale.split(flow().latent(images(5)))
    assert [part.shape[1:] for part in latents] == [(48, 1, 2), (12, 2, 4), (6, 4, 8)]


@all_recipes
def test_fits_images_with_constant_borders(recipe):
    """A pixel that is the same in all images is no reason to refuse them, since location and scale are by channel."""
    flow = make(recipe, (1, 4, 8), num_levels=2)
    x = torch.rand(300, 1, 4, 8) + torch.randint(4, (300, 1, 1, 1))
    x[..., 0] = torch.rand(300, 1, 4)
    fit = pf.fit_density(flow, x, max_epochs=8, batch_size=50, seed=0, progress_bar=False)
    assert fit.best_log_prob > fit.history["validation_log_prob"][0]
    assert flow.is_adapted and all(m.is_adapted for m in flow.modules() if isinstance(m, ActNorm))


@all_recipes
def test_base_and_support(recipe):
    flow = make(recipe, (1, 4, 8), num_levels=2, base="student_t", support=dist.constraints.unit_interval)
    x = flow().sample((50,))
    assert (x > 0).all() and (x < 1).all() and flow().log_prob(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_shapes_and_contexts_broadcast(dtype):
    flow = perturb(make(context_dim=4, num_levels=2), 0.1).to(dtype)
    classes = torch.eye(4, dtype=dtype)
    x = torch.randn(5, *SHAPE, dtype=dtype)
    log_q = flow(classes[:, None]).log_prob(x)
    assert log_q.shape == (4, 5) and log_q.dtype == dtype
    torch.testing.assert_close(log_q[2], flow(classes[2]).log_prob(x))
    assert (log_q.std(0) > 1e-3).all()
    assert flow(classes).sample((2,)).shape == (2, 4, *SHAPE)


# Files and states


@all_recipes
def test_files_rebuild_the_flow(recipe, tmp_path):
    flow = make(recipe, context_dim=2)
    flow.adapt(images(50), torch.randn(50, 2))
    flow.save(tmp_path / "flow.safetensors")
    loaded = pf.load_flow(tmp_path / "flow.safetensors")
    x, context = images(5, seed=1), torch.randn(5, 2)
    assert torch.equal(loaded(context).log_prob(x), flow(context).log_prob(x))
    assert type(loaded) is type(flow) and loaded.is_adapted
    assert loaded.multiscale.latent_shapes == flow.multiscale.latent_shapes


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"num_levels": 2}, "Multiscale"),
        ({"num_steps": 3}, "number of layers"),
        ({"convolution": "emerging"}, "is EmergingConv in the state and"),
        ({"conditioner": "residual_conv"}, "conditioner"),
        ({"context_dim": 2}, "context"),
        ({"shape": (3, 16, 8)}, "event_shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_states_of_other_flows_are_refused(options, difference):
    with pytest.raises(StateError, match=f"this state is of another flow.*{difference}"):
        make().load_state_dict(make(**options).state_dict())


def test_states_load():
    flow, other = perturb(make(), 0.1), make()
    other.load_state_dict(flow.state_dict())
    x = images(5)
    assert torch.equal(flow().log_prob(x), other().log_prob(x))


# Programs


def classes_of_images(flow, codes, x=None, num_images=6):
    pyro.module("flow", flow)
    probs = pyro.param("probs", torch.tensor([0.2, 0.3, 0.5]), constraint=dist.constraints.simplex)
    with pyro.plate("images", num_images):
        k = pyro.sample("class", dist.Categorical(probs))
        pyro.sample("x", flow(codes[k]), obs=x)


@pytest.fixture
def of_classes():
    """A flow of images whose classes differ, and codes of its three classes."""
    flow = perturb(make(shape=(1, 4, 8), num_levels=2, num_steps=1, context_dim=3), 0.1)
    return flow, torch.eye(3)


def test_class_is_enumerated(of_classes):
    """The sum over classes is exact, its gradient reaches flow and weights, and the classes can be inferred."""
    flow, codes = of_classes
    x = flow(codes[[0, 0, 1, 1, 2, 2]]).sample()
    model, guide = config_enumerate(classes_of_images), lambda *_: None
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    log_joint = flow(codes[:, None]).log_prob(x) + torch.tensor([0.2, 0.3, 0.5]).log()[:, None]
    expected = torch.logsumexp(log_joint, 0).sum().item()
    assert -elbo.loss(model, guide, flow, codes, x) == pytest.approx(expected, rel=1e-5)
    posterior = elbo.compute_marginals(model, guide, flow, codes, x)["class"].probs
    torch.testing.assert_close(posterior, torch.softmax(log_joint, 0).T, rtol=1e-3, atol=1e-4)
    best = infer_discrete(model, first_available_dim=-2, temperature=0)
    assert torch.equal(pyro.poutine.trace(best).get_trace(flow, codes, x).nodes["class"]["value"], log_joint.argmax(0))
    before = [parameter.detach().clone() for parameter in flow.transform.parameters()]
    losses = [SVI(model, guide, pyro.optim.Adam({"lr": 3e-3}), elbo).step(flow, codes, x) for _ in range(5)]
    assert losses[-1] < losses[0]
    changed = [not torch.equal(a, b) for a, b in zip(before, flow.transform.parameters(), strict=True)]
    assert sum(changed) > len(changed) - 3


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_images(of_classes, parallel):
    flow, codes = of_classes
    draws = Predictive(classes_of_images, num_samples=7, parallel=parallel)(flow, codes, num_images=5)
    assert draws["x"].shape == (7, 5, 1, 4, 8) and draws["class"].squeeze().shape == (7, 5)
    assert draws["x"].flatten(0, 1).unique(dim=0).shape[0] == 35


def test_images_under_nested_plates(of_classes):
    flow, codes = of_classes

    def model():
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            return pyro.sample("x", flow(codes[:, None]))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (3, 4, 1, 4, 8) and trace.nodes["x"]["log_prob"].shape == (3, 4)


# What is refused


@all_recipes
@pytest.mark.parametrize(
    ("shape", "num_levels", "message"),
    [
        (
            (3, 12, 8),
            3,
            r"images of shape \(3, 12, 8\) cannot have 3 levels: .* after 2 levels they are 3 and 2; use num_levels=2",
        ),
        ((1, 7, 8), 1, r"images of shape \(1, 7, 8\) cannot have 1 level: .* and they are 7 and 8; pad the images"),
        ((8, 8), 1, r"needs the shape of an image, \(channels, height, width\), got \(8, 8\)"),
        (64, 1, r"needs the shape of an image"),
        ((3, 8, 8), 0, "num_levels must be at least 1"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_raise(recipe, shape, num_levels, message):
    with pytest.raises(OptionError, match=message):
        make(recipe, shape, num_levels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convolution": "3x3"}, 'convolution must be "1x1" or "emerging", got \'3x3\''),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"conditioner": "unet"}, "conditioner must be one of"),
        ({"hidden_dims": (0,)}, "hidden_dims must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_raise(options, message):
    with pytest.raises(OptionError, match=message):
        make(**options)


def test_images_of_another_shape_raise():
    with pytest.raises(ShapeError, match=r"shape \(3, 8, 16\)"):
        make().transform.inv(torch.zeros(5, 3, 16, 8))
