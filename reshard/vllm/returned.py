"""Makes an output's routers return the original's expert ids, where vLLM was asked to return them.

`--enable-return-routed-experts` captures what routers choose. In an output these are slots. We map them to the ids of
the original before they are captured, as a served placement captures them before it maps them to slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..placement.permutations import invert
from .runners import RoutesItself, lets_kernel_route, moe_runners

if TYPE_CHECKING:
    from torch import Tensor

    from .placed import ExpertPlace

Capture = Callable[["Tensor"], None]


def returns_experts(config: Any) -> bool:
    """Whether vLLM is to return the experts of each token."""
    owners = config.model_config, getattr(config, "aux_output_config", None)
    return any(getattr(owner, "enable_return_routed_experts", False) for owner in owners)


class Returning(RoutesItself):
    """A mixin before the router's own class: whatever captures its ids gets those of the original."""

    reshard_original: ExpertPlace  # maps slots to the original's ids

    @property
    def capture_fn(self) -> Capture | None:
        """What vLLM set, with ids mapped."""
        capture = self.__dict__["capture_fn"]
        return capture and functools.partial(self._capture, capture)

    @capture_fn.setter
    def capture_fn(self, capture: Capture | None) -> None:
        self.__dict__["capture_fn"] = capture

    def _capture(self, capture: Capture, ids_TK: Tensor) -> None:
        capture(self.reshard_original(ids_TK))


def returning(router: Any, order: tuple[int, ...], prefix: str) -> Any:
    """Make the router of the layer `prefix` return the original's ids; `order` is physical_to_logical [E]."""
    from vllm.config import get_current_vllm_config

    from .placed import ExpertPlace  # imports torch

    if "capture_fn" not in vars(router):
        raise _refusal(f"layer {prefix}: {type(router).__name__} captures no ids")
    found: Any = object.__new__(type(f"Returning{type(router).__name__}", (Returning, type(router)), {}))
    original = ExpertPlace(invert(order), get_current_vllm_config().device_config.device)
    found.__dict__ = {**vars(router), "reshard_original": original}
    return found


def check_returning(model: Any) -> None:
    """Raise UnsupportedError unless all that `model` would return are ids of the original."""
    runners = moe_runners(model)
    for name, runner in runners.items():
        if not isinstance(runner.router, Returning) or lets_kernel_route(runner):
            raise _refusal(f"layer {name} does not return its router's ids")
    for name, module in model.named_modules():
        if "capture_fn" in vars(module) and name not in runners:
            raise _refusal(f"layer {name} returns ids by itself")


def _refusal(fault: str) -> UnsupportedError:
    return UnsupportedError(
        f"{fault}, so --enable-return-routed-experts would return slots of this output of reshard and no expert ids; "
        "leave that option out, or serve the original"
    )
