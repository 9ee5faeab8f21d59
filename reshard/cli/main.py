"""The command line: parses, calls, prints. What is done is decided elsewhere."""

from __future__ import annotations

import functools
import gc
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import __version__
from ..checkpoint.directory import CONFIG, INDEX
from ..commands.analyze import BATCH_SIZES, RANDOM_TOKENS, analyze
from ..commands.export import FORMAT_NAMES, Export, FormatName, export, write_export
from ..commands.inspect import Inspection, inspect
from ..commands.place import Resharding, plan_placement, write_resharding
from ..commands.restore import restore
from ..commands.stage import Staging, plan_stage, write_staging
from ..commands.trace_info import trace_info
from ..commands.verify import Verification, verify
from ..errors import ReshardError
from ..execute.reflink import REFLINK, Reflink
from ..execute.run import SPARE_SPACE, Outcome, Progress, free_space, needed_space, refuse_out, shareable_size
from ..model.layers import MoeLayer, why_plugin
from ..placement.permutations import describe_ranks
from ..placement.strategies import STRATEGIES, Linear, Options, Strategy, Zigzag
from ..plan.files import Digests
from ..record.manifest import LAYOUTS, Layout, read_manifest
from ..traffic.choices import MOST_TOKENS
from ..traffic.page import refuse_page, write_page
from ..traffic.report import describe_analysis, describe_trace

EXIT_INTERRUPTED = 130
FITTED_SHARE = 0.5  # of a trace, that analyze makes a placement from; the rest judges it
LONGEST_LINE = 1600
# Made between two looks for garbage: R1 is a million that stay, and to look costs an eighth of the time.
OBJECTS = 20_000
SIZE_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Commands(click.Group):
    """Turns what a command raises into one line and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ReshardError as error:
            _fail(str(error), 1)
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in ("zigzag", "place", "stage", "restore")
            _fail("interrupted" + "; the same command takes up from here" * resumes, EXIT_INTERRUPTED)


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """A number of bytes such as 5GB (10^9) or 4GiB (2^30)."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([A-Za-z]*)", value.strip())
    if not match or match[2].upper() not in SIZE_UNITS or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a size; write it like 5GB, 500MB or 4GiB", ctx, param)
    return int(match[1]) * SIZE_UNITS[match[2].upper()]


def _ranks(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Numbers and ranges of EP ranks such as 0-3,6."""
    ranks: set[int] = set()
    for item in value.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", item.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(f"{item!r} is no rank and no range of ranks; write them like 0-3,6", ctx, param)
        ranks.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(ranks))


_quiet = click.option("--quiet", is_flag=True, help="Print nothing but errors.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_workers = click.option(
    "--workers", type=click.IntRange(1, 1024), help="Threads.  [default: one a processor, at most 8]"
)
_reflink = click.option(
    "--reflink",
    type=click.Choice(REFLINK),
    default="auto",
    show_default=True,
    help="Share disk blocks instead of copying them, where the file system can (XFS, Btrfs).",
)
_restart = click.option("--restart", is_flag=True, help="Discard what an interrupted run left and begin afresh.")
_out = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Directory to write; absent or empty."
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="reshard")
def main() -> None:
    """Rewrite a MoE checkpoint so that linear expert placement becomes zigzag placement, answers unchanged."""
    gc.set_threshold(OBJECTS)


_source = click.option(
    "--src", required=True, help="Checkpoint directory, or a repository id in the Hugging Face cache."
)
_layout = click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="ranks",
    show_default=True,
    help="Files by EP rank, or one for each file of the source.",
)
_max_shard_size = click.option(
    "--max-shard-size", default="5GB", show_default=True, callback=_size, help="Of a file's tensors, by rank."
)
_digests = click.option(
    "--digests",
    type=click.Choice([digests.value for digests in Digests]),
    help="Of all tensors, of those whose blocks are copied and not shared, or of those that are rewritten.  "
    "[default: all; copied with --layout source]",
)
_ep = click.option("--ep", required=True, type=int, help="Number of EP ranks it will be served on.")
_dry_run = click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")


def _placing(command: Callable[..., None]) -> Callable[..., None]:
    """The options of strategies, given to the command as `placing`."""

    @functools.wraps(command)
    def with_options(nodes: int | None, trace: Path | None, map_file: Path | None, **options: Any) -> None:
        command(placing=Options(nodes, trace, map_file), **options)

    for option in (
        click.option(
            "--map",
            "map_file",
            type=click.Path(path_type=Path),
            help="JSON with physical_to_logical, for file: one list for all MoE layers or one for each by name; a "
            "manifest is one.",
        ),
        click.option(
            "--trace",
            type=click.Path(path_type=Path),
            help="Directory of recorded traffic, for balanced; see trace.",
        ),
        click.option(
            "--nodes",
            type=click.IntRange(min=2),
            help="Nodes that the EP ranks are spread over, for node-zigzag, and for balanced if there are several.",
        ),
    ):
        with_options = option(with_options)
    return with_options


def _strategy(name: str, options: Options, silent: bool) -> Callable[[int], Strategy]:
    """The strategy `name` for a number of EP ranks, if its options were given and no others."""
    offer = STRATEGIES[name]
    for option in ("nodes", "trace", "map"):
        given = getattr(options, option) is not None
        if option in offer.needs and not given:
            raise click.UsageError(f"--strategy {name} needs --{option}")
        if given and option not in (*offer.needs, *offer.takes):
            raise click.UsageError(f"--{option} does not go with --strategy {name}")
    return lambda ep_size: offer.make(ep_size, replace(options, progress=_layer_bar(silent)))


def _rewriting(command: Callable[..., None]) -> Callable[..., None]:
    """What `zigzag` and `place` have in common: where from, where to, and how it is written."""
    options = (_source, _ep, _out, _layout, _max_shard_size, _reflink, _digests, _workers, _dry_run, _restart)
    for option in reversed((*options, _quiet, _json)):
        command = option(command)
    return command


@main.command("zigzag")
@_rewriting
def zigzag_command(src: str, ep: int, out: Path, **options: Any) -> None:
    """Write OUT: the checkpoint SRC with its experts dealt round-robin to EP ranks.

    Interrupted, the same command takes up where it stopped. The source is never written to.
    """
    _rewrite(src, Zigzag(ep), out, **options)


@main.command("place")
@click.option(
    "--strategy",
    required=True,
    type=click.Choice([name for name in STRATEGIES if name != Linear.name]),
    help="Round-robin over all ranks; over the ranks of a node, expert groups staying on theirs; each layer's experts "
    "so that the slowest rank has least to do with the traffic of --trace; or as --map says.",
)
@_placing
@_rewriting
def place_command(src: str, ep: int, out: Path, strategy: str, placing: Options, **options: Any) -> None:
    """Write OUT: the checkpoint SRC with its experts where a strategy wants them.

    Interrupted, the same command takes up where it stopped. The source is never written to.
    """
    silent = options["quiet"] or options["as_json"]
    _rewrite(src, _strategy(strategy, placing, silent)(ep), out, **options)


def _rewrite(
    src: str,
    strategy: Strategy,
    out: Path,
    *,
    layout: Layout,
    max_shard_size: int,
    reflink: Reflink,
    digests: str | None,
    workers: int | None,
    dry_run: bool,
    restart: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    resharding = plan_placement(
        src,
        strategy,
        out,
        layout=layout,
        max_shard_size=max_shard_size,
        reflink=reflink,
        digests=Digests(digests) if digests else None,
    )
    if dry_run:
        refuse_out(resharding.plan, out)
        shareable, needed = shareable_size(resharding.plan), needed_space(resharding.plan)
        report = {**_planned(resharding, out), "shareable": shareable, "needed": needed}
        _print(report, _describe_plan(resharding, out, shareable, needed), quiet, as_json)
        return
    with _bar(strategy.name, resharding.plan.size, quiet or as_json) as progress:
        outcome = write_resharding(resharding, out, restart=restart, workers=workers, progress=progress)
    report = {**_planned(resharding, out), **_written(outcome), "serve": _serve(resharding, out)}
    _print(report, _describe_outcome(resharding, outcome), quiet, as_json)


@main.command("inspect")
@click.argument("directory")
@click.option("--ep", type=int, help="Also show what zigzag would place on each of this many EP ranks.")
@_json
def inspect_command(directory: str, ep: int | None, as_json: bool) -> None:
    """Describe the checkpoint in DIRECTORY: its experts, groups and sizes. Of an output, what was done."""
    inspection = inspect(directory, ep)
    _print(asdict(inspection), _describe_inspection(inspection), quiet=False, as_json=as_json)


@main.command("analyze")
@click.argument("src")
@click.option("--ep", required=True, type=int, help="Number of EP ranks it would be served on.")
@click.option(
    "--placement",
    "placements",
    type=click.Choice(list(STRATEGIES)),
    multiple=True,
    help="To compare, the others with the first; may be given several times.  [default: linear and zigzag, and those "
    "that --nodes, --trace and --map make possible]",
)
@_placing
@click.option(
    "--tokens",
    type=click.IntRange(1, 1 << 20),
    help=f"At most, in all.  [default: {RANDOM_TOKENS}; {MOST_TOKENS} of a trace]",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help=f"Tokens of a batch; may be given several times.  [default: powers of 2 up to {BATCH_SIZES[-1]}]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random hidden states.")
@click.option("--layers", "by_layer", is_flag=True, help="Also print the table of each layer.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write a page with curves, loads and a heat map; not there yet.",
)
@_json
def analyze_command(
    src: str,
    ep: int,
    placing: Options,
    placements: tuple[str, ...],
    tokens: int | None,
    batches: tuple[int, ...],
    seed: int,
    by_layer: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Say what placements would do to the load of ranks, before anything is written; reads SRC's gates only.

    With --trace reads no gates: placements are judged by the choices recorded there. If one is made from the trace, it
    is made from the first half of every recording, and all are judged by the second.
    """
    possible = [
        name
        for name, offer in STRATEGIES.items()
        if all(getattr(placing, option) is not None for option in offer.needs)
    ]
    if impossible := [name for name in placements if name not in possible]:
        raise click.UsageError(f"--placement {impossible[0]} takes --{STRATEGIES[impossible[0]].needs[0]}")
    options = replace(placing, share=FITTED_SHARE, progress=_layer_bar(as_json))
    if html is not None:
        refuse_page(html, src)
    analysis = analyze(
        src,
        [STRATEGIES[name].make(ep, options) for name in dict.fromkeys(placements or possible)],
        nodes=placing.nodes or 1,
        trace=placing.trace,
        tokens=tokens,
        batch_sizes=sorted(set(batches)) or BATCH_SIZES,
        seed=seed,
    )
    if placements and analysis.unfit:
        _fail(next(iter(analysis.unfit.values())), 1)
    if html is not None:
        write_page(analysis, html)
    lines = describe_analysis(analysis, by_layer=by_layer)
    _print(asdict(analysis), lines + [f"wrote {html}"] * (html is not None), quiet=False, as_json=as_json)


@main.group("trace")
def trace_group() -> None:
    """Recorded routing: which experts tokens chose, as `analyze --trace` and `place --strategy balanced` read it.

    Recorded by vLLM where this package is installed beside it and RESHARD_TRACE names a directory; also read are
    arrays (*.npy) of vLLM's --enable-return-routed-experts, and dumps (*.pt) of SGLang's expert distribution recorder
    in mode per_token.
    """


@trace_group.command("info")
@click.argument("directory", type=click.Path(path_type=Path))
@_json
def trace_info_command(directory: Path, as_json: bool) -> None:
    """Describe what is recorded in DIRECTORY, or in one file."""
    info = trace_info(directory)
    _print(asdict(info), describe_trace(info), quiet=False, as_json=as_json)


@main.command("export")
@click.argument("src")
@click.option("--to", required=True, type=click.Choice(FORMAT_NAMES), help="The engine that reads the file.")
@click.option("--ep", type=int, help="Number of EP ranks; of an output, its own.")
@click.option(
    "--strategy",
    type=click.Choice([name for name in STRATEGIES if name != Linear.name]),
    default=Zigzag.name,
    show_default=True,
    help="As of place; an output has its own.",
)
@_placing
@click.option("--out", type=click.Path(path_type=Path), help="File to write, not there yet.  [default: stdout]")
@_quiet
@_json
def export_command(
    src: str,
    to: FormatName,
    ep: int | None,
    strategy: str,
    placing: Options,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write where a strategy places the experts of SRC as a file for another engine. Nothing is resharded.

    The file is for serving the original: the engine loads that, and places its experts itself. Where SRC is an output
    of reshard, the file has that output's placement, still of the original's experts: it is not for the output.
    """
    made = _strategy(strategy, placing, quiet or as_json)
    exported = export(src, to, ep, Zigzag if strategy == Zigzag.name else made)
    if out is not None:
        write_export(exported, out)
    report = {key: value for key, value in asdict(exported).items() if key != "content" or out is None}
    if as_json:
        _print({**report, "out": out}, [], quiet, as_json)
        return
    if out is None:
        click.echo(exported.content, nl=False)
    if not quiet:
        click.echo(_describe_export(exported, out), err=True)


@main.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--src", help="Also compare every tensor and router with this checkpoint, which it was made from.")
@click.option("--quick", is_flag=True, help="Look at sizes, headers, index and configs only.")
@_workers
@_quiet
@_json
def verify_command(out: Path, src: str | None, quick: bool, workers: int | None, quiet: bool, as_json: bool) -> None:
    """Check every file and tensor of the output OUT against its manifest."""
    if quick and src is not None:
        raise click.UsageError("--quick reads no tensors: leave it out to compare with --src")
    manifest = read_manifest(out)
    total = sum(record.size for record in manifest.expected_files)
    if src is not None:
        total += sum(record.size for record in manifest.expected_files if record.tensors)
    with _bar("verify", total, quiet or as_json) as progress:
        verification = verify(out, src, quick=quick, workers=workers, progress=progress)
    report = {**asdict(verification), "out": str(out), "sound": not verification.problems}
    _print(report, _describe_verification(verification, src, quick), quiet, as_json)
    if verification.problems:
        first, others = verification.problems[0], len(verification.problems) - 1
        _fail(f"{first} (and {others} more problems)" if others else first, 1)


@main.command("stage")
@click.argument("resharded", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--ranks", required=True, callback=_ranks, help="EP ranks that the node holds, like 0-7 or 0-3,6.")
@_out
@_reflink
@_workers
@_restart
@_quiet
@_json
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
    """Copy what a node needs that holds some EP ranks of the output OUT: their files, and those that all ranks need.

    Interrupted, the same command takes up where it stopped.
    """
    staging = plan_stage(resharded, ranks, out, reflink=reflink)
    with _bar("stage", staging.plan.size, quiet or as_json) as progress:
        outcome = write_staging(staging, out, restart=restart, workers=workers, progress=progress)
    report = {**_written(outcome), "staged_ranks": staging.manifest.staged_ranks, "notes": staging.notes}
    _print(report, _describe_staging(staging, outcome), quiet, as_json)


@main.command("restore")
@click.argument("resharded", metavar="OUT", type=click.Path(path_type=Path))
@_out
@_reflink
@_workers
@_restart
@_quiet
@_json
def restore_command(
    resharded: Path, out: Path, reflink: Reflink, workers: int | None, restart: bool, quiet: bool, as_json: bool
) -> None:
    """Rebuild the source of the output OUT, every file byte-identical.

    Interrupted, the same command takes up where it stopped.
    """
    total = sum(file.size for file in read_manifest(resharded).source.files if file.name not in (INDEX, CONFIG))
    with _bar("restore", total, quiet or as_json) as progress:
        outcome = restore(resharded, out, reflink=reflink, restart=restart, workers=workers, progress=progress)
    lines = [
        *_resumed(outcome),
        f"restored {outcome.files} files, {_bytes(outcome.size)}, to {out} in {_time(outcome.seconds)}",
        *_sharing(outcome, resharded),
    ]
    _print(_written(outcome), lines, quiet, as_json)


@contextmanager
def _bar(what: str, total: int, silent: bool) -> Iterator[Progress]:
    """A progress bar in bytes on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(
        desc=what, total=total, unit="B", unit_scale=True, disable=True if silent else None, file=sys.stderr
    ) as bar:

        def progress(done: int) -> None:
            bar.update(done)

        yield progress


def _layer_bar(silent: bool) -> Callable[[Sequence[MoeLayer]], Iterable[MoeLayer]]:
    """Wraps layers in a progress bar on a terminal."""
    from tqdm import tqdm

    return functools.partial(tqdm, desc="balance", unit=" layers", disable=True if silent else None, file=sys.stderr)


def _print(report: dict[str, Any], lines: list[str], quiet: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=2, default=str))
    elif not quiet:
        click.echo("\n".join(lines))


def _fail(message: str, status: int) -> NoReturn:
    """One printable line of bearable length, whatever names a hostile file puts into the message."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(message.split()))
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} […] {line[-LONGEST_LINE // 2 :]}"
    click.echo(f"reshard: error: {line}", err=True)
    sys.exit(status)


def _planned(resharding: Resharding, out: Path) -> dict[str, Any]:
    return {
        "src": str(resharding.checkpoint.root),
        "out": str(out),
        "strategy": resharding.strategy,
        "layout": resharding.layout,
        "ep_size": resharding.ep_size,
        "family": resharding.model.family.name,
        "moe_layers": len(resharding.model.layers),
        "num_experts": resharding.model.routing.num_experts,
        "plugin_required": resharding.contract is not None,
        "notes": resharding.notes,
        "size": resharding.plan.size,
        "why_not_shared": resharding.plan.sharing.why_not or None,
        "free": free_space(out),
        "files": [
            {
                "name": file.name,
                "size": file.size,
                "rank": file.rank,
                "tensors": sum(p.tensor is not None for p in file.parts),
            }
            for file in resharding.plan.files
        ],
    }


def _written(outcome: Outcome) -> dict[str, Any]:
    return {
        "out": str(outcome.out),
        "size": outcome.size,
        "shared": outcome.shared,
        "undigested_tensors": outcome.undigested,
        "seconds": round(outcome.seconds, 3),
        "resumed_files": outcome.resumed,
    }


def _serve(resharding: Resharding, out: Path) -> str:
    return shlex.join(
        ["vllm", "serve", str(out), "--tensor-parallel-size", str(resharding.ep_size), "--enable-expert-parallel"]
    )


def _describe_plan(resharding: Resharding, out: Path, shareable: int, needed: int) -> list[str]:
    lines = [*_describe_model(resharding), f"would write to {out}:"]
    groups: dict[str, list[int]] = {}
    for file in resharding.plan.files:
        tensors = sum(part.tensor is not None for part in file.parts)
        label = "small and other files" if not tensors else "all ranks" if file.rank is None else f"rank {file.rank}"
        counts = groups.setdefault(label, [0, 0, 0])
        for index, count in enumerate((1, tensors, file.size)):
            counts[index] += count
    for label, (files, tensors, size) in groups.items():
        lines.append(f"  {label:22} {files:5} files {tensors:7} tensors {_bytes(size):>10}")
    size, free = resharding.plan.size, free_space(out) - SPARE_SPACE
    lines.append(f"  {'total':22} {len(resharding.plan.files):5} files {'':15} {_bytes(size):>10}")
    sharing = resharding.plan.sharing
    why = f"  ({sharing.why_not})" if sharing.why_not else ""
    lines.append(f"  {'blocks to share':22} {'':27} {_bytes(shareable):>10}{why}")
    lines.append(f"  {'room needed':22} {'':27} {_bytes(needed):>10}")
    lines.append(f"  {'room there':22} {'':27} {_bytes(free):>10}" + ("" if free >= needed else "  NOT ENOUGH"))
    return lines


def _placement(resharding: Resharding) -> str:
    different = len(set(resharding.placement.values()))
    if resharding.strategy != "file":
        return resharding.strategy
    return "the placement of the file" if different == 1 else f"the file's {different} placements of layers"


def _describe_model(resharding: Resharding) -> list[str]:
    routing = resharding.model.routing
    return [
        f"{resharding.checkpoint.root}: {resharding.model.family.name}, {len(resharding.model.layers)} MoE layers of "
        f"{routing.num_experts} experts, {_placement(resharding)} for {resharding.ep_size} EP ranks",
        f"plugin {why_plugin(routing)}",
        *(f"note: {note}" for note in resharding.notes),
    ]


def _describe_outcome(resharding: Resharding, outcome: Outcome) -> list[str]:
    return [
        *_resumed(outcome),
        *_describe_model(resharding),
        f"wrote {outcome.files} files, {_bytes(outcome.size)}, to {outcome.out} in {_time(outcome.seconds)}",
        *_sharing(outcome, resharding.checkpoint.root),
        f"check it:  reshard verify {shlex.quote(str(outcome.out))} --src "
        f"{shlex.quote(str(resharding.checkpoint.root))}",
        _serve_line(resharding, outcome.out),
    ]


def _describe_staging(staging: Staging, outcome: Outcome) -> list[str]:
    ranks = staging.manifest.staged_ranks
    what = "" if ranks is None else f"EP ranks {describe_ranks(ranks)} of {staging.manifest.ep_size}: "
    return [
        *_resumed(outcome),
        *(f"note: {note}" for note in staging.notes),
        f"staged {what}{outcome.files} files, {_bytes(outcome.size)}, to {outcome.out} in {_time(outcome.seconds)}",
        *_sharing(outcome, staging.plan.source),
        f"check it:  reshard verify {shlex.quote(str(outcome.out))}",
    ]


def _serve_line(resharding: Resharding, out: Path) -> str:
    where = " where reshard is installed beside vLLM" if resharding.contract else ""
    return f"serve it{where}:  {_serve(resharding, out)}"


def _resumed(outcome: Outcome) -> list[str]:
    if not outcome.resumed:
        return []
    return [f"resumed an interrupted run: {outcome.resumed} files were already complete"]


def _sharing(outcome: Outcome, source: Path) -> list[str]:
    """What the user should know of where the bytes lie, and of what was not looked at."""
    if outcome.why_not_shared:
        lines = [f"no disk blocks shared with {source}: {outcome.why_not_shared}"]
    else:
        lines = [f"{_bytes(outcome.shared)} of it are disk blocks shared with {source}"]
    if outcome.undigested:
        lines.append(
            f"{outcome.undigested} tensors were not read, so have no digest: verify can compare them with the source "
            "(--src), and finds no later damage to them by itself (--digests all)"
        )
    return lines


def _describe_export(exported: Export, out: Path | None) -> str:
    use = exported.use.replace("{file}", str(out) if out else "FILE")
    return (
        f"{exported.strategy} for {exported.ep_size} EP ranks, {len(exported.moe_layers)} MoE layers of "
        f"{exported.num_experts} experts, as {exported.engine} reads it; for serving the original, "
        f"{exported.original}:  {use}"
    )


def _describe_verification(verification: Verification, src: str | None, quick: bool) -> list[str]:
    lines = [
        f"{verification.out}: looked at {verification.files} files, {verification.tensors} tensors, read "
        f"{_bytes(verification.size)}, in {_time(verification.seconds)}"
    ]
    if verification.problems:
        return [*lines, *(f"problem: {problem}" for problem in verification.problems[1:])]
    if quick:
        lines.append("sizes, headers, index and configs are what was written; no tensor was read")
    elif verification.unread and verification.routers is None:
        lines.append(
            f"all but {verification.unread} tensors, which have no digest and were not read, are what was written; "
            "compare those with --src; headers, index and config agree"
        )
    else:
        lines.append("every file and tensor is what was written; headers, index and config agree")
    of_ranks = ""
    if verification.staged_ranks is not None:
        of_ranks = f" that EP ranks {describe_ranks(verification.staged_ranks)} need"
        lines.append(f"staged: it holds what EP ranks {describe_ranks(verification.staged_ranks)} need")
    if src is not None and verification.routers is not None:
        routers = verification.routers
        lines.append(f"every tensor of {src}{of_ranks} is in it, bit for bit")
        lines.append(
            f"{routers.routers} routers on {routers.tokens} random hidden states each: the same logical experts "
            "and weights" + (f" ({routers.ties} choices between equal scores left out)" if routers.ties else "")
        )
    return lines


def _describe_inspection(inspection: Inspection) -> list[str]:
    groups = (
        f", {inspection.n_group} groups, {inspection.topk_group} chosen"
        if inspection.n_group > 1
        else ", no expert groups"
    )
    layers = inspection.moe_layers
    rest = inspection.size - inspection.expert_size - inspection.router_size
    lines = [
        f"{inspection.path}: {'resharded ' if inspection.resharded else ''}{inspection.family} "
        f"({inspection.model_type})",
        f"  MoE layers   {len(layers)}: {layers[0]} … {layers[-1]}",
        f"  routing      {inspection.num_experts} experts, top {inspection.top_k}, {inspection.scoring}{groups}",
        f"  tensors      {inspection.tensors} in {inspection.files} files, {_bytes(inspection.size)}",
        f"    experts    {_bytes(inspection.expert_size)}",
        f"    routers    {_bytes(inspection.router_size)}",
        f"    the rest   {_bytes(rest)}",
    ]
    lines.append(f"  plugin       {inspection.plugin}")
    if inspection.ep_size is None:
        return lines
    lines.append(f"  placement    {inspection.strategy} for {inspection.ep_size} EP ranks" + _uniformity(inspection))
    if inspection.staged_ranks is not None:
        here = describe_ranks(inspection.staged_ranks)
        lines.append(f"  staged       EP ranks {here}; the files of the others are not here")
    lines.append("    rank   expert bytes   logical experts, in physical order")
    for rank in inspection.ranks:
        experts = " ".join(map(str, rank.experts))
        lines.append(f"    {rank.rank:4}   {_bytes(rank.size):>12}   {experts}")
    return lines


def _uniformity(inspection: Inspection) -> str:
    return ", the same in every layer" if inspection.uniform else f"; that of {inspection.moe_layers[0]}, layers differ"


def _bytes(size: int) -> str:
    for exponent, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "KB")):
        if size >= 1000**exponent:
            return f"{size / 1000**exponent:.1f} {unit}"
    return f"{size} B"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
