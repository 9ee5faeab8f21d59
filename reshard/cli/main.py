"""The command line: the group of all commands, which imports the one that is called."""

from __future__ import annotations

import gc

import click

from .._version import __version__
from .group import Commands

# GC threshold. Reading R1 creates a million long-lived objects; the default would cost 12 % of the run time.
GC_THRESHOLD = 20_000
COMMANDS = {  # the module of each, and the first line of its help: `reshard --help` imports none of them
    "analyze": ("analyze", "Compare placements by load and time, and recommend one."),
    "export": ("look", "Write a placement as a file for another engine."),
    "inspect": ("look", "Describe a checkpoint or an output of reshard."),
    "place": ("outputs", "Write SRC to OUT with its experts placed by a strategy."),
    "restore": ("outputs", "Rebuild the source of an output, every file byte-identical."),
    "stage": ("outputs", "Copy the files that one node needs from an output."),
    "trace": ("look", "Inspect recorded routing: which experts tokens chose."),
    "upload": ("publish", "Publish an output on the Hugging Face Hub, with a model card."),
    "verify": ("outputs", "Check every file and tensor of an output against its manifest."),
    "zigzag": ("outputs", "Write SRC to OUT with its experts dealt round-robin."),
}


@click.group(
    cls=Commands,
    homes=COMMANDS,
    examples=(
        "reshard inspect ./DeepSeek-R1 --ep 8",
        "reshard zigzag --src ./DeepSeek-R1 --ep 8 --out ./R1-zz",
        "reshard verify ./R1-zz --src ./DeepSeek-R1",
        "reshard restore ./R1-zz --out ./R1",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="reshard")
def main() -> None:
    """Place the experts of a MoE checkpoint on EP ranks, without changing the model's answers.

    Shells complete commands, options and paths after this line, which your ~/.bashrc can hold (for zsh and fish, put
    their names in the place of bash):

    \b
      eval "$(_RESHARD_COMPLETE=bash_source reshard)"
    """
    gc.set_threshold(GC_THRESHOLD)
