"""Checks that every rank serves the same placement, and that all ranks loaded files that number experts alike.

A collective would hang: a rank without the plugin never joins it. So each rank writes what it serves to the process
group's store before it loads weights: the digest of its placement, or of its output's contract. A rank that has either
reads what the others wrote, with a timeout. After loading, the first rank writes how its files number experts, and the
others compare that with theirs: nobody waits, as an output without expert groups needs the plugin on no rank.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import UnsupportedError
from ..placement.permutations import describe_ranks

VARIABLE = "RESHARD_AGREEMENT_SECONDS"
DEFAULT_SECONDS = 300  # ranks usually get here within seconds of each other; one may still be starting
LINEAR = "linear"
ORIGINAL = "an original"  # how its files number experts
_loads: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)  # of models and of drafts
_checks: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)  # the same, after loading


class Store(Protocol):
    """The methods of torch.distributed's store that we use."""

    def set(self, key: str, value: str) -> None: ...  # noqa: D102

    def get(self, key: str) -> bytes: ...  # noqa: D102

    def wait(self, keys: list[str], timeout: datetime.timedelta) -> None: ...  # noqa: D102


def agree(digest: str | None, *, draft: bool = False) -> None:
    """Raise UnsupportedError unless all ranks that load this model serve the placement or the output with this digest.

    None means that this rank needs neither: it publishes that, and does not wait for the others. All ranks load a
    model; a draft is loaded by one pipeline stage, whose ranks are an EP group.
    """
    import torch

    kind = "draft" if draft else "model"
    load = f"{kind}/{next(_loads[kind])}"  # the same on every rank: all load their models in the same order
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    publish(store, load, rank, digest)
    if digest is not None:
        ranks = _stage() if draft else range(size)
        compare(store, load, ranks, digest, float(os.environ.get(VARIABLE, DEFAULT_SECONDS)))


def agree_numbering(numbering: str | None, *, draft: bool = False) -> None:
    """Raise UnsupportedError unless each rank that has read files of this model, a draft or not, found this numbering.

    ORIGINAL, or the digest that an output's files have; None or "": this rank cannot tell.
    """
    import torch

    kind = "draft" if draft else "model"
    load = f"{kind}/{next(_checks[kind])}"
    if not numbering or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    first = _get_default_store().compare_set(f"reshard/numbering/{load}", "", numbering).decode()
    if first != numbering:
        raise UnsupportedError(
            f"rank {torch.distributed.get_rank()} read files whose experts are numbered in another way than those that "
            f"another rank read ({numbering[:12]} and {first[:12]}), and one of them at least is an output of reshard; "
            "give all nodes files of the same output, or of the original"
        )


def _stage() -> Sequence[int]:
    """The ranks of this pipeline stage."""
    from vllm.distributed.parallel_state import get_ep_group

    ranks: Sequence[int] = get_ep_group().ranks
    return ranks


def publish(store: Store, load: str, rank: int, digest: str | None) -> None:
    """Write to `store` which placement this rank serves."""
    store.set(_key(load, rank), digest or LINEAR)


def compare(store: Store, load: str, ranks: Sequence[int], digest: str, seconds: float) -> None:
    """Raise UnsupportedError, naming the ranks, if some serve another placement or publish none within `seconds`."""
    deadline = time.monotonic() + seconds
    silent, others = [], {}
    for rank in ranks:
        try:
            store.wait([_key(load, rank)], datetime.timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:  # torch's DistStoreError: the key is not there
            silent.append(rank)
            continue
        if (other := store.get(_key(load, rank)).decode()) != digest:
            others[rank] = other
    if silent:
        raise UnsupportedError(
            f"ranks {describe_ranks(silent)} did not report their placement within {seconds:.0f} s; check that "
            "reshard's plugin is installed there and that VLLM_PLUGINS does not exclude it"
        )
    if others:
        rank, other = min(others.items())
        raise UnsupportedError(
            f"ranks {describe_ranks(others)} serve a different placement ({other[:12]} on rank {rank}, "
            f"{digest[:12]} on this rank); give all ranks the same RESHARD_PLACEMENT and the same model"
        )


def _key(load: str, rank: int) -> str:
    return f"reshard/placement/{load}/{rank}"
