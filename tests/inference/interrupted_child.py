"""Run calls, and say what is reachable where SIGINT has ended them; a process of its own for test_signals.py.

Each line of the input names a call. Three lines answer it: how many seconds the call takes without a signal, "started"
when it starts, and, after the signal, what was found, which begins with "fault" if that is wrong.
"""

import signal
import sys
import time
import warnings

import pyro
import torch
from pyro import distributions as dist
from pyro.poutine import runtime

import pyroflows as pf
from pyroflows.randomness import seeded

QUIET = {"seed": 0, "progress_bar": False}


def model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 0.3), obs=pyro.sample("z", dist.Normal(0.0, 2.0)) - x**2)


class Fit:
    def __init__(self):
        self.vi = pf.FlowVI(model, num_steps=100, gate=False, **QUIET)

    def __call__(self):
        return self.vi.run()

    def is_untouched(self):
        return self.vi.posterior is None

    def is_right(self, posterior):
        return posterior is self.vi.posterior and posterior.diagnose().verdict in ("good", "correct it", "do not use")


class Sample:
    posterior = None

    def __init__(self):
        Sample.posterior = Sample.posterior or pf.FlowVI(model, num_steps=50, gate=False, **QUIET).run()

    def __call__(self):
        return self.posterior.mcmc(100, num_chains=8, num_warmup=50, **QUIET)

    def is_untouched(self):
        return True

    def is_right(self, chains):
        draws, lp = chains.draws["x"], chains.sample_stats["lp"]
        return draws.shape == lp.shape and lp.shape[1] >= 4 and bool((lp.isfinite() & draws.isfinite()).all())


class Train:
    """A call that trains a flow in place."""

    def __init__(self):
        with seeded(0):
            self.flow = self.make()
            self.x = torch.randn(500, 2) ** 3
        self.before = [parameter.detach().clone() for parameter in self.flow.parameters()]

    def is_untouched(self):
        return all(map(torch.equal, self.before, self.flow.parameters()))


class Distill(Train):
    def make(self):
        self.teacher = pf.flows.MAF(2, num_layers=2)
        return pf.flows.IAF(2, num_layers=2)

    def __call__(self):
        return pf.distill(self.flow, self.teacher, num_steps=100, warm_start=50, **QUIET)

    def is_right(self, fit):
        return fit.student is self.flow and abs(fit.kl) < 1.0 and fit.history.num_steps <= 100


class Density(Train):
    def make(self):
        return pf.flows.MAF(2, num_layers=2, hidden_dims=(16,))

    def __call__(self):
        return pf.fit_density(self.flow, self.x, max_epochs=20, batch_size=32, compile="trace", **QUIET)

    def is_right(self, fit):
        # A score stands in the history before the state that has it is kept.
        scores = fit.history["validation_log_prob"][:-1] if fit.history else []
        is_best = max([fit.best_log_prob, *scores]) == fit.best_log_prob
        return fit.flow is self.flow and is_best and bool(self.flow().log_prob(self.x).isfinite().all())


CALLS = {"run": Fit, "mcmc": Sample, "distill": Distill, "fit_density": Density}


def shared_state():
    settings = {name: pyro.settings.get(name) for name in ("validate_poutine", "validate_distributions_pyro")}
    return [list(runtime._PYRO_STACK), settings, torch.get_rng_state().tolist(), torch.is_grad_enabled()]


def attempt(make):
    call = make()
    before = shared_state()
    try:
        sys.stdout.write("started\n")
        sys.stdout.flush()
        call()
        time.sleep(60)  # the signal comes after the call
        return "fault: no signal came"
    except pf.FitInterrupted as interrupted:
        error = interrupted
    except KeyboardInterrupt as plain:
        error = plain
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if shared_state() != before:
        return f"fault: {before[:2]} became {shared_state()[:2]}, or generators or gradients differ"
    if not isinstance(error, pf.FitInterrupted):
        in_sleep = error.__traceback__.tb_next is None
        return "complete" if in_sleep else "nothing" if call.is_untouched() else f"fault: lost by {error!r}"
    if error.result is None:
        return "nothing" if "so that there is no result" in str(error) else f"fault: {error}"
    return "found" if call.is_right(error.result) else f"fault: wrong result {error.result!r}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    durations = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in durations:
            CALLS[name]()()  # what is imported at the first use takes time
            begin = time.perf_counter()
            CALLS[name]()()
            durations[name] = time.perf_counter() - begin
        print(durations[name], flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(attempt(CALLS[name]).replace("\n", " "), flush=True)
