"""What commands print with `--json`: one object each, described by `output.schema.json` beside this module.

Every key that holds bytes says of what: `output_size`, `space_needed`. `files` is always a list of `FileSummary`. An
error is an object too, unless the report before it says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..commands.export import Export
    from ..commands.inspect import Inspection
    from ..commands.resharding import Resharding
    from ..commands.stage import Staging
    from ..commands.trace_info import TraceInfo
    from ..commands.upload import Upload, Uploaded
    from ..commands.verify import Verification
    from ..execute.ready import Room
    from ..execute.run import Outcome
    from ..record.manifest import FileSummary
    from ..record.manifest import Source as SourceRecord
    from ..traffic.analysis import Analysis

SCHEMA_VERSION = 1  # raised when a key changes its meaning or goes away, not when one is added
Report = dict[str, Any]


def print_json(command: str, report: Report) -> None:
    """Print the report of `command`, such as "trace info", as one JSON object."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "command": command, **report}, indent=2, default=str))


def error_report(kind: str, message: str, status: int) -> Report:
    """Why a command failed: the class of the error, what it says, and the exit status."""
    return {"error": {"type": kind, "message": message, "exit_status": status}}


def plan_report(resharding: Resharding, out: Path, shareable: int, room: Room) -> Report:
    """What `zigzag` and `place` would do."""
    return {
        **_resharding(resharding),
        "out": str(out),
        "dry_run": True,
        "files": _files(resharding.files),
        "output_size": resharding.plan.size,
        "shareable_size": shareable,
        "space_needed": room.needed,
        "space_free": room.free,
    }


def writing_report(resharding: Resharding, outcome: Outcome, serve: str) -> Report:
    """What `zigzag` and `place` did, and the command that serves it."""
    return {**_resharding(resharding), "dry_run": False, **_outcome(outcome), "serve": serve}


def _resharding(resharding: Resharding) -> Report:
    return {
        "src": str(resharding.checkpoint.root),
        "strategy": resharding.strategy,
        "layout": resharding.layout,
        "ep_size": resharding.ep_size,
        "ranks": resharding.ranks,
        "family": resharding.model.family.name,
        "moe_layers": [layer.name for layer in resharding.model.layers],
        "num_experts": resharding.model.routing.num_experts,
        "plugin_required": resharding.contract is not None,
        "notes": resharding.notes,
        "checksums": {"known_files": len(resharding.checksums), "read_first_size": resharding.read_first},
        "why_not_shared": resharding.plan.sharing.why_not or None,
    }


def staging_report(resharded: Path, staging: Staging, outcome: Outcome) -> Report:
    """What `stage` did."""
    return {
        "path": str(resharded),
        "staged_ranks": staging.manifest.staged_ranks,
        "notes": staging.notes,
        **_outcome(outcome),
    }


def restoring_report(resharded: str, source: SourceRecord, outcome: Outcome) -> Report:
    """What `restore` did."""
    return {"path": resharded, "left_out": source.left_out, **_outcome(outcome)}


def _outcome(outcome: Outcome) -> Report:
    return {
        "out": str(outcome.out),
        "files": _files(outcome.files),
        "output_size": outcome.size,
        "shared_size": None if outcome.already_complete else outcome.shared,
        "undigested_tensors": outcome.undigested,
        "seconds": round(outcome.seconds, 3),
        "resumed_files": outcome.resumed,
        "already_complete": outcome.already_complete,
        "file_system_notes": outcome.notes,
    }


def upload_report(upload: Upload) -> Report:
    """What `upload` would send."""
    return {**_upload(upload), "dry_run": True}


def uploaded_report(uploaded: Uploaded) -> Report:
    """What `upload` sent."""
    return {
        **_upload(uploaded.upload),
        "dry_run": False,
        "url": uploaded.url,
        "commit": uploaded.commit,
        "seconds": round(uploaded.seconds, 3),
        "already_complete": uploaded.already_complete,
    }


def _upload(upload: Upload) -> Report:
    return {
        "path": str(upload.out),
        "repo_id": upload.repo_id,
        "revision": upload.revision,
        "new": not upload.exists,
        "private": upload.private,
        "files": _files(upload.files),
        "upload_size": upload.size,
        "card": upload.card,
        "notes": upload.notes,
    }


def verification_report(verification: Verification) -> Report:
    """What `verify` found."""
    return {
        "path": str(verification.path),
        "ok": verification.ok,
        "problems": verification.problems,
        "files": _files(verification.files),
        "tensors": verification.tensors,
        "unread_tensors": verification.unread,
        "read_size": verification.size,
        "seconds": round(verification.seconds, 3),
        "staged_ranks": verification.staged_ranks,
        "routers": None if verification.routers is None else asdict(verification.routers),
    }


def inspection_report(inspection: Inspection) -> Report:
    """What `inspect` found."""
    report = asdict(inspection)
    report["tensors_size"] = report.pop("size")
    for rank in report["ranks"]:
        rank["expert_size"] = rank.pop("size")
    return report


def analysis_report(analysis: Analysis) -> Report:
    """What `analyze` found, and for each placement the commands that serve by it."""
    return analysis.values


def trace_report(info: TraceInfo) -> Report:
    """What `trace info` found."""
    return asdict(info)


def export_report(exported: Export, out: Path | None) -> Report:
    """What `export` made; with the file's content if it was not written to `out`."""
    report = asdict(exported)
    content = report.pop("content")
    if exported.copies is None:
        del report["copies"], report["notes"]
    return {**report, "out": None, "content": content} if out is None else {**report, "out": str(out)}


def _files(files: Iterable[FileSummary]) -> list[Report]:
    return [asdict(file) for file in files]
