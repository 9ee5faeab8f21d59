"""Compare the plugin's router on one GPU with vLLM's own, which does less, and with gathers around vLLM's own.

Each CUDA graph captures 58 calls of one router, since R1 has 58 MoE layers. The graphs are replayed in turns.

python router_time.py [--one-group] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import vllm._custom_ops as ops
from graph_time import LAYERS, microseconds
from measure import median, spread

from reshard.placement.permutations import invert, zigzag
from reshard.vllm.grouped_topk import Choice, grouped_topk

TOKENS = (1, 8, 64, 256, 1024, 8192)
R1 = Choice(num_experts=256, n_group=8, topk_group=4, top_k=8, renormalize=True, scale=2.5)
KIMI_K2 = Choice(num_experts=384, n_group=1, topk_group=1, top_k=8, renormalize=True, scale=2.827)


def routers(choice: Choice, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The routers to time, by name, each bound to its inputs."""
    logits_TE = torch.randn(tokens, choice.num_experts, device="cuda").to(dtype)
    bias_E = (torch.randn(choice.num_experts, device="cuda") / 20).to(dtype)
    logical = choice.n_group == 1  # only originals have this kernel without groups; an output needs no plugin
    place_E = torch.tensor(invert(zigzag(choice.num_experts, 8)), device="cuda", dtype=torch.int32)

    def stock(logits_TE: torch.Tensor, bias_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.grouped_topk(
            logits_TE,
            choice.n_group,
            choice.topk_group,
            choice.top_k,
            choice.renormalize,
            choice.scale,
            bias_E,
            1,
        )

    def with_gathers() -> object:
        if logical:
            weights_TK, ids_TK = stock(logits_TE, bias_E)
        else:
            weights_TK, ids_TK = stock(logits_TE.index_select(1, place_E), bias_E.index_select(0, place_E))
        return weights_TK, place_E[ids_TK]

    return {
        "vLLM's": lambda: stock(logits_TE, bias_E),
        "with gathers around": with_gathers,
        "the plugin's": lambda: grouped_topk(logits_TE, bias_E, place_E, choice, logical=logical),
    }


def captured(router: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture `LAYERS` calls of a router in a CUDA graph."""
    router()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAYERS):
            router()
    return graph


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one-group", action="store_true", help="Kimi-K2's router; by default R1's")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    choice = KIMI_K2 if arguments.one_group else R1
    found = []
    print("| logits, tokens | vLLM's, µs | with gathers around | the plugin's | the plugin's over vLLM's |")
    print("| --- | --- | --- | --- | --- |")
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            graphs = {name: captured(router) for name, router in routers(choice, tokens, dtype).items()}
            times: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(arguments.rounds):
                for name, graph in graphs.items():
                    times[name].append(microseconds(graph))
            found.append({"dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "microseconds": times})
            ratios = [ours / stock for ours, stock in zip(times["the plugin's"], times["vLLM's"], strict=True)]
            cells = " | ".join(f"{median(values):.2f}" for values in times.values())
            ratio = spread(ratios, "{:.3f}".format)
            print(f"| {found[-1]['dtype']}, {tokens} | {cells} | {ratio} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
