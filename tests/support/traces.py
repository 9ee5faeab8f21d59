"""Traces for tests: what each token chose in each layer, written as the plugin writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from reshard.traffic.trace_file import Header, TraceWriter


def write_trace(directory: Path, ids: Mapping[str, Sequence[Sequence[int]]], experts: int) -> Path:
    """A trace with, for each layer, the ids that each token chose there; ids below 256."""
    top_k = len(next(iter(ids.values()))[0])
    header = Header(reshard_trace=1, engine="e", model="m", layers=tuple(ids), num_experts=experts, top_k=top_k)
    rows = b"".join(bytes(expert for chosen in token for expert in chosen) for token in zip(*ids.values(), strict=True))
    with closing(TraceWriter(directory, header)) as writer:
        writer.write(memoryview(rows))
    return directory
