"""Whether a run may begin: the checks of an output directory before the first byte is written. Changes nothing.

`run` makes them, and so does `--dry-run`, which therefore fails where the run would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from ..plan.extents import MIN_SHARED, Holes, needed_size, shareable
from ..plan.files import Plan, fingerprint
from .destination import JOURNAL, LOCK, PARTIAL, SPARE_SPACE, allocated, check_out, free_space, refuse_inside
from .fetching import sources_of
from .journal import check_journal


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of disk that a run still needs, with a reserve, and bytes that it may take.

    Beside the free ones it may take those of files that it replaces.
    """

    needed: int
    free: int

    @property
    def enough(self) -> bool:
        """Whether the run can begin."""
        return self.needed <= self.free

    def check(self, out: Path) -> None:
        """OutputError unless it is enough."""
        if not self.enough:
            raise OutputError(
                f"{out}: needs {self.needed} bytes, {self.free} are free; free some space or choose another --out"
            )


def refuse_out(plan: Plan, out: Path, replaced: Collection[str] | None = None) -> None:
    """OutputError unless `plan` can be carried out in `out`.

    It must be new, empty, or hold an unfinished run or the files `replaced`; and it must not be in the plan's source.
    """
    refuse_inside(out, plan.source.root, plan.directories)
    names = [*(file.name for file in plan.files), *plan.last, *plan.directories]
    taken = {JOURNAL, LOCK, *(f"{name}{PARTIAL}" for name in names)}
    for name, count in Counter(names).items():
        if count > 1 or name in taken:
            raise OutputError(f"{out}: two files would be named {name} during the run; rename the source's")
    check_out(out, replace=replaced is not None)


def find_room(plan: Plan, out: Path, *, restart: bool = False, replaced: Collection[str] | None = None) -> Room:
    """The space that `plan` needs in `out`, and what there is. Raises OutputError as `refuse_out` does.

    OutputError also if another run is writing to `out`, or left something that this one cannot resume. With `restart`,
    that is removed first, or the files `replaced` of a finished run.
    """
    refuse_out(plan, out, replaced)
    needs = _needed_sizes(plan)
    if restart:
        opening = check_journal(out, None).opening
        names = opening.names if opening else replaced or ()
        # blocks that may be shared with the source are not freed by removing the file
        old = [name for name in names if plan.sharing.block_size is None]
        given_back = sum(allocated(out / name) + allocated(out / f"{name}{PARTIAL}") for name in old)
    else:
        done = check_journal(out, fingerprint(plan)).done if (out / JOURNAL).exists() else {}
        needs = {name: size for name, size in needs.items() if name not in done}
        given_back = sum(min(size, allocated(out / f"{name}{PARTIAL}")) for name, size in needs.items())
    return Room(sum(needs.values()) + SPARE_SPACE, free_space(out) + given_back)


def shareable_size(plan: Plan) -> int:
    """Bytes of `plan` that can be in blocks shared with the source."""
    return sum(extent.size for file in plan.files for extent in shareable(file.parts, plan.sharing.block_size))


def _needed_sizes(plan: Plan) -> Mapping[str, int]:
    """Bytes of disk that each of the plan's files needs; what it shares and the source's holes need none."""
    sparse = {}
    with sources_of(plan.source, plan.source_files).open() as opened:
        for name, file in plan.source_files.items():
            if file.size >= MIN_SHARED and opened.is_sparse(name):
                found = opened.segments(name, 0, file.size)
                sparse[name] = Holes.of([(offset, offset + size) for is_hole, offset, size in found if is_hole])
    return {file.name: needed_size(file, plan.sharing.block_size, sparse) for file in plan.files}
