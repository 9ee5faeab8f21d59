"""Prints what Transformers computes for a model: [prompt][position, without the first][token id] of log-probabilities.

python reference.py DIRECTORY PROMPTS       PROMPTS: JSON, lists of token ids; runs in vLLM's environment
"""

from __future__ import annotations

import json
import sys

import torch
import transformers


def main() -> None:
    """Print one line of JSON."""
    directory, prompts = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, :-1] for ids in json.loads(prompts)]
    print(json.dumps([torch.log_softmax(prompt, -1).tolist() for prompt in logits]))


if __name__ == "__main__":
    main()
