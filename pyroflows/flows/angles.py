"""Which columns of a flow are angles, and what a flow of angles needs of its layers and its base."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from pyroflows.constraints import angles_in
from pyroflows.errors import OptionError
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.linear import Permutation
from pyroflows.transforms.views import Cached, Conditioned, Inverse


def angles_of(layers: Sequence[FlowTransform]) -> tuple[list[bool], list[bool]]:
    """Return which indices along the last axis are angles, at the base end and at the data end of a stack.

    Raises:
        OptionError: if a layer treats angles as real numbers, or the other way round.

    Example:
        >>> angles_of([Elementwise(2, ["circular_spline", "spline"]), Permutation([1, 0])])
        ([True, False], [False, True])
    """
    leading: list[list[int]] = []
    for layer in layers:
        if (order := _order_of(layer)) is None:
            break
        leading.append(order)
    angles, _ = angles_at_ends(layers[min(len(leading), len(layers) - 1)])
    for order in reversed(leading):
        angles = [angles[order.index(i)] for i in range(len(order))]
    at_base = angles
    for place, layer in enumerate(layers):
        if (order := _order_of(layer)) is not None:
            angles = [angles[i] for i in order]
            continue
        taken, given = angles_at_ends(layer)
        if taken != angles and any(taken + angles):
            raise OptionError(
                f"layer {place} ({type(layer).__name__}) takes {_described(taken)}, but the layers before give "
                f"{_described(angles)}: every layer must treat angles as angles, as those with the univariate map "
                '"circular_spline" do'
            )
        angles = given
    return at_base, angles


def check_base_of_angles(base: nn.Module, angles: Sequence[bool]) -> None:
    """Check that the density of a base is the same after a turn of any angle.

    Args:
        base: a module whose call returns the base.
        angles: which indices along the last axis of its events are angles.

    Raises:
        OptionError: if it is another density.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        law = base()
        law._validate_args = False
        z = law.sample((20,))
        turned = z + 2 * math.pi * torch.tensor(angles).to(z)
        try:
            is_periodic = torch.allclose(law.log_prob(z), law.log_prob(turned), rtol=1e-3, atol=1e-3)
        except ValueError:  # the base is bounded, and validates
            is_periodic = False
    if not is_periodic:
        raise OptionError(
            f"the base of a flow of angles must have the same density after a turn, but {type(law).__name__} has not: "
            "leave it out for the uniform law, or give dist.VonMises(...).to_event(1), and pf.flows.Blocks for angles "
            "beside real numbers"
        )


def angles_at_ends(layer: FlowTransform) -> tuple[list[bool], list[bool]]:
    """Return which indices are angles at the base end and at the data end of a layer; of a stack, after a check."""
    if isinstance(layer, Compose):
        return angles_of(layer.layers)
    if isinstance(layer, Inverse | Conditioned | Cached):
        at_base, at_data = angles_at_ends(layer.layer)
        return (at_data, at_base) if isinstance(layer, Inverse) else (at_base, at_data)
    return angles_in(layer.domain, layer.base_shape[-1]), angles_in(layer.codomain, layer.event_shape[-1])


def _order_of(layer: FlowTransform) -> list[int] | None:
    """Return the order of a permutation, or of the inverse of one; None for other layers."""
    if isinstance(layer, Inverse) and isinstance(layer.layer, Permutation):
        return layer.layer.inverse_order.tolist()
    return layer.order.tolist() if isinstance(layer, Permutation) else None


def _described(angles: Sequence[bool]) -> str:
    columns = [i for i, is_angle in enumerate(angles) if is_angle]
    return f"angles in columns {columns}" if columns else "no angles"
