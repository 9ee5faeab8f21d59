"""Reads recorded routing into one form, `Recording`, whoever recorded it. Its ids are logical experts.

    *.trace    reshard's plugin in vLLM (RESHARD_TRACE); see `trace_file`
    *.npy      vLLM's `--enable-return-routed-experts`: one answer's [T, all layers, K], saved by `numpy.save`
    *.pt       SGLang's expert distribution recorder in mode `per_token`

vLLM: vllm/outputs.py (`CompletionOutput.routed_experts`), read in 0.32 and 0.33. SGLang:
sglang/srt/eplb/expert_distribution.py (`_DetailAccumulator.dump`), read in 0.5.23.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import refuse_url
from ..errors import TraceError
from ..placement.layer_names import layer_key
from .trace_file import MAX_EXPERTS, MAX_LAYERS, SUFFIX, Stream, read_streams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Recording:
    """The choices of tokens, in the order in which the engine routed them.

    `where` is the file, and `by` is who recorded it. `layer_names.layer_key` understands the names in `layers`. If
    `all_layers` is set, these are all layers of the model, dense ones included. `read(first, count)` returns the ids of
    tokens, int64 [count, L, K]; a negative id means no expert.
    """

    where: str
    by: str
    layers: tuple[str, ...]
    all_layers: bool
    num_experts: int | None  # None if the recording does not say
    top_k: int
    tokens: int
    read: Callable[[int, int], Tensor]


def read_recordings(path: Path) -> list[Recording]:
    """All recordings in the directory or file `path`. Raises TraceError if there is none that reshard can read."""
    refuse_url(path, TraceError)
    if not path.exists():
        raise TraceError(f"{path}: no such file or directory; vLLM records a trace there with RESHARD_TRACE={path}")
    found: list[Recording] = []
    if path.is_dir():
        found += map(_of_stream, read_streams(path))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        match file.suffix:
            case ".npy":
                found.append(_of_array(file))
            case ".pt":
                found += _of_sglang(file)
    for recording in found:
        if len(recording.layers) > MAX_LAYERS:
            raise TraceError(
                f"{recording.where}: has {len(recording.layers)} layers, expected at most {MAX_LAYERS}; move it away"
            )
    if not any(recording.tokens for recording in found):
        kinds = f"*{SUFFIX} files, *.npy of vLLM or *.pt of SGLang"
        raise TraceError(f"{path}: has no recorded tokens; expected {kinds} (see reshard trace --help)")
    return found


def count_distinct_tokens(parts: Iterable[tuple[Recording, int]]) -> int:
    """How many distinct tokens there are, given how many each recording has.

    The stages of a pipeline record the same tokens, each in its own layers.
    """
    by_layer = Counter[object]()
    for recording, tokens in parts:
        by_layer.update({layer_key(layer) if layer_key(layer).numbers else layer: tokens for layer in recording.layers})
    return max(by_layer.values(), default=0)


def _of_stream(stream: Stream) -> Recording:
    header, where = stream.header, str(stream.segments[0].path)
    placement = header.placement(where)

    def read(first: int, count: int) -> Tensor:
        import torch

        shape = (-1, len(header.layers), header.top_k)
        rows = stream.read(first, count)
        # torch cannot compute with uint16: read ids as int16, and undo the sign with the mask below
        ids_TLK = torch.frombuffer(rows, dtype=torch.uint8 if header.id_size == 1 else torch.int16).view(shape).long()
        ids_TLK &= (1 << 8 * header.id_size) - 1
        if len(ids_TLK) and int(ids_TLK.max()) >= header.num_experts:
            raise TraceError(f"{where}: damaged: has expert {int(ids_TLK.max())} of {header.num_experts}; record again")
        if placement is None:
            return ids_TLK
        return _logical(ids_TLK, torch.tensor([placement[layer] for layer in header.layers]))

    by = f"{header.engine}, DP rank {header.dp_rank}, PP stage {header.pp_rank}, serving {header.model}"
    return Recording(where, by, header.layers, False, header.num_experts, header.top_k, stream.tokens, read)


def _of_array(path: Path) -> Recording:
    import numpy

    try:
        ids_TLK = numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TraceError(f"{path}: numpy cannot load this array: {error}") from error
    if ids_TLK.ndim != 3 or ids_TLK.dtype.kind not in "iu" or 0 in ids_TLK.shape[1:]:
        raise TraceError(
            f"{path}: expected integers [tokens, layers, experts per token], found {ids_TLK.dtype} "
            f"{list(ids_TLK.shape)}"
        )

    def read(first: int, count: int) -> Tensor:
        import torch

        return _plausible(torch.from_numpy(ids_TLK[first : first + count].astype("int64")), path)

    tokens, layers, top_k = ids_TLK.shape
    return Recording(str(path), "vLLM, returned with an answer", _layer_names(layers), True, None, top_k, tokens, read)


def _of_sglang(path: Path) -> Iterator[Recording]:
    import torch

    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TraceError(f"{path}: PyTorch cannot load this file: {str(error)[:200]}") from error
    if isinstance(dump, dict) and "logical_count" in dump:
        raise TraceError(
            f"{path}: SGLang recorded how often each expert was chosen, not by which token; record again with "
            "--expert-distribution-recorder-mode per_token"
        )
    records, map_LP = _parse_dump(dump, path)
    by_shape: dict[tuple[int, int], list[Tensor]] = {}
    for ids_LTK in (ids_LTK for ids_LTK in records if ids_LTK.numel()):
        by_shape.setdefault((ids_LTK.shape[0], ids_LTK.shape[2]), []).append(ids_LTK)
    for (layers, columns), parts in by_shape.items():
        physical_TLK = torch.cat(parts, dim=1).transpose(0, 1).long()
        if layers != len(map_LP) or int(physical_TLK.max()) >= map_LP.shape[1]:
            raise TraceError(f"{path}: damaged: its expert ids do not fit its map {list(map_LP.shape)}; record again")
        # SGLang always stores eight columns, whatever the model's top k
        top_k = next((k for k in range(columns) if bool((physical_TLK[:, :, k] < 0).all())), columns)
        recorded_L = (physical_TLK >= 0).any(dim=2).any(dim=0)  # false for dense and MTP layers
        ids_TLK = _plausible(_logical(physical_TLK[:, :, :top_k], map_LP.long())[:, recorded_L], path)
        names = tuple(name for name, kept in zip(_layer_names(layers), recorded_L.tolist(), strict=True) if kept)
        read = partial(_rows_of, ids_TLK)
        yield Recording(str(path), "SGLang, per token", names, False, None, top_k, len(ids_TLK), read)


def _rows_of(ids_TLK: Tensor, first: int, count: int) -> Tensor:
    return ids_TLK[first : first + count]


def _parse_dump(dump: Any, path: Path) -> tuple[list[Tensor], Tensor]:
    """The ids that each forward pass chose, [L, T, K], and physical_to_logical, [L, P]."""
    import torch

    records = dump.get("records") if isinstance(dump, dict) else None
    map_LP = dump.get("last_physical_to_logical_map") if isinstance(dump, dict) else None
    found = [
        record.get("topk_ids_of_layer") if isinstance(record, dict) else None
        for record in (records if isinstance(records, list) else [None])
    ]
    whole = [*found, map_LP]
    if not all(isinstance(tensor, torch.Tensor) and not tensor.is_floating_point() for tensor in whole) or not (
        map_LP is not None and map_LP.dim() == 2 and all(ids.dim() == 3 for ids in found if ids is not None)
    ):
        raise TraceError(
            f"{path}: not a dump of SGLang's expert distribution recorder in mode per_token: expected records with "
            "topk_ids_of_layer, and last_physical_to_logical_map"
        )
    return [ids for ids in found if ids is not None], map_LP


def _logical(physical_TLK: Tensor, map_LP: Tensor) -> Tensor:
    """Map physical ids to logical ids, layer by layer; negative ids stay."""
    physical_LN = physical_TLK.transpose(0, 1).flatten(1)
    logical_LN = map_LP.gather(1, physical_LN.clamp(min=0)).where(physical_LN >= 0, physical_LN)
    return logical_LN.view(len(map_LP), *physical_TLK.shape[::2]).transpose(0, 1)


def _plausible(ids_TLK: Tensor, path: Path) -> Tensor:
    """Return `ids_TLK`; TraceError if an id is too large for an expert."""
    if ids_TLK.numel() and int(ids_TLK.max()) >= MAX_EXPERTS:
        raise TraceError(f"{path}: has expert {int(ids_TLK.max())}, and no model has so many; give recorded routing")
    return ids_TLK


def _layer_names(layers: int) -> tuple[str, ...]:
    return tuple(f"layers.{number}" for number in range(layers))
