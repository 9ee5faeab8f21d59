"""Where experts live: pure functions on permutations, nothing else.

Words, as in DeepSeek's EPLB: a *logical* expert is an expert's id in the source, a *physical* expert its id in the
output and its slot in the engine. An EP rank owns consecutive physical experts (vLLM's linear rule), so choosing the
permutation is choosing the placement.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
    """Leave each node the consecutive experts that linear placement gives it, and deal those out among its ranks.

    DeepSeek's routers limit a token to few groups of consecutive experts, and so to few nodes; dealing experts out over
    all ranks undoes that, dealing them out within a node does not.

    Parameters:
        num_experts: E
        ep_size: R, a multiple of `nodes`; every node's ranks must hold equally many experts
        nodes: M

    Returns:
        physical_to_logical: [E]

    """
    of_node = num_experts // nodes
    within = zigzag(of_node, ep_size // nodes)
    return tuple(node * of_node + expert for node in range(nodes) for expert in within)


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


def describe_ranks(ranks: Iterable[int]) -> str:
    """EP ranks as one writes them: 0-3,6."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1] = runs[-1][0], rank
        else:
            runs.append((rank, rank))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
