"""Pair draws of a base with rows of data, for flow matching."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

# Maps base draws z0 and data z1, (B, *shape) both, and contexts (B, *context_shape) or None to z0 in another order.
Coupling: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def independent(z0: Tensor, z1: Tensor, context: Tensor | None = None) -> Tensor:
    """Pair each row with the draw of its place, which knows nothing of it (Lipman et al. 2022, arXiv:2210.02747)."""
    return z0


def optimal_transport(z0: Tensor, z1: Tensor, context: Tensor | None = None) -> Tensor:
    r"""Pair draws and rows so that the sum of squared distances :math:`|z_0 - z_1|^2` in the batch is least (Tong et
    al. 2023, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772).

    With contexts, draws change places only among rows of one context. If they changed places between contexts, draws
    that are paired with rows of a context c would not be draws of the base, but of those parts of it that lie near to
    the data of c; a flow starts at the whole base at each c, and would be wrong (Cheng and Schwing 2025,
    arXiv:2503.10636). Where no two rows have a context in common, the pairs stay as they are.

    Args:
        z0: draws of the base ``(B, *shape)``.
        z1: rows of data ``(B, *shape)``.
        context: their contexts ``(B, *context_shape)``, or None.

    Returns:
        The draws, in the order of the rows that they are paired with.

    Example:
        >>> optimal_transport(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.2], [0.9]])).flatten()
        tensor([0., 1.])
    """
    if context is None:
        return z0[_assigned(z0, z1)]
    index = torch.arange(len(z0), device=z0.device)
    group = context.flatten(1).unique(dim=0, return_inverse=True)[1]
    for members in group.argsort(stable=True).split(group.bincount().tolist()):
        if len(members) > 1:
            index[members] = members[_assigned(z0[members], z1[members])]
    return z0[index]


def _assigned(z0: Tensor, z1: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment  # which takes long to import

    cost = torch.cdist(z1.flatten(1), z0.flatten(1)).square()
    # The same number less in a whole row or column changes no assignment. With zeros in each of them the search for it
    # takes two thirds of the time.
    cost -= cost.amin(1, keepdim=True)
    cost -= cost.amin(0)
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=z0.device)


COUPLINGS: dict[str, Coupling] = {"independent": independent, "optimal_transport": optimal_transport}
