"""Encoders: what a structured guide computes from the data of a row, so that rows share all parameters."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyroflows.errors import DataError, OptionError, ShapeError
from pyroflows.models.levels import SiteLevel
from pyroflows.options import kind
from pyroflows.transforms.hierarchy import Rows

Encoder = Callable[..., Tensor]


class Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Encoder) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)


class Arguments:
    """The arguments of a model, which copies of a flow share."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def __deepcopy__(self, memo: Any) -> "Arguments":
        return self


class EncodedRows(Rows):
    """Rows whose features an encoder computes, anew at each use, so that they follow its parameters.

    Args:
        rows: the rows without features.
        encoder: the encoder, whose parameters are those of its level.
        level: the level of the rows.
        subsample: the indices of the rows that a run sees, by subsampled plate.
        arguments: the arguments of the model.
    """

    def __init__(
        self,
        rows: Rows,
        encoder: nn.Module,
        level: SiteLevel,
        subsample: Mapping[str, Tensor],
        arguments: Arguments,
    ) -> None:
        super().__init__(rows.places, rows.parents, rows.ids, rows.weight)
        # A list hides the encoder from the modules of the rows, since it is one of the level already.
        self._encoder = [encoder]
        self.level, self._subsample, self._arguments = level, subsample, arguments

    @property
    def encoder(self) -> nn.Module:
        """The encoder."""
        return self._encoder[0]

    @property
    def features(self) -> Tensor:
        return encoded(self.encoder, self.level, self._subsample, self._arguments)


def encoder_of(given: Encoder | Mapping[str, Encoder] | None, level: SiteLevel, num_levels: int) -> nn.Module | None:
    """The encoder of a level, as a module; None if it has none.

    Args:
        given: what the user gave: one encoder, or encoders by latent site, or None.
        level: the level.
        num_levels: the number of levels that are not global.

    Raises:
        OptionError: if one encoder was given where there are several levels.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        found = [given[site.name] for site in level.sites if site.name in given]
        if len(found) > 1:
            raise OptionError(
                f"encoder has several entries for the latents of plate '{level.name}': give one, for any of "
                f"{', '.join(site.name for site in level.sites)}"
            )
        encoder = found[0] if found else None
    elif num_levels > 1:
        raise OptionError(
            "the model has local latents in several plates: give encoder= a dictionary by latent site, with one site "
            "of each plate that has an encoder"
        )
    else:
        encoder = given
    if encoder is None or isinstance(encoder, nn.Module):
        return encoder
    if not callable(encoder):
        raise OptionError(f"an encoder must be a module or a function of rows and arguments, got {kind(encoder)}")
    return Function(encoder)


def require_finite_features(rows: Iterable[Rows]) -> None:
    """Raise if an encoder gives features that are no numbers; names the first row.

    Raises:
        DataError: if so.
    """
    for part in rows:
        if isinstance(part, EncodedRows):
            is_bad = ~part.features.isfinite().all(-1)
            if is_bad.any():
                raise DataError(
                    f"the encoder of the latents in plate '{part.level.name}' gives features that are NaN or infinite "
                    f"for {int(is_bad.sum())} of {len(is_bad)} rows, the first of which is row "
                    f"{int(is_bad.nonzero()[0])}: "
                    "fill what is missing in the data that it reads, for instance by torch.nan_to_num"
                )


def encoded(encoder: nn.Module, level: SiteLevel, subsample: Mapping[str, Tensor], arguments: Arguments) -> Tensor:
    """The features of the rows of a level, ``(R, F)``.

    Raises:
        ShapeError: if the encoder gives another number of rows.
    """
    sizes = [plate.subsample_size for plate in level.plates]
    rows = tuple(
        subsample[plate.name] if plate.name in subsample else torch.arange(size)
        for plate, size in zip(level.plates, sizes, strict=True)
    )
    features = encoder(rows[0] if len(rows) == 1 else rows, *arguments.args, **arguments.kwargs)
    if (
        not isinstance(features, Tensor)
        or features.dim() != len(sizes) + 1
        or any(got not in (1, size) for got, size in zip(features.shape, sizes, strict=False))
    ):
        got = tuple(features.shape) if isinstance(features, Tensor) else kind(features)
        raise ShapeError(
            f"the encoder of the latents in plate '{level.name}' must give features of shape "
            f"({', '.join(map(str, sizes))}, num_features) for these rows, got {got}"
        )
    features = features.expand(*sizes, -1)
    return features[tuple(level.rows.T)]
