"""The structured flow guide: a flow over the global latents, and one that the rows of each plate share."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from pyroflows.errors import CheckpointError, ModelError, OptionError
from pyroflows.flows import Flow, FlowDistribution
from pyroflows.flows.weighted import WeightedNormal
from pyroflows.grad_mode import isolated
from pyroflows.guides.centering import Centering
from pyroflows.guides.encoders import Arguments, Encoder, encoder_of, require_finite_features
from pyroflows.guides.left_out import with_left_out
from pyroflows.guides.packed import AutoFlow, FlowFn, _point_mass, _unpacked
from pyroflows.guides.row_flows import LocalFlowFn, default_local_flow, hierarchical_flow, rows_of, viewed
from pyroflows.models.all_rows import all_rows
from pyroflows.models.layout import Layout, constrain_site
from pyroflows.models.levels import SiteLevel, levels_of, read_by, shared_factors
from pyroflows.models.requirements import describe_for_flow
from pyroflows.models.structure import ModelStructure
from pyroflows.models.subsampling import Call, Calls
from pyroflows.models.tracing import InitFn, Model
from pyroflows.transforms.hierarchy import Hierarchy


class AutoStructuredFlow(AutoFlow):
    r"""A guide with a flow over the global latents, and for each plate with latents one flow that its rows share.

    .. math:: q(x) = q_0(x_0) \prod_l \prod_{r} q_l(x_{lr} \mid x_0, x_{\mathrm{parents}(r)}, e_r)

    A level l is a set of plates with latents, such as schools, and pupils in schools. The latents of its rows depend on
    those global latents with which they, or the latents that they enclose, share a factor of the log joint; on the
    latents of the rows that enclose them; and on what tells a row from others: parameters of its own, which are learned
    (a table with as many entries as the plate has rows), features that an encoder computes from the data of the row, or
    both. With an encoder alone the number of parameters does not depend on the size of a plate, and rows that were
    never seen have a posterior, see :meth:`pyroflows.Posterior.local`.

    Rows of plates may be subsampled, by ``subsample_size`` or by ``subsample=``; for the latter the first call must
    have all rows. The log-density then counts each row as many times as the model's plate does. A mask may leave out
    whole rows, such as those that pad groups of unequal size; in a call that sees a part of the rows, these then have
    draws without a meaning, which count nowhere.

    Args:
        model: a Pyro model whose latents are continuous.
        flow_fn: ``latent_dim -> flow``, the flow over the global latents, as for :class:`AutoFlow`.
        local_flow_fn: ``(dim, context_dim) -> layer``, the flow that the rows of a level share.
        encoder: ``(rows, *args, **kwargs) -> features``, a module or a function, where ``rows`` are the indices of the
            rows of the level's plate, or a tuple of these for several plates, ``args`` and ``kwargs`` are the model's
            arguments, and features are ``(*numbers of rows, num_features)``. With several levels, a dictionary of
            encoders by latent site. None for none.
        learned_rows: whether each row has parameters of its own; None for those levels that have no encoder.
        init_loc_fn: as for :class:`AutoFlow`.
        init_scale: as for :class:`AutoFlow`.
        dtype: as for :class:`AutoFlow`.

    Raises:
        ModelError: at the first call, if the guide cannot fit the model; names the site.
        OptionError: if an option is not valid; at the first call, if an encoder fits no level.
        DataError: at the first call, if an encoder gives NaN or infinite features; names the plate.

    Example:
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y), subsample_size=10) as rows:
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])
        >>> guide = AutoStructuredFlow(model, encoder=lambda rows, y: y[rows, None])
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> loss = svi.step(torch.randn(1000))
        >>> guide(torch.randn(1000))["z"].shape
        torch.Size([10])
    """

    def __init__(
        self,
        model: Model,
        flow_fn: FlowFn | None = None,
        local_flow_fn: LocalFlowFn = default_local_flow,
        *,
        encoder: Encoder | Mapping[str, Encoder] | None = None,
        learned_rows: bool | None = None,
        init_loc_fn: InitFn = init_to_median,
        init_scale: float = 0.1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, flow_fn, init_loc_fn=init_loc_fn, init_scale=init_scale, dtype=dtype)
        self.local_flow_fn = local_flow_fn
        self.learned_rows = learned_rows
        self.levels: tuple[SiteLevel, ...] = ()
        self._kept: list[Tensor | None] = []
        self.encoder = encoder
        self._held: Flow | None = None
        self._calls = Calls(self.model)

    @isolated
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._example = args, kwargs
        # A flow that the guide has goes on, for the rows of these arguments.
        self._held, self.flow = self.flow, None
        try:
            if not self._set_up_whole(args, kwargs):
                super()._setup_prototype(*args, **kwargs)
        except Exception:
            self.prototype_trace, self.layout = None, None
            raise
        finally:
            self.flow = self.flow or self._held
            self._held = None
            del self._example

    def _set_up_whole(self, args: Any, kwargs: Any) -> bool:
        """Set up with all rows of the plates, if the arguments hold their data."""
        call = self.call(args, kwargs)
        if all(plate.name in call.given for plate in call.layout.structure.subsampled):
            return False
        try:
            with all_rows():
                describe_for_flow(self.model, args, kwargs)
        except Exception:  # the model may raise anything where the arguments hold a batch of its data
            return False
        with all_rows():
            super()._setup_prototype(*args, **kwargs)
        return True

    def start_at(self, loc: Tensor, scale: Tensor, *args: Any, **kwargs: Any) -> None:
        """Build the flow anew so that it starts close to independent Gaussians, as :class:`AutoFlow` does.

        Args:
            loc: the means, a packed unconstrained vector ``(latent_dim,)``.
            scale: the standard deviations ``(latent_dim,)``, positive.
            args: the model's arguments.
            kwargs: the model's keyword arguments.

        Raises:
            OptionError: if the scale is a matrix.
        """
        if scale.dim() != 1:
            raise OptionError(
                "AutoStructuredFlow starts at standard deviations, and not at a matrix: give its diagonal"
            )
        if self.layout is None:
            self._setup_prototype(*args, **kwargs)
        self._example = args, kwargs
        is_whole = not self._built_layout().structure.subsampled
        try:
            with all_rows() if is_whole else nullcontext():
                super().start_at(loc, scale, *args, **kwargs)
        finally:
            del self._example

    def _require_rows(self, structure: ModelStructure) -> None:
        """Take any run, since other runs may show other rows."""

    def _flow_at(self, loc: Tensor, scale: Tensor | None = None, centering: Centering | None = None) -> Flow:
        args, kwargs = self._example
        layout = self._built_layout()
        self.levels = levels_of(layout)
        self._require_no_masked_part()
        self._kept = [level.is_kept for level in self.levels[1:]]
        if self._held is not None:
            return self._placed_anew(args, kwargs)
        factors = shared_factors(self.model, args, kwargs, layout, loc + 0.1 * torch.randn_like(loc))
        scale = torch.full_like(loc, self._init_scale) if scale is None else scale
        num_local = len(self.levels) - 1
        encoders = [encoder_of(self.encoder, level, num_local) for level in self.levels[1:]]
        self._require_used(encoders)
        subsample = self.given_rows(self.call(args, kwargs), args, kwargs)
        self._require_known_rows(encoders, subsample)
        rows = rows_of(self.levels, subsample, encoders, Arguments(args, kwargs), self._kept)
        # The density of these latents counts each row once.
        rows = [own.elsewhere(weight=1.0) for own in rows]
        with torch.no_grad():
            require_finite_features(rows)
        return hierarchical_flow(
            self.levels,
            rows,
            read_by(self.levels, factors),
            self.flow_fn,
            self.local_flow_fn,
            loc,
            scale,
            self.learned_rows,
        )

    def _require_no_masked_part(self) -> None:
        """Raise if a mask may leave out rows, of which the arguments hold a part."""
        for level in self.levels[1:]:
            masked = [site.name for site in level.sites if site.mask is not None]
            if level.is_subsampled and masked:
                raise ModelError(
                    f"latent site '{masked[0]}' is masked, and the arguments hold a part of the rows of plate "
                    f"'{level.name}', so that it is not known which others the mask leaves out: call the guide, or "
                    "FlowVI, with all its rows first, or mask the data alone"
                )

    def _require_used(self, encoders: Sequence[nn.Module | None]) -> None:
        """Raise if an encoder belongs to no level."""
        given = self.encoder if isinstance(self.encoder, Mapping) else {}
        known = [site.name for level in self.levels[1:] for site in level.sites]
        for name in given:
            if name not in known:
                raise OptionError(f"encoder names site {name!r}, which is no latent in a plate: these are {known}")
        if self.encoder is not None and not any(encoders):
            raise OptionError("there is nothing to encode, since the model has no latents in plates: leave encoder out")

    def _require_known_rows(self, encoders: Sequence[nn.Module | None], given: Mapping[str, Tensor]) -> None:
        """Raise if rows have parameters of their own, and a call does not say which rows it holds."""
        for level, encoder in zip(self.levels[1:], encoders, strict=True):
            is_learned = encoder is None if self.learned_rows is None else self.learned_rows
            for plate in level.plates:
                if is_learned and plate.is_subsampled and plate.name not in given:
                    raise ModelError(
                        f"the arguments hold data of {plate.subsample_size} of the {plate.size} rows of plate "
                        f"'{plate.name}', but not which, so that these rows cannot have parameters of their own: give "
                        f"the model their indices, for pyro.plate('{plate.name}', {plate.size}, subsample=indices), or "
                        "the guide an encoder"
                    )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latents, those of subsampled plates for the rows that are drawn; as a dictionary by site.

        Args:
            args: the model's arguments.
            kwargs: the model's keyword arguments.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        call = self.call(args, kwargs)
        is_whole = not call.layout.structure.subsampled and not self._built_layout().structure.subsampled
        if is_whole and not call.given and self.encoder is None:
            return super().forward(*args, **kwargs)
        self._claim_parameters()
        plates = self._plates_of(call, self.given_rows(call, args, kwargs))
        subsample = {name: plates[name]._indices for name in call.partial}
        law: Any = self.law_at(call.levels, subsample, args, kwargs)
        if torch.is_grad_enabled():
            law = law.estimated()
        latent = pyro.sample(f"_{self._pyro_name}_latent", law, infer={"is_auxiliary": True})
        values, ladjs = {}, {}
        for site, unconstrained in _unpacked(latent, call.layout):
            values[site.name], ladjs[site.name] = constrain_site(site, unconstrained)
        if not subsample and self.__dict__["_model"] is not None:
            values = with_left_out(values, call.layout.structure, self.model, args, kwargs)
        counted = self.counted(call.levels, subsample)
        for site in call.layout.structure.latents:
            if site.name in counted:
                site = replace(site, kept=counted[site.name])
            with ExitStack() as stack:
                for plate in site.plates:
                    stack.enter_context(plates[plate.name])
                pyro.sample(site.name, _point_mass(site, values[site.name], ladjs[site.name]))
        return values

    def call(self, args: Any, kwargs: Any) -> Call:
        """What a call of the model with these arguments shows of its plates."""
        return self._calls.kind(args, kwargs)

    def at(self, args: Any, kwargs: Any) -> "AutoStructuredFlow":
        """Return a guide with the same parameters, whose latents are those at other arguments of the model.

        Args:
            args: the model's arguments.
            kwargs: the model's keyword arguments.
        """
        made: Any = self.holding(self._built(), self.flow_fn)
        made._setup_prototype(*args, **kwargs)
        return made

    def _placed_anew(self, args: Any, kwargs: Any) -> Flow:
        """The flow that the guide has, for the latents of its layout."""
        assert self._held is not None
        layer: Any = self._held.transform.layers[0]
        subsample = self.given_rows(self.call(args, kwargs), args, kwargs)
        encoders = [level.encoder for level in layer.levels]
        rows = rows_of(self.levels, subsample, encoders, Arguments(args, kwargs), self._kept)
        return viewed(layer, self.levels, [own.elsewhere(weight=1.0) for own in rows])

    def of_globals(self) -> "AutoStructuredFlow":
        """Return a guide with the same parameters, without the latents of subsampled plates, whose rows vary."""
        structure = self._built_layout().structure
        latents = [site for site in structure.latents if not any(plate.is_subsampled for plate in site.plates)]
        layout = Layout(replace(structure, latents=tuple(latents)))
        found = {level.plates: level for level in levels_of(layout)}
        levels = tuple(found.get(level.plates, level) for level in self.levels)
        layer, rows = self._layer, []
        for level, own in zip(levels[1:], layer.rows, strict=True):
            if level.plates in found:
                rows.append(own.elsewhere(places=level.places))
            else:
                rows.append(own.none_of_them())
        made: Any = self.holding(viewed(layer, levels, rows), self.flow_fn)
        made.layout, made.levels = layout, levels
        return made

    def globals_alone(self) -> AutoFlow:
        """Return the guide of the global latents as :class:`AutoFlow` has it, with the same parameters.

        Raises:
            ModelError: if other plates than subsampled ones have latents.
        """
        found = self.of_globals()
        if others := [
            level.name for level, rows in zip(found.levels[1:], found._layer.rows, strict=True) if len(rows.ids)
        ]:
            raise ModelError(f"a file holds the global latents alone, but plate {', '.join(others)} has latents too")
        made = AutoFlow(self.model, self.flow_fn)
        made.dtype, made.layout = self.dtype, found.layout
        made.hold(Flow([*self._layer.flow.layers, self._layer.affine], standardize=False), self.flow_fn)
        return made

    @property
    def _layer(self) -> Any:
        return self._built().transform.layers[0]

    def given_rows(self, call: Call, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """The rows of those plates that are given them by the arguments of a call."""
        return self._calls.given_rows(call, args, kwargs)

    def _plates_of(self, call: Call, given: Mapping[str, Tensor]) -> dict[str, Any]:
        """Make the plates of a call, which draw their rows or are given them."""
        return {
            plate.name: pyro.plate(
                plate.name, plate.size, plate.subsample_size, subsample=given.get(plate.name), dim=plate.dim
            )
            for plate in call.layout.structure.plates.values()
            if plate.dim is not None
        }

    @property
    def is_amortized(self) -> bool:
        """Whether rows have no parameters of their own, so that rows that were never seen have a posterior."""
        layer: Any = self._built().transform.layers[0]
        return len(layer.levels) > 0 and all(level.embedding is None for level in layer.levels)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that the flow of a state dict is built like the flow that this guide holds.

        Raises:
            CheckpointError: if this guide is not built yet, or holds another flow.
        """
        if state.numel() and self.flow is None:
            raise CheckpointError(
                "the flow of AutoStructuredFlow follows from the model's plates and data: call guide(*args) once with "
                "the model's arguments before load_state_dict"
            )
        super().set_extra_state(state)

    def counted(self, levels: Sequence[SiteLevel], subsample: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the latents of a run that sees some rows count, by site of which a mask leaves out rows.

        Args:
            levels: the levels of the run.
            subsample: the indices of the rows that the run sees, by subsampled plate.

        Returns:
            Booleans that broadcast with the batch shape of the site.
        """
        found: dict[str, Tensor] = {}
        for level, kept in zip(levels[1:], self._kept, strict=True):
            if level.is_subsampled and kept is not None:
                found |= level.by_site(kept[level.ids(subsample)])
        return found

    def law_at(
        self, levels: tuple[SiteLevel, ...], subsample: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> FlowDistribution:
        """The law of the latents of a run that sees some rows, whose log-density counts each row for others.

        Args:
            levels: the levels of the run.
            subsample: the indices of the rows that the run sees, by subsampled plate.
            args: the model's arguments.
            kwargs: the model's keyword arguments.
        """
        view = self.hierarchy_at(levels, subsample, args, kwargs)
        return FlowDistribution(WeightedNormal(view.weights.to(next(view.parameters()))), view)

    def hierarchy_at(
        self, levels: tuple[SiteLevel, ...], subsample: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> Hierarchy:
        """The layer of the flow for the latents of a run, see :meth:`law_at`."""
        layer = self._layer
        encoders = [level.encoder for level in layer.levels]
        rows = rows_of(levels, subsample, encoders, Arguments(args, kwargs), self._kept)
        return layer.at(levels[0].places[0], rows)
