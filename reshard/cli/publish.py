"""The command that publishes an output: upload."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ..commands.upload import plan_upload, send_upload
from .options import dry_run_option, printing_options, resharded_argument
from .render import Printing, print_report
from .render_look import describe_upload, describe_uploaded
from .reports import upload_report, uploaded_report
from .terminal import Command


@click.command(
    "upload",
    cls=Command,
    examples=(
        "reshard upload ./R1-zz my-org/DeepSeek-R1-zigzag-ep8 --dry-run",
        "reshard upload ./R1-zz my-org/DeepSeek-R1-zigzag-ep8 --private",
    ),
)
@resharded_argument
@click.argument("repo_id", metavar="ORG/NAME")
@click.option("--revision", help="Branch to upload to; made if it is not there.  [default: main]")
@click.option("--token", help="Access token for the Hub.  [default: HF_TOKEN, or that of `hf auth login`]")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option(
    "--base-model",
    metavar="ORG/NAME",
    help="Repository of the original, for the model card.  [default: the one that the output was made from]",
)
@dry_run_option
@printing_options
def upload_command(
    resharded: Path,
    repo_id: str,
    revision: str | None,
    token: str | None,
    private: bool,
    base_model: str | None,
    dry_run: bool,
    printing: Printing,
) -> None:
    """Publish an output on the Hugging Face Hub, with a model card.

    DIRECTORY is what zigzag or place wrote, and ORG/NAME a repository, made if it is not there. The output is checked
    by `verify --quick` first. Rerun the command to resume: what is there is not sent again.

    If the source has a model card, its metadata and text are kept in the new one. A README.md that you have put into
    DIRECTORY is the card as it is, and one that the repository has already is kept.
    """
    upload = plan_upload(resharded, repo_id, revision=revision, token=token, private=private, base_model=base_model)
    if dry_run:
        print_report(upload_report(upload), describe_upload(upload), printing, upload.files)
        return
    with _progress_shown(printing.quiet):
        uploaded = send_upload(upload)
    print_report(uploaded_report(uploaded), describe_uploaded(uploaded), printing, upload.files)


@contextmanager
def _progress_shown(quiet: bool) -> Iterator[None]:
    """Let huggingface_hub show its own bars, or where there is no terminal, a line every 30 seconds."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, disabled = logger.level, are_progress_bars_disabled()
    if quiet:
        logger.setLevel(logging.ERROR)
    elif not sys.stderr.isatty():
        logger.setLevel(logging.INFO)
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not disabled:
            enable_progress_bars()
