"""Originals served with RESHARD_PLACEMENT by real vLLM with its CUDA kernels, compared with stock vLLM.

"Identical" means that every bit of all tokens and log-probabilities is equal. At EP 1 any placement is identical to the
original, as the order of sums stays the same. EP ranks under zigzag are identical to stock ones under round-robin. EPLB
and data parallelism sum in another order; there we compare only each prompt's first token.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import EAGER, EXPERT_PARALLEL, GRAPHS, HERE, PROMPTS, TIMEOUT, Gpu, together
from test_gpu import (
    REPEATS,
    Model,
    _small,
    agreeing,
    assert_by_the_kernel,
    assert_identical,
    assert_right_while_experts_move,
    r1,
    same_first_tokens,
    uneven,
    v2,
    v3,
)

ZIGZAG = {"RESHARD_PLACEMENT": "zigzag"}


def one_group(gpu: Gpu) -> Path:
    """256 experts in one group, sigmoid scores with a bias, as in Kimi-K2."""
    return _small(gpu, "deepseek_v3", n_group=1, topk_group=1)


def softmax_in_one_group(gpu: Gpu) -> Path:
    """160 experts in one group, softmax scores: vLLM's own router chooses, and the kernel in `map_ids` maps its ids."""
    return _small(gpu, "deepseek_v2", n_routed_experts=160, n_group=1, topk_group=1, num_experts_per_tok=6)


def random_placement(gpu: Gpu, model: Path, ep: int) -> dict[str, str]:
    """Write a placement file with another random order in each layer; return the environment that serves it."""
    names = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    experts = [name.split(".experts.") for name in names if ".experts." in name]
    layers = sorted({layer for layer, _ in experts})
    count = len({rest.split(".")[0] for _, rest in experts})
    chance = random.Random(0)
    path = gpu.directory / f"{model.name}-random{ep}.json"
    orders = {layer: chance.sample(range(count), count) for layer in layers}
    path.write_text(json.dumps({"physical_to_logical": orders, "ep_size": ep}))
    return {"RESHARD_PLACEMENT": str(path)}


def assert_placed(log: str, layers: int = 2) -> None:
    assert re.search(rf"\b{layers} MoE layers are placed: .*digest .*every slot was seen", log)


@pytest.mark.parametrize("model", [v3, v2, one_group, softmax_in_one_group])
def test_ep_1_with_torch_compile_and_cuda_graphs_is_identical_in_any_placement(model: Model, gpu: Gpu) -> None:
    source = model(gpu)
    placement = random_placement(gpu, source, 1)
    answer, expected = together(
        lambda: gpu.answer(source, GRAPHS, environment=placement), lambda: gpu.answer(source, GRAPHS)
    )
    assert_identical(answer, expected)
    assert_placed(answer.log)
    if model is softmax_in_one_group:
        assert "routers:" not in answer.log
    else:
        assert_by_the_kernel(answer)


@pytest.mark.parametrize(("model", "ranks"), [(v3, 2), (v3, 4), (v3, 8), (v2, 2), (v2, 8), (uneven, 8)])
def test_ep_is_identical_to_stock_round_robin(model: Model, ranks: int, gpu: Gpu) -> None:
    source = model(gpu)
    original = {**EXPERT_PARALLEL, "expert_placement_strategy": "round_robin"}
    answer, expected = together(
        lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=ranks, environment=ZIGZAG),
        lambda: gpu.answer(source, original, ranks=ranks),
    )
    assert "round_robin" in expected.log
    assert_identical(answer, expected)
    assert_placed(answer.log)
    assert_by_the_kernel(answer)


def test_a_random_placement_of_each_layer_is_identical_to_its_baked_output(gpu: Gpu) -> None:
    source = v3(gpu)
    placement = random_placement(gpu, source, 2)

    def make(out: Path) -> None:
        arguments = ["place", "--src", source, "--ep", "2", "--out", out, "--quiet", "--strategy", "file"]
        command = [sys.executable, "-m", "reshard", *arguments, "--map", placement["RESHARD_PLACEMENT"]]
        subprocess.run(command, env=gpu.environment, check=True, timeout=TIMEOUT)

    output = gpu.made("v3-random2", make)
    answer, expected = together(
        lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=2, environment=placement),
        lambda: gpu.answer(output, EXPERT_PARALLEL, ranks=2),
    )
    assert_identical(answer, expected)
    assert_placed(answer.log)


def test_mtp_drafts_are_placed_and_accepted_as_often_as_without_a_placement(gpu: Gpu) -> None:
    source = _small(gpu, "deepseek_v3", mtp=True, num_hidden_layers=2)
    drafting = {**EAGER, "speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    placement = random_placement(gpu, source, 1)
    answer, expected = together(
        lambda: gpu.answer(source, drafting, environment=placement), lambda: gpu.answer(source, drafting)
    )
    assert_identical(answer, expected)
    assert answer.drafts == expected.drafts
    assert "draft: 1 MoE layers are placed" in answer.log


@pytest.mark.parametrize("how", [EAGER, GRAPHS], ids=["eager", "graphs"])
def test_r1_layers_of_full_size_in_fp8_blocks_are_identical_at_ep_1(how: dict[str, Any], gpu: Gpu) -> None:
    source = r1(gpu)
    placement = random_placement(gpu, source, 1)
    answer, expected = together(
        lambda: gpu.answer(source, how, repeats=REPEATS, environment=placement),
        lambda: gpu.answer(source, how, repeats=REPEATS),
    )
    assert_identical(answer, expected)
    assert answer.digests == expected.digests
    assert_placed(answer.log)


def test_returned_experts_are_logical(gpu: Gpu) -> None:
    source = v3(gpu)
    returning = {**EAGER, "enable_return_routed_experts": True, "enable_prefix_caching": True}  # 0.33 wants both
    placement = random_placement(gpu, source, 1)
    placed, output, expected = together(
        lambda: gpu.answer(source, returning, environment=placement),
        lambda: gpu.answer(gpu.resharded(source, 8), returning),
        lambda: gpu.answer(source, returning),
    )
    for answer in (placed, output):
        assert_identical(answer, expected)
        assert answer.routed == expected.routed != [None] * len(PROMPTS)


def test_sleep_level_2_and_a_reload_keep_the_placement(gpu: Gpu) -> None:
    source = v3(gpu)

    def steps(model: Path, environment: dict[str, str]) -> dict[str, Any]:
        request = json.dumps({"model": str(model), "prompts": PROMPTS[:4], "max_tokens": 16, "llm": GRAPHS})
        command, more = [sys.executable, HERE / "sleep.py"], {**gpu.environment, **environment}
        ran = subprocess.run(command, env=more, input=request, capture_output=True, text=True, timeout=2 * TIMEOUT)
        assert ran.returncode == 0, ran.stderr[-6000:]
        found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return found

    placement, out = random_placement(gpu, source, 1), gpu.resharded(source, 8)
    with ThreadPoolExecutor(3) as pool:
        placed, output, stock = pool.map(steps, (source, out, source), (placement, {}, {}))
    assert placed["at first"] == output["at first"] == stock["at first"]
    for step in ("reload", "sleep 2 and reload"):
        assert stock[step] == stock["at first"], f"stock vLLM loses its weights in {step}"
        assert placed[step] == output[step] == stock["at first"], step


@pytest.mark.parametrize("redundant", [0, 4])
def test_eplb_starts_from_the_placement_and_answers_stay_right(redundant: int, gpu: Gpu) -> None:
    source = v3(gpu)
    steps = {"window_size": 4, "step_interval": 8, "use_async": False, "communicator": "torch_gloo"}
    balancing = {
        **EXPERT_PARALLEL,
        "enable_eplb": True,
        "eplb_config": {**steps, "num_redundant_experts": redundant},
    }
    placement = random_placement(gpu, source, 2)
    answer, expected = together(
        lambda: gpu.answer(source, balancing, ranks=2, environment=placement),
        lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=2),
    )
    assert_right_while_experts_move(answer, expected)
    assert re.search(rf"EPLB starts from the placement .* in 2 MoE layers, {redundant} redundant", answer.log)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="vLLM needs NCCL for this, and NCCL a GPU for each rank")
def test_data_parallel_answers_stay_right(gpu: Gpu) -> None:
    each_its_own = {**EXPERT_PARALLEL, "tensor_parallel_size": 1, "data_parallel_size": 2}
    source = v3(gpu)
    placement = random_placement(gpu, source, 2)
    answer, expected = together(
        lambda: gpu.answer(source, each_its_own, ranks=2, environment=placement),
        lambda: gpu.answer(source, each_its_own, ranks=2),
    )
    for one in (answer, expected):
        assert one.status == 0, one.log[-8000:]
    assert_placed(answer.log)
    assert same_first_tokens(answer, expected) >= len(expected.tokens) - 1


def test_the_control_a_router_that_ignores_the_placement_gives_other_tokens(gpu: Gpu) -> None:
    source = softmax_in_one_group(gpu)
    placement = {**random_placement(gpu, source, 1), "ROUTER_FORGETS": "1"}
    spoilt, expected = together(
        lambda: gpu.answer(source, EAGER, environment=placement), lambda: gpu.answer(source, EAGER)
    )
    assert agreeing(spoilt, expected) < len(expected.flat) // 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_map_ids_gives_the_same_ids_as_indexing(dtype: torch.dtype) -> None:
    from reshard.vllm.map_ids import map_ids

    for tokens in (1, 7, 64, 4096):
        ids = torch.randint(-1, 256, (tokens, 8), device="cuda").to(dtype)
        place = torch.randperm(256, device="cuda").int()
        expected = torch.where(ids >= 0, place[ids.clamp(min=0).long()].to(dtype), ids)
        assert torch.equal(map_ids(ids, place), expected)
