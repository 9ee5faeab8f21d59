"""The command that compares placements and recommends one: analyze."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import click

from ..checkpoint.source import Hub, find_source
from ..commands.analyze import BATCH_SIZES, RANDOM_TOKENS, analyze
from ..commands.page import refuse_page, write_page
from ..errors import OutputError
from ..placement.steps import DEFAULT_MIX
from ..placement.strategies import STRATEGIES, Options
from ..placement.time_model import DEFAULT_GPU
from ..traffic.choices import MAX_TOKENS
from ..traffic.page import render
from ..traffic.report import describe_analysis, recommendation
from .options import (
    STDOUT,
    Source,
    check_nodes,
    ep_option,
    hub_options,
    json_option,
    spare_option,
    strategy_options,
)
from .progress import bar, layer_bar
from .render import Printing, describe_serving, print_report
from .reports import analysis_report
from .terminal import Command, Whole

FITTED_SHARE = 0.5  # of a trace: analyze makes balanced placements from it, and measures them on the rest


@click.command(
    "analyze",
    cls=Command,
    examples=(
        "reshard analyze ./DeepSeek-R1 --ep 8",
        "reshard analyze ./DeepSeek-R1 --ep 8 --trace ./trace --html R1.html",
        "reshard analyze ./DeepSeek-R1 --ep 8 --trace ./trace --spare 8",
        "reshard analyze ./DeepSeek-R1 --ep 16 --nodes 2 --json",
    ),
)
@click.argument("src", type=Source())
@ep_option
@click.option(
    "--placement",
    "placements",
    type=click.Choice(list(STRATEGIES)),
    multiple=True,
    help="Placement to measure; can be repeated. The others are compared with the first.  [default: linear and zigzag, "
    "and those that --nodes, --trace, --map and --spare make possible]",
)
@spare_option
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
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of the random hidden states."
)
@click.option("--layers", "by_layer", is_flag=True, help="Also print a table for each layer.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    help="Also write an HTML page with curves, loads and a heat map. The file must not exist; - is the standard "
    "output, which then has the page only.",
)
@json_option
def analyze_command(
    src: str,
    ep: int,
    spare: int | None,
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
    """Compare placements by load and time, and recommend one.

    Reads only the gates of SRC, and writes no checkpoint. With --trace, measures placements on the recorded choices
    instead, and reads no gates. If a placement is made from the trace, it is made from the first half of every
    recording, and all placements are measured on the second half.
    """
    placing = replace(placing, spare=spare)
    possible = [
        name
        for name, offer in STRATEGIES.items()
        if all(getattr(placing, option) is not None for option in offer.needs)
    ]
    if impossible := [name for name in placements if name not in possible]:
        raise click.UsageError(f"--placement {impossible[0]} needs --{STRATEGIES[impossible[0]].needs[0]}")
    if as_json and html == STDOUT:
        raise click.UsageError("--html - does not go with --json: both print on the standard output")
    if largest := max((size for size in batches if tokens is not None and size > tokens), default=0):
        raise click.UsageError(f"--batch {largest} is more than --tokens {tokens}")
    check_nodes(placing.nodes, ep)
    options = replace(placing, share=FITTED_SHARE, progress=layer_bar(quiet=False))
    if html not in (None, STDOUT):
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
            gpu=placing.gpu or DEFAULT_GPU,
            mix=placing.mix or DEFAULT_MIX,
            hub=hub,
            progress=progress,
        )
    if placements and analysis.unfit:
        raise OutputError(next(iter(analysis.unfit.values())))
    if html == STDOUT:
        click.echo(render(analysis, _command_line()), nl=False)
        return
    if html is not None:
        write_page(analysis, html, _command_line())
    lines = [*describe_analysis(analysis, by_layer=by_layer), *describe_serving(analysis)]
    lines += [f"wrote {html}"] * (html is not None)
    why, *commands = recommendation(analysis)
    lines += ["", why, *map(Whole, commands)]
    print_report(analysis_report(analysis), lines, Printing(as_json=as_json))


def _command_line() -> str:
    """The words of this command, without a token."""
    words = ["reshard", *click.get_current_context().find_root().obj]
    hidden = ["…" if before == "--token" else word for before, word in zip(["", *words], words, strict=False)]
    return shlex.join("--token=…" if word.startswith("--token=") else word for word in hidden)
