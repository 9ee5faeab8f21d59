"""How many pairs of token and expert the busiest rank gets in large batches with copies, simulated; no GPU is needed.

Copies are those of the most used experts of the second half of the recorded tokens. Batches are consecutive tokens of
the first half. For each number of ranks and spare slots: the busiest rank's pairs over the mean, with linear placement
without copies; with the copy that a token's position gives, as in vLLM's EPLB; with one copy of each expert, chosen by
pairs, as reshard does; and with each expert's pairs divided over its copies as evenly as possible.

python copies_pairs.py TRACES [--shapes 8:4,16:4]      TRACES: {kind: [layers, tokens, top k]}; ranks:spare slots
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from copies import HASH
from safetensors.torch import load_file
from torch import Tensor

from reshard.placement.copies import first, placement_of
from reshard.placement.copy_choice import choose_copies, copies_by_rank, schedule

SIZES, SHAPES, KINDS, LAYERS, STEP = (1024, 8192), "4:8,8:2,8:4,8:8,16:4,32:4", 2, 2, 8192


def divided(pairs_E: Sequence[int], copies: Sequence[dict[int, int]], ranks: int, sweeps: int = 2) -> float:
    """The busiest rank's pairs over the mean, where each expert in turn fills up the least loaded of its ranks."""
    load, parts = [0.0] * ranks, [dict.fromkeys(slot_of, 0.0) for slot_of in copies]
    for _ in range(sweeps):
        for pairs, part in zip(pairs_E, parts, strict=True):
            for rank, share in part.items():
                load[rank] -= share
            lowest = sorted(load[rank] for rank in part)
            level = min((pairs + sum(lowest[:count])) / count for count in range(1, len(part) + 1))
            for rank in part:
                part[rank] = max(0.0, level - load[rank])
                load[rank] += part[rank]
    return max(load) * ranks / sum(load)


def judge(ids_TK: Tensor, placement: Sequence[int], num_experts: int, ranks: int) -> dict[str, float]:
    """The busiest rank's pairs over the mean, by each way to choose."""
    slots, pairs_E = len(placement) // ranks, ids_TK.flatten().bincount(minlength=num_experts)

    def busiest(rank_TK: Tensor) -> float:
        pairs_R = rank_TK.flatten().bincount(minlength=ranks).double()
        return float(pairs_R.max() / pairs_R.mean())

    copies = copies_by_rank(placement, num_experts, ranks)
    most = max(map(len, copies))
    rank_EC = torch.tensor([(list(slot_of) * most)[:most] for slot_of in copies])
    count_E = torch.tensor([len(slot_of) for slot_of in copies])
    copy_TK = (torch.arange(len(ids_TK)) * HASH % 2**32).unsqueeze(1) % count_E[ids_TK]
    chosen_E = choose_copies(pairs_E.unsqueeze(0), schedule(placement, num_experts, ranks))[0] // slots
    return {
        "linear": busiest(ids_TK // (num_experts // ranks)),
        "by position": busiest(rank_EC[ids_TK, copy_TK]),
        "one copy, by pairs": busiest(chosen_E[ids_TK]),
        "split": divided(pairs_E.tolist(), copies, ranks),
    }


def mean_of_batches(ids_TK: Tensor, size: int, ranks: int, spare: int) -> dict[str, float]:
    """What `judge` finds, averaged over batches of `size` tokens of one layer."""
    unseen_TK, seen_TK = ids_TK.chunk(2)
    num_experts = 1 << int(ids_TK.max()).bit_length()
    use_E = seen_TK.flatten().bincount(minlength=num_experts).float()
    placement = placement_of(first(use_E, ranks, spare))
    starts = range(0, len(unseen_TK), STEP)
    judged = [judge(unseen_TK[start : start + size], placement, num_experts, ranks) for start in starts]
    return {name: statistics.mean(batch[name] for batch in judged) for name in judged[0]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--shapes", default=SHAPES)
    options = parser.parse_args()
    layers = [ids.long() for kind in list(load_file(options.traces).values())[:KINDS] for ids in kind[:LAYERS]]
    for number, (shape, size) in enumerate(itertools.product(options.shapes.split(","), SIZES)):
        ranks, spare = map(int, shape.split(":"))
        found = [mean_of_batches(ids_TK, size, ranks, spare) for ids_TK in layers]
        if number == 0:
            print(
                f"| ranks, spare slots on each | tokens | {' | '.join(found[0])} |\n{'| --- ' * (len(found[0]) + 2)}|"
            )
        cells = [f"{statistics.mean(layer[name] for layer in found):.3f}" for name in found[0]]
        print(f"| {ranks}, {spare} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
