"""How each engine wants to be told where experts go: a writer for each form of file.

Each engine has its own rule for which layers the file has and how they are numbered; the writers' docstrings say so.
`tests/commands/test_export.py` reads what they write as the engines do. A new engine needs a writer, its name in
`FormatName`, and an entry in `FORMATS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..placement.permutations import rank_slots
from ..placement.placement_file import PlacementFile, encode_placement_file
from .serving import COPIES_OPTIONS

FormatName = Literal["vllm", "sglang", "vllm-ascend", "trtllm", "eplb"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """A MoE layer: its module's name, and its number among all layers. MTP layers are numbered after the model's last.

    `physical_to_logical` [E + R * S]: the expert in each slot; S is 0 unless experts have copies.
    """

    name: str
    number: int
    physical_to_logical: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """Where the experts of the checkpoint `original` go, by its own ids.

    `ep_size` (R) divides `num_experts` (E); rank `r` owns the E / R + S slots from `r * (E / R + S)` on, where S is
    `spare`. `layers` are in the model's order. MTP layers come last, and their numbers begin at `num_layers`.
    """

    original: str
    strategy: str
    ep_size: int
    num_experts: int
    model_type: str
    num_layers: int = 0
    spare: int = 0
    layers: tuple[PlacedLayer, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """An engine's format for a placement: how to write it, and how to give the file to the engine.

    `mtp`: whether the engine places the experts of MTP layers by the file, or leaves them where they are. If `suffix`
    is not empty, the engine refuses or misreads a file whose name ends in anything else. `even`:
    whether all ranks must have the same number of experts. `use_copies`: the words after `use` where some experts have
    copies; None if the engine would choose among copies by a rule of its own, under which our copies cost time.
    """

    engine: str
    write: Callable[[PlacedModel], str]
    mtp: bool
    suffix: str
    use: str
    even: bool = True
    use_copies: str | None = None


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
    """One row [E] for every layer but those of MTP. SGLang ignores the row of a layer without experts.

    SGLang refuses a file with any other key.
    """
    rows = [list(range(model.num_experts)) for _ in range(model.num_layers)]
    for layer in model.layers:
        rows[layer.number] = list(layer.physical_to_logical)
    return json.dumps({"physical_to_logical_map": rows}) + "\n"


def _vllm_ascend(model: PlacedModel) -> str:
    """Each rank's experts, for MoE layers only, numbered from 0 in the order in which the engine builds them.

    The engine builds MTP layers last. If the file lacked them, it would place the first linearly and refuse a second.
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
    """One list [num_slots] for each MoE layer, by its number. YAML, because JSON has no integer keys.

    TensorRT-LLM fails if a layer that it asks for is missing, so MTP layers are included; it numbers them as
    `PlacedLayer` does. `layer_updates_per_iter` 0 keeps the placement fixed.
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

    Adds what that function's caller knows: `num_gpus`, and the layer of each row.
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
        use_copies=f" {COPIES_OPTIONS}",
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
        use_copies=", num_replicas={slots}",
    ),
}
