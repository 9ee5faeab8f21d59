"""Greedy decoding with vLLM's `LLM`, for tests that run without vLLM. Runs in vLLM's environment.

Reads one JSON object from standard input:

    model        directory
    prompts      lists of token ids
    max_tokens   tokens to generate for each prompt
    llm          more arguments of `vllm.LLM`; they override those in `FIXED`

Prints one line of JSON; everything else goes to standard error. Log-probabilities are written by `float.hex`, so that
equal text means equal bits. Each is a mapping from token id to log-probability, with all token ids that vLLM returned.

    tokens            [prompt][position]
    logprobs          [prompt][position] of the generated tokens
    prompt_logprobs   [prompt][position] of the prompt's tokens after the first; null if `llm` has speculation
    routed            [prompt][token][layer][choice] if `llm` has enable_return_routed_experts, else null
    accepted_drafts   number of draft tokens that were accepted
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

TOP = 20  # the most that vLLM returns without further options

FIXED: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "max_model_len": 128,
    "max_num_seqs": 1,  # with batches, vLLM on the CPU does not give the same bits twice
    "skip_tokenizer_init": True,
    "attention_backend": "CPU_MLA",  # vLLM's default on a CPU with AMX computes in bfloat16
    # vLLM's CPU kernel reads DeepSeek's queries, which have one dimension for all heads, as if they had one head.
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
    """The experts of a request's tokens; None if vLLM was not asked to return them."""
    return getattr(output.outputs[0], "routed_experts", None)


def to_hex(positions: Any) -> list[dict[str, str]]:
    """Log-probabilities of one prompt: for each position, those of some token ids."""
    return [{str(token): value.logprob.hex() for token, value in position.items()} for position in positions]


def main() -> None:
    """Answer the request on standard input."""
    answers = os.dup(1)
    os.dup2(2, 1)  # keeps what libraries and workers print out of the answer
    line = json.dumps(generate(json.load(sys.stdin)))
    os.write(answers, f"{line}\n".encode())


if __name__ == "__main__":
    main()
