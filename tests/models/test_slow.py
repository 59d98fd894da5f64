"""A model that runs draw by draw says where, why, and what to write instead."""

import functools

import pyro
import pytest
import torch
from pyro import distributions as dist

from pyroflows.models.batching import BatchedModel
from pyroflows.models.lines import line_of_error
from pyroflows.models.slow import duration


def normals():
    return pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def by_item():
    x = normals()
    pyro.factor("y", x[0] * x[1].item())


def by_tensor():
    x = normals()
    pyro.factor("y", torch.tensor([x[0], x[1]]).sum())


def by_numpy():
    x = normals()
    pyro.factor("y", x[0] * x.detach()[1].numpy().item())


def by_mask():
    x = normals()
    pyro.factor("y", x[x > 0].sum() + x[0])


def by_many_branches():
    x = normals()
    pyro.factor("y", sum(x[0] if x[1] < t else x[2] for t in range(9)))


def by_a_branch_on_many():
    x = normals()
    pyro.factor("y", x[0] if bool(x[1] > 0) and not x.tolist() else x[2])


@pytest.mark.parametrize(
    ("model", "line", "words"),
    [
        (by_item, "x[1].item())", "tensors without .item()"),
        (by_tensor, "torch.tensor([x[0], x[1]])", "torch.stack([a, b]) for torch.tensor([a, b])"),
        (by_numpy, "numpy()", "tensors without .item(), float(), int() and NumPy"),
        (by_mask, "x[x > 0].sum()", "torch.where(mask, x, 0.0) for x[mask]"),
        (by_many_branches, "for t in range(9)", "torch.where(x > 0, a, b) for a if x > 0 else b"),
        (by_a_branch_on_many, "x.tolist()", "tensors without .item(), float(), int() and NumPy"),
    ],
)
def test_the_warning(model, line, words):
    with pytest.warns(UserWarning, match="draw by draw") as caught:
        batched = BatchedModel(model, (), {}, {"x": torch.randn(5, 3)})
    assert batched.mode == "loop"
    (message,) = [str(w.message) for w in caught if "draw by draw" in str(w.message)]
    for part in ("milliseconds", "test_slow.py:", line, words, "docs/models.md"):
        assert part in message


def test_models_made_of_a_slow_one_do_not_warn_again(recwarn, monkeypatch):
    monkeypatch.setattr("pyroflows.models.batching.LONG", 0.0)
    batched = BatchedModel(by_item, (), {}, {"x": torch.randn(5, 3)})
    values = {"x": torch.randn(20, 3)}
    batched.in_chunks(values, 20)
    batched.unscaled().in_chunks(values, 20)
    batched.drawing(values).in_chunks(values, 20)
    assert sum("draw by draw" in str(w.message) for w in recwarn.list) == 1


def test_many_draws_of_a_slow_model_take_long(monkeypatch):
    batched = BatchedModel(by_item, (), {}, {"x": torch.randn(5, 3)}, draw=True)
    monkeypatch.setattr("pyroflows.models.batching.LONG", 0.0)
    with pytest.warns(
        UserWarning, match=r"draw by draw, which takes about .*seconds for 20 draws; under vmap it fails"
    ):
        batched.in_chunks({"x": torch.randn(20, 3)}, 20)


def failing():
    return torch.zeros(2) @ torch.zeros(3)


def test_the_line_is_the_innermost_of_the_user():
    with pytest.raises(RuntimeError) as caught:
        torch.no_grad()(functools.lru_cache(failing))()
    assert line_of_error(caught.value).startswith(" at test_slow.py:")
    assert line_of_error(caught.value).endswith(", `return torch.zeros(2) @ torch.zeros(3)`")
    assert line_of_error(RuntimeError()) == ""


def test_durations():
    assert [duration(seconds) for seconds in (0.00012, 0.012, 1.2, 75.4)] == [
        "0.12 milliseconds",
        "12 milliseconds",
        "1 seconds",
        "75 seconds",
    ]
