"""Loads the experts of an original into the slots of a placement, and proves afterwards that each slot is right.

vLLM's loaders call `RoutedExperts._map_global_expert_id_to_local_expert_id` to find an expert's slot. We wrap this
lookup, and map the expert through the placement first. Some models fill their parameters without it, and nobody can
list those for all versions of vLLM. So we note every tensor that is loaded. A model serves only if the notes show that
every slot of every parameter was filled through the lookup, with the right expert, and that nothing bypassed it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from .patching import replace_if_there

if TYPE_CHECKING:
    from torch import Tensor

ROUTER_TENSORS = ("e_score_correction_bias", "hash_indices_table")  # also held by the module; keep the original's order
SAMPLE = 64  # values per slot that we compare to see whether a parameter was filled


@dataclass
class Filling:
    """Notes on how the experts of one layer were loaded.

    `expected[slot]` is the logical expert that a local slot must hold. `filled[parameter][slot]` maps each part that
    was loaded (w1, w2, w3) to the logical expert that it came from.
    """

    logical_to_physical: tuple[int, ...]
    expected: tuple[int, ...]
    filled: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)
    last_lookup: tuple[int, int] | None = None  # the last expert that was looked up, and its local slot (-1: not here)
    bypassed: str | None = None  # a parameter that was loaded without the lookup
    samples: dict[str, Tensor | None] = field(default_factory=dict)
    is_loaded: bool = False  # the first load is over

    @classmethod
    def of(cls, experts: Any, logical_to_physical: tuple[int, ...]) -> Filling:
        """Start the notes for a `RoutedExperts` module, before anything is loaded into it."""
        expert_map = experts.expert_map_manager.expert_map
        local = list(range(len(logical_to_physical))) if expert_map is None else expert_map.tolist()
        slots = {local[physical]: logical for logical, physical in enumerate(logical_to_physical)}
        slots.pop(-1, None)
        own = (item for item in experts.named_parameters(recurse=False) if item[0] not in ROUTER_TENSORS)
        samples = {name: sample(parameter) for name, parameter in own}
        return cls(logical_to_physical, tuple(slots[slot] for slot in range(len(slots))), samples=samples)

    def note(self, parameter: str, part: str, expert: int, whole: bool) -> None:
        """Note that `part` of `expert` was loaded into `parameter`; `whole`: as one tensor of all experts."""
        if not self.looked_up(expert, whole) or self.last_lookup is None:
            self.bypassed = parameter
        elif (slot := self.last_lookup[1]) >= 0:
            self.filled.setdefault(parameter, {}).setdefault(slot, {})[part] = expert

    def fault(self, experts: Any) -> str | None:
        """Describe what is wrong after loading; None if every slot holds its expert."""
        if self.bypassed is not None:
            return f"{self.bypassed} was loaded as one tensor of all experts, in the original's order"
        for family in ("w13", "w2"):
            if not any(name.startswith(family) for name in self.filled):
                return f"no tensor of {family} was loaded by expert"
        for name, by_slot in self.filled.items():
            parts = {part for found in by_slot.values() for part in found}
            for slot, expert in enumerate(self.expected):
                found = by_slot.get(slot, {})
                if lacking := sorted(parts - found.keys()):
                    return f"{name}: slot {slot}, of expert {expert}, was not filled ({lacking[0]})"
                if wrong := sorted(set(found.values()) - {expert}):
                    return f"{name}: slot {slot} was filled with expert {wrong[0]}, expected {expert}"
        for name, parameter in experts.named_parameters(recurse=False):
            before = self.samples.get(name)
            if name in self.filled or before is None or len(parameter) != len(self.expected):
                continue
            now = sample(parameter)
            if now is not None and not bool((now == before).all()):
                return f"{name} was filled, but not expert by expert"
        return None

    def forget(self) -> None:
        """Drop the notes once the layer is proved, or is to hold dummy weights: later loads are checked one by one."""
        self.filled, self.samples, self.is_loaded = {}, {}, True

    def looked_up(self, expert: int, whole: bool) -> bool:
        """Whether the load that just ended asked for the slot of `expert`, and loaded that expert only."""
        return not whole and self.last_lookup is not None and self.last_lookup[0] == expert


def sample(parameter: Tensor) -> Tensor | None:
    """The first bytes of each slot of a parameter [slots, …]; None if it has no memory, no values or gaps."""
    import torch

    if parameter.is_meta or parameter.dim() == 0 or parameter.numel() == 0 or not parameter.is_contiguous():
        return None
    return parameter.detach().view(len(parameter), -1)[:, :SAMPLE].clone().view(torch.uint8)


def install(module: ModuleType) -> None:
    """Wrap the lookup and the loader that calls it; `module` defines RoutedExperts."""
    replace_if_there(module.RoutedExperts, "_map_global_expert_id_to_local_expert_id", _by_place)
    replace_if_there(module.RoutedExperts, "weight_loader", _noted)


def _by_place(map_id: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(map_id)
    def _map_global_expert_id_to_local_expert_id(experts: Any, expert_id: int) -> int:
        filling: Filling | None = experts.__dict__.get("reshard_filling")
        if filling is None:
            return map_id(experts, expert_id)
        slot = map_id(experts, filling.logical_to_physical[expert_id])
        filling.last_lookup = expert_id, slot
        return slot

    return _map_global_expert_id_to_local_expert_id


def _noted(load: Callable[..., bool | None]) -> Callable[..., bool | None]:
    @functools.wraps(load)
    def weight_loader(
        experts: Any,
        param: Any,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        filling: Filling | None = experts.__dict__.get("reshard_filling")
        if filling is None:
            return load(experts, param, loaded_weight, weight_name, shard_id, expert_id, return_success)
        filling.last_lookup = None
        loaded = load(experts, param, loaded_weight, weight_name, shard_id, expert_id, True)
        whole = loaded_weight.dim() == 3
        if loaded and filling.is_loaded and not filling.looked_up(expert_id, whole):
            raise UnsupportedError(
                f"{weight_name}: these new weights bypass the placement: they hold all experts in one tensor, or are "
                "copied without looking up the expert's slot; the experts are now misplaced. Restart the server, and "
                "send weights expert by expert, or serve without a placement"
            )
        if loaded and not filling.is_loaded:
            known = (name for name, own in experts.named_parameters(recurse=False) if own is param)
            name = next(known, weight_name.rpartition(".")[2])
            filling.note(name, str(shard_id), expert_id, whole=whole)
        return loaded if return_success else None

    return weight_loader
