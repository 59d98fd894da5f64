"""A guide's parameters in Pyro's store, where they may meet those of another guide, or of a file."""

from collections.abc import MutableMapping

import pyro
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# The parameters that guides have put into Pyro's store. Any other tensor there under a guide's name was loaded from a
# file. Nothing else tells the two apart, since loaded tensors are parameters too, under the same names.
_PARAMETERS: MutableMapping[Tensor, None] = WeakIdKeyDictionary()


def claim_parameters(name: str, flow: nn.Module, takes_loaded: bool) -> None:
    """Put the parameters of a guide's flow into Pyro's store under the guide's names.

    ``pyro.module`` keeps a tensor that is already there under the same name, and a step of SVI would then train that
    tensor instead. Either it belongs to another guide of this name, which puts it back when it is called, or it was
    loaded from a file.

    Args:
        name: the name of the flow in the store.
        flow: the flow.
        takes_loaded: whether values that were loaded from a file go into the flow's parameters.
    """
    store = pyro.get_param_store()
    for parameter_name, parameter in flow.named_parameters():
        full_name = param_with_module_name(name, parameter_name)
        if full_name in store and (stored := store[full_name].unconstrained()) is not parameter:
            is_loaded = stored not in _PARAMETERS
            if is_loaded and takes_loaded and stored.shape == parameter.shape:
                parameter.data.copy_(stored.detach())
            del store[full_name]
        _PARAMETERS[parameter] = None
