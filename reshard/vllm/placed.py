"""Routers and experts of an original that is served placed.

vLLM makes each router in `create_fused_moe_router`, and joins it with the layer's experts in `MoERunner`. The router
keeps its class: it chooses logical experts as ever, and only then its answer is mapped to physical ids. `MoERunner` is
where the same placement reaches the experts, so that a layer has both or neither:

    router          logits, bias and groups as the original's; logical ids; captured; mapped to physical ids; kernel
    while loading   expert `e` of the checkpoint goes to the slot of physical expert `logical_to_physical[e]`

Where `fused` has a kernel for the router, and nobody wants logical ids of it, that kernel answers physical ids.
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
from .fused import Fused, fused_in_place_of
from .patching import replace_if_there
from .placed_weights import Filling
from .served import ServedPlacement, builds_draft

if TYPE_CHECKING:
    from torch import Tensor


_places: weakref.WeakSet[ExpertPlace] = weakref.WeakSet()


class ExpertPlace(torch.nn.Module):
    """Where each expert of a layer is. A module of its own, with one buffer that no checkpoint has.

    Not persistent: `reload_weights` copies uninitialised memory over persistent buffers that it did not load. A buffer
    of a module all the same: sleep level 2 saves those, and no other tensor. vLLM's name for such a map keeps it from
    being moved while weights are reloaded.
    """

    _expert_map: Tensor  # [E + 1], int32: the physical id of each logical expert; last of all -1, which is where -1 is

    def __init__(self, physical_to_logical: tuple[int, ...], device: Any) -> None:
        super().__init__()
        self.physical_to_logical = physical_to_logical
        self.logical_to_physical = invert(physical_to_logical)
        table = torch.tensor([*self.logical_to_physical, -1], dtype=torch.int32, device=device)
        self.register_buffer("_expert_map", table, persistent=False)
        _places.add(self)

    def restore(self) -> None:
        """Write the buffer anew, where it is: its memory was lost, and CUDA graphs still read there."""
        self._expert_map.data.copy_(torch.tensor([*self.logical_to_physical, -1], dtype=torch.int32))

    @property
    def place_E(self) -> Tensor:  # noqa: N802 - tensors carry their shape in their name
        """int32 [E], sharing the buffer's memory."""
        return self._expert_map[:-1]

    def forward(self, ids_TK: Tensor) -> Tensor:
        """Physical ids of logical ones; a negative id, which marks padding, stays what it is."""
        if ids_TK.is_cuda:
            from .map_ids import map_ids

            return map_ids(ids_TK, self._expert_map)
        return self._expert_map[ids_TK.long()].to(ids_TK.dtype)


def restore_places() -> None:
    """Write the buffers of all layers of this process anew, a draft's too: not every vLLM saves those."""
    for place in list(_places):
        place.restore()


class Placed:
    """What is put in front of a router's own class: see the module."""

    reshard_place: ExpertPlace
    reshard_kernel: Fused | None
    capture_fn: Any

    def _select_experts(
        self, hidden_states: Tensor, router_logits: Tensor, topk_indices_dtype: Any = None, **more: Any
    ) -> tuple[Tensor, Tensor]:
        own: Any = super()
        kernel = self.reshard_kernel
        if kernel is None or self.capture_fn is not None:
            weights, ids = own._select_experts(hidden_states, router_logits, topk_indices_dtype, **more)
            return weights, ids

        def router(logits: Tensor) -> tuple[Tensor, Tensor]:
            hidden = hidden_states
            if logits is not router_logits:  # a trial's: all that a router asks of hidden states is how many there are
                hidden = hidden_states.new_zeros(len(logits), hidden_states.shape[1])
            weights, ids = own._compute_routing(hidden, logits, topk_indices_dtype, **more)
            return weights, self.reshard_place(ids)

        weights, ids = kernel.route(router_logits, self.__dict__["e_score_correction_bias"], router)
        return weights, own._convert_indices_dtype(ids, topk_indices_dtype)

    def _apply_eplb_mapping(self, topk_ids: Tensor) -> Tensor:
        """vLLM's step from logical to physical ids, after what captures ids has seen them."""
        ids: Tensor = self.reshard_place(topk_ids)
        return ids

    def reshard_answers_logical_ids(self) -> None:
        """From now on `_compute_routing` is asked for every token, and answers logical ids."""
        self.reshard_kernel = None

    @property
    def routing_method_type(self) -> Any:
        """None that a kernel could do by itself from the logits."""
        from vllm.model_executor.layers.fused_moe.config import RoutingMethodType

        return RoutingMethodType.Unspecified

    @property
    def supports_monolithic_kernels(self) -> bool:
        """Never: such a kernel would route by itself, and to logical ids."""
        return False


def placed_router(router: Any, served: ServedPlacement, arguments: dict[str, Any], prefix: str) -> Any:
    """`router`, made with `arguments` for the layer `prefix`, made to answer physical ids.

    The same router where the layer is a draft's that the placement does not know. UnsupportedError for a router that
    cannot be placed.
    """
    from vllm.config import get_current_vllm_config

    faults = {
        "it has zero experts": arguments.get("zero_expert_type") is not None,
        "it routes to fused shared experts": bool(arguments.get("num_fused_shared_experts")),
        f"{type(router).__name__} does not map its ids": not hasattr(router, "_apply_eplb_mapping"),
        f"{type(router).__name__} captures no ids": not hasattr(router, "capture_fn"),
    }
    if fault := next((fault for fault, found in faults.items() if found), None):
        raise UnsupportedError(
            f"{served.asked}: layer {prefix}: its router cannot be placed: {fault}; use other options, or serve "
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
    """Make each MoE layer keep its router's placement, and hand it to experts that are placed while they are loaded.

    `module` defines MoERunner.
    """
    replace_if_there(module.MoERunner, "__init__", _then_join)


def _then_join(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(runner: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - vLLM's own name
        init(runner, *args, **kwargs)
        place: ExpertPlace | None = getattr(runner.router, "reshard_place", None)
        if place is None:
            return
        runner.reshard_place = place  # a module of the model now: its buffer is saved and restored with the others
        if isinstance(runner.router, Placed):  # and no output's router
            runner.routed_experts.reshard_filling = Filling.of(runner.routed_experts, place.logical_to_physical)

    return __init__
