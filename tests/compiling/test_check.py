"""What is compiled is checked at other values; what cannot be compiled says why, and runs as it is."""

import warnings

import pytest
import torch

from pyroflows import OptionError
from pyroflows.compiling.check import MODES, Compiler
from pyroflows.errors import UntraceableError

HERE, THERE = torch.tensor([1.0, 2.0]), torch.tensor([1.5, -2.0])
SCALE = {"value": 1.0}


def cube(x):
    return (x**3,)


def branches(x):
    return (x if x.sum() > 0 else -x,)


def leaves_torch(x):
    """Nothing that the dispatcher sees."""
    return (x * float(x.detach().numpy().sum()),)


def counts():
    calls = []

    def function(x):
        calls.append(1)
        return (x * len(calls),)

    return function


def mutates_a_global():
    SCALE["value"] = 1.0

    def function(x):
        SCALE["value"] *= 2
        return (x * SCALE["value"],)

    return function


def fails_elsewhere(x):
    if x.detach().numpy()[1] < 0:
        raise ZeroDivisionError("not there")
    return (x * 1.0,)


UNTRACEABLE = {
    "branch": (lambda: branches, "use torch.where"),
    "numpy": (lambda: leaves_torch, "differs from the model by .* its Python code depends on the latents"),
    "counter": (counts, "differs from the model by"),
    "global": (mutates_a_global, "differs from the model by"),
    "error elsewhere": (lambda: fails_elsewhere, "not there"),
}
all_untraceable = pytest.mark.parametrize(("make", "message"), UNTRACEABLE.values(), ids=UNTRACEABLE)


@pytest.mark.parametrize("mode", ["auto", "trace"])
def test_a_program_runs_without_python(mode):
    calls = []

    def function(x):
        calls.append(1)
        return (x**3,)

    compiler = Compiler(mode)
    run = compiler(function, [HERE], [THERE])
    num_calls = len(calls)
    x = torch.tensor([-3.0, 0.5])
    torch.testing.assert_close(run(x)[0], x**3)
    assert len(calls) == num_calls
    assert compiler.failure is None


def test_a_program_has_no_gradients():
    (found,) = Compiler("trace")(cube, [HERE], [THERE])(HERE.clone().requires_grad_())
    assert not found.requires_grad


def test_none_is_the_function_itself():
    assert Compiler("none")(branches, [HERE], [THERE]) is branches


@all_untraceable
def test_trace_raises(make, message):
    with pytest.raises(UntraceableError, match=f"compilation failed: .*{message}"):
        Compiler("trace")(make(), [HERE], [THERE])


@all_untraceable
def test_auto_warns_says_why_and_goes_on_without(make, message):
    function, compiler = make(), Compiler("auto")
    with pytest.warns(UserWarning, match=f"without compilation, several times slower: .*{message}.*compile='none'"):
        assert compiler(function, [HERE], [THERE]) is function
    assert compiler.failure is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler(cube, [HERE], [THERE]) is cube  # told once, not for each function


def test_an_error_without_words_is_named():
    def function(x):
        raise NotImplementedError

    with pytest.warns(UserWarning, match="slower: NotImplementedError. Give"):
        Compiler("auto")(function, [HERE], [THERE])


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_as_they_were(mode, fails):
    """Also where the check fails, which happens while they hold other values."""
    parameter = torch.nn.Parameter(HERE.clone())
    seen = []

    def function(x):
        seen.append(parameter.detach().clone())
        return (parameter * (len(seen) if fails else 2.0),)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Compiler(mode)(function, [parameter], [THERE])
    except UntraceableError:
        assert fails and mode == "trace"
    assert torch.equal(seen[-1], THERE)
    assert torch.equal(parameter, HERE)


def test_parameters_are_as_they_were_after_an_error():
    parameter = torch.nn.Parameter(HERE.clone())
    with pytest.raises(UntraceableError, match="not there"):
        Compiler("trace")(fails_elsewhere, [parameter], [THERE])
    assert torch.equal(parameter, HERE)


def test_the_check_leaves_the_generator_alone():
    before = torch.get_rng_state()
    Compiler("trace")(cube, [HERE], [THERE])
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_inside_are_compared_at_one_seed():
    run = Compiler("trace")(lambda x: (x + torch.randn(2),), [HERE], [THERE])
    assert not torch.equal(run(HERE)[0], run(HERE)[0])


@pytest.mark.parametrize(("relative", "is_rounding"), [(1e-5, True), (1e-2, False)])
def test_rounding_is_no_difference(relative, is_rounding):
    calls = []

    def function(x):
        calls.append(1)
        return (x * (1 + relative * len(calls)),)

    if is_rounding:
        Compiler("trace")(function, [HERE], [THERE])
    else:
        with pytest.raises(UntraceableError, match="differs"):
            Compiler("trace")(function, [HERE], [THERE])


def test_what_is_not_finite_may_be_equal():
    (found,) = Compiler("trace")(lambda x: (x.log(),), [HERE], [THERE])(torch.tensor([0.0, -1.0]))
    assert found[0] == -torch.inf and found[1].isnan()


@pytest.mark.parametrize("mode", ["jit", "", None])
def test_unknown_modes(mode):
    with pytest.raises(OptionError, match=f"compile must be one of .*'auto'.*got {mode!r}"):
        Compiler(mode)


def test_whole_numbers_and_truth_are_compared():
    def function(x):
        return x.argmax(), x > 1.2

    assert [part.tolist() for part in Compiler("trace")(function, [HERE], [THERE])(HERE)] == [1, [False, True]]
    with pytest.raises(UntraceableError, match="differs"):
        Compiler("trace")(lambda x: (torch.tensor(bool(x.detach().numpy()[1] > 0)),), [HERE], [THERE])
