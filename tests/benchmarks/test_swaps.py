"""How `benchmarks/swaps.py` swaps placements with copies, on stand-ins for routers: which slot serves which expert."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from copies_oracle import random_copies
from step_times import BASE, also_by_position, spare_slots
from swaps import BY_POSITION, Copies, WithTable, padded, slots_of

EXPERTS, RANKS, LAYERS = 16, 4, 2
ORDERS = {
    BASE: torch.arange(EXPERTS).repeat(LAYERS, 1),
    "zigzag": torch.tensor([[*range(0, 16, 4), *range(1, 16, 4), *range(2, 16, 4), *range(3, 16, 4)]] * LAYERS),
    **{
        f"copies-{spare}": torch.tensor(
            [random_copies(random.Random(layer), EXPERTS, RANKS, spare, 3) for layer in range(LAYERS)]
        )
        for spare in (1, 2)
    },
}


@pytest.fixture
def swaps() -> Copies:
    """Routers without a kernel; captured graphs are noted."""
    most = ORDERS["copies-2"].shape[1]
    moe = []
    for _ in range(LAYERS):
        state = SimpleNamespace(
            expert_load_view=torch.zeros(most, dtype=torch.int32),
            logical_to_physical_map=torch.full((EXPERTS, 8), 7),
            logical_replica_count=torch.zeros(EXPERTS, dtype=torch.long),
            num_unpadded_tokens_tensors=[torch.tensor(0)],
            should_record_tensor=torch.tensor(True),
        )
        router = SimpleNamespace(
            eplb_state=state, reshard_kernel=None, reshard_copies=SimpleNamespace(same_tokens=True)
        )
        moe.append(SimpleNamespace(router=router))
    captured: list[str] = []
    found: Any = Copies(ORDERS, ["copies-2"], moe, EXPERTS, RANKS, captured.append)
    found.moe, found.captured = moe, captured
    return found


def test_slots_that_a_placement_does_not_need_stay_unused() -> None:
    order = [0, 1, 2, 3, 0, 3]  # two ranks with three slots each
    assert padded(order, 2, 5) == [0, 1, 2, 0, 0, 3, 0, 3, 3, 3]
    assert slots_of(order, 4, 2, 5) == [[0, 6], [1], [2], [5, 7]]


def test_each_placement_has_its_way_to_map_ids_and_graphs_are_captured_once_for_each_way(swaps: Any) -> None:
    assert swaps.names == [BASE, "zigzag", "copies-1", "copies-2", f"copies-2{BY_POSITION}"]
    ids = torch.arange(EXPERTS).view(4, 4)
    for name in swaps.names:
        swaps.swap(name)
        order_LP = swaps.logical(name)
        assert order_LP.shape == (LAYERS, RANKS * 6)
        for layer, runner in enumerate(swaps.moe):
            maps, state = runner.router.reshard_copies, runner.router.eplb_state
            if name in (BASE, "zigzag"):
                assert torch.equal(order_LP[layer][maps(ids, None, None)], ids)
            elif name.startswith("copies-1"):
                assert torch.equal(torch.tensor(maps.physical_to_logical), order_LP[layer])
            elif name.endswith(BY_POSITION):
                assert maps is None, "vLLM's own choice"
                order = ORDERS["copies-2"][layer].tolist()
                for expert in range(EXPERTS):
                    count = int(state.logical_replica_count[expert])
                    assert count == order.count(expert)
                    row = state.logical_to_physical_map[expert]
                    assert order_LP[layer][row[:count]].tolist() == [expert] * count
                    assert (row[count:] == -1).all()
    assert swaps.captured == ["fixed", "copies-1", "copies-2", BY_POSITION]
    swaps.swap("zigzag")
    swaps.swap(BASE)
    assert swaps.captured[4:] == ["fixed"], "the way changed once"


def test_all_experts_can_be_sent_to_the_slots_of_one_rank(swaps: Any) -> None:
    swaps.swap_map(torch.arange(EXPERTS).repeat(LAYERS, 1) % 4)
    assert swaps.moe[1].router.reshard_copies(torch.tensor([[5, 15]]), None, None).tolist() == [[1, 3]]


@dataclass
class Kernel:
    """As `fused.Fused`: it is compared with the router once for each kind of logits, and used if it agreed."""

    place_E: torch.Tensor  # noqa: N815 - as there
    right: bool = True
    agreed: dict[Any, Any] = field(default_factory=dict)

    def route(self, logits: torch.Tensor, bias: Any, router: Any) -> tuple[torch.Tensor, torch.Tensor]:
        kind = logits.dtype, len(logits) == 1
        weights, ids = logits.topk(2)
        if kind not in self.agreed:
            self.agreed[kind] = self.right and torch.equal(self.place_E[ids], router(logits)[1])
        return (weights, self.place_E[ids]) if self.agreed[kind] else router(logits)


def test_the_router_s_kernel_maps_ids_by_a_table_for_logits_that_it_meets_first_then_too() -> None:
    plain, table = Kernel(torch.arange(4)), torch.tensor([7, 5, 3, 1])
    mapping = WithTable(plain, table)
    for logits in (torch.tensor([[1.0, 3.0, 2.0, 0.0]]), torch.rand(8, 4), torch.rand(8, 4).double()):
        ids = logits.topk(2).indices
        assert torch.equal(mapping.route(logits, None, lambda rows: rows.topk(2))[1], table[ids])
        assert torch.equal(plain.route(logits, None, lambda rows: rows.topk(2))[1], ids)
    with pytest.raises(RuntimeError, match="the router's kernel differs from vLLM's"):
        WithTable(Kernel(torch.arange(4), right=False), table).route(logits, None, lambda rows: rows.topk(2))


def test_a_step_has_no_padding_and_is_not_counted(swaps: Any) -> None:
    swaps.before_step(8)
    state = swaps.moe[0].router.eplb_state
    assert int(state.num_unpadded_tokens_tensors[0]) == 8
    assert not state.should_record_tensor


def test_the_placement_with_the_most_copies_is_also_served_by_position() -> None:
    assert spare_slots(ORDERS, RANKS) == 2
    assert spare_slots({"zigzag": ORDERS["zigzag"]}, RANKS) == 0
    assert also_by_position(SimpleNamespace(by_position=None), ORDERS) == ["copies-2"]  # type: ignore[arg-type]
    assert also_by_position(SimpleNamespace(by_position=["copies-1"]), ORDERS) == ["copies-1"]  # type: ignore[arg-type]
