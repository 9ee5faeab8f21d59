"""Applies a placement to the routers and the experts of an original.

vLLM makes each router in `create_fused_moe_router`, and joins it with the layer's experts in `MoERunner`. The router
keeps its behaviour: it chooses logical experts as in the original, and then we map its answer to physical ids.
`MoERunner` hands the same placement to the layer's experts, so that a layer has both or neither:

    routing   logits, bias and groups as in the original -> logical ids -> vLLM captures them -> physical ids -> experts
    loading   expert `e` of the checkpoint goes to the slot of physical expert `logical_to_physical[e]`

If `fused` has a kernel for the router, and nobody asks for logical ids, that kernel returns physical ids directly.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedError
from ..placement.permutations import invert
from .fused import Fused, fused_in_place_of, understood
from .patching import replace_if_there
from .placed_weights import Filling
from .runners import RoutesItself
from .served import ServedPlacement, builds_draft

if TYPE_CHECKING:
    from torch import Tensor


_places: weakref.WeakSet[ExpertPlace] = weakref.WeakSet()


class ExpertPlace(torch.nn.Module):
    """The map from logical to physical experts of one layer, as a module with one buffer that no checkpoint has.

    The buffer is not persistent, as `reload_weights` copies uninitialised memory over persistent buffers that it did
    not load. It is a buffer all the same, as sleep level 2 saves buffers of modules and no other tensors. The name
    `_expert_map` is vLLM's own for such a map: vLLM does not move buffers of that name while it reloads weights.
    """

    _expert_map: Tensor  # [E + 1], int32: the physical id of each logical expert; the last entry maps id -1 to -1

    def __init__(self, physical_to_logical: tuple[int, ...], device: Any) -> None:
        super().__init__()
        self.physical_to_logical = physical_to_logical
        self.logical_to_physical = invert(physical_to_logical)
        table = torch.tensor([*self.logical_to_physical, -1], dtype=torch.int32, device=device)
        self.register_buffer("_expert_map", table, persistent=False)
        _places.add(self)

    def restore(self) -> None:
        """Rewrite the buffer in place: its contents were lost, and CUDA graphs still read from its address."""
        self._expert_map.data.copy_(torch.tensor([*self.logical_to_physical, -1], dtype=torch.int32))

    @property
    def place_E(self) -> Tensor:  # noqa: N802 - tensors carry their shape in their name
        """The physical id of each logical expert, int32 [E]; shares the buffer's memory."""
        return self._expert_map[:-1]

    def forward(self, ids_TK: Tensor) -> Tensor:
        """Map logical ids to physical ones; negative ids, which mark padding, stay as they are."""
        if ids_TK.is_cuda:
            from .map_ids import map_ids

            return map_ids(ids_TK, self._expert_map)
        return self._expert_map[ids_TK.long()].to(ids_TK.dtype)


def restore_places() -> None:
    """Rewrite the buffers of all layers of this process, a draft's included: not every vLLM version saves them."""
    for place in list(_places):
        place.restore()


class Placed(RoutesItself):
    """A mixin before the router's own class; it maps the router's logical ids to physical ones."""

    reshard_place: ExpertPlace
    reshard_kernel: Fused | None
    capture_fn: Any

    def _select_experts(
        self, hidden_states: Tensor, router_logits: Tensor, topk_indices_dtype: Any = None, **more: Any
    ) -> tuple[Tensor, Tensor]:
        own: Any = super()
        kernel = self.reshard_kernel
        # for one token, vLLM's router and the map are 1 us faster than our kernel (benchmarks/placed_step.py)
        few = len(router_logits) == 1
        if kernel is None or few or self.capture_fn is not None or not understood((), more):
            weights, ids = own._select_experts(hidden_states, router_logits, topk_indices_dtype, **more)
            return weights, ids

        def router(logits: Tensor) -> tuple[Tensor, Tensor]:
            hidden = hidden_states
            if logits is not router_logits:  # trial logits: routers read only the number of hidden states
                hidden = hidden_states.new_zeros(len(logits), hidden_states.shape[1])
            weights, ids = own._compute_routing(hidden, logits, topk_indices_dtype, **more)
            return weights, self.reshard_place(ids)

        weights, ids = kernel.route(router_logits, self.__dict__["e_score_correction_bias"], router)
        return weights, own._convert_indices_dtype(ids, topk_indices_dtype)

    def _apply_eplb_mapping(self, topk_ids: Tensor) -> Tensor:
        """Map logical to physical ids, in the step that vLLM has for this; it runs after ids are captured."""
        ids: Tensor = self.reshard_place(topk_ids)
        return ids

    def reshard_answers_logical_ids(self) -> None:
        """From now on call `_compute_routing`, which returns logical ids, for every token, and not the kernel."""
        self.reshard_kernel = None


def router_fault(router: Any, arguments: dict[str, Any]) -> str | None:
    """Describe why the ids of a router, which vLLM created with `arguments`, cannot be mapped; None if they can."""
    faults = {
        "it has zero experts": arguments.get("zero_expert_type") is not None,
        "it routes to fused shared experts": bool(arguments.get("num_fused_shared_experts")),
        f"{type(router).__name__} does not map its ids": not hasattr(router, "_apply_eplb_mapping"),
        f"{type(router).__name__} captures no ids": not hasattr(router, "capture_fn"),
    }
    return next((fault for fault, found in faults.items() if found), None)


def placed_router(router: Any, served: ServedPlacement, arguments: dict[str, Any], prefix: str) -> Any:
    """Make the router of the layer `prefix` return physical ids; vLLM created it with `arguments`.

    Returns `router` unchanged for a draft's layer that the placement does not contain. Raises UnsupportedError for a
    router that cannot be placed.
    """
    from vllm.config import get_current_vllm_config

    if fault := router_fault(router, arguments):
        raise UnsupportedError(
            f"{served.asked}: layer {prefix}: its router cannot be placed: {fault}; use other options or serve "
            "without a placement"
        )
    order = served.order(prefix, arguments["global_num_experts"], draft=builds_draft())
    if order is None:
        return router
    place = ExpertPlace(order, get_current_vllm_config().device_config.device)
    placed: Any = object.__new__(type(f"Placed{type(router).__name__}", (Placed, type(router)), {}))
    kernel = fused_in_place_of(router, place.place_E, prefix, logical=True)
    placed.__dict__ = {**vars(router), "reshard_place": place, "reshard_kernel": kernel}
    return placed


def install_runner(module: ModuleType) -> None:
    """Make each MoE layer keep its router's placement, and pass it to experts that get it while they are loaded.

    `module` defines MoERunner.
    """
    replace_if_there(module.MoERunner, "__init__", _then_join)


def _then_join(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(runner: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - vLLM's own name
        init(runner, *args, **kwargs)
        if (original := getattr(runner.router, "reshard_original", None)) is not None:
            runner.reshard_original = original
        place: ExpertPlace | None = getattr(runner.router, "reshard_place", None)
        if place is None:
            return
        runner.reshard_place = place  # now a submodule of the model: vLLM saves and restores its buffer
        if isinstance(runner.router, Placed):  # not an output's router: its experts are in place already
            runner.routed_experts.reshard_filling = Filling.of(runner.routed_experts, place.logical_to_physical)

    return __init__
