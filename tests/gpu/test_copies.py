"""Originals served with copies of experts by real vLLM with its EPLB and CUDA kernels.

"Identical" means that every bit of all tokens and log-probabilities is equal. With copies, ranks sum in another order
than without. So answers are compared in two ways: each prompt's first token, and how far the log-probabilities of
prompts lie from the original's, beside those of zigzag, which also sums in another order.

Experts lie as under zigzag, and each rank has SPARE slots more.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from copies_oracle import random_copies
from harness import EXPERT_PARALLEL, GRAPHS, PROMPTS, Answer, Gpu, together
from test_gpu import agreeing, assert_by_the_kernel, assert_identical, same_first_tokens, v3

from reshard.placement.copy_choice import BY_ACTIVE, chosen_by, schedule, serving_slots

EXPERTS, RANKS, SPARE = 256, 2, 8
ZIGZAG = {"RESHARD_PLACEMENT": "zigzag"}
REDUNDANT = RANKS * SPARE
EPLB = {
    "enable_eplb": True,
    "eplb_config": {
        **{"window_size": 4, "step_interval": 8, "use_async": False, "communicator": "torch_gloo"},
        "num_redundant_experts": REDUNDANT,
    },
}
WITH_COPIES: dict[str, Any] = {**EXPERT_PARALLEL, **EPLB}
# With torch.compile and one GPU for each rank, vLLM 0.26 ended in an illegal memory access on H100 and H200, without
# reshard too. Without these two ways to add up what ranks have computed it did not.
NO_SYMMETRIC_MEMORY = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
IN_GRAPHS: dict[str, Any] = {
    **EXPERT_PARALLEL,
    "enforce_eager": False,
    "compilation_config": {**GRAPHS["compilation_config"], "pass_config": {"fuse_allreduce_rms": False}},
}
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL and CUDA graphs need a GPU for each rank")


def copies(gpu: Gpu, model: Path, kind: str = "random") -> dict[str, str]:
    """Write a placement file with copies; return the environment that serves it.

    The spare slots of a rank hold copies of random experts of others, other ones in each layer, or of its own.
    """
    names = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    orders = {}
    for layer in sorted({name.split(".experts.")[0] for name in names if ".experts." in name}):
        order = random_copies(Random(layer), EXPERTS, RANKS, SPARE, 2)
        if kind == "own":
            size = EXPERTS // RANKS
            own = [list(range(rank, EXPERTS, RANKS)) for rank in range(RANKS)]
            order = [expert for rank in range(RANKS) for expert in own[rank] + own[rank][: SPARE % size]]
        orders[layer] = order
    path = gpu.directory / f"{model.name}-{kind}-copies.json"
    path.write_text(json.dumps({"physical_to_logical": orders, "ep_size": RANKS}))
    return {"RESHARD_PLACEMENT": str(path)}


def assert_with_copies(answer: Answer) -> None:
    assert answer.status == 0, answer.log[-8000:]
    assert re.search(rf"EPLB starts from the placement .* in 2 MoE layers, {REDUNDANT} redundant", answer.log)
    assert_by_the_kernel(answer)


def assert_right(answer: Answer, expected: Answer) -> None:
    assert_with_copies(answer)
    same = same_first_tokens(answer, expected)
    print(f"copies: the first token of {same} of {len(answer.tokens)} prompts agrees with the original's")
    assert same >= len(answer.tokens) - 1


def far(one: Answer, other: Answer) -> float:
    """The median difference of the log-probabilities of prompts."""
    found = []
    for prompt, same_prompt in zip(one.prompt_logprobs, other.prompt_logprobs, strict=True):
        for position, same_position in zip(prompt, same_prompt, strict=True):
            found += [
                abs(float.fromhex(position[token]) - float.fromhex(same_position[token]))
                for token in position.keys() & same_position.keys()
            ]
    return statistics.median(found)


def test_answers_are_the_originals_and_experts_stay(gpu: Gpu) -> None:
    source = v3(gpu)
    answer, expected, zigzag, spoilt = together(
        lambda: gpu.answer(source, WITH_COPIES, ranks=RANKS, environment=copies(gpu, source)),
        lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=RANKS),
        lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=RANKS, environment=ZIGZAG),
        lambda: gpu.answer(source, WITH_COPIES, ranks=RANKS, environment={**copies(gpu, source), "COPIES_SPOILT": "1"}),
    )
    assert_right(answer, expected)
    assert "EPLB does not move experts while it serves" in answer.log
    assert not re.search(r"Rearranged experts\s+in", answer.log)
    distances = [far(other, expected) for other in (answer, zigzag, spoilt)]
    print("from the original's log-probabilities: copies {}, zigzag {}, the control {}".format(*distances))
    assert distances[0] < 2 * distances[1] < distances[2]
    found = agreeing(spoilt, expected)
    print(f"the control, maps of another placement: {found} of {len(expected.flat)} tokens agree")
    assert found < len(expected.flat) // 2


def test_pinned_copies_are_identical_to_the_same_placement_without_copies(gpu: Gpu) -> None:
    source = v3(gpu)
    pinned, own, expected = together(
        lambda: gpu.answer(source, WITH_COPIES, ranks=RANKS, environment={**copies(gpu, source), "COPIES_PINNED": "1"}),
        lambda: gpu.answer(source, WITH_COPIES, ranks=RANKS, environment=copies(gpu, source, "own")),
        lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=RANKS, environment=ZIGZAG),
    )
    for answer in (pinned, own):
        assert_with_copies(answer)
    assert_identical(pinned, own)
    assert_identical(pinned, expected)


def test_every_pair_is_computed_once_and_ranks_choose_alike(gpu: Gpu, tmp_path: Path) -> None:
    source = v3(gpu)
    placement = copies(gpu, source)
    texts = [[Random(number).randrange(2, 252) for _ in range(450)] for number in range(4)]
    recorded = {**placement, "COPIES_RECORDED": str(tmp_path)}
    answer = gpu.answer(source, WITH_COPIES, prompts=[*PROMPTS, *texts], ranks=RANKS, environment=recorded)
    assert_with_copies(answer)
    first, second = ((tmp_path / f"{rank}.jsonl").read_text().splitlines() for rank in range(RANKS))
    assert first == second, "both ranks map every batch alike, so the owner of a slot computes its pairs, and no other"
    orders = list(json.loads(Path(placement["RESHARD_PLACEMENT"]).read_text())["physical_to_logical"].values())
    prepared = [schedule(order, EXPERTS, RANKS) for order in orders]
    used: dict[tuple[int, int], set[int]] = {}
    sizes = Counter[str]()
    for layer, tokens, logical, physical in map(json.loads, first):
        assert [[orders[layer][slot] for slot in row] for row in physical] == logical
        counts = torch.tensor(logical[:tokens], dtype=torch.long).flatten().bincount(minlength=EXPERTS)
        chosen = serving_slots(counts.unsqueeze(0), prepared[layer], len(logical))[0].tolist()
        assert physical == [[chosen[expert] for expert in row] for row in logical], "as the pure function chooses"
        for expert in {expert for row in logical for expert in row}:
            used.setdefault((layer, expert), set()).add(chosen[expert])
        chooses = chosen_by(len(logical), same_tokens=True)
        sizes["fixed" if chooses is None else "small" if chooses is BY_ACTIVE else "large"] += 1
    several = sum(len(slots) > 1 for slots in used.values())
    print(f"batches: {dict(sizes)}; of {len(used)} experts {several} were served by several copies")
    assert sizes["small"] > len(PROMPTS)
    assert sizes["large"]
    assert several, "batches differ in the copies that they use"


@pytest.mark.parametrize("use_async", [False, True], ids=["at once", "layer by layer"])
def test_the_choice_follows_eplb_where_it_rearranges(use_async: bool, gpu: Gpu) -> None:
    source = v3(gpu)
    rearranging = {
        **WITH_COPIES,
        "eplb_config": {**EPLB["eplb_config"], "use_async": use_async},  # type: ignore[dict-item]
        "additional_config": {"reshard": {"rearrange": True}},
    }
    answer, expected = together(
        lambda: gpu.answer(source, rearranging, ranks=RANKS, environment=copies(gpu, source)),
        lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=RANKS),
    )
    assert_right(answer, expected)
    assert "EPLB does not move experts" not in answer.log
    moved = r"Rearranging experts \(async mode\)" if use_async else r"Rearranged experts\s+in"
    assert re.search(moved, answer.log)


def test_copies_without_room_for_them_are_refused_with_the_option_to_give(gpu: Gpu) -> None:
    source = v3(gpu)
    without, other = together(
        lambda: gpu.answer(source, EXPERT_PARALLEL, ranks=RANKS, environment=copies(gpu, source)),
        lambda: gpu.answer(
            source,
            {**WITH_COPIES, "eplb_config": {"num_redundant_experts": 4}},
            ranks=RANKS,
            environment=copies(gpu, source),
        ),
    )
    option = r"--eplb-config '\{\"num_redundant_experts\": 16\}'"
    assert without.status != 0
    assert re.search(rf"vLLM holds copies with EPLB only; add --enable-eplb {option}", without.log)
    assert other.status != 0
    assert re.search(rf"it has 16 copies, and vLLM has room for 4; give {option}", other.log)


@two_gpus
def test_in_cuda_graphs_too_pinned_copies_are_identical_and_chosen_ones_right(gpu: Gpu) -> None:
    source = v3(gpu)
    with_copies = {**IN_GRAPHS, **EPLB}
    rearranging = {**with_copies, "additional_config": {"reshard": {"rearrange": True}}}

    def answer(llm: dict[str, Any], **environment: str) -> Callable[[], Answer]:
        return lambda: gpu.answer(source, llm, ranks=RANKS, environment={**NO_SYMMETRIC_MEMORY, **environment})

    pinned, zigzag, chosen, moved, expected = together(
        answer(with_copies, **copies(gpu, source), COPIES_PINNED="1"),
        answer(IN_GRAPHS, **ZIGZAG),
        answer(with_copies, **copies(gpu, source)),
        answer(rearranging, **copies(gpu, source)),
        answer(IN_GRAPHS),
    )
    assert_with_copies(pinned)
    assert_identical(pinned, zigzag)
    assert_right(chosen, expected)
    assert_right(moved, expected)
    assert re.search(r"Rearranged experts\s+in", moved.log), "graphs read the maps that were rewritten"


@two_gpus
def test_data_parallel_answers_are_right(gpu: Gpu) -> None:
    each_its_own = {**EXPERT_PARALLEL, "tensor_parallel_size": 1, "data_parallel_size": 2}
    source = v3(gpu)
    answer, expected = together(
        lambda: gpu.answer(source, {**each_its_own, **EPLB}, ranks=RANKS, environment=copies(gpu, source)),
        lambda: gpu.answer(source, each_its_own, ranks=RANKS),
    )
    assert_right(answer, expected)
