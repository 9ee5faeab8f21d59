"""What `inspect`, `trace info` and `upload` print as text. Decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..commands.serving import serve_command
from ..placement.permutations import describe_ranks
from .render import bytes_text, time_text
from .terminal import Whole

if TYPE_CHECKING:
    from ..commands.inspect import Inspection
    from ..commands.trace_info import TraceInfo
    from ..commands.upload import Upload, Uploaded


def describe_inspection(inspection: Inspection) -> list[str]:
    """The lines of `inspect`."""
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
        f"  tensors      {inspection.tensors} in {len(inspection.files)} files, {bytes_text(inspection.size)}",
        f"    experts    {bytes_text(inspection.expert_size)}",
        f"    routers    {bytes_text(inspection.router_size)}",
        f"    the rest   {bytes_text(rest)}",
    ]
    lines.append(f"  plugin       {inspection.plugin}")
    lines += [f"  note         {note}" for note in inspection.notes]
    if inspection.ep_size is None:
        return lines
    lines.append(f"  placement    {inspection.strategy} for {inspection.ep_size} EP ranks" + _uniformity(inspection))
    if inspection.staged_ranks is not None:
        here = describe_ranks(inspection.staged_ranks)
        lines.append(f"  staged       EP ranks {here}; the other ranks' files are not here")
    lines.append("    rank   expert bytes   logical experts, in physical order")
    for rank in inspection.ranks:
        experts = " ".join(map(str, rank.experts))
        lines.append(f"    {rank.rank:4}   {bytes_text(rank.size):>12}   {experts}")
    if not inspection.resharded:
        command = serve_command(inspection.path, inspection.ep_size, inspection.strategy)
        lines.append(Whole(f"  serve it so, with nothing rewritten:  {command}"))
    return lines


def _uniformity(inspection: Inspection) -> str:
    return ", the same in every layer" if inspection.uniform else f"; layers differ, this is {inspection.moe_layers[0]}"


def describe_trace(info: TraceInfo) -> list[str]:
    """The lines of `reshard trace info`."""
    lines = [f"{info.path}: {info.tokens} tokens in {len(info.streams)} recordings"]
    for stream in info.streams:
        experts = f" of {stream.num_experts}" if stream.num_experts else ""
        lines += [
            f"  {stream.where}",
            f"    recorded by {stream.by}",
            f"    {stream.tokens} tokens, {len(stream.busiest)} MoE layers, top {stream.top_k}{experts} experts",
        ]
        if stream.busiest:
            layer, highest = max(stream.busiest.items(), key=lambda item: item[1])
            median = sorted(stream.busiest.values())[len(stream.busiest) // 2]
            lines.append(
                f"    busiest expert over mean: {median:.2f} in the median layer, at most {highest:.2f} ({layer})"
            )
    return lines


def describe_upload(upload: Upload) -> list[str]:
    """The lines of `upload --dry-run`, with the card that is made."""
    where = f"{upload.repo_id}, branch {upload.revision}" if upload.revision else upload.repo_id
    lines = [
        *(f"note: {note}" for note in upload.notes),
        f"would upload {len(upload.files)} files, {bytes_text(upload.size)}, from {upload.out} to {where}, "
        + ("which is there" if upload.exists else f"a new{' private' * upload.private} repository"),
    ]
    if upload.card is not None:
        lines += ["with this model card:", "", *(Whole(line) for line in upload.card.splitlines())]
    return lines


def describe_uploaded(uploaded: Uploaded) -> list[str]:
    """The lines of `upload`."""
    upload = uploaded.upload
    what = f"{len(upload.files)} files, {bytes_text(upload.size)}"
    if uploaded.already_complete:
        done = f"already complete: {uploaded.url} has all {what}; nothing was sent"
    else:
        done = f"uploaded {what}, in {time_text(uploaded.seconds)}; commit {uploaded.commit}"
    return [*(f"note: {note}" for note in upload.notes), done, Whole(f"see it:  {uploaded.url}")]
