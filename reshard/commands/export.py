"""Writes a placement, without resharding, as the file from which another engine places the *original*'s experts.

The engines of `FORMATS` can be told where each expert goes. They load the original, route by its ids and look up where
an expert is. So the file changes no answer, and group-limited models need no plugin. A strategy makes the placement for
a checkpoint, or it comes from an output's manifest. Either way, the file has the original's ids and is for serving the
original; with the output, the engine would place experts a second time.

Engines differ in which layers the file must have and how it names them. The functions that write the formats say how,
and `tests/commands/test_export.py` reads their files as the engines do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from ..checkpoint.directory import CONFIG, read_json_object
from ..checkpoint.source import find_source
from ..errors import CheckpointError, OutputError, UnsupportedError
from ..execute.new_file import write_new_file
from ..model.families import TEXT_CONFIG_KEYS
from ..placement.permutations import Placement, rank_slots
from ..placement.strategies import Strategy, Zigzag
from ..record.manifest import read_manifest
from .original import check_ep_size, is_output, place_experts, read_original

FormatName = Literal["sglang", "vllm-ascend", "trtllm", "eplb"]
FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)

MAX_LAYERS = 10_000
_LAYER_NUMBER = re.compile(r"(?:^|\.)(mtp\.layers|mtp|layers)\.([0-9]{1,9})\.")


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """A MoE layer: its module's name, and its number among all layers. MTP layers are numbered after the model's last.

    `physical_to_logical` [E]: the expert in each slot.
    """

    name: str
    number: int
    physical_to_logical: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlacedModel:
    """Where the experts of the checkpoint `original` go, by its own ids.

    `ep_size` (R) divides `num_experts` (E); rank `r` owns the E / R slots from `r * E / R` on. `layers` are in the
    model's order. MTP layers come last, and their numbers begin at `num_layers`.
    """

    original: str
    strategy: str
    ep_size: int
    num_experts: int
    num_layers: int = 0
    layers: tuple[PlacedLayer, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """An engine's format for a placement: how to write it, and how to give the file to the engine.

    `mtp`: whether the engine places the experts of MTP layers by the file, or leaves them where they are. If `suffix`
    is not empty, the engine refuses or misreads a file whose name ends in anything else.
    """

    engine: str
    write: Callable[[PlacedModel], str]
    mtp: bool
    suffix: str
    use: str


@dataclass(frozen=True, slots=True)
class Export:
    """What `export` made. `content` is the text of the file, which places the experts of `moe_layers`.

    `use` says how to give the file to the engine; {file} stands for its name.
    """

    format: FormatName
    engine: str
    original: str
    strategy: str
    ep_size: int
    num_experts: int
    moe_layers: tuple[str, ...]
    use: str
    content: str


def export(
    src: str | Path,
    to: FormatName,
    ep_size: int | None = None,
    strategy: Callable[[int], Strategy] = Zigzag,
) -> Export:
    """Put a placement into an engine's format. Reads no weights, writes nothing.

    Parameters:
        src: a checkpoint directory or a repository in the Hugging Face cache, which `strategy` places; or an output of
            reshard, whose manifest has the placement
        to: the engine, one of `FORMATS`
        ep_size: R, 2 to E, a divisor of E; may be left out for an output
        strategy: makes the strategy for a number of EP ranks; leave the default for an output

    Raises:
        CheckpointError, UnsupportedError: as `plan_placement` does
        IntegrityError: an output's manifest is damaged
        OutputError: `to`, `ep_size` or `strategy` does not fit

    """
    if to not in FORMATS:
        raise OutputError(f"{src}: unknown format {to!r:.80}; known are {', '.join(FORMATS)}")
    root = find_source(src)
    if is_output(root):
        if strategy is not Zigzag:
            raise OutputError(f"{root}: this output has a placement: leave out --strategy, or export the original")
        model = _of_output(root, ep_size)
    else:
        model = _of_checkpoint(src, ep_size, strategy)
    form = FORMATS[to]
    if not form.mtp:
        model = replace(model, layers=tuple(layer for layer in model.layers if layer.number < model.num_layers))
    return Export(
        format=to,
        engine=form.engine,
        original=model.original,
        strategy=model.strategy,
        ep_size=model.ep_size,
        num_experts=model.num_experts,
        moe_layers=tuple(layer.name for layer in model.layers),
        use=form.use.replace("{ep}", str(model.ep_size)),
        content=form.write(model),
    )


def write_export(exported: Export, out: Path) -> None:
    """Write the file. OutputError if `out` exists, or has a name that the engine would not read."""
    suffix = FORMATS[exported.format].suffix
    if not out.name.endswith(suffix):
        raise OutputError(f"{out}: {exported.engine} only reads a file whose name ends in {suffix}; rename it")
    write_new_file(out, exported.content)


def _of_checkpoint(src: str | Path, ep_size: int | None, make: Callable[[int], Strategy]) -> PlacedModel:
    original = read_original(src)
    root = original.root
    if ep_size is None:
        raise OutputError(f"{root}: a checkpoint, not an output of reshard; give the number of EP ranks with --ep")
    check_ep_size(ep_size, original)
    strategy = make(ep_size)
    header = PlacedModel(str(root), strategy.name, ep_size, original.num_experts)
    return _number_layers(header, root, place_experts(original, strategy).placement, original.checkpoint.config)


def _of_output(root: Path, ep_size: int | None) -> PlacedModel:
    manifest = read_manifest(root)
    original = manifest.source.repo_id or manifest.source.path
    if ep_size not in (None, manifest.ep_size):
        raise OutputError(
            f"{root}: an output for {manifest.ep_size} EP ranks, not {ep_size}; leave --ep out, or export from the "
            f"original, {original}"
        )
    header = PlacedModel(original, manifest.strategy, manifest.ep_size, manifest.routing.num_experts)
    # an output's config.json has the original's number of layers
    return _number_layers(header, root, manifest.placement, read_json_object(root / CONFIG))


def _number_layers(model: PlacedModel, root: Path, by_layer: Placement, config: Mapping[str, Any]) -> PlacedModel:
    """`model` with its layers, numbered and in order. Refuses a placement that no engine could use."""
    if model.num_experts % model.ep_size:
        raise OutputError(
            f"{root}: {model.num_experts} experts cannot be dealt evenly to {model.ep_size} EP ranks, as every format "
            "here requires; choose an --ep that divides them, or use `reshard zigzag` with vLLM, where ranks "
            "may differ by one expert"
        )
    num_layers = _num_layers(config, root)
    layers = sorted(
        (
            PlacedLayer(name, _number(name, num_layers, root), tuple(physical_to_logical))
            for name, physical_to_logical in by_layer.items()
        ),
        key=lambda layer: layer.number,
    )
    for before, layer in pairwise(layers):
        if before.number == layer.number:
            raise UnsupportedError(f"{root}: {before.name} and {layer.name} are both layer {layer.number}")
    if layers[0].number >= num_layers:
        raise CheckpointError(
            f"{root / CONFIG}: num_hidden_layers is {num_layers}, but the first MoE layer is {layers[0].name}"
        )
    return replace(model, num_layers=num_layers, layers=tuple(layers))


def _num_layers(config: Mapping[str, Any], root: Path) -> int:
    """The number of layers of the model, without MTP layers."""
    texts = [config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict)]
    values = [section["num_hidden_layers"] for section in (*texts, config) if "num_hidden_layers" in section]
    value = values[0] if values else None
    if type(value) is not int or not 1 <= value <= MAX_LAYERS:
        raise CheckpointError(
            f"{root / CONFIG}: num_hidden_layers must be a whole number from 1 to {MAX_LAYERS}, found {value!r:.80}"
        )
    return value


def _number(name: str, num_layers: int, root: Path) -> int:
    """`model.layers.3.mlp` is layer 3; `mtp.0.ffn` is the first after the model's last."""
    match = _LAYER_NUMBER.search(name)
    if match is None:
        raise UnsupportedError(f"{root}: {name}: expected a MoE layer to have a number, as in model.layers.3.mlp")
    return int(match[2]) + (num_layers if match[1] != "layers" else 0)


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
