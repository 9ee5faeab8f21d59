"""Writes a placement, without resharding, as the file from which another engine places the *original*'s experts.

The engines of `FORMATS` can be told where each expert goes. They load the original, route by its ids and look up where
an expert is. So the file changes no answer, and group-limited models need no plugin. A strategy makes the placement for
a checkpoint, or it comes from an output's manifest. Either way, the file has the original's ids and is for serving the
original; with the output, the engine would place experts a second time.

`engine_files` has the forms.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint.directory import CONFIG, read_json
from ..checkpoint.files import Files
from ..checkpoint.location import Location
from ..checkpoint.source import ANY, Hub, find_source
from ..errors import CheckpointError, OutputError, UnsupportedError
from ..execute.new_file import write_new_file
from ..model.memory import CopiesMemory
from ..model.routing import config_sections
from ..placement.layer_names import layer_key
from ..placement.permutations import Placement
from ..placement.strategies import Copies, Strategy, Zigzag
from ..record.manifest import manifest_in
from .engine_files import FORMATS, Format, FormatName, PlacedLayer, PlacedModel
from .original import Original, check_ep_size, is_output, memory_of, original_of, place_experts

MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class Export:
    """What `export` made. `content` is the text of the file, which places the experts of `moe_layers`.

    `use` says how to give the file to the engine; {file} stands for its name. `copies` is the memory that copies take,
    None if there are none, and `notes` say what the user should know of them.
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
    copies: CopiesMemory | None = None
    notes: tuple[str, ...] = ()


def export(
    src: str | Path,
    to: FormatName,
    ep_size: int | None = None,
    strategy: Callable[[int], Strategy] = Zigzag,
    hub: Hub = ANY,
) -> Export:
    """Put a placement into an engine's format. Reads no weights, writes nothing.

    Parameters:
        src: a checkpoint, as in `plan_placement`, which `strategy` places; or an output of reshard, whose manifest has
            the placement
        to: the engine, one of `FORMATS`
        ep_size: R, 2 to E, a divisor of E; may be left out for an output
        strategy: makes the strategy for a number of EP ranks; leave the default for an output
        hub: how to ask the Hugging Face Hub

    Raises:
        CheckpointError, UnsupportedError: as `plan_placement` does
        IntegrityError: an output's manifest is damaged
        OutputError: `to`, `ep_size` or `strategy` does not fit
        TraceError: the trace of `strategy` cannot be read, or is another model's

    """
    if to not in FORMATS:
        raise OutputError(f"{src}: unknown format {to!r:.80}; known are {', '.join(FORMATS)}")
    form, source = FORMATS[to], find_source(src, hub)
    root = source.root
    copies: CopiesMemory | None = None
    notes: tuple[str, ...] = ()
    if is_output(source):
        if strategy is not Zigzag:
            raise OutputError(f"{root}: this output has a placement: leave out --strategy, or export the original")
        model = _of_output(source, ep_size)
    else:
        original = original_of(source)
        made = _made(original, ep_size, strategy)
        if isinstance(made, Copies) and form.use_copies is None:
            raise OutputError(
                f"{root}: {form.engine} chooses among the copies of an expert by its own rule, and these are placed "
                "for another one: leave out --spare, or use --to vllm"
            )
        placed = place_experts(original, made)
        model = _of_checkpoint(original, made, placed.placement)
        if isinstance(made, Copies):
            copies, notes = memory_of(original, made), placed.notes
    if form.even and model.num_experts % model.ep_size:
        raise OutputError(
            f"{root}: {model.num_experts} experts cannot be dealt evenly to {model.ep_size} EP ranks, as {form.engine} "
            "requires; choose an EP size that divides them, or vLLM (--to vllm), where ranks may differ by one"
        )
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
        use=_use(form, model),
        content=form.write(model),
        copies=copies,
        notes=notes,
    )


def _use(form: Format, model: PlacedModel) -> str:
    redundant = model.ep_size * model.spare
    words = {
        "{ep}": str(model.ep_size),
        "{redundant}": str(redundant),
        "{slots}": str(model.num_experts + redundant),
        "{original}": shlex.quote(model.original),
    }
    text = form.use + (form.use_copies or "") * (model.spare > 0)
    for name, value in words.items():
        text = text.replace(name, value)
    return text


def write_export(exported: Export, out: str | Path) -> None:
    """Write the file. OutputError if `out` exists, or has a name that the engine would not read."""
    out, suffix = Path(out), FORMATS[exported.format].suffix
    if not out.name.endswith(suffix):
        raise OutputError(f"{out}: {exported.engine} only reads a file whose name ends in {suffix}; rename it")
    write_new_file(out, exported.content)


def _made(original: Original, ep_size: int | None, make: Callable[[int], Strategy]) -> Strategy:
    if ep_size is None:
        raise OutputError(
            f"{original.root}: a checkpoint, not an output of reshard; give the number of EP ranks with --ep"
        )
    check_ep_size(ep_size, original)
    return make(ep_size)


def _of_checkpoint(original: Original, strategy: Strategy, placement: Placement) -> PlacedModel:
    root = original.root
    repo_id = original.checkpoint.source.identity.repo_id
    name = str(root) if repo_id is None or isinstance(root, Path) else repo_id
    header = PlacedModel(
        name,
        strategy.name,
        strategy.ep_size,
        original.num_experts,
        original.model.model_type,
        spare=strategy.spare if isinstance(strategy, Copies) else 0,
    )
    return _number_layers(header, root, placement, original.checkpoint.config)


def _of_output(source: Files, ep_size: int | None) -> PlacedModel:
    root, manifest = source.root, manifest_in(source)
    original = manifest.source.repo_id or manifest.source.path
    if ep_size not in (None, manifest.ep_size):
        raise OutputError(
            f"{root}: an output for {manifest.ep_size} EP ranks, not {ep_size}; leave --ep out, or export from the "
            f"original, {original}"
        )
    header = PlacedModel(
        original, manifest.strategy, manifest.ep_size, manifest.routing.num_experts, manifest.model_type
    )
    # an output's config.json has the original's number of layers
    return _number_layers(header, root, manifest.placement, read_json(source, CONFIG))


def _number_layers(model: PlacedModel, root: Location, by_layer: Placement, config: Mapping[str, Any]) -> PlacedModel:
    """`model` with its layers, numbered and in order. Refuses what no engine could place."""
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


def _num_layers(config: Mapping[str, Any], root: Location) -> int:
    """The number of layers of the model, without MTP layers."""
    values = [section["num_hidden_layers"] for _, section in config_sections(config) if "num_hidden_layers" in section]
    value = values[-1] if values else None
    if type(value) is not int or not 1 <= value <= MAX_LAYERS:
        raise CheckpointError(
            f"{root / CONFIG}: num_hidden_layers must be a whole number from 1 to {MAX_LAYERS}, found {value!r:.80}"
        )
    return value


def _number(name: str, num_layers: int, root: Location) -> int:
    """`model.layers.3.mlp` is layer 3, and `mtp.0.ffn` the first after the last."""
    key = layer_key(name, num_layers)
    if not key.numbers:
        raise UnsupportedError(f"{root}: {name}: expected a MoE layer to have a number, as in model.layers.3.mlp")
    return key.numbers[0] + (num_layers if key.kind == "draft" else 0)
