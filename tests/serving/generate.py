"""Greedy decoding by vLLM's `LLM`, for a parent that has no vLLM. Runs in vLLM's environment.

Reads one JSON object from standard input:

    model        directory
    prompts      lists of token ids
    max_tokens   tokens to generate for each prompt
    llm          further arguments of `vllm.LLM`, or others in the place of `FIXED`

Prints one line of JSON; everything else goes to standard error. Log-probabilities are written by `float.hex`, so that
equal text is equal bits: for each prompt and position a mapping from token id, of all that vLLM returned.

    tokens            [prompt][position]
    logprobs          [prompt][position] of the generated tokens
    prompt_logprobs   [prompt][position] of the prompt's tokens after the first; null where `llm` has speculation
    routed            [prompt][token][layer][choice], where `llm` has enable_return_routed_experts
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

TOP = 20  # as many as vLLM returns unasked

FIXED: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 128,
    "max_num_seqs": 1,  # batched runs on the CPU do not repeat themselves, even unchanged
    "skip_tokenizer_init": True,
    "attention_backend": "CPU_MLA",  # the choice for a CPU with AMX computes in bfloat16
    # The CPU kernel reads DeepSeek's queries, one tensor dimension for heads, as if they had one head.
    "compilation_config": {"custom_ops": ["-rotary_embedding"]},
    "disable_log_stats": False,  # counts accepted drafts
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
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [to_hex(output.outputs[0].logprobs) for output in outputs],
        "prompt_logprobs": None if speculative else [to_hex(output.prompt_logprobs[1:]) for output in outputs],
        "routed": [None if found is None else found.tolist() for found in map(routed, outputs)],
        "accepted_drafts": sum(
            metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"
        ),
    }


def routed(output: Any) -> Any:
    """The experts of a request's tokens, None where vLLM was not asked for them."""
    return getattr(output.outputs[0], "routed_experts", None)


def to_hex(positions: Any) -> list[dict[str, str]]:
    """Log-probabilities of one prompt: for each position those of some token ids."""
    return [{str(token): value.logprob.hex() for token, value in position.items()} for position in positions]


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries and workers print is no answer
    line = json.dumps(generate(json.load(sys.stdin)))
    os.write(answers, f"{line}\n".encode())
