r"""Runs of a model in which discrete latents take all of their values at once, and are summed out of the log joint.

For continuous latents x, discrete latents z and data y the log joint of a run is

.. math:: \log p(x, y) = \log \sum_z p(x, z, y).

Pyro's ``EnumMessenger`` gives each discrete site its values along a dimension of its own, left of those of plates, and
Pyro's tensor variable elimination (Obermeyer et al. 2019, arXiv:1902.03210) sums over them plate by plate, so that the
cost grows with the number of rows, and with the length of a ``pyro.markov`` chain, instead of exponentially.

As for Pyro's ``TraceEnum_ELBO``, a mask acts inside of the sum and a scale outside of it. A mask does not act on the
prior of a discrete site, which sums to one where nothing depends on the site.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.discrete import _sample_posterior_from_trace
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from torch import Tensor

from pyroflows.errors import ModelError
from pyroflows.models.factors import Factor, connected, sum_of_products
from pyroflows.models.replicates import draw_site
from pyroflows.models.run import LogsBySite, RunHandler, RunOptions, SiteValues
from pyroflows.models.shared_results import SharedResults
from pyroflows.models.structure import Enumeration
from pyroflows.models.tracing import follows_from_others

# Torch has no tensors of more than 64 dimensions, of which plates and events need some.
MAX_DIMS = 50


@contextmanager
def run_handler(
    options: RunOptions,
    values: SiteValues,
    subsample: SiteValues,
    logs: LogsBySite,
    kept: SiteValues,
    single: bool,
) -> Iterator[RunHandler]:
    """A context for one run of a model; its arguments are those of :class:`RunHandler`.

    Raises:
        ModelError: if the discrete sites cannot be summed out; names one, and says what to do.
    """
    if options.enumeration is None:
        with RunHandler(options, values, subsample, logs, kept, single) as handler:
            yield handler
        return
    names = options.enumeration.names
    run = EnumeratedRun(options, values, subsample, logs, kept, single)
    config = InferConfigMessenger(lambda site: _infer_config(site, names))
    # One dimension is left free for an outer plate over draws, whether or not there is one.
    with EnumMessenger(-2 - options.enumeration.nesting), run, config, _sharing(options.enumeration):
        yield run
    if options.enumeration.is_drawn:
        run.draw()
    else:
        run.sum_out()


class EnumeratedRun(RunHandler):
    """An effect handler as :class:`RunHandler`, inside of Pyro's ``EnumMessenger``."""

    def __init__(
        self,
        options: RunOptions,
        values: SiteValues,
        subsample: SiteValues,
        logs: LogsBySite,
        kept: SiteValues,
        single: bool,
    ) -> None:
        super().__init__(options, values, subsample, logs, kept, single)
        assert options.enumeration is not None
        self._names, self._unscored = options.enumeration.names, options.enumeration.unscored
        self._nesting = options.enumeration.nesting
        self.max_plate_nesting = self._nesting
        # The sites that are discrete, or depend on one that is.
        self._trace = Trace()
        self._supports: dict[int, list[Tensor]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self._unscored:
            msg["value"] = draw_site(name, msg["fn"], None)
        elif name not in self._names:  # EnumMessenger comes next, and gives discrete sites their values
            super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self._names:
            self._note_values(msg)
        if msg["name"] in self._unscored:
            return
        if msg["name"] in self._kept and self._is_enumerated(msg["fn"].batch_shape):
            raise ModelError(
                f"the masked latent site '{msg['name']}' depends on a discrete site, and has entries on which nothing "
                "depends: leave these out of the site"
            )
        super()._pyro_post_sample(msg)

    def _note_values(self, msg: Any) -> None:
        """Let sites with the same values along the same dimension have one tensor of them, for SharedResults."""
        dim, value = msg["infer"]["_enumerate_dim"], msg["value"]
        if -dim > MAX_DIMS:
            raise ModelError(
                f"too many discrete sites stand neither in a plate nor in pyro.markov, the last one of them "
                f"'{msg['name']}': use 'with pyro.plate(...)' for sites that are independent given the rest, and "
                "pyro.markov for chains"
            )
        for other in self._supports.setdefault(dim, []):
            if other.dtype == value.dtype and torch.equal(other, value):
                msg["value"] = other
                return
        self._supports[dim].append(value)

    def _shape(self, msg: Any) -> torch.Size:
        shape = super()._shape(msg)
        num = min(self._nesting + msg["fn"].event_dim, len(shape))
        shape = shape[len(shape) - num :]
        # A site outside of plates has dimensions of one where those of plates are.
        while len(shape) > self._values[msg["name"]].dim() and shape[0] == 1:
            shape = shape[1:]
        return shape

    def _note_nesting(self, msg: Any) -> None:
        """Let the nesting be that without enumeration, which is known."""

    def _record_value(self, msg: Any) -> None:
        if msg["name"] not in self._names and not follows_from_others(msg):
            super()._record_value(msg)

    def _record_log_prob(self, msg: Any, log_prob: Tensor, scale: float | Tensor) -> None:
        name = msg["name"]
        is_discrete = name in self._names
        # A model may change its mask in place later, as Pyro's example of capture and recapture does.
        mask = msg["mask"].clone() if isinstance(msg["mask"], Tensor) else msg["mask"]
        log_prob = log_prob if is_discrete else scale_and_mask(log_prob, mask=mask)
        if not is_discrete and not self._is_enumerated(log_prob.shape):
            self.record.log_probs[name] = scale_and_mask(log_prob, scale)
            return
        self.factor_sizes.append(log_prob.numel())
        node = {key: msg[key] for key in ("type", "name", "fn", "value", "infer", "cond_indep_stack")}
        # A given value counts as observed when discrete sites are drawn.
        node |= {"mask": None, "scale": scale, "is_observed": not is_discrete}
        self._trace.add_node(name, **node, log_prob=log_prob, unscaled_log_prob=log_prob)

    def _is_enumerated(self, shape: torch.Size) -> bool:
        return shape[: max(len(shape) - self._nesting - 1, 0)].numel() > 1

    def sum_out(self) -> None:
        """Record the log-densities of sites that depend on discrete ones, summed over these.

        The sum has the batch dimensions that all of its sites have in common, so that it is pointwise where discrete
        sites are local to rows. Sites that depend on the same discrete sites are recorded as one.
        """
        nodes = self._declared_nodes()
        self._trace.symbolize_dims()
        factors = [Factor.of(node, self._trace.plate_to_symbol) for node in nodes]
        for members in connected(factors):
            names = tuple(factor.site for factor in members if factor.site not in self._names)
            key = _joint_name(names or tuple(factor.site for factor in members))
            self.groups[key] = names
            scale = _common_scale([self._trace.nodes[factor.site] for factor in members])
            total = sum_of_products(members, self._trace.symbol_to_dim)
            while total.dim() > self._nesting and total.shape[0] == 1:  # where there is no outer plate
                total = total[0]
            self.record.log_probs[key] = scale_and_mask(total, scale)

    def draw(self) -> None:
        """Draw all discrete sites from their joint conditional given the other sites; record their values alone."""
        self.record.values.clear()
        self.record.log_probs.clear()
        nodes = [node for node in self._declared_nodes() if node["name"] in self._names]
        if not nodes:
            return
        self._trace.pack_tensors()
        # Pyro multiplies factors of one dtype alone.
        dtype = reduce(torch.promote_types, (node["log_prob"].dtype for node in self._trace.nodes.values()))
        for node in self._trace.nodes.values():
            packed = node["packed"]["log_prob"]
            converted: Any = packed.to(dtype)
            converted._pyro_dims = packed._pyro_dims
            node["packed"]["log_prob"] = node["packed"]["masked_log_prob"] = converted
        supports = [node["value"].reshape(-1, *node["fn"].event_shape) for node in nodes]
        for node, support in zip(nodes, supports, strict=True):
            # Pyro draws values without event dimensions alone, hence the place of a value among all of them.
            places = torch.arange(len(support), device=support.device)
            node["value"] = places.reshape((-1,) + (1,) * (-1 - node["infer"]["_enumerate_dim"]))

        def drawn() -> list[Tensor]:
            return [pyro.sample(node["name"], node["fn"], infer={"enumerate": "parallel"}) for node in nodes]

        with torch.no_grad():
            found = _sample_posterior_from_trace(drawn, self._trace, 1, False)
        for node, support, places in zip(nodes, supports, found, strict=True):
            self.record.values[node["name"]] = support[places.expand(_plate_shape(node))]

    def _declared_nodes(self) -> list[Any]:
        """The nodes of the trace, none of which has a dimension that is neither a plate's nor a discrete site's."""
        nodes = list(self._trace.nodes.values())
        for node in nodes:
            shape = node["log_prob"].shape
            declared = {frame.dim for frame in node["cond_indep_stack"] if frame.vectorized}
            for dim in range(-min(self._nesting, len(shape)), 0):
                if shape[dim] > 1 and dim not in declared:
                    raise ModelError(
                        f"site '{node['name']}' has batch dimension {dim} of size {shape[dim]}, which no plate "
                        "declares, and is, or depends on, a discrete site that is summed out: put the site into 'with "
                        "pyro.plate(...)', or declare the dimension as part of one value by .to_event(1)"
                    )
        return nodes


def _sharing(enumeration: Enumeration) -> AbstractContextManager[Any]:
    # To find shared results takes longer than small operations do; it pays where they are recorded or differentiated.
    return SharedResults() if enumeration.shares_results and torch.is_grad_enabled() else nullcontext()


def _infer_config(site: Any, names: frozenset[str]) -> dict[str, Any]:
    """Mark the discrete sites for enumeration, however the model marks them, and no other site."""
    if site["type"] != "sample" or site["name"] not in names:
        return {"enumerate": None}
    return {"enumerate": "parallel", "expand": False, "num_samples": None}


def _plate_shape(node: Any) -> torch.Size:
    """The shape that the plates around a site give its values."""
    sizes = {frame.dim: frame.size for frame in node["cond_indep_stack"] if frame.vectorized}
    # A plate without a size takes that of the sites in it.
    lengths = {dim: size if size != -1 else node["fn"].batch_shape[dim] for dim, size in sizes.items()}
    return torch.Size(lengths.get(dim, 1) for dim in range(min(lengths, default=0), 0))


def _common_scale(nodes: list[Any]) -> float | Tensor:
    """The scale of sites that are summed over together, which acts on the sum as a whole."""
    first = nodes[0]
    for node in nodes:
        if torch.as_tensor(node["scale"]).dim():
            raise ModelError(
                f"site '{node['name']}' has a scale for each of its entries, and is, or depends on, a discrete site "
                "that is summed out: give poutine.scale a single number"
            )
        if float(node["scale"]) != float(first["scale"]):
            raise ModelError(
                f"sites '{first['name']}' and '{node['name']}' have the scales {float(first['scale']):g} and "
                f"{float(node['scale']):g}, and depend on the same discrete sites, which are summed out: give them one "
                "scale, or run a plate that is subsampled with all its rows"
            )
    return first["scale"]


def _joint_name(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} to {names[-1]}"
