"""A vLLM general plugin for tests: several EP ranks on one GPU, which NCCL refuses and gloo does not."""

from __future__ import annotations

import os


def install() -> None:
    """The entry point, called in every vLLM process."""
    if os.environ.get("SHARED_GPU"):
        from vllm.platforms import current_platform

        type(current_platform).dist_backend = "gloo"
    if os.environ.get("ROUTER_FORGETS"):  # where experts are that a placement moved
        from reshard.vllm import placed

        placed.ExpertPlace.forward = lambda self, ids: ids
