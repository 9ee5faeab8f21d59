"""The commands that only read checkpoints, outputs and traces: inspect, analyze, trace and export."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import click

from ..checkpoint.source import Hub, find_source
from ..commands.analyze import BATCH_SIZES, RANDOM_TOKENS, analyze
from ..commands.engine_files import FORMAT_NAMES, FormatName
from ..commands.export import export, write_export
from ..commands.inspect import inspect
from ..commands.page import refuse_page, write_page
from ..commands.trace_info import trace_info
from ..placement.strategies import STRATEGIES, Linear, Options, Zigzag
from ..traffic.choices import MAX_TOKENS
from ..traffic.report import describe_analysis
from .options import hub_options, json_option, make_strategy, quiet_option, strategy_options
from .progress import bar, layer_bar
from .render import (
    describe_export,
    describe_serving,
    fail,
    print_report,
    serve_commands,
)
from .render_look import describe_inspection, describe_trace

FITTED_SHARE = 0.5  # of a trace: analyze makes balanced placements from it, and measures them on the rest


@click.command("inspect")
@click.argument("directory")
@click.option("--ep", type=int, help="Also show the experts that zigzag would place on each of this many EP ranks.")
@hub_options
@json_option
def inspect_command(directory: str, ep: int | None, hub: Hub, as_json: bool) -> None:
    """Describe a checkpoint or an output of reshard.

    Shows its experts, expert groups and sizes; for an output also its placement.
    """
    inspection = inspect(directory, ep, hub)
    print_report(asdict(inspection), describe_inspection(inspection), quiet=False, as_json=as_json)


@click.command("analyze")
@click.argument("src")
@click.option("--ep", required=True, type=int, help="Number of EP ranks to serve on.")
@click.option(
    "--placement",
    "placements",
    type=click.Choice(list(STRATEGIES)),
    multiple=True,
    help="Placement to measure; can be repeated. The others are compared with the first.  [default: linear and zigzag, "
    "and those that --nodes, --trace and --map make possible]",
)
@strategy_options
@hub_options
@click.option(
    "--tokens",
    type=click.IntRange(1, 1 << 20),
    help=f"Maximum number of tokens.  [default: {RANDOM_TOKENS}; {MAX_TOKENS} with --trace]",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help=f"Batch size in tokens; can be repeated.  [default: powers of 2 up to {BATCH_SIZES[-1]}]",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random hidden states.")
@click.option("--layers", "by_layer", is_flag=True, help="Also print a table for each layer.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write an HTML page with curves, loads and a heat map. The file must not exist.",
)
@json_option
def analyze_command(
    src: str,
    ep: int,
    placing: Options,
    hub: Hub,
    placements: tuple[str, ...],
    tokens: int | None,
    batches: tuple[int, ...],
    seed: int,
    by_layer: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Compare how placements would load the EP ranks.

    Reads only the gates of SRC, and writes no checkpoint. With --trace, measures placements on the recorded choices
    instead, and reads no gates. If a placement is made from the trace, it is made from the first half of every
    recording, and all placements are measured on the second half.
    """
    possible = [
        name
        for name, offer in STRATEGIES.items()
        if all(getattr(placing, option) is not None for option in offer.needs)
    ]
    if impossible := [name for name in placements if name not in possible]:
        raise click.UsageError(f"--placement {impossible[0]} needs --{STRATEGIES[impossible[0]].needs[0]}")
    options = replace(placing, share=FITTED_SHARE, progress=layer_bar(quiet=False))
    if html is not None:
        refuse_page(html, find_source(src, hub).root)
    with bar("analyze", None, False, " layers") as progress:
        analysis = analyze(
            src,
            [STRATEGIES[name].make(ep, options) for name in dict.fromkeys(placements or possible)],
            nodes=placing.nodes or 1,
            trace=placing.trace,
            tokens=tokens,
            batch_sizes=sorted(set(batches)) or BATCH_SIZES,
            seed=seed,
            hub=hub,
            progress=progress,
        )
    if placements and analysis.unfit:
        fail(next(iter(analysis.unfit.values())), 1)
    if html is not None:
        write_page(analysis, html)
    commands = serve_commands(analysis, placing)
    lines = [*describe_analysis(analysis, by_layer=by_layer), *describe_serving(commands)]
    lines += [f"wrote {html}"] * (html is not None)
    print_report({**asdict(analysis), "serve": commands}, lines, quiet=False, as_json=as_json)


@click.group("trace")
def trace_group() -> None:
    """Inspect recorded routing: which experts tokens chose.

    `analyze --trace` and `place --strategy balanced` use it. vLLM records it if reshard is installed beside vLLM and
    RESHARD_TRACE names a directory. reshard also reads arrays (*.npy) of vLLM's --enable-return-routed-experts, and
    dumps (*.pt) of SGLang's expert distribution recorder in mode per_token.
    """


@trace_group.command("info")
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
def trace_info_command(directory: Path, as_json: bool) -> None:
    """Describe the recordings in DIRECTORY, or in one file."""
    info = trace_info(directory)
    print_report(asdict(info), describe_trace(info), quiet=False, as_json=as_json)


@click.command("export")
@click.argument("src")
@click.option("--to", required=True, type=click.Choice(FORMAT_NAMES), help="The engine that reads the file.")
@click.option("--ep", type=int, help="Number of EP ranks; may be left out if SRC is an output.")
@click.option(
    "--strategy",
    type=click.Choice([name for name in STRATEGIES if name != Linear.name]),
    default=Zigzag.name,
    show_default=True,
    help="As for place. Leave it out if SRC is an output, which has a placement.",
)
@strategy_options
@hub_options
@click.option("--out", type=click.Path(path_type=Path), help="File to write; must not exist.  [default: stdout]")
@quiet_option
@json_option
def export_command(
    src: str,
    to: FormatName,
    ep: int | None,
    strategy: str,
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
    made = make_strategy(strategy, placing, quiet)
    exported = export(src, to, ep, Zigzag if strategy == Zigzag.name else made, hub)
    if out is not None:
        write_export(exported, out)
    report = {key: value for key, value in asdict(exported).items() if key != "content" or out is None}
    if as_json:
        print_report({**report, "out": out}, [], quiet, as_json)
        return
    if out is None:
        click.echo(exported.content, nl=False)
    if not quiet:
        click.echo(describe_export(exported, out), err=True)
