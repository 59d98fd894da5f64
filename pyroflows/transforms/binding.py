"""Binding of modules to the tensors that they hold at one moment."""

import copy
from itertools import chain, islice
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

# A copy of a module shares objects that hold no tensors, and what torch itself keeps in each module, such as hooks.
_PLAIN = (bool, int, float, str, torch.Size, type(None), type)
_OF_TORCH = frozenset(vars(nn.Module()))


class Places:
    """The dictionaries in which modules, and those that they own, hold their tensors.

    They stay the same as long as no module is replaced, so that one search serves many bindings.

    Args:
        roots: the modules.

    Attributes:
        roots: the modules that were given.
        modules: these and all that they own.
        slots: the dictionaries of parameters and buffers that are not empty.
        names: the names of tensors in them, one after the other.
        sizes: the number of tensors in each.

    Example:
        >>> places = Places(torch.nn.Linear(1, 1))
        >>> places.names, len(places.tensors_now()), places.are_current
        (['weight', 'bias'], 2, True)
    """

    def __init__(self, *roots: nn.Module) -> None:
        self.roots = roots
        self.modules = list(roots)
        for module in self.modules:  # The list grows while it is read.
            # A module of TorchScript holds its tensors elsewhere, and no others can take their place.
            self.modules += [
                part for part in module._modules.values() if isinstance(part, nn.Module) and not _is_script(part)
            ]
        self._branches = [module._modules for module in self.modules if module._modules]
        self._parts = self._parts_now()
        held = chain.from_iterable((module._parameters, module._buffers) for module in self.modules)
        self.slots: list[Any] = [slots for slots in held if slots]
        self.names = list(chain.from_iterable(self.slots))
        self.sizes = list(map(len, self.slots))

    @property
    def are_current(self) -> bool:
        """Whether no module was replaced, and none has tensors with other names."""
        return self._parts == self._parts_now() and self.sizes == list(map(len, self.slots))

    def tensors_now(self) -> list[Any]:
        """Return the tensors that the modules hold now, in the order of the names; None for one that is unset."""
        return list(chain.from_iterable(map(dict.values, self.slots)))

    def _parts_now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._branches)))


class Binding:
    """The tensors that modules hold when it is made, and these modules with them at any later time.

    ``torch.func.functional_call`` puts other tensors into a module for the time of one call; and a buffer that is
    assigned anew is another tensor. A binding refers to the tensors themselves, so a change of one in place is seen.

    Args:
        places: where the modules hold their tensors.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> zeros = {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}
        >>> layer.forward = lambda: Binding(Places(layer))
        >>> binding = torch.func.functional_call(layer, zeros, ())
        >>> binding.is_current, [tensor.sum().item() for tensor in binding.tensors()]
        (False, [0.0, 0.0])
        >>> binding.modules[0].weight is zeros["weight"]
        True
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._held = places.tensors_now()
        self._copies: tuple[nn.Module, ...] | None = None

    @property
    def is_current(self) -> bool:
        """Whether the modules hold these tensors now."""
        now = self._places.tensors_now()
        return len(now) == len(self._held) and all(map(is_, now, self._held))

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules if they hold these tensors now, else copies that do, and that share all else with them."""
        if self.is_current:
            return self._places.roots
        if self._copies is None:
            self._copies = self._copied()
        return self._copies

    def tensors(self) -> list[Tensor]:
        """Return the tensors."""
        return [tensor for tensor in self._held if tensor is not None]

    def _copied(self) -> tuple[nn.Module, ...]:
        named = zip(self._places.names, self._held, strict=True)
        pairs: list[Any] = [
            (s, dict(islice(named, n))) for s, n in zip(self._places.slots, self._places.sizes, strict=True)
        ]
        # Like the memo of deepcopy, this one tells by identity what takes the place of an object. The tensors that were
        # bound stay themselves, and take the place of those that the modules hold now.
        memo: dict[int, Any] = {id(module): object.__new__(type(module)) for module in self._places.modules}
        memo |= {id(now): held[name] for slots, held in pairs for name, now in slots.items() if name in held}
        memo |= {id(tensor): tensor for tensor in self.tensors()}
        held_of = {id(slots): held for slots, held in pairs}
        for module in self._places.modules:
            state = dict(vars(module))
            for name, value in state.items():
                # An object such as a torch transform may refer to modules and tensors.
                if name not in _OF_TORCH and not isinstance(value, _PLAIN):
                    state[name] = copy.deepcopy(value, memo)
            for kind in ("_parameters", "_buffers"):
                state[kind] = dict(held_of.get(id(state[kind]), state[kind]))
            state["_modules"] = {name: memo.get(id(part), part) for name, part in module._modules.items()}
            vars(memo[id(module)]).update(state)
        return tuple(memo[id(root)] for root in self._places.roots)


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)
