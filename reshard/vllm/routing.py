"""Makes the routers of a model with a contract score groups of logical experts and return physical ids.

vLLM makes every router in `create_fused_moe_router`, and we wrap that function. We keep vLLM's router: we put its
logits into logical order before it chooses, and map its answer to physical ids afterwards. So ties fall as in the
original, and the weights have the same bits. Everything after the choice (EPLB's mapping and load recording) sees
physical ids. If `fused` has one kernel for all of this, it routes.

The wrapper also handles originals that are served with a placement; `placed` has the rest of that.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..placement.contract import CONTRACT_KEY, Contract, contract_from_json
from ..placement.layer_names import find_layer
from ..placement.permutations import Placement
from .fused import Fused, fused_in_place_of, set_names, understood
from .hooks import ROUTER_ARGUMENTS
from .outputs import LOAD_FORMATS, read_placement
from .patching import replace_once
from .returned import returning, returns_experts
from .runners import RoutesItself
from .served import ServedPlacement, builds_draft, current_build, current_placement
from .support import hook_fault

if TYPE_CHECKING:
    from torch import Tensor

    from .placed import ExpertPlace

# Arguments of `create_fused_moe_router` in vLLM 0.26 to 0.33 with which a router stays exact, or is refused for its
# value. None of the others has a place for each expert in a router with groups; new ones might.
KNOWN_ARGUMENTS = (
    *ROUTER_ARGUMENTS,
    *("renormalize", "scoring_func", "routed_scaling_factor", "shared_expert_weight", "skip_padding"),
    *("eplb_state", "enable_eplb", "indices_type_getter", "zero_expert_type", "num_logical_experts"),
)


class LogicalOrder(RoutesItself):
    """A mixin before the router's own class; it gives the router logits in logical order and maps its answer."""

    reshard_place: ExpertPlace
    _fused: Fused | None

    def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        def with_gathers(hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
            logical_logits = logits.index_select(1, self.reshard_place.place_E)
            weights, ids = super(LogicalOrder, self)._compute_routing(  # type: ignore[misc]
                hidden, logical_logits, *args, **kwargs
            )
            return weights, self.reshard_place(ids)

        if self._fused is None or not understood(args[1:], kwargs):
            return with_gathers(hidden_states, router_logits)

        def router(logits: Tensor) -> tuple[Tensor, Tensor]:
            if logits is router_logits:
                return with_gathers(hidden_states, logits)
            # trial logits: routers read only the number of hidden states
            return with_gathers(hidden_states.new_zeros(len(logits), hidden_states.shape[1]), logits)

        return self._fused.route(router_logits, self.__dict__["e_score_correction_bias"], router)

    @property
    def e_score_correction_bias(self) -> Tensor | None:
        """The correction bias in logical order; like all router tensors, it is loaded in physical order."""
        bias = self.__dict__["e_score_correction_bias"]
        return None if bias is None else bias.index_select(0, self.reshard_place.place_E)


def install(layer: ModuleType) -> None:
    """Wrap `create_fused_moe_router`; `layer` is the vLLM module that makes MoE layers."""
    if hook_fault(getattr(layer, "create_fused_moe_router", None)) is None:
        replace_once(layer, "create_fused_moe_router", _with_contract)


def _with_contract(create: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(create)

    @functools.wraps(create)
    def create_fused_moe_router(*args: Any, **kwargs: Any) -> Any:
        router = create(*args, **kwargs)
        contract = current_contract()
        served = current_placement()
        prefix = sys._getframe(1).f_locals.get("prefix", "")
        arguments = signature.bind(*args, **kwargs).arguments
        if served is not None and contract is None:
            return _placed(router, served, arguments, prefix)
        if contract is not None:
            router = in_logical_order(router, contract, arguments, prefix)
        return _returning(router, prefix)

    return create_fused_moe_router


def _placed(router: Any, served: ServedPlacement | None, arguments: dict[str, Any], prefix: str) -> Any:
    from vllm.config import get_current_vllm_config

    if served is None:
        return router
    if get_current_vllm_config().parallel_config.enable_eplb:  # `eplb` moves experts after loading
        if not served.redundant:
            return router
        from .copies import choosing_router  # imports torch

        return choosing_router(router, served, arguments, prefix)
    from .placed import placed_router  # imports torch

    return placed_router(router, served, arguments, prefix)


def _returning(router: Any, prefix: str) -> Any:
    """Let an output's router return the original's ids, if vLLM returns any; other routers stay as they are."""
    config = current_build().vllm_config
    if config.model_config is None or not returns_experts(config) or builds_draft():
        return router
    placement = read_placement(str(config.model_config.model), config.model_config.hf_config)
    return router if placement is None else returning(router, placement_of(placement, prefix), prefix)


def current_contract() -> Contract | None:
    """The contract of the model that vLLM is building, which may be a draft; None if it has none.

    Raises UnsupportedError for a load format that does not read the files of the index.
    """
    build = current_build()
    value = None if build.model_config is None else getattr(build.model_config.hf_config, CONTRACT_KEY, None)
    if value is None:
        return None
    if (load_format := str(build.load_config.load_format)) not in LOAD_FORMATS:
        raise UnsupportedError(
            f"{build.model_config.model}: load format {load_format} does not read the index, and might load weights "
            f"that were not resharded; use one of {', '.join(LOAD_FORMATS)}"
        )
    return contract_from_json(value, str(build.model_config.model))


def in_logical_order(router: Any, contract: Contract, arguments: dict[str, Any], prefix: str) -> Any:
    """Make the router of the layer `prefix` honour `contract`; vLLM created it with `arguments`.

    Raises UnsupportedError for a router that cannot be kept exact.
    """
    from vllm.config import get_current_vllm_config

    from .placed import ExpertPlace  # imports torch

    groups = (arguments.get("num_expert_group"), arguments.get("topk_group"))
    strange = set_names(arguments, KNOWN_ARGUMENTS)
    faults = {
        "it does not route by groups": not arguments.get("use_grouped_topk"),
        f"its groups are {groups}": groups != (contract.n_group, contract.topk_group),
        "it has a routing function of its own": arguments.get("custom_routing_function") is not None,
        "it has zero experts": arguments.get("zero_expert_type") is not None,
        "it routes to fused shared experts": bool(arguments.get("num_fused_shared_experts")),
        f"it is given {', '.join(strange)}, which reshard does not know": strange,
        "it is a router without _compute_routing": not hasattr(router, "_compute_routing"),
        "it simulates routing": type(router).__name__ == "RoutingSimulatorRouter",
    }
    for fault, found in faults.items():
        if found:
            raise UnsupportedError(
                f"{prefix}: reshard cannot keep this layer's router exact for a resharded model: {fault}; serve the "
                "original, or use other options"
            )
    order = placement_of(contract.physical_to_logical, prefix)
    place = ExpertPlace(order, get_current_vllm_config().device_config.device)
    resharded_class = type(f"Resharded{type(router).__name__}", (LogicalOrder, type(router)), {})
    resharded: Any = object.__new__(resharded_class)
    fused = fused_in_place_of(router, place.place_E, prefix)
    resharded.__dict__ = {**vars(router), "reshard_place": place, "_fused": fused}
    return resharded


def placement_of(placement: Placement, prefix: str) -> tuple[int, ...]:
    """physical_to_logical [E] of the layer that vLLM calls `prefix` (`model.layers.3.mlp.experts`)."""
    permutations = set(placement.values())
    if len(permutations) == 1:
        return permutations.pop()
    if (layer := find_layer(prefix, placement)) is not None:
        return placement[layer]
    raise UnsupportedError(
        f"{prefix}: the output has a placement for each layer, but none for this one; restore the original with "
        "`reshard restore` and serve that"
    )
