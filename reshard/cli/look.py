"""The commands that only read checkpoints, outputs and traces: inspect, trace and export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ..checkpoint.source import Hub
from ..commands.engine_files import FORMAT_NAMES, FORMATS, FormatName
from ..commands.export import export, write_export
from ..commands.inspect import inspect
from ..commands.trace_info import trace_info
from ..placement.strategies import STRATEGIES, Copies, Linear, Options, Zigzag
from .options import (
    EP_SIZE,
    STDOUT,
    Source,
    hub_options,
    json_option,
    make_strategy,
    printing_options,
    spare_option,
    strategy_options,
)
from .render import Printing, describe_export, print_report
from .render_look import describe_inspection, describe_trace
from .reports import export_report, inspection_report, trace_report
from .terminal import Command, Context, echo


@click.command(
    "inspect",
    cls=Command,
    examples=(
        "reshard inspect ./DeepSeek-R1",
        "reshard inspect ./DeepSeek-R1 --ep 8",
        "reshard inspect deepseek-ai/DeepSeek-R1",
        "reshard inspect ./R1-zz --json",
    ),
)
@click.argument("directory", type=Source())
@click.option(
    "--ep",
    type=EP_SIZE,
    metavar="R",
    help="Also show the experts that zigzag would place on each of this many EP ranks.",
)
@hub_options
@printing_options
def inspect_command(directory: str, ep: int | None, hub: Hub, printing: Printing) -> None:
    """Describe a checkpoint or an output of reshard.

    Shows its experts, expert groups and sizes; for an output also its placement.
    """
    inspection = inspect(directory, ep, hub)
    print_report(inspection_report(inspection), describe_inspection(inspection), printing, inspection.files)


class _Traces(click.Group):
    context_class = Context


@click.group("trace", cls=_Traces)
def trace_group() -> None:
    """Inspect recorded routing: which experts tokens chose.

    `analyze --trace` and `place --strategy balanced` use it. vLLM records it if reshard is installed beside vLLM and
    RESHARD_TRACE names a directory. reshard also reads arrays (*.npy) of vLLM's --enable-return-routed-experts, and
    dumps (*.pt) of SGLang's expert distribution recorder in mode per_token.
    """


@trace_group.command("info", cls=Command, examples=("reshard trace info ./trace", "reshard trace info ./trace --json"))
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
def trace_info_command(directory: Path, as_json: bool) -> None:
    """Describe the recordings in DIRECTORY, or in one file."""
    info = trace_info(directory)
    print_report(trace_report(info), describe_trace(info), Printing(as_json=as_json))


@click.command(
    "export",
    cls=Command,
    examples=(
        "reshard export ./DeepSeek-R1 --to sglang --ep 8 --out zigzag.json",
        "reshard export ./R1-zz --to vllm --out - > placement.json",
        "reshard export ./DeepSeek-R1 --to vllm --ep 8 --strategy balanced \\\n"
        "      --trace ./trace --out balanced.json",
        "reshard export ./DeepSeek-R1 --to vllm --ep 8 --spare 8 --trace ./trace \\\n      --out copies.json",
    ),
)
@click.argument("src", type=Source())
@click.option("--to", required=True, type=click.Choice(FORMAT_NAMES), help="The engine that reads the file.")
@click.option("--ep", type=EP_SIZE, metavar="R", help="Number of EP ranks; may be left out if SRC is an output.")
@click.option(
    "--strategy",
    type=click.Choice([name for name in STRATEGIES if name != Linear.name]),
    help="As for place; copies needs --spare. Leave it out if SRC is an output, which has a placement.  "
    "[default: zigzag; copies with --spare]",
)
@spare_option
@strategy_options
@hub_options
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="File to write; must not exist; - is the standard output.  [default: -]",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the file and errors.")
@json_option
def export_command(
    src: str,
    to: FormatName,
    ep: int | None,
    strategy: str | None,
    spare: int | None,
    placing: Options,
    hub: Hub,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a placement as a file for another engine.

    Nothing is resharded: the engine loads the original and places its experts by the file. If SRC is an output of
    reshard, the file has its placement. It is still for serving the original, not the output.
    """
    out = None if out == STDOUT else out
    if out is not None and not out.name.endswith(suffix := FORMATS[to].suffix):
        raise click.BadParameter(
            f"{FORMATS[to].engine} only reads a file whose name ends in {suffix}", param_hint="--out"
        )
    name = strategy or (Copies.name if spare else Zigzag.name)
    made = make_strategy(name, ep, replace(placing, spare=spare), quiet)
    exported = export(src, to, ep, Zigzag if name == Zigzag.name else made, hub)
    if out is not None:
        write_export(exported, out)
    if as_json:
        print_report(export_report(exported, out), [], Printing(as_json=True))
        return
    if out is None:
        click.echo(exported.content, nl=False)
    if not quiet:
        echo(describe_export(exported, out), err=True)
