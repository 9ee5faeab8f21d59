"""Chooses among the copies of experts, in an original that is served with a placement that has copies.

vLLM's EPLB knows which slots hold copies of an expert, and picks one by a token's position. We replace that step of its
routers, `_apply_eplb_mapping`, and leave the rest to vLLM. Each batch gets one copy of each expert:

    one token                  always the same copy: choosing takes longer than it saves
    up to SMALL_BATCH tokens   so that the busiest rank has the fewest active experts (`choose_copies`)
    up to LARGE_BATCH tokens   always the same copy: all experts are active
    more tokens                so that the busiest rank takes the least time (`choose_by_weight`)

All ranks must use the same copy, or more experts would be active. With data parallelism, and with prefill context
parallelism, each rank routes its own tokens. Then an expert's copy is the same in all batches of up to LARGE_BATCH
tokens of a rank, and in larger ones each rank makes its own pairs of token and expert even.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from ..placement.copy_choice import BY_ACTIVE, MAX_ROUNDS, chosen_by, fixed_slots, schedule
from .fused import Fused, fused_in_place_of, understood
from .placed import router_fault
from .runners import RoutesItself
from .served import ServedPlacement, builds_draft

if TYPE_CHECKING:
    from torch import Tensor

    from .choose_copies import Record, Room, Tables

MORE_COPIES = 4  # of an expert that a batch may choose from, if EPLB rearranges: it may give some experts many


class CopyMaps:
    """The maps from logical to physical experts of one layer, in tensors that keep their addresses.

    Attributes:
        physical_to_logical: [P]
        tables: for the choice
        fixed_E: int32, the slot of each expert in batches that do not choose; ranks serve equally many experts
        same_tokens: whether all ranks route the same tokens
    """

    physical_to_logical: tuple[int, ...]
    tables: Tables
    fixed_E: Tensor
    same_tokens: bool

    def __init__(
        self,
        physical_to_logical: Sequence[int],
        num_experts: int,
        ep_size: int,
        device: torch.device | str,
        room: Room,
        *,
        same_tokens: bool,
    ) -> None:
        """Make the maps of a placement.

        Parameters:
            physical_to_logical: [P]
            num_experts: E
            ep_size: R, a divisor of P
            device: of the tensors
            room: of `tables`
            same_tokens: whether all ranks route the same tokens
        """
        self._num_experts, self._ep_size, self._room = num_experts, ep_size, room
        self.physical_to_logical, self.same_tokens = tuple(physical_to_logical), same_tokens
        tables, fixed_E = self._made()
        self.tables, self.fixed_E = tables.to(device), fixed_E.to(device)

    def update(self, physical_to_logical: Sequence[int]) -> None:
        """Follow another placement with as many slots, in place."""
        if tuple(physical_to_logical) == self.physical_to_logical:
            return
        self.physical_to_logical = tuple(physical_to_logical)
        tables, fixed_E = self._made()
        for old, new in zip((*self.tables.tensors, self.fixed_E), (*tables.tensors, fixed_E), strict=True):
            old.copy_(new.pin_memory() if old.is_cuda else new, non_blocking=True)

    def _made(self) -> tuple[Tables, Tensor]:
        from .choose_copies import tables

        placement, room = (self.physical_to_logical, self._num_experts, self._ep_size), self._room
        prepared = schedule(*placement, max_rounds=room.rounds, max_copies=room.copies)
        return tables(prepared, "cpu", room), fixed_slots(prepared).int()

    def __call__(self, ids_TK: Tensor, tokens: Tensor | None = None, record: Record | None = None) -> Tensor:
        """Map logical ids to physical ones; negative ids stay as they are.

        Parameters:
            ids_TK: of any integer type, on the GPU
            tokens: [1], how many of the rows are tokens; the rest is padding
            record: counts tokens, without padding
        """
        from .choose_by_weight import choose_by_weight, map_and_count
        from .choose_copies import choose_copies

        weight = chosen_by(len(ids_TK), same_tokens=self.same_tokens)
        if weight is None:
            return map_and_count(ids_TK, self.fixed_E, tokens, record)
        if weight is BY_ACTIVE:
            return choose_copies(ids_TK, self.tables, tokens, record)
        # where ranks gather rows before they route, `tokens` is this rank's own number, and they must choose alike
        return choose_by_weight(ids_TK, self.tables, weight, tokens, record, all_rows=not self.same_tokens)


def room_for(placements: Sequence[Sequence[int]], num_experts: int, ep_size: int, *, rearranges: bool) -> Room:
    """Room for the placements of all layers, and for those that EPLB may make of them if it `rearranges`.

    A placement of EPLB's for which there is no room is served with fewer choices: see `schedule`.
    """
    from .choose_copies import Room

    rooms = [Room.of(schedule(placement, num_experts, ep_size)) for placement in placements]
    most = Room(*(max(getattr(room, what) for room in rooms) for what in ("rounds", "copies", "fixed")))
    if not rearranges:
        return most
    slots = len(placements[0]) // ep_size
    spare = slots - num_experts // ep_size
    return Room(
        rounds=min(MAX_ROUNDS, max(most.rounds, 4 * spare)),
        copies=max(most.copies, min(MORE_COPIES, ep_size)),
        fixed=slots,
    )


class ChoosesCopies(RoutesItself):
    """A mixin before the router's own class; it chooses among copies where vLLM's EPLB would."""

    reshard_copies: CopyMaps | None  # None until EPLB has its maps, and for a draft's layer that stays as vLLM makes it
    reshard_kernel: Fused | None
    eplb_state: Any

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        own: Any = super()
        few = len(router_logits) == 1  # vLLM's router is faster then, as in `placed`
        if self.reshard_kernel is None or few or not understood(args[1:], kwargs):
            return own._compute_routing(hidden_states, router_logits, *args, **kwargs)

        def router(logits: Tensor) -> tuple[Tensor, Tensor]:
            hidden = hidden_states
            if logits is not router_logits:  # trial logits: routers read only the number of hidden states
                hidden = hidden_states.new_zeros(len(logits), hidden_states.shape[1])
            weights, ids = own._compute_routing(hidden, logits, *args, **kwargs)
            return weights, ids

        return self.reshard_kernel.route(router_logits, self.__dict__["e_score_correction_bias"], router)

    def _apply_eplb_mapping(self, topk_ids: Tensor) -> Tensor:
        """Map logical to physical ids, and count them where vLLM would."""
        if self.reshard_copies is None:
            own: Any = super()
            ids: Tensor = own._apply_eplb_mapping(topk_ids)
            return ids
        from vllm.v1.worker.ubatching import dbo_current_ubatch_id

        from .choose_copies import Record

        state = self.eplb_state
        tokens = state.num_unpadded_tokens_tensors[dbo_current_ubatch_id()]
        return self.reshard_copies(topk_ids, tokens, Record(state.expert_load_view, state.should_record_tensor))


def choosing_router(router: Any, served: ServedPlacement, arguments: dict[str, Any], prefix: str) -> Any:
    """Make the router of the layer `prefix` choose among copies; vLLM created it with `arguments`.

    Returns `router` unchanged for a draft's layer that the placement does not contain. Raises UnsupportedError for a
    router that cannot choose.
    """
    from vllm.config import get_current_vllm_config

    if fault := router_fault(router, arguments):
        raise UnsupportedError(
            f"{served.asked}: layer {prefix}: its router cannot choose among copies of experts: {fault}; use other "
            "options or serve without a placement"
        )
    num_experts = arguments["global_num_experts"] - served.redundant
    if served.order(prefix, num_experts, draft=builds_draft()) is None:
        return router
    device = get_current_vllm_config().device_config.device
    logical_E = torch.arange(num_experts, dtype=torch.int32, device=device)
    chooses: Any = object.__new__(type(f"ChoosesCopies{type(router).__name__}", (ChoosesCopies, type(router)), {}))
    kernel = fused_in_place_of(router, logical_E, prefix, logical=True)
    chooses.__dict__ = {**vars(router), "reshard_copies": None, "reshard_kernel": kernel}
    return chooses
