"""Makes vLLM's EPLB start from a placement, layer by layer, with redundant experts.

vLLM starts EPLB from one list for all layers, and its loader fills only the first local copy of an expert. So we let
vLLM load experts where it expects them. Then we move them with its own `rearrange_expert_weights_inplace` and commit
the maps, before warm-up and in the tensors that the layers already share. From then on EPLB works as usual.

A placement with copies says itself where copies are. For others we add vLLM's redundant experts. Where the placement
has copies, `copies` chooses among them, and its maps follow each commit of EPLB's. EPLB then does not move experts
while it serves, unless the user asks for that: vLLM has no option for it, so `EplbState.rearrange` returns at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from ..placement.permutations import rank_slots
from .patching import replace_if_there
from .runners import lets_kernel_route
from .served import ServedPlacement, current_build, current_placement
from .updates import close
from .worker import WITH_EPLB, mark_proved


def install(module: ModuleType) -> None:
    """Move the experts of each model that is added to EPLB, and follow its maps; `module` defines EplbState."""
    replace_if_there(module.EplbState, "add_model", _then_place)
    replace_if_there(module.EplbState, "rearrange", _if_asked)
    replace_if_there(module, "_commit_eplb_maps", _then_follow)
    replace_if_there(module, "_commit_eplb_maps_for_layer", _then_follow_layer)


def with_copies(order: Sequence[int], ep_size: int, num_redundant: int) -> tuple[int, ...]:
    """Add redundant experts to a placement: on each rank, its own experts come first and copies follow.

    As in vLLM, copies are dealt to logical experts in order: 0, 1, 2, and so on, starting over after the last expert.
    A copy goes to the rank with the most free slots among those that do not hold its expert yet. If no such rank has a
    free slot, another rank takes the copy and gives one of its experts to a rank with room.

    Parameters:
        order: physical_to_logical [E], a permutation
        ep_size: R, EP ranks
        num_redundant: S, redundant experts; R divides E + S

    Returns:
        physical_to_logical [E + S], the same number of slots on each rank

    Raises:
        UnsupportedError: R does not divide E + S, or a rank would have to hold two copies of one expert
    """
    num_experts, slots = len(order), len(order) + num_redundant
    if slots % ep_size:
        raise UnsupportedError(
            f"{num_experts} experts and {num_redundant} redundant ones cannot be divided evenly among {ep_size} EP "
            "ranks; use another number of redundant experts"
        )
    held = [list(order[own.start : own.stop]) for own in rank_slots(num_experts, ep_size)]
    size = slots // ep_size
    for copy in range(num_redundant):
        expert = copy % num_experts
        eligible = [rank for rank, experts in enumerate(held) if len(experts) < size and expert not in experts]
        if eligible:
            held[min(eligible, key=lambda rank: (len(held[rank]), rank))].append(expert)
            continue
        # every rank with room already holds this expert, so a rank without it makes room by giving an expert away
        room = next(rank for rank, experts in enumerate(held) if len(experts) < size)
        for experts in held:
            movable = [other for other in experts if other not in held[room]]
            if expert not in experts and movable:
                experts[experts.index(movable[-1])] = expert
                held[room].append(movable[-1])
                break
        else:
            raise UnsupportedError(
                f"{num_redundant} redundant experts on {ep_size} EP ranks: one rank would hold expert {expert} twice; "
                "use fewer redundant experts"
            )
    return tuple(expert for experts in held for expert in experts)


def _then_place(add_model: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(add_model)
    def add_model_placed(state: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> None:
        known = set(state.model_states)
        add_model(state, model, model_config, *args, **kwargs)
        served = current_placement()
        if served is None:
            return
        state.reshard_rearranges = served.rearranges
        if not served.rearranges:
            _log().info_once(
                "EPLB does not move experts while it serves; --additional-config "
                '\'{"reshard": {"rearrange": true}}\' makes it'
            )
        for key in state.model_states.keys() - known:
            place(state.model_states[key], served, is_draft=getattr(model_config, "runner_type", None) == "draft")

    return add_model_placed


def _if_asked(rearrange: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(rearrange)
    def rearrange_if_asked(state: Any, is_profile: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_profile or getattr(state, "reshard_rearranges", True):  # profiling moves nothing, it measures memory
            return rearrange(state, is_profile, *args, **kwargs)
        return None

    return rearrange_if_asked


def _then_follow(commit: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(commit)
    def commit_and_follow(model_state: Any, new_physical_to_logical_map: Any, *args: Any, **kwargs: Any) -> None:
        commit(model_state, new_physical_to_logical_map, *args, **kwargs)
        if maps := _maps_of(model_state.model):
            orders = new_physical_to_logical_map.tolist()
            for layer, of_layer in maps.items():
                of_layer.update(orders[layer])

    return commit_and_follow


def _then_follow_layer(commit: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(commit)
    def commit_and_follow(
        model_state: Any, new_physical_to_logical_map: Any, layer: int, *args: Any, **kwargs: Any
    ) -> None:
        commit(model_state, new_physical_to_logical_map, layer, *args, **kwargs)
        if (of_layer := _maps_of(model_state.model).get(layer)) is not None:
            of_layer.update(new_physical_to_logical_map.tolist())

    return commit_and_follow


def _maps_of(model: Any) -> dict[int, Any]:
    """The CopyMaps of each layer that chooses among copies, by its number; none in models without such a placement."""
    routers = enumerate(getattr(layer, "router", None) for layer in model.moe_layers)
    found = {number: getattr(router, "reshard_copies", None) for number, router in routers}
    return {number: maps for number, maps in found.items() if maps is not None}


def place(model_state: Any, served: ServedPlacement, *, is_draft: bool) -> None:
    """Move the experts of an EplbModelState to their slots, commit its maps, and close the model to new weights.

    Raises UnsupportedError if a layer is not in the placement or has a part that is not vLLM's own, or if EPLB's maps
    differ from the placement afterwards.
    """
    import torch
    from vllm.distributed.eplb import eplb_state
    from vllm.distributed.parallel_state import get_ep_group

    from .proof import refuse_foreign_parts  # imports torch

    model, old = model_state.model, model_state.physical_to_logical_map
    refuse_foreign_parts(model, served)
    layers = list(model.moe_layers)
    redundant = model.num_redundant_experts
    wanted, choosing = [], []
    for layer, before in zip(layers, old.tolist(), strict=True):
        order = served.order(layer.layer_name, model.num_logical_experts, draft=is_draft)
        if order is not None and not served.redundant:
            order = with_copies(order, served.ep_size, redundant)
        wanted.append(list(before if order is None else order))
        if order is not None and served.redundant:
            choosing.append((layer, order))
    if choosing:
        _let_choose(choosing, model.num_logical_experts, served)
    new = torch.tensor(wanted, dtype=old.dtype)  # on the CPU, as the maps from vLLM's own policies are
    eplb_state.rearrange_expert_weights_inplace(
        old,
        new,
        model.expert_weights,
        model_state.expert_buffer,
        get_ep_group().device_group,
        model_state.communicator,
    )
    eplb_state._commit_eplb_maps(model_state, new_physical_to_logical_map=new)
    if model_state.physical_to_logical_map.tolist() != wanted:
        raise UnsupportedError(f"{served.asked}: vLLM's EPLB did not apply the placement; serve without EPLB")
    close(model, f"{served.asked}: new weights are refused while the model is served with a placement: {WITH_EPLB}")
    mark_proved(served)
    _log().info(
        "%sEPLB starts from the placement %s in %d MoE layers, %d redundant experts, digest %s",
        "draft: " if is_draft else "",
        served.asked,
        len(layers),
        redundant,
        served.digest[:12],
    )


def _let_choose(choosing: Sequence[tuple[Any, Sequence[int]]], num_experts: int, served: ServedPlacement) -> None:
    """Give the routers of layers the maps of their copies. Raises UnsupportedError if one cannot choose among them."""
    from .copies import ChoosesCopies, CopyMaps, room_for  # imports torch

    same_tokens = route_the_same_tokens(current_build().vllm_config.parallel_config)
    orders = [order for _, order in choosing]
    room = room_for(orders, num_experts, served.ep_size, rearranges=served.rearranges)
    for layer, order in choosing:
        router = getattr(layer, "router", None)
        if not isinstance(router, ChoosesCopies) or lets_kernel_route(layer):
            raise UnsupportedError(
                f"{served.asked}: layer {layer.layer_name} routes in its own way ({type(router or layer).__name__}), "
                "and would not choose among copies of experts; serve the model without copies, or with other options"
            )
        device = router.eplb_state.expert_load_view.device
        router.reshard_copies = CopyMaps(order, num_experts, served.ep_size, device, room, same_tokens=same_tokens)


def route_the_same_tokens(parallel: Any) -> bool:
    """Whether all EP ranks route all tokens of a step, so that each rank knows what the others choose."""
    context = getattr(parallel, "prefill_context_parallel_size", 1)
    return int(parallel.data_parallel_size) == 1 and int(context) == 1


def _log() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.plugins.reshard")
