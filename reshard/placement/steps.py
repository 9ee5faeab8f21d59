"""Which tokens of a trace an engine computes in one step: a batch of decoding, or of prefill. Pure functions.

Decoding takes one token from each of many sequences, so its batches are made of tokens that lie far apart in the
trace. Prefill takes whole prompts, so its batches are consecutive tokens. Recordings do not say which step had which
tokens: a user who knows the sizes gives them as a mix. Tensors carry their shape in their name: T tokens, K experts
chosen, E experts, B batches, N tokens of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = get_args(Phase)
_PART = re.compile(r"(decode|prefill):([0-9]{1,6}(?:,[0-9]{1,6})*)")


@dataclass(frozen=True, slots=True)
class Step:
    """A step of serving: the phase, and how many tokens all ranks compute together."""

    phase: Phase
    tokens: int


DEFAULT_MIX = (Step("decode", 8), Step("decode", 32), Step("decode", 64), Step("prefill", 2048), Step("prefill", 8192))


def parse_mix(text: str) -> tuple[Step, ...]:
    """The steps in a text like `decode:8,32,64;prefill:8192`. Raises OutputError if it is another."""
    parts = [_PART.fullmatch(part.strip()) for part in text.split(";")]
    steps = [Step(part[1], int(size)) for part in parts if part for size in part[2].split(",")]  # type: ignore[arg-type]
    if None in parts or not all(step.tokens for step in steps):
        raise OutputError(f"--batch-mix {text!r:.80}: expected batch sizes such as decode:8,32,64;prefill:8192")
    return tuple(dict.fromkeys(steps))


def describe_mix(mix: Sequence[Step]) -> str:
    """The text that `parse_mix` reads."""
    sizes = {phase: [str(step.tokens) for step in mix if step.phase == phase] for phase in PHASES}
    return ";".join(f"{phase}:{','.join(of_phase)}" for phase, of_phase in sizes.items() if of_phase)


def count_experts(ids_TK: Tensor, num_experts: int, step: Step, most: int) -> Tensor:
    """How many tokens choose each expert, in batches of a trace.

    Parameters:
        ids_TK: the logical experts that each token chose, tokens in their order; at least `step.tokens`
        num_experts: E
        step: the batches to make; tokens that are too few for a whole batch are left out
        most: of more batches than this, take so many, spread evenly

    Returns:
        count_BE
    """
    import torch

    number = len(ids_TK) // step.tokens
    whole_TK = ids_TK[: number * step.tokens]
    if step.phase == "decode":  # token `b` of each stretch of `number` tokens
        batch_BNK = whole_TK.view(step.tokens, number, -1).transpose(0, 1)
    else:
        batch_BNK = whole_TK.view(number, step.tokens, -1)
    if number > most:
        batch_BNK = batch_BNK[[turn * number // most for turn in range(most)]]
    batches = len(batch_BNK)
    slot_BN = batch_BNK.flatten(1) + num_experts * torch.arange(batches).unsqueeze(1)
    return slot_BN.flatten().bincount(minlength=batches * num_experts).view(batches, num_experts)
