"""Which files of an output a rank reads: the shared ones, and those that hold its experts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from ..placement.permutations import rank_slots

RANK_FILE = re.compile(r"model-ep(\d{2,})-of-(\d{2,})-(\d{5})-of-(\d{5})\.safetensors")
NUMBERED_FILE = re.compile(r"(model-(?:ep\d{2,}-of-\d{2,}|shared))-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Parallel:
    """How this process's EP group divides the experts, as far as that decides which files to read."""

    ep_rank: int
    ep_size: int  # 1 if expert parallelism is off
    consecutive: bool  # whether a rank needs only its consecutive physical experts (vLLM's linear rule)


def choose_files(named: list[str], present: list[str], num_experts: int, parallel: Parallel) -> list[str]:
    """Choose the files that a rank needs, among those `named` by the index: shared files, and files with its experts.

    Raises OutputError if a needed file is not `present`, or if the index lacks one of a numbered row of files.
    """
    _check_numbers(named)
    ranks = {file: _rank_of(file) for file in named}
    sizes = {int(match[2]) for file in named if (match := RANK_FILE.fullmatch(Path(file).name))}
    needed = needed_ranks(max(sizes), num_experts, parallel)
    chosen = [file for file, rank in ranks.items() if rank is None or rank in needed]
    absent = sorted(set(chosen) - set(present)) or [f"model-ep{rank:02}-…" for rank in needed - set(ranks.values())]
    if absent:
        raise OutputError(
            f"{absent[0]}: absent, but EP rank {parallel.ep_rank} of {parallel.ep_size} needs it (EP ranks "
            f"{', '.join(map(str, sorted(needed)))} of the output); copy them here with `reshard stage`"
        )
    return chosen


def _check_numbers(named: Sequence[str]) -> None:
    """OutputError if a file is missing by its number: vLLM would not miss the experts in it."""
    matches = [match for file in named if (match := NUMBERED_FILE.fullmatch(Path(file).name))]
    numbers = {(match[1], int(match[2])) for match in matches}
    for row, count in {(match[1], int(match[3])) for match in matches}:
        if missing := [number for number in range(1, count + 1) if (row, number) not in numbers]:
            raise OutputError(
                f"{Path(named[0]).parent}: the index names no {row}-{missing[0]:05}-of-{count:05}.safetensors, so the "
                "experts in it would stay uninitialised; run `reshard verify` and write the output anew"
            )


def _rank_of(file: str) -> int | None:
    match = RANK_FILE.fullmatch(Path(file).name)
    return int(match[1]) if match else None


def needed_ranks(ranks: int, num_experts: int, parallel: Parallel) -> set[int]:
    """The ranks whose files hold experts of this process; the files were made for `ranks` EP ranks."""
    if parallel.ep_size == 1 or not parallel.consecutive:
        return set(range(ranks))
    owned = rank_slots(num_experts, parallel.ep_size)[parallel.ep_rank]
    made_for = rank_slots(num_experts, ranks)
    return {rank for rank, slots in enumerate(made_for) if slots.start < owned.stop and owned.start < slots.stop}


def placement_warnings(ranks: int, parallel: Parallel, redundant: int = 0) -> list[str]:
    """Warnings for a user whose options make the placement of an output for `ranks` EP ranks useless."""
    if parallel.ep_size == 1:
        return [
            f"resharded for {ranks} EP ranks, but expert parallelism is off: answers are right, but the placement has "
            "no effect"
        ]
    if parallel.ep_size != ranks:
        return [
            f"resharded for {ranks} EP ranks, served on {parallel.ep_size}: answers are right, but the ranks do not "
            f"own the experts as planned; reshard the original again with --ep {parallel.ep_size}"
        ]
    if redundant:
        return [
            f"{redundant} redundant experts: answers are right, but each rank has more slots, so experts lie on "
            "other ranks than planned; serve the original with RESHARD_PLACEMENT, which counts redundant experts"
        ]
    return []
