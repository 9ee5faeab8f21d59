"""Makes --enable-ep-weight-filter follow a placement, so that each rank reads its own experts of each layer.

vLLM decides for each tensor whether to skip it: it looks up the expert in one set, computed by its own placement
strategy and the same for all layers. We replace that set by one that knows the experts of each layer.
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
    """The set that vLLM made, of a rank's experts under linear placement; also gives the placed experts by layer."""

    def __init__(self, linear: set[int], served: ServedPlacement, num_experts: int, rank: int) -> None:
        super().__init__(linear)
        slots = rank_slots(num_experts, served.ep_size)[rank]

        @functools.cache
        def experts_of(layer: str) -> frozenset[int]:
            order = served.order(layer, num_experts, draft=True)  # `proof` reports unknown layers later
            return frozenset(linear if order is None else order[slots.start : slots.stop])

        self._experts_of = experts_of

    def of_tensor(self, name: str) -> frozenset[int]:
        """The logical experts that this rank owns in the layer of the tensor `name`."""
        return self._experts_of(module_name(name))


def install_expert_set(default_loader: ModuleType) -> None:
    """Replace the set that vLLM computes; `default_loader` is the module that computes it."""
    replace_if_there(default_loader, "compute_local_expert_ids", _placed)


def install_skip(weight_utils: ModuleType) -> None:
    """Look up experts by layer; `weight_utils` is the module that reads and skips tensors."""
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
