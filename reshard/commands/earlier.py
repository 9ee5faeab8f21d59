"""What an earlier run left in the output directory: a finished output, or a placement that may not be made again.

So rerunning a finished command succeeds and writes nothing, and rerunning an interrupted one resumes it although more
traffic has been recorded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import IntegrityError, OutputError
from ..execute.destination import JOURNAL
from ..execute.journal import read_journal
from ..execute.run import Outcome
from ..placement.permutations import Placement
from ..placement.strategies import MoeShape, Placed, check_placement
from ..record.manifest import MANIFEST, FileSummary, Manifest, encode_manifest, read_manifest
from .verify import verify


def finished_output(out: Path) -> Manifest | None:
    """The manifest of the finished output in `out`; None if there is none, or a run there is not finished."""
    if (out / JOURNAL).exists() or not (out / MANIFEST).is_file():
        return None
    try:
        return read_manifest(out)
    except IntegrityError as error:
        raise OutputError(f"{error}; choose another --out, or remove {out}") from error


def refuse_other(out: Path, found: Manifest, expected: Manifest) -> None:
    """OutputError unless `found`, the manifest of `out`, is what the command would write."""
    if encode_manifest(found) != encode_manifest(expected):
        raise OutputError(
            f"{out}: holds an output that was made with other options, by another version, or from another source, or "
            "whose source has changed since; choose another --out, or add --restart to write it anew"
        )


def already_complete(out: Path, manifest: Manifest, workers: int | None) -> Outcome:
    """The outcome of a run that finds all its files in `out`; OutputError if a quick verification finds a fault."""
    started = time.monotonic()
    if problems := verify(out, quick=True, workers=workers).problems:
        raise OutputError(f"{out}: holds this output, but not sound: {problems[0]}; add --restart to write it anew")
    records = manifest.expected_files
    files = (*(record.summary for record in records), FileSummary(MANIFEST, (out / MANIFEST).stat().st_size))
    return Outcome(
        out=out,
        files=files,
        size=sum(file.size for file in files),
        shared=0,
        why_not_shared="",
        undigested=sum(list(record.tensors.values()).count(None) for record in records),
        seconds=time.monotonic() - started,
        resumed=len(files),
        already_complete=True,
    )


def names_of(manifest: Manifest) -> Sequence[str]:
    """The files of a finished output, those first without which it cannot be loaded."""
    names = [MANIFEST, *(record.name for record in manifest.files)]
    return sorted(names, key=lambda name: not name.endswith(".json") or "/" in name)


@dataclass(frozen=True, slots=True)
class EarlierPlacement:
    """The placement of an earlier run, and the fingerprint of that run's plan."""

    placed: Placed
    fingerprint: str


def earlier_placement(out: Path, strategy: str, shape: MoeShape) -> EarlierPlacement | None:
    """The placement that a run began to write to `out`, or `strategy` has written there; None if there is none."""
    placement: Placement | None = None
    fingerprint: str | None = None
    if (finished := finished_output(out)) is not None:
        if finished.strategy == strategy:
            placement, fingerprint = finished.placement, finished.fingerprint
    elif opening := read_journal(out).opening:
        placement, fingerprint = opening.placement, opening.fingerprint
    if placement is None or fingerprint is None:
        return None
    note = f"the placement is the one that an earlier run of this command made; --restart makes a new one ({out})"
    try:
        check_placement(placement, shape)
    except OutputError:  # of another model: the run will be refused for that
        return None
    return EarlierPlacement(Placed(placement, (note,)), fingerprint)
