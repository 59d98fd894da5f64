"""The arguments of a model that come batch by batch, such as those of a ``DataLoader``."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader, Dataset

from pyroflows.errors import DataError, OptionError
from pyroflows.models.arguments import require_arguments
from pyroflows.models.observations import as_tensor, is_array
from pyroflows.models.structure import describe
from pyroflows.models.tracing import Model
from pyroflows.options import kind

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class FixedArguments:
    """Arguments of a model that are the same in each step.

    Args:
        args: the positional arguments.
        kwargs: the keyword arguments.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.first: Arguments = args, kwargs
        self.num_tensors = self.num_given = 0

    def draw(self) -> list[Tensor]:
        """The tensors of a step, of which there are none: those of the arguments are constants."""
        return []

    def of(self, tensors: Sequence[Tensor]) -> Arguments:
        """The arguments of a step."""
        return self.first

    def go_back(self, num_given: int) -> None:
        """Do nothing, since all steps are the same."""


class Batches:
    """Arguments of a model that come batch by batch, again and again.

    A tuple or a list holds positional arguments, a dictionary keyword arguments, and a tensor is one argument. Arrays
    become tensors. Batches differ by tensors alone.

    Args:
        model: the Pyro model.
        loader: what gives batches each time that one iterates over it.

    Attributes:
        first: the positional and keyword arguments of the first batch.
        num_tensors: the number of tensors in a batch.
        num_given: the number of batches that :meth:`draw` has given.

    Raises:
        OptionError: if the model does not take the first batch as its arguments, or the batches come only once.
        DataError: if there is no batch, or if it holds no tensor.

    Example:
        >>> batches = Batches(lambda y: None, DataLoader(torch.arange(3), batch_size=2))
        >>> [batches.of(batches.draw())[0][0].tolist() for _ in range(3)]
        [[0, 1], [2], [0, 1]]
    """

    def __init__(self, model: Model, loader: Iterable[Any]) -> None:
        if isinstance(loader, Iterator):
            raise OptionError(
                f"the batches of a fit are passed through several times, but {kind(loader)} gives them once: give a "
                "DataLoader, or an object whose __iter__ starts anew"
            )
        self._model, self._loader = model, loader
        self._rest = iter(loader)
        # Batches that come before those of the loader, and the last ones that were given.
        self._ahead: deque[Any] = deque()
        self._given: deque[Any] = deque(maxlen=2)
        self.num_given = 0
        batch = self._of_loader()
        self._ahead.append(batch)
        self.first = _arguments(batch)
        require_arguments(model, *self.first)
        self._leaves, self._spec = tree_flatten(self.first)
        self.num_tensors = sum(isinstance(leaf, Tensor) for leaf in self._leaves)
        if not self.num_tensors:
            raise DataError(f"a batch holds no tensor ({kind(batch)}), so that each step would see the same data")

    def _of_loader(self) -> Any:
        for _ in range(2):
            for batch in self._rest:
                return batch
            self._rest = iter(self._loader)
        raise DataError("the loader gives no batches: is its dataset empty, or drop_last=True with too few rows?")

    def _next(self) -> Any:
        batch = self._ahead.popleft() if self._ahead else self._of_loader()
        self._given.append(batch)
        self.num_given += 1
        return batch

    def go_back(self, num_given: int) -> None:
        """Give the last batches, two at most, once more, so that the next one is that after the first ``num_given``."""
        while self._given and self.num_given > num_given:
            self._ahead.appendleft(self._given.pop())
            self.num_given -= 1

    def draw(self) -> list[Tensor]:
        """The tensors of the next batch.

        Raises:
            DataError: if the batch differs from the first one by more than tensors; names the argument.
        """
        args, kwargs = _arguments(self._next())
        require_arguments(self._model, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        if spec != self._spec:
            raise DataError(f"batches must have the same parts, but one is made like {self._spec}, another like {spec}")
        for ours, first in zip(leaves, self._leaves, strict=True):
            if isinstance(first, Tensor) != isinstance(ours, Tensor) or (
                not isinstance(first, Tensor) and ours != first
            ):
                raise DataError(
                    f"batches must differ by tensors alone, but one holds {first!r} where another holds {ours!r}: take "
                    "sizes from the shapes of tensors, and leave out what the model does not need"
                )
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def of(self, tensors: Sequence[Tensor]) -> Arguments:
        """The arguments of a step with the given tensors, which :meth:`draw` has made."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def require_scales(self, model: Model) -> None:
        """Raise if the model counts a batch as all of the data.

        Args:
            model: the Pyro model, in the dtype of the fit.

        Raises:
            OptionError: if there are several batches, and no observed site of the model is scaled; says what to write.
        """
        structure = describe(model, *self.first)
        data = [*structure.observed, *structure.factors]
        if any(bool((torch.as_tensor(site.scale) != 1).any()) for site in data) or not self._are_several():
            return
        site = next((site for site in data if site.plates), data[0] if data else None)
        if site is None:
            raise OptionError("there are several batches of data, but the model observes nothing")
        plate = site.plates[-1].name if site.plates else "rows"
        raise OptionError(
            f"there are several batches of data, but the model counts each as all of the data (site '{site.name}' has "
            f"scale 1): tell the plate of the rows how many there are in all, as in pyro.plate('{plate}', N, "
            "subsample_size=len(y)), or pyro.plate(..., N, subsample=indices)"
        )

    def _are_several(self) -> bool:
        for batch in self._rest:
            self._ahead.append(batch)
            return True
        return False


def is_loader(args: Any, kwargs: Any) -> bool:
    """Whether the arguments of a fit are one object that gives batches.

    This is a ``DataLoader``, or another object that one can iterate over, and that is no tensor, array, table, list,
    tuple, dictionary, string, set, dataset or module.
    """
    if len(args) != 1 or kwargs:
        return False
    if isinstance(args[0], DataLoader):
        return True
    known = (Tensor, np.ndarray, Sequence, Mapping, set, frozenset, str, bytes, torch.nn.Module)
    if isinstance(args[0], (*known, Dataset)) or is_array(args[0]):
        return False
    return isinstance(args[0], Iterable)


def _arguments(batch: Any) -> Arguments:
    batch = tree_map(lambda leaf: as_tensor(leaf) if is_array(leaf) else leaf, batch)
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})
