"""Run a ``torch.autograd.Function`` whose ``forward`` takes a context, which ``torch.func`` refuses, under vmap.

Pyro's safe logarithm and torch's Dirichlet sampler are such functions. The way out is a function without a context in
``forward`` that returns what the first one saves for its ``backward`` as further outputs.
"""

import functools
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_leaves

_apply = Function.__dict__["apply"].__func__


def apply_function(function: type[Function], *args: Any, **kwargs: Any) -> Any:
    """Apply a function under a transformation of ``torch.func``, also one whose ``forward`` takes a context.

    Args:
        function: the function.
        args: the arguments of its ``forward``, without the context.
        kwargs: keyword arguments of its ``forward``, which only a function without a context has.

    Raises:
        RuntimeError: if ``forward`` keeps tensors as attributes of its context, which vmap could not follow.

    Example:
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(context, x):
        ...         context.save_for_backward(x)
        ...         return x**2
        ...
        ...     @staticmethod
        ...     def backward(context, gradient):
        ...         return 2 * context.saved_tensors[0] * gradient
        >>> torch.func.vmap(lambda x: apply_function(Square, x))(torch.tensor([1.0, 2.0]))
        tensor([1., 4.])
    """
    if function.setup_context is not Function.setup_context:
        return _apply(function, *args, **kwargs)
    call = _Call()
    outputs = _apply(_without_context(function), call, *args)
    return outputs[: call.num_outputs] if call.is_tuple else outputs[0]


class _Context:
    """The context that ``forward`` writes to, and that ``backward`` reads."""

    def __init__(self, saved_tensors: tuple[Tensor | None, ...] = (), **attributes: Any) -> None:
        self.saved_tensors = saved_tensors
        vars(self).update(attributes)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class _Call:
    """What is known of one call after its ``forward``: its outputs, its attributes, and where saved tensors lie."""

    num_outputs: int
    is_tuple: bool
    attributes: dict[str, Any]
    places: list[int | None]


@functools.cache
def _without_context(function: type[Function]) -> type[Function]:
    class WithoutContext(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(call: _Call, *args: Any) -> Any:
            context = _Context()
            output = function.forward(context, *args)
            call.is_tuple = isinstance(output, tuple)
            outputs = output if call.is_tuple else (output,)
            call.num_outputs = len(outputs)
            call.attributes = {name: value for name, value in vars(context).items() if name != "saved_tensors"}
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(call.attributes)):
                raise RuntimeError(f"{function.__name__} keeps tensors in its context without save_for_backward")
            known = [*args, *outputs]
            call.places = []
            for saved in context.saved_tensors:
                if saved is not None and not any(saved is tensor for tensor in known):
                    known.append(saved)
                call.places.append(_place(saved, known))
            return tuple(known[len(args) :])

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            call, *args = inputs
            known = [*args, *output]
            ctx.call = call
            ctx.save_for_backward(*(None if place is None else known[place] for place in call.places))

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            context = _Context(ctx.saved_tensors, **ctx.call.attributes, needs_input_grad=ctx.needs_input_grad[1:])
            found = function.backward(context, *gradients[: ctx.call.num_outputs])
            return None, *(found if isinstance(found, tuple) else (found,))

    WithoutContext.__name__ = function.__name__
    return WithoutContext


def _place(saved: Tensor | None, known: list[Any]) -> int | None:
    return None if saved is None else next(i for i, tensor in enumerate(known) if tensor is saved)
