"""Modules that hold the tensors of objects that are no modules: distributions, transforms and constraints."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import _InverseTransform
from torch.distributions.utils import lazy_property

from pyroflows.compiling.eager import is_under_func
from pyroflows.errors import OptionError


class Held(nn.Module):
    """A module that holds the tensors of a distribution, a transform or a constraint, so that they move, cast and load
    with it.

    Tensors are held wherever they stand: in the transforms of a distribution, in the parts of a constraint, in lists.
    They become buffers, and parameters stay parameters; modules among the parts, such as Pyro's transforms that learn,
    become submodules. A call returns the object with the tensors as they are then. The object that was given stays as
    it is, and shares only parameters and modules with it.

    Args:
        owner: a distribution, a transform or a constraint of torch or Pyro, or a list or tuple of these and of tensors.

    Attributes:
        template: the object without its tensors, modules, and the parts that hold any.

    Raises:
        OptionError: if a tensor is computed from parameters.

    Example:
        >>> base = Held(dist.Gumbel(torch.zeros(2), torch.ones(2)).to_event(1))
        >>> base.double()().sample().dtype
        torch.float64
        >>> [name for name, _ in Held(dist.transforms.AffineTransform(torch.zeros(2), 2.0)).named_buffers()]
        ['loc']
    """

    def __init__(self, owner: Any) -> None:
        super().__init__()
        for name, value in _attributes(owner).items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)
            elif isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor) and value.requires_grad:
                raise OptionError(
                    f"{name} of {type(owner).__name__} requires gradients but is no nn.Parameter, so that the flow "
                    "cannot find the parameters that it is computed from: give an nn.Parameter or a detached tensor, "
                    "or, as base, a module whose call returns the distribution"
                )
            elif isinstance(value, Tensor):
                self.register_buffer(name, value.detach().clone())
            elif _can_hold_tensors(value):
                part = Held(value)
                # A distribution without tensors is held too, since its values are validated as those of others are.
                if part.holds_tensors or isinstance(value, Distribution):
                    self.add_module(name, part)
        self.template = _without(owner, [*self._parameters, *self._buffers, *self._modules])

    @property
    def holds_tensors(self) -> bool:
        """Whether the object has tensors or modules at all."""
        return bool(self._parameters or self._buffers or self._modules)

    @property
    def batch_shape(self) -> torch.Size:
        """The batch shape of a distribution."""
        return self.template.batch_shape

    def forward(self) -> Any:
        """Return the object with the tensors as they are now."""
        if not self.holds_tensors and not isinstance(self.template, Distribution):
            return self.template
        parts = {name: part() if isinstance(part, Held) else part for name, part in self._modules.items()}
        values: dict[str, Any] = {**self._parameters, **self._buffers, **parts}
        if isinstance(self.template, list | tuple):
            return type(self.template)(values.get(str(i), part) for i, part in enumerate(self.template))
        if isinstance(self.template, _InverseTransform):
            return values["_inv"].inv
        # The object is a shallow copy, since the constructor of a distribution would validate its tensors again.
        made = object.__new__(type(self.template))
        state = vars(made)
        state.update(vars(self.template), **values)
        if isinstance(made, Distribution):
            # Without a choice of its own it follows Pyro, and not torch, whose setting the import of Zuko switches off.
            state["_validate_args"] = state.get("_validate_args", True) and is_validated()
        return made

    def extra_repr(self) -> str:
        return type(self.template).__name__


def is_validated() -> bool:
    """Return whether distributions check their values: as Pyro is set, but not in torch.compile or ``torch.func``."""
    return bool(is_validation_enabled()) and not torch.compiler.is_compiling() and not is_under_func()


def _can_hold_tensors(value: Any) -> bool:
    # Pyro's ops are the parts of its Gaussian hidden Markov models.
    is_part = isinstance(value, Distribution | Transform | Constraint) or type(value).__module__.startswith("pyro.ops.")
    return is_part or type(value) in (list, tuple)


def _attributes(owner: Any) -> Mapping[str, Any]:
    """Return the attributes of an object that determine it, without those that it computed from others.

    A lazy property leaves its value among the attributes. What a distribution has before its batch shape, which
    torch's constructor sets, was given: a multivariate normal has the matrix that it was made of there.
    """
    if isinstance(owner, list | tuple):
        return {str(i): part for i, part in enumerate(owner)}
    attributes = dict(vars(owner))
    names = list(attributes)
    given = names[: names.index("_batch_shape")] if "_batch_shape" in attributes else []
    for name in names:
        if name not in given and isinstance(getattr(type(owner), name, None), lazy_property):
            del attributes[name]
    if isinstance(owner, Transform) and not isinstance(owner, _InverseTransform):
        del attributes["_inv"]  # it refers to the inverse, which refers to this transform
    if "_cached_x_y" in attributes:
        attributes["_cached_x_y"] = None, None
    return attributes


def _without(owner: Any, names: list[str]) -> Any:
    """Return a shallow copy of an object without the attributes of these names and those that it computed."""
    if not names:
        return owner
    if isinstance(owner, list | tuple):
        return type(owner)(None if str(i) in names else part for i, part in enumerate(owner))
    template = copy.copy(owner)
    kept = {name: value for name, value in _attributes(owner).items() if name not in names}
    vars(template).clear()
    vars(template).update(kept)
    if isinstance(template, Transform):
        template._inv = None
    return template
