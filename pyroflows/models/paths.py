"""Run code for one draw under vmap once for each path that its branches can take, and choose a path for each draw."""

import warnings
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyroflows.models.one_draw import ManyPaths, MustFollow, OneDraw, Place
from pyroflows.models.vectorized import vectorized
from pyroflows.randomness import seeded

# Dictionaries of tensors, whose names and shapes are the same for all draws.
Results: TypeAlias = tuple[dict[str, Tensor], ...]
Function: TypeAlias = Callable[[Any], Results]

MAX_PATHS = 8


class DifferentPaths(Exception):
    """The paths of a function have results of other names or shapes."""


def run_vmapped(function: Function, inputs: Any, num_draws: int) -> Results:
    """Run a function of one draw under vmap; random numbers differ between draws.

    Args:
        function: a function of a tree of tensors, which gives dictionaries of tensors.
        inputs: the inputs of all draws, along the first dimensions; there may be none.
        num_draws: the number of draws.
    """
    return _vmap(lambda inputs, _: function(inputs), inputs, num_draws)


def run_paths(
    function: Function,
    inputs: Any,
    num_draws: int,
    places: set[Place],
    seed: int | None = None,
    check: Callable[[Results, Callable[[], Results]], None] | None = None,
) -> Results:
    """Run a function of one draw under vmap, although it may fill tensors in place and branch.

    Each path through the conditions on single numbers is run for all draws, and each draw gets the results of its own
    path, and their gradients.

    Args:
        function: a function of a tree of tensors, which gives dictionaries of tensors.
        inputs: the inputs of all draws, along the first dimensions; there may be none.
        num_draws: the number of draws.
        places: where the function makes tensors that it fills; those that are missing are found and added.
        seed: a seed for each path, so that all draw the same random numbers, as long as they agree; None for a
            function that draws none.
        check: is called for each path, with its results and a function that runs it again.

    Raises:
        ManyPaths: if there are more than ``MAX_PATHS`` paths.
        DifferentPaths: if names or shapes of the results depend on the path.
        WritesOutside: if the function writes into a tensor that it did not make.

    Example:
        >>> def function(x):
        ...     y = torch.zeros(2)
        ...     y[0] = x.sqrt() if x > 0 else -x
        ...     return ({"y": y},)
        >>> run_paths(function, torch.tensor([4.0, -1.0]), num_draws=2, places=set())
        ({'y': tensor([[2., 0.],
                [1., 0.]])},)
    """
    outcomes: list[bool] = []
    chosen: Results | None = None
    for _ in range(MAX_PATHS):
        gate = _Gate()
        run = partial(_run_path, function, tree_map(gate, inputs), num_draws, places, seed, gate)
        results, conditions = run(outcomes)
        if check is not None:
            check(results, partial(_results_of, run, list(outcomes)))
        gate.is_taken = _all(conditions, outcomes)
        chosen = results if chosen is None or gate.is_taken is None else _chosen(gate.is_taken, results, chosen)
        # The next path differs in the last condition whose other outcome has not been run.
        while outcomes and not outcomes[-1]:
            outcomes.pop()
        if not outcomes:
            return chosen
        outcomes[-1] = False
    raise ManyPaths(f"conditions on values of latents give more than {MAX_PATHS} paths")


def _run_path(
    function: Function,
    inputs: Any,
    num_draws: int,
    places: set[Place],
    seed: int | None,
    gate: "_Gate",
    outcomes: list[bool],
) -> tuple[Results, list[Tensor]]:
    """Run one path for all draws, and give the conditions on it; those without an outcome get one."""

    def run(inputs: Any, token: Tensor) -> tuple[Results, list[Tensor]]:
        with OneDraw(token, places, outcomes, MAX_PATHS - 1, gate) as context:
            return function(inputs), context.conditions

    num_given = len(outcomes)
    while True:
        try:
            with seeded(seed):
                return _vmap(run, inputs, num_draws)
        except MustFollow as error:
            places.add(error.place)
            del outcomes[num_given:]


def _results_of(run: Callable[[list[bool]], tuple[Results, list[Tensor]]], outcomes: list[bool]) -> Results:
    return run(list(outcomes))[0]


def _all(conditions: list[Tensor], outcomes: list[bool]) -> Tensor | None:
    """Whether each draw has these outcomes of the conditions; None if there is no condition."""
    parts = [condition if outcome else ~condition for condition, outcome in zip(conditions, outcomes, strict=True)]
    return reduce(torch.logical_and, parts) if parts else None


class _Gate:
    """Inputs and parameters of one path, into which no gradient flows from draws that do not take it.

    There the path may compute the logarithm of a negative number, whose gradient is NaN even if it counts zero times.
    """

    def __init__(self) -> None:
        self.is_taken: Tensor | None = None

    def __call__(self, value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        gated = value.view_as(value)
        gated.register_hook(self._stop)
        return gated

    def _stop(self, gradient: Tensor) -> Tensor:
        return gradient if self.is_taken is None else _where(self.is_taken, gradient, torch.zeros_like(gradient))


def _chosen(is_taken: Tensor, results: Results, others: Results) -> Results:
    def shapes(results: Results) -> list[dict[str, torch.Size]]:
        return [{name: tensor.shape for name, tensor in part.items()} for part in results]

    if shapes(results) != shapes(others):
        raise DifferentPaths("sites, or their shapes, depend on conditions on values of latents")
    return tuple(
        {name: _where(is_taken, part[name], other[name]) for name in other}
        for part, other in zip(results, others, strict=True)
    )


def _where(is_taken: Tensor, tensor: Tensor, other: Tensor) -> Tensor:
    return torch.where(is_taken.reshape(-1, *(1,) * (tensor.dim() - 1)), tensor, other)


def _vmap(function: Callable[..., Any], inputs: Any, num_draws: int) -> Any:
    def single(inputs: Any, number: Tensor) -> Any:
        with vectorized(number):
            return function(inputs, number)

    run = torch.func.vmap(single, randomness="different")
    with warnings.catch_warnings():
        # Torch warns of operations that it runs one by one, about which a user can do nothing.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return run(inputs, torch.arange(num_draws))
