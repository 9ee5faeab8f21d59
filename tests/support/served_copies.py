"""A placement with copies, served on stand-ins for vLLM's routers and its EPLB, by Triton's interpreter.

python served_copies.py      for each line of JSON a line of JSON; TRITON_INTERPRET=1 must be set

A line has `orders` (physical_to_logical [L, P]), `experts`, `ranks`, `data_parallel`, `rearrange` and `batches`. A
batch has `rows` (the logical ids that each token chooses, the same in all layers), `real` (rows that are tokens), and
perhaps `rearranged` (orders that EPLB commits before the batch, layer by layer if `by_layer`) or `spoilt` (the maps
follow another placement, and the weights do not). With `data_parallel` each rank routes its share of the rows, or if
they are `gathered` all of them, and knows only its own number of tokens (`unpadded` of the batch, by rank). If
`own_way` is "router" or "kernel", layers have vLLM's router, or a kernel that routes. The answer is an error's text, or
has for each batch

    pairs     [layer] of (token, expert) that some rank computes: with the weights that lie in its slots
    physical  [rank][layer][token][choice]
    loads     [layer][P], what EPLB has counted so far on rank 0
    orders    [L, P], EPLB's maps
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch

from reshard.errors import UnsupportedError
from reshard.placement.placement_file import PlacementFile
from reshard.vllm import eplb
from reshard.vllm.served import KEY, served_file


class Router:
    """As vLLM 0.26's BaseRouter; the logits are the ids that tokens choose."""

    __module__ = "vllm.stand_in"
    capture_fn: Any = None

    def __init__(self, eplb_state: Any) -> None:
        self.eplb_state = eplb_state

    def _compute_routing(self, hidden: Any, logits: torch.Tensor, dtype: Any = None, *, input_ids: Any = None) -> Any:
        return torch.ones(logits.shape), logits.to(dtype)

    def _apply_eplb_mapping(self, ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("vLLM's own choice of a copy")

    def _select_experts(self, hidden: Any, logits: torch.Tensor, dtype: Any = None, *, input_ids: Any = None) -> Any:
        weights, ids = self._compute_routing(hidden, logits, dtype, input_ids=input_ids)
        if self.capture_fn is not None:
            self.capture_fn(ids)
        return weights, self._apply_eplb_mapping(ids)


def rearrange_weights(old: Any, new: torch.Tensor, weights: torch.Tensor, *more: Any) -> None:
    """As vLLM's `rearrange_expert_weights_inplace`; the weight of a slot is the id of its expert."""
    assert torch.equal(weights, old), "slots hold what the old map says"
    weights.copy_(new)


def commit(model_state: Any, new_physical_to_logical_map: torch.Tensor) -> None:
    """As vLLM's `_commit_eplb_maps`."""
    model_state.physical_to_logical_map.copy_(new_physical_to_logical_map)


def commit_layer(model_state: Any, new_physical_to_logical_map: torch.Tensor, layer: int) -> None:
    """As vLLM's `_commit_eplb_maps_for_layer`."""
    model_state.physical_to_logical_map[layer].copy_(new_physical_to_logical_map)


class EplbState:
    """As vLLM's, for one rank; `planned` is what its policy finds next."""

    planned: Any
    by_layer = False

    def __init__(self) -> None:
        self.model_states: dict[str, Any] = {}

    def add_model(self, model: Any, model_config: Any) -> None:
        size = model.num_logical_experts + model.num_redundant_experts
        order = torch.arange(size) % model.num_logical_experts
        orders = order.repeat(len(model.moe_layers), 1)
        model.expert_weights = orders.clone()
        self.unpadded = torch.tensor(0, dtype=torch.int32)
        self.record = torch.tensor(True)
        self.loads = torch.zeros(orders.shape, dtype=torch.int32)
        for load, layer in zip(self.loads, model.moe_layers, strict=True):
            layer.router.eplb_state.expert_load_view = load
            layer.router.eplb_state.should_record_tensor = self.record
            layer.router.eplb_state.num_unpadded_tokens_tensors = [self.unpadded]
        self.model_states["model"] = SimpleNamespace(
            model=model, physical_to_logical_map=orders, expert_buffer=None, communicator=None
        )

    def rearrange(self, is_profile: bool = False) -> None:
        model_state, vllm = self.model_states["model"], sys.modules["vllm.distributed.eplb"].eplb_state
        if is_profile:
            self.profiled = True
            return
        old, new = model_state.physical_to_logical_map, torch.tensor(self.planned)
        rearrange_weights(old, new, model_state.model.expert_weights)
        if self.by_layer:
            for layer, order in enumerate(new):
                vllm._commit_eplb_maps_for_layer(model_state, new_physical_to_logical_map=order, layer=layer)
        else:
            vllm._commit_eplb_maps(model_state, new_physical_to_logical_map=new)


class Model(torch.nn.Module):
    """A model with MoE layers, as EPLB sees it."""

    expert_weights: torch.Tensor

    def __init__(self, layers: list[Any], experts: int, redundant: int) -> None:
        super().__init__()
        self.moe_layers, self.num_logical_experts, self.num_redundant_experts = layers, experts, redundant


def stand_in(case: dict[str, Any]) -> None:
    """Put what the plugin imports of vLLM into `sys.modules`."""
    module = SimpleNamespace(
        EplbState=EplbState,
        rearrange_expert_weights_inplace=rearrange_weights,
        _commit_eplb_maps=commit,
        _commit_eplb_maps_for_layer=commit_layer,
    )
    names = [f"model.layers.{layer}.mlp" for layer in range(len(case["orders"]))]
    file = PlacementFile(
        strategy="file",
        ep_size=case["ranks"],
        model_type=None,
        num_experts=case["experts"],
        layers=names,
        physical_to_logical=dict(zip(names, case["orders"], strict=True)),
    )
    served = served_file("copies.json", file, case["ranks"], len(names), "make it", rearrange=case["rearrange"])
    config = SimpleNamespace(
        additional_config={KEY: served},
        parallel_config=SimpleNamespace(data_parallel_size=case["data_parallel"]),
        device_config=SimpleNamespace(device="cpu"),
        model_config=None,
        load_config=None,
    )
    logger = SimpleNamespace(info=lambda *values: None, info_once=lambda *values: None)
    stubs: dict[str, Any] = {
        "vllm": SimpleNamespace(),
        "vllm.config": SimpleNamespace(get_current_vllm_config=lambda: config),
        "vllm.distributed": SimpleNamespace(),
        "vllm.distributed.eplb": SimpleNamespace(eplb_state=module),
        "vllm.distributed.parallel_state": SimpleNamespace(get_ep_group=lambda: SimpleNamespace(device_group=None)),
        "vllm.logger": SimpleNamespace(init_logger=lambda name: logger),
        "vllm.v1.worker.ubatching": SimpleNamespace(dbo_current_ubatch_id=lambda: 0),
    }
    sys.modules.update(stubs)
    torch.cuda.get_device_capability = lambda device: (8, 0)  # type: ignore[assignment,misc]
    eplb.install(module)  # type: ignore[arg-type]


def one_rank(case: dict[str, Any]) -> tuple[Any, Any]:
    """A rank's EplbState, after it added the model, and the model."""
    from reshard.vllm.copies import choosing_router
    from reshard.vllm.served import current_placement

    served = current_placement()
    assert served is not None
    arguments = {"global_num_experts": len(case["orders"][0])}
    layers = []
    for number in range(len(case["orders"])):
        name = f"model.layers.{number}.mlp.experts"
        layer = type("Layer", (SimpleNamespace,), {"__module__": "vllm.stand_in"})()
        layer.layer_name = name
        own_way, router = case.get("own_way"), Router(SimpleNamespace())
        layer.router = router if own_way == "router" else choosing_router(router, served, arguments, name)
        layer.routed_experts = SimpleNamespace(quant_method=SimpleNamespace(is_monolithic=own_way == "kernel"))
        layers.append(layer)
    state = EplbState()
    model = Model(layers, case["experts"], served.redundant)
    state.add_model(model, SimpleNamespace())
    return state, model


def serve(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer a case."""
    stand_in(case)
    try:
        every = [one_rank(case) for _ in range(case["ranks"])]
    except UnsupportedError as error:
        return [{"refused": str(error)}]
    for state, _ in every:
        state.rearrange(is_profile=True)
        assert state.profiled
    found = []
    for batch in case["batches"]:
        for state, model in every:
            if "rearranged" in batch:
                state.planned, state.by_layer = batch["rearranged"], batch.get("by_layer", False)
                state.rearrange()
            for layer, order in zip(model.moe_layers, batch.get("spoilt", ()), strict=False):
                layer.router.reshard_copies.update(order)
        found.append(run(batch, every, 1 if case.get("gathered") else case["data_parallel"]))
    return found


def run(batch: dict[str, Any], every: list[tuple[Any, Any]], data_parallel: int) -> dict[str, Any]:
    """Route a batch on every rank, and have each rank compute the pairs of its slots."""
    rows, physical, layers = torch.tensor(batch["rows"]), [], every[0][1].moe_layers
    share = len(rows) // data_parallel  # with data parallelism each rank routes its own tokens
    for rank, (state, model) in enumerate(every):
        mine = rows[rank * share : (rank + 1) * share] if data_parallel > 1 else rows
        state.unpadded.fill_(batch.get("unpadded", [min(len(mine), batch.get("real", len(rows)))] * len(every))[rank])
        dtype = [torch.int32, torch.int64][len(rows) % 2]
        routed = [layer.router._select_experts(None, mine, dtype)[1] for layer in model.moe_layers]
        assert all(ids.dtype == dtype for ids in routed)
        physical.append([ids.tolist() for ids in routed])
    pairs = []
    for layer in range(len(layers)):
        if data_parallel > 1:  # tokens and what was chosen for them are gathered before experts compute
            seen = [[row for of_rank in physical for row in of_rank[layer]]] * len(every)
        else:
            seen = [of_rank[layer] for of_rank in physical]
        of_layer = []
        for rank, (_, model) in enumerate(every):
            slots = model.expert_weights.shape[1] // len(every)
            of_layer += [
                (token, int(model.expert_weights[layer, slot]))
                for token, row in enumerate(seen[rank])
                for slot in row
                if slot >= 0 and slot // slots == rank
            ]
        pairs.append(of_layer)
    state, model = every[0]
    return {
        "pairs": pairs,
        "physical": physical,
        "loads": state.loads.tolist(),
        "orders": state.model_states["model"].physical_to_logical_map.tolist(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
