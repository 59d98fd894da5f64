"""A memory of the last result of a computation that cannot return stale values."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyroflows.compiling.eager import runs_in_python
from pyroflows.transforms.binding import Binding


class Memory:
    """A memory of the tensors that a computation returned last, valid while nothing that they depend on has changed.

    What was kept becomes invalid once one of its tensors or one of a source's has other values, was written to, or was
    replaced, once one of its tensors begins to require gradients, and once gradients are switched on or off. Values are
    compared themselves, since torch does not note what is written through ``.data``; under ``torch.func`` and while a
    function is traced or recorded nothing can be compared, and what torch notes has to do. Deepcopy and pickle drop the
    memory.

    Args:
        sources: the tensors, modules, bindings and distributions that the computation reads; None for nothing.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> memory = Memory(layer)
        >>> x = torch.zeros(1)
        >>> memory.keep(x, layer(x))
        >>> memory.recall(x, None) is not None
        True
        >>> _ = layer.bias.data.zero_()
        >>> memory.recall(x, None) is None
        True
    """

    def __init__(self, *sources: Tensor | nn.Module | Binding | Distribution | None) -> None:
        self._sources = sources
        # The tensors, those of the sources, what torch notes of both, and the values of both.
        self._kept: tuple[tuple[Tensor, ...], list[Tensor], Any, list[Tensor] | None] | None = None

    def keep(self, *tensors: Tensor) -> None:
        """Remember these tensors and forget those before."""
        # The sources' tensors are kept alive, since those that replaced them could have their identity otherwise.
        read = list(_tensors_of(self._sources, set()))
        self._kept = tensors, read, _notes(tensors, read), values_of([*tensors, *read])

    def recall(self, *known: Tensor | None) -> tuple[Tensor, ...] | None:
        """Return what was kept if it is valid and matches what is known, else None.

        Args:
            known: one argument for each tensor that was kept: the very tensor that must stand there, or None for any.
        """
        if self._kept is None:
            return None
        tensors, _, notes, values = self._kept
        if not all(value is None or value is kept for value, kept in zip(known, tensors, strict=True)):
            return None
        read = list(_tensors_of(self._sources, set()))
        if notes != _notes(tensors, read):
            return None
        return tensors if are_equal(values, values_of([*tensors, *read])) else None

    def forget(self) -> None:
        """Drop what was kept."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _notes(tensors: Iterable[Tensor], read: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return an object that stays equal only while torch notes no change, and all tensors are the same objects."""
    kept = tuple((tensor._version, tensor.requires_grad) for tensor in tensors)
    return torch.is_grad_enabled(), kept, tuple((id(tensor), tensor._version) for tensor in read)


@torch.no_grad()
def values_of(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Return copies of the values, joined to a flat tensor for each dtype and device; None where they are unknown.

    Example:
        >>> values_of([torch.zeros(1), torch.ones(1, 2)])
        [tensor([0., 1., 1.])]
    """
    if not runs_in_python() or any(tensor.is_meta for tensor in tensors):
        return None
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    # Of a single tensor the flat one would be a view.
    return [torch._C._nn.flatten_dense_tensors(g) if len(g) > 1 else g[0].flatten().clone() for g in groups.values()]


def are_equal(before: list[Tensor] | None, now: list[Tensor] | None) -> bool:
    """Tell whether values are the same; those that are unknown equal each other only."""
    if before is None or now is None:
        return before is now
    # A tensor whose data were replaced may have another dtype.
    return len(before) == len(now) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(before, now, strict=True)
    )


def _tensors_of(source: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of a module, binding, distribution or transform, or of a sequence of these.

    A transform and its inverse refer to each other, so the objects that were seen are left out.
    """
    if isinstance(source, Tensor):
        yield source
    elif isinstance(source, Binding):
        yield from source.tensors()
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
