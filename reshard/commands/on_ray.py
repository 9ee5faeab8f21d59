"""Carries out a `Resharding` on a Ray cluster: one task for each output file.

    all nodes share OUT:     the run is here, as always, with its journal; a task on any node writes each file
    with `ranks_per_node`:   each node has a run for its ranks, to its own disk; a task on that node writes each file

What runs where and when, and what the end of a node means, is Ray's business; the same command resumes. An attempt
that Ray gave up may still be writing: so each has a folder of its own, and moves the file from there.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import OutputError, ReshardError
from ..execute.destination import make_directory, sync_directory
from ..execute.fetching import sources_of
from ..execute.fill import Progress, write_file
from ..execute.journal import Written
from ..execute.run import Outcome, Work, default_workers
from ..plan.files import OutputFile, Plan
from .resharding import Resharding, for_ranks
from .writing import write_resharding

ATTEMPTS = ".reshard-ray"  # the folder in OUT that has those of unfinished attempts


@dataclass(frozen=True, slots=True)
class Ray:
    """A cluster: its `address`, as `ray.init` takes it, and how many EP ranks a node serves, if from its own disk."""

    address: str = "auto"
    ranks_per_node: int | None = None


def write_on_ray(
    resharding: Resharding, out: Path, *, cluster: Ray, restart: bool, workers: int | None, progress: Progress
) -> Outcome:
    """Carry out `resharding`, whose source all nodes must see by its path, with at most `workers` tasks a node.

    Raises what `write_resharding` does; OutputError also if Ray has no such cluster, or gives a task up.
    """
    nodes = _connect(cluster.address)
    out, at_once = out.absolute(), workers or default_workers(resharding.plan.source.root)
    if cluster.ranks_per_node is None:
        copy = partial(_copy, at_once=at_once * len(nodes), where="SPREAD")
        return write_resharding(resharding, out, restart=restart, progress=progress, copy=copy)
    import ray

    count, left = divmod(resharding.ep_size, per_node := cluster.ranks_per_node)
    if left or count > len(nodes) or resharding.ranks is not None:
        has = f"does not fit {resharding.ep_size} EP ranks on {len(nodes)} nodes of Ray, or goes with --ranks"
        raise OutputError(f"{out}: --ranks-per-node {per_node} {has}")
    common, runs, found = ray.put(resharding), {}, []
    for number, node in enumerate(nodes[:count]):
        ranks = tuple(range(number * per_node, (number + 1) * per_node))
        task = ray.remote(_write_node).options(num_cpus=0, scheduling_strategy=node)
        runs[task.remote(common, ranks, out, at_once, node, restart)] = f"{out}, EP ranks {ranks[0]}-{ranks[-1]}"
    while runs:  # also if one fails: the others need not begin again
        (done,), _ = ray.wait([*runs])
        found.append((done, runs.pop(done)))
        progress(resharding.work // count)
    outcomes: list[Outcome] = [_result(task, what) for task, what in found]
    files = {file.name: file for outcome in outcomes for file in outcome.files}
    return replace(
        max(outcomes, key=lambda outcome: outcome.seconds),
        files=tuple(files.values()),
        size=sum(file.size for file in files.values()),
        resumed=sum(outcome.resumed for outcome in outcomes),
        already_complete=all(outcome.already_complete for outcome in outcomes),
    )


def _write_node(whole: Resharding, ranks: tuple[int, ...], out: Path, at_once: int, node: Any, again: bool) -> Outcome:
    copy = partial(_copy, at_once=at_once, where=node)
    return write_resharding(for_ranks(whole, ranks), out, restart=again, copy=copy)


def _copy(work: Work, *, at_once: int, where: Any) -> None:
    """Do `work` by tasks, `at_once` at a time, that Ray runs `where` its scheduling strategy says."""
    import ray

    task, common = ray.remote(_write).options(scheduling_strategy=where), ray.put(replace(work.plan, files=()))
    left, running = list(reversed(work.files)), dict[Any, OutputFile]()
    try:
        while left or running:
            while left and len(running) < at_once:
                file = left.pop()
                running[task.remote(common, file, work.out)] = file
            (done,), _ = ray.wait([*running])
            path = work.out / (file := running.pop(done)).name
            written = _result(done, str(path))
            if path not in path.parent.iterdir():  # a listing, because NFS may remember that it was not there
                raise OutputError(f"{path}: was written on another node; share OUT, or give --ranks-per-node")
            work.record(written)
            work.progress(file.size)
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)
        shutil.rmtree(work.out / ATTEMPTS, ignore_errors=True)


def _write(plan: Plan, file: OutputFile, out: Path) -> Written:
    own, sources = out / ATTEMPTS / uuid.uuid4().hex, sources_of(plan.source, plan.source_files, plan.headers)
    make_directory((own / file.name).parent)
    written = write_file(file, sources, plan.sharing, own, lambda count: None)
    sync_directory((own / file.name).rename(out / file.name).parent)
    return written


def _result(task: Any, what: str) -> Any:
    """What a task returned; OutputError if Ray has given it up."""
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        if isinstance(cause := getattr(error, "cause", None), ReshardError):
            raise cause from error
        said = " ".join(str(error).split())
        raise OutputError(f"{what}: Ray gave its task up: {said:.400}; rerun the command to resume") from error


def _connect(address: str) -> list[Any]:
    """Connect. Returns where the nodes that serve are, in the order in which vLLM gives them ranks: this one first."""
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if at := re.fullmatch(r"([^/]+):(\d+)", address):  # Ray would try for minutes
            socket.create_connection((at[1], int(at[2])), 10).close()
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # one task's error is the run's; others fail alike
        ray.init(address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    except ImportError as error:
        raise OutputError("--ray needs Ray: pip install 'reshard[ray]'") from error
    except (OSError, RuntimeError, ValueError) as error:
        said = f"no cluster there: {' '.join(str(error).split()):.200}"
        raise OutputError(f"--ray {address}: {said}; start one by `ray start --head`") from error
    alive = [node for node in ray.nodes() if node["Alive"]]
    serving = [node for node in alive if node["Resources"].get("GPU")] or alive  # the head may have none
    here = ray.get_runtime_context().get_node_id()
    order = sorted((node["NodeID"] != here, node["NodeManagerAddress"], node["NodeID"]) for node in serving)
    return [NodeAffinitySchedulingStrategy(node, soft=False) for _, _, node in order]
