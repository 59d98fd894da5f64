"""Sums of products of factors over discrete variables, by Pyro's variable elimination."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro.distributions.hmm import _sequential_logmatmulexp
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyroflows.errors import ModelError

# A chain of at least so many factors is summed over by halves, in logarithmically many operations.
LONG_CHAIN = 8


@dataclass(frozen=True, eq=False)
class Factor:
    """The logarithm of a factor, such as the log-density of a site at all values of discrete sites.

    Args:
        site: the name of the site.
        tensor: the logarithm, whose dimensions are those of plates and of discrete variables, at their places.
        variables: the symbol of each discrete variable on which it depends, by dimension.
        plates: the symbol of each plate around the site, by dimension.
    """

    site: str
    tensor: Tensor
    variables: dict[int, str]
    plates: dict[int, str]

    @classmethod
    def of(cls, node: Any, plate_to_symbol: dict[str, str]) -> "Factor":
        """Make the factor of a node of a trace whose dimensions have symbols."""
        frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
        plates = {frame.dim: plate_to_symbol[frame.name] for frame in frames}
        shape = node["log_prob"].shape
        symbols = node["infer"]["_dim_to_symbol"]
        dims = [dim for dim in range(-len(shape), 0) if shape[dim] > 1 and dim not in plates]
        return cls(node["name"], node["log_prob"], {dim: symbols[dim] for dim in dims}, plates)

    @property
    def packed(self) -> Tensor:
        """The tensor as Pyro's variable elimination takes it."""
        return packed.pack(self.tensor, self.variables | self.plates)


def connected(factors: Sequence[Factor]) -> Iterator[list[Factor]]:
    """Group factors that depend on the same discrete variables, directly or through other factors, in their order."""
    by_variable: dict[str, list[int]] = {}
    for i, factor in enumerate(factors):
        for variable in factor.variables.values():
            by_variable.setdefault(variable, []).append(i)
    done: set[int] = set()
    for first in range(len(factors)):
        members: set[int] = set()
        found = {first} - done
        while found:
            i = found.pop()
            members.add(i)
            # Each variable leads to its factors once.
            found.update(j for v in factors[i].variables.values() for j in by_variable.pop(v, ()) if j not in members)
        done |= members
        if members:
            yield [factors[i] for i in sorted(members)]


def sum_of_products(factors: Sequence[Factor], symbol_to_dim: dict[str, int]) -> Tensor:
    """The logarithm of the sum, over all values of all discrete variables, of the product of factors.

    Args:
        factors: factors that depend on the same discrete variables, see :func:`connected`.
        symbol_to_dim: the dimension of each plate.

    Returns:
        A tensor whose dimensions are those of the plates that all factors have in common.

    Raises:
        ModelError: if the cost is exponential in the size of a plate; names the sites.
    """
    merged = _merged(factors)
    if len(merged) == 1:
        return merged[0].tensor.logsumexp(list(merged[0].variables)) if merged[0].variables else merged[0].tensor
    chain = _sum_over_chain(merged)
    if chain is not None:
        return chain
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for factor in merged:
        tree.setdefault(frozenset(factor.plates.values()), []).append(factor.packed)
    variables = {symbol for factor in merged for symbol in factor.variables.values()}
    try:
        with shared_intermediates() as cache:
            ((term,),) = contract_tensor_tree(tree, variables, cache=cache).values()
    except NotImplementedError as error:
        names = ", ".join(f"'{factor.site}'" for factor in factors[:4]) + (", ..." if len(factors) > 4 else "")
        raise ModelError(
            f"the discrete sites among {names} cannot be summed out, since sites in different plates depend on each "
            "other across these plates, at a cost that is exponential in their sizes: let the plates be nested, or "
            "make one of them a loop with pyro.markov"
        ) from error
    return packed.unpack(term, symbol_to_dim)


def _merged(factors: Sequence[Factor]) -> list[Factor]:
    """Multiply factors into others in the same plates that depend on all of their variables.

    This halves the number of factors of most models. It also keeps a sum exact where its largest terms come from
    different factors, of which Pyro takes the exponentials one by one.
    """
    made: list[Factor] = []
    # The indices of those in the same plates that depend on a variable; None stands for any.
    places: dict[tuple[frozenset[tuple[int, str]], tuple[int, str] | None], list[int]] = {}
    # Those that depend on more variables come first, so that others find them.
    for factor in sorted(factors, key=lambda factor: -len(factor.variables)):
        plates, variables = frozenset(factor.plates.items()), factor.variables.items()
        for i in min((places.get((plates, v), []) for v in [None, *variables]), key=len):
            if variables <= made[i].variables.items():
                made[i] = replace(made[i], tensor=made[i].tensor + factor.tensor)
                break
        else:
            for v in (None, *variables):
                places.setdefault((plates, v), []).append(len(made))
            made.append(factor)
    return made


def _sum_over_chain(factors: Sequence[Factor]) -> Tensor | None:
    """The same where the factors form a long chain, each with a variable in common with the next; None elsewhere."""
    first = factors[0]
    if len(factors) < LONG_CHAIN or any(len(f.variables) != 2 or f.plates != first.plates for f in factors):
        return None
    ends = _ends(factors)
    if ends is None or len({f.tensor.shape[dim] for f in factors for dim in f.variables}) > 1:
        return None
    # Factors whose variables have the same dimensions are brought into order together.
    num_kept = -1 - max(dim for f in factors for dim in f.variables)
    order: list[int] = []
    parts = []
    for pair in dict.fromkeys(ends):
        indices = [i for i, other in enumerate(ends) if other == pair]
        moved = torch.stack(list(_of_one_shape([factors[i].tensor for i in indices]))).movedim(pair, (-2, -1))
        parts.append(moved.reshape(len(indices), *moved.shape[moved.dim() - 2 - num_kept : -2], *moved.shape[-2:]))
        order += indices
    shape = torch.broadcast_shapes(*(part.shape[1:] for part in parts))
    joined = torch.cat([part.expand(len(part), *shape) for part in parts])
    places = torch.tensor(order, device=joined.device).argsort()
    with _ClampedCopies():
        products = _sequential_logmatmulexp(joined[places].movedim(0, -3))
    return products.logsumexp((-2, -1))


class _ClampedCopies(TorchFunctionMode):
    """Inside of this mode ``clamp_`` gives a copy, since vmap would run it row by row. Pyro uses what it gives."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (torch.clamp if function is Tensor.clamp_ else function)(*args, **kwargs or {})


def _of_one_shape(tensors: list[Tensor]) -> list[Tensor]:
    is_one = len({tensor.shape for tensor in tensors}) == 1
    return tensors if is_one else list(torch.broadcast_tensors(*tensors))


def _ends(factors: Sequence[Factor]) -> list[tuple[int, int]] | None:
    """The dimensions of the two variables of each factor, in the order of the chain; None if there is no chain."""
    variables = [set(f.variables.values()) for f in factors]
    if any(len(a & b) != 1 for a, b in pairwise(variables)):
        return None
    links = [next(iter(a & b)) for a, b in pairwise(variables)]
    if len(set(links)) < len(links) or len(set().union(*variables)) != len(factors) + 1:
        return None
    (start,) = variables[0] - {links[0]}
    path = [start, *links, *(variables[-1] - {links[-1]})]
    by_symbol = [{symbol: dim for dim, symbol in f.variables.items()} for f in factors]
    return [(dims[a], dims[b]) for dims, a, b in zip(by_symbol, path, path[1:], strict=False)]
