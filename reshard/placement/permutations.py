"""Pure functions on permutations of experts.

The terms are those of DeepSeek's EPLB. A *logical* expert is an expert's id in the original. A *physical* expert is its
slot: its id in the output and in the engine. An EP rank owns consecutive physical experts (vLLM's linear rule), so a
permutation is a placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Placement = Mapping[str, tuple[int, ...]]
"""physical_to_logical [E] of each MoE layer, by the module that holds its experts (`model.layers.3.mlp`)."""


def zigzag(num_experts: int, ep_size: int) -> tuple[int, ...]:
    """Deal experts out round-robin: slot `j` of rank `r` holds logical expert `r + j * ep_size`.

    Parameters:
        num_experts: E, logical experts of a layer
        ep_size: R, EP ranks; need not divide E

    Returns:
        physical_to_logical: [E], the logical expert in each physical slot
    """
    return tuple(expert for rank in range(ep_size) for expert in range(rank, num_experts, ep_size))


def node_zigzag(num_experts: int, ep_size: int, nodes: int) -> tuple[int, ...]:
    """Keep on each node the experts that linear placement puts there, and deal them out to the node's ranks.

    DeepSeek's routers limit a token to a few groups of consecutive experts, and so to a few nodes. Zigzag over all
    ranks undoes that; zigzag within each node keeps it.

    Parameters:
        num_experts: E
        ep_size: R, a multiple of `nodes`; every node's ranks must hold equally many experts
        nodes: M

    Returns:
        physical_to_logical: [E]

    """
    node_experts = num_experts // nodes
    within_node = zigzag(node_experts, ep_size // nodes)
    return tuple(node * node_experts + expert for node in range(nodes) for expert in within_node)


def invert(permutation: Sequence[int]) -> tuple[int, ...]:
    """The inverse permutation: physical_to_logical to logical_to_physical, and back.

    Parameters:
        permutation: [E]

    Returns:
        inverse: [E], `inverse[permutation[i]] == i`
    """
    inverse = [0] * len(permutation)
    for position, value in enumerate(permutation):
        inverse[value] = position
    return tuple(inverse)


def is_permutation(values: Sequence[int]) -> bool:
    """Whether `values` [E] holds each of 0..E-1 once."""
    return sorted(values) == list(range(len(values)))


def rank_slots(num_experts: int, ep_size: int) -> tuple[range, ...]:
    """The physical experts that each EP rank owns under vLLM's linear rule.

    Parameters:
        num_experts: E
        ep_size: R

    Returns:
        slots: [R], consecutive ranges: E // R long, and one longer for the first E % R ranks
    """
    base, extra = divmod(num_experts, ep_size)
    starts = [rank * base + min(rank, extra) for rank in range(ep_size + 1)]
    return tuple(range(starts[rank], starts[rank + 1]) for rank in range(ep_size))


def rank_of_each(physical_to_logical: Sequence[int], ep_size: int) -> tuple[int, ...]:
    """The EP rank that owns each logical expert.

    Parameters:
        physical_to_logical: [E]
        ep_size: R

    Returns:
        rank_E: [E]
    """
    ranks = [0] * len(physical_to_logical)
    for rank, slots in enumerate(rank_slots(len(physical_to_logical), ep_size)):
        for slot in slots:
            ranks[physical_to_logical[slot]] = rank
    return tuple(ranks)


def describe_ranks(ranks: Iterable[int]) -> str:
    """EP ranks in the notation of `--ranks`, such as 0-3,6."""
    ranges: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1] = ranges[-1][0], rank
        else:
            ranges.append((rank, rank))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
