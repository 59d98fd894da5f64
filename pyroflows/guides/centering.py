"""The layer between a flow and the latents of a hierarchical model, which learns how far each of them is centred."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import CheckpointError, ModelError
from pyroflows.models.centred_forms import CentredForms, hierarchical_sites
from pyroflows.models.layout import Layout
from pyroflows.models.tracing import Model
from pyroflows.transforms import FlowTransform


class Centering(FlowTransform):
    r"""Map partially non-centred vectors to the unconstrained vectors of a model, with a learned centredness.

    .. math:: u = m(u_{<}) + s(u_{<})^{1 - c} (v - c\, m(u_{<})), \qquad
        \log\left|\det \frac{\partial u}{\partial v}\right| = \sum_i (1 - c_i) \log s_i

    m and s are the location and the scale that the other latents, which come before in the model, give the prior of a
    component in the unconstrained space. A centredness c = 1 is the centred form, where the layer is the identity, and
    c = 0 the non-centred one (Gorinova, Moore and Hoffman 2020, arXiv:1906.03028). Any c makes a bijection. A Gaussian
    prior with a Cholesky factor L has the form u = m + L v, whatever c is.

    Each direction costs one run of the model up to the last of the sites, without its likelihood. The layer holds c
    alone; :meth:`bind` gives it the model.

    Args:
        names: the sites that the layer changes.
        centredness: c, ``(dim,)``; the entries of other sites do not matter.

    Shapes: v and u are ``(..., dim)``.

    Raises:
        ModelError: at a call, if the layer has no model, as after a copy by pickle.

    Example:
        >>> from pyroflows.models.layout import Layout
        >>> from pyroflows.models.structure import describe
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale))
        >>> layer = Centering(("x",), torch.zeros(2))
        >>> layer.bind(CentredForms(model, (), {}, Layout(describe(model, (), {})), ("x",), torch.zeros(2)))
        >>> layer.forward_and_ladj(torch.tensor([1.0, 2.0]))  # x = 2 e
        (tensor([1.0000, 5.4366], grad_fn=<ViewBackward0>), tensor(1., grad_fn=<ViewBackward0>))
    """

    image: Tensor

    def __init__(self, names: tuple[str, ...], centredness: Tensor) -> None:
        super().__init__(len(centredness))
        self.names = names
        self.centredness = nn.Parameter(centredness.detach().clone())
        self.register_buffer("image", torch.zeros_like(centredness))
        self._forms: CentredForms | None = None

    def bind(self, forms: CentredForms) -> None:
        """Give the layer the priors of a model at its arguments.

        Args:
            forms: the map of the sites of this layer.
        """
        self._forms = forms

    @classmethod
    def of(cls, model: Model, args: Any, kwargs: Any, layout: Layout, center: Tensor) -> "Centering | None":
        """Make the non-centred layer of a model; None if no prior has a location or a scale from other latents.

        Args:
            model: a Pyro model.
            args: its positional arguments.
            kwargs: its keyword arguments.
            layout: the layout of its latents.
            center: an unconstrained vector ``(dim,)`` at which the model can run.
        """
        names = hierarchical_sites(model, args, kwargs, layout, center)
        if not names:
            return None
        made = cls(names, torch.zeros_like(center))
        made.bind(CentredForms(model, args, kwargs, layout, names, center))
        made.note_priors()
        return made

    @torch.no_grad()
    def note_priors(self) -> None:
        """Note an image, by which a loaded layer can tell whether the priors are those that it has learned with."""
        self.image.copy_(self._image())

    @torch.no_grad()
    def require_priors(self) -> None:
        """Raise if the priors are not those of the last :meth:`note_priors`.

        Raises:
            CheckpointError: if so.
        """
        tolerance = torch.finfo(self.image.dtype).eps ** 0.5
        if not torch.allclose(self._image(), self.image, rtol=tolerance, atol=tolerance):
            raise CheckpointError(
                f"the priors of the sites {list(self.names)}, through which the draws of this flow pass, are other "
                "ones at these arguments than in the fit: give the model the arguments of the fit, and then those of "
                "another data set by posterior.with_data(...)"
            )

    def _image(self) -> Tensor:
        zeros = torch.zeros_like(self.image)
        return self._bound().forward(zeros[None] + 0.5, zeros)[0][0]

    def at(self, centredness: Tensor) -> "Centering":
        """The layer of the same priors with another centredness."""
        made = Centering(self.names, centredness)
        made._forms = self._forms
        return made

    def in_layout(self, layout: Layout) -> "Centering":
        """The same layer for the vectors of another layout of the same latents."""
        made = copy.copy(self)
        made._forms = self._bound().in_layout(layout)
        return made

    @property
    def changed(self) -> Tensor:
        """Which components the layer changes, booleans ``(dim,)``."""
        return self._bound().changed

    @property
    def is_bound(self) -> bool:
        """Whether the layer has a model."""
        return self._forms is not None

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._mapped(self._bound().forward, z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._mapped(self._bound().inverse, x)

    def _mapped(self, function: Any, vectors: Tensor) -> tuple[Tensor, Tensor]:
        batch_shape = vectors.shape[:-1]
        if not batch_shape.numel():
            return vectors, vectors.new_zeros(batch_shape)
        image, ladj = function(vectors.reshape(-1, self.dim), self.centredness)
        return image.reshape(vectors.shape), ladj.reshape(batch_shape)

    def _bound(self) -> CentredForms:
        if self._forms is None:
            raise ModelError(
                f"this flow needs the priors of sites {list(self.names)}, and it has lost its model, as a pickled flow "
                "does: load the posterior by pf.load_posterior(path, model, *args), or call the guide with the model"
            )
        return self._forms


def centerings(flow: nn.Module) -> list[Centering]:
    """The layers of a flow, or of a mixture of flows, that need the priors of a model."""
    return [part for part in flow.modules() if isinstance(part, Centering)]
