"""Read flows from the files that ``flow.save`` writes; no pickle is involved."""

from pathlib import Path

from pyroflows.archive import read_archive
from pyroflows.errors import CheckpointError
from pyroflows.flows.encoding import FORMAT, decode
from pyroflows.flows.flow import Flow


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
    try:
        flow = decode(header["flow"], tensors)
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(flow, Flow):
        raise CheckpointError(f"{path} holds a {type(flow).__name__}, not a flow")
    return flow
