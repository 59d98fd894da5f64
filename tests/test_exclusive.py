"""Calls in several threads wait for each other, and leave nothing global changed."""

import os
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.poutine import runtime

import pyroflows as pf
from pyroflows import exclusive as module
from pyroflows.exclusive import exclusive, exclusive_property
from pyroflows.randomness import seeded

QUIET = {"progress_bar": False}


def make_model(data):
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", len(data)):
            pyro.sample("y", dist.Normal(mean, scale), obs=data)

    return model


def two_fits(seed):
    """Fit a posterior and a density; the figures must not depend on what other threads do."""
    data = torch.linspace(-1.0, 1.0 + seed, 5 + seed)
    posterior = pf.FlowVI(make_model(data), num_steps=20, num_starts=1, seed=seed, **QUIET).run()
    with seeded(seed):
        flow = pf.flows.NSF(2, num_layers=1, hidden_dims=(8,))
        x = torch.randn(100, 2)
    fit = pf.fit_density(flow, x, max_epochs=2, seed=seed, **QUIET)
    return [posterior.elbo, posterior.khat, *posterior.history["elbo"], *fit.history["log_prob"]]


def shared_state():
    """What all threads share."""
    return {
        "generator": torch.get_rng_state().tolist(),
        "stack": list(runtime._PYRO_STACK),
        "store": dict(pyro.get_param_store().items()),
        "settings": pyro.settings.get(),
        "validation": torch.distributions.Distribution._validate_args,
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "filters": list(warnings.filters),
        "optimized": torch._C._get_graph_executor_optimize(),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("num_rounds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_two_threads_with_two_fits_each(num_rounds):
    two_fits(0)  # what is imported at the first use changes filters of warnings
    expected = [two_fits(0), two_fits(1)]
    before = shared_state()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(num_rounds):
            assert list(pool.map(two_fits, (0, 1))) == expected
            assert shared_state() == before


@pytest.mark.slow
def test_a_figure_that_is_computed_at_its_first_use_does_not_lock_a_fit_out():
    """One thread asks a posterior for its ELBO while another one does, inside a call that has the lock."""
    posteriors = [pf.FlowVI(make_model(torch.ones(3)), num_steps=5, seed=0, **QUIET).run() for _ in range(6)]
    with ThreadPoolExecutor(3) as pool:
        first = pool.map(lambda p: p.log_joint and p.elbo, posteriors[::2])
        second = pool.map(lambda p: p.importance_sample(5).ess > 0, posteriors[1::2])
        assert all(first) and all(second)


def test_a_property_is_computed_inside_the_lock():
    class Holder:
        @exclusive_property
        def value(self):
            return module._holder is threading.current_thread()

    assert Holder().value
    assert module._holder is None


def test_flows_are_used_in_a_thread_while_another_one_fits():
    flow = pf.flows.NSF(2, num_layers=2)
    x = flow().sample((10,))
    expected = flow().log_prob(x)
    found = []

    def callback(history, posterior):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(lambda: (flow().log_prob(x), flow().sample((3,)))).result(timeout=60))

    pf.FlowVI(make_model(torch.ones(3)), num_steps=50, gate=False, callback=callback, seed=0, **QUIET).run()
    assert torch.equal(found[0][0], expected)


def test_a_model_that_starts_threads():
    def model():
        with ThreadPoolExecutor(1) as pool:
            scale = pool.submit(lambda: 2.0).result(timeout=60)
        pyro.sample("x", dist.Normal(0.0, scale))

    posterior = pf.FlowVI(model, num_steps=5, seed=0, **QUIET).run()
    assert posterior.sample(3)["x"].shape == (3,)


def test_a_thread_that_waits_for_long_says_for_what(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    caught = []

    def wait():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with exclusive():
                caught.extend(str(w.message) for w in found)

    thread = threading.Thread(target=wait, name="second")
    with exclusive():
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join(60)
    assert len(caught) == 1 and "'second' waits for a call of pyroflows in thread 'MainThread'" in caught[0]


def test_an_interrupt_ends_the_wait():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with exclusive():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    main = threading.get_ident()
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt), exclusive():
            raise AssertionError("the other thread is still inside")
    finally:
        leave.set()
        thread.join(60)
    with exclusive():
        assert module._holder is threading.current_thread()


def test_an_error_leaves_the_lock_free():
    with pytest.raises(ValueError, match="once"), exclusive():
        raise ValueError("once")
    entered = []

    def enter():
        with exclusive():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(60)
    assert entered


def test_a_forked_process_does_not_wait_for_threads_that_it_does_not_have():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with exclusive():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads
        child = os.fork()
    if child == 0:
        with exclusive():
            os._exit(7)
    leave.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
