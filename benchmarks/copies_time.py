"""Time the kernel that chooses copies on one GPU, as it runs while decoding: after the router, in a CUDA graph.

Each graph captures 58 calls, since R1 has 58 MoE layers, of the plugin's router and what maps its ids. How copies are
chosen depends on the tokens, as in serving (`reshard.vllm.copies`). Beside it, three others are
timed: nothing, one gather (`map_ids`), and EPLB's map with `--eplb`, which imports vLLM. What a way costs is its time
over that of the router alone. The graphs are replayed in turns. Only the first sizes try `--warps`.

python copies_time.py [--eplb] [--warps 1,4,8] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from graph_time import LAYERS, microseconds
from measure import median

from reshard.placement.copies import first, placement_of
from reshard.placement.copy_choice import SMALL_BATCH
from reshard.vllm.choose_copies import Record, Room, choose_copies
from reshard.vllm.copies import CopyMaps, room_for
from reshard.vllm.grouped_topk import Choice, grouped_topk
from reshard.vllm.map_ids import map_ids

TOKENS = (8, 32, 64, 128, 256, 512, 1024, 2048, 8192)
R1 = Choice(num_experts=256, n_group=8, topk_group=4, top_k=8, renormalize=True, scale=2.5)
RANKS, SPARE = 8, 8
Map = Callable[[torch.Tensor], object]


def ways(tokens: int, warps: list[int], eplb: bool) -> dict[str, Map]:
    """What to do with the router's logical ids, by name."""
    held_ER = first(torch.rand(R1.num_experts, generator=torch.Generator().manual_seed(0)), RANKS, SPARE)
    placement = placement_of(held_ER)
    room: Room = room_for([placement], R1.num_experts, RANKS, rearranges=False)
    maps = CopyMaps(placement, R1.num_experts, RANKS, "cuda", room, same_tokens=True)
    count = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    place_E = torch.arange(R1.num_experts, device="cuda", dtype=torch.int32)
    load_P = torch.zeros(len(placement), device="cuda", dtype=torch.int32)
    record = Record(load_P, torch.zeros((), device="cuda", dtype=torch.bool))  # as vLLM while it records nothing
    found: dict[str, Map] = {
        "router alone": lambda ids: ids,
        "map_ids": lambda ids: map_ids(ids, place_E),
        "copies": lambda ids: maps(ids, count, record),
    }

    def with_warps(number: int) -> Map:
        return lambda ids: choose_copies(ids, maps.tables, count, record, warps=number)

    for number in warps if tokens <= SMALL_BATCH else ():
        found[f"copies, {number} warps"] = with_warps(number)
    if eplb:
        from vllm.model_executor.layers.fused_moe.router import base_router

        slots = [[slot for slot, expert in enumerate(placement) if expert == e] for e in range(R1.num_experts)]
        most = max(map(len, slots))
        of_expert = torch.tensor([row + [-1] * (most - len(row)) for row in slots], device="cuda")
        replicas = torch.tensor([len(row) for row in slots], device="cuda")
        found["EPLB's map"] = lambda ids: base_router.eplb_map_to_physical_and_record(
            topk_ids=ids,
            expert_load_view=load_P,
            logical_to_physical_map=of_expert,
            logical_replica_count=replicas,
            record_enabled=record.wanted,
            num_unpadded_tokens=count,
        )
    return found


def captured(tokens: int, way: Map) -> torch.cuda.CUDAGraph:
    """Capture `LAYERS` calls of the router and what follows it."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits_TE = torch.randn(tokens, R1.num_experts, device="cuda", generator=generator)
    bias_E = torch.zeros(R1.num_experts, device="cuda")
    place_E = torch.arange(R1.num_experts, device="cuda", dtype=torch.int32)

    def layer() -> object:
        return way(grouped_topk(logits_TE, bias_E, place_E, R1, logical=True)[1])

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [layer() for _ in range(LAYERS)]
    del kept
    return graph


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eplb", action="store_true", help="time EPLB's map too")
    parser.add_argument("--warps", default="", help="also try these numbers of warps")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    numbers = [int(number) for number in arguments.warps.split(",") if number]
    found = []
    for tokens in TOKENS:
        graphs = {name: captured(tokens, way) for name, way in ways(tokens, numbers, arguments.eplb).items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(arguments.rounds):
            for name, graph in graphs.items():
                times[name].append(microseconds(graph))
        found.append({"tokens": tokens, "microseconds": times})
        if tokens == TOKENS[0]:
            others = [name for name in times if name != "router alone"]
            heads = " | ".join(f"{name}, µs more" for name in others)
            print(f"{torch.cuda.get_device_name()}\n| tokens | router alone, µs | {heads} |")
            print("| --- " * (len(others) + 2) + "|")
        alone = median(times["router alone"])
        more = [f"{median(times[name]) - alone:.2f}" if name in times else "" for name in others]
        print(f"| {tokens} | {alone:.2f} | {' | '.join(more)} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
