"""Swaps placements in place in a running vLLM, for `step_times.py`: without copies of experts, and with them.

*Without copies* vLLM serves an original with a placement. Its routers map ids by a table, which `Fixed` overwrites.

*With copies* vLLM was started with the placement that has the most, and with EPLB. Each rank then has as many slots as
that placement; others leave slots unused. There are three ways to map ids, and `Copies` gives each its own CUDA graphs:

    fixed         a placement without copies: the router's kernel maps ids by a table, as it does without EPLB
    chosen        reshard's choice of a copy, a kernel after the router's
    by position   vLLM's EPLB picks a copy by a token's position, in a kernel after the same router's

Tensors carry their shape in their name: L layers, E experts, P slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

BY_POSITION = ", by position"  # after the name of a placement


class Swaps(Protocol):
    """What `step_times.Rank` asks of both."""

    names: Sequence[str]

    def swap(self, name: str) -> None:
        """Serve this placement."""

    def swap_map(self, slot_LE: Tensor) -> None:
        """Serve each logical expert from this slot, whatever that slot holds."""

    def logical(self, name: str) -> Tensor:
        """The logical expert in each slot, [L, P]."""

    def before_step(self, tokens: int) -> None:
        """Prepare a step of so many tokens of this rank."""

    def about(self) -> dict[str, Any]:
        """How ids are mapped."""


class Fixed:
    """Placements without copies. `orders` has physical_to_logical [L, E] of each, `moe` the MoERunner of each layer."""

    def __init__(self, orders: Mapping[str, Tensor], moe: Sequence[Any]) -> None:
        self.names = list(orders)
        self._orders, self._moe = orders, moe

    def swap(self, name: str) -> None:
        """Serve this placement."""
        self.swap_map(self._orders[name].argsort(dim=1))

    def swap_map(self, slot_LE: Tensor) -> None:
        """Serve each logical expert from this slot."""
        for runner, slot_E in zip(self._moe, slot_LE, strict=True):
            runner.reshard_place.place_E.copy_(slot_E)

    def logical(self, name: str) -> Tensor:
        """The logical expert in each slot, [L, E]."""
        return self._orders[name]

    def before_step(self, tokens: int) -> None:
        """Nothing to prepare."""

    def about(self) -> dict[str, Any]:
        """The kernel that maps ids, and whether it reads the table that is overwritten."""
        kernel = self._moe[0].router.reshard_kernel
        return {
            "kernel_agreed": {} if kernel is None else agreed(kernel),
            "kernel_reads_the_map": kernel is not None
            and all(
                found.router.reshard_kernel.place_E.data_ptr() == found.reshard_place.place_E.data_ptr()
                for found in self._moe
            ),
        }


class Copies:
    """Placements, some of them with copies.

    Parameters:
        orders: physical_to_logical [L, P] of each; P differs
        by_position: the placements that are also served as vLLM picks copies
        moe: the MoERunner of each layer
        num_experts: E
        ranks: R
        recapture: capture CUDA graphs of the way that routers now map ids, and use them from then on; with the name of
            a way whose graphs exist, use those
    """

    def __init__(
        self,
        orders: Mapping[str, Tensor],
        by_position: Sequence[str],
        moe: Sequence[Any],
        num_experts: int,
        ranks: int,
        recapture: Callable[[str], None],
    ) -> None:
        from reshard.vllm.copies import CopyMaps, room_for

        self._moe, self._recapture, self._way = moe, recapture, ""
        slots = max(order_LP.shape[1] for order_LP in orders.values()) // ranks
        self._orders = {
            name: [padded(order_P, ranks, slots) for order_P in order_LP.tolist()] for name, order_LP in orders.items()
        }
        self._slots = {
            name: [slots_of(order_P, num_experts, ranks, slots) for order_P in order_LP.tolist()]
            for name, order_LP in orders.items()
        }
        with_copies = [name for name, order_LP in orders.items() if order_LP.shape[1] > num_experts]
        device = moe[0].router.eplb_state.expert_load_view.device
        self._fixed_LE = torch.zeros(len(moe), num_experts, dtype=torch.int32, device=device)
        self._kernels = [runner.router.reshard_kernel for runner in moe]
        self._fixed_kernels = [
            None if kernel is None else WithTable(kernel, slot_E)
            for kernel, slot_E in zip(self._kernels, self._fixed_LE, strict=True)
        ]
        same_tokens = moe[0].router.reshard_copies.same_tokens
        self._maps = {}
        for name in with_copies:
            layers = self._orders[name]
            room = room_for(layers, num_experts, ranks, rearranges=False)
            self._maps[name] = [
                CopyMaps(order_P, num_experts, ranks, device, room, same_tokens=same_tokens) for order_P in layers
            ]
        self.names = [*orders, *(f"{name}{BY_POSITION}" for name in by_position)]

    def swap(self, name: str) -> None:
        """Serve this placement."""
        if name.endswith(BY_POSITION):
            self._pick_by_position(self._slots[name.removesuffix(BY_POSITION)])
            self._use(BY_POSITION, self._kernels, [None] * len(self._moe))
        elif name in self._maps:
            self._use(name, self._kernels, self._maps[name])
        else:
            self.swap_map(torch.tensor([[slots[0] for slots in layer] for layer in self._slots[name]]))

    def swap_map(self, slot_LE: Tensor) -> None:
        """Serve each logical expert from this slot."""
        self._fixed_LE.copy_(slot_LE)
        maps: list[Callable[..., Tensor]] = [
            _by_kernel(slot_E) if kernel is not None else _by_table(slot_E)
            for kernel, slot_E in zip(self._fixed_kernels, self._fixed_LE, strict=True)
        ]
        self._use("fixed", self._fixed_kernels, maps)

    def logical(self, name: str) -> Tensor:
        """The logical expert in each slot, [L, P]; of slots that are not used, one that is elsewhere on that rank."""
        return torch.tensor(self._orders[name.removesuffix(BY_POSITION)])

    def before_step(self, tokens: int) -> None:
        """Tell EPLB how many tokens are no padding, and that it need not count them, as vLLM does in most steps."""
        state = self._moe[0].router.eplb_state
        state.num_unpadded_tokens_tensors[0].fill_(tokens)
        state.should_record_tensor.fill_(False)

    def about(self) -> dict[str, Any]:
        """The kernel that routes; it reads the tables that are overwritten, as it was made with them."""
        kernel = self._kernels[0]
        return {
            "kernel_agreed": {} if kernel is None else agreed(kernel),
            "kernel_reads_the_map": kernel is not None,
            "rounds": {name: maps[0].tables.rounds for name, maps in self._maps.items()},
        }

    def _use(self, way: str, kernels: Sequence[Any], maps: Sequence[Any]) -> None:
        for runner, kernel, layer_maps in zip(self._moe, kernels, maps, strict=True):
            runner.router.reshard_kernel, runner.router.reshard_copies = kernel, layer_maps
        if way != self._way:
            self._recapture(way)
            self._way = way

    def _pick_by_position(self, slots_LE: Sequence[Sequence[Sequence[int]]]) -> None:
        for runner, slots_E in zip(self._moe, slots_LE, strict=True):
            state = runner.router.eplb_state
            most = max(map(len, slots_E))
            table = torch.tensor([[*slots, *[-1] * (most - len(slots))] for slots in slots_E])
            state.logical_to_physical_map.fill_(-1)
            state.logical_to_physical_map[:, :most].copy_(table)
            state.logical_replica_count.copy_(torch.tensor([len(slots) for slots in slots_E]))


class WithTable:
    """The router's kernel, which also maps ids by a table. It agrees with vLLM's router where it does so without."""

    def __init__(self, kernel: Any, slot_E: Tensor) -> None:
        self._plain, self._mapping = kernel, dataclasses.replace(kernel, place_E=slot_E)  # shares what was agreed

    def route(self, logits_TE: Tensor, bias_E: Tensor | None, router: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """Weights and slots. Raises RuntimeError if the kernel differs from `router`."""
        kind = logits_TE.dtype, len(logits_TE) == 1
        if kind not in self._plain.agreed:
            self._plain.route(logits_TE, bias_E, router)
        if not self._plain.agreed.get(kind):
            raise RuntimeError(f"the router's kernel differs from vLLM's: {agreed(self._plain)}")
        found: tuple[Tensor, Tensor] = self._mapping.route(logits_TE, bias_E, router)
        return found


def _by_kernel(slot_E: Tensor) -> Callable[..., Tensor]:
    """What is left to map after the router's kernel: a single token, which vLLM's own router serves."""
    from reshard.vllm.map_ids import map_ids

    return lambda ids_TK, *_: ids_TK if len(ids_TK) > 1 else map_ids(ids_TK, slot_E)


def _by_table(slot_E: Tensor) -> Callable[..., Tensor]:
    return lambda ids_TK, *_: slot_E[ids_TK.long()].to(ids_TK.dtype)


def agreed(kernel: Any) -> dict[str, bool]:
    """For which logits the router's kernel agreed with vLLM's router."""
    return {str(kind): bool(found) for kind, found in kernel.agreed.items()}


def padded(order_P: Sequence[int], ranks: int, slots: int) -> list[int]:
    """A placement with `slots` slots on each rank: those that it does not need repeat an expert of their rank."""
    size = len(order_P) // ranks
    held = [order_P[rank * size : (rank + 1) * size] for rank in range(ranks)]
    return [expert for of_rank in held for expert in [*of_rank, *[of_rank[0]] * (slots - size)]]


def slots_of(order_P: Sequence[int], num_experts: int, ranks: int, slots: int) -> list[list[int]]:
    """The slots of each logical expert, where each rank has `slots` slots and uses the first of them."""
    size = len(order_P) // ranks
    found: list[list[int]] = [[] for _ in range(num_experts)]
    for physical, expert in enumerate(order_P):
        found[expert].append(physical // size * slots + physical % size)
    return found
