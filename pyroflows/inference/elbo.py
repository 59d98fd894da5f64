"""The objective that fits a flow to a model: the ELBO, estimated from subsampled rows, and tempered on demand."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyroflows.fitting.estimators import ESTIMATORS, Estimator
from pyroflows.fitting.reverse_kl import ReverseKL
from pyroflows.flows import Flow, FlowDistribution
from pyroflows.inference.batches import Batches, FixedArguments
from pyroflows.models.log_joint import LogJoint
from pyroflows.models.run import SiteValues
from pyroflows.models.subsampling import Call
from pyroflows.randomness import seeded
from pyroflows.training.shuffling import ShuffledBatches

# The estimators whose gradient is a mean over draws, so that draws may depend on one another.
MEANS_OVER_DRAWS = (ESTIMATORS["total"], ESTIMATORS["path"])


@dataclass(frozen=True)
class Tempering:
    r"""Inverse temperatures :math:`\beta_t = \beta_0^{1 - t/T}`, which rise geometrically to 1 over T steps.

    Args:
        first: :math:`\beta_0`, between 0 and 1.
        num_steps: T, the number of steps.

    Example:
        >>> [round(Tempering(0.01, num_steps=2)(step), 2) for step in range(4)]
        [0.01, 0.1, 1.0, 1.0]
    """

    first: float
    num_steps: int

    def __call__(self, step: int) -> float:
        """The inverse temperature :math:`\beta_t` of a step, counted from 0."""
        return self.first ** (1 - min(1.0, step / max(1, self.num_steps)))


class ModelELBO(ReverseKL):
    r"""The ELBO of a flow for a model, :math:`E_q[\beta_t \log p(x, y) - \log q(x)]`, which training maximises.

    Args:
        flow: the flow q.
        log_joint: the log joint of the model; the rows of subsampled plates are drawn anew in each step.
        estimator: the gradient estimator.
        num_particles: number of draws a step, at least 1.
        own_parameters: parameters of the model, which are trained with the flow.
        tempering: the inverse temperatures :math:`\beta_t`; None for 1 throughout.
    """

    remedy = "a smaller learning rate, other initial values (init_loc_fn of the guide), or float64"

    def __init__(
        self,
        flow: Flow,
        log_joint: LogJoint,
        estimator: Estimator,
        num_particles: int,
        own_parameters: Iterable[Tensor] = (),
        tempering: Tempering | None = None,
    ) -> None:
        super().__init__(flow, partial(_tempered, log_joint), estimator, num_particles, own_parameters)
        self._log_joint = log_joint
        self._tempering = tempering
        self._num_drawn = 0

    def draw(self) -> list[Tensor]:
        """Draw base values and the rows of each subsampled plate, and give the inverse temperature of the step."""
        return [*super().draw(), self._inverse_temperature(), *self._log_joint.draw_subsample().values()]

    def _inverse_temperature(self) -> Tensor:
        beta = 1.0 if self._tempering is None else self._tempering(self._num_drawn)
        self._num_drawn += 1
        return next(self.flow.parameters()).new_tensor(beta)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps so far, on which the temperature depends."""
        return {"num_drawn": self._num_drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._num_drawn = state["num_drawn"]


@dataclass(frozen=True, eq=False)
class Part:
    """What steps have in common that see parts of the data of equal shapes.

    Args:
        log_joint: the log joint of the latents of such a part.
        call: what the model shows of its plates.
        counted: a function of the rows by plate that tells which entries of latents count, see
            :meth:`AutoStructuredFlow.counted`; None where all do.
        is_global: which latents of the flat vector depend on no row, ``(dim,)``; None where draws are independent.
    """

    log_joint: LogJoint
    call: Call
    counted: Callable[[Mapping[str, Tensor]], SiteValues] | None = None
    is_global: Tensor | None = None

    @property
    def drawn(self) -> tuple[str, ...]:
        """The names of the plates whose rows are drawn anew in each step."""
        return tuple(plate.name for plate in self.call.layout.structure.subsampled if plate.name not in self.call.given)


class MinibatchELBO(ModelELBO):
    """The ELBO of a guide for a model, of which each step sees a part of the rows or of the data.

    The log-densities of model and guide count each row for those that it stands for, so that the mean over all parts is
    the ELBO of all rows, and the mean of the gradient its gradient.

    The draws of a step share its rows, and with them an error of the gradient at the global latents, which hardly
    depends on the draw. Its products with base values would hide what the gradient says of scales, and of how rows
    depend on global latents. So draws come in fours, with each sign of their global and of their local base values, and
    these products cancel. Each draw alone is standard normal, hence the gradient of estimators that are means over
    draws stays unbiased; others take independent draws.

    Args:
        flow: the flow of the guide.
        law_of: a function of a part, of the rows by plate, and of the model's arguments, to the law of the latents.
        arguments: the arguments of the steps.
        part_of: a function from arguments to their part, which is called once for tensors of the same shapes.
        options: the other arguments of :class:`ModelELBO`.
    """

    def __init__(
        self,
        flow: Flow,
        law_of: Callable[[Part, Mapping[str, Tensor], Any, Any], FlowDistribution],
        arguments: FixedArguments | Batches,
        part_of: Callable[[Any, Any], Part],
        *options: Any,
    ) -> None:
        self._law_of, self._arguments, self._part_of = law_of, arguments, part_of
        self._parts: dict[Any, Part] = {}
        self._shuffled: dict[str, ShuffledBatches] = {}
        super().__init__(flow, self._part(*arguments.first).log_joint, *options)
        self.log_density = self._log_joint_of_part

    def draw(self) -> list[Tensor]:
        """Take the next data, and draw base values and the rows of plates that draw theirs."""
        tensors = self._arguments.draw()
        part = self._part(*self._arguments.of(tensors))
        self._log_joint = part.log_joint
        rows = [next(self._rows_of(part, name)) for name in part.drawn]
        noise = self.noise(self.num_particles)
        if part.is_global is not None and self.estimator in MEANS_OVER_DRAWS:
            noise = with_signs(noise, part.is_global)
        return [noise, self._inverse_temperature(), *tensors, *rows]

    def _rows_of(self, part: Part, name: str) -> ShuffledBatches:
        """The rows of a plate in the order of this epoch, which leave less noise than independent draws of rows."""
        plate = part.call.layout.structure.plates[name]
        key = f"{plate.subsample_size} of {name}"
        if key not in self._shuffled:
            self._shuffled[key] = ShuffledBatches(torch.arange(plate.size), plate.subsample_size)
        return self._shuffled[key]

    def noise(self, count: int) -> Tensor:
        """Draw from the base of the latents of a step, ``(count, dim)``."""
        dim = self._log_joint.layout.dim
        if dim == self.flow.dim:
            return super().noise(count)
        return torch.randn(count, dim).to(next(self.flow.parameters()))

    def state_dict(self) -> dict[str, Any]:
        """The number of steps so far, and the places among the batches and the rows."""
        rows = {name: shuffled.state_dict() for name, shuffled in self._shuffled.items()}
        return {**super().state_dict(), "num_given": self._arguments.num_given, "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, if that is not long ago."""
        super().load_state_dict(state)
        self._arguments.go_back(state["num_given"])
        for name, shuffled in list(self._shuffled.items()):
            if name in state["rows"]:
                shuffled.load_state_dict(state["rows"][name])
            else:  # Its first epoch begins anew.
                del self._shuffled[name]

    def law(self, *drawn: Tensor) -> FlowDistribution:
        """The law of the latents at the data and the rows of a step."""
        return self._law_of(*self._at(drawn[1:]))

    def _log_joint_of_part(self, x: Tensor, beta: Tensor, *drawn: Tensor) -> Tensor:
        part, rows, args, kwargs = self._at(drawn)
        return beta * part.log_joint.at(args, kwargs)(x, rows, None if part.counted is None else part.counted(rows))

    def _at(self, drawn: Sequence[Tensor]) -> tuple[Part, Mapping[str, Tensor], Any, Any]:
        """The part of a step, the rows that it has drawn, and its arguments."""
        tensors, rows = drawn[: self._arguments.num_tensors], drawn[self._arguments.num_tensors :]
        args, kwargs = self._arguments.of(tensors)
        part = self._part(args, kwargs)
        return part, dict(zip(part.drawn, rows, strict=True)), args, kwargs

    def _part(self, args: Any, kwargs: Any) -> Part:
        """The part of which the data of a step are one."""
        key = tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if key not in self._parts:
            with seeded(0):  # the draws of a fit do not depend on when a part comes for the first time
                self._parts[key] = self._part_of(args, kwargs)
        return self._parts[key]


def with_signs(noise: Tensor, is_global: Tensor) -> Tensor:
    """Replace normal draws by fours of draws that differ by the signs of their global and of their local elements.

    Args:
        noise: independent standard normal draws, ``(S, dim)``.
        is_global: which elements are global, ``(dim,)``.

    Example:
        >>> with_signs(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]), torch.tensor([True, False]))
        tensor([[ 1.,  2.],
                [-1.,  2.],
                [ 1., -2.],
                [-1., -2.]])
    """
    signs = torch.where(is_global, noise.new_tensor([[1], [-1], [1], [-1]]), noise.new_tensor([[1], [1], [-1], [-1]]))
    base = noise[: math.ceil(len(noise) / 4)]
    return (signs[:, None] * base).flatten(0, 1)[: len(noise)]


def _tempered(log_joint: LogJoint, x: Tensor, beta: Tensor, *rows: Tensor) -> Tensor:
    names = [plate.name for plate in log_joint.structure.subsampled]
    return beta * log_joint(x, dict(zip(names, rows, strict=True)))
