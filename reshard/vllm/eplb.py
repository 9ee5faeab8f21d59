"""Makes vLLM's EPLB start from a placement, layer by layer, with redundant experts.

vLLM starts EPLB from one list for all layers, and its loader fills only the first local copy of an expert. So we let
vLLM load experts where it expects them. Then we move them with its own `rearrange_expert_weights_inplace` and commit
the maps, before warm-up and in the tensors that the layers already share. From then on EPLB works as usual.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ..errors import UnsupportedError
from ..placement.permutations import rank_slots
from .patching import replace_if_there
from .served import ServedPlacement, current_placement
from .updates import close
from .worker import WITH_EPLB, mark_proved


def install(module: ModuleType) -> None:
    """Move the experts of each model that is added to EPLB; `module` defines EplbState."""
    replace_if_there(module.EplbState, "add_model", _then_place)


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
        for key in state.model_states.keys() - known:
            place(state.model_states[key], served, is_draft=getattr(model_config, "runner_type", None) == "draft")

    return add_model_placed


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
    names = [layer.layer_name for layer in model.moe_layers]
    redundant = model.num_redundant_experts
    wanted = []
    for name, before in zip(names, old.tolist(), strict=True):
        order = served.order(name, model.num_logical_experts)
        wanted.append(list(before) if order is None else list(with_copies(order, served.ep_size, redundant)))
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
    from vllm.logger import init_logger

    init_logger("vllm.plugins.reshard").info(
        "%sEPLB starts from the placement %s in %d MoE layers, %d redundant experts, digest %s",
        "draft: " if is_draft else "",
        served.asked,
        len(names),
        redundant,
        served.digest[:12],
    )
