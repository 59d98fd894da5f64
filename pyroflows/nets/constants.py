"""Buffers that follow from the arguments of a constructor, such as the masks of a network."""

from typing import Any

from torch import Tensor, nn


class Constants(nn.Module):
    """The base class of modules with buffers that the arguments of their constructor determine.

    These buffers are in no state dict. They are computed anew where a state is loaded, so that a module that has moved
    to the meta device and back, which empties all tensors, is what it was once it has loaded its state.

    A subclass writes :meth:`constants`, and calls :meth:`register_constants` in its constructor.

    Example:
        >>> class Reversed(Constants):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.size = size
        ...         self.register_constants()
        ...     def constants(self):
        ...         return {"index": torch.arange(self.size - 1, -1, -1)}
        >>> module = Reversed(3).to("meta").to_empty(device="cpu")
        >>> module.load_state_dict({}), module.index
        (<All keys matched successfully>, tensor([2, 1, 0]))
    """

    def constants(self) -> dict[str, Tensor | None]:
        """Return the buffers by name, computed from attributes that are no tensors; None for one that is unset.

        A name may be a path, such as "input.mask" for a buffer of a submodule, which registers it itself.
        """
        raise NotImplementedError

    def register_constants(self) -> None:
        """Register the buffers of this module."""
        for name, value in self.constants().items():
            if "." not in name:
                self.register_buffer(name, value, persistent=False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        for path, value in self.constants().items():
            owner, _, name = path.rpartition(".")
            buffers = self.get_submodule(owner)._buffers
            held = buffers.get(name)
            if value is None or held is None:
                continue
            if not held.is_meta:
                held.copy_(value)
            elif local_metadata.get("assign_to_params_buffers"):
                # Tensors of the state take the place of those without values: constants go where they are.
                loaded = next((t for key, t in state_dict.items() if key.startswith(prefix)), value)
                buffers[name] = value.to(loaded.device, held.dtype)
