"""A vLLM general plugin for tests: lets several EP ranks share one GPU, through gloo, as NCCL refuses that.

It also spoils, pins or records what the plugin does, if a variable of the environment says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def install() -> None:
    """The entry point; vLLM calls it in every process."""
    if os.environ.get("SHARED_GPU"):
        from vllm.platforms import current_platform

        type(current_platform).dist_backend = "gloo"
    if os.environ.get("ROUTER_FORGETS"):  # placed routers return logical ids, as if no expert had moved
        from reshard.vllm import placed

        placed.ExpertPlace.forward = lambda self, ids: ids
    if os.environ.get("COPIES_SPOILT"):  # routers choose among the copies of another placement
        from reshard.vllm import copies

        copies.split_table, copies.schedule = _of_others(copies.split_table), _of_others(copies.schedule)
    if os.environ.get("COPIES_PINNED"):  # expert `e` is always served on rank `e % R`, whatever its copies
        from reshard.vllm import choose_copies, copies

        choose_copies.MAX_TOKENS = 0  # all batches go by the table
        copies.split_table = _home
    if os.environ.get("COPIES_RECORDED"):
        _record(Path(os.environ["COPIES_RECORDED"]) / f"{os.environ['RANK']}.jsonl")


def _of_others(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_of_others(order: Sequence[int], experts: int, *more: Any, **options: Any) -> Any:
        return make([(expert + 1) % experts for expert in order], experts, *more, **options)

    return make_of_others


def _home(order: Sequence[int], experts: int, ranks: int, columns: int = 2) -> Any:
    """In the place of `split_table`: the copy on rank `e % R`, which must exist."""
    import torch

    from reshard.placement.copy_choice import copies_by_rank

    slots = [slot_of[expert % ranks] for expert, slot_of in enumerate(copies_by_rank(order, experts, ranks))]
    return torch.tensor(slots, dtype=torch.int32).unsqueeze(1).repeat(1, columns)


def _record(path: Path) -> None:
    """Write to `path` what each router maps: a line of [layer, logical ids, physical ids] for each batch."""
    from reshard.vllm.copies import ChoosesCopies

    choose, layers = ChoosesCopies._apply_eplb_mapping, dict[int, int]()

    def choose_and_record(router: Any, ids: Any) -> Any:
        found = choose(router, ids)
        layer = layers.setdefault(id(router), len(layers))
        with path.open("a") as file:
            print(json.dumps([layer, ids.tolist(), found.tolist()]), file=file)
        return found

    ChoosesCopies._apply_eplb_mapping = choose_and_record  # type: ignore[method-assign]
