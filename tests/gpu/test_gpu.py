"""Real vLLM with its CUDA kernels: compares its answers from outputs of `reshard zigzag` with those from the originals.

"Identical" means that every bit of all tokens and log-probabilities is equal. If there are more EP ranks than GPUs, all
ranks share one GPU, through gloo.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from earlier_contracts import with_shaped_gates
from harness import EAGER, EXPERT_PARALLEL, GRAPHS, HERE, Answer, Gpu, together

REPEATS = 4

Model = Callable[[Gpu], Path]


def _small(gpu: Gpu, kind: str, *, mtp: bool = False, **config: Any) -> Path:
    def make(directory: Path) -> None:
        options = [*(["--mtp"] if mtp else []), "--config", json.dumps(config)]
        command = [sys.executable, HERE / "models.py", kind, directory, *options]
        subprocess.run(command, env=gpu.environment, check=True)

    return gpu.made(f"{kind}{'-mtp' * mtp}{''.join(f'-{value}' for value in config.values())}", make)


def v3(gpu: Gpu) -> Path:
    """256 experts in 8 groups, sigmoid scores with a bias."""
    return _small(gpu, "deepseek_v3")


def v2(gpu: Gpu) -> Path:
    """160 experts in 8 groups, softmax scores without a bias."""
    return _small(gpu, "deepseek_v2", n_routed_experts=160, topk_group=3, num_experts_per_tok=6)


def uneven(gpu: Gpu) -> Path:
    """210 experts in 7 groups, which cannot be divided evenly among 8 ranks."""
    return _small(gpu, "deepseek_v3", n_routed_experts=210, n_group=7, topk_group=3)


def r1(gpu: Gpu) -> Path:
    """A dense layer and two MoE layers of DeepSeek-R1 at full size, FP8 in blocks of 128 x 128."""

    def make(directory: Path) -> None:
        subprocess.run([sys.executable, HERE / "models.py", "r1", directory], env=gpu.environment, check=True)

    return gpu.made("r1", make)


def agreeing(one: Answer, other: Answer) -> int:
    """How many tokens are the same in both answers."""
    for answer in (one, other):
        assert answer.status == 0, answer.log[-6000:]
    return sum(a == b for a, b in zip(one.flat, other.flat, strict=True))


def assert_identical(answer: Answer, expected: Answer) -> None:
    found = agreeing(answer, expected)
    assert answer.tokens == expected.tokens, f"{found} of {len(expected.flat)} tokens agree"
    for what in ("logprobs", "prompt_logprobs"):
        rows = [
            (prompt, position)
            for prompt, (one, other) in enumerate(
                zip(getattr(answer, what) or (), getattr(expected, what) or (), strict=True)
            )
            for position in range(len(one))
            if one[position] != other[position]
        ]
        assert not rows, f"{what} differ at (prompt, position) {rows}"
    assert answer.bits == expected.bits
    routers = sorted(set(re.findall(r"routers: .*", answer.log)))
    print(f"identical: {len(expected.flat)} tokens and their log-probabilities; {routers}")


def assert_by_the_kernel(answer: Answer) -> None:
    assert "routers: one kernel for" in answer.log
    assert "routers: vLLM's own" not in answer.log


@pytest.mark.parametrize("model", [v3, v2])
def test_ep_1_with_torch_compile_and_cuda_graphs_is_identical_to_the_original(model: Model, gpu: Gpu) -> None:
    source = model(gpu)
    output = gpu.resharded(source, 8)
    answer, expected = together(lambda: gpu.answer(output, GRAPHS), lambda: gpu.answer(source, GRAPHS))
    assert_identical(answer, expected)
    assert_by_the_kernel(answer)


@pytest.mark.parametrize(("model", "ranks"), [(v3, 2), (v3, 4), (v3, 8), (v2, 2), (v2, 8), (uneven, 8)])
def test_ep_is_identical_to_the_original_under_round_robin(model: Model, ranks: int, gpu: Gpu) -> None:
    source = model(gpu)
    output = gpu.resharded(source, ranks)
    original = {**EXPERT_PARALLEL, "expert_placement_strategy": "round_robin"}
    answer, expected = together(
        lambda: gpu.answer(output, EXPERT_PARALLEL, ranks=ranks), lambda: gpu.answer(source, original, ranks=ranks)
    )
    assert "round_robin" in expected.log
    assert_identical(answer, expected)
    assert_by_the_kernel(answer)


WITHOUT_PLUGIN = {"VLLM_PLUGINS": "one_gpu"}  # with it, an output that lost its contract is refused


def without_the_contract(gpu: Gpu) -> Path:
    """The output of `v3`, but with the original's config.json, and gates in the original's shape."""

    def make(directory: Path) -> None:
        shutil.copytree(gpu.resharded(v3(gpu), 8), directory, copy_function=os.link)
        (directory / "config.json").unlink()
        shutil.copy(v3(gpu) / "config.json", directory)
        with_shaped_gates(v3(gpu), directory)

    return gpu.made("no-contract", make)


def test_the_control_without_the_contract_gives_other_tokens(gpu: Gpu) -> None:
    source, without = v3(gpu), without_the_contract(gpu)
    spoilt, expected = together(
        lambda: gpu.answer(without, EAGER, environment=WITHOUT_PLUGIN), lambda: gpu.answer(source, EAGER)
    )
    found = agreeing(spoilt, expected)
    print(f"without the contract {found} of {len(expected.flat)} tokens agree")
    assert found < len(expected.flat) // 2


def test_mtp_drafts_are_accepted_as_often_as_with_the_original(gpu: Gpu) -> None:
    source = _small(gpu, "deepseek_v3", mtp=True, num_hidden_layers=2)
    drafting = {**EAGER, "speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    output = gpu.resharded(source, 8)
    answer, expected = together(lambda: gpu.answer(output, drafting), lambda: gpu.answer(source, drafting))
    assert_identical(answer, expected)
    assert answer.drafts == expected.drafts
    assert expected.drafts[0]
    print(f"drafted and accepted: {expected.drafts}")


def same_first_tokens(one: Answer, other: Answer) -> int:
    """How many prompts get the same first token; later ones soon differ, as other placements sum in another order."""
    return sum(a[0] == b[0] for a, b in zip(one.tokens, other.tokens, strict=True))


def assert_right_while_experts_move(answer: Answer, expected: Answer) -> None:
    assert answer.status == 0, answer.log[-8000:]
    assert re.search(r"Rearranged experts\s+in", answer.log), "EPLB continues from the placement"
    same = same_first_tokens(answer, expected)
    print(f"EPLB: the first token of {same} of {len(answer.tokens)} prompts agrees with the original's without it")
    assert same >= len(answer.tokens) - 1


def test_eplb_rearranges_from_zigzag_and_answers_stay_right(gpu: Gpu) -> None:
    source = v3(gpu)
    steps = {"window_size": 4, "step_interval": 8, "use_async": False, "communicator": "torch_gloo"}
    balancing = {**EXPERT_PARALLEL, "enable_eplb": True, "eplb_config": steps}
    output = gpu.resharded(source, 2)
    answer, expected = together(
        lambda: gpu.answer(output, balancing, ranks=2), lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=2)
    )
    assert_right_while_experts_move(answer, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="vLLM needs NCCL for this, and NCCL a GPU for each rank")
def test_data_parallel_answers_stay_right(gpu: Gpu) -> None:
    each_its_own = {**EXPERT_PARALLEL, "tensor_parallel_size": 1, "data_parallel_size": 2}
    source, output, without = v3(gpu), gpu.resharded(v3(gpu), 2), without_the_contract(gpu)
    answer, expected, spoilt = together(
        lambda: gpu.answer(output, each_its_own, ranks=2),
        lambda: gpu.answer(source, each_its_own, ranks=2),
        lambda: gpu.answer(without, each_its_own, ranks=2, environment=WITHOUT_PLUGIN),
    )
    for one in (answer, expected, spoilt):
        assert one.status == 0, one.log[-8000:]
    assert_by_the_kernel(answer)
    same, control = same_first_tokens(answer, expected), same_first_tokens(spoilt, expected)
    prompts = len(expected.tokens)
    print(f"data parallel: the first token of {same} of {prompts} prompts agrees; without the contract of {control}")
    assert same >= prompts - 1
    assert control < prompts // 2


@pytest.mark.parametrize("how", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_r1_layers_of_full_size_in_fp8_blocks_are_identical_at_ep_1(how: dict[str, Any], gpu: Gpu) -> None:
    source = r1(gpu)
    output = gpu.resharded(source, 8)
    answer, expected = together(
        lambda: gpu.answer(output, how, repeats=REPEATS), lambda: gpu.answer(source, how, repeats=REPEATS)
    )
    print(f"digests of repeated answers: output {answer.digests}, original {expected.digests}")
    assert_identical(answer, expected)
    assert answer.digests == expected.digests
    assert_by_the_kernel(answer)


def test_the_control_compiled_and_eager_answers_of_one_original_differ_in_bits(gpu: Gpu) -> None:
    compiled, eager = (gpu.answer(r1(gpu), how, repeats=REPEATS) for how in (GRAPHS, EAGER))
    print(f"{agreeing(compiled, eager)} of {len(eager.flat)} tokens agree; {compiled.digests}, {eager.digests}")
    assert compiled.bits != eager.bits
