"""Every rank serves the same placement: compared before anything is loaded.

A rank without the plugin never joins a collective, and would leave the others waiting in one. So each rank writes what
it serves into the process group's store, and reads what the others wrote, for so long.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import UnsupportedError
from ..placement.permutations import describe_ranks

VARIABLE = "RESHARD_AGREEMENT_SECONDS"
SECONDS = 300  # ranks come to this point within seconds of each other, unless one is not there yet
LINEAR = "linear"
_loads = itertools.count()


class Store(Protocol):
    """What of torch.distributed's store is used."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102

    def get(self, key: str) -> bytes: ...  # noqa: D102

    def wait(self, keys: list[str], timeout: datetime.timedelta) -> None: ...  # noqa: D102


def agree(mine: str | None) -> None:
    """UnsupportedError unless all ranks serve the placement with the digest `mine`.

    None is linear: such a rank says so, and waits for no other.
    """
    import torch

    number = next(_loads)  # of this process; all load their models in the same order
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    publish(store, number, rank, mine)
    if mine is not None:
        compare(store, number, range(size), mine, float(os.environ.get(VARIABLE, SECONDS)))


def publish(store: Store, number: int, rank: int, mine: str | None) -> None:
    """Say in `store` what this rank serves."""
    store.set(_key(number, rank), mine or LINEAR)


def compare(store: Store, number: int, ranks: Sequence[int], mine: str, seconds: float) -> None:
    """UnsupportedError that names the ranks that serve something else, or that say nothing for so many seconds."""
    deadline = time.monotonic() + seconds
    silent, others = [], {}
    for rank in ranks:
        try:
            store.wait([_key(number, rank)], datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:  # torch's DistStoreError: it is not there
            silent.append(rank)
            continue
        if (other := store.get(_key(number, rank)).decode()) != mine:
            others[rank] = other
    if silent:
        raise UnsupportedError(
            f"ranks {describe_ranks(silent)} did not say within {seconds:.0f} s which placement they serve: is "
            "reshard's plugin installed there, and not left out by VLLM_PLUGINS?"
        )
    if others:
        rank, other = min(others.items())
        raise UnsupportedError(
            f"ranks {describe_ranks(others)} serve another placement than this one ({other[:12]} on rank {rank}, "
            f"{mine[:12]} here): give all ranks the same RESHARD_PLACEMENT"
        )


def _key(number: int, rank: int) -> str:
    return f"reshard/placement/{number}/{rank}"
