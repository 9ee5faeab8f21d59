"""How each engine wants to be told where experts go: a writer for each form of file.

Each engine has its own rule for which layers the file has and how they are numbered; the writers' docstrings say so.
`tests/commands/test_export.py` reads what they write as the engines do. A new engine is a writer and an entry in
`FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..placement.permutations import rank_slots
from ..placement.placement_file import PlacementFile, encode_placement_file

FormatName = Literal["vllm", "sglang", "vllm-ascend", "trtllm", "eplb"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """A MoE layer: its module's name, and its number among all layers, where those of MTP follow the last of the model.

    `physical_to_logical` [E]: the expert in each slot.
    """

    name: str
    number: int
    physical_to_logical: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """Where the experts of the checkpoint `original` go, by its own ids.

    `ep_size` (R) divides `num_experts` (E): rank `r` owns the slots from `r * E / R` on. `layers` are in the model's
    order, those of MTP last: their numbers begin at `num_layers`.
    """

    original: str
    strategy: str
    ep_size: int
    num_experts: int
    model_type: str
    num_layers: int = 0
    layers: tuple[PlacedLayer, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """An engine's form of a placement: how it is written, and how the engine is told of the file.

    `mtp`: whether it places the experts of MTP layers by it, or leaves them where they are. Where `suffix` is not
    empty, it refuses or misreads a file whose name ends in anything else.
    """

    engine: str
    write: Callable[[PlacedModel], str]
    mtp: bool
    suffix: str
    use: str
    even: bool = True


def _vllm(model: PlacedModel) -> str:
    """reshard's own placement file, which its vLLM plugin reads (RESHARD_PLACEMENT), and `--map` too."""
    by_layer = {layer.name: list(layer.physical_to_logical) for layer in model.layers}
    first = next(iter(by_layer.values()))
    file = PlacementFile(
        strategy=model.strategy,
        ep_size=model.ep_size,
        model_type=model.model_type,
        num_experts=model.num_experts,
        layers=list(by_layer),
        physical_to_logical=first if all(order == first for order in by_layer.values()) else by_layer,
    )
    return encode_placement_file(file).decode()


def _sglang(model: PlacedModel) -> str:
    """One row [E] for every layer but those of MTP; nothing looks at the row of a layer without experts.

    Any other key in the file is an error to SGLang.
    """
    rows = [list(range(model.num_experts)) for _ in range(model.num_layers)]
    for layer in model.layers:
        rows[layer.number] = list(layer.physical_to_logical)
    return json.dumps({"physical_to_logical_map": rows}) + "\n"


def _vllm_ascend(model: PlacedModel) -> str:
    """Each rank's experts, for the MoE layers alone, numbered from 0 in the order in which the engine builds them.

    Those of MTP are built last. Without them in the file, the first would be placed linearly and a second refused.
    """
    layers = [
        {
            "layer_id": position,
            "device_count": model.ep_size,
            "device_list": [
                {"device_id": rank, "device_expert": experts} for rank, experts in enumerate(_by_rank(model, layer))
            ],
        }
        for position, layer in enumerate(model.layers)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}) + "\n"


def _trtllm(model: PlacedModel) -> str:
    """One list [num_slots] for each MoE layer, by its number: YAML, since that is a number, which JSON has no keys of.

    A layer that is asked for and not there is an error to TensorRT-LLM, so those of MTP are in it; it numbers them as
    `PlacedLayer` does. `layer_updates_per_iter` 0: what is placed stays so.
    """
    return "\n".join(
        [
            f"num_slots: {model.num_experts}",
            "layer_updates_per_iter: 0",
            "initial_global_assignments:",
            *(f"  {layer.number}: {list(layer.physical_to_logical)}" for layer in model.layers),
            "",
        ]
    )


def _eplb(model: PlacedModel) -> str:
    """`physical_to_logical_map` [num_moe_layers, num_replicas], as `rebalance_experts` returns it.

    What that function's caller knows is beside it: `num_gpus`, and which layer each row is of.
    """
    return (
        json.dumps(
            {
                "num_gpus": model.ep_size,
                "layers": [layer.name for layer in model.layers],
                "physical_to_logical_map": [layer.physical_to_logical for layer in model.layers],
            }
        )
        + "\n"
    )


def _by_rank(model: PlacedModel, layer: PlacedLayer) -> Iterable[tuple[int, ...]]:
    """The logical experts of each rank's slots, [R][E / R]."""
    for slots in rank_slots(model.num_experts, model.ep_size):
        yield layer.physical_to_logical[slots.start : slots.stop]


FORMATS: Mapping[FormatName, Format] = {
    "vllm": Format(
        engine="vLLM with reshard's plugin",
        write=_vllm,
        mtp=True,
        suffix="",
        use="RESHARD_PLACEMENT={file} vllm serve {original} --tensor-parallel-size {ep} --enable-expert-parallel",
        even=False,
    ),
    "sglang": Format(
        engine="SGLang",
        write=_sglang,
        mtp=False,
        suffix=".json",
        use="--ep-size {ep} --init-expert-location {file}",
    ),
    "vllm-ascend": Format(
        engine="vLLM Ascend",
        write=_vllm_ascend,
        mtp=True,
        suffix=".json",
        use="""--enable-expert-parallel --additional-config '{"eplb_config": {"expert_map_path": "{file}"}}'""",
    ),
    "trtllm": Format(
        engine="TensorRT-LLM",
        write=_trtllm,
        mtp=True,
        suffix="",
        use="moe_expert_parallel_size: {ep}, enable_attention_dp: true, moe_config: {load_balancer: {file}}",
    ),
    "eplb": Format(
        engine="DeepSeek's EPLB",
        write=_eplb,
        mtp=True,
        suffix="",
        use="the physical_to_logical_map in {file}, for num_gpus={ep}",
    ),
}
