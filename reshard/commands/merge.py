"""Puts together what several runs with `--ranks` write to one directory, at the same time if they like.

    each run, in OUT/.reshard-ranks-0-7:      writes and checks its part, as if that were an output of its own
    one run at a time, under a lock in OUT:   moves the files that OUT lacks there
                                              writes the manifest: the ranks and digests of OUT and of the part
                                              removes the part

OUT holds what some ranks need from the first part on, and is the whole output after the last one: the bytes are those
of a run without `--ranks`. An interruption leaves parts, and the same command goes on from there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from ..arguments import check_whole
from ..checkpoint.directory import CONFIG, INDEX
from ..errors import IntegrityError, OutputError
from ..execute import syscalls
from ..execute.destination import JOURNAL, make_directory, sync_directory
from ..execute.fill import Progress
from ..execute.new_file import write_new_file
from ..execute.run import Outcome
from ..placement.permutations import describe_ranks
from ..record.manifest import MANIFEST, UNFINISHED, FileRecord, FileSummary, Manifest, encode_manifest, read_manifest
from .earlier import already_complete, finished_output, refuse_other
from .resharding import Resharding, manifest_of
from .writing import write_resharding

MERGE_LOCK = ".reshard-merge"
WAIT = 0.1  # seconds between two attempts to get the lock


def part_of(out: Path, ranks: Sequence[int] | None) -> Path:
    """Where the run for `ranks` writes its part of the output `out`; OutputError if it is not for some ranks."""
    if not ranks:
        raise OutputError(f"{out}: --merge puts the parts of several runs together: give each its --ranks")
    for rank in ranks:
        check_whole(rank, "each of --ranks", 0)
    return out / f".reshard-ranks-{describe_ranks(ranks)}"


def write_merged(
    resharding: Resharding,
    out: Path,
    *,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Carry out `resharding`, which is for some ranks and was planned for `part_of` them, and put the part into `out`.

    Raises OutputError as `write_resharding` does, and if `out` holds anything else than parts of this output, and
    IntegrityError if a file of the part has gone. `restart` discards what an unfinished run for these ranks left.
    """
    if resharding.ranks is None:
        raise OutputError(f"{out}: --merge puts parts together: {resharding.notes[-1]}; leave out --merge and --ranks")
    part = part_of(out, resharding.ranks)
    _refuse_strangers(resharding, out)
    whole = finished_output(out)
    if whole is not None:
        _refuse_other(out, whole, manifest_of(resharding, whole.files))
    done = whole is not None and set(resharding.ranks) <= set(_ranks(whole))
    if done and restart:
        raise OutputError(f"{out}: has these ranks already; to write them anew, remove it")
    written = None if restart else finished_output(part)
    if written is not None:
        refuse_other(part, written, manifest_of(resharding, written.files))
        manifest = FileSummary(MANIFEST, (part / MANIFEST).stat().st_size)
        files = (*(record.summary for record in written.expected_files), manifest)
        outcome = Outcome(out, files, sum(file.size for file in files), 0, "", 0, 0.0, resumed=len(files))
    elif not done:
        outcome = write_resharding(resharding, part, restart=restart, workers=workers, progress=progress)
    if (part / MANIFEST).is_file():
        with _locked(out):
            _merge(part, out)
    if whole is not None and done:
        return already_complete(out, read_manifest(out), workers)
    return replace(outcome, out=out)


def _refuse_strangers(resharding: Resharding, out: Path) -> None:
    """OutputError if `out` has files that are not of this output, or another run writes all of it there."""
    if (out / JOURNAL).exists():
        raise OutputError(f"{out}: {UNFINISHED}; or choose another --out")
    own = {
        name.partition("/")[0] for name in (*(file.name for file in resharding.whole.files), MANIFEST, INDEX, CONFIG)
    }
    own |= set(resharding.whole.directories)
    for name in sorted(path.name for path in out.iterdir()) if out.is_dir() else ():
        if name not in own and not name.startswith(".reshard"):
            raise OutputError(f"{out / name}: is no part of this output; choose another --out")


def _merge(part: Path, out: Path) -> None:
    """Move what `out` lacks from `part` there, then write the manifest of both."""
    added, found = read_manifest(part), finished_output(out)
    merged = added if found is None else _merged(out, found, added)
    last = (INDEX, CONFIG)
    for record in added.expected_files:
        if record.name not in last:
            _move(part, out, record)
    temporary = out / f".reshard-{MANIFEST}"
    temporary.unlink(missing_ok=True)
    write_new_file(temporary, encode_manifest(merged).decode())
    with temporary.open("rb") as file:
        syscalls.sync(file.fileno())
    temporary.rename(out / MANIFEST)
    for record in added.files:
        if record.name in last:
            _move(part, out, record)
    for folder in added.source.directories:
        make_directory(out / folder)
    shutil.rmtree(part)
    if merged.staged_ranks is None:
        (out / MERGE_LOCK).unlink()
    sync_directory(out)


def _move(part: Path, out: Path, record: FileRecord) -> None:
    source, target = part / record.name, out / record.name
    if target.is_file() and target.stat().st_size == record.size:
        return
    if not source.is_file():
        raise IntegrityError(f"{source}: missing, and {target} too; remove {part}, and run the command again")
    make_directory(target.parent)
    source.rename(target)


def _ranks(manifest: Manifest) -> list[int]:
    return list(range(manifest.ep_size)) if manifest.staged_ranks is None else manifest.staged_ranks


def _merged(out: Path, found: Manifest, added: Manifest) -> Manifest:
    """The manifest of an output that has the ranks of both."""
    _refuse_other(out, found, added)
    ranks = sorted({*_ranks(found), *_ranks(added)})
    files = [
        theirs if ours.rank in _ranks(added) else ours for ours, theirs in zip(found.files, added.files, strict=True)
    ]
    return msgspec.structs.replace(found, files=files, staged_ranks=None if len(ranks) == found.ep_size else ranks)


def _refuse_other(out: Path, found: Manifest, expected: Manifest) -> None:
    """OutputError unless both are of one output, whichever ranks they have."""
    refuse_other(out, _without_ranks(found), _without_ranks(expected))
    for ours, theirs in zip(found.files, expected.files, strict=True):
        if None not in (ours.digest, theirs.digest) and ours != theirs:
            raise OutputError(f"{out / ours.name}: another part has other bytes; choose another --out")


def _without_ranks(manifest: Manifest) -> Manifest:
    files = [
        FileRecord(record.name, record.size, record.rank, None, record.header, dict.fromkeys(record.tensors))
        for record in manifest.files
    ]
    return msgspec.structs.replace(manifest, files=files, staged_ranks=None, digest="")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """A block that only one run is in at a time."""
    fd = os.open(out / MERGE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        while True:
            try:
                if not syscalls.lock(fd):
                    raise OutputError(
                        f"{out}: --merge needs locks, and its file system has none; write each part to a directory of "
                        "its own"
                    )
                break
            except BlockingIOError:
                time.sleep(WAIT)
        yield
    finally:
        os.close(fd)
