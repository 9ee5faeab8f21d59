"""How many active experts the busiest rank has with copies, simulated on recorded routing; no GPU is needed.

Placements are made from the first half of the tokens and judged on batches of random tokens of the second half. The
optimum of a batch is exact: see `reshard.placement.copies`. `EPLB` is DeepSeek's replication and packing. Copies are
chosen as reshard does, or by a token's position, as vLLM does.

python copies.py TRACES [--ep 8] [--spare 2,4,8] [--json FILE]      TRACES: {kind: [layers, tokens, top k]}
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from reshard.placement.copies import rank_sets, with_copies
from reshard.placement.copy_choice import choose_copies, schedule
from reshard.placement.permutations import zigzag

SIZES, BATCHES = (8, 32, 64, 128), 512
HASH = 2654435769  # vLLM's EPLB multiplies a token's position by this, modulo 2**32


def eplb(load_E: Sequence[float], ranks: int, redundant: int) -> tuple[int, ...]:
    """DeepSeek's EPLB with one group: copies to the expert with most load a copy, then packed by falling load."""
    copies = [1] * len(load_E)
    for _ in range(redundant):
        copies[max(range(len(load_E)), key=lambda expert: load_E[expert] / copies[expert])] += 1
    physical = [(load_E[expert] / number, expert) for expert, number in enumerate(copies) for _ in range(number)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for weight, expert in sorted(physical, key=lambda row: -row[0]):
        room = [rank for rank in range(ranks) if len(held[rank]) < len(physical) // ranks]
        rank = min(room, key=lambda rank: load[rank])
        held[rank].append(expert)
        load[rank] += weight
    return tuple(expert for of_rank in held for expert in of_rank)


def judge(ids_TK: Tensor, placement: Sequence[int], num_experts: int, ranks: int) -> dict[str, list[float]]:
    """The busiest rank's active experts, averaged over batches of each size: chosen, optimum, by position; and mean."""
    found: dict[str, list[float]] = {"chosen": [], "optimum": [], "by position": [], "mean": []}
    slots = len(placement) // ranks
    prepared = schedule(placement, num_experts, ranks)
    held_ER = torch.zeros(num_experts, ranks)
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(placement):
        held_ER[expert, slot // slots] = 1
        slots_of[expert].append(slot)
    most = max(map(len, slots_of))
    slot_EC = torch.tensor([(row * most)[:most] for row in slots_of])
    count_E = torch.tensor([len(row) for row in slots_of])
    sets_QR = rank_sets(ranks)
    within_EQ = (held_ER @ (1 - sets_QR).T == 0).double() / sets_QR.sum(dim=1)
    for size in SIZES:
        rows = torch.randint(len(ids_TK), (BATCHES, size), generator=torch.Generator().manual_seed(size))
        ids_BTK = ids_TK[rows]
        active_BE = torch.zeros(BATCHES, num_experts, dtype=torch.long).scatter_(1, ids_BTK.flatten(1), 1)
        rank_BE = choose_copies(active_BE, prepared) // slots
        load_BR = torch.zeros(BATCHES, ranks, dtype=torch.long).scatter_add_(1, rank_BE, active_BE)
        copy_TK = (torch.arange(size) * HASH % 2**32).unsqueeze(1) % count_E[ids_BTK]
        used_BP = torch.zeros(BATCHES, len(placement)).scatter_(1, slot_EC[ids_BTK, copy_TK].flatten(1), 1)
        found["chosen"].append(float(load_BR.amax(dim=1).double().mean()))
        found["optimum"].append(float((active_BE.double() @ within_EQ).amax(dim=1).sub(1e-9).ceil().mean()))
        found["by position"].append(float(used_BP.view(BATCHES, ranks, slots).sum(dim=2).amax(dim=1).mean()))
        found["mean"].append(float(active_BE.sum(dim=1).double().mean() / ranks))
    return found


def of_layer(job: tuple[Tensor, Tensor, int, list[int]]) -> dict[str, dict[str, list[float]]]:
    """Each placement's figures, made for some tokens and judged on others."""
    seen_TK, unseen_TK, ranks, spares = job
    torch.set_num_threads(1)
    num_experts = 1 << int(torch.cat([seen_TK, unseen_TK]).max()).bit_length()
    load_E = seen_TK.flatten().bincount(minlength=num_experts).tolist()
    placements = {"linear": tuple(range(num_experts)), "zigzag": zigzag(num_experts, ranks)}
    placements["best fixed"] = with_copies(seen_TK, num_experts, ranks, 0)
    for spare in spares:
        placements[f"copies, {spare}"] = with_copies(seen_TK, num_experts, ranks, spare)
        placements[f"EPLB, {spare}"] = eplb(load_E, ranks, ranks * spare)
    return {name: judge(unseen_TK, placement, num_experts, ranks) for name, placement in placements.items()}


def jobs(
    traces: dict[str, Tensor], kind: str, ranks: int, spares: list[int]
) -> list[tuple[Tensor, Tensor, int, list[int]]]:
    """A job for each layer; of all kinds of text together if `kind` is "mixed"."""
    chosen = [ids_LTK.long() for name, ids_LTK in traces.items() if kind in ("mixed", name)]
    halves = [ids_LTK.chunk(2, dim=1) for ids_LTK in chosen]
    seen_LTK, unseen_LTK = (torch.cat([half[side] for half in halves], dim=1) for side in (0, 1))
    return [(seen, unseen, ranks, spares) for seen, unseen in zip(seen_LTK, unseen_LTK, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--ep", type=int, default=8)
    parser.add_argument("--spare", default="2,4,8")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    traces = load_file(arguments.traces)
    spares = [int(number) for number in arguments.spare.split(",")]
    report = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for kind in ("mixed", *traces):
            layers = list(pool.map(of_layer, jobs(traces, kind, arguments.ep, spares)))
            mean = {
                name: {
                    what: [sum(layer[name][what][at] for layer in layers) / len(layers) for at in range(len(SIZES))]
                    for what in layers[0][name]
                }
                for name in layers[0]
            }
            report[kind] = mean
            print(f"{kind}: active experts of the busiest rank, chosen / optimum / by position")
            print("| batch |", " | ".join(mean), "| mean |\n" + "| --- " * (len(mean) + 2) + "|")
            for at, size in enumerate(SIZES):
                cells = [
                    f"{row['chosen'][at]:.2f}"
                    if "," not in name
                    else " / ".join(f"{row[what][at]:.2f}" for what in ("chosen", "optimum", "by position"))
                    for name, row in mean.items()
                ]
                print(f"| {size} | {' | '.join(cells)} | {mean['linear']['mean'][at]:.2f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
