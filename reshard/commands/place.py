"""From an original to its output: `plan_placement` decides everything; `writing`, `merge` and `on_ray` carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..arguments import absolute, as_path, parse_size
from ..checkpoint.source import ANY, Hub
from ..errors import OutputError
from ..execute.fill import Progress
from ..execute.reflink import find_sharing
from ..execute.run import Outcome
from ..placement.strategies import Balanced, Copies, Strategy, Zigzag
from ..plan.files import Digests, fingerprint
from ..plan.sharing import Reflink
from ..record.manifest import Layout
from .earlier import earlier_placement
from .merge import part_of, write_merged
from .on_ray import Ray, write_on_ray
from .original import check_strategy, place_experts, read_original, refuse_holes
from .outline import DEFAULT_MAX_SHARD_SIZE, Writing
from .resharding import Resharding, plan_resharding
from .writing import write_resharding


def plan_placement(
    src: str | Path,
    out: str | Path,
    strategy: Strategy,
    *,
    hub: Hub = ANY,
    layout: Layout = "ranks",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
    ranks: Sequence[int] | None = None,
    restart: bool = False,
) -> Resharding:
    """Decide how the checkpoint `src` is rewritten into `out`. Reads no weights, writes nothing.

    Parameters:
        src: a checkpoint directory; a repository of the Hugging Face Hub, org/name or hf://org/name@revision, which is
            read from the cache if it is there, or else from the Hub; or a folder of an object store, s3://… or gs://…
        out: absent, empty, an unfinished run or a finished one. This function checks whether it can share blocks with
            `src`, and takes from such a run a placement that the same options may not make again
        strategy: decides where experts go; its ep_size R is 2 to E and need not divide E
        hub: how to ask the Hugging Face Hub
        layout: "ranks" writes files by EP rank; "source" writes a file for each file of the source
        max_shard_size: the most bytes of tensors in a file, or a text such as 5GB, 0.5GB or 4GiB; at least 1KB. With
            layout "source" files are as large as the source's
        reflink: "auto" shares disk blocks with the source if the file system can; "always" refuses if it cannot
        digests: which tensors to checksum; None for all, or with layout "source" for those that are copied
        allow_holes: take parts of tensors that were never written for the model's zeros
        check_source: compare each file of `src` with the checksum that it was downloaded by, if one is known
        ranks: write only the files of these EP ranks and those that every rank needs, as `stage` would copy them from
            the whole output; None for all
        restart: as `write_resharding` will be told; the placement is then made anew

    Raises:
        CheckpointError: the checkpoint is not sound, or has no checksums to check
        UnsupportedError: renumbering its experts is not known to be exact
        OutputError: `strategy`, `max_shard_size` or `reflink` does not fit

    """
    out_path = as_path(out, "out, the second argument,")
    shard_size = parse_size(max_shard_size, "--max-shard-size")
    original = read_original(src, hub)
    check_strategy(strategy, original)
    if isinstance(strategy, Copies):
        raise OutputError(
            f"{original.root}: an output has each expert once, and copies are for serving: write a placement file with "
            f"`reshard export --to vllm --ep {strategy.ep_size} --spare {strategy.spare}`"
        )
    if not allow_holes:
        refuse_holes(original)
    checkpoint = original.checkpoint
    writing = Writing(
        layout,
        shard_size,
        find_sharing(original.root, checkpoint.shards, checkpoint.directories, out_path, reflink),
        (Digests.COPIED if layout == "source" else Digests.ALL) if digests is None else digests,
        check_source,
        None if ranks is None else tuple(ranks),
    )
    request = strategy.request if isinstance(strategy, Balanced) else ""
    if request and not restart and (earlier := earlier_placement(out_path, strategy.name, original.shape)):
        resharding = plan_resharding(original, strategy.name, strategy.ep_size, earlier.placed, writing, request)
        if earlier.fingerprint in (fingerprint(resharding.plan), resharding.fingerprint):
            return resharding
    placed = place_experts(original, strategy)
    return plan_resharding(original, strategy.name, strategy.ep_size, placed, writing, request)


def place(
    src: str | Path,
    out: str | Path,
    strategy: Strategy,
    *,
    hub: Hub = ANY,
    layout: Layout = "ranks",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
    ranks: Sequence[int] | None = None,
    merge: bool = False,
    ray: Ray | None = None,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """Rewrite the checkpoint `src` into `out` so that linear placement becomes the placement of `strategy`.

    Call it again to resume after an interruption; if all is done, that is checked quickly and said. `restart` starts
    over, also if all is done. With `merge`, adds the files of `ranks` to `out`, where other runs may write other ranks
    at the same time. With `ray`, tasks on a Ray cluster write the files. Calls `progress` with the number of bytes just
    done. The other parameters and errors are those of `plan_placement`; also raises OutputError if `out` is refused or
    cannot be written.
    """
    whole = as_path(out, "out, the second argument,")
    resharding = plan_placement(
        src if ray is None else absolute(src),
        part_of(whole, ranks) if merge else whole,
        strategy,
        hub=hub,
        layout=layout,
        max_shard_size=max_shard_size,
        reflink=reflink,
        digests=digests,
        allow_holes=allow_holes,
        check_source=check_source,
        ranks=ranks,
        restart=restart,
    )
    if ray is not None:
        if merge:
            raise OutputError(f"{whole}: --merge does not go with --ray, whose tasks write all ranks")
        return write_on_ray(resharding, whole, cluster=ray, restart=restart, workers=workers, progress=progress)
    write = write_merged if merge else write_resharding
    return write(resharding, whole, restart=restart, workers=workers, progress=progress)


def zigzag(
    src: str | Path,
    out: str | Path,
    ep_size: int,
    *,
    hub: Hub = ANY,
    layout: Layout = "ranks",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE,
    reflink: Reflink = "auto",
    digests: Digests | None = None,
    allow_holes: bool = False,
    check_source: bool = False,
    ranks: Sequence[int] | None = None,
    merge: bool = False,
    ray: Ray | None = None,
    restart: bool = False,
    workers: int | None = None,
    progress: Progress = lambda written: None,
) -> Outcome:
    """`place` with experts dealt round-robin to `ep_size` EP ranks."""
    return place(
        src,
        out,
        Zigzag(ep_size),
        hub=hub,
        layout=layout,
        max_shard_size=max_shard_size,
        reflink=reflink,
        digests=digests,
        allow_holes=allow_holes,
        check_source=check_source,
        ranks=ranks,
        merge=merge,
        ray=ray,
        restart=restart,
        workers=workers,
        progress=progress,
    )
