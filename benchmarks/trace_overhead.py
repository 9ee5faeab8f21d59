"""What RESHARD_TRACE costs a step: serve the same prompts with recording and without, in turns.

    python benchmarks/trace_overhead.py MODEL          needs vLLM, with reshard installed beside it

Each process starts vLLM, serves some rounds, and prints its medians. A pair is one process with recording and one
without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from measure import median, spread

PAIRS = 4
ROUNDS = 12
PREFILL, DECODE = 512, 64


def main() -> None:
    """Print the ratio of step times, with recording over without."""
    if os.environ.get("MEASURE_ONE"):
        print(json.dumps(measure(sys.argv[1])))
        return
    ratios = []
    for pair in range(PAIRS):
        with tempfile.TemporaryDirectory() as directory:
            ways = [("with", {"RESHARD_TRACE": directory}), ("without", {})]
            took = {name: run(way) for name, way in (ways if pair % 2 else reversed(ways))}
        ratios.append([one / other for one, other in zip(took["with"], took["without"], strict=True)])
        print(f"pair {pair + 1}: milliseconds {took}", flush=True)
    for name, found in zip(
        (f"prefill of {PREFILL} tokens", "decoding step of one token"), zip(*ratios, strict=True), strict=True
    ):
        print(f"{name}: with over without {spread(found, '{:.3f}'.format)}")


def run(environment: Mapping[str, str]) -> list[float]:
    """Milliseconds of a prefill and of a decoding step, measured in a new process."""
    inherited = {name: value for name, value in os.environ.items() if name != "RESHARD_TRACE"}
    added = {"MEASURE_ONE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ran = subprocess.run(
        [sys.executable, *sys.argv],
        env={**inherited, **added, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    answer: list[float] = json.loads(ran.stdout.splitlines()[-1])
    return answer


def measure(model: str) -> list[float]:
    """Milliseconds of a prefill and of a decoding step, measured in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, max_model_len=1024, max_num_seqs=1, skip_tokenizer_init=True, enable_prefix_caching=False, seed=0)

    def seconds(tokens: int) -> float:
        sampling: Any = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": [7 + number % 200 for number in range(PREFILL)]}
        started = time.perf_counter()
        llm.generate([prompt], sampling, use_tqdm=False)
        return time.perf_counter() - started

    rounds = [(seconds(1), seconds(1 + DECODE)) for _ in range(ROUNDS + 1)][1:]
    prefill = median(first for first, _ in rounds)
    return [1e3 * prefill, 1e3 * median((both - first) / DECODE for first, both in rounds)]


if __name__ == "__main__":
    main()
