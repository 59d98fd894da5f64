"""Refuse flows that cannot be trained without data."""

from pyroflows.errors import OptionError
from pyroflows.flows.flow import Flow
from pyroflows.transforms.base import FlowTransform


def require_no_statistics(flow: Flow, use: str) -> None:
    """Raise if a layer of a flow keeps running statistics of data, for a use that has no data.

    Args:
        flow: the flow.
        use: what trains the flow, for the message.

    Raises:
        OptionError: if there is such a layer; names it.

    Example:
        >>> require_no_statistics(pf.Flow([pf.transforms.ActNorm(2)]), "a guide")
        >>> require_no_statistics(pf.Flow([pf.transforms.BatchNorm(2)]), "a guide")
        Traceback (most recent call last):
        pyroflows.errors.OptionError: BatchNorm (transform.layers.0 of this flow) keeps running statistics of data, ...
    """
    for name, layer in flow.named_modules():
        if isinstance(layer, FlowTransform) and type(layer)._observe is not FlowTransform._observe:
            raise OptionError(
                f"{type(layer).__name__} ({name} of this flow) keeps running statistics of data, but {use} is trained "
                "on draws, without data to bring them up to date: take ActNorm in its place, whose location and scale "
                "are trained with the other parameters"
            )
