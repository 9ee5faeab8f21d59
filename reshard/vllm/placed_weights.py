"""Experts go to their places while the original is loaded, and afterwards it is proved that they did.

Every loader of vLLM that knows experts by id asks `RoutedExperts._map_global_expert_id_to_local_expert_id` where one
goes. There the placement is looked up first. Some models fill their parameters in other ways, which nobody can list for
all versions of vLLM; so every call is noted, and a model serves only where the notes say that every slot of every
parameter was filled through this seam, with the expert that belongs there, and that nothing was filled past it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .patching import replace_if_there

if TYPE_CHECKING:
    from torch import Tensor

ROUTER_TENSORS = ("e_score_correction_bias", "hash_indices_table")  # seen here too; they stay in the original's order
SAMPLE = 64  # values of each slot that are looked at to see whether a parameter was changed


@dataclass
class Filling:
    """What is known of how the experts of one layer were loaded.

    `expected[slot]` is the logical expert that a local slot shall hold. `filled[parameter][slot]` has what came: parts
    (w1, w2, w3), each with the expert that it came from.
    """

    logical_to_physical: tuple[int, ...]
    expected: tuple[int, ...]
    filled: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)
    asked: tuple[int, int] | None = None  # the seam's last question and answer: expert and local slot
    past_the_seam: str | None = None
    samples: dict[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, experts: Any, logical_to_physical: tuple[int, ...]) -> Filling:
        """Of a `RoutedExperts` that was just made, before anything was loaded."""
        expert_map = experts.expert_map_manager.expert_map
        local = list(range(len(logical_to_physical))) if expert_map is None else expert_map.tolist()
        slots = {local[physical]: logical for logical, physical in enumerate(logical_to_physical)}
        slots.pop(-1, None)
        own = (item for item in experts.named_parameters(recurse=False) if item[0] not in ROUTER_TENSORS)
        samples = {name: sample(parameter) for name, parameter in own}
        return cls(logical_to_physical, tuple(slots[slot] for slot in range(len(slots))), samples=samples)

    def note(self, parameter: str, part: str, expert: int, whole: bool) -> None:
        """A tensor of `expert` was loaded into `parameter`; `whole` if as one tensor of all experts."""
        if self.asked is None or self.asked[0] != expert or whole:
            self.past_the_seam = parameter
        elif (slot := self.asked[1]) >= 0:
            self.filled.setdefault(parameter, {}).setdefault(slot, {})[part] = expert

    def fault(self, experts: Any) -> str | None:
        """What is wrong after loading, in words; None where every slot holds what it shall."""
        if self.past_the_seam is not None:
            return f"{self.past_the_seam} was loaded as one tensor of all experts, in the original's order"
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
                return f"{name} was filled, and not by expert"
        return None

    def forget(self) -> None:
        """All went well: what comes later (reload, weight updates) need not be noted."""
        self.filled, self.samples = {}, {}


def sample(parameter: Tensor) -> Tensor | None:
    """Some bytes of each slot of a parameter [slots, …]; None of what has no memory, or nothing in it."""
    import torch

    if parameter.is_meta or parameter.dim() == 0 or parameter.numel() == 0 or not parameter.is_contiguous():
        return None
    return parameter.detach().view(len(parameter), -1)[:, :SAMPLE].clone().view(torch.uint8)


def install(module: ModuleType) -> None:
    """Put the placement into the seam; `module` defines RoutedExperts."""
    replace_if_there(module.RoutedExperts, "_map_global_expert_id_to_local_expert_id", _by_place)
    replace_if_there(module.RoutedExperts, "weight_loader", _noted)


def _by_place(map_id: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(map_id)
    def _map_global_expert_id_to_local_expert_id(experts: Any, expert_id: int) -> int:
        filling: Filling | None = experts.__dict__.get("reshard_filling")
        if filling is None:
            return map_id(experts, expert_id)
        slot = map_id(experts, filling.logical_to_physical[expert_id])
        filling.asked = expert_id, slot
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
        filling.asked = None
        loaded = load(experts, param, loaded_weight, weight_name, shard_id, expert_id, True)
        if loaded and filling.samples:
            known = (name for name, own in experts.named_parameters(recurse=False) if own is param)
            name = next(known, weight_name.rpartition(".")[2])
            filling.note(name, str(shard_id), expert_id, whole=loaded_weight.dim() == 3)
        return loaded if return_success else None

    return weight_loader
