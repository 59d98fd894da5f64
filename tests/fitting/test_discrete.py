"""Maximum likelihood of discrete flows: what fits to sequences of categories reach, and what they say of wrong data."""

import itertools
import math
import warnings
from functools import partial

import pyro
import pytest
import torch

import pyroflows as pf
from pyroflows.errors import DataError, ShapeError
from pyroflows.flows import DiscreteAutoregressive, DiscreteCoupling
from tests.fitting.test_density import held_out_log_prob

NUM_ROWS = 2000
fit_quietly = partial(pf.fit_density, seed=0, progress_bar=False)
fit_briefly = partial(fit_quietly, max_epochs=2)


class Chained:
    """Three places: the second is a function of the first in four of five rows, the third of both in all rows."""

    entropy = math.log(5) - 0.8 * math.log(0.8) - 0.2 * math.log(0.2)

    def draw(self, count):
        first = torch.randint(5, (count,))
        second = (2 * first + (torch.rand(count) < 0.2)) % 5
        return torch.stack([first, second, (first + second) % 5], -1)


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)


FLOWS = {
    "autoregressive base": lambda: DiscreteAutoregressive(3, 5),
    "factorised base": lambda: DiscreteAutoregressive(3, 5, univariate="permutation", base="factorized"),
    "coupling": lambda: DiscreteCoupling(3, 5),
    "one-hot": lambda: DiscreteCoupling(3, 5, one_hot=True),
}
QUICK = ("autoregressive base", "one-hot")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FLOWS]
)
def test_a_law_is_learned_to_its_entropy(name):
    """A model that has the law loses about half a nat a parameter over the rows: here less than 100 of them count."""
    flow, law = FLOWS[name](), Chained()
    x = law.draw(NUM_ROWS)
    x = torch.nn.functional.one_hot(x, 5).float() if name == "one-hot" else x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_quietly(flow, x, max_epochs=150)
    fresh = law.draw(NUM_ROWS)
    fresh = torch.nn.functional.one_hot(fresh, 5).float() if name == "one-hot" else fresh
    with torch.no_grad():
        log_prob = flow().log_prob(fresh)
    error = log_prob.std().item() / math.sqrt(NUM_ROWS)
    assert -log_prob.mean().item() < law.entropy + 50 / NUM_ROWS + 4 * error
    assert fit.gaussian_log_prob is None
    assert sorted(fit.history) == ["grad_norm", "learning_rate", "log_prob", "validation_log_prob"]
    assert fit.best_log_prob == pytest.approx(held_out_log_prob(flow, x), abs=1e-5)


@pytest.mark.parametrize("recipe", [DiscreteAutoregressive, pytest.param(DiscreteCoupling, marks=pytest.mark.slow)])
def test_a_law_given_a_context_is_learned(recipe):
    """The context says which of two categories is frequent at each place, and whether the places agree."""
    context = torch.randint(2, (NUM_ROWS, 2)).float()
    first = (torch.rand(NUM_ROWS) < 0.1 + 0.8 * context[:, 0]).long()
    x = torch.stack([first, (first + context[:, 1].long() + (torch.rand(NUM_ROWS) < 0.1)) % 2], -1)
    flow = recipe(2, 2, context_dim=2, hidden_dims=(32,))
    fit_quietly(flow, x, context, max_epochs=200)
    for first_is_one, changes in itertools.product((0.1, 0.9), repeat=2):
        law = flow(torch.tensor([float(first_is_one > 0.5), float(changes > 0.5)]))
        of_first, of_second = torch.tensor([1 - first_is_one, first_is_one]), torch.tensor([1 - changes, changes])
        expected = torch.stack([of_first[0] * of_second, of_first[1] * of_second.flip(0)]).flatten()
        # Each probability is estimated from a thousand rows.
        found = law.log_prob(law.enumerate_support()).exp()
        torch.testing.assert_close(found, expected, atol=4 * math.sqrt(0.25 / 1000), rtol=0)


def test_weights_count_as_repeated_rows():
    x = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]]).repeat(200, 1)
    weights = torch.tensor([1.0, 2.0, 4.0, 0.0]).repeat(200)
    flow = DiscreteCoupling(2, 3, hidden_dims=(16,))
    fit_quietly(flow, x, weights=weights, max_epochs=150)
    with torch.no_grad():
        found = flow().log_prob(torch.tensor([[0, 1], [1, 2], [2, 0], [1, 1]])).exp()
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 4.0, 0.0]) / 7, atol=4 * math.sqrt(0.25 / 600), rtol=0)


def test_a_constant_place_and_rare_categories_are_data_like_others():
    x = torch.zeros(500, 3, dtype=torch.long)
    x[:, 1] = torch.randint(2, (500,))
    x[7, 2] = 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_briefly(DiscreteCoupling(3, 5), x)


@pytest.mark.parametrize("compile", ["none", "trace"])
def test_a_recorded_step_trains_as_the_plain_one(compile):
    x = Chained().draw(1000)
    histories = []
    for mode in ("none", compile):
        pyro.set_rng_seed(1)
        flow = DiscreteCoupling(3, 5, hidden_dims=(16,))
        histories.append(fit_quietly(flow, x, max_epochs=30, compile=mode).history["log_prob"])
    torch.testing.assert_close(torch.tensor(histories[0]), torch.tensor(histories[1]), atol=1e-3, rtol=0)


def test_the_best_state_is_restored():
    x = torch.randint(5, (200, 3))  # there is nothing to learn, but by heart
    flow = DiscreteAutoregressive(3, 5)
    fit = fit_quietly(flow, x, max_epochs=40, patience=5)
    assert fit.stopped_early
    assert fit.best_epoch < fit.history.num_steps
    assert fit.best_log_prob == pytest.approx(held_out_log_prob(flow, x), abs=1e-5)


WRONG = {
    "too large": (lambda x: x + 1, DataError, "no integers from 0 to 4 in .* the first is 5 in row"),
    "negative": (lambda x: x - 1, DataError, "no integers from 0 to 4 in .* the first is -1 in row"),
    "fractions": (lambda x: x + 0.5, DataError, "no integers from 0 to 4 in 100 of 100 rows"),
    "NaN": (lambda x: torch.where(x == x[0, 0], math.nan, x), DataError, "x has NaN or infinite values"),
    "one-hot": (lambda x: torch.nn.functional.one_hot(x, 5), ShapeError, r"argmax\(-1\) are, or .* one_hot=True"),
    "too few places": (lambda x: x[:, :2], ShapeError, "x has 2 columns, but the flow has 3"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("recipe", [DiscreteAutoregressive, DiscreteCoupling])
def test_wrong_data_are_refused(name, recipe):
    change, error, message = WRONG[name]
    x = torch.arange(300).reshape(100, 3) % 5
    with pytest.raises(error, match=message):
        fit_briefly(recipe(3, 5), change(x))


def test_integers_for_a_flow_of_one_hot_vectors_are_refused():
    with pytest.raises(ShapeError, match=r"torch.nn.functional.one_hot makes, or make the flow of integers"):
        fit_briefly(DiscreteCoupling(3, 5, one_hot=True), torch.randint(5, (100, 3)))
    with pytest.raises(DataError, match="outside the support OneHot"):
        fit_briefly(DiscreteCoupling(3, 5, one_hot=True), torch.full((100, 3, 5), 0.2))


def test_the_fit_is_plotted():
    pytest.importorskip("matplotlib")
    assert fit_briefly(DiscreteCoupling(3, 5), Chained().draw(200)).plot().axes
