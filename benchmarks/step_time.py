"""Compare the steps of an output, or of the original recorded or placed, with those of the original on a GPU.

Each model is loaded in a process of its own. The processes take turns; only one serves at a time. If a step is one CUDA
graph, as a decoding step is, the GPU times that graph; otherwise it times the step from its first to its last
operation. Wall-clock times are given too.

python step_time.py ORIGINAL OUTPUT [--json FILE] [--rounds N]
python step_time.py ORIGINAL ORIGINAL --record [--json FILE] [--rounds N]
python step_time.py ORIGINAL ORIGINAL --placed [--json FILE] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entry_points import announce, python_path

DECODE = (1, 8, 64)  # sequences at once
PREFILL = (256, 2048, 8192)  # tokens of one prompt
PROMPT, STEPS = 16, 48  # for decoding: tokens in the prompt, and timed steps after the first generated token
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "enable_expert_parallel": True,  # on one rank: placements want it
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "max_model_len": max(PREFILL) + 1,
    "max_num_batched_tokens": max(PREFILL),
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 29,
    "compilation_config": {
        "cudagraph_capture_sizes": [*DECODE],
        "inductor_compile_config": {"combo_kernels": False},
    },
    "async_scheduling": False,
    "seed": 0,
}

# Keeps PyTorch from choosing compiled kernels by timing them: the processes might end up with different kernels.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TORCHINDUCTOR_DETERMINISTIC": "1",
}


def serve(model: str) -> None:
    """Answer each line `[kind, size]` of standard input with a list: [GPU ms, wall ms, CUDA graphs] of each step."""
    answers = os.dup(1)
    os.dup2(2, 1)
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.gpu_worker import Worker

    replays: list[tuple[Any, Any]] = []
    steps: list[tuple[list[tuple[Any, Any]], tuple[Any, Any], float]] = []
    llm = LLM(model=model, **ENGINE)
    replay, execute = torch.cuda.CUDAGraph.replay, Worker.execute_model  # as plugins have left them

    def events() -> tuple[Any, Any]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timed_replay(graph: Any) -> None:
        before, after = events()
        before.record()
        replay(graph)
        after.record()
        replays.append((before, after))

    def timed_execute(worker: Any, scheduled: Any) -> Any:
        if not scheduled.total_num_scheduled_tokens:  # a call that only reports finished requests
            return execute(worker, scheduled)
        torch.cuda.synchronize()
        replays.clear()
        before, after = events()
        started = time.perf_counter()
        before.record()
        result = execute(worker, scheduled)
        after.record()
        torch.cuda.synchronize()
        steps.append((replays.copy(), (before, after), 1000 * (time.perf_counter() - started)))
        return result

    torch.cuda.CUDAGraph.replay, Worker.execute_model = timed_replay, timed_execute
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        kind, size = json.loads(line)
        length, count = (PROMPT, size) if kind == "decode" else (size, 1)
        prompts = [{"prompt_token_ids": [random.randrange(2, 1000) for _ in range(length)]} for _ in range(count)]
        sampling = SamplingParams(
            temperature=0, max_tokens=1 + (STEPS if kind == "decode" else 0), ignore_eos=True, detokenize=False
        )
        steps.clear()
        llm.generate(prompts, sampling, use_tqdm=False)
        # the first step processes the prompts
        timed = steps[1:] if kind == "decode" else steps[:1]
        on_gpu = [graphs[0] if len(graphs) == 1 else whole for graphs, whole, _ in timed]
        times = [
            [a.elapsed_time(b), wall, len(graphs)] for (a, b), (graphs, _, wall) in zip(on_gpu, timed, strict=True)
        ]
        os.write(answers, f"{json.dumps(times)}\n".encode())
    os._exit(0)


class Served:
    """A model in a process of its own."""

    def __init__(self, model: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT, **environment},
        )

    def wait(self) -> None:
        """Wait until the model is loaded."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("vLLM did not start; see its messages above")

    def steps(self, kind: str, size: int) -> tuple[float, ...]:
        """Medians over the steps of one batch of prompts: GPU milliseconds, wall milliseconds, CUDA graphs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, size]) + "\n")
        self._process.stdin.flush()
        return tuple(map(statistics.median, zip(*json.loads(self._process.stdout.readline()), strict=True)))

    def end(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def compare(served: Mapping[str, Served], rounds: int) -> Iterator[dict[str, Any]]:
    """For each kind of step and size, yield what `steps` gave in every round; in a round the models take turns."""
    for kind, sizes in (("decode", DECODE), ("prefill", PREFILL)):
        for size in sizes:
            for model in served.values():
                model.steps(kind, size)
            found: dict[str, list[tuple[float, ...]]] = {name: [] for name in served}
            for number in range(rounds):
                for name in list(served)[:: 1 if number % 2 == 0 else -1]:
                    found[name].append(served[name].steps(kind, size))
            yield {"kind": kind, "size": size, "milliseconds": found}


def line(row: dict[str, Any]) -> str:
    """A row of the table: the first model's medians, and the second model's ratios to it in the same round."""
    step = f"{row['kind']}, {row['size']} {'sequences' if row['kind'] == 'decode' else 'tokens'}"
    first, second = row["milliseconds"].values()
    cells = []
    for clock in (0, 1):
        cells.append(f"{statistics.median(times[clock] for times in first):.4f}")
        ratios = sorted(of_second[clock] / of_first[clock] for of_first, of_second in zip(first, second, strict=True))
        cells.append(f"{quantile(ratios, 0.5):.4f} ({quantile(ratios, 0.25):.4f} to {quantile(ratios, 0.75):.4f})")
    return f"| {step} | {' | '.join(cells)} |"


def quantile(values: Sequence[float], share: float) -> float:
    """The one of sorted `values` below which a share of them lies."""
    return values[round(share * (len(values) - 1))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, nargs="?")
    parser.add_argument("other", type=Path, nargs="?")
    parser.add_argument("--record", action="store_true", help="serve the second model with RESHARD_TRACE")
    parser.add_argument("--placed", action="store_true", help="serve the second model with RESHARD_PLACEMENT=zigzag")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    with tempfile.TemporaryDirectory() as temporary:
        site, trace = Path(temporary, "site"), Path(temporary, "trace")
        announce(site, {"reshard": "reshard.vllm:register"})
        plugin = {"PYTHONPATH": python_path(site, Path(__file__).parents[1])}
        other = "recorded" if arguments.record else "placed" if arguments.placed else "output"
        more = {"recorded": {"RESHARD_TRACE": str(trace)}, "placed": {"RESHARD_PLACEMENT": "zigzag"}}.get(other, {})
        served = {
            "original": Served(arguments.original, plugin),
            other: Served(arguments.other, plugin | more),
        }
        for model in served.values():
            model.wait()
        heads = [
            head for clock in ("GPU", "wall") for head in (f"original, ms ({clock})", f"{other} over it (quartiles)")
        ]
        print(f"| step | {' | '.join(heads)} |\n| --- |{' --- |' * len(heads)}")
        rows = []
        for row in compare(served, arguments.rounds):
            rows.append(row)
            print(line(row), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows))
        for model in served.values():
            model.end()
        if arguments.record:
            recorded = sum(path.stat().st_size for path in trace.glob("*.trace"))
            print(f"recorded: {recorded} bytes")
            if recorded < 1 << 16:
                raise RuntimeError(f"only {recorded} bytes were recorded: the cost of recording was not measured")
