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

        copies.schedule = _of_others(copies.schedule)
    if os.environ.get("COPIES_PINNED"):  # expert `e` is always served on rank `e % R`, whatever its copies
        from reshard.vllm.copies import CopyMaps

        CopyMaps.__call__ = _home  # type: ignore[method-assign]
    if os.environ.get("COPIES_RECORDED"):
        _record(Path(os.environ["COPIES_RECORDED"]) / f"{os.environ['RANK']}.jsonl")


def _of_others(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_of_others(order: Sequence[int], experts: int, *more: Any, **options: Any) -> Any:
        return make([(expert + 1) % experts for expert in order], experts, *more, **options)

    return make_of_others


def _home(maps: Any, ids: Any, tokens: Any, record: Any) -> Any:
    """In the place of the choice: the copy on rank `e % R`, which must exist."""
    import torch

    from reshard.placement.copy_choice import copies_by_rank
    from reshard.vllm.choose_by_weight import map_and_count

    if not hasattr(maps, "home_E"):  # before a CUDA graph is captured
        ranks, experts = maps._ep_size, maps._num_experts
        by_rank = copies_by_rank(maps.physical_to_logical, experts, ranks)
        slots = [slot_of[expert % ranks] for expert, slot_of in enumerate(by_rank)]
        maps.home_E = torch.tensor(slots, dtype=torch.int32, device=ids.device)
    return map_and_count(ids, maps.home_E, tokens, record)


def _record(path: Path) -> None:
    """Write to `path` what each router maps: [layer, tokens, logical ids, physical ids] of each batch.

    Rows after the first `tokens` are padding.
    """
    from reshard.vllm.copies import ChoosesCopies

    choose, layers = ChoosesCopies._apply_eplb_mapping, dict[int, int]()

    def choose_and_record(router: Any, ids: Any) -> Any:
        found = choose(router, ids)
        layer = layers.setdefault(id(router), len(layers))
        with path.open("a") as file:
            tokens = int(router.eplb_state.num_unpadded_tokens_tensors[0])
            print(json.dumps([layer, tokens, ids.tolist(), found.tolist()]), file=file)
        return found

    ChoosesCopies._apply_eplb_mapping = choose_and_record  # type: ignore[method-assign]
