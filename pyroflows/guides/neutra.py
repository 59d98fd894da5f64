"""The map from a guide's unconstrained space to that of Pyro, where the two differ."""

from pyro.poutine import Trace
from torch import Tensor

from pyroflows.models.bijections import Bijection, declared_bijection
from pyroflows.models.layout import Layout
from pyroflows.models.supports import has_declared_support
from pyroflows.transforms import FlowTransform


class ToDeclaredSpace(FlowTransform):
    """Map packed vectors of a guide to those from which Pyro's handlers would get the same values of the sites.

    ``NeuTraReparam`` maps to each site's values by the support that the site's distribution declares. This is too large
    for angles, and behind some transforms, see :func:`pyroflows.models.supports.support_of`.

    Args:
        layout: the layout of the guide's vectors.
        trace: a run of the model.
    """

    def __init__(self, layout: Layout, trace: Trace) -> None:
        super().__init__(layout.dim)
        self._sites: list[tuple[slice, Bijection, Bijection]] = []
        for site in layout.structure.latents:
            fn = trace.nodes[site.name]["fn"]
            if not has_declared_support(fn):
                assert site.bijection is not None
                declared = declared_bijection(fn, site.shape)
                self._sites.append((layout.slices[site.name], site.bijection, declared))

    @property
    def is_identity(self) -> bool:
        """Whether every site has the support that its distribution declares."""
        return not self._sites

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._mapped(z, self._sites)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._mapped(x, [(part, declared, ours) for part, ours, declared in self._sites])

    def _mapped(self, vector: Tensor, sites: list[tuple[slice, Bijection, Bijection]]) -> tuple[Tensor, Tensor]:
        batch_shape = vector.shape[:-1]
        total = vector.new_zeros(batch_shape)
        mapped = vector.clone()
        for part, there, back in sites:
            value, ladj = there.constrain(vector[..., part].reshape(batch_shape + there.unconstrained_shape))
            u = back.unconstrain(value)
            _, back_ladj = back.constrain(u)
            total = total + (ladj - back_ladj).reshape((*batch_shape, -1)).sum(-1)
            mapped[..., part] = u.reshape((*batch_shape, -1))
        return mapped, total
