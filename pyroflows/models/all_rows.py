"""Models without subsampling: the same model with all rows of its plates."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.subsample_messenger import SubsampleMessenger

from pyroflows.models.tracing import Model


@contextmanager
def all_rows() -> Iterator[None]:
    """Make plates ignore their ``subsample_size``, so that they have all rows, in their order.

    Plates with ``subsample=`` keep the rows that they are given, since the data of others need not be at hand.
    """
    original = SubsampleMessenger._subsample

    def with_all(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *options: Any, **more: Any
    ) -> Any:
        return original(name, size, None if subsample is None else subsample_size, subsample, *options, **more)

    SubsampleMessenger._subsample = staticmethod(with_all)
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(original)


class WithAllRows:
    """A model that runs with all rows of its plates.

    Args:
        model: the Pyro model.

    Example:
        >>> def model():
        ...     with pyro.plate("rows", 10, subsample_size=2):
        ...         return pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> WithAllRows(model)().shape
        torch.Size([10])
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with all_rows():
            return self.model(*args, **kwargs)
