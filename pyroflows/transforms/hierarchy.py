"""The structure of a hierarchy: global elements, and rows of local ones that depend on them."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import OptionError
from pyroflows.transforms.base import FlowTransform, Pair, Triple
from pyroflows.transforms.gradients import pull_back
from pyroflows.transforms.local_affine import LocalAffine
from pyroflows.transforms.tables import rows_at

# Without gradients vectors are mapped in parts of about so many numbers.
MAX_NUMBERS = 2**16


class Rows(nn.Module):
    """The rows of a level that stand in one packed vector.

    Args:
        places: the indices of their elements in the vector, ``(R, d)``.
        parents: for each level above that encloses this one, the index of the row that encloses each row, ``(R,)``.
        ids: the index of each row among all rows of the level, ``(R,)``; it differs from ``range(R)`` where the vector
            holds a part of the rows.
        weight: how many rows each row stands for, one number or ``(R,)``; 0 for rows that count nowhere.
    """

    places: Tensor
    ids: Tensor
    _features: Tensor | None

    def __init__(
        self,
        places: Tensor,
        parents: Sequence[Tensor],
        ids: Tensor,
        weight: float | Tensor = 1.0,
        features: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.num_parents = len(parents)
        for name, value in (("places", places), ("ids", ids), ("_features", features)):
            self.register_buffer(name, value)
        for i, parent in enumerate(parents):
            self.register_buffer(f"parent_{i}", parent)

    @property
    def parents(self) -> tuple[Tensor, ...]:
        """For each enclosing level the index of the row that encloses each row."""
        return tuple(getattr(self, f"parent_{i}") for i in range(self.num_parents))

    @property
    def features(self) -> Tensor | None:
        """What is known of each row besides, ``(R, F)``; None if nothing is."""
        return self._features

    def elsewhere(self, places: Tensor | None = None, weight: float | Tensor | None = None) -> "Rows":
        """Return the same rows with other places or another weight; None for those that they have."""
        made = copy.copy(self)
        made._buffers = {**self._buffers, "places": self.places if places is None else places}
        made.weight = self.weight if weight is None else weight
        return made

    def none_of_them(self) -> "Rows":
        """Return no rows of the same level."""
        features = None if self.features is None else self.features[:0].detach()
        return Rows(self.places[:0], [parent[:0] for parent in self.parents], self.ids[:0], 1.0, features)


class Level(nn.Module):
    r"""The layers of one level: a flow T that all its rows share, and an affine map of each row.

    .. math:: y_r = T(z_r; h_r, e_r), \qquad x_r = A_r(y_r; h_r)

    :math:`h_r` are the elements y of the levels on which row r depends, and :math:`e_r` what tells it from other rows.

    Args:
        flow: T, a layer of d dimensions whose context is :math:`(h_r, e_r)`; None for the identity.
        affine: A.
        parents: the indices of the enclosing levels, among all levels that are not global.
        embedding: a table of vectors :math:`e_r`, one for each row, ``(N, E)``; None for none.
        reads_globals: the indices of the global elements on which the rows depend.
        given_scale: factors of what a row depends on, ``(p,)``; None for 1.
    """

    given_scale: Tensor | None

    def __init__(
        self,
        flow: FlowTransform | None,
        affine: LocalAffine,
        parents: Sequence[int],
        reads_globals: Tensor,
        embedding: Tensor | None = None,
        given_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.affine = affine
        self.parents = tuple(parents)
        self.reads_globals: Tensor
        self.register_buffer("reads_globals", reads_globals)
        self.register_buffer("given_scale", given_scale)
        self.embedding = None if embedding is None else nn.Parameter(embedding)
        self.encoder: nn.Module | None = None

    def exact(self) -> "Level":
        """Return a view of the same parameters with the exact log-determinant of T."""
        view = copy.copy(self)
        view._modules = {**self._modules, "flow": self.flow and self.flow.exact()}
        return view

    def context(self, h: Tensor, rows: Rows) -> Tensor | None:
        """The context of T, ``(..., R, C)``; None without T.

        Args:
            h: the elements on which the rows depend, ``(..., R or 1, p)``.
            rows: the rows.
        """
        if self.flow is None:
            return None
        parts = [h]
        if self.embedding is not None:
            parts.append(rows_at(self.embedding, rows.ids))
        if rows.features is not None:
            parts.append(rows.features)
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)

    def score(self, z: Tensor, score: Tensor, h: Tensor, rows: Rows, weight: Tensor) -> Tensor:
        r"""The scores of the rows x from those of z, both times the weights of the rows, ``(..., R, d)``.

        Args:
            z: the rows, ``(..., R, d)``.
            score: :math:`w_r \nabla_{z_r} \log p(z_r)`, of the shape of z.
            h: the elements on which the rows depend, ``(..., R or 1, p)``.
            rows: the rows.
            weight: how many rows each row stands for, one number or ``(R,)``.
        """
        if self.flow is not None:
            divisor = weight.where(weight != 0, 1.0)[..., None]
            score = weight[..., None] * self.flow.forward_and_score(z, score / divisor, self.context(h, rows))[2]
        return self.affine.score(score, h, rows.ids, rows.features)


class Hierarchy(FlowTransform):
    r"""A map of global elements and rows of local ones, in which rows depend on the global elements, not on each other.

    .. math:: y_0 = T_0(z_0), \quad x_0 = A_0(y_0); \qquad
        y_r = T_l(z_r; h_r, e_r), \quad x_r = A_l(y_r; h_r, e_r)

    for each row r of a level l, where :math:`h_r` are the global elements :math:`y_0` and those of the rows that
    enclose r, times the factors of the level. All rows of a level share :math:`T_l`. The log-determinant is the sum
    over all of them; both directions are parallel over rows.

    Args:
        flow: :math:`T_0`, a layer of all global elements; None for the identity.
        affine: :math:`A_0`; None where nothing is global.
        places: the indices of the global elements in the packed vector.
        levels: the other levels; a level comes after those that enclose it.
        rows: the rows of each level, which together hold all other elements.

    Shapes: z and x are ``(..., dim)``.

    Raises:
        OptionError: if the levels do not hold each element of the vector once.

    Example:
        >>> curves = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
        >>> scale = LocalAffine(1, given_dim=1, curves=curves, num_curved=1)
        >>> rows = Rows(torch.tensor([[1], [2]]), (), torch.arange(2))
        >>> funnel = Hierarchy(None, None, torch.tensor([0]), [Level(None, scale, (), torch.tensor([0]))], [rows])
        >>> funnel(torch.tensor([1.0, 1.0, -1.0]))  # the first element is the log-scale of the others, softly clamped
        tensor([ 1.0000,  2.6828, -2.6828])
    """

    flow: FlowTransform | None
    affine: FlowTransform | None
    places: Tensor
    levels: Any  # modules of the class Level
    rows: Any  # modules of the class Rows
    _order: Tensor

    def __init__(
        self,
        flow: FlowTransform | None,
        affine: FlowTransform | None,
        places: Tensor,
        levels: Sequence[Level],
        rows: Sequence[Rows],
    ) -> None:
        super().__init__(len(places) + sum(part.places.numel() for part in rows))
        self.flow = flow
        self.affine = affine
        self.levels = nn.ModuleList(levels)
        self._place(places, rows)

    def _place(self, places: Tensor, rows: Sequence[Rows]) -> None:
        self.register_buffer("places", places)
        self.rows = nn.ModuleList(rows)
        order = torch.cat([places, *(part.places.flatten() for part in rows)])
        if not torch.equal(order.sort().values, torch.arange(self.dim, device=order.device)):
            raise OptionError("the levels of a hierarchy must hold each element of the vector once")
        self.register_buffer("_order", order.argsort())

    def at(self, places: Tensor, rows: Sequence[Rows]) -> "Hierarchy":
        """Return a view with the same parameters for a vector that holds other rows.

        Its log-determinants count each row as many times as its weight says.

        Args:
            places: the indices of the global elements in that vector.
            rows: the rows of each level in it.
        """
        view = self.__class__.__new__(self.__class__)
        view.__dict__.update(self.__dict__, _modules=dict(self._modules), _buffers=dict(self._buffers))
        view.dim = len(places) + sum(part.places.numel() for part in rows)
        view.event_shape = view.base_shape = torch.Size([view.dim])
        view._place(places, rows)
        return view

    @property
    def reads_values(self) -> bool:
        return any(part.reads_values for part in self._parts())

    @property
    def ladj_is_exact(self) -> bool:
        return all(part.ladj_is_exact for part in self._parts())

    def _exact(self) -> "Hierarchy":
        view = self.at(self.places, list(self.rows))
        view.flow, view.affine = (part and part.exact() for part in (self.flow, self.affine))
        view.levels = nn.ModuleList([level.exact() for level in self.levels])
        return view

    def _parts(self) -> list[FlowTransform]:
        found = [self.flow, self.affine, *(level.flow for level in self.levels)]
        return [part for part in found if part is not None]

    @property
    def weights(self) -> Tensor:
        """How many times each element counts, ``(dim,)``; a row stands for others where not all are there."""
        parts = [torch.ones(len(self.places))]
        for part in self.rows:
            weight = torch.as_tensor(part.weight, dtype=parts[0].dtype).reshape(-1, 1)
            parts.append(weight.expand(part.places.shape).flatten())
        return torch.cat(parts)[self._order]

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        flat = [parts[0], *(part.flatten(-2) for part in parts[1:])]
        return torch.cat(flat, -1)[..., self._order]

    def _split(self, vector: Tensor) -> list[Tensor]:
        parts = [vector[..., self.places]]
        return parts + [vector[..., rows.places.flatten()].unflatten(-1, rows.places.shape) for rows in self.rows]

    def _given(self, level: Level, rows: Rows, ys: Sequence[Tensor]) -> Tensor:
        """What a level depends on, ``(..., R or 1, p)``."""
        parts = [ys[0][..., None, level.reads_globals]]
        parts += [ys[1 + parent][..., index, :] for parent, index in zip(level.parents, rows.parents, strict=True)]
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        h = parts[0] if len(parts) == 1 else torch.cat([p.expand(*shape, p.shape[-1]) for p in parts], -1)
        return h if level.given_scale is None else level.given_scale * h

    def _forward_and_ladj(self, z: Tensor, context: Tensor | None) -> Pair:
        return _in_parts(self._forward_part, z)

    def _inverse_and_ladj(self, x: Tensor, context: Tensor | None) -> Pair:
        return _in_parts(self._inverse_part, x)

    def _forward_part(self, z: Tensor) -> Pair:
        zs = self._split(z)
        y, ladj = _forward(self.flow, zs[0])
        x, affine_ladj = _forward(self.affine, y)
        _, xs, ladjs = self._forward_rows(zs[1:], y)
        return self._joined([x, *xs]), ladj + affine_ladj + self._counted(ladjs, y)

    def _forward_rows(self, zs: Sequence[Tensor], y: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return what rows depend on, x ``(..., R, d)``, and log-determinants of rows ``(..., R)``, by level."""
        ys, given, xs, ladjs = [y], [], [], []
        for level, rows, z in zip(self.levels, self.rows, zs, strict=True):
            h = self._given(level, rows, ys)
            y, flow_ladj = _forward(level.flow, z, level.context(h, rows))
            x, affine_ladj = level.affine.forward_and_ladj(y, h, rows.ids, rows.features)
            given.append(h)
            xs.append(x)
            ys.append(y)
            ladjs.append(flow_ladj + affine_ladj)
        return given, xs, ladjs

    def _counted(self, ladjs: Sequence[Tensor], y: Tensor) -> Tensor:
        """Add up the log-determinants of rows, as many times as each row counts."""
        weighted = [(rows.weight * ladj).sum(-1) for rows, ladj in zip(self.rows, ladjs, strict=True)]
        return sum(weighted, y.new_zeros(y.shape[:-1]))

    def _inverse_part(self, x: Tensor) -> Pair:
        xs = self._split(x)
        y, affine_ladj = _inverse(self.affine, xs[0])
        z, ladj = _inverse(self.flow, y)
        zs, ladjs = self._inverse_rows(xs[1:], y)
        return self._joined([z, *zs]), ladj + affine_ladj + self._counted(ladjs, y)

    def _inverse_rows(self, xs: Sequence[Tensor], y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return z ``(..., R, d)`` and the log-determinants of all rows ``(..., R)``, by level."""
        ys, zs, ladjs = [y], [], []
        for level, rows, x in zip(self.levels, self.rows, xs, strict=True):
            h = self._given(level, rows, ys)
            y, affine_ladj = level.affine.inverse_and_ladj(x, h, rows.ids, rows.features)
            z, flow_ladj = _inverse(level.flow, y, level.context(h, rows))
            zs.append(z)
            ys.append(y)
            ladjs.append(flow_ladj + affine_ladj)
        return zs, ladjs

    def row_log_probs(self, x: Tensor) -> list[Tensor]:
        """The log-density of each row given what it depends on, where z is standard normal, ``(..., R)`` by level."""
        xs = self._split(x)
        y, _ = _inverse(self.affine, xs[0])
        zs, ladjs = self._inverse_rows(xs[1:], y)
        log_norm = math.log(2 * math.pi) / 2
        return [ladj - (z.square() / 2 + log_norm).sum(-1) for z, ladj in zip(zs, ladjs, strict=True)]

    def _forward_and_score(self, z: Tensor, score: Tensor, context: Tensor | None) -> Triple:
        # The globals have a score of their own at y_0. At fixed values x_r of a row, its log-density changes with what
        # the row depends on by -w_r d log|det J_r| - score_r^T dx_r, where z_r is fixed on the right-hand side. Each
        # row adds this to the scores of the globals and of the rows that enclose it, so the last level comes first.
        zs, scores = self._split(z), self._split(score)
        y, ladj = zs[0], z.new_zeros(z.shape[:-1])
        if self.flow is not None:
            y, ladj, scores[0] = self.flow._forward_and_score(zs[0], scores[0], None)
        given, xs, ladjs = self._forward_rows(zs[1:], y)
        sources = [y, *zs[1:]]
        with torch.no_grad():
            for i, (level, rows) in reversed(list(enumerate(zip(self.levels, self.rows, strict=True)))):
                weight = torch.as_tensor(rows.weight).to(z)
                of_x = level.score(zs[1 + i], scores[1 + i], given[i], rows, weight)
                above = [0, *(1 + parent for parent in level.parents)]
                cotangents = -of_x, -weight.expand(ladjs[i].shape)
                added = pull_back((xs[i], ladjs[i]), cotangents, [sources[k] for k in above])
                scores[1 + i] = of_x
                for k, part in zip(above, added, strict=True):
                    scores[k] = scores[k] + part
        ladj = ladj + self._counted(ladjs, y)
        if self.affine is None:
            return self._joined([y, *xs]), ladj, self._joined(scores)
        x, affine_ladj, scores[0] = self.affine._forward_and_score(y, scores[0], None)
        return self._joined([x, *xs]), ladj + affine_ladj, self._joined(scores)


def _in_parts(function: Callable[[Tensor], Pair], vectors: Tensor) -> Pair:
    """Map vectors part by part where nobody records gradients, since networks see each row of each vector."""
    if torch.is_grad_enabled() or vectors.numel() <= MAX_NUMBERS:
        return function(vectors)
    flat = vectors.reshape(-1, vectors.shape[-1])
    values, ladjs = zip(*map(function, flat.split(max(1, MAX_NUMBERS // flat.shape[-1]))), strict=True)
    return torch.cat(values).reshape(vectors.shape), torch.cat(ladjs).reshape(vectors.shape[:-1])


def _forward(flow: FlowTransform | None, z: Tensor, context: Tensor | None = None) -> Pair:
    return (z, z.new_zeros(z.shape[:-1])) if flow is None else flow.forward_and_ladj(z, context)


def _inverse(flow: FlowTransform | None, x: Tensor, context: Tensor | None = None) -> Pair:
    return (x, x.new_zeros(x.shape[:-1])) if flow is None else flow.inverse_and_ladj(x, context)
