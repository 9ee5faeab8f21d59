"""Placements with copies for all layers of a model, with traffic or without any. Pure functions.

A layer with recorded traffic gets copies where they shorten its decoding steps most, by the time model (see `copies`).
A layer without any gets zigzag and copies that are spread evenly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ..errors import OutputError
from .copies import with_copies
from .copy_choice import SMALL_BATCH
from .swaps import Aim
from .time_model import expert_times, row_time

if TYPE_CHECKING:
    from torch import Tensor


def evenly_copied(num_experts: int, ep_size: int, spare: int) -> tuple[int, ...]:
    """Zigzag, and copies of experts that lie far apart: as many of each rank, and about as many of each expert group.

    The copies of a rank's experts go to the next rank, the one after that, and so on.

    Parameters:
        num_experts: E
        ep_size: R, a divisor of E
        spare: S, at most E - E / R

    Returns:
        physical_to_logical: [E + R * S]; each rank's experts in ascending order, none twice
    """
    of_rank = num_experts // ep_size
    held = [set(range(rank, num_experts, ep_size)) for rank in range(ep_size)]
    far_apart = sorted(range(of_rank), key=_fraction)
    for copy in range(spare):
        turn, number = divmod(copy, of_rank)
        away = 1 + (number + turn) % (ep_size - 1)
        for rank in range(ep_size):
            held[(rank + away) % ep_size].add(rank + far_apart[number] * ep_size)
    return tuple(expert for experts in held for expert in sorted(experts))


def _fraction(number: int) -> float:
    """The binary digits of `number`, mirrored at the point: 0, 1/2, 1/4, 3/4, 1/8, 5/8 and so on."""
    return int(f"{number:b}"[::-1], 2) / (1 << number.bit_length())


def decoding_sizes(aim: Aim) -> tuple[int, ...]:
    """The batches that copies are placed for: decoding steps in which a batch chooses copies.

    Raises OutputError if there are none.
    """
    found = tuple(step.tokens for step in aim.mix if step.phase == "decode" and step.tokens <= SMALL_BATCH)
    if not found:
        raise OutputError(
            f"copies are placed for decoding steps of at most {SMALL_BATCH} tokens, and --batch-mix has none; add "
            "one, such as decode:8,32,64"
        )
    return found


def copied_layers(
    layers: Sequence[Tensor], num_experts: int, ep_size: int, spare: int, aim: Aim
) -> Iterator[tuple[int, ...]]:
    """`with_copies` by time for the ids_TK of each layer, in the given order. One thread per processor."""
    import torch

    sizes = decoding_sizes(aim)

    def copied(ids_TK: Tensor) -> tuple[int, ...]:
        return with_copies(
            ids_TK,
            num_experts,
            ep_size,
            spare,
            sizes=sizes,
            weigh=lambda count_BE: expert_times(count_BE, aim.expert, aim.gpu),
            fixed=lambda tokens: aim.gpu.kernels.launch + tokens * row_time(aim.expert, aim.gpu),
        )

    pool = ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(copied, layers)
    finally:
        pool.shutdown(cancel_futures=True)


def copies_fault(physical_to_logical: Sequence[int], num_experts: int, ep_size: int, spare: int) -> str | None:
    """What makes a placement with copies impossible to serve; None if nothing does."""
    if len(physical_to_logical) != num_experts + ep_size * spare:
        return f"expected {num_experts + ep_size * spare} slots, found {len(physical_to_logical)}"
    if set(physical_to_logical) != set(range(num_experts)):
        return f"expected each of the experts 0 to {num_experts - 1}, found {list(physical_to_logical)!r:.80}"
    slots = num_experts // ep_size + spare
    for rank in range(ep_size):
        held = physical_to_logical[rank * slots : (rank + 1) * slots]
        if len(set(held)) < slots:
            return f"expected no expert twice on a rank, found {list(held)!r:.80} on rank {rank}"
    return None
