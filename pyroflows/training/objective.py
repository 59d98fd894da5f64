"""What a fit minimises, as a value: what a step draws, the loss of it, and what is recorded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyroflows.flows import Flow

Figures = Mapping[str, Tensor]


class Objective:
    """What a fit of a flow minimises. A subclass writes :meth:`draw` and :meth:`loss`; :func:`pyroflows.train` does the
    rest.

    A step of training is a function of the parameters and of what the step draws. It is recorded once and then runs
    without Python: so randomness, indices of rows and batches of data come from :meth:`draw`, and :meth:`loss` decides
    nothing by the values of its tensors.

    Args:
        flow: the flow that is trained.
        own_parameters: tensors that are trained beside the parameters of the flow.

    Attributes:
        flow: the flow.
        own_parameters: the other trained tensors.
        monitor: name of the figure that schedule and guard watch. Where it is "loss", the loss is recorded under it.
        falls: whether this figure falls while the fit gets better.

    Example:
        >>> class ToLaplace(pf.Objective):
        ...     def draw(self):
        ...         return [self.noise(64)]
        ...
        ...     def loss(self, noise):
        ...         x, log_q = self.flow().estimated().transport(self.base_draws(noise))
        ...         log_p = -(x - 3.0).abs().sum(-1)
        ...         return (log_q - log_p).mean(), {"mean": x.mean()}
        >>> flow = pf.flows.IAF(2, num_layers=2, hidden_dims=(8,))
        >>> history = pf.train(ToLaplace(flow), num_steps=300, seed=0, progress_bar=False)
        >>> sorted(history)
        ['grad_norm', 'learning_rate', 'loss', 'mean']
        >>> bool(abs(history["mean"][-1] - 3.0) < 0.5)
        True
    """

    monitor: str = "loss"
    falls: bool = True

    def __init__(self, flow: Flow, own_parameters: Iterable[Tensor] = ()) -> None:
        self.flow = flow
        self.own_parameters = list(own_parameters)
        # Asked once: the answer takes a noticeable part of a short step.
        self._trains_base = any(parameter.requires_grad for parameter in flow.base.parameters())

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that are trained, each once: parameters of the flow that are not frozen, and own ones."""
        trained = [*(p for p in self.flow.parameters() if p.requires_grad), *self.own_parameters]
        return list({id(parameter): parameter for parameter in trained}.values())

    @property
    def state(self) -> Sequence[nn.Module | Tensor]:
        """Modules and tensors that the loss reads besides the flow and whose values change during the fit.

        The recorded step reads them anew each time; whatever else it reads is a constant of the fit.
        """
        return ()

    def draw(self) -> Sequence[Tensor]:
        """The tensors that one step draws, of the same shapes each time: noise, indices of rows, batches of data."""
        return ()

    # These types let a subclass name what it draws.
    def loss(self, *drawn: Any, **_: Any) -> tuple[Tensor, Figures]:
        """The loss of what :meth:`draw` gave, a scalar, and figures to record, scalars by name."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def before_step(self) -> None:
        """Run before each step, outside of what is recorded; by default the flow's own hook."""
        self.flow.before_step()

    def state_dict(self) -> dict[str, Any]:
        """What the objective carries from step to step, such as the place in shuffled data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""

    def noise(self, count: int) -> Tensor:
        """For :meth:`draw`: base draws ``(count, *base_shape)`` of the flow.

        Where the base has parameters that are trained, draws depend on them and are made by :meth:`base_draws`; then
        these are ``count`` rows without elements.
        """
        if self._trains_base:
            return next(self.flow.parameters()).new_empty(count, 0)
        return self.flow.base().sample((count,))

    def base_draws(self, noise: Tensor) -> Tensor:
        """For :meth:`loss`: the base draws of :meth:`noise`, with gradients where the base is trained."""
        return self.flow.base().rsample((len(noise),)) if self._trains_base else noise
