"""How a guide's flow was built, noted in its state dict, so that a guide that was never called can build it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyroflows.errors import CheckpointError, OptionError
from pyroflows.flows import Flow, Recipe
from pyroflows.flows.facts import json_from_tensor, json_to_tensor
from pyroflows.guides.centering import Centering
from pyroflows.guides.hierarchical import facts_of
from pyroflows.transforms import Triangular


@dataclass(frozen=True)
class FlowState:
    """How the flow of a guide was built.

    Args:
        recipe: the recipe of the flow; None for a function of the user's.
        dim: the number of unconstrained latents, at least 1.
        last_layer: "diagonal" or "triangular", the kind of scale in the guide's own last layer; "hierarchical" for the
            layer of :func:`pyroflows.guides.hierarchical.hierarchy_near`.
        num_components: the number of flows in a mixture; 1 for a single flow.
        dtype: the dtype of the flow, such as "float32".
        centred: the sites that a last layer :class:`pyroflows.guides.centering.Centering` changes; empty without one.
        hierarchy: the sizes of the levels of a hierarchical layer; None for others.
        centers: the angles at the origin of the unconstrained space, by site on circles; without them the values of the
            flow mean nothing.

    Example:
        >>> state = FlowState(Recipe("IAF"), dim=3, last_layer="diagonal", num_components=1, dtype="float32")
        >>> FlowState.from_tensor(state.to_tensor()) == state
        True
    """

    recipe: Recipe | None
    dim: int
    last_layer: str
    num_components: int
    dtype: str
    centred: tuple[str, ...] = ()
    hierarchy: Mapping[str, Any] | None = None
    centers: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, flow: Flow, recipe: Recipe | None, centers: Mapping[str, Tensor]) -> "FlowState":
        """Describe a flow that ends in a guide's own layer."""
        layers = flow.components[0].layers
        centred = layers.pop().names if isinstance(layers[-1], Centering) else ()
        hierarchy = facts_of(flow.components[0])
        dtype = str(next(flow.parameters()).dtype).removeprefix("torch.")
        kind = "triangular" if isinstance(layers[-1], Triangular) else "diagonal"
        last_layer = "hierarchical" if hierarchy else kind
        return cls(recipe, flow.dim, last_layer, len(flow.components), dtype, centred, hierarchy, centers)

    def to_tensor(self) -> Tensor:
        """Write the fields into a tensor, since a state dict should hold tensors alone."""
        centers = {name: center.tolist() for name, center in self.centers.items()}
        return json_to_tensor({**vars(self), "recipe": self.recipe and self.recipe.to_json(), "centers": centers})

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "FlowState":
        """Read what :meth:`to_tensor` wrote.

        Raises:
            CheckpointError: if the tensor cannot be read.
        """
        try:
            fields: dict[str, Any] = json_from_tensor(tensor)
            recipe = fields["recipe"] and Recipe.from_json(fields["recipe"])
            centers = {name: torch.tensor(values, dtype=torch.float64) for name, values in fields["centers"].items()}
            centred = tuple(map(str, fields.get("centred", ())))
            return replace(cls(**fields), recipe=recipe, centred=centred, centers=centers)
        except (ValueError, TypeError, KeyError, AttributeError, OptionError) as error:
            raise CheckpointError(f"the state does not say how its flow was built: {error}") from error

    def check_same(self, guide: "FlowState") -> None:
        """Raise if a state of this flow cannot be loaded into a guide with another flow.

        Args:
            guide: how the flow of the guide was built.

        Raises:
            CheckpointError: if the two differ; names the first difference.
        """
        if self.recipe != guide.recipe:
            raise CheckpointError(
                f"the state is of a flow that {_maker(self.recipe)} made, but this guide has {_maker(guide.recipe)}: "
                "make the guide with the same flow_fn"
            )
        if self.dim != guide.dim:
            raise CheckpointError(
                f"the state is of a flow of {self.dim} dimensions, but this guide holds one of {guide.dim}: they "
                "belong to different models"
            )
        if self.last_layer != guide.last_layer:
            raise CheckpointError(
                f"the state is of a flow that ends in a {self.last_layer} layer, but this guide holds one that ends in "
                f"a {guide.last_layer} layer: load the state into a fresh guide"
            )
        if self.centred != guide.centred:
            raise CheckpointError(
                f"the state is of a flow with learned centring of the sites {list(self.centred)}, but this guide holds "
                f"one of the sites {list(guide.centred)}: load the state into a fresh guide"
            )
        if self.hierarchy != guide.hierarchy:
            raise CheckpointError(
                "the state is of a flow of other local latents than those of this guide: load the state into a fresh "
                "guide"
            )
        if self.num_components != guide.num_components:
            raise CheckpointError(
                f"the number of flows that are mixed is {self.num_components} in the state, but "
                f"{guide.num_components} in this guide: load the state into a fresh guide"
            )


def _maker(recipe: Recipe | None) -> str:
    return "a function of the user's" if recipe is None else repr(recipe)
