"""The journal of an unfinished run: a file in the output directory that records which output files are complete.

The first line says which run this is; each later line records one complete file. A line is written only after its file
is on disk under its final name, so the journal is true whenever the run is cut short. The journal is also the lock:
while one run holds it, no other writes to the same directory.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import msgspec

from ..errors import OutputError
from ..record.manifest import FileRecord, is_inside
from .destination import JOURNAL, PARTIAL, check_out, make_directory, sync_directory


class _Opening(msgspec.Struct, frozen=True):
    """The journal's first line: a digest of all that decides what is written, and the names of the files to write."""

    fingerprint: str
    names: list[str]


class Written(msgspec.Struct, frozen=True):
    """A complete file: its record, and how many of its bytes are in blocks shared with the source."""

    record: FileRecord
    shared: int


class Journal:
    """The journal and lock of a run in the directory `out`. A context manager; after a failure the file remains.

    Attributes:
        done: the files that are complete, by name

    """

    def __init__(self, out: Path, fingerprint: str, names: Iterable[str], *, restart: bool = False) -> None:
        """Begin a run in `out`, or resume an unfinished one with the same `fingerprint`.

        Raises OutputError if `out` holds anything else, or another run has the lock. `restart` first removes what an
        unfinished run left there, whichever run it was.
        """
        self._out = out
        self._path = out / JOURNAL
        self.done: dict[str, Written] = {}
        check_out(out)
        make_directory(out)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        with ExitStack() as undo:
            undo.callback(os.close, self._fd)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"{out}: another run of reshard is writing there; wait for it, or choose another --out"
                ) from error
            if not self._path.exists() or not os.path.samestat(os.fstat(self._fd), self._path.stat()):
                raise OutputError(f"{out}: another run of reshard has just finished there; choose another --out")
            self._begin(_Opening(fingerprint, sorted(names)), restart)
            undo.pop_all()

    def __enter__(self) -> Journal:
        """The lock is held since `__init__`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock, but keep the file: the next run reads what this one did."""
        os.close(self._fd)

    def record(self, written: Written) -> None:
        """Record a file that is complete and on disk."""
        self._append(msgspec.json.encode(written))
        self.done[written.record.name] = written

    def remove(self) -> None:
        """Delete the journal, because the run is finished."""
        self._path.unlink()
        sync_directory(self._out)

    def _begin(self, opening: _Opening, restart: bool) -> None:
        earlier, done = self._read()
        if earlier is None and any(path.name != JOURNAL for path in self._out.iterdir()):
            self._path.unlink()  # ours, just created: the other files appeared after `check_out`, before our lock
            raise OutputError(
                f"{self._out}: no longer empty: a run of reshard may have just finished there; choose another --out"
            )
        if earlier is not None and restart:
            _discard(self._out, earlier.names)
            os.ftruncate(self._fd, 0)
            earlier = None
        if earlier is None:
            self._append(msgspec.json.encode(opening))
            sync_directory(self._out)
        elif earlier.fingerprint != opening.fingerprint:
            raise OutputError(
                f"{self._out}: holds an unfinished run with other options or another source; "
                "rerun its command to finish it, or add --restart to discard it"
            )
        else:
            self.done = {
                written.record.name: written
                for written in done
                if _has_size(self._out / written.record.name, written.record.size)
            }

    def _read(self) -> tuple[_Opening | None, list[Written]]:
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1
        os.ftruncate(self._fd, end)  # drop a last line that was cut short
        whole = data[:end].splitlines()
        if not whole:
            return None, []
        try:
            return msgspec.json.decode(whole[0], type=_Opening), [
                msgspec.json.decode(line, type=Written) for line in whole[1:]
            ]
        except msgspec.DecodeError as error:
            raise OutputError(f"{self._path}: damaged ({error}); remove {self._out} and start again") from error

    def _append(self, line: bytes) -> None:
        try:
            os.write(self._fd, line + b"\n")
            os.fsync(self._fd)
        except OSError as error:
            raise OutputError(
                f"{self._path}: cannot be written: {error.strerror}; rerun the command to resume"
            ) from error


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _discard(out: Path, names: Iterable[str]) -> None:
    """Remove the files `names`, their .partial files, and the sub-folders that this leaves empty."""
    names = [name for name in names if is_inside(name)]
    for name in names:
        for path in (out / name, out / f"{name}{PARTIAL}"):
            path.unlink(missing_ok=True)
    folders = {parent for name in names for parent in Path(name).parents} - {Path()}
    for folder in sorted(folders, reverse=True):
        with suppress(OSError):  # not empty, or never created
            (out / folder).rmdir()
