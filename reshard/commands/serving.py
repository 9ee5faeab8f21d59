"""The commands that serve a checkpoint or an output with vLLM, and the one that records its traffic. Text only."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from ..checkpoint.location import Location
from ..placement.steps import DEFAULT_MIX, describe_mix
from ..placement.strategies import Balanced, Copies, FromFile, Linear, NodeZigzag, Strategy
from ..placement.time_model import DEFAULT_GPU

COPIES_OPTIONS = "--enable-eplb --eplb-config '{\"num_redundant_experts\": {redundant}}'"
"""What vLLM needs to serve a placement file in which experts have {redundant} copies in all."""


def serve_command(model: Location | str, ep_size: int, placement: str | None = None) -> str:
    """The command that serves an output, or with `placement` an original placed, on one node."""
    variable = "" if placement is None else f"RESHARD_PLACEMENT={shlex.quote(placement)} "
    return variable + _vllm(model, ep_size)


def record_command(model: Location | str, ep_size: int) -> str:
    """The command that serves an original and records which experts its tokens choose."""
    return f"RESHARD_TRACE=./trace {_vllm(model, ep_size)}"


def serve_commands(src: Location | str, strategies: Iterable[Strategy]) -> dict[str, tuple[str, ...]]:
    """For each strategy, the commands that serve the original `src` placed by it."""
    found: dict[str, tuple[str, ...]] = {}
    for strategy in strategies:
        match strategy:
            case Linear():
                found[strategy.name] = (serve_command(src, strategy.ep_size),)
            case NodeZigzag():
                found[strategy.name] = (serve_command(src, strategy.ep_size, f"{strategy.name}:{strategy.nodes}"),)
            case Balanced():
                given = {
                    "--nodes": strategy.nodes if strategy.nodes > 1 else None,
                    "--trace": strategy.trace,
                    "--gpu": strategy.gpu if strategy.gpu != DEFAULT_GPU else None,
                    "--batch-mix": describe_mix(strategy.mix) if strategy.mix != DEFAULT_MIX else None,
                }
                found[strategy.name] = _exported(src, strategy, given)
            case Copies():
                given = {
                    "--spare": strategy.spare,
                    "--trace": strategy.trace,
                    "--gpu": strategy.gpu if strategy.gpu != DEFAULT_GPU else None,
                    "--batch-mix": describe_mix(strategy.mix) if strategy.mix != DEFAULT_MIX else None,
                }
                options = COPIES_OPTIONS.replace("{redundant}", str(strategy.ep_size * strategy.spare))
                export, serve = _exported(src, strategy, given)
                found[strategy.name] = (export, f"{serve} {options}")
            case FromFile():
                found[strategy.name] = _exported(src, strategy, {"--map": strategy.path})
            case _:
                found[strategy.name] = (serve_command(src, strategy.ep_size, strategy.name),)
    return found


def _vllm(model: Location | str, ep_size: int) -> str:
    repo_id, _, commit = str(model).removeprefix("hf://").partition("@")
    name = [repo_id, "--revision", commit] if str(model).startswith("hf://") else [str(model)]
    return shlex.join(["vllm", "serve", *name, "--tensor-parallel-size", str(ep_size), "--enable-expert-parallel"])


def _exported(src: Location | str, strategy: Strategy, given: Mapping[str, object]) -> tuple[str, ...]:
    """The command that writes a placement file, and the one that serves with it."""
    file, options = f"{strategy.name}.json", [str(word) for item in given.items() if item[1] for word in item]
    export = ["reshard", "export", str(src), "--to", "vllm", "--ep", str(strategy.ep_size)]
    export += ["--strategy", strategy.name, *options, "--out", file]
    return shlex.join(export), serve_command(src, strategy.ep_size, file)
