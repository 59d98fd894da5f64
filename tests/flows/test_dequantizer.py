"""The noise on integers: where it lies, where it starts, and what it depends on."""

import copy

import pytest
import torch

import pyroflows as pf
from pyroflows.errors import OptionError
from pyroflows.transforms import masks
from tests.transforms.registry import perturb

SHAPES = [1, 2, 5, (1, 4, 4), (3, 4, 6), (2, 5), (1, 1, 1), (2, 1, 1), (2, 2, 3, 2)]


def noise_of(shape, is_trained=True, num_layers=4):
    torch.manual_seed(0)
    noise = pf.flows.Dequantizer(shape, num_layers, hidden_dims=(8, 8))
    x = torch.randint(9, (200, *noise.event_shape))
    noise.adapt(torch.rand(x.shape), x)
    return (perturb(noise, 0.3) if is_trained else noise), x[:5].float()


@pytest.mark.parametrize("shape", SHAPES)
def test_draws_lie_between_the_levels_and_score_as_they_were_drawn(shape):
    noise, x = noise_of(shape)
    noise.double()  # next to 0 and 1 numbers in float32 are too far apart
    u, log_q = noise(x).rsample_and_log_prob((7,))
    assert u.shape == (7, *x.shape) and log_q.shape == (7, 5)
    assert ((u > 0) & (u < 1)).all()
    assert torch.allclose(noise(x).log_prob(u.detach()), log_q, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_near_uniform_noise(shape):
    noise, x = noise_of(shape, is_trained=False)
    u, log_q = noise(x).rsample_and_log_prob((4000,))
    # Location and scale come from 200 rows: a relative error of the scale of 0.07 costs about its square.
    assert 0 <= log_q.mean() / noise.dim < 0.02
    assert (u.mean(0) - 0.5).abs().max() < 0.1


def test_it_is_uniform_where_location_and_scale_are_exact():
    noise = pf.flows.Dequantizer(2).double()
    with torch.no_grad():
        noise.standardization.log_scale.fill_(-torch.tensor(3**0.5 / torch.pi, dtype=torch.float64).log())
    u = torch.rand(50, 2, dtype=torch.float64)
    assert noise(torch.zeros(2)).log_prob(u).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [2, 5, (1, 4, 4), (3, 4, 6), (2, 5)])
def test_each_element_depends_on_others_and_on_the_integers(shape):
    noise, x = noise_of(shape)
    z = torch.randn(noise.base_shape)
    jacobian = torch.autograd.functional.jacobian(lambda z: noise(x[0]).transport(z)[0], z)
    others = jacobian.reshape(noise.dim, noise.dim).abs().sum(1) - jacobian.reshape(noise.dim, noise.dim).diagonal()
    assert (others > 0).all()
    at_x = torch.autograd.functional.jacobian(lambda x: noise(x).transport(z)[0], x[0])
    assert (at_x.reshape(noise.dim, -1).abs().sum(1) > 0).all()


def test_couplings_take_turns():
    layers = pf.flows.Dequantizer((3, 4, 6), num_layers=5).layers[:5]
    board = masks.checkerboard(4, 6).flatten().tolist()
    assert [layer.mask for layer in layers[:4]] == [
        board,
        [not passes for passes in board],
        [True, False, False],
        [False, True, True],
    ]
    assert layers[4].mask == board


def test_files_and_copies_rebuild_it(tmp_path):
    noise, x = noise_of((3, 4, 6))
    noise.save(tmp_path / "noise.safetensors")
    u = torch.rand(x.shape)
    for other in (pf.load_flow(tmp_path / "noise.safetensors"), copy.deepcopy(noise)):
        assert torch.equal(other(x).log_prob(u), noise(x).log_prob(u))


@pytest.mark.parametrize("options", [{"num_layers": 0}, {"dim": (2, 2, 2, 2, 2)}, {"dim": 0}])
def test_what_cannot_be_made_is_refused(options):
    with pytest.raises(OptionError):
        pf.flows.Dequantizer(**{"dim": 2, **options})
