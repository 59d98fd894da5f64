"""The type of factories of conditioners, and a check that the output of a conditioner is a function of its input."""

from collections.abc import Callable
from typing import Any

from torch import nn

from pyroflows.errors import OptionError
from pyroflows.options import kind

# It makes the network of a layer from its sizes; Coupling and Autoregressive say with which arguments they call it.
ConditionerFactory = Callable[..., nn.Module]


def checked_factory(conditioner: Any, name: str = "conditioner") -> ConditionerFactory:
    """Return what was given as a network if it can make one, rather than be one.

    Args:
        conditioner: what the user gave.
        name: the name of the option.

    Raises:
        OptionError: if it is a module, or cannot be called.
    """
    if isinstance(conditioner, nn.Module) or not callable(conditioner):
        raise OptionError(
            f"{name} must be a name, or a function that makes the network from its sizes, got {kind(conditioner)}"
        )
    factory: ConditionerFactory = conditioner
    return factory


def checked_conditioner(
    conditioner: nn.Module, title: str = "a conditioner", harm: str = "which breaks the bijection"
) -> nn.Module:
    """Return the network if it gives the same output for the same input, at every call and in every batch.

    Dropout, other noise and batch statistics give a layer's two directions different parameters. The layer is then no
    bijection, and no value that it returns would show it.

    Args:
        conditioner: the network.
        title: what messages call it.
        harm: what messages say of an output that is not a function of the input, as a clause.

    Raises:
        OptionError: if it is not a module, or contains dropout, batch normalisation or the like.

    Example:
        >>> try:
        ...     checked_conditioner(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1)))
        ... except pf.FlowError as error:
        ...     print(error)
        a conditioner must not contain Dropout at '1': its output is random, which breaks the bijection; remove it
    """
    if not isinstance(conditioner, nn.Module):
        got = f"the class {conditioner.__name__}: make an instance first" if isinstance(conditioner, type) else None
        raise OptionError(f"{title} must be a torch.nn.Module, got {got or type(conditioner).__name__}")
    for name, module in conditioner.named_modules():
        if (effect := _effect(module)) is not None:
            where = f"{type(module).__name__} at {name!r}" if name else type(module).__name__
            raise OptionError(f"{title} must not contain {where}: {effect}, {harm}; remove it")
    return conditioner


def _effect(module: nn.Module) -> str | None:
    """Return why a module's output is not a function of its input, or None if it is."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "its output depends on the rest of the batch"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return "its output depends on the batches before"
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    # Attention and recurrent networks have a dropout rate of their own.
    rate = getattr(module, "p" if is_dropout else "dropout", 0.0)
    if isinstance(module, nn.RReLU) or (isinstance(rate, float) and rate > 0):
        return "its output is random"
    return None
