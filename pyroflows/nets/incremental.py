r"""What a conditioner offers that can be evaluated place by place, forwards and backwards.

The inverse of an autoregressive layer learns its inputs one after the other. Whatever the network, D passes through it
do: pass i gives the parameters at place i. A network that offers :class:`Incremental` does better: it keeps what it has
computed, so that all D steps together cost about one pass. The gradient of the inverse needs the inputs' gradients in
the reverse order, from the last place to the first, and :class:`IncrementalGradient` is the same for it. A layer finds
out by itself what its conditioner offers.

The rows of a batch stand last in every tensor here, ``(..., N)``, so that what a step reads and writes are contiguous
blocks. An event's axes that are not ordered, such as the channels of a sequence, are called ``channels`` below; vectors
have none.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ParameterSteps(Protocol):
    """The parameters of one place after the other, while the inputs become known.

    For i = 0, 1, ..., D - 1, the layer asks for ``parameters_at(i)``, then fills ``inputs[i]``. It needs no gradients.

    Attributes:
        inputs: ``(D, *channels, N)``, by place: ``inputs[i]`` is the input that stands at place i of the order.
    """

    inputs: Tensor

    def parameters_at(self, i: int) -> Tensor:
        """The parameters ``(num_params, *channels, N)`` at place i, from ``inputs[:i]``; the rest is not known yet."""
        ...


@runtime_checkable
class Incremental(Protocol):
    """A conditioner that can be evaluated place by place: a module with one more method, ``incremental``.

    An autoregressive layer whose conditioner offers this uses it for its inverse. The steps must give what the
    network's ``forward`` gives, so a subclass that changes one changes the other as well.

    Example:
        >>> class RunningSum(torch.nn.Module):
        ...     '''Parameters that are linear in the sum of the inputs before.'''
        ...
        ...     def __init__(self, order, num_params, hidden_dims, context_dim):
        ...         super().__init__()
        ...         self.output = torch.nn.Linear(1, num_params)
        ...
        ...     def forward(self, z, context=None):
        ...         return self.output((z.cumsum(-1) - z)[..., None])
        ...
        ...     def incremental(self, num_rows, context=None):
        ...         return RunningSumSteps(self, num_rows)
        >>> class RunningSumSteps:
        ...     def __init__(self, net, num_rows):
        ...         self.net = net
        ...         self.inputs = torch.empty(3, num_rows)
        ...         self.sum = torch.zeros(num_rows)
        ...
        ...     def parameters_at(self, i):
        ...         if i > 0:
        ...             self.sum += self.inputs[i - 1]
        ...         return self.net.output(self.sum[:, None]).T
        >>> t = pf.transforms.Autoregressive(3, conditioner=RunningSum)
        >>> isinstance(t.conditioner, pf.nets.Incremental)
        True
        >>> z = torch.randn(5, 3)
        >>> torch.allclose(t.inv(t(z)), z, atol=1e-5)
        True
    """

    def incremental(self, num_rows: int, context: Tensor | None = None) -> ParameterSteps:
        """Steps for N rows.

        Args:
            num_rows: N.
            context: ``(N, *context_shape)``, or ``(1, *context_shape)`` where all rows have the same, or None.
        """
        ...


@runtime_checkable
class GradientSteps(Protocol):
    """The gradients of one input after the other, from the last place to the first.

    For i = D - 1, ..., 1, the layer reads the inputs' gradient at place i, which is complete by then, and calls
    ``pull_back(i, gradient)``.
    """

    def pull_back(self, i: int, gradient: Tensor) -> None:
        """Add to the gradient of the inputs what the parameters at place i bring to the places before i.

        Args:
            i: the place.
            gradient: ``(num_params, *channels, N)``, the gradient of the parameters at place i.
        """
        ...


@runtime_checkable
class IncrementalGradient(Protocol):
    """A conditioner whose gradient with respect to its inputs can be computed place by place.

    An autoregressive layer whose conditioner offers this solves triangular systems with it, for the gradient of its
    inverse and for scores, by one backward substitution. With any other it iterates passes backwards through the
    network until nothing changes.
    """

    def with_gradient_steps(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], GradientSteps]]:
        """The parameters at z, as ``forward`` gives them, and a function that makes the steps.

        The function takes the gradient of the inputs, ``(D, *channels, N)``, to which the steps add in place. N is the
        number of all rows of z. The first axis is that of z, not its order: place i has the gradient at ``order[i]``.
        """
        ...
