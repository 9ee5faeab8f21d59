"""Compares the kernel that chooses copies with the pure function, on thousands of batches, in CUDA graphs too."""

from __future__ import annotations

import random
from typing import Any

import pytest
from copies_oracle import random_copies

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # PyTorch and Triton run in this process and emit warnings
]

BATCHES = 60  # of each size
R1 = 256, 8, 8, 2, 8  # experts, ranks, spare slots on each rank, copies of an expert at most, experts per token
CASES = [  # each number of tokens and each shape compiles a kernel of its own
    (R1, (1, 31, 64, 128, 256, 512), "int32"),
    (R1, (8,), "int64"),
    ((256, 8, 16, 4, 8), (8, 128), "int32"),
    ((160, 16, 4, 3, 6), (8, 128), "int32"),
    ((384, 32, 2, 3, 8), (8, 128), "int32"),
    ((60, 6, 5, 6, 4), (8,), "int32"),
    ((16, 2, 6, 2, 2), (8,), "int32"),
    ((64, 4, 0, 1, 8), (8,), "int32"),
]


def random_placement(experts: int, ranks: int, spare: int, most: int) -> list[int]:
    """physical_to_logical with random copies, the same in every run."""
    return random_copies(random.Random(experts + spare), experts, ranks, spare, most)


def random_ids(tokens: int, experts: int, top_k: int) -> Any:
    """Experts of random tokens, some experts liked more."""
    liking = torch.randn(experts, device="cuda")
    return (liking + torch.randn(tokens, experts, device="cuda")).topk(top_k, dim=1).indices


def expected(ids: Any, real: int, prepared: Any) -> Any:
    """The physical ids by the pure function; rows from `real` on are padding."""
    from reshard.placement.copy_choice import choose_copies

    ids = ids.cpu().long()
    active = torch.zeros(1, len(prepared.round_E), dtype=torch.long)
    chosen = ids[:real][ids[:real] >= 0]
    active[0, chosen] = 1
    slot = choose_copies(active, prepared)[0]
    return torch.where(ids >= 0, slot[ids.clamp(min=0)], ids)


@pytest.mark.parametrize(("shape", "sizes", "dtype"), CASES, ids=str)
def test_the_kernel_chooses_as_the_pure_function_does(
    shape: tuple[int, int, int, int, int], sizes: tuple[int, ...], dtype: str
) -> None:
    from reshard.placement.copy_choice import schedule
    from reshard.vllm.choose_copies import Record, choose_copies, tables

    torch.manual_seed(0)
    experts, ranks, spare, most, top_k = shape
    placement = random_placement(experts, ranks, spare, most)
    prepared = schedule(placement, experts, ranks)
    on_gpu = tables(prepared, "cuda")
    load, counted = torch.zeros(len(placement), dtype=torch.int32, device="cuda"), torch.zeros(len(placement))
    record = Record(load, torch.tensor(True, device="cuda"))
    for tokens in sizes:
        for number in range(BATCHES):
            ids = random_ids(tokens, experts, top_k).to(getattr(torch, dtype))
            real = random.randrange(tokens + 1) if number % 2 else tokens
            if number % 3 == 2:
                ids[torch.rand(tokens, device="cuda") < 0.3] = -1
            found = choose_copies(ids, on_gpu, torch.tensor([real], dtype=torch.int32, device="cuda"), record)
            assert found.dtype == ids.dtype
            found = found.cpu().long()
            assert torch.equal(found, expected(ids, real, prepared)), f"{tokens} tokens, {real} of them real"
            assert torch.equal(torch.tensor([*placement, -1])[found], ids.cpu().long())
            counted += found[:real][found[:real] >= 0].bincount(minlength=len(placement))
    assert torch.equal(load.cpu().float(), counted)


def test_a_graph_chooses_anew_at_each_replay_and_equal_batches_alike() -> None:
    from reshard.placement.copy_choice import schedule
    from reshard.vllm.choose_copies import choose_copies, tables

    torch.manual_seed(0)
    prepared = schedule(random_placement(256, 8, 8, 2), 256, 8)
    on_gpu = tables(prepared, "cuda")
    ids = random_ids(16, 256, 8).int()
    count = torch.tensor([16], dtype=torch.int32, device="cuda")
    choose_copies(ids, on_gpu, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [choose_copies(ids, on_gpu, count) for _ in range(8)]
    seen = []
    for real in range(16, 0, -1):
        ids.copy_(random_ids(16, 256, 8))
        count.fill_(real)
        for _ in range(20):
            graph.replay()
            assert all(torch.equal(found[0], other) for other in found)
        assert torch.equal(found[0].cpu().long(), expected(ids, real, prepared))
        seen.append(found[0].clone())
    assert not all(torch.equal(seen[0], other) for other in seen[1:])


def test_the_control_another_schedule_or_more_padding_would_be_seen() -> None:
    from reshard.placement.copy_choice import schedule
    from reshard.vllm.choose_copies import choose_copies, tables

    torch.manual_seed(0)
    placement = random_placement(256, 8, 8, 2)
    prepared = schedule(placement, 256, 8)
    other = schedule(random_placement(256, 8, 8, 3), 256, 8)
    on_gpu = tables(prepared, "cuda")
    differing_schedule = differing_padding = 0
    for _ in range(20):
        ids = random_ids(16, 256, 8).int()
        found = choose_copies(ids, on_gpu).cpu().long()
        differing_schedule += not torch.equal(found, expected(ids, 16, other))
        differing_padding += not torch.equal(found, expected(ids, 15, prepared))
    assert differing_schedule == 20
    assert differing_padding > 10


@pytest.mark.parametrize("name", ["BY_TIME", "BY_PAIRS"])
@pytest.mark.parametrize(("experts", "ranks", "spare", "most", "top_k"), [R1, (160, 16, 4, 3, 6), (64, 4, 0, 1, 8)])
def test_large_batches_are_chosen_by_weight_as_the_pure_function_does(
    experts: int, ranks: int, spare: int, most: int, top_k: int, name: str
) -> None:
    from reshard.placement import copy_choice
    from reshard.placement.copy_choice import choose_copies, schedule
    from reshard.vllm.choose_by_weight import choose_by_weight
    from reshard.vllm.choose_copies import Record, tables

    torch.manual_seed(0)
    weight = getattr(copy_choice, name)
    placement = random_placement(experts, ranks, spare, most)
    prepared = schedule(placement, experts, ranks)
    on_gpu = tables(prepared, "cuda")
    load, counted = torch.zeros(len(placement), dtype=torch.int32, device="cuda"), torch.zeros(len(placement))
    record = Record(load, torch.tensor(True, device="cuda"))
    for tokens in (1025, 2048, 16384):
        for number in range(4):
            ids = random_ids(tokens, experts, top_k).to([torch.int32, torch.int64][number % 2])
            real = tokens - 100 * number
            if number == 3:
                ids[torch.rand(tokens, device="cuda") < 0.3] = -1
            real_on_gpu = torch.tensor([real], dtype=torch.int32, device="cuda")
            found = choose_by_weight(ids, on_gpu, weight, real_on_gpu, record)
            assert found.dtype == ids.dtype
            found, ids = found.cpu().long(), ids.cpu().long()
            counts = ids[:real][ids[:real] >= 0].bincount(minlength=experts)
            slot = choose_copies(weight.of(counts).unsqueeze(0), prepared)[0]
            assert torch.equal(found, torch.where(ids >= 0, slot[ids.clamp(min=0)], ids))
            counted += found[:real][found[:real] >= 0].bincount(minlength=len(placement))
    assert torch.equal(load.cpu().float(), counted)


def test_a_graph_chooses_by_weight_anew_at_each_replay() -> None:
    from reshard.placement.copy_choice import BY_TIME, schedule
    from reshard.vllm.choose_by_weight import choose_by_weight
    from reshard.vllm.choose_copies import tables

    torch.manual_seed(0)
    on_gpu = tables(schedule(random_placement(256, 8, 8, 2), 256, 8), "cuda")
    ids = random_ids(1024, 256, 8).int()
    choose_by_weight(ids, on_gpu, BY_TIME)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = choose_by_weight(ids, on_gpu, BY_TIME)
    seen = []
    for _ in range(8):
        ids.copy_(random_ids(1024, 256, 8))
        graph.replay()
        assert torch.equal(found, choose_by_weight(ids, on_gpu, BY_TIME))
        seen.append(found.clone())
    assert not all(torch.equal(seen[0], other) for other in seen[1:])
