"""Options that several commands share, and how their values are parsed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..arguments import parse_size
from ..checkpoint.source import Hub
from ..errors import OutputError
from ..placement.steps import DEFAULT_MIX, Step, describe_mix, parse_mix
from ..placement.strategies import STRATEGIES, Options, Strategy
from ..placement.time_model import DEFAULT_GPU, gpu_names
from ..plan.files import Digests
from ..plan.sharing import REFLINK
from ..record.manifest import LAYOUTS
from .progress import layer_bar
from .render import Printing

STDOUT = Path("-")
EMPTY = "is empty; for the current directory, write ."


class Directory(click.Path):
    """A directory, which shells complete. The command itself says what is wrong with it."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse "", which would mean the current directory."""
        return self.fail(EMPTY, param, ctx) if value == "" else super().convert(value, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete directories."""
        return [CompletionItem(incomplete, type="dir")]


class Source(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3 only
    """A directory, which shells complete, a repository, or a URL."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse "", which would mean the current directory."""
        return self.fail(EMPTY, param, ctx) if value == "" else value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Let the shell complete directories."""
        return [CompletionItem(incomplete, type="dir")]


def read_size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """A number of bytes such as 5GB, 0.5G or 4GiB."""
    try:
        return parse_size(value, "it")
    except OutputError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def parse_ranks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """EP ranks and ranges of them, such as 0-3,6; None if the option is not given."""
    if value is None:
        return None
    ranks: set[int] = set()
    for item in value.split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", item.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(f"{item!r} is not a rank or a range of ranks; write them like 0-3,6", ctx, param)
        ranks.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(ranks))


def parse_batch_mix(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[Step, ...] | None:
    """Batch sizes such as decode:8,32;prefill:8192."""
    try:
        return None if value is None else parse_mix(value)
    except OutputError as error:
        raise click.BadParameter(str(error), ctx, param) from error


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
workers_option = click.option(
    "--workers", type=click.IntRange(1, 1024), help="Number of threads.  [default: one per processor, at most 8]"
)
reflink_option = click.option(
    "--reflink",
    type=click.Choice(REFLINK),
    default="auto",
    show_default=True,
    help="Share disk blocks instead of copying them, if the file system can (XFS, Btrfs).",
)
restart_option = click.option(
    "--restart", is_flag=True, help="Discard what an interrupted run left, or what this command wrote, and start over."
)
out_option = click.option(
    "-o",
    "--out",
    required=True,
    metavar="OUT",
    type=Directory(),
    help="Directory to write; must be absent or empty, or hold an interrupted or finished run of the same command.",
)
resharded_argument = click.argument("resharded", metavar="DIRECTORY", type=Directory())


source_option = click.option(
    "--src",
    required=True,
    metavar="SRC",
    type=Source(),
    help="Checkpoint directory, repository of the Hugging Face Hub (org/name or hf://org/name@revision), or folder of "
    "an object store (s3://bucket/folder, gs://…). A repository that is not in the cache is not downloaded: what is "
    "needed of it is read from the Hub.",
)
layout_option = click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="ranks",
    show_default=True,
    help="ranks: write files by EP rank. source: write a file for each file of the source.",
)
max_shard_size_option = click.option(
    "--max-shard-size",
    metavar="SIZE",
    default="5GB",
    show_default=True,
    callback=read_size,
    help="Maximum size of the tensors in a file, with --layout ranks: 5GB, 0.5G, 4GiB; at least 1KB.",
)
digests_option = click.option(
    "--digests",
    type=click.Choice([digests.value for digests in Digests]),
    help="Which tensors to checksum: all, or only copied ones.  [default: all; copied with --layout source]",
)
EP_SIZE = click.IntRange(min=2)
ep_option = click.option("--ep", required=True, type=EP_SIZE, metavar="R", help="Number of EP ranks to serve on.")
allow_holes_option = click.option(
    "--allow-holes",
    is_flag=True,
    help="Take holes in SRC's tensors, which read as zeros, for the model's own zeros.",
)
check_source_option = click.option(
    "--check-source",
    is_flag=True,
    help="Compare SRC with the checksums that it was downloaded by (Hugging Face cache, or hf download --local-dir): "
    "while copying, with --layout source; otherwise in a read of its own, before anything is written.",
)
ranks_option = click.option(
    "--ranks",
    callback=parse_ranks,
    help="Write only what these EP ranks need, like 0-7 or 0-3,6: their files, and those that every rank needs.",
)
merge_option = click.option(
    "--merge",
    is_flag=True,
    help="Add these ranks to OUT, where other runs may write other ranks at the same time. After the last one, OUT is "
    "what a run without --ranks writes.",
)
ray_option = click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Have the files written by tasks on a Ray cluster, the one of this machine or at ADDRESS. Its nodes must see "
    "SRC, and share OUT or take --ranks-per-node.",
)
ranks_per_node_option = click.option(
    "--ranks-per-node",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --ray: write to OUT on each node's own disk what its N EP ranks need. Nodes get ranks in vLLM's order.",
)
dry_run_option = click.option(
    "-n",
    "--dry-run",
    is_flag=True,
    help="Print the plan and write nothing; fail where the run would fail before it writes.",
)


def hub_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how to ask the Hugging Face Hub; the command receives them as `hub`."""

    @functools.wraps(command)
    def with_options(revision: str | None, token: str | None, download: bool, **options: Any) -> None:
        command(hub=Hub(revision, token, download), **options)

    for option in (
        click.option("--download", is_flag=True, help="Download the whole repository to the Hugging Face cache first."),
        click.option("--token", help="Access token for the Hub.  [default: HF_TOKEN, or that of `hf auth login`]"),
        click.option("--revision", help="Branch, tag or commit of the repository.  [default: main]"),
    ):
        with_options = option(with_options)
    return with_options


def _no_spare(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """No spare slot is what there is without the option."""
    return value or None


spare_option = click.option(
    "--spare",
    type=click.IntRange(min=0),
    metavar="S",
    callback=_no_spare,
    help="Slots on each rank for copies of experts, beside its share of the experts. For each batch, vLLM with the "
    "plugin chooses the copies that serve it.",
)


def strategy_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of strategies; the command receives them as `placing`."""

    @functools.wraps(command)
    def with_options(
        nodes: int | None,
        trace: Path | None,
        map_file: Path | None,
        gpu: str | None,
        mix: tuple[Step, ...] | None,
        **options: Any,
    ) -> None:
        command(placing=Options(nodes, trace, map_file, gpu, mix), **options)

    for option in (
        click.option(
            "--batch-mix",
            "mix",
            callback=parse_batch_mix,
            help="Batch sizes that count, for balanced and for analyze: tokens that all ranks compute in one step.  "
            f"[default: {describe_mix(DEFAULT_MIX)}]",
        ),
        click.option(
            "--gpu",
            help=f"GPU whose time counts, for balanced and for analyze: {', '.join(gpu_names())}, or a JSON file.  "
            f"[default: {DEFAULT_GPU}]",
        ),
        click.option(
            "--map",
            "map_file",
            type=click.Path(path_type=Path),
            help="Placement for file: JSON with physical_to_logical, one list for all MoE layers or one for each by "
            "name. A manifest works too.",
        ),
        click.option(
            "--trace",
            type=Directory(),
            help="Directory of recorded routing, for balanced; see reshard trace --help.",
        ),
        click.option(
            "--nodes",
            type=click.IntRange(min=2),
            help="Number of nodes that the EP ranks are spread over, for node-zigzag; optional for balanced.",
        ),
    ):
        with_options = option(with_options)
    return with_options


def make_strategy(name: str, ep_size: int | None, options: Options, quiet: bool) -> Callable[[int], Strategy]:
    """A function that makes the strategy `name` for a number of EP ranks, which is `ep_size` if that is given.

    UsageError if an option that it needs is absent, one that it does not take is given, or nodes do not divide ranks.
    """
    offer = STRATEGIES[name]
    for option in ("nodes", "trace", "map", "spare", "gpu", "mix"):
        given = getattr(options, option) is not None
        flag = "--batch-mix" if option == "mix" else f"--{option}"
        if option in offer.needs and not given:
            raise click.UsageError(f"--strategy {name} needs {flag}")
        if given and option not in (*offer.needs, *offer.takes):
            raise click.UsageError(f"{flag} does not go with --strategy {name}")
    check_nodes(options.nodes, ep_size)
    return lambda ep_size: offer.make(ep_size, replace(options, progress=layer_bar(quiet)))


def check_nodes(nodes: int | None, ep_size: int | None) -> None:
    """UsageError unless each of the `nodes` holds equally many of the `ep_size` ranks."""
    if nodes is not None and ep_size is not None and ep_size % nodes:
        raise click.UsageError(f"--nodes must divide the {ep_size} EP ranks of --ep, found {nodes}")


def writing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that `zigzag` and `place` share: the source, the output, and how to write it."""
    options = (
        source_option,
        hub_options,
        ep_option,
        ranks_option,
        merge_option,
        ray_option,
        ranks_per_node_option,
        out_option,
        layout_option,
        max_shard_size_option,
        reflink_option,
        digests_option,
        allow_holes_option,
        check_source_option,
        workers_option,
        dry_run_option,
        restart_option,
    )
    command = printing_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def printing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say what is printed; the command receives them as `printing`."""

    @functools.wraps(command)
    def with_options(quiet: bool, verbose: bool, as_json: bool, **options: Any) -> None:
        if quiet and verbose:
            raise click.UsageError("--quiet does not go with --verbose")
        command(printing=Printing(quiet, verbose, as_json), **options)

    for option in (
        json_option,
        click.option("-v", "--verbose", is_flag=True, help="Also list the files."),
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    ):
        with_options = option(with_options)
    return with_options
