"""vLLM's own `round_robin` with a kernel that takes a rank's experts to be consecutive, and a zigzag output beside it.

FlashInfer's CUTLASS kernel gets the number of EP ranks and a rank's own number, and no map of experts. Under
`round_robin` it computes an expert with the weights of another. An output of `reshard zigzag` and an original with
`RESHARD_PLACEMENT` have the same placement, but experts that are consecutive for every kernel.

FlashInfer compiles the kernel when it is first used, which takes long: compile it before.
"""

from __future__ import annotations

from typing import Any

from harness import EXPERT_PARALLEL, Answer, Gpu, together
from test_gpu import r1

CUTLASS: dict[str, Any] = {**EXPERT_PARALLEL, "moe_backend": "flashinfer_cutlass"}
TRITON: dict[str, Any] = {**EXPERT_PARALLEL, "moe_backend": "triton"}


def top_1(answer: Answer) -> list[str]:
    """The most likely token at every position of every prompt."""
    assert answer.status == 0, answer.log[-8000:]
    return [
        max(position, key=lambda token: float.fromhex(position[token]))
        for prompt in answer.prompt_logprobs
        for position in prompt
    ]


def test_round_robin_answers_as_another_model_where_zigzag_answers_as_the_original(gpu: Gpu) -> None:
    source = r1(gpu)
    output = gpu.resharded(source, 2)
    stock = {**CUTLASS, "expert_placement_strategy": "round_robin"}
    by_triton = {**TRITON, "expert_placement_strategy": "round_robin"}
    linear, zigzag = together(
        lambda: gpu.answer(source, CUTLASS, ranks=2), lambda: gpu.answer(output, CUTLASS, ranks=2)
    )
    round_robin, triton, placed = together(
        lambda: gpu.answer(source, stock, ranks=2),
        lambda: gpu.answer(source, by_triton, ranks=2),
        lambda: gpu.answer(source, CUTLASS, ranks=2, environment={"RESHARD_PLACEMENT": "zigzag"}),
    )
    assert "FLASHINFER_CUTLASS" in linear.log
    print(sorted({line for line in round_robin.log.splitlines() if "round_robin" in line or "ound-robin" in line}))
    expected = top_1(linear)
    answers = {"zigzag": zigzag, "placed": placed, "round_robin": round_robin, "round_robin by Triton": triton}
    found = {
        name: sum(one == other for one, other in zip(top_1(answer), expected, strict=True)) / len(expected)
        for name, answer in answers.items()
    }
    print(f"the most likely token agrees with linear's, of {len(expected)} positions: {found}")
    assert found["zigzag"] > 0.8
    assert found["placed"] > 0.8
    assert found["round_robin by Triton"] > 0.8, "the kernel is at fault, and not round_robin itself"
    assert found["round_robin"] < 0.5
