"""The commands that write, check, copy and restore outputs: zigzag, place, verify, stage, restore."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..arguments import absolute
from ..checkpoint.directory import CONFIG, INDEX
from ..checkpoint.source import Hub, find_source
from ..commands.merge import part_of, write_merged
from ..commands.on_ray import Ray, write_on_ray
from ..commands.place import plan_placement
from ..commands.restore import restore
from ..commands.serving import serve_command
from ..commands.stage import plan_stage, write_staging
from ..commands.verify import verify
from ..commands.writing import room_for, write_resharding
from ..errors import OutputError
from ..execute.ready import shareable_size
from ..placement.strategies import STRATEGIES, Copies, Linear, Options, Strategy, Zigzag
from ..plan.files import Digests
from ..plan.sharing import Reflink
from ..record.manifest import Layout, manifest_in, read_manifest
from .options import (
    Source,
    allow_holes_option,
    hub_options,
    make_strategy,
    out_option,
    parse_ranks,
    printing_options,
    reflink_option,
    resharded_argument,
    restart_option,
    strategy_options,
    workers_option,
    writing_options,
)
from .progress import bar
from .render import (
    Printing,
    describe_checks,
    describe_outcome,
    describe_plan,
    describe_restoring,
    describe_staging,
    describe_verification,
    print_report,
)
from .reports import (
    plan_report,
    restoring_report,
    staging_report,
    verification_report,
    writing_report,
)
from .terminal import Command, echo, fail


@click.command(
    "zigzag",
    cls=Command,
    examples=(
        "reshard zigzag --src ./DeepSeek-R1 --ep 8 --out ./R1-zz --dry-run",
        "reshard zigzag --src ./DeepSeek-R1 --ep 8 --out ./R1-zz",
        "reshard zigzag --src ./DeepSeek-R1 --ep 16 -o ./R1-zz16 --layout source",
        "reshard zigzag --src deepseek-ai/DeepSeek-R1 --ep 16 --ranks 0-7 \\\n      --out ./node0/R1-zz16",
    ),
)
@writing_options
def zigzag_command(src: str, ep: int, out: Path, **options: Any) -> None:
    """Write SRC to OUT with its experts dealt round-robin.

    Rank r of R gets experts r, r + R, r + 2 R and so on. Rerun the command to resume, even after a power cut. SRC is
    never written to.

    vLLM also serves SRC placed without rewriting it: RESHARD_PLACEMENT=zigzag. Rewrite it so that each rank reads only
    its own files, for nodes that hold only these, or for an engine without the plugin.
    """
    _rewrite(src, Zigzag(ep), out, _WritingOptions(**options))


@click.command(
    "place",
    cls=Command,
    examples=(
        "reshard place --src ./DeepSeek-R1 --ep 8 --strategy balanced \\\n      --trace ./trace --out ./R1-balanced",
        "reshard place --src ./DeepSeek-R1 --ep 16 --strategy node-zigzag --nodes 2 \\\n      --out ./R1-nodes",
        "reshard place --src ./DeepSeek-R1 --ep 8 --strategy file --map ./map.json \\\n      --out ./R1-mine",
    ),
)
@click.option(
    "--strategy",
    required=True,
    type=click.Choice([name for name in STRATEGIES if name not in (Linear.name, Copies.name)]),
    help="zigzag: round-robin over all ranks. node-zigzag: round-robin within each node, so that expert groups stay on "
    "their node. balanced: in each layer, least work for the slowest rank under --trace's traffic. file: as in --map.",
)
@strategy_options
@writing_options
def place_command(src: str, ep: int, out: Path, strategy: str, placing: Options, **options: Any) -> None:
    """Write SRC to OUT with its experts placed by a strategy.

    Rerun the command to resume, even after a power cut. SRC is never written to.
    """
    make = make_strategy(strategy, ep, placing, options["printing"].quiet)
    _rewrite(src, make(ep), out, _WritingOptions(**options))


@dataclass(frozen=True, slots=True)
class _WritingOptions:
    """The options of `writing_options`, as click passes them."""

    hub: Hub
    ranks: tuple[int, ...] | None
    merge: bool
    ray_address: str | None
    ranks_per_node: int | None
    layout: Layout
    max_shard_size: int
    reflink: Reflink
    digests: str | None
    allow_holes: bool
    check_source: bool
    workers: int | None
    dry_run: bool
    restart: bool
    printing: Printing


def _rewrite(src: str, strategy: Strategy, out: Path, options: _WritingOptions) -> None:
    if options.merge and options.ranks is None:
        raise click.UsageError("--merge puts the parts of several runs together: give each its --ranks")
    cluster = _cluster(options, strategy.ep_size)
    part = part_of(out, options.ranks) if options.merge else out
    resharding = plan_placement(
        src if cluster is None else absolute(src),
        part,
        strategy,
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
    printing = options.printing
    if options.dry_run:
        room, shareable = room_for(resharding, part, restart=options.restart), shareable_size(resharding.plan)
        report = plan_report(resharding, out, shareable, room)
        print_report(report, describe_plan(resharding, out, shareable, room), printing, resharding.files)
        try:
            room.check(out)
        except OutputError as error:
            fail(str(error), 1)  # the report has said it in JSON
        return
    if checks := [] if printing.quiet else describe_checks(resharding):
        echo(checks, err=True)
    with bar(strategy.name, resharding.work, printing.quiet) as progress:
        write = write_merged if options.merge else write_resharding
        if cluster is not None:
            write = partial(write_on_ray, cluster=cluster)
        outcome = write(resharding, out, restart=options.restart, workers=options.workers, progress=progress)
    report = writing_report(resharding, outcome, serve_command(out, resharding.ep_size))
    print_report(report, describe_outcome(resharding, outcome), printing, outcome.files)


def _cluster(options: _WritingOptions, ep_size: int) -> Ray | None:
    """The cluster to write on; UsageError if its options do not fit others."""
    per_node = options.ranks_per_node
    if options.ray_address is None:
        if per_node is not None:
            raise click.UsageError("--ranks-per-node is for --ray: leave it out, or give the other too")
        return None
    if options.merge:
        raise click.UsageError("--merge does not go with --ray, whose tasks write all ranks")
    if per_node is not None and (options.ranks is not None or ep_size % per_node):
        raise click.UsageError(f"--ranks-per-node must divide the {ep_size} EP ranks of --ep, and goes without --ranks")
    return Ray(options.ray_address, per_node)


@click.command(
    "verify",
    cls=Command,
    examples=(
        "reshard verify ./R1-zz",
        "reshard verify ./R1-zz --src ./DeepSeek-R1",
        "reshard verify ./R1-zz --quick",
    ),
)
@resharded_argument
@click.option(
    "--src",
    metavar="SRC",
    type=Source(),
    help="Also compare every tensor and router with SRC, the checkpoint that it was made from.",
)
@click.option("--quick", is_flag=True, help="Check only sizes, headers, index and configs.")
@hub_options
@allow_holes_option
@workers_option
@printing_options
def verify_command(
    resharded: Path,
    src: str | None,
    quick: bool,
    hub: Hub,
    allow_holes: bool,
    workers: int | None,
    printing: Printing,
) -> None:
    """Check every file and tensor of an output against its manifest.

    DIRECTORY is what zigzag, place or stage wrote.
    """
    if quick and src is not None:
        raise click.UsageError("--quick reads no tensors: leave it out to compare with --src")
    manifest = read_manifest(resharded)
    total = sum(record.size for record in manifest.expected_files)
    if src is not None:
        total += sum(record.size for record in manifest.expected_files if record.tensors)
    with bar("verify", total, printing.quiet) as progress:
        found = verify(
            resharded, src, hub=hub, quick=quick, allow_holes=allow_holes, workers=workers, progress=progress
        )
    shown = replace(printing, quiet=printing.quiet and found.ok)
    print_report(verification_report(found), describe_verification(found, src, quick), shown, found.files)
    if count := len(found.problems):
        fail(f"{resharded}: {count} problem{'s' * (count > 1)} found; see the standard output", 1)


@click.command("stage", cls=Command, examples=("reshard stage ./R1-zz --ranks 0-3 --out ./node0/R1-zz",))
@resharded_argument
@click.option("--ranks", required=True, callback=parse_ranks, help="EP ranks of the node, like 0-7 or 0-3,6.")
@out_option
@reflink_option
@workers_option
@restart_option
@printing_options
def stage_command(
    resharded: Path,
    ranks: tuple[int, ...],
    out: Path,
    reflink: Reflink,
    workers: int | None,
    restart: bool,
    printing: Printing,
) -> None:
    """Copy the files that one node needs from an output.

    DIRECTORY is what zigzag or place wrote. The files are those of the node's EP ranks, and those that every rank
    needs. Rerun the command to resume, even after a power cut.
    """
    staging = plan_stage(resharded, out, ranks, reflink=reflink)
    with bar("stage", staging.plan.size, printing.quiet) as progress:
        outcome = write_staging(staging, out, restart=restart, workers=workers, progress=progress)
    report = staging_report(resharded, staging, outcome)
    print_report(report, describe_staging(staging, outcome), printing, outcome.files)


@click.command("restore", cls=Command, examples=("reshard restore ./R1-zz --out ./R1",))
@click.argument("resharded", metavar="DIRECTORY", type=Source())
@hub_options
@out_option
@reflink_option
@workers_option
@restart_option
@printing_options
def restore_command(
    resharded: str,
    hub: Hub,
    out: Path,
    reflink: Reflink,
    workers: int | None,
    restart: bool,
    printing: Printing,
) -> None:
    """Rebuild the source of an output, every file byte-identical.

    DIRECTORY is what zigzag or place wrote, or where it was uploaded to: a repository of the Hugging Face Hub, or a
    bucket. Rerun the command to resume, even after a power cut.
    """
    source = manifest_in(find_source(resharded, hub)).source
    total = sum(file.size for file in source.files if file.name not in (INDEX, CONFIG))
    with bar("restore", total, printing.quiet) as progress:
        outcome = restore(resharded, out, hub=hub, reflink=reflink, restart=restart, workers=workers, progress=progress)
    report = restoring_report(resharded, source, outcome)
    print_report(report, describe_restoring(outcome, resharded, source), printing, outcome.files)
