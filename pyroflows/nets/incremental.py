r"""Protocols of conditioners that can be evaluated place by place, forwards and backwards.

The inverse of an autoregressive layer finds the inputs of its conditioner one after the other. D passes through the
network are always enough: pass i gives the parameters at place i. A network that offers :class:`Incremental` keeps what
it has computed, so that all D steps together cost about one pass. The gradient of the inverse needs the gradients of
the inputs in reverse order, from the last place to the first; :class:`IncrementalGradient` computes these likewise. A
layer uses what its conditioner offers, without being told.

The rows of a batch are the last axis of every tensor here, ``(..., N)``, so that a step reads and writes contiguous
blocks. The axes of an event that are not ordered, such as the channels of a sequence, are called ``channels`` below;
vectors have none.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ParameterSteps(Protocol):
    """Steps that compute the parameters of one place after the other, while the inputs become known.

    For i = 0, 1, ..., D - 1, the layer calls ``parameters_at(i)``, then writes ``inputs[i]``. It needs no gradients.

    Attributes:
        inputs: ``(D, *channels, N)``, where ``inputs[i]`` is the input at place i of the order.
    """

    inputs: Tensor

    def parameters_at(self, i: int) -> Tensor:
        """Return the parameters ``(num_params, *channels, N)`` at place i; only ``inputs[:i]`` are known by then."""
        ...


@runtime_checkable
class Incremental(Protocol):
    """A conditioner that can be evaluated place by place: a module with one more method, ``incremental``.

    An autoregressive layer whose conditioner offers this uses it for its inverse. The steps must give the parameters
    that the network's ``forward`` gives, so a subclass that changes one must change the other.

    Example:
        >>> class RunningSum(torch.nn.Module):
        ...     '''A network whose parameters at j are linear in the sum of the inputs before j.'''
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
        """Return the steps for N rows.

        Args:
            num_rows: N.
            context: ``(N, *context_shape)``, or ``(1, *context_shape)`` if all rows have the same; None for none.
        """
        ...


@runtime_checkable
class GradientSteps(Protocol):
    """Steps that complete the gradient of one input after the other, from the last place to the first.

    For i = D - 1, ..., 1, the layer reads the gradient of the input at place i, which is complete by then, computes
    from it the gradient of the parameters at place i, and calls ``pull_back(i, gradient)``.
    """

    def pull_back(self, i: int, gradient: Tensor) -> None:
        """Add to the gradient of the inputs before place i what passes through the parameters at place i.

        Args:
            i: the place.
            gradient: ``(num_params, *channels, N)``, the gradient of the parameters at place i.
        """
        ...


@runtime_checkable
class IncrementalGradient(Protocol):
    """A conditioner whose gradient with respect to its inputs can be computed place by place.

    An autoregressive layer whose conditioner offers this solves the triangular systems of its inverse's gradient and of
    scores by one backward substitution. With any other conditioner it repeats backward passes of the network until
    nothing changes.
    """

    def with_gradient_steps(
        self, z: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], GradientSteps]]:
        """Return the parameters at z, as ``forward`` gives them, and a function that makes the steps.

        The function takes the gradient of the inputs, ``(D, *channels, N)``, to which the steps add in place. N counts
        all rows of z. The first axis has the indices of z, not its places: that of place i is ``order[i]``.

        Args:
            z: ``(..., *channels, D)``.
            context: ``(..., *context_shape)``, or None.
        """
        ...
