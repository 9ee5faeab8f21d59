"""The command line: parses options, calls commands, prints results. It decides nothing else."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..checkpoint.directory import CONFIG, INDEX
from ..checkpoint.source import Hub, find_source
from ..commands.merge import part_of, write_merged
from ..commands.place import plan_placement, room_for, write_resharding
from ..commands.restore import restore
from ..commands.stage import plan_stage, write_staging
from ..commands.verify import verify
from ..errors import ReshardError
from ..execute.ready import shareable_size
from ..placement.strategies import STRATEGIES, Linear, Options, Strategy, Zigzag
from ..plan.files import Digests
from ..plan.sharing import Reflink
from ..record.manifest import Layout, manifest_in, read_manifest
from .look import analyze_command, export_command, inspect_command, trace_group
from .options import (
    allow_holes_option,
    hub_options,
    json_option,
    make_strategy,
    out_option,
    parse_ranks,
    quiet_option,
    reflink_option,
    restart_option,
    strategy_options,
    workers_option,
    writing_options,
)
from .progress import bar
from .render import (
    describe_checks,
    describe_outcome,
    describe_plan,
    describe_restoring,
    describe_staging,
    describe_verification,
    fail,
    outcome_json,
    plan_json,
    print_report,
    serve_command,
)

EXIT_INTERRUPTED = 130
# GC threshold. Reading R1 creates a million long-lived objects; the default would cost 12 % of the run time.
GC_THRESHOLD = 20_000


class _Commands(click.Group):
    """Turns an exception from a command into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ReshardError as error:
            fail(str(error), 1)
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in ("zigzag", "place", "stage", "restore")
            fail("interrupted" + "; rerun the command to resume" * resumes, EXIT_INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="reshard")
def main() -> None:
    """Place the experts of a MoE checkpoint on EP ranks, without changing the model's answers."""
    gc.set_threshold(GC_THRESHOLD)


@main.command("zigzag")
@writing_options
def zigzag_command(src: str, ep: int, out: Path, **options: Any) -> None:
    """Write SRC to OUT with its experts dealt round-robin.

    Rank r of R gets experts r, r + R, r + 2 R and so on. Rerun the command to resume, even after a power cut. SRC is
    never written to.

    vLLM also serves SRC placed without rewriting it: RESHARD_PLACEMENT=zigzag. Rewrite it so that each rank reads only
    its own files, for nodes that hold only these, or for an engine without the plugin.
    """
    _rewrite(src, Zigzag(ep), out, _WritingOptions(**options))


@main.command("place")
@click.option(
    "--strategy",
    required=True,
    type=click.Choice([name for name in STRATEGIES if name != Linear.name]),
    help="zigzag: round-robin over all ranks. node-zigzag: round-robin within each node, so that expert groups stay on "
    "their node. balanced: in each layer, least work for the slowest rank under --trace's traffic. file: as in --map.",
)
@strategy_options
@writing_options
def place_command(src: str, ep: int, out: Path, strategy: str, placing: Options, **options: Any) -> None:
    """Write SRC to OUT with its experts placed by a strategy.

    Rerun the command to resume, even after a power cut. SRC is never written to.
    """
    _rewrite(src, make_strategy(strategy, placing, options["quiet"])(ep), out, _WritingOptions(**options))


@dataclass(frozen=True, slots=True)
class _WritingOptions:
    """The options of `writing_options`, as click passes them."""

    hub: Hub
    ranks: tuple[int, ...] | None
    merge: bool
    layout: Layout
    max_shard_size: int
    reflink: Reflink
    digests: str | None
    allow_holes: bool
    check_source: bool
    workers: int | None
    dry_run: bool
    restart: bool
    quiet: bool
    as_json: bool


def _rewrite(src: str, strategy: Strategy, out: Path, options: _WritingOptions) -> None:
    if options.merge and options.ranks is None:
        raise click.UsageError("--merge puts the parts of several runs together: give each its --ranks")
    part = part_of(out, options.ranks) if options.merge and options.ranks is not None else out
    resharding = plan_placement(
        src,
        strategy,
        part,
        hub=options.hub,
        layout=options.layout,
        max_shard_size=options.max_shard_size,
        reflink=options.reflink,
        digests=Digests(options.digests) if options.digests else None,
        allow_holes=options.allow_holes,
        check_source=options.check_source,
        ranks=options.ranks,
        restart=options.restart,
    )
    if options.dry_run:
        room, shareable = room_for(resharding, part, restart=options.restart), shareable_size(resharding.plan)
        report = {**plan_json(resharding, out), "shareable": shareable, "needed": room.needed, "free": room.free}
        print_report(report, describe_plan(resharding, out, shareable, room), options.quiet, options.as_json)
        room.check(out)
        return
    if checks := [] if options.quiet else describe_checks(resharding):
        click.echo("\n".join(checks), err=True)
    with bar(strategy.name, resharding.work, options.quiet) as progress:
        write = write_merged if options.merge else write_resharding
        outcome = write(resharding, out, restart=options.restart, workers=options.workers, progress=progress)
    report = {**plan_json(resharding, out), **outcome_json(outcome), "serve": serve_command(out, resharding.ep_size)}
    print_report(report, describe_outcome(resharding, outcome), options.quiet, options.as_json)


@main.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--src", help="Also compare every tensor and router with SRC, the checkpoint that OUT was made from.")
@click.option("--quick", is_flag=True, help="Check only sizes, headers, index and configs.")
@hub_options
@allow_holes_option
@workers_option
@quiet_option
@json_option
def verify_command(
    out: Path,
    src: str | None,
    quick: bool,
    hub: Hub,
    allow_holes: bool,
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check every file and tensor of OUT against its manifest."""
    if quick and src is not None:
        raise click.UsageError("--quick reads no tensors: leave it out to compare with --src")
    manifest = read_manifest(out)
    total = sum(record.size for record in manifest.expected_files)
    if src is not None:
        total += sum(record.size for record in manifest.expected_files if record.tensors)
    with bar("verify", total, quiet) as progress:
        verification = verify(
            out, src, hub=hub, quick=quick, allow_holes=allow_holes, workers=workers, progress=progress
        )
    report = {**asdict(verification), "out": str(out), "sound": not verification.problems}
    silent = quiet and not verification.problems
    print_report(report, describe_verification(verification, src, quick), silent, as_json)
    if count := len(verification.problems):
        fail(f"{out}: {count} problem{'s' * (count > 1)} found; see the standard output", 1)


@main.command("stage")
@click.argument("resharded", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--ranks", required=True, callback=parse_ranks, help="EP ranks of the node, like 0-7 or 0-3,6.")
@out_option
@reflink_option
@workers_option
@restart_option
@quiet_option
@json_option
def stage_command(
    resharded: Path,
    ranks: tuple[int, ...],
    out: Path,
    reflink: Reflink,
    workers: int | None,
    restart: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Copy the files that one node needs from the output OUT.

    These are the files of the node's EP ranks, and those that every rank needs. Rerun the command to resume, even after
    a power cut.
    """
    staging = plan_stage(resharded, ranks, out, reflink=reflink)
    with bar("stage", staging.plan.size, quiet) as progress:
        outcome = write_staging(staging, out, restart=restart, workers=workers, progress=progress)
    report = {**outcome_json(outcome), "staged_ranks": staging.manifest.staged_ranks, "notes": staging.notes}
    print_report(report, describe_staging(staging, outcome), quiet, as_json)


@main.command("restore")
@click.argument("resharded", metavar="OUT")
@hub_options
@out_option
@reflink_option
@workers_option
@restart_option
@quiet_option
@json_option
def restore_command(
    resharded: str,
    hub: Hub,
    out: Path,
    reflink: Reflink,
    workers: int | None,
    restart: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Rebuild the source of the output OUT, every file byte-identical.

    OUT is a directory, or where the output was uploaded to: a repository of the Hugging Face Hub, or a bucket.

    Rerun the command to resume, even after a power cut.
    """
    source = manifest_in(find_source(resharded, hub)).source
    total = sum(file.size for file in source.files if file.name not in (INDEX, CONFIG))
    with bar("restore", total, quiet) as progress:
        outcome = restore(resharded, out, hub=hub, reflink=reflink, restart=restart, workers=workers, progress=progress)
    done = describe_restoring(outcome, resharded)
    done += [f"note: the output never had {name} of the source" for name in source.left_out]
    print_report(outcome_json(outcome), done, quiet, as_json)


for _command in (inspect_command, analyze_command, export_command, trace_group):
    main.add_command(_command)
