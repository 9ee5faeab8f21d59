"""What the map to placed experts costs in a decoding step: placed and stock routers in one process, in turns.

    python benchmarks/step_times.py make DIR --gates FILE --layers 5        the model (`lifted_model`), without weights
    python benchmarks/step_times.py place DIR --choices FILE --ep 1 --strategies zigzag --out PLACEMENTS
    python benchmarks/placed_step.py DIR --placements PLACEMENTS --json FILE

Two processes on one GPU differ by more than the map costs. So one vLLM serves the original with a placement, and its
decoding steps are captured as CUDA graphs several times: with the placed routers (`placed`), with the placed routers
without our kernel (`mapped`, as routers are served that it does not know), and twice with vLLM's own (`stock` and
`again`, the control). All graphs read the same weights and the same buffers. In a round each is replayed once with the
same tokens, in another order each time; the GPU times it by CUDA events.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import step_times
import torch
from reporting import gpus, installed, say, write_json
from step_times import Rank, run_ranks, shown

from reshard import __version__

TOKENS = (1, 8, 64)
BASE = "stock"
WARM_UP = 8  # rounds that are not counted


def graphs(own: Rank) -> dict[str, dict[int, Any]]:
    """The CUDA graphs of each variant, by the number of tokens."""
    wrapper = own.runner.model
    routers = [found.router for found in own.moe.values()]
    placed = [(type(router), router.reshard_kernel) for router in routers]
    if any(kernel is None or not kernel.agreed for _, kernel in placed):
        raise RuntimeError("our kernel does not route this model: there is nothing to compare")

    def captured() -> dict[int, Any]:
        wrapper.concrete_cudagraph_entries.clear()
        own.runner.capture_model()
        entries = wrapper.concrete_cudagraph_entries.items()
        return {key.num_tokens: entry.cudagraph for key, entry in entries if entry.cudagraph is not None}

    found = {"placed": captured()}
    for router in routers:
        router.reshard_answers_logical_ids()
    found["mapped"] = captured()
    for layer, router, (kind, _) in zip(own.moe.values(), routers, placed, strict=True):
        stock: Any = object.__new__(kind.__bases__[1])  # vLLM's own class, beside the mixin
        stock.__dict__.update(vars(router))
        if type(stock).__module__.partition(".")[0] != "vllm":
            raise RuntimeError(f"{type(stock)}: expected a class of vLLM")
        layer.router = stock
    found[BASE], found["again"] = captured(), captured()
    return found


def rounds(own: Rank, every: Mapping[str, Mapping[int, Any]], tokens: int, count: int, vocabulary: int) -> Any:
    """Milliseconds of each variant in `count` rounds."""
    own.runner._dummy_run(tokens, uniform_decode=True, profile_seq_lens=step_times.CONTEXT, skip_eplb=True)
    rng, names = random.Random(tokens), list(every)
    took: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(WARM_UP + count):
        own.put([rng.randrange(vocabulary) for _ in range(tokens)])
        torch.cuda.synchronize()
        for name in rng.sample(names, len(names)):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            every[name][tokens].replay()
            end.record()
            if turn >= WARM_UP:
                took[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [round(a.elapsed_time(b), 5) for a, b in spans] for name, spans in took.items()}


def work(own: Rank, options: argparse.Namespace, count: int) -> None:
    """Measure, and write the record."""
    with torch.inference_mode():
        about = own.about()
        every = graphs(own)
        rows = [{"tokens": tokens, "ms": rounds(own, every, tokens, count, options.vocabulary)} for tokens in TOKENS]
    machine = {name: installed(name) for name in ("vllm", "torch", "triton")}
    record = {
        "layers": len(own.layers),
        "machine": {"gpus": gpus("name,driver_version") or [], **machine, "reshard": __version__},
        "about": about,
        "rows": rows,
    }
    write_json(options.json, record)
    say("0 s: " + "\n0 s: ".join(report(record)))


def report(record: Mapping[str, Any]) -> Iterator[str]:
    """The table in Markdown: ratios to vLLM's own router in the same round, and microseconds a layer."""
    names = [name for name in record["rows"][0]["ms"] if name != BASE]
    yield f"| sequences | {BASE}, ms | {' | '.join(f'{name} / {BASE} | us a layer' for name in names)} |"
    yield f"| --- | --- |{' --- | --- |' * len(names)}"
    for row in record["rows"]:
        base = row["ms"][BASE]
        cells = []
        for name in names:
            pairs = list(zip(row["ms"][name], base, strict=True))
            more = statistics.median(1000 * (a - b) / record["layers"] for a, b in pairs)
            cells += [shown([a / b for a, b in pairs]), f"{more:+.2f}"]
        yield f"| {row['tokens']} | {statistics.median(base):.3f} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one process for the GPU, and in it the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path, help="directory of the model")
    parser.add_argument("--placements", type=Path, required=True, help="directory of placement files")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="file of results")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    mine = parser.parse_args(argv)
    decode = ",".join(f"{tokens}:1" for tokens in TOKENS)
    words = ["measure", mine.directory, "--placements", mine.placements, "--json", mine.json, "--ranks", 1]
    options = step_times.parse([*map(str, words), "--decode", decode, "--prefill", "1024:1"])
    if mine.rank is None:
        run_ranks([sys.executable, __file__, *sys.argv[1:]], options)
        print("\n".join(report(json.loads(mine.json.read_text()))))
    else:
        work(Rank(options), options, mine.rounds)
        sys.stdout.flush()
        os._exit(0)  # an engine that shares the process with its driver may hang while it shuts down


if __name__ == "__main__":
    main()
