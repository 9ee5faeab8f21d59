"""`reshard trace info`: describes the recordings in a trace."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..traffic.choices import MAX_TOKENS, stretches
from ..traffic.recordings import Recording, count_distinct_tokens, read_recordings
from ..traffic.trace_file import MAX_EXPERTS


@dataclass(frozen=True, slots=True)
class RecordingInfo:
    """One recording. `busiest` has, for each MoE layer, the busiest expert's number of tokens over the mean expert's.

    The mean is over all experts. If the recording does not say how many there are, it is over the experts up to the
    highest id chosen.
    """

    where: str
    by: str
    tokens: int
    num_experts: int | None
    top_k: int
    busiest: dict[str, float]


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """A trace's recordings: streams of reshard's plugin, or files of other recorders. `tokens` counts each once."""

    path: Path
    tokens: int
    streams: tuple[RecordingInfo, ...]


def trace_info(path: str | Path) -> TraceInfo:
    """Describe the recordings in the directory or file `path`. Raises TraceError if there are none.

    For a long recording, `busiest` is measured on an evenly spread sample of its tokens.
    """
    recordings = read_recordings(Path(path))
    infos = tuple(_info(recording) for recording in recordings)
    tokens = count_distinct_tokens((recording, recording.tokens) for recording in recordings)
    return TraceInfo(Path(path), tokens, infos)


def _info(recording: Recording) -> RecordingInfo:
    import torch

    counts_LE = torch.zeros(len(recording.layers), MAX_EXPERTS, dtype=torch.long)
    for stretch in stretches(recording.tokens, MAX_TOKENS):
        for layer, ids in enumerate(recording.read(stretch.start, len(stretch)).unbind(1)):
            counts_LE[layer] += torch.bincount(ids[ids >= 0], minlength=MAX_EXPERTS)
    experts = recording.num_experts or int(counts_LE.any(dim=0).nonzero().max()) + 1
    busiest = {
        name: float(count_E.max() / count_E.double().mean())
        for name, count_E in zip(recording.layers, counts_LE[:, :experts], strict=True)
        if count_E.any()
    }
    return RecordingInfo(
        recording.where, recording.by, recording.tokens, recording.num_experts, recording.top_k, busiest
    )
