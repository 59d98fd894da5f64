"""Amortised fits in files: what is read draws and scores as what was written, for the same model alone."""

import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn

import pyroflows as pf

QUICK = {"num_simulations": 300, "max_epochs": 2, "seed": 0, "progress_bar": False}
X = torch.linspace(-1.0, 1.0, 4)


def model(x, y=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, scale), obs=y)


def affine(dim, context_dim):
    return pf.flows.MAF(dim, num_layers=1, hidden_dims=(8,), context_dim=context_dim)


def continuous(dim, context_dim):
    return pf.flows.CNF(dim, hidden_dims=(8, 8), context_dim=context_dim)


@pytest.mark.parametrize("flow", [affine, continuous])
def test_what_is_read_is_what_was_written(tmp_path, flow):
    fitted = pf.fit_amortized(model, args=(X,), flow=flow, embedding=nn.Linear(4, 3), **QUICK)
    fitted.save(tmp_path / "fit")
    loaded = pf.load_amortized(tmp_path / "fit", model, args=(X,))
    x = torch.randn(5, 2)
    torch.testing.assert_close(loaded.flow(X).log_prob(x), fitted.flow(X).log_prob(x), rtol=0, atol=0)
    assert repr(loaded) == repr(fitted)
    assert loaded.fits[0].history["grad_norm"].tolist() == fitted.fits[0].history["grad_norm"].tolist()
    assert loaded.posterior(X).importance_sample(100).draws["scale"].shape == (100,)
    with pytest.warns(UserWarning, match="far outside of the 300 simulations"):
        loaded.posterior(torch.full((4,), 1e4))


def test_a_file_belongs_to_its_sites(tmp_path):
    fitted = pf.fit_amortized(model, args=(X,), flow=affine, **QUICK)
    fitted.save(tmp_path / "fit")
    with pytest.raises(pf.CheckpointError, match=r"belongs to data 'y' of shape \(4,\), .* has 'y' of shape \(7,\)"):
        pf.load_amortized(tmp_path / "fit", model, args=(torch.ones(7),))
    with pytest.raises(pf.CheckpointError, match="belongs to latents 'scale'"):
        pf.load_amortized(tmp_path / "fit", model, latents=["slope"], args=(X,))
    with pytest.raises(pf.CheckpointError, match="holds no flow of pyroflows: it holds a amortised fit"):
        pf.load_flow(tmp_path / "fit")


class Mean(nn.Module):
    def __init__(self, size=3):
        super().__init__()
        self.net = nn.Linear(1, size)

    def forward(self, y):
        return self.net(y.mean(1, keepdim=True))


def test_an_embedding_of_the_users_is_given_when_the_file_is_read(tmp_path):
    fitted = pf.fit_amortized(model, args=(X,), flow=affine, embedding=Mean(), **QUICK)
    fitted.save(tmp_path / "fit")
    x = torch.randn(5, 2)
    expected = fitted.flow(X).log_prob(x)
    loaded = pf.load_amortized(tmp_path / "fit", model, embedding=Mean(), args=(X,))
    torch.testing.assert_close(loaded.flow(X).log_prob(x), expected, rtol=0, atol=0)
    with pytest.raises(pf.CheckpointError, match="give embedding= a module that the same code makes, got None"):
        pf.load_amortized(tmp_path / "fit", model, args=(X,))
    with pytest.raises(pf.CheckpointError, match="was fitted with another embedding"):
        pf.load_amortized(tmp_path / "fit", model, embedding=Mean(2), args=(X,))
