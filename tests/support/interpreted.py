"""The router's kernel run by Triton's interpreter, which needs no GPU; TRITON_INTERPRET=1 must be set.

python interpreted.py route CASE      JSON in, a line of JSON out: see `route`
python interpreted.py sum CASE        the same: see `sum_rows`
python interpreted.py map CASE        the same: see `map_some_ids`
python interpreted.py copies CASE     the same: see `choose_some_copies`
python interpreted.py weight CASE     the same: see `choose_some_by_weight`
python interpreted.py                 for each line of input, such as ["route", ...CASE], a line
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from reshard.vllm import grouped_topk as module

TOKENS = 10


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    return tl.exp(x)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    return 2 * tl.sigmoid(2 * x) - 1


def route(case: list[Any]) -> list[Any]:
    """The kernel on random logits: where experts stand, values and scores in logical order, ids and weights."""
    module.libdevice = SimpleNamespace(exp=exp, tanh=tanh)  # CUDA's own are not there
    torch.cuda.get_device_capability = lambda device: (8, 0)  # type: ignore[assignment,misc]
    experts, groups, chosen_groups, top_k, softmax, biased, dtype, kind = case
    summing = module.Summing(*softmax) if softmax else None
    choice = module.Choice(experts, groups, chosen_groups, top_k, False, 1.0, summing, biased)
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(TOKENS, experts, generator=generator)
    if kind == "ties":
        logits = logits.round() / 2
    if kind == "minus infinity":
        logits[torch.rand(logits.shape, generator=generator) < 0.3] = float("-inf")
    logits = logits.to(getattr(torch, dtype))
    place = torch.randperm(experts, generator=generator)
    bias = torch.randn(experts, generator=generator) / 20 if biased and kind != "ties" else torch.zeros(experts)
    scores = torch.softmax(logits.float(), dim=1) if softmax else logits.float().sigmoid()
    scores = scores.to(logits.dtype).float()
    physical_logits, physical_bias = torch.empty_like(logits), torch.empty_like(bias)
    physical_logits[:, place], physical_bias[place] = logits, bias
    weights, ids = module.grouped_topk(physical_logits, physical_bias if biased else None, place.int(), choice)
    # the variant for originals: the same bits in, in logical order, give the same bits out
    again = module.grouped_topk(logits, bias if biased else None, place.int(), choice, logical=True)
    assert torch.equal(weights.view(torch.int32), again[0].view(torch.int32))
    assert torch.equal(ids, again[1])
    values = scores + bias if biased else scores
    return [found.tolist() for found in (place, values, ids, weights, scores)]


@triton.jit
def _sum(
    x: tl.tensor,
    out: tl.tensor,
    size: tl.constexpr,
    block: tl.constexpr,
    warps: tl.constexpr,
    side_by_side: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    numbers = tl.load(x + row * size + tl.arange(0, size))
    tl.store(out + row, module._sum_like_torch(numbers, size, block, warps, side_by_side))


def sum_rows(case: list[Any]) -> list[Any]:
    """Rows of numbers, and their sums as the kernel takes them, by `float.hex`."""
    size, *order = case
    rows = torch.rand(TOKENS, size, generator=torch.Generator().manual_seed(size)).exp()
    totals = torch.zeros(TOKENS)
    _sum[(TOKENS,)](rows, totals, size, *order)
    return [[[number.hex() for number in row] for row in rows.tolist()], [total.hex() for total in totals.tolist()]]


def map_some_ids(case: list[Any]) -> list[Any]:
    """Random ids, some of them negative, where experts stand, and what `map_ids` makes of the ids."""
    from reshard.vllm.map_ids import map_ids

    tokens, top_k, experts, dtype = case
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator).to(getattr(torch, dtype))
    place = torch.randperm(experts, generator=generator).int()
    mapped = map_ids(ids.t().contiguous().t(), place)  # not contiguous, as some routers' ids are not
    assert mapped.dtype == ids.dtype
    return [ids.tolist(), place.tolist(), mapped.tolist()]


def choose_some_copies(case: list[Any]) -> list[Any]:
    """What the kernel makes of ids [T, K], of which the first `real` rows count, and what the pure function chooses."""
    from reshard.placement.copy_choice import choose_copies, schedule
    from reshard.vllm import choose_copies as kernel

    torch.cuda.get_device_capability = lambda device: (8, 0)  # type: ignore[assignment,misc]
    placement, experts, ranks, rows, real, dtype = case
    prepared = schedule(placement, experts, ranks)
    ids = torch.tensor(rows, dtype=getattr(torch, dtype))
    tokens = None if real is None else torch.tensor([real], dtype=torch.int32)
    on_cpu, load = kernel.tables(prepared, "cpu"), torch.zeros(len(placement), dtype=torch.int32)
    for wanted in (True, False):  # only the first is counted
        record = kernel.Record(load, torch.tensor(wanted))
        mapped = kernel.choose_copies(ids, on_cpu, tokens, record)
        assert torch.equal(mapped, kernel.choose_copies(ids, on_cpu, tokens))
    assert mapped.dtype == ids.dtype
    active = torch.zeros(1, experts, dtype=torch.long)
    counted = ids[:real].long()
    active[0, counted[counted >= 0]] = 1
    return [mapped.tolist(), choose_copies(active, prepared)[0].tolist(), load.tolist()]


def choose_some_by_weight(case: list[Any]) -> list[Any]:
    """As `choose_some_copies`, by weight; and what all rows make the kernel choose, not only the first `real` ones."""
    from reshard.placement import copy_choice
    from reshard.vllm import choose_by_weight as kernel
    from reshard.vllm.choose_copies import Record, tables

    placement, experts, ranks, rows, real, dtype, name = case
    weight = getattr(copy_choice, name)
    prepared = copy_choice.schedule(placement, experts, ranks)
    ids = torch.tensor(rows, dtype=getattr(torch, dtype))
    tokens = None if real is None else torch.tensor([real], dtype=torch.int32)
    on_cpu, load = tables(prepared, "cpu"), torch.zeros(len(placement), dtype=torch.int32)
    for wanted in (True, False):  # only the first is counted
        record = Record(load, torch.tensor(wanted))
        mapped = kernel.choose_by_weight(ids, on_cpu, weight, tokens, record)
        assert torch.equal(mapped, kernel.choose_by_weight(ids, on_cpu, weight, tokens))
    assert mapped.dtype == ids.dtype
    every = kernel.choose_by_weight(ids, on_cpu, weight, tokens, all_rows=True)
    assert torch.equal(every, kernel.choose_by_weight(ids, on_cpu, weight))
    found = []
    for counted in (ids[:real].long(), ids.long()):
        tokens_of = counted[counted >= 0].bincount(minlength=experts)
        found.append(copy_choice.choose_copies(weight.of(tokens_of).unsqueeze(0), prepared)[0].tolist())
    return [mapped.tolist(), every.tolist(), *found, load.tolist()]


def answer(what: str, case: list[Any]) -> None:
    """Print what was asked for."""
    asked = {"route": route, "sum": sum_rows, "map": map_some_ids, "copies": choose_some_copies}
    asked |= {"weight": choose_some_by_weight}
    print(json.dumps(asked[what](case)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        answer(sys.argv[1], json.loads(sys.argv[2]))
    else:
        for line in sys.stdin:
            asked, *case_of = json.loads(line)
            answer(asked, case_of)
