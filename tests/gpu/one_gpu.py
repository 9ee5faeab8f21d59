"""A vLLM general plugin for tests: lets several EP ranks share one GPU, through gloo, as NCCL refuses that."""

from __future__ import annotations

import os


def install() -> None:
    """The entry point; vLLM calls it in every process."""
    if os.environ.get("SHARED_GPU"):
        from vllm.platforms import current_platform

        type(current_platform).dist_backend = "gloo"
    if os.environ.get("ROUTER_FORGETS"):  # placed routers return logical ids, as if no expert had moved
        from reshard.vllm import placed

        placed.ExpertPlace.forward = lambda self, ids: ids
