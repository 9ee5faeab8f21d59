"""What commands print as text. Decides nothing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..commands.serving import serve_command
from ..model.routing import why_plugin
from ..placement.permutations import describe_ranks
from ..placement.strategies import Linear
from ..traffic.report import describe_memory
from .reports import Report, print_json
from .terminal import Whole, echo, one_line

if TYPE_CHECKING:
    from ..checkpoint.location import Location
    from ..commands.export import Export
    from ..commands.resharding import Resharding
    from ..commands.stage import Staging
    from ..commands.verify import Verification
    from ..execute.ready import Room
    from ..execute.run import Outcome
    from ..record.manifest import FileSummary, Source
    from ..traffic.analysis import Analysis

QUICKLY_CHECKED = "its sizes, headers, index and configs are right, and no tensor was read; --restart writes it anew"


@dataclass(frozen=True, slots=True)
class Printing:
    """What the user wants to see."""

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False


def print_report(report: Report, lines: list[str], printing: Printing, files: Iterable[FileSummary] = ()) -> None:
    """Print `report` as JSON, or `lines` as text, or nothing. Before verbose text comes a line for each of `files`."""
    if printing.as_json:
        print_json(_command_name(click.get_current_context()), report)
    elif not printing.quiet:
        echo([*(describe_files(files) if printing.verbose else ()), *lines])


def _command_name(ctx: click.Context) -> str:
    """The name of the command without that of the program, such as "trace info"."""
    above = ctx.parent
    return str(ctx.info_name) if above is None or above.parent is None else f"{_command_name(above)} {ctx.info_name}"


def describe_files(files: Iterable[FileSummary]) -> list[str]:
    """A line for each file."""
    return [
        f"{bytes_text(file.size):>10}  {'' if file.rank is None else f'rank {file.rank}':8}  {one_line(file.name)}"
        for file in files
    ]


def describe_serving(analysis: Analysis) -> list[str]:
    """The lines of `analyze` that say how to serve by each placement."""
    commands = [(name, command) for name, found in analysis.serve.items() for command in found if name != Linear.name]
    if not commands:
        return []
    lines = ["", "To serve the original placed, with nothing rewritten:"]
    return [*lines, *(Whole(f"  {name:14}{command}") for name, command in commands)]


def describe_plan(resharding: Resharding, out: Path, shareable: int, room: Room) -> list[str]:
    """The lines of `--dry-run`. Sizes are in bytes."""
    lines = [*_describe_model(resharding), *describe_checks(resharding), f"would write to {out}:"]
    groups: dict[str, list[int]] = {}
    for file in resharding.plan.files:
        tensors = sum(part.tensor is not None for part in file.parts)
        label = "small and other files" if not tensors else "all ranks" if file.rank is None else f"rank {file.rank}"
        counts = groups.setdefault(label, [0, 0, 0])
        for index, count in enumerate((1, tensors, file.size)):
            counts[index] += count
    for label, (files, tensors, size) in groups.items():
        lines.append(f"  {label:22} {files:5} files {tensors:7} tensors {bytes_text(size):>10}")
    size = resharding.plan.size
    lines.append(f"  {'total':22} {len(resharding.plan.files):5} files {'':15} {bytes_text(size):>10}")
    sharing = resharding.plan.sharing
    why = f"  ({sharing.why_not})" if sharing.why_not else ""
    lines.append(f"  {'shared disk blocks':22} {'':27} {bytes_text(shareable):>10}{why}")
    lines.append(f"  {'space needed':22} {'':27} {bytes_text(room.needed):>10}")
    lines.append(f"  {'space free':22} {'':27} {bytes_text(room.free):>10}" + "  NOT ENOUGH" * (not room.enough))
    return lines


def _placement(resharding: Resharding) -> str:
    different = len(set(resharding.placement.values()))
    if resharding.strategy != "file":
        return resharding.strategy
    return "the file's placement" if different == 1 else f"the file's {different} placements"


def _describe_model(resharding: Resharding) -> list[str]:
    routing = resharding.model.routing
    return [
        f"{resharding.checkpoint.root}: {resharding.model.family.name}, {len(resharding.model.layers)} MoE layers of "
        f"{routing.num_experts} experts, {_placement(resharding)} for {resharding.ep_size} EP ranks",
        f"plugin {why_plugin(routing)}",
        *(f"note: {note}" for note in resharding.notes),
    ]


def describe_checks(resharding: Resharding) -> list[str]:
    """The lines that say, before a run, how it compares the source with checksums; none if it does not."""
    checksums, files = resharding.checksums, resharding.checkpoint.files
    if not checksums:
        return []
    copying = bytes_text(sum(files[name].size for name in checksums) - resharding.read_first)
    lines = [
        f"compares {len(checksums)} files of the source with their checksums on the Hub: {copying} while copying, and "
        f"{bytes_text(resharding.read_first)} in a read of their own before anything is written"
    ]
    if unknown := sorted(files.keys() - checksums.keys()):
        names = ", ".join(unknown[:3]) + ", …" * (len(unknown) > 3)
        lines.append(f"files without a known checksum, which are not compared: {len(unknown)}: {names}")
    return lines


def describe_outcome(resharding: Resharding, outcome: Outcome) -> list[str]:
    """The lines of `zigzag` and `place`."""
    root, ranks = resharding.checkpoint.root, resharding.ranks
    of_ranks = "" if ranks is None else f", for EP ranks {describe_ranks(ranks)} of {resharding.ep_size} alone:"
    return [
        *_describe_model(resharding),
        *_done_lines(outcome, f"wrote{of_ranks}", root, QUICKLY_CHECKED),
        Whole(f"check it:  reshard verify {shlex.quote(str(outcome.out))} --src {shlex.quote(str(root))}"),
        _serve_line(resharding, outcome.out),
    ]


def describe_staging(staging: Staging, outcome: Outcome) -> list[str]:
    """The lines of `stage`."""
    ranks = staging.manifest.staged_ranks
    what = "" if ranks is None else f"EP ranks {describe_ranks(ranks)} of {staging.manifest.ep_size}: "
    return [
        *(f"note: {note}" for note in staging.notes),
        *_done_lines(outcome, f"staged {what}".rstrip(), staging.plan.source.root, QUICKLY_CHECKED),
        Whole(f"check it:  reshard verify {shlex.quote(str(outcome.out))}"),
    ]


def describe_restoring(outcome: Outcome, resharded: str, source: Source) -> list[str]:
    """The lines of `restore`, which had the record `source` of what it restored."""
    lines = _done_lines(outcome, "restored", resharded, "every byte is what restore would write")
    return [*lines, *(f"note: the output never had {name} of the source" for name in source.left_out)]


def _done_lines(outcome: Outcome, done: str, source: Location | str, checked: str) -> list[str]:
    """What a run wrote, and what it resumed, shared and noted; or that all was there, and what was `checked`."""
    what = f"{len(outcome.files)} files, {bytes_text(outcome.size)}"
    if outcome.already_complete:
        return [f"already complete: {outcome.out} has all {what}; {checked}; nothing was written"]
    resumed = f"resumed an interrupted run: {outcome.resumed} files were already complete"
    return [
        *[resumed] * bool(outcome.resumed),
        *(f"note: {note}" for note in outcome.notes),
        f"{done} {what}, to {outcome.out} in {time_text(outcome.seconds)}",
        *_sharing_lines(outcome, source),
    ]


def _serve_line(resharding: Resharding, out: Path) -> str:
    where = " where reshard is installed beside vLLM" if resharding.contract else ""
    return Whole(f"serve it{where}:  {serve_command(out, resharding.ep_size)}")


def _sharing_lines(outcome: Outcome, source: Location | str) -> list[str]:
    """How much is shared with the source or why nothing is, and how many tensors have no digest."""
    if outcome.why_not_shared:
        lines = [f"copied: {outcome.why_not_shared}"]
    else:
        lines = [f"{bytes_text(outcome.shared)} share disk blocks with {source}"]
    if outcome.undigested:
        lines.append(
            f"{outcome.undigested} tensors were not read and have no digest: verify finds damage to them only with "
            "--src; to give them digests, write with --digests all"
        )
    return lines


def describe_export(exported: Export, out: Path | None) -> list[str]:
    """The lines of `export`."""
    use = exported.use.replace("{file}", str(out) if out else "FILE")
    lines = [
        f"{exported.strategy} for {exported.ep_size} EP ranks, {len(exported.moe_layers)} MoE layers of "
        f"{exported.num_experts} experts, for {exported.engine}",
        *(f"note: {note}" for note in exported.notes),
    ]
    if exported.copies:
        lines += describe_memory(exported.copies)
    return [*lines, Whole(f"serve the original, {exported.original}, with:  {use}")]


def describe_verification(verification: Verification, src: str | None, quick: bool) -> list[str]:
    """The lines of `verify`."""
    lines = [
        f"{verification.path}: checked {len(verification.files)} files and {verification.tensors} tensors, read "
        f"{bytes_text(verification.size)} in {time_text(verification.seconds)}"
    ]
    if verification.problems:
        return [*lines, *(f"problem: {one_line(problem)}" for problem in verification.problems)]
    if quick:
        lines.append("sizes, headers, index and configs are what was written; no tensor was read")
    elif verification.unread and verification.routers is None:
        lines.append(
            f"every file and tensor that has a digest is what was written; {verification.unread} tensors have none and "
            "were not read: compare them with --src; headers, index and config agree"
        )
    else:
        lines.append("every file and tensor is what was written; headers, index and config agree")
    for_ranks = ""
    if verification.staged_ranks is not None:
        for_ranks = f" that EP ranks {describe_ranks(verification.staged_ranks)} need"
        lines.append(f"staged: it has all files that EP ranks {describe_ranks(verification.staged_ranks)} need")
    if src is not None and verification.routers is not None:
        routers = verification.routers
        lines.append(f"every tensor of {src}{for_ranks} is in the output, bit for bit")
        lines.append(
            f"{routers.routers} routers on {routers.tokens} random hidden states each: the same logical experts "
            "and weights" + (f" ({routers.ties} choices between equal scores left out)" if routers.ties else "")
        )
    return lines


def bytes_text(size: int) -> str:
    """A number of bytes, such as 83.2 GB."""
    for exponent, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
        if size >= 1000**exponent:
            return f"{size / 1000**exponent:.1f} {unit}"
    return f"{size} B"


def time_text(seconds: float) -> str:
    """A duration, such as 2.5 s or 3 min 20 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
