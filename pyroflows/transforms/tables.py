"""Read rows of tables of parameters, so that whoever asks gets gradients of the rows alone.

The gradient of ``table[ids]`` with respect to the table is as large as the table. Inside of :class:`TableReads` the
rows that are read are leaves of their own.
"""

from collections.abc import Sequence
from contextvars import ContextVar, Token
from typing import Any

from torch import Tensor

_reads: ContextVar["TableReads | None"] = ContextVar("table_reads", default=None)


class TableReads:
    """A context manager inside of which reads of given tables carry gradients of the rows, and none of the tables.

    Args:
        tables: the tables, parameters ``(N, ...)``.

    Attributes:
        places: the index of the table of each read.
        ids: the indices of the rows of each read, ``(R,)``.
        rows: the rows of each read, ``(R, ...)``.

    Example:
        >>> table = torch.ones(1000, 2, requires_grad=True)
        >>> with TableReads([table]) as reads:
        ...     loss = rows_at(table, torch.tensor([3, 8])).square().sum()
        >>> torch.autograd.grad(loss, reads.rows)
        (tensor([[2., 2.],
                [2., 2.]]),)
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self._tables = tables
        self.places: list[int] = []
        self.ids: list[Tensor] = []
        self.rows: list[Tensor] = []
        self._token: Token[Any] | None = None

    def __enter__(self) -> "TableReads":
        self._token = _reads.set(self)
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._token is not None
        _reads.reset(self._token)

    def read(self, table: Tensor, ids: Tensor) -> Tensor:
        """Return rows, which are noted if the table is one of the given ones."""
        for place, other in enumerate(self._tables):
            if other is table:
                self.places.append(place)
                self.ids.append(ids)
                self.rows.append(table.detach()[ids].requires_grad_())
                return self.rows[-1]
        return table[ids]


def rows_at(table: Tensor, ids: Tensor) -> Tensor:
    """Return ``table[ids]``, by way of the :class:`TableReads` around, if there is one."""
    reads = _reads.get()
    return table[ids] if reads is None else reads.read(table, ids)
