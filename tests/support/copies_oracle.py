"""Placements with copies, batches, and the least that the busiest rank can have to do, by a flow solver."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import networkx
import torch
from torch import Tensor


def random_placement(seed: int, experts: int, ranks: int, spare: int, most: int = 3) -> list[int]:
    """physical_to_logical with random copies, up to `most` of an expert and none twice on a rank."""
    draw = random.Random(seed)
    held = [list(range(rank, experts, ranks)) for rank in range(ranks)]
    count = [1] * experts
    for of_rank in held:
        for _ in range(spare):
            free = [expert for expert in range(experts) if expert not in of_rank and count[expert] < most]
            expert = draw.choice(free or [expert for expert in range(experts) if expert not in of_rank])
            of_rank.append(expert)
            count[expert] += 1
    return [expert for of_rank in held for expert in draw.sample(of_rank, len(of_rank))]


def batches(ids_TK: Tensor, size: int, number: int, experts: int) -> Tensor:
    """Which experts are active in batches of random tokens: [number, E], 0 or 1."""
    rows = torch.randint(len(ids_TK), (number, size), generator=torch.Generator().manual_seed(size))
    return torch.zeros(number, experts, dtype=torch.long).scatter_(1, ids_TK.long()[rows].flatten(1), 1)


def busiest(slot_BE: Tensor, weight_BE: Tensor, physical_to_logical: Sequence[int], ranks: int) -> list[int]:
    """The weight of the busiest rank in each batch, one expert at a time."""
    slots = len(physical_to_logical) // ranks
    loads = []
    for slot_E, weight_E in zip(slot_BE.tolist(), weight_BE.tolist(), strict=True):
        load = [0] * ranks
        for slot, weight in zip(slot_E, weight_E, strict=True):
            load[slot // slots] += weight
        loads.append(max(load))
    return loads


def least(active: Sequence[int], physical_to_logical: Sequence[int], ranks: int) -> int:
    """The fewest active experts that the busiest rank can have, by maximum flow."""
    slots = len(physical_to_logical) // ranks
    graph = networkx.DiGraph()
    experts = [expert for expert, is_active in enumerate(active) if is_active]
    for expert in experts:
        graph.add_edge("source", expert, capacity=1)
    for slot, expert in enumerate(physical_to_logical):
        if active[expert]:
            graph.add_edge(expert, f"rank {slot // slots}", capacity=1)
    most = -(-len(experts) // ranks)
    while experts:
        for rank in range(ranks):
            graph.add_edge(f"rank {rank}", "sink", capacity=most)
        if networkx.maximum_flow_value(graph, "source", "sink") == len(experts):
            return most
        most += 1
    return 0


def random_copies(draw: random.Random, experts: int, ranks: int, spare: int, most: int) -> list[int]:
    """physical_to_logical with random copies, about `most` of an expert at most, and none twice on a rank."""
    held = [list(range(rank, experts, ranks)) for rank in range(ranks)]
    count = [1] * experts
    for of_rank in held:
        for _ in range(spare):
            others = [expert for expert in range(experts) if expert not in of_rank]
            expert = draw.choice([expert for expert in others if count[expert] < most] or others)
            of_rank.append(expert)
            count[expert] += 1
    return [expert for of_rank in held for expert in draw.sample(of_rank, len(of_rank))]


def least_busiest(weights: Mapping[int, int], physical_to_logical: Sequence[int], ranks: int) -> int:
    """The least weight that the busiest rank can have if each expert is served by one rank: all choices are tried."""
    slots = len(physical_to_logical) // ranks
    holders = [{slot // slots for slot, held in enumerate(physical_to_logical) if held == expert} for expert in weights]
    return min(
        max(
            sum(weight for weight, rank in zip(weights.values(), chosen, strict=True) if rank == busiest)
            for busiest in range(ranks)
        )
        for chosen in itertools.product(*holders)
    )
