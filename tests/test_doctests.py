"""Every example in a docstring runs, and prints what it says."""

import doctest
import importlib
import pkgutil

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.infer import SVI, Trace_ELBO

import pyroflows
import pyroflows as pf

NAMES = {"np": np, "pyro": pyro, "torch": torch, "dist": dist, "SVI": SVI, "Trace_ELBO": Trace_ELBO, "pf": pf}
MODULES = [info.name for info in pkgutil.walk_packages(pyroflows.__path__, "pyroflows.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    module = importlib.import_module(name)
    # What a module's own names do not cover, a reader takes from the usual imports.
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, globs={**NAMES, **pf.transforms.__dict__, **vars(module)}, optionflags=flags)
    assert result.failed == 0


def test_public_names_have_docstrings():
    for name in MODULES:
        module = importlib.import_module(name)
        assert module.__doc__, f"{name} has no docstring"
        for public, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == name
            if defined_here and not public.startswith("_") and (isinstance(value, type) or hasattr(value, "__code__")):
                assert value.__doc__, f"{name}.{public} has no docstring"
