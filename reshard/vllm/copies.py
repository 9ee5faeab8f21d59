"""Chooses among the copies of experts, in an original that is served with a placement that has copies.

vLLM's EPLB knows which slots hold copies of an expert, and picks one by a token's position. So a small batch has more
active experts than it needs. We replace that step of its routers, `_apply_eplb_mapping`, and leave the rest to vLLM:

    up to MAX_TOKENS tokens    one copy of each active expert, so that the busiest rank has the fewest of them
                               (`choose_copies`)
    more tokens                all experts are active: the tokens of an expert are split over its copies, by position
                               (`placement.copy_split`)

All ranks must choose alike, so the first needs ranks that route the same tokens. With data parallelism, and with
prefill context parallelism, each rank routes its own: then an expert's copy is the same in all small batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from ..placement.copy_choice import MAX_ROUNDS, schedule
from ..placement.copy_split import split_table
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
        split_EN: int32, the slots of each expert in large batches, by a token's position
        fixed_E1: int32, the slot of each expert in small batches, if ranks route different tokens
        tables: for the choice in small batches, if all ranks route the same tokens
    """

    physical_to_logical: tuple[int, ...]
    split_EN: Tensor
    fixed_E1: Tensor
    tables: Tables | None

    def __init__(
        self,
        physical_to_logical: Sequence[int],
        num_experts: int,
        ep_size: int,
        device: torch.device | str,
        room: Room | None,
    ) -> None:
        """Make the maps of a placement.

        Parameters:
            physical_to_logical: [P]
            num_experts: E
            ep_size: R, a divisor of P
            device: of the tensors
            room: for `tables`; None if ranks route different tokens
        """
        self._num_experts, self._ep_size, self._room = num_experts, ep_size, room
        self.physical_to_logical = tuple(physical_to_logical)
        split_EN, fixed_E1, tables = self._made()
        self.split_EN, self.fixed_E1 = split_EN.to(device), fixed_E1.to(device)
        self.tables = None if tables is None else tables.to(device)

    def update(self, physical_to_logical: Sequence[int]) -> None:
        """Follow another placement with as many slots, in place."""
        if tuple(physical_to_logical) == self.physical_to_logical:
            return
        self.physical_to_logical = tuple(physical_to_logical)
        split_EN, fixed_E1, tables = self._made()
        _write(self.split_EN, split_EN)
        _write(self.fixed_E1, fixed_E1)
        if self.tables is not None and tables is not None:
            for old, new in zip(self.tables.tensors, tables.tensors, strict=True):
                _write(old, new)

    def _made(self) -> tuple[Tensor, Tensor, Tables | None]:
        placement, room = (self.physical_to_logical, self._num_experts, self._ep_size), self._room
        split_EN, fixed_E1 = split_table(*placement), split_table(*placement, columns=1)
        if room is None:
            return split_EN, fixed_E1, None
        from .choose_copies import tables

        prepared = schedule(*placement, max_rounds=room.rounds, max_copies=room.copies)
        return split_EN, fixed_E1, tables(prepared, "cpu", room)

    def __call__(self, ids_TK: Tensor, tokens: Tensor | None = None, record: Record | None = None) -> Tensor:
        """Map logical ids to physical ones; negative ids stay as they are.

        Parameters:
            ids_TK: of any integer type, on the GPU
            tokens: [1], how many of the rows are tokens; the rest is padding
            record: counts tokens, without padding
        """
        from .choose_copies import MAX_TOKENS, choose_copies
        from .split_ids import split_ids

        if len(ids_TK) > MAX_TOKENS:
            return split_ids(ids_TK, self.split_EN, tokens, record)
        if self.tables is None:
            return split_ids(ids_TK, self.fixed_E1, tokens, record)
        return choose_copies(ids_TK, self.tables, tokens, record)


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


def _write(old: Tensor, new: Tensor) -> None:
    """Overwrite `old` in the order of its stream, without waiting for it."""
    old.copy_(new.pin_memory() if old.is_cuda else new, non_blocking=True)


class ChoosesCopies(RoutesItself):
    """A mixin before the router's own class; it chooses among copies where vLLM's EPLB would."""

    reshard_copies: CopyMaps | None  # None until EPLB has its maps, and for a draft's layer that stays as vLLM makes it
    reshard_kernel: Fused | None
    eplb_state: Any

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        own: Any = super()
        if self.reshard_kernel is None or not understood(args[1:], kwargs):
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
