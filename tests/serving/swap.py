"""Runs `benchmarks/step_times.py measure`, and has it answer prompts first, under placements that are swapped in place.

    python swap.py PLACEMENT,… ANSWERS measure DIRECTORY …              in vLLM's environment

Writes [placement, answers] to the file ANSWERS, in the order given: tokens, and log-probabilities as `float.hex`. With
`--rounds 0` it measures nothing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import step_times
import torch
from generate import to_hex
from vllm import SamplingParams

PROMPTS = [[5], [7, 11], [3, 101, 45, 90], list(range(20, 31))]


def main() -> None:
    """Start, swap and answer, then measure."""
    names, file = sys.argv[1].split(","), Path(sys.argv[2])
    options = step_times.parse(sys.argv[3:])
    if options.rank is None:
        step_times.run_ranks([sys.executable, __file__, *sys.argv[1:]], options)
        return
    own = step_times.Rank(options)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=20)
    answers = []
    for name in names:
        with torch.inference_mode():
            own.swaps.swap(name)
        outputs = own.llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
        found = [[list(output.outputs[0].token_ids), to_hex(output.outputs[0].logprobs)] for output in outputs]
        answers.append([name, found])
    if own.rank == 0:
        file.write_text(json.dumps(answers))
    if options.rounds:
        step_times.work(own, options)
    os._exit(0)  # an engine that shares the process with its driver may hang while it shuts down


if __name__ == "__main__":
    main()
