"""The placement without the resharding: the file from which another engine places the *original*'s experts.

The engines of `FORMATS` can be told where each expert goes. They load the original, route by its ids and look up where
an expert is, so such a file changes no answer, and group-limited models need no plugin. It is made for a checkpoint, as
zigzag would place its experts, or taken from the manifest of an output: then too it is for the original, in the
original's ids. With the output itself it would place experts that are placed already.

Each engine has its own mind on which layers the file has and what they are called there; the functions that write the
formats say so, and `tests/commands/test_export.py` reads what they write as the engines do.
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


@dataclass(frozen=True, slots=True)
class Export:
    """What `export` made: `content` is the file, which places the experts of `moe_layers`.

    `use` says how it is given to the engine, where {file} is its name.
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
    """Put a placement into an engine's form. Reads no weights, writes nothing.

    Parameters:
        src: a checkpoint directory or a repository in the Hugging Face cache, to be placed by `strategy`; or an output
            of reshard, whose placement its manifest has
        to: the engine, one of `FORMATS`
        ep_size: R, 2 to E, a divisor of E; for an output it may be left out
        strategy: where experts shall live on so many EP ranks; for an output none but zigzag may be asked for

    Raises:
        CheckpointError, UnsupportedError: as `plan_placement` does
        IntegrityError: an output's manifest is damaged
        OutputError: `to`, `ep_size` or `strategy` does not fit

    """
    if to not in FORMATS:
        raise OutputError(f"{src}: no format is called {to!r:.80}; known are {', '.join(FORMATS)}")
    root = find_source(src)
    if is_output(root):
        if strategy is not Zigzag:
            raise OutputError(f"{root}: an output has its placement: leave out --strategy, or export from the original")
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
    """Write the file; OutputError where `out` is there already, or has a name that the engine would not read."""
    suffix = FORMATS[exported.format].suffix
    if not out.name.endswith(suffix):
        raise OutputError(f"{out}: {exported.engine} reads only a file whose name ends in {suffix}; name it so")
    write_new_file(out, exported.content)


def _of_checkpoint(src: str | Path, ep_size: int | None, make: Callable[[int], Strategy]) -> PlacedModel:
    original = read_original(src)
    root = original.root
    if ep_size is None:
        raise OutputError(f"{root}: a checkpoint, not an output of reshard: say for how many EP ranks with --ep")
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
    """`model` with its layers, numbered and in order. Refuses what no engine could place."""
    if model.num_experts % model.ep_size:
        raise OutputError(
            f"{root}: {model.num_experts} experts cannot be dealt evenly to {model.ep_size} EP ranks, as every format "
            "here requires; choose an EP size that divides them, or `reshard zigzag` and vLLM, where ranks may differ "
            "by one"
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
    """How many layers the model has, those of MTP not counted."""
    texts = [config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict)]
    values = [section["num_hidden_layers"] for section in (*texts, config) if "num_hidden_layers" in section]
    value = values[0] if values else None
    if type(value) is not int or not 1 <= value <= MAX_LAYERS:
        raise CheckpointError(
            f"{root / CONFIG}: num_hidden_layers must be a whole number from 1 to {MAX_LAYERS}, found {value!r:.80}"
        )
    return value


def _number(name: str, num_layers: int, root: Path) -> int:
    """`model.layers.3.mlp` is layer 3, and `mtp.0.ffn` the first after the last."""
    match = _LAYER_NUMBER.search(name)
    if match is None:
        raise UnsupportedError(f"{root}: {name}: expected a MoE layer to have a number, as in model.layers.3.mlp")
    return int(match[2]) + (num_layers if match[1] != "layers" else 0)


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
