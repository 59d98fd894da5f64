"""Read flows from the files that ``flow.save`` writes; no pickle is involved."""

from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pyroflows.archive import decoding, read_archive
from pyroflows.errors import CheckpointError, DataError, OptionError
from pyroflows.flows.encoding import FORMAT, decode
from pyroflows.flows.flow import Flow
from pyroflows.randomness import seeded

# Another number than the sizes of many flows, with which tensors of a wrong shape would broadcast.
NUM_DRAWS = 5


def load_flow(path: str | Path) -> Flow:
    """Read a flow that :meth:`pyroflows.Flow.save` wrote, with its layers, base, support, and trained state.

    The flow is on the CPU and has the dtype that it had. Reading runs no code from the file and leaves the random state
    as it is.

    Args:
        path: the path of the file.

    Raises:
        CheckpointError: if the file cannot be read, is damaged, holds something else than a flow, or was written by a
            version whose format this one does not know.

    Example:
        >>> import tempfile
        >>> flow = pf.flows.NSF(2, bound=3.0, support=torch.distributions.constraints.positive)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     flow.save(f"{folder}/flow.safetensors")
        ...     loaded = pf.load_flow(f"{folder}/flow.safetensors")
        >>> x = flow().sample((5,))
        >>> torch.equal(loaded().log_prob(x), flow().log_prob(x))
        True
    """
    header, tensors = read_archive(path, "flow", FORMAT)
    with decoding(path):
        flow = decode(header["flow"], tensors)
        if not isinstance(flow, Flow):
            raise CheckpointError(f"it holds a {type(flow).__name__}, not a flow")
        require_sense(flow)
    return flow


def require_sense(flow: Flow, context: Tensor | None = None) -> None:
    """Raise whatever a flow raises whose parts are not what a file says of them, at a draw and its log-density.

    Args:
        flow: the flow.
        context: a context, if it takes one; without one, such a flow is not tried.
    """
    flow.state_dict()
    if flow.context_shape and context is None:
        return
    # A draw of a mixture needs one of its flows alone.
    parts = [flow] if len(flow.components) == 1 else [flow, *flow.components]
    with seeded(0), torch.no_grad():
        for part in parts:
            law = part() if context is None else part(context)
            shape = torch.Size([NUM_DRAWS, *law.batch_shape])
            # Not every base has a sampler, and flows whose training diverged are what they are.
            with suppress(NotImplementedError, OptionError, DataError):
                draws = law.sample((NUM_DRAWS,))
                if draws.shape != shape + flow.event_shape or law.log_prob(draws).shape != shape:
                    raise CheckpointError("the draws of its flow have another shape than it says")
