"""Users can name, and look up by ``help``, what they get back."""

import inspect
import typing

import pytest

import pyroflows as pf

ROOMS = (pf, pf.constraints, pf.fitting, pf.flows, pf.guides, pf.inference, pf.nets, pf.training, pf.transforms)
PUBLIC = {id(value) for room in ROOMS for name, value in vars(room).items() if not name.startswith("_")}
# Parts that users meet as attributes of what they get, and do not make or pass on.
INNER = {"LogJoint", "Test"}
CLASSES = [value for name in pf.__all__ if isinstance(value := getattr(pf, name), type)]
FUNCTIONS = [value for name in pf.__all__ if inspect.isfunction(value := getattr(pf, name))]


def members(cls):
    """The public functions and properties of a class that are defined here, by name."""
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        member = getattr(member, "__func__", None) or getattr(member, "fget", None) or getattr(member, "func", member)
        if not name.startswith("_") and inspect.isfunction(member) and member.__module__.startswith("pyroflows"):
            yield name, member


def classes_in(hint):
    if isinstance(hint, type) and not typing.get_args(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from classes_in(part)


def returned(function):
    try:
        return list(classes_in(typing.get_type_hints(inspect.unwrap(function)).get("return")))
    except NameError:  # tables of pandas, which is imported where it is used
        return []


@pytest.mark.parametrize(
    ("where", "function"),
    [*((f.__name__, f) for f in FUNCTIONS), *((f"{c.__name__}.{n}", f) for c in CLASSES for n, f in members(c))],
)
def test_what_is_returned_is_public_and_described(where, function):
    assert inspect.getdoc(function), f"{where} has no docstring"
    for cls in returned(function):
        is_ours = cls.__module__.startswith("pyroflows") and cls.__name__ not in INNER
        assert not is_ours or id(cls) in PUBLIC, f"{where} returns {cls}"


@pytest.mark.parametrize("cls", CLASSES)
def test_each_public_class_says_what_it_is(cls):
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(")


def test_signatures_are_shown():
    """Decorators keep them, so that ``help`` shows the arguments."""
    shown = {
        "path": pf.load_posterior,
        "proposal": pf.importance_sample,
        "max_epochs": pf.fit_density,
        "seed": pf.Posterior.sample,
        "args": pf.FlowVI.run,
    }
    for name, function in shown.items():
        assert name in inspect.signature(function).parameters
