"""The journal of an unfinished run: a file in the output directory that records which output files are complete.

The first line says which run this is; each later line records one complete file. A line is written only after its file
is on disk under its final name, so the journal is true whenever the run is cut short. The journal is also the lock:
while one run holds it, no other writes to the same directory. On file systems without locks a second file, LOCK, takes
that part; a run that is killed leaves it behind, and then only the user can tell that no other run is alive.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import msgspec

from ..errors import OutputError
from ..record.manifest import FileRecord, is_inside
from . import syscalls
from .destination import JOURNAL, LOCK, PARTIAL, sync_directory

NO_LOCKS = "{out}: its file system has no locks, so the file {path} is the lock; a run that is killed leaves it behind"


class Opening(msgspec.Struct, frozen=True, omit_defaults=True):
    """The journal's first line: a digest of all that decides what is written, and the files to write, the last first.

    `placement` is there if the same options may not make it again, because traffic has been recorded since.
    """

    fingerprint: str
    names: list[str]
    placement: Mapping[str, tuple[int, ...]] | None = None


class Written(msgspec.Struct, frozen=True):
    """A complete file: its record, and how many of its bytes are in blocks shared with the source."""

    record: FileRecord
    shared: int


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What a journal says. `size` is the length of its readable lines: a line that was cut short ends them."""

    opening: Opening | None
    done: dict[str, Written]
    size: int


def read_journal(out: Path) -> Unfinished:
    """Read the journal in `out`; its opening is None if there is none, or nothing in it yet.

    A complete file counts only if it still has its size.
    """
    data = b""
    if (out / JOURNAL).exists():
        with _opened(out) as file:
            data = file.read()
    opening: Opening | None = None
    done: dict[str, Written] = {}
    size = 0
    for line in data.splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            if opening is None:
                opening = msgspec.json.decode(line, type=Opening)
            else:
                written = msgspec.json.decode(line, type=Written)
                done[written.record.name] = written
        except msgspec.DecodeError as error:
            if opening is None:
                raise OutputError(f"{out / JOURNAL}: damaged ({error}); remove {out} and start again") from error
            break  # files that come after it are written again
        size += len(line)
    return Unfinished(opening, {name: found for name, found in done.items() if _is_there(out, found.record)}, size)


def check_journal(out: Path, fingerprint: str | None) -> Unfinished:
    """What the journal in `out` says; OutputError unless a run with `fingerprint` can resume it, or there is none.

    None stands for any run. OutputError also if a run is writing there now. Changes nothing.
    """
    if (out / JOURNAL).is_file():
        with _opened(out) as file:
            if not _lock(out, file.fileno(), shared=True) and (out / LOCK).exists():
                raise _locked(out)
    found = read_journal(out)
    if fingerprint is not None:
        _refuse_other(out, found.opening, fingerprint)
    return found


class Journal:
    """The journal and lock of a run in the directory `out`. A context manager; after a failure the file remains.

    Attributes:
        done: the files that are complete, by name
        notes: what the file system cannot do, a sentence each

    """

    def __init__(
        self, out: Path, opening: Opening, *, restart: bool = False, replaced: Iterable[str] | None = None
    ) -> None:
        """Begin a run in `out`, or resume an unfinished one with the same fingerprint.

        Raises OutputError if `out` holds anything else, or another run has the lock. `restart` first removes what an
        unfinished run left there, whichever run it was, or the files `replaced` of a finished one.
        """
        self._out = out
        self._path = out / JOURNAL
        self.done: dict[str, Written] = {}
        self.notes: tuple[str, ...] = ()
        self._syncs = True
        self._undo = ExitStack()
        with ExitStack() as undo:
            try:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
                undo.callback(os.close, self._fd)
                if not _lock(out, self._fd):
                    undo.enter_context(_lock_file(out))
                    self.notes = (NO_LOCKS.format(out=out, path=out / LOCK),)
                if not self._path.exists() or not os.path.samestat(os.fstat(self._fd), self._path.stat()):
                    raise OutputError(f"{out}: another run of reshard has just finished there; choose another --out")
                self._begin(opening, restart, replaced)
            except OSError as error:
                raise self._unwritable(error) from error
            self._undo = undo.pop_all()

    def __enter__(self) -> Journal:
        """The lock is held since `__init__`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock, but keep the file: the next run reads what this one did."""
        self._undo.close()

    def record(self, written: Written) -> None:
        """Record a file that is complete and on disk."""
        try:
            self._append(msgspec.json.encode(written))
        except OSError as error:
            raise self._unwritable(error) from error
        self.done[written.record.name] = written

    def remove(self) -> None:
        """Delete the journal, because the run is finished."""
        if not self._syncs:
            os.sync()  # the names of all files must be on disk before the journal goes
        try:
            self._path.unlink()
        except OSError as error:
            raise self._unwritable(error) from error
        sync_directory(self._out)

    def _begin(self, opening: Opening, restart: bool, replaced: Iterable[str] | None) -> None:
        found = read_journal(self._out)
        earlier = found.opening
        if earlier is None and restart and replaced is not None:
            earlier = Opening("", list(replaced))  # a run that is cut short from here on is an unfinished one
            self._append(msgspec.json.encode(earlier))
            sync_directory(self._out)
        if earlier is None and any(path.name not in (JOURNAL, LOCK) for path in self._out.iterdir()):
            self._path.unlink()  # ours, just created: the other files appeared after `check_out`, before our lock
            raise OutputError(
                f"{self._out}: no longer empty: a run of reshard may have just finished there; choose another --out"
            )
        if earlier is not None and restart:
            _discard(self._out, earlier.names)
            earlier, found = None, Unfinished(None, {}, 0)
        _refuse_other(self._out, earlier, opening.fingerprint)
        os.ftruncate(self._fd, found.size)
        if earlier is None:
            self._append(msgspec.json.encode(opening))
        self._syncs = sync_directory(self._out)
        if not self._syncs:
            note = f"{self._out}: its file system does not sync directories: after a power cut, resume and verify"
            self.notes = (*self.notes, note)
        self.done = found.done

    def _append(self, line: bytes) -> None:
        """Append a whole line and put it on disk; a line that cannot be written whole is taken back."""
        before = os.fstat(self._fd).st_size
        data = memoryview(line + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._fd, before)
            raise

    def _unwritable(self, error: OSError) -> OutputError:
        where = error.filename or self._path
        return OutputError(f"{where}: cannot be written: {error.strerror}; rerun the command to resume")


@contextmanager
def _opened(out: Path) -> Iterator[BinaryIO]:
    try:
        with (out / JOURNAL).open("rb") as file:
            yield file
    except OSError as error:
        raise OutputError(f"{out / JOURNAL}: cannot be read: {error.strerror}; choose another --out") from error


def _lock(out: Path, fd: int, *, shared: bool = False) -> bool:
    """Lock the journal `fd` in `out`; False if the file system has no locks, OutputError if another run has it."""
    try:
        return syscalls.lock(fd, shared=shared)
    except BlockingIOError as error:
        raise OutputError(
            f"{out}: another run of reshard is writing there; wait for it, or choose another --out"
        ) from error
    except OSError as error:
        raise OutputError(f"{out / JOURNAL}: cannot be locked: {error.strerror}; choose another --out") from error


@contextmanager
def _lock_file(out: Path) -> Iterator[None]:
    """A block in which a file stands in for the lock; OutputError if there is one."""
    path = out / LOCK
    try:
        file = path.open("x")
    except FileExistsError as error:
        raise _locked(out) from error
    try:
        with file:
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        yield
    finally:
        path.unlink(missing_ok=True)


def _locked(out: Path) -> OutputError:
    try:
        holder = (out / LOCK).read_text(errors="replace").strip()[:200]
    except OSError:
        holder = "another run"
    return OutputError(
        f"{out / LOCK}: {holder} has locked this directory, whose file system has no other locks; wait for that run, "
        "or if it is no longer alive, remove this file and rerun the command to resume"
    )


def _refuse_other(out: Path, earlier: Opening | None, fingerprint: str) -> None:
    if earlier is not None and earlier.fingerprint != fingerprint:
        raise OutputError(
            f"{out}: holds an unfinished run with other options or another source; "
            "rerun its command to finish it, or add --restart to discard it"
        )


def _is_there(out: Path, record: FileRecord) -> bool:
    path = out / record.name
    return path.is_file() and path.stat().st_size == record.size


def _discard(out: Path, names: Sequence[str]) -> None:
    """Remove the files `names`, in this order, their .partial files, and the sub-folders that this leaves empty."""
    names = [name for name in names if is_inside(name)]
    for name in names:
        for path in (out / name, out / f"{name}{PARTIAL}"):
            path.unlink(missing_ok=True)
    folders = {parent for name in names for parent in Path(name).parents} - {Path()}
    for folder in sorted(folders, reverse=True):
        with suppress(OSError):  # not empty, or never created
            (out / folder).rmdir()
