"""Puts vLLM on the GPU to sleep at level 2 and reloads its weights. Runs in an environment with vLLM.

Reads one JSON object from standard input: `model`, `prompts`, `max_tokens`, `llm`. Prints one line of JSON: the tokens
that were generated after each step.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import generate


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=request["model"], **{**generate.FIXED, **request["llm"], "enable_sleep_mode": True})
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)

    def tokens() -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, sampling, use_tqdm=False)]

    found = {"at first": tokens()}
    llm.collective_rpc("reload_weights")
    found["reload"] = tokens()
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    found["sleep 2 and reload"] = tokens()
    return found


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)
    line = json.dumps(run(json.load(sys.stdin)))
    os.write(answers, f"{line}\n".encode())
    os._exit(0)
