"""Find rows on which a density does not exist, or that a flow learns badly, before a fit.

Where no density exists, :func:`check_density` raises; where a fit gives less than one may expect, it warns. The limits
were measured with splines and affine autoregressive flows, and say so where they stand.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyroflows.errors import DataError, warn
from pyroflows.flows import Flow
from pyroflows.flows.base import StudentT
from pyroflows.shapes import as_given, counted, listed, places
from pyroflows.training.data import Rows, is_by_channel
from pyroflows.transforms import LU, Autoregressive, Coupling, Inverse
from pyroflows.transforms.base import FlowTransform
from pyroflows.transforms.compose import Compose
from pyroflows.transforms.normalization import Standardize
from pyroflows.transforms.triangular.base import TriangularTransform
from pyroflows.transforms.univariate import AffineMap
from pyroflows.transforms.wild import MAX_SORTED, center_and_spread, wild_elements_among

# The rank of wider events is not checked, since its cost grows with the cube of their size.
MAX_RANK_COLUMNS = 1024
# Of two columns with normal values, one of which differs from a linear function of the other by this many of its
# standard deviations, MAF and NSF learned all but 0.3 nats; at a third of it they were short of one nat.
NEARLY_DEPENDENT = 3e-3
# Values of ordinary size lose a few units in the last place where a column is computed from others; this is a hundred
# times as much. In float64 the check itself, a triangular factorisation, loses up to 1e-11 of a standard deviation.
ROUNDED_UNITS, MIN_ROUNDING = 256, 1e-10
# A distance from a linear function that is larger is not taken for one of rounding.
MAX_ROUNDING = 1e-2
# Normal values that were rounded so that two agree with a probability of 0.06 were fitted as well as others; from 0.08
# on splines began to put spikes on them.
MAX_AGREEING = 0.08
# The spacing of integers is known, so that noise of its width costs nothing; they are named from 25 equally frequent
# values down.
MAX_AGREEING_INTEGERS = 0.04
# A value that makes up this share of the rows, and this many times that of the others on average, is a point mass.
MIN_POINT_MASS, MIN_POINT_RATIO = 0.05, 10
# A bootstrap repeats a third of its rows; measurements that were rounded to many digits agree by chance, but rarely.
MAX_REPEATED_SHARE = 0.1
# Fewer values than these can hold no point mass among others.
MIN_NUM_VALUES = 20
# An image whose elements take no more values than these was not dequantised.
MAX_LEVELS = 256
# The recommended spline flow has 800 parameters a training row of wine, and beats a Gaussian there; flows much larger
# lost to it on held-out rows of most of six data sets.
MAX_PARAMETERS_PER_ROW = 2000


def check_density(flow: Flow, rows: Rows, training: Tensor, are_integers: bool = False) -> None:
    """Raise if rows have no density, and warn of what makes a fit to them worse than one may expect.

    Args:
        flow: the flow to be fitted.
        rows: all rows.
        training: indices ``(n,)`` of the rows to train on.
        are_integers: whether x are integers with noise.

    Raises:
        DataError: if a column of x is a linear function of others.

    Example:
        >>> from pyroflows.training.data import load
        >>> u = torch.randn(100, 1)
        >>> rows = load(pf.flows.MAF(2), torch.cat([u, 2 * u + 1], 1)).rows
        >>> try:
        ...     check_density(pf.flows.MAF(2, hidden_dims=(8,)), rows, torch.arange(100))
        ... except pf.FlowError as error:
        ...     print(error)
        column 1 of x is a linear function of columns [0] of x, in all 100 training rows, so that the density is...
    """
    if not flow.support.is_discrete:
        _check_rank(rows[training])
        _warn_of_wild_rows(flow, rows)
        # Where columns take few values, equal rows are no surprise.
        agree_by_chance = are_integers and _have_few_values(rows.x[training].floor())
        if not _warn_of_repeated_values(rows.x[training]) and not agree_by_chance:
            _warn_of_repeated_rows(rows.group[rows.weights > 0])
    _warn_of_other_units(flow, rows[training], are_integers)
    _warn_of_affine_maps(flow)
    _warn_of_size(flow, len(training))


def _check_rank(rows: Rows) -> None:
    """Raise if a column of x is a linear function of those before it; warn if it nearly is, or with the context is."""
    x = rows.x.flatten(1)
    given = x[:, :0] if rows.context is None else rows.context.flatten(1)
    num_columns = given.shape[1] + x.shape[1]
    # More rows say no more about a rank, and of few rows nothing can be said.
    count = min(len(x), max(2000, 4 * num_columns))
    if num_columns > MAX_RANK_COLUMNS or count < num_columns + 3:
        return
    sample = torch.linspace(0, len(x) - 1, count).long().to(x.device)
    found = _most_dependent(x[sample], given[sample, :0], rows.weights[sample])
    if found.is_exact and count < len(x):
        found = _most_dependent(x, given[:, :0], rows.weights)
    if found.is_exact:
        raise DataError(f"{found}, in all {len(x)} training rows, so that the density is unbounded: leave it out")
    if found.residual < NEARLY_DEPENDENT:
        warn(
            f"{found}, nearly, and flows learn so thin a density badly: give its distance from that function as a "
            "column instead"
        )
    elif given.shape[1]:
        found = _most_dependent(x[sample], given[sample], rows.weights[sample])
        if found.residual < NEARLY_DEPENDENT:
            warn(f"{found}, so that its density at a context is unbounded, or nearly so: leave it out of x")


@dataclass(frozen=True)
class _Dependence:
    """A column of x, and the columns of x and of the context of which it is a linear function up to a residual."""

    column: int
    of_x: list[int]
    of_context: list[int]
    residual: float
    is_exact: bool

    def __str__(self) -> str:
        others = {"x": self.of_x, "the context": self.of_context}
        named = " and ".join(f"columns {listed(columns)} of {name}" for name, columns in others.items() if columns)
        distance = f", up to {self.residual:.1g} of its standard deviation" if self.residual > 1e-6 else ""
        return f"column {self.column} of x is a linear function of {named}{distance}"


def _most_dependent(x: Tensor, given: Tensor, weights: Tensor) -> _Dependence:
    """Return the first column of x that is exactly a linear function of those before it and those given.

    If there is none, it is the column that is nearest to it.

    Args:
        x: ``(n, D)``.
        given: ``(n, C)``.
        weights: ``(n,)``.
    """
    num_given = given.shape[1]
    offset, residuals, matrix = _residuals(torch.cat([given, x], 1).cpu().double(), weights.cpu().double())
    eps = torch.finfo(x.dtype).eps

    def dependence(column: int) -> _Dependence:
        place = num_given + column
        involved, factors = _involved(matrix, 1 + place)
        # Values far from zero are rounded by more of their standard deviation, and a small difference of large columns
        # by more of its own.
        sizes = torch.cat([offset[place : place + 1].abs(), factors * offset[involved].abs().clamp(min=1.0)])
        rounding = min(MAX_ROUNDING, max(MIN_ROUNDING, eps * max(ROUNDED_UNITS, sizes.sum().item())))
        of_x, of_context = [i - num_given for i in involved if i >= num_given], [i for i in involved if i < num_given]
        residual = residuals[place].item()
        return _Dependence(column, of_x, of_context, residual, residual <= rounding)

    near = (residuals[num_given:] <= MAX_ROUNDING).nonzero().flatten().tolist()
    exact = (found for found in map(dependence, near) if found.is_exact)
    return next(exact, None) or dependence(int(residuals[num_given:].argmin()))


def _residuals(columns: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how far each column is from a linear function of those before it, in parts of its standard deviation.

    A row (1, c, x) may be divided by any number without a change in what depends on what. So rows far out are brought
    to the size of others, and a single one does not make columns alike.

    Args:
        columns: ``(n, D)``.
        weights: ``(n,)``.

    Returns:
        The medians ``(D,)`` in units of the spread, the distances ``(D,)``, and the matrix ``(n, 1 + D)`` whose first
        column is the constant.
    """
    center, spread = center_and_spread(columns)
    deviation = (columns - center).abs().mean(0)
    spread = torch.where(spread > 0, spread, torch.where(deviation > 0, deviation, 1.0))
    scaled = (columns - center) / spread
    matrix = torch.cat([torch.ones_like(scaled[:, :1]), scaled], 1)
    size = (scaled.abs().amax(1) / 10).clamp(min=1.0)
    matrix = matrix * (weights.sqrt() / size)[:, None]
    triangle = torch.linalg.qr(matrix, mode="r").R
    norms = triangle[1:, 1:].norm(dim=0)
    residuals = triangle.diagonal()[1:].abs() / torch.where(norms > 0, norms, 1.0)
    return center / spread, residuals, matrix


def _involved(matrix: Tensor, place: int) -> tuple[list[int], Tensor]:
    """Return the columns, counted without the constant, that take part in the linear function for one behind them.

    Args:
        matrix: the constant and the columns ``(n, 1 + D)``.
        place: where the column stands in the matrix.

    Returns:
        The columns, and the sizes of their factors.
    """
    before, target = matrix[:, :place], matrix[:, place : place + 1]
    factors = torch.linalg.lstsq(before, target, driver="gelsd").solution[1:, 0]
    share = factors.abs() * before[:, 1:].norm(dim=0)
    involved = (share > 1e-2 * share.amax()).nonzero().flatten().tolist() if len(share) else []
    return involved, factors[involved].abs()


def _warn_of_wild_rows(flow: Flow, rows: Rows) -> None:
    """Warn of rows far out, which are left out of location, scale and validation; a heavy-tailed base expects them."""
    found = rows.is_wild.nonzero().flatten().tolist()
    if not found or isinstance(flow.base, StudentT):
        return
    row, used = found[0], rows.weights > 0
    for name, given, values, by_channel in (
        ("x", rows.x, flow.before_support(rows.x), is_by_channel(flow)),
        ("context", rows.context, rows.context, False),
    ):
        if given is None or values is None:
            continue
        is_wild = wild_elements_among(values, used, by_channel).flatten(1)[row]
        if not is_wild.any():
            continue
        column = int(is_wild.nonzero()[0])
        num_places = values.shape[2:].numel() if by_channel else 1
        first = column - column % num_places
        alike = values[used].flatten(1)[:, first : first + num_places]
        center, spread = center_and_spread(alike.reshape(-1, 1).double())
        distance = (values[row].flatten()[column].double() - center).abs() / spread
        value = given[row].flatten()[column].item()
        rest = len(found) - 1
        others = f" (and {counted(rest, 'more row')} {'is' if rest == 1 else 'are'} as far out)" if rest else ""
        warn(
            f"row {row} of {name} has {value:.6g} in column {column}, {distance.item():.2g} "
            f"standard deviations of the others from their median{others}: location, scale and validation leave such "
            "rows out; leave them out of the data if they are errors or codes of missing values, and give "
            'base="student_t" if the law has such tails'
        )
        return


def _warn_of_other_units(flow: Flow, rows: Rows, are_integers: bool) -> None:
    """Warn if a flow holds location and scale of other data than these, which a further fit does not change."""
    x, of_context = flow.before_support(rows.x), flow.transform.context_scale
    for name, layer, values in (("x", _location_and_scale(flow, rows.x), x), ("context", of_context, rows.context)):
        if not isinstance(layer, Standardize) or values is None or not layer.adapted:
            continue
        is_far = layer.far_columns(values, rows.weights)
        if are_integers and name == "x":
            # Noise alone gives columns in which nearly all integers agree their spread, without the rare other ones.
            is_far = is_far & layer.far_columns(flow.before_support(rows.x.floor()), rows.weights)
        if far := places(is_far):
            kind = "channels" if layer.by_channel else "columns"
            adapt = "flow.adapt(x)" if rows.context is None else "flow.adapt(x, context)"
            warn(
                f"{kind} {listed(far)} of {name} are far from the location and scale that this flow has from earlier "
                f"data, by ten standard deviations or a factor of ten in scale, and a further fit keeps these: call "
                f"{adapt} before it to give the flow those of the new rows"
            )
            return


def _location_and_scale(flow: Flow, x: Tensor) -> Standardize | None:
    """Return the layer of location and scale of a flow, or one with those of a mixture; None if it has none yet."""
    layers = [part.standardization for part in flow.components]
    adapted = [layer for layer in layers if layer is not None and layer.adapted]
    # Components of different supports have their locations in different coordinates.
    is_common = all(torch.equal(part.before_support(x), flow.before_support(x)) for part in flow.components)
    if len(adapted) < len(layers) or not is_common or len({layer.by_channel for layer in adapted}) > 1:
        return None
    locs, scales = torch.stack([layer.loc for layer in adapted]), torch.stack([layer.scale for layer in adapted])
    scale = (scales.square().mean(0) + locs.var(0, correction=0)).sqrt()
    angles = None if adapted[0].angles is None else adapted[0].angles.tolist()
    return Standardize(adapted[0].event_shape, locs.mean(0), scale, angles, adapted[0].by_channel)


def _have_few_values(x: Tensor) -> bool:
    """Tell whether the values of the columns can be combined to less than a hundred times as many rows as there are."""
    log_count = 0.0
    for column in x.flatten(1).T:
        log_count += math.log(len(column.unique()))
        if log_count > math.log(100 * len(x)):
            return False
    return True


def _warn_of_repeated_rows(group: Tensor) -> None:
    """Warn if many rows repeat others, which then count as often as they stand there, but are no further draws."""
    count = len(group) - len(group.unique())
    if count > MAX_REPEATED_SHARE * len(group):
        warn(
            f"{count} of {len(group)} rows repeat others, and a density of such rows is one of spikes: leave the "
            "repetitions out, and give numbers of copies as weights if they mean something; equal rows are kept "
            "together, either to train on or to validate with"
        )


def _warn_of_repeated_values(x: Tensor) -> bool:
    """Warn of columns that take few values, or one value often, on which a flow puts spikes; tell whether it did."""
    columns = x.flatten(1)
    count = min(len(columns), max(500, MAX_SORTED // columns.shape[1]))
    sample = columns[torch.linspace(0, len(columns) - 1, count).long().to(x.device)].cpu()
    are_integers = torch.equal(sample, sample.round())
    if x.dim() > 2 and len(levels := sample.unique()) <= MAX_LEVELS < sample.numel() / 10:
        _warn_of_few_values(f"x takes {len(levels)} values in all", "all columns", levels, are_integers)
        return True
    massive, coarse = [], []
    for j, column in enumerate(sample.T):
        values, counts = column.unique(return_counts=True)
        most = int(counts.argmax())
        share, others = counts[most].item() / count, (count - counts[most].item()) / max(1, len(values) - 1)
        agreeing = (counts * (counts - 1)).sum().item() / (count * (count - 1))
        if share >= MIN_POINT_MASS and counts[most] >= MIN_POINT_RATIO * others and len(values) > MIN_NUM_VALUES:
            massive.append((j, values[most].item(), share))
        elif agreeing > (MAX_AGREEING_INTEGERS if torch.equal(values, values.round()) else MAX_AGREEING):
            coarse.append((j, values))
    if massive:
        j, value, share = massive[0]
        warn(
            f"columns {listed([j for j, *_ in massive])} of x repeat one value, column {j} is {value:.6g} in "
            f"{share:.0%} of the rows, and a density can only follow that by a spike: leave the column out, or fit the "
            "other rows alone"
        )
    if coarse:
        j, values = coarse[0]
        named = f"columns {listed([j for j, _ in coarse])}"
        _warn_of_few_values(
            f"{named} of x take few values, column {j} takes {len(values)}", named, values, are_integers
        )
    return bool(massive or coarse)


def _warn_of_few_values(what: str, columns: str, values: Tensor, are_integers: bool) -> None:
    step = values.diff().min().item()
    in_the_fit = ' (give dequantization="uniform" to the fit)' if are_integers else ""
    warn(
        f"{what}, and a density of such rows is one of spikes that grow as one trains: dequantise them{in_the_fit}, "
        f"that is make {columns} floating-point numbers, and add to each value its own noise of the width of the "
        f"rounding, such as {step:.3g} times a uniform number from -0.5 to 0.5; or leave out categories"
    )


def _warn_of_affine_maps(flow: Flow) -> None:
    """Warn of a stack of couplings or autoregressive layers that is one affine map of a single variable."""
    if flow.dim > 1 or flow.context_dim:
        return
    layers = [layer for layer in _flat(flow.transform) if any(True for _ in layer.parameters())]
    inner = [layer.inv if isinstance(layer, Inverse) else layer for layer in layers]
    # A flow of other layers alone, such as elementwise ones, was made as what it is.
    if any(isinstance(layer, Autoregressive | Coupling) for layer in inner) and all(map(_is_affine, layers)):
        warn(
            f"all layers of this {type(flow).__name__} are affine maps of one variable, so that its density is that of "
            "its base, shifted and scaled: take pf.flows.NSF(1), SOS or NAF, whose layers bend it"
        )


def _is_affine(layer: FlowTransform) -> bool:
    """Tell whether a layer of a single variable is an affine map; one with a context or more variables need not be."""
    if isinstance(layer, Coupling):
        return isinstance(layer.univariate, AffineMap)
    return isinstance(layer, LU) or (isinstance(layer, TriangularTransform) and layer.is_affine)


def _flat(transform: FlowTransform) -> list[FlowTransform]:
    if not isinstance(transform, Compose):
        return [transform]
    return [layer for part in transform.layers for layer in _flat(part)]


def _warn_of_size(flow: Flow, num_rows: int) -> None:
    count = sum(parameter.numel() for parameter in flow.parameters() if parameter.requires_grad)
    # No Gaussian is a law of categories; and few windows of a text are many characters.
    if not flow.support.is_discrete and count > MAX_PARAMETERS_PER_ROW * num_rows:
        warn(
            f"this flow has {count} parameters for {num_rows} training rows of size {as_given(flow.event_shape)}, and "
            "fits of so few rows rarely beat a Gaussian on others: compare with pf.flows.Gaussian, give fewer and "
            "narrower layers, or more rows"
        )
