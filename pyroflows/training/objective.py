"""Define objectives: an objective says what a step of training draws, what its loss is, and what it records."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyroflows.flows import Flow
from pyroflows.transforms import Standardize

Figures = Mapping[str, Tensor]


class Objective:
    """An objective is what a fit of a flow minimises. A subclass writes :meth:`draw` and :meth:`loss`, and
    :func:`pyroflows.train` minimises it.

    A step of training is a function of the parameters and of the tensors that the step draws. It is recorded once and
    then runs without Python. Therefore random numbers, indices of rows and batches of data come from :meth:`draw`, and
    :meth:`loss` does not branch on the values of its tensors.

    Args:
        flow: the flow to train.
        own_parameters: tensors to train besides the parameters of the flow.

    Attributes:
        flow: the flow.
        own_parameters: the other trained tensors.
        monitor: name of the figure that schedule and guard watch. If it is "loss", the loss is recorded by that name.
        falls: whether this figure falls while the fit gets better.
        remedy: what to try if the fit diverges; it completes the sentence "Try ...".

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
    remedy: str = "a smaller learning rate, other initial values, or float64"

    def __init__(self, flow: Flow, own_parameters: Iterable[Tensor] = ()) -> None:
        self.flow = flow
        self.own_parameters = list(own_parameters)
        # This is asked once, since it takes a noticeable part of a short step.
        self._trains_base = any(parameter.requires_grad for parameter in flow.base.parameters())

    @property
    def parameters(self) -> list[Tensor]:
        """Return the trained tensors, each once: the parameters of the flow that are not frozen, and own ones.

        Location and scale of data, which :class:`pyroflows.transforms.Standardize` holds, are not among them.
        """
        trained = [*trained_parameters(self.flow), *self.own_parameters]
        return list({id(parameter): parameter for parameter in trained}.values())

    @property
    def reads_values(self) -> bool:
        """Return whether a layer that the loss calls decides by values of tensors, so that no step can be recorded."""
        return self.flow.reads_values

    @property
    def state(self) -> Sequence[nn.Module | Tensor]:
        """Return modules and tensors that the loss reads besides the flow and whose values change during the fit.

        The recorded step reads them anew each time; all other tensors that it reads are constants of the fit.
        """
        return ()

    def draw(self) -> Sequence[Tensor]:
        """Draw the tensors of one step, such as noise, indices of rows, or batches of data.

        Steps are quick if their draws have few different shapes, such as those of full batches and of a last one.
        """
        return ()

    # These types allow a subclass to name the tensors that it draws.
    def loss(self, *drawn: Any, **_: Any) -> tuple[Tensor, Figures]:
        """Compute the loss of the tensors that :meth:`draw` returned, and the figures to record.

        Args:
            drawn: the tensors, as positional arguments.

        Returns:
            The loss, a scalar with gradients, and scalars by name.

        Raises:
            NotImplementedError: if the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def before_step(self) -> None:
        """Prepare a step, outside of what is recorded; by default this calls ``before_step`` of the flow."""
        self.flow.before_step()

    def state_dict(self) -> dict[str, Any]:
        """Return what the objective carries from step to step, such as the place in shuffled data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` returned."""

    def noise(self, count: int) -> Tensor:
        """Draw ``(count, *base_shape)`` from the base of the flow, for use in :meth:`draw`.

        If the base has trained parameters, its draws depend on them and must be made inside of :meth:`loss`. This then
        returns ``(count, 0)``, an empty tensor, which tells :meth:`base_draws` how many to make.
        """
        if self._trains_base:
            return next(self.flow.parameters()).new_empty(count, 0)
        return self.flow.base().sample((count,))

    def base_draws(self, noise: Tensor) -> Tensor:
        """Return the base draws that belong to a :meth:`noise`, for use in :meth:`loss`.

        They carry gradients if the base has trained parameters.

        Args:
            noise: the tensor that :meth:`noise` returned.
        """
        return self.flow.base().rsample((len(noise),)) if self._trains_base else noise


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a fit trains: all that are not frozen, except location and scale of data.

    Example:
        >>> flow = pf.Flow([Planar(2)])
        >>> len(trained_parameters(flow)), len(list(flow.parameters()))
        (1, 3)
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Standardize)]
    fixed = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in fixed]
