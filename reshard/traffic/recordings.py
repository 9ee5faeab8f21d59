"""Recorded routing, whoever recorded it, in one form: `Recording`. Ids are logical experts when they come out.

    *.trace    reshard's plugin in vLLM (RESHARD_TRACE); see `trace`
    *.npy      vLLM's `--enable-return-routed-experts`: an answer's [T, all layers, K], by `numpy.save`
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

from ..errors import TraceError
from ..placement.layer_names import layer_key
from .trace_file import MAX_EXPERTS, MAX_LAYERS, SUFFIX, Stream, read_streams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Recording:
    """Tokens in the order in which they were routed, and where they come from.

    `by` says who recorded them. `layers` has names that `layer_names.layer_key` knows; if they are `all_layers` of the
    model, dense ones are among them. `read(first, count)` gives the ids of tokens, int64 [count, L, K]; a negative id
    is none.
    """

    where: str
    by: str
    layers: tuple[str, ...]
    all_layers: bool
    num_experts: int | None  # where it says
    top_k: int
    tokens: int
    read: Callable[[int, int], Tensor]


def read_recordings(path: Path) -> list[Recording]:
    """All that was recorded in the directory or file `path`; TraceError where that is nothing, or nothing known."""
    if not path.exists():
        raise TraceError(f"{path}: no such file or directory; expected what RESHARD_TRACE={path} records in vLLM")
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
            raise TraceError(f"{recording.where}: has {len(recording.layers)} layers, and no model has; move it away")
    if not any(recording.tokens for recording in found):
        kinds = f"files *{SUFFIX}, *.npy of vLLM or *.pt of SGLang"
        raise TraceError(f"{path}: no token is recorded there; expected {kinds} (reshard trace --help)")
    return found


def counted_once(parts: Iterable[tuple[Recording, int]]) -> int:
    """How many tokens so many of each recording are: stages of a pipeline record the same ones, in other layers."""
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
        # torch has no arithmetic on its uint16; ids are below 2^15 or made so again below
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
        raise TraceError(f"{path}: no array that numpy can load: {error}") from error
    if ids_TLK.ndim != 3 or ids_TLK.dtype.kind not in "iu" or 0 in ids_TLK.shape[1:]:
        raise TraceError(
            f"{path}: expected whole numbers [tokens, layers, experts of a token], found {ids_TLK.dtype} "
            f"{list(ids_TLK.shape)}"
        )

    def read(first: int, count: int) -> Tensor:
        import torch

        return _plausible(torch.from_numpy(ids_TLK[first : first + count].astype("int64")), path)

    tokens, layers, top_k = ids_TLK.shape
    return Recording(str(path), "vLLM, returned with an answer", _numbered(layers), True, None, top_k, tokens, read)


def _of_sglang(path: Path) -> Iterator[Recording]:
    import torch

    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise TraceError(f"{path}: no file of tensors that PyTorch can load: {str(error)[:200]}") from error
    if isinstance(dump, dict) and "logical_count" in dump:
        raise TraceError(
            f"{path}: SGLang counted how often each expert was chosen, and not by which token; record again with "
            "--expert-distribution-recorder-mode per_token"
        )
    records, map_LP = _parts(dump, path)
    by_shape: dict[tuple[int, int], list[Tensor]] = {}
    for ids_LTK in (ids_LTK for ids_LTK in records if ids_LTK.numel()):
        by_shape.setdefault((ids_LTK.shape[0], ids_LTK.shape[2]), []).append(ids_LTK)
    for (layers, columns), parts in by_shape.items():
        physical_TLK = torch.cat(parts, dim=1).transpose(0, 1).long()
        if layers != len(map_LP) or int(physical_TLK.max()) >= map_LP.shape[1]:
            raise TraceError(
                f"{path}: damaged: its experts are not those of its map {list(map_LP.shape)}; record again"
            )
        # SGLang keeps eight columns, whatever the model's top k
        top_k = next((k for k in range(columns) if bool((physical_TLK[:, :, k] < 0).all())), columns)
        asked = (physical_TLK >= 0).any(dim=2).any(dim=0)  # dense layers were not, nor MTP's
        ids_TLK = _plausible(_logical(physical_TLK[:, :, :top_k], map_LP.long())[:, asked], path)
        names = tuple(name for name, kept in zip(_numbered(layers), asked.tolist(), strict=True) if kept)
        read = partial(_rows_of, ids_TLK)
        yield Recording(str(path), "SGLang, per token", names, False, None, top_k, len(ids_TLK), read)


def _rows_of(ids_TLK: Tensor, first: int, count: int) -> Tensor:
    return ids_TLK[first : first + count]


def _parts(dump: Any, path: Path) -> tuple[list[Tensor], Tensor]:
    """What each forward pass chose, [L, T, K], and the logical expert of each physical one, [L, P]."""
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
            f"{path}: no dump of SGLang's expert distribution recorder in mode per_token: expected records with "
            "topk_ids_of_layer, and last_physical_to_logical_map"
        )
    return [ids for ids in found if ids is not None], map_LP


def _logical(physical_TLK: Tensor, map_LP: Tensor) -> Tensor:
    """The logical expert of each physical one, layer by layer; negative ids stay."""
    physical_LN = physical_TLK.transpose(0, 1).flatten(1)
    logical_LN = map_LP.gather(1, physical_LN.clamp(min=0)).where(physical_LN >= 0, physical_LN)
    return logical_LN.view(len(map_LP), *physical_TLK.shape[::2]).transpose(0, 1)


def _plausible(ids_TLK: Tensor, path: Path) -> Tensor:
    """The same; TraceError where one can be no expert's."""
    if ids_TLK.numel() and int(ids_TLK.max()) >= MAX_EXPERTS:
        raise TraceError(f"{path}: has expert {int(ids_TLK.max())}, and no model has so many; give recorded routing")
    return ids_TLK


def _numbered(layers: int) -> tuple[str, ...]:
    return tuple(f"layers.{number}" for number in range(layers))
