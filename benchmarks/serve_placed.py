"""What RESHARD_PLACEMENT gains in serving: an original with and without it, both served at once on the same GPUs.

    python benchmarks/step_times.py make DIR/original --gates FILE --layers 12
    python benchmarks/serve_placed.py serve DIR --json FILE
    python benchmarks/serve_placed.py report FILE                            prints Markdown

The model is `lifted_model`'s: R1's layers at their size, random experts that are never on disk, and routers that choose
by the prompt's text as those of a small trained model. Both servers stay up, and `vllm bench serve` asks them in turns,
so that repeats cost no start. The one that is not asked does nothing. Before that, each answers each number of requests
at once, unmeasured. With an odd repeat number the other one begins.
A server counts only if its log shows that it serves what it should: with the placement, or without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lifted_model import FILE, PLUGIN, VARIABLE
from reporting import say, write_json
from serve_ep import PLUGINS, RATIOS, Start, Workload, bench, machine, served, shown

VARIANTS = ("stock", "placed")
PLACED = re.compile(r"\d+ MoE layers are placed: [^\n]*")
BY_KERNEL = re.compile(r"routers: [^\n]*")
FOLDERS = re.compile(r"(?<= )/\S*/")  # of a placement file; records name the file alone
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def plan(repeats: int, concurrency: Sequence[int]) -> list[tuple[int, int, str]]:
    """(repeat, requests at once, variant) of each run, in order."""
    return [
        (repeat, at_once, variant)
        for repeat in range(repeats)
        for at_once in concurrency
        for variant in (VARIANTS if repeat % 2 == 0 else reversed(VARIANTS))
    ]


def workload_of(options: argparse.Namespace) -> Workload:
    """The servers' options and their requests."""
    capture = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size <= max(options.concurrency)]
    graphs = ["--compilation-config", json.dumps({**GRAPHS, "cudagraph_capture_sizes": capture})]
    arguments = ["--load-format", "dummy", "--kv-cache-memory-bytes", str(options.kv_bytes)]
    arguments += ["--gpu-memory-utilization", "0.4", *(["--enforce-eager"] if options.eager else graphs)]
    arguments += options.serve_arguments.split()
    return Workload(
        options.gpus, options.input, options.output, options.concurrency, options.rounds, options.least, {}, arguments
    )


def serve(options: argparse.Namespace) -> None:
    """Start both servers, ask them in turns as far as time allows; write each result to the file at once."""
    began, workload, models = time.monotonic(), workload_of(options), options.directory
    record: dict[str, Any] = {"workload": asdict(workload), "machine": machine(), "said": {}, "runs": []}
    with contextlib.ExitStack() as stack:
        addresses = start_all(stack, models, workload, options.placement)
        say(f"{time.monotonic() - began:.0f} s: both servers are up")
        record["said"] = {variant: said(log_of(models, variant).read_text(), variant) for variant in VARIANTS}
        for at_once in workload.concurrency:  # once, a server's first run had a pause of some seconds
            for variant in VARIANTS:
                bench(addresses[variant], models / "original", replace(workload, least=at_once, rounds=1), at_once, 0)
        longest = 0.0
        for repeat, at_once, variant in plan(options.repeats, workload.concurrency):
            if time.monotonic() - began + longest > options.seconds:
                say("no time for another run")
                break
            started = time.monotonic()
            found = bench(addresses[variant], models / "original", workload, at_once, 1 + repeat)
            longest = max(longest, time.monotonic() - started)
            record["runs"].append({"repeat": repeat, "concurrency": at_once, "variant": variant, **found})
            write_json(options.json, record)
            say(
                f"{time.monotonic() - began:.0f} s: repeat {repeat}, {at_once} at once, {variant}: "
                f"{found['request_throughput']:.3f} requests/s, TPOT {found['mean_tpot_ms']:.3f} ms"
            )


def start_all(stack: contextlib.ExitStack, models: Path, workload: Workload, placement: str) -> dict[str, str]:
    """Start the servers at the same time; return their addresses. `stack` ends them."""
    lifted = {VARIABLE: str((models / "original" / FILE).resolve()), "VLLM_USE_DEEP_GEMM": "0"}
    lifted["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"

    def enter(variant: str) -> tuple[str, Any]:
        placed = {"RESHARD_PLACEMENT": placement} if variant == "placed" else {}
        server = served(models, Start(0, "tp", "linear"), workload, log_of(models, variant), {**lifted, **placed}, ALL)
        address = server.__enter__()
        stack.push(server)
        return variant, address

    with ThreadPoolExecutor(len(VARIANTS)) as pool:
        return dict(pool.map(enter, VARIANTS))


ALL = {**PLUGINS, **PLUGIN}


def log_of(models: Path, variant: str) -> Path:
    """The file of a server's log."""
    return models / "logs" / f"{variant}.log"


def said(log: str, variant: str) -> list[str]:
    """What a server's log says of its placement; RuntimeError if that is not what it should serve."""
    wanted = variant == "placed"
    if bool(PLACED.search(log)) != wanted:
        raise RuntimeError(f"{variant}: its log {'does not say' if wanted else 'says'} that it is placed")
    found = sorted({line[0] for pattern in (PLACED, BY_KERNEL) for line in pattern.finditer(log)})
    return [FOLDERS.sub("", line) for line in found]


# Report


def report(record: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    columns = ["at once", "repeats", "stock, requests/s", "stock, TTFT, ms", "stock, TPOT, ms", *RATIOS.values()]
    lines = [
        f"{', '.join(sorted(set(record['machine']['gpus'])))}; vLLM {record['machine']['vllm']}. Workload: "
        f"{json.dumps(record['workload'])}.",
        "",
        "Medians over repeats (minimum to maximum); ratios are placed over stock in the same repeat.",
        "",
        f"| {' | '.join(columns)} |",
        f"| ---: | ---: | --- | --- | --- |{' --- |' * len(RATIOS)}",
    ]
    return "\n".join([*lines, *rows(record["runs"])])


def rows(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows of the table."""
    for at_once in sorted({run["concurrency"] for run in runs}):
        of = {(run["variant"], run["repeat"]): run for run in runs if run["concurrency"] == at_once}
        both = sorted(repeat for variant, repeat in of if variant == "stock" and ("placed", repeat) in of)
        if not both:
            continue
        stock = [shown([of["stock", repeat][name] for repeat in both]) for name in RATIOS]
        found = [shown([of["placed", repeat][name] / of["stock", repeat][name] for repeat in both]) for name in RATIOS]
        yield f"| {at_once} | {len(both)} | {' | '.join([*stock, *found])} |"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    stages.add_parser("report", help="print the results in Markdown").add_argument("json", type=Path, metavar="FILE")
    serving = stages.add_parser("serve", help="serve and measure")
    serving.add_argument("directory", type=Path, help="directory with the model `original`")
    serving.add_argument("--json", type=Path, required=True, metavar="FILE", help="file of results")
    serving.add_argument("--placement", default="zigzag", help="name, or absolute path of a file (default zigzag)")
    serving.add_argument("--gpus", type=int, default=8, help="GPUs, each with one EP rank of both servers (default 8)")
    serving.add_argument("--input", type=int, default=1024, help="tokens of a prompt (default 1024)")
    serving.add_argument("--output", type=int, default=128, help="tokens of an answer (default 128)")
    serving.add_argument("--concurrency", type=int, nargs="+", default=[64, 512], help="requests at once")
    serving.add_argument("--rounds", type=int, default=2, help="requests per concurrent request (default 2)")
    serving.add_argument("--least", type=int, default=256, help="minimum number of requests (default 256)")
    serving.add_argument("--repeats", type=int, default=3)
    serving.add_argument("--kv-bytes", type=int, default=10 << 30, help="KV cache of a server on each GPU")
    serving.add_argument("--eager", action="store_true", help="without CUDA graphs; for rehearsals")
    serving.add_argument("--serve-arguments", default="--moe-backend triton", help="more options of `vllm serve`")
    serving.add_argument("--seconds", type=float, default=540, help="begin no run that would end later (default 540)")
    return parser.parse_args(arguments)


def main() -> None:
    """Run one stage."""
    options = parse()
    if options.stage == "report":
        print(report(json.loads(options.json.read_text())))
    else:
        serve(options)


if __name__ == "__main__":
    sys.exit(main())
