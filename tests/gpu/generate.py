"""Greedy decoding with vLLM's `LLM` on the GPU, one process per EP rank. Runs in an environment with vLLM.

Reads one JSON object from standard input: `model`, `prompts` (lists of token ids), `max_tokens`, `llm` (arguments of
`vllm.LLM`), `repeats` (how often to answer; the last answer is printed). Prints one line of JSON; everything else goes
to standard error. Log-probabilities are written by `float.hex`, so that equal text means equal bits.

    tokens            [prompt][position]
    logprobs          [prompt][position] of the generated tokens: token id to log-probability
    prompt_logprobs   the same for the prompt's tokens after the first; null if `llm` has speculation
    drafts            numbers of drafted and accepted tokens
    digests           [repeat] of tokens and log-probabilities
    routed            [prompt][token][layer][choice] if `llm` has enable_return_routed_experts, else null
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

TOP = 20
PR_SET_PDEATHSIG = 1  # of prctl(2)
FIXED: dict[str, Any] = {
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "max_model_len": 512,
    "max_num_batched_tokens": 2048,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
    "seed": 0,
}


def generate(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a request."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=request["model"], **{**FIXED, **request["llm"]})
    speculative = "speculative_config" in request["llm"]
    sampling = SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=TOP,
        prompt_logprobs=None if speculative else TOP,
    )
    digests = []
    for _ in range(request["repeats"]):
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
        answer = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [to_hex(output.outputs[0].logprobs) for output in outputs],
            "prompt_logprobs": None if speculative else [to_hex(output.prompt_logprobs[1:]) for output in outputs],
        }
        digests.append(hashlib.sha256(json.dumps(answer).encode()).hexdigest()[:12])
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    drafts = [metrics.get(f"vllm:spec_decode_num_{what}_tokens") for what in ("draft", "accepted")]
    routed = [getattr(output.outputs[0], "routed_experts", None) for output in outputs]
    return {
        **answer,
        "drafts": drafts,
        "digests": digests,
        "routed": [None if experts is None else experts.tolist() for experts in routed],
    }


def to_hex(positions: Any) -> list[dict[str, str]]:
    """Log-probabilities of one prompt: for each position, those of some token ids."""
    return [{str(token): value.logprob.hex() for token, value in position.items()} for position in positions]


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed pytest would leave us on the GPU
    answers = os.dup(1)
    os.dup2(2, 1)  # keeps what libraries and workers print out of the answer
    line = json.dumps(generate(json.load(sys.stdin)))
    os.write(answers, f"{line}\n".encode())
    os._exit(0)  # an engine that shares the process with its driver may hang while it shuts down
