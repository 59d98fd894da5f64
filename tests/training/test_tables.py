"""Tables of parameters of which a step reads a few rows: their gradients, and the updates of the rows."""

import pyro
import pytest
import torch
from pyro import distributions as dist

import pyroflows as pf
from pyroflows.compiling.check import Compiler
from pyroflows.training.loop import Trainer
from pyroflows.training.schedules import Plateau
from pyroflows.training.step import Step
from pyroflows.training.table_adam import TableAdam
from pyroflows.transforms.tables import TableReads, rows_at

BETAS = (0.9, 0.99)


class Rows(pf.Objective):
    """Reads rows of a table twice, one of them at several places."""

    def __init__(self):
        torch.manual_seed(0)
        self.table = torch.randn(20, 3).requires_grad_()
        super().__init__(pf.Flow([pf.transforms.Diagonal(3)]), [self.table])

    def draw(self):
        return [torch.tensor([4, 7, 7]), torch.randint(20, (2,))]

    def loss(self, ids, others):
        x = self.flow.transform(rows_at(self.table, ids)) + 1
        y = rows_at(self.table, others).sum(0) * 3
        return (x**2).sum() + (x * y).sum() + y.exp().sum(), {}


def gradients_of(compile, by_rows):
    objective = Rows()
    step = Step(objective, Compiler(compile), [objective.table] if by_rows else [])
    with step.flattened():
        torch.manual_seed(1)
        figures = step()
        return figures, [p.grad.clone() for p in step.parameters], objective


@pytest.mark.parametrize("compile", ["none", "trace"])
def test_gradients_of_rows_are_those_of_the_table(compile):
    figures, (of_flow, of_table), objective = gradients_of(compile, by_rows=True)
    expected, (flat,), _ = gradients_of("none", by_rows=False)
    assert figures == pytest.approx(expected)
    assert of_table.is_sparse and len(of_table.indices()[0]) <= 4  # each row once
    assert of_table.shape == objective.table.shape
    torch.testing.assert_close(torch.cat([of_flow, of_table.to_dense().flatten()]), flat)


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_gradients_of_rows_are_clipped_with_the_others(max_norm):
    """With plain gradient descent the parameters after some steps are the same."""
    found = []
    for by_rows in (True, False):
        objective = Rows()
        trainer = Trainer(
            objective,
            Plateau("loss", 5),
            lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
            max_norm=max_norm,
            tables=[objective.table] if by_rows else [],
            progress_bar=False,
        )
        torch.manual_seed(1)
        trainer.run()
        found.append((trainer.history["grad_norm"], objective.table, *objective.flow.parameters()))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(torch.as_tensor(first), torch.as_tensor(second))


def test_other_tables_are_read_as_they_are():
    table, other = torch.ones(4, 2, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    with TableReads([table]) as reads:
        rows_at(other, torch.tensor([1])).sum().backward()
        rows_at(table.detach(), torch.tensor([1]))
    assert not reads.rows and other.grad[1].tolist() == [1.0, 1.0]


def run(table, gradients):
    """Take a step with each gradient, of all rows or, where it is sparse, of some."""
    adam = TableAdam([table], lr=0.01, betas=BETAS)
    for gradient in gradients:
        table.grad = gradient
        adam.step()
    return adam.state[table]


def test_a_row_moves_as_far_as_by_the_momentum_of_adam():
    """One row is read at each of the first 3000 steps, the other one at the last of these alone."""
    first = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    both = torch.tensor([[0.0], [-3.0]], dtype=torch.float64)
    gradients = [*[first] * 3000, both, *[torch.zeros_like(both)] * 500]
    adam, rows = (torch.zeros(2, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    run(adam, gradients)
    run(rows, [gradient.to_sparse(1) for gradient in gradients[:3001]])
    torch.testing.assert_close(rows[1], adam[1], rtol=1e-6, atol=0.0)
    assert abs(rows[1].item()) > 0.1


def test_second_moments_are_those_of_adam():
    torch.manual_seed(0)
    gradients = [torch.randn(6, 2, dtype=torch.float64) * (torch.rand(6, 1) < 0.3) for _ in range(60)]
    gradients[-1] = torch.randn(6, 2, dtype=torch.float64)  # all rows come last, up to date
    adam, rows = (torch.zeros(6, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected, found = run(adam, gradients), run(rows, [gradient.to_sparse(1) for gradient in gradients])
    torch.testing.assert_close(found["exp_avg_sq"], expected["exp_avg_sq"], rtol=1e-12, atol=0.0)


def of_rows(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y), subsample_size=3) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def fit(**options):
    guide = pf.guides.AutoStructuredFlow(of_rows)
    posterior = pf.FlowVI(of_rows, guide, seed=0, progress_bar=False, **options).run(torch.linspace(-2, 2, 50))
    return guide.flow.layers[-1].levels[0], posterior


class Ready(Exception):
    pass


@pytest.mark.parametrize("estimator", ["total", "path"])
def test_gradients_of_a_fit_are_the_same_by_rows(estimator, monkeypatch):
    found = []

    def stop(trainer):
        objective = trainer._objective
        for tables in (trainer._step.parameters[1:], []):
            step, state = Step(objective, Compiler("none"), tables), objective.state_dict()
            torch.manual_seed(2)
            step()
            objective.load_state_dict(state)
            found.append([p.grad for p in step.parameters])
        raise Ready

    monkeypatch.setattr(Trainer, "run", stop)
    with pytest.raises(Ready):
        fit(num_steps=2, estimator=estimator)
    by_rows, (whole,) = found
    assert [g.shape[0] for g in by_rows[1:]] == [50, 50] and all(g.is_sparse for g in by_rows[1:])
    expected = torch.cat([g.to_dense().flatten() for g in by_rows]).sort().values
    torch.testing.assert_close(expected, whole.sort().values)


def test_a_fit_with_learned_rows_changes_those_of_the_batch_alone():
    level, posterior = fit(num_steps=2)
    assert posterior.history.num_steps == 2
    assert int((level.affine.table != 0).any(-1).sum()) == 6
