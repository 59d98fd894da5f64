r"""The latents whose priors get a location or a scale from other latents, and their partially non-centred forms.

With the location m and the scale s that the parents of a site give its prior in the unconstrained space, and the
centredness c of a component,

.. math:: u = m + s^{1 - c} (v - c m), \qquad \log|\partial u / \partial v| = (1 - c) \log s

(Gorinova, Moore and Hoffman 2020, arXiv:1906.03028). c = 1 is the centred form, u = v, and c = 0 the non-centred one,
u = m + s v. A Gaussian with a Cholesky factor L has the second alone, u = m + L v. Parents come first in a model, so
that the map of all latents is triangular in the order of the model, and one run of the model computes it, in either
direction.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.autoguide import init_to_value
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor

from pyroflows.models.batching import NUM_EXAMPLES, NUM_FAR, BatchedModel
from pyroflows.models.layout import Layout, pack, unpack
from pyroflows.models.run import LogsBySite, RunHandler, RunOptions, SiteValues
from pyroflows.models.runner import ModelRunner
from pyroflows.models.structure import Site
from pyroflows.models.tracing import Model, trace_model
from pyroflows.randomness import seeded

# The families whose priors have a location and a scale in the unconstrained space, of which a LogNormal is the
# logarithm.
LOC_AND_SCALE = (dist.Normal, dist.LogNormal, dist.StudentT, dist.Cauchy, dist.Laplace, dist.Logistic)
# The priors at so many values of the other latents show which of them depend on these.
NUM_LOOKS = 3


def loc_and_scale(fn: Any) -> tuple[Tensor, Tensor] | None:
    """The location and the scale of a prior in the unconstrained space, tensors that broadcast with its values.

    Args:
        fn: the distribution of a site.

    Returns:
        The location, and the scale or the Cholesky factor; None if the prior has none.

    Example:
        >>> loc_and_scale(dist.LogNormal(1.0, 2.0).expand([3]).to_event(1))
        (tensor([1., 1., 1.]), tensor([2., 2., 2.]))
        >>> loc_and_scale(dist.HalfNormal(1.0)) is None
        True
    """
    while isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.MultivariateNormal):
        return fn.loc, fn.scale_tril
    return (fn.loc, fn.scale) if isinstance(fn, LOC_AND_SCALE) else None


def hierarchical_sites(model: Model, args: Any, kwargs: Any, layout: Layout, center: Tensor) -> tuple[str, ...]:
    """Find the latents whose priors have a location or a scale that depends on other latents.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of its latents.
        center: an unconstrained vector ``(dim,)`` around which the priors are compared.

    Returns:
        The names of the sites, in the order of the model.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale))
        >>> hierarchical_sites(model, (), {}, Layout(describe(model, (), {})), torch.zeros(2))
        ('x',)
    """
    names = {site.name for site in layout.structure.latents}
    found: list[dict[str, tuple[Tensor, Tensor]]] = []
    with seeded(0), pyro.validation_enabled(False):
        for i in range(NUM_LOOKS):
            values, _ = layout.constrain(center + 0.3 * i * torch.randn(layout.dim).to(center))
            try:
                trace = trace_model(model, args, kwargs, init_to_value(values=values))
            except Exception:  # a model may raise anything at values that are not its own
                continue
            priors = {name: loc_and_scale(trace.nodes[name]["fn"]) for name in names & trace.nodes.keys()}
            found.append({name: prior for name, prior in priors.items() if prior is not None})
            if not found[0]:
                break
    return tuple(
        site.name
        for site in layout.structure.latents
        if any(_differ(found[0][site.name], other.get(site.name)) for other in found[1:] if site.name in found[0])
    )


def _differ(prior: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor] | None) -> bool:
    return other is not None and not all(torch.equal(a, b) for a, b in zip(prior, other, strict=True))


class CentredForms:
    r"""The map from partially non-centred vectors v of a model to its unconstrained vectors u, and its inverse.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        layout: the layout of its latents.
        names: the sites that the map changes, such as those of :func:`hierarchical_sites`.
        center: an unconstrained vector ``(dim,)`` around which ways of running a batch are compared with single runs.

    Attributes:
        names: the sites that the map changes.
        changed: which components these are, booleans ``(dim,)``.

    Example:
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(3.0, scale))
        >>> layout = Layout(describe(model, (), {}))
        >>> forms = CentredForms(model, (), {}, layout, ("x",), torch.zeros(2))
        >>> u, ladj = forms.forward(torch.ones(1, 2), centredness=torch.zeros(2))
        >>> u, ladj  # x = 3 + e
        (tensor([[1.0000, 5.7183]]), tensor([1.]))
        >>> forms.inverse(u, centredness=torch.zeros(2))[0]
        tensor([[1., 1.]])
    """

    def __init__(
        self, model: Model, args: Any, kwargs: Any, layout: Layout, names: tuple[str, ...], center: Tensor
    ) -> None:
        self.names = names
        self._layout = layout
        self.changed = torch.zeros(layout.dim, dtype=torch.bool)
        for name in names:
            self.changed[layout.slices[name]] = True
        # What comes after the last of the sites does not matter.
        order = [site.name for site in layout.structure.latents]
        self._sites = {site.name: site for site in layout.structure.latents[: order.index(names[-1]) + 1]}
        with seeded(0), torch.no_grad():
            num = NUM_EXAMPLES + NUM_FAR
            scale = torch.linspace(0.1, 2.0, num)[:, None]
            examples = center + (scale * torch.randn(num, layout.dim)).to(center)
            subsample = {p.name: torch.randperm(p.size)[: p.subsample_size] for p in layout.structure.subsampled}
            examples[:, self.changed] -= center[self.changed]
            half = torch.full_like(center, 0.5)
            with _alone():
                self._forward = _Runs(model, args, kwargs, self, self._values(examples, half), subsample)
        self._inverse = self._forward.inverse()
        self._subsample = subsample

    def in_layout(self, layout: Layout) -> "CentredForms":
        """The same map of the vectors of another layout of the same latents."""
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(self.__dict__, _layout=layout)
        return made

    def forward(self, v: Tensor, centredness: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map v to u and :math:`\log|\det \partial u / \partial v|`.

        Args:
            v: vectors ``(S, dim)``.
            centredness: c, ``(dim,)``; that of other sites and of Gaussians with a Cholesky factor does not matter.
        """
        return self._run(self._forward, v, centredness)

    def inverse(self, u: Tensor, centredness: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map u to v and :math:`\log|\det \partial v / \partial u|`.

        Args:
            u: vectors ``(S, dim)``.
            centredness: c, ``(dim,)``, as for :meth:`forward`.
        """
        v, ladj = self._run(self._inverse, u, centredness)
        return v, -ladj

    def _run(self, runs: "_Runs", vectors: Tensor, centredness: Tensor) -> tuple[Tensor, Tensor]:
        num = len(vectors)
        with _alone():
            found = runs(self._values(vectors, centredness), num, self._subsample).log_probs
        parts, ladj = [], vectors.new_zeros(num)
        for site, part in self._layout.split(vectors):
            if site.name in self.names:
                parts.append(pack(site, found[_image(site.name)]))
                ladj = ladj + pack(site, found[site.name]).sum(-1)
            else:
                parts.append(part)
        return torch.cat(parts, -1), ladj

    def _values(self, vectors: Tensor, centredness: Tensor) -> dict[str, Tensor]:
        """The inputs of a batch of runs by site, and the centredness of each site that the map changes."""
        values = {}
        for site, part in self._layout.split(vectors):
            if site.name in self._sites:
                values[site.name] = unpack(site, part)
            if site.name in self.names:
                values[_image(site.name)] = unpack(site, centredness[self._layout.slices[site.name]].expand_as(part))
        return values

    def __deepcopy__(self, memo: Any) -> "CentredForms":
        return self  # Copies of a flow share the model and its data.

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()  # Files have neither a model nor its data.


@contextmanager
def _alone() -> Iterator[None]:
    """A context whose runs are apart from the handlers and plates around it, such as those of a guide."""
    around = (_PYRO_STACK, _PYRO_STACK[:]), (_DIM_ALLOCATOR._stack, _DIM_ALLOCATOR._stack[:])
    for stack, _ in around:
        stack.clear()
    try:
        yield
    finally:
        for stack, held in around:
            stack[:] = held


def _image(name: str) -> str:
    return f"image of {name}"


class _MapRunner(ModelRunner):
    """A model that maps the vectors of its sites, in one of the two directions."""

    forms: CentredForms
    is_inverse = False

    def _make_handler(
        self, values: SiteValues, subsample: SiteValues, logs: LogsBySite, kept: SiteValues, single: bool
    ) -> RunHandler:
        return _MapHandler(self.options, values, subsample, self.forms, self.is_inverse)


class _Runs(BatchedModel):
    """The model that maps vectors site by site. The log-densities of its records are images and log-determinants."""

    def __init__(
        self, model: Model, args: Any, kwargs: Any, forms: CentredForms, examples: SiteValues, subsample: SiteValues
    ) -> None:
        self._forms = forms
        super().__init__(model, args, kwargs, examples, subsample=subsample)

    def _make_runner(self, model: Model, args: Any, kwargs: Any, options: RunOptions, kept: SiteValues) -> ModelRunner:
        runner = _MapRunner(model, args, kwargs, options, kept)
        runner.forms = self._forms
        return runner

    def inverse(self) -> "_Runs":
        """The same runs for the inverse map."""
        made = copy.copy(self)
        made._runner = runner = copy.copy(self._runner)
        assert isinstance(runner, _MapRunner)
        runner.is_inverse = True
        return made

    def _warn(self, cost: str) -> None:
        """Say nothing, since the log joint of the model says the same."""


class _AllMapped(Exception):
    """The run has come to the last site that the map changes."""


class _MapHandler(RunHandler):
    """An effect handler that maps the vector of each site, given those of its parents."""

    def __init__(
        self, options: RunOptions, values: SiteValues, subsample: SiteValues, forms: CentredForms, is_inverse: bool
    ) -> None:
        super().__init__(options, values, subsample, {}, {}, single=False)
        self._sites, self._names, self._is_inverse = forms._sites, forms.names, is_inverse
        self.max_plate_nesting = forms._layout.structure.max_plate_nesting
        self._num_left = len(self._names)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._sites:
            super()._pyro_sample(msg)
            return
        given = self._values[name]
        u, ladj = given, torch.zeros_like(given)
        if name in self._names:
            prior = loc_and_scale(msg["fn"])
            assert prior is not None
            image, ladj = _mapped(given, *prior, self._values[_image(name)], self._is_inverse)
            u = given if self._is_inverse else image
            self._record(self._sites[name], _image(name), self._values[_image(name)], image)
        self._record(self._sites[name], name, given, ladj)
        bijection = self._sites[name].bijection
        assert bijection is not None
        msg["value"], _ = bijection.constrain(u)

    def _record(self, site: Site, name: str, value: Tensor, result: Tensor) -> None:
        assert site.unconstrained_shape is not None
        self.event_dims[name] = site.event_dim + len(site.unconstrained_shape) - len(site.shape)
        self.record.values[name], self.record.log_probs[name] = value, result

    def _pyro_post_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            self.rows[msg["name"]] = msg["value"]
        self._num_left -= msg["name"] in self._names
        if not self._num_left:
            raise _AllMapped

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> Any:
        super().__exit__(exc_type, exc_value, traceback)
        return exc_type is _AllMapped


def _mapped(given: Tensor, loc: Tensor, scale: Tensor, centredness: Tensor, is_inverse: bool) -> tuple[Tensor, Tensor]:
    r"""Map v to u, or u to v; and give :math:`\log|\partial u / \partial v|`, all of the shape of the given values."""
    if scale.dim() > loc.dim():  # a Cholesky factor
        ladj = scale.diagonal(dim1=-2, dim2=-1).log().expand_as(given)
        if is_inverse:
            return torch.linalg.solve_triangular(scale, (given - loc)[..., None], upper=False)[..., 0], ladj
        return loc + (scale @ given[..., None])[..., 0], ladj
    ladj = (1 - centredness) * scale.log()
    if is_inverse:
        return (given - loc) * (-ladj).exp() + centredness * loc, ladj
    return loc + ladj.exp() * (given - centredness * loc), ladj
