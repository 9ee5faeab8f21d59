"""--enable-ep-weight-filter of an original that is served placed: a rank reads its own experts, layer by layer.

vLLM asks for each tensor whether its expert is in one set, the same for all layers, made by its own placement strategy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..placement.layer_names import module_name
from ..placement.permutations import rank_slots
from .patching import replace_if_there
from .served import ServedPlacement, current_placement


class PlacedExperts(set[int]):
    """The set that vLLM made, of a rank's experts under linear placement, with what it takes to tell others."""

    def __init__(self, linear: set[int], served: ServedPlacement, num_experts: int, rank: int) -> None:
        super().__init__(linear)
        slots = rank_slots(num_experts, served.ep_size)[rank]

        @functools.cache
        def experts_of(layer: str) -> frozenset[int]:
            order = served.order(layer, num_experts, draft=True)  # what is wrong of the model's own is found later
            return frozenset(linear if order is None else order[slots.start : slots.stop])

        self._experts_of = experts_of

    def of_tensor(self, name: str) -> frozenset[int]:
        """The logical experts that this rank owns in the layer of the tensor `name`."""
        return self._experts_of(module_name(name))


def install_choice(default_loader: ModuleType) -> None:
    """Make the set; `default_loader` is the module that asks for it."""
    replace_if_there(default_loader, "compute_local_expert_ids", _placed)


def install_question(weight_utils: ModuleType) -> None:
    """Ask it by layer; `weight_utils` is the module that reads tensors."""
    replace_if_there(weight_utils, "should_skip_weight", _by_layer)


def _placed(compute: Callable[..., set[int] | None]) -> Callable[..., set[int] | None]:
    @functools.wraps(compute)
    def compute_local_expert_ids(
        num_experts: int, ep_size: int, ep_rank: int, *args: Any, **kwargs: Any
    ) -> set[int] | None:
        linear = compute(num_experts, ep_size, ep_rank, *args, **kwargs)
        served = current_placement()
        if linear is None or served is None:
            return linear
        return PlacedExperts(linear, served, num_experts, ep_rank)

    return compute_local_expert_ids


def _by_layer(skips: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(skips)
    def should_skip_weight(weight_name: str, local_expert_ids: Any) -> bool:
        if isinstance(local_expert_ids, PlacedExperts) and ".experts." in weight_name:
            return skips(weight_name, local_expert_ids.of_tensor(weight_name))
        return skips(weight_name, local_expert_ids)

    return should_skip_weight
