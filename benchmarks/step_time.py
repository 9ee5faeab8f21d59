"""How long a decoding and a prefill step take with an output, beside its original: real vLLM on one GPU.

Both models stay loaded in processes of their own, and take turns; only one of them runs at a time. Decoding is timed
by the GPU, from the start to the end of the replayed CUDA graph; prefill from the first to the last operation of the
step, on the GPU too. The clock on the wall is given beside both.

python step_time.py ORIGINAL OUTPUT [--json FILE] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DECODE = (1, 8, 64)  # sequences at once
PREFILL = (256, 2048, 8192)  # tokens of one prompt
PROMPT, STEPS = 16, 48  # tokens before and after the first one, where decoding is timed
LLM: dict[str, Any] = {
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "max_model_len": max(PREFILL) + 1,
    "max_num_batched_tokens": max(PREFILL),
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 2 << 30,
    "compilation_config": {"cudagraph_capture_sizes": [*DECODE]},
    "async_scheduling": False,
    "seed": 0,
}


def serve(model: str) -> None:
    """Answer lines of standard input, `[kind, size]`, with `[milliseconds on the GPU, on the wall]` for each step."""
    answers = os.dup(1)
    os.dup2(2, 1)
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.gpu_worker import Worker

    replays: list[tuple[Any, Any]] = []
    steps: list[tuple[Any, Any, float]] = []
    replay, execute = torch.cuda.CUDAGraph.replay, Worker.execute_model

    def events() -> tuple[Any, Any]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed_replay(graph: Any) -> None:
        before, after = events()
        before.record()
        replay(graph)
        after.record()
        replays.append((before, after))

    def timed_execute(*arguments: Any, **options: Any) -> Any:
        torch.cuda.synchronize()
        before, after = events()
        started = time.perf_counter()
        before.record()
        result = execute(*arguments, **options)
        after.record()
        torch.cuda.synchronize()
        steps.append((before, after, 1000 * (time.perf_counter() - started)))
        return result

    llm = LLM(model=model, **LLM)
    torch.cuda.CUDAGraph.replay, Worker.execute_model = timed_replay, timed_execute
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        kind, size = json.loads(line)
        length, count = (PROMPT, size) if kind == "decode" else (size, 1)
        prompts = [{"prompt_token_ids": [random.randrange(2, 1000) for _ in range(length)]} for _ in range(count)]
        sampling = SamplingParams(
            temperature=0, max_tokens=1 + (STEPS if kind == "decode" else 0), ignore_eos=True, detokenize=False
        )
        replays.clear()
        steps.clear()
        llm.generate(prompts, sampling, use_tqdm=False)
        torch.cuda.synchronize()
        # the first step is the prompts', and a graph of decoding is one graph for the whole step
        timed = steps[1:-1] if kind == "decode" else steps[:1]
        on_gpu = replays[-len(timed) :] if kind == "decode" else [step[:2] for step in timed]
        assert kind == "prefill" or len(replays) >= len(timed), f"{len(replays)} graphs replayed in {len(timed)} steps"
        times = [[a.elapsed_time(b), step[2]] for (a, b), step in zip(on_gpu, timed, strict=True)]
        os.write(answers, f"{json.dumps(times)}\n".encode())
    os._exit(0)


class Served:
    """A model in a process of its own."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"},
        )

    def wait(self) -> None:
        """Until it is loaded."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("vLLM did not start; what it said is above")

    def steps(self, kind: str, size: int) -> tuple[float, float]:
        """The medians of a run's steps: milliseconds on the GPU and on the wall."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, size]) + "\n")
        self._process.stdin.flush()
        gpu, wall = zip(*json.loads(self._process.stdout.readline()), strict=True)
        return statistics.median(gpu), statistics.median(wall)

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def compare(original: Served, output: Served, rounds: int) -> list[dict[str, Any]]:
    """For each kind of step and size the milliseconds of every round, [original, output] in turns."""
    rows = []
    for kind, sizes in (("decode", DECODE), ("prefill", PREFILL)):
        for size in sizes:
            for served in (original, output):
                served.steps(kind, size)
            pairs: list[list[tuple[float, float]]] = []
            for number in range(rounds):
                order = (original, output) if number % 2 == 0 else (output, original)
                found = {served: served.steps(kind, size) for served in order}
                pairs.append([found[original], found[output]])
            rows.append({"kind": kind, "size": size, "rounds": pairs})
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table: medians, and the ratio of paired runs with its spread."""
    cells = [f"| {row['kind']}, {row['size']} {'sequences' if row['kind'] == 'decode' else 'tokens'} |"]
    for clock in (0, 1):
        before = [pair[0][clock] for pair in row["rounds"]]
        after = [pair[1][clock] for pair in row["rounds"]]
        ratios = sorted(late / early for early, late in zip(before, after, strict=True))
        cells.append(
            f"{statistics.median(before):.4f} | {statistics.median(after):.4f} | "
            f"{statistics.median(ratios):.4f} ({quantile(ratios, 0.25):.4f} to {quantile(ratios, 0.75):.4f}) |"
        )
    return " ".join(cells)


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values the one below which `share` of them are."""
    return values[round(share * (len(values) - 1))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    both = [Served(arguments.original), Served(arguments.output)]
    for served in both:
        served.wait()
    print("| step | original, ms on the GPU | output | ratio (quartiles) | original, ms on the wall | output | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found = compare(*both, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    for served in both:
        served.end()
