"""A memory of the last result of a computation that cannot return stale values."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.optim.optimizer import register_optimizer_step_post_hook


class Memory:
    """A memory of the tensors that a computation returned last, valid while nothing that they depend on has changed.

    What was kept becomes invalid once one of its tensors is changed in place or begins to require gradients, once a
    tensor of a source is changed or replaced, once any optimiser of the process makes a step, and once gradients are
    switched on or off. Only changes through ``.data`` go unnoticed, except those of optimisers. Deepcopy and pickle
    drop it.

    Args:
        sources: the tensors, modules and distributions that the computation reads; None for nothing.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> memory = Memory(layer)
        >>> x = torch.zeros(1)
        >>> memory.keep(x, layer(x))
        >>> memory.recall(x, None) is not None
        True
        >>> _ = layer.bias.detach().zero_()
        >>> memory.recall(x, None) is None
        True
    """

    def __init__(self, *sources: Tensor | nn.Module | Distribution | None) -> None:
        self._sources = sources
        # The tensors, those of the sources, and the state of both.
        self._kept: tuple[tuple[Tensor, ...], list[Tensor], Any] | None = None

    def keep(self, *tensors: Tensor) -> None:
        """Remember these tensors and forget those before."""
        # The sources' tensors are kept alive, since those that replaced them could have their identity otherwise.
        read = list(_tensors_of(self._sources, set()))
        self._kept = tensors, read, _state(tensors, read)

    def recall(self, *known: Tensor | None) -> tuple[Tensor, ...] | None:
        """Return what was kept if it is valid and matches what is known, else None.

        Args:
            known: one argument for each tensor that was kept: the very tensor that must stand there, or None for any.
        """
        if self._kept is None:
            return None
        tensors, _, state = self._kept
        fits = all(value is None or value is kept for value, kept in zip(known, tensors, strict=True))
        return tensors if fits and state == _state(tensors, _tensors_of(self._sources, set())) else None

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _state(tensors: Iterable[Tensor], read: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return an object that stays equal only while all tensors are the same objects with the same values."""
    kept = tuple((tensor._version, tensor.requires_grad) for tensor in tensors)
    versions = tuple((id(tensor), tensor._version) for tensor in read)
    return _num_optimizer_steps, torch.is_grad_enabled(), kept, versions


def _tensors_of(source: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of a module, distribution or transform, or of a sequence of these.

    A transform and its inverse refer to each other, so the objects that were seen are left out.
    """
    if isinstance(source, Tensor):
        yield source
    elif isinstance(source, nn.Module):
        yield from source.parameters()
        yield from source.buffers()
    elif isinstance(source, Distribution | Transform):
        if id(source) not in seen:
            seen.add(id(source))
            yield from _tensors_of(tuple(vars(source).values()), seen)
    elif isinstance(source, list | tuple):
        for part in source:
            yield from _tensors_of(part, seen)


_num_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _num_optimizer_steps
    _num_optimizer_steps += 1


# Fused optimisers, and those that write through ``.data``, leave no trace in a tensor's version counter.
register_optimizer_step_post_hook(_count_step)
